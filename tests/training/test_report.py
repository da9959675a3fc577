"""The page of curves: whole, offline, and right where it draws."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from omni_adapter.training.report import Chart, Line, Words, draw, make_charts, write_report


def entry(step: int, *, speaks: bool) -> dict:
    values = {
        "step": step, "loss": 6 * math.exp(-step / 40) + 0.2, "learning_rate": 1e-3 * (1 - step / 200),
        "grad_norm": 3 / (1 + step), "positions_per_s": 4000.0 + step, "audio_hours_per_h": 12.5,
        "padding_share": 0.25,
        "seconds": step * 0.5, "memory_skips": 0, "bad_steps": 1, "text/loss": 5 - step / 50,
        "text/accuracy": step / 200,
    }  # fmt: skip
    for row in range(7 if speaks else 0):
        values[f"row_{row}/loss"] = 4 + row / 4 - step / 60
        values[f"row_{row}/accuracy"] = step / (250 + 20 * row)
    return values


def write_run(folder, *, steps: int = 150) -> None:
    lines = [json.dumps(entry(step, speaks=step % 3 > 0)) for step in range(1, steps + 1)]
    (folder / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 151, "lo')  # cut off by a kill
    (folder / "settings.yaml").write_text("stage: align # <&>\n")
    (folder / "run.json").write_text(json.dumps({"settings": {"stage": "align"}, "command": "python <x>"}))
    (folder / "skipped.jsonl").write_text('{"reason": "not finite"}\n')
    answers = folder / "answers" / "step-00000100"
    answers.mkdir(parents=True)
    (answers / "prompt-0.txt").write_text("Paris & <b>more</b>")
    (answers / "prompt-0.wav").write_bytes(b"RIFF")


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("meta", "polyline"):
            assert self.open.pop() == tag


def test_page_is_whole_and_needs_no_network(tmp_path):
    write_run(tmp_path)
    page = write_report(tmp_path).read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert not re.search(r"https?://|<script|@import", page)
    assert sum(tag == "svg" for tag, _ in tags.seen) == 8
    players = [attributes for tag, attributes in tags.seen if tag == "audio"]
    assert [player["src"] for player in players] == ["answers/step-00000100/prompt-0.wav"]
    for text in (
        "Paris &amp; &lt;b&gt;more",
        "python &lt;x&gt;",
        "align # &lt;&amp;&gt;",
        "row 6",
        "not finite",
    ):
        assert text in page


def test_picture_shows_all_charts(tmp_path):
    images = pytest.importorskip("PIL.Image", reason="without Pillow there is a page, but no picture")
    write_run(tmp_path)
    write_report(tmp_path)
    with images.open(tmp_path / "curves.png") as picture:
        assert picture.size == (2 * 520 * 2, 4 * 300 * 2)
        assert len(picture.getcolors(1 << 20)) > 20


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0147, 5.86, ["0", "2", "4", "6"]),
        (1.2e-05, 0.003, ["0", "0.001", "0.002", "0.003"]),
        (0, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (156, 3991, ["0", "1,000", "2,000", "3,000", "4,000"]),
        (-3, -1, ["-3", "-2.5", "-2", "-1.5", "-1"]),
    ],
)
def test_round_numbers_stand_beside_the_field(low, high, expected):
    chart = Chart("figures", {"figure": [(1, low), (200, high)]})
    words = [shape for shape in draw(chart) if isinstance(shape, Words)]
    assert [word.text for word in words if word.anchor == "end"] == expected
    assert [word.text for word in words if word.anchor == "middle"] == ["50", "100", "150", "200", "step"]


@pytest.mark.parametrize("entries", [[], [{"step": 1, "loss": float("nan")}], [{"step": 1, "loss": 2.0}]])
def test_short_runs_have_a_page_too(tmp_path, entries):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(value) + "\n" for value in entries))
    assert write_report(tmp_path).read_text().endswith("</html>\n")


def test_curves_stay_inside_and_fall_where_values_fall():
    charts = make_charts([entry(step, speaks=True) for step in range(1, 2000)])
    assert [len(chart.curves) for chart in charts] == [1, 8, 8, 1, 1, 1, 1, 1]
    for chart in charts:
        shapes = draw(chart)
        for shape in shapes:
            points = shape.points if isinstance(shape, Line) else ((shape.x, shape.y),)
            assert all(0 <= x <= 520 and 0 <= y <= 300 for x, y in points), (chart.title, shape)
        assert chart.title in [shape.text for shape in shapes if isinstance(shape, Words)]
    curve = next(shape for shape in draw(charts[0]) if isinstance(shape, Line) and len(shape.points) > 100)
    heights = [y for _, y in curve.points]
    assert heights == sorted(heights), "a falling loss goes down, and pixels count from the top"
    assert len(heights) <= 400
