"""Show a judgement: a table in Markdown, and a page with players and plots that needs no network.

The figures of ``evaluate.py`` and some sounds in; ``report.md``'s text, ``index.html`` and ``sounds/`` out.
Knows nothing of talkers.

    python examples/tiny_talker/page.py build/tiny/report-*/report.json      # several talkers in one table
"""

import argparse
import html
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parent))

from judge import Clip

from omni_adapter.training.log import read_log
from omni_adapter.training.report import Line, Shape, Words, draw, make_charts, to_svg

SOUND_FOLDER = "sounds"


class Example(NamedTuple):
    """A question with all that was said.

    Attributes:
        turns: what was said before, one line a message.
        voice: who asks.
        transcript: what the talker wrote down of the question.
        text: what the talker wrote as its answer.
        understood: what pocketsphinx made of its spoken answer.
        sounds: recordings by name; ``question`` and ``reply`` among them.
    """

    kind: str
    turns: tuple[str, ...]
    question: str
    voice: str
    transcript: str
    expected: str
    text: str
    understood: str
    sounds: Mapping[str, Clip]


class Bar(NamedTuple):
    """One bar of a plot; shares are 0..1, ``low`` and ``high`` its interval."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


def percent(value: float) -> str:
    """Return a share in percent."""
    return f"{100 * value:.1f} %"


def write_table(report: Mapping[str, Any]) -> str:
    """Return the figures of a report in Markdown."""
    lines = [
        f"{report['questions']} held-out questions of {len(report['kinds'])} kinds; in brackets the 95 % "
        "interval.",
        "",
        *_table(("measure", "figure"), _measures(report)),
        "",
        *_table(
            ("bar", "wanted", "reached", "met"),
            (
                (
                    bar["name"],
                    f"{bar['sense']} {percent(bar['bar'])}",
                    percent(bar["reached"]),
                    "yes" if bar["met"] else "no",
                )
                for bar in report["bars"]
            ),
        ),
        "",
        "By kind of question: share of right text answers, and word error rate of what was said.",
        "",
        *_kinds_table(report),
        "",
        f"Times: {report['machine']['processor']}, {report['speed']['threads']} threads, "
        f"{report['machine']['device']}, load {report['speed']['load_average']}.",
        "",
    ]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def compare(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return the figures of several talkers side by side in Markdown; a dash where one was not measured."""
    columns = [dict(_measures(report)) for report in reports]
    names = dict.fromkeys(name for column in columns for name in column)
    head = ("measure", *(Path(report["talker"]).name for report in reports))
    rows = ((name, *(column.get(name, "-") for column in columns)) for name in names)
    return "\n".join(_table(head, rows)) + "\n"


def _with_interval(entry: Mapping[str, float]) -> str:
    return f"{percent(entry['value'])} ({100 * entry['low']:.1f} to {100 * entry['high']:.1f})"


def _measures(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, entry in report["text_answers"].items():
        yield f"text answer {name}, exact", _with_interval(entry)
    for name, entry in report["spoken_replies"].items():
        yield f"spoken reply, {name} voices ask, WER", _with_interval(entry["wer"])
        yield (
            f"spoken reply, {name} voices ask, WER against the talker's own text",
            _with_interval(entry["wer_against_own_text"]),
        )
    for name, entry in report["ceilings"].items():
        yield f"ceiling: the right answer, {name}, WER", _with_interval(entry["wer"])
    for name, entry in report["transcripts"].items():
        yield f"transcript of the question, {name} voices, WER", _with_interval(entry["wer"])
    for name, entry in report["text_ability"].items():
        yield f"text ability, {name}, exact", _with_interval(entry)
    yield "replies that end by themselves", _with_interval(report["endings"])
    speed = report["speed"]
    for key, name, unit in (
        ("first_audio_s", "first audio", " s"),
        ("real_time_factor", "real-time factor", ""),
    ):
        entry = speed[key]
        said = f"{entry['median']:.2f}{unit} (90 % within {entry['p90']:.2f})" if entry else "no sound"
        yield f"{name}, median of {speed['replies']} replies", said


def _kinds_table(report: Mapping[str, Any]) -> Iterator[str]:
    answers, spoken, ceilings = report["text_answers"], report["spoken_replies"], report["ceilings"]
    head = [
        "kind", "questions", *answers, *(f"reply WER, {name}" for name in spoken),
        *(f"{name} WER" for name in ceilings),
    ]  # fmt: skip
    rows = (
        [
            kind,
            str(count),
            *(percent(entry["by_kind"][kind]["value"]) for entry in answers.values()),
            *(percent(entry["wer_by_kind"][kind]) for entry in (*spoken.values(), *ceilings.values())),
        ]
        for kind, count in report["kinds"].items()
    )
    return _table(head, rows)


_ROW, _LEFT, _RIGHT, _TOP, _WIDTH = 24, 260, 90, 34, 720
_COLOUR, _INK, _GREY = "#4477aa", "#222222", "#bbbbbb"


def draw_bars(title: str, bars: Sequence[Bar]) -> str:
    """Return horizontal bars from 0 to 100 % or beyond, with their intervals, as SVG."""
    most = max(1.0, *(bar.high or bar.value for bar in bars))
    height = _TOP + _ROW * len(bars) + 10
    field = _WIDTH - _LEFT - _RIGHT

    def x(value: float) -> float:
        return _LEFT + field * value / most

    shapes: list[Shape] = [Words(10, 20, title, _INK, size=14)]
    for mark in (0.0, 0.25, 0.5, 0.75, 1.0):
        shapes.append(Line(((x(mark), _TOP - 6), (x(mark), height - 10)), "#eeeeee"))
    for place, bar in enumerate(bars):
        y = _TOP + _ROW * place + _ROW / 2 - 4
        shapes.append(Line(((x(0), y), (max(x(bar.value), x(0) + 0.5), y)), _COLOUR, 12))
        if bar.low is not None and bar.high is not None:
            shapes.append(Line(((x(bar.low), y), (x(bar.high), y)), _INK, 1.5))
        shapes.append(Words(_LEFT - 8, y + 4, bar.name, anchor="end"))
        shapes.append(Words(_WIDTH - _RIGHT + 12, y + 4, percent(bar.value), _INK))
    return to_svg(shapes, title=title, size=(_WIDTH, height))


def _bars(entries: Mapping[str, Mapping[str, float]]) -> list[Bar]:
    return [Bar(name, entry["value"], entry["low"], entry["high"]) for name, entry in entries.items()]


def _plots(report: Mapping[str, Any]) -> Iterator[str]:
    yield draw_bars("right text answers", _bars(report["text_answers"]))
    spoken = {f"reply, {name} voices ask": entry["wer"] for name, entry in report["spoken_replies"].items()}
    ceilings = {f"ceiling: {name}": entry["wer"] for name, entry in report["ceilings"].items()}
    yield draw_bars("word errors of what is said, as pocketsphinx hears it", _bars(spoken | ceilings))
    heard = {f"{name} voices": entry["wer"] for name, entry in report["transcripts"].items()}
    yield draw_bars("word errors of the talker's transcripts", _bars(heard))
    yield draw_bars("text ability: right answers from text", _bars(report["text_ability"]))
    for name, entry in report["text_answers"].items():
        kinds = [Bar(kind, found["value"]) for kind, found in entry["by_kind"].items()]
        yield draw_bars(f"right text answers {name}, by kind", kinds)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222 }}
body {{ max-width: 1200px; margin: 2rem auto; padding: 0 1rem }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 1rem }}
svg {{ width: 100%; font-family: inherit; border: 1px solid #eee; border-radius: 6px }}
table {{ border-collapse: collapse }}
td, th {{ padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top }}
td {{ border-bottom: 1px solid #eee }}
audio {{ width: 220px; height: 32px; display: block }}
small {{ color: #666 }}
.no {{ color: #b00; font-weight: 600 }}
</style></head><body>
<h1>{title}</h1>
<p>{intro}</p>
<h2>Bars</h2>{bars}
<h2>Figures</h2>{figures}
<h2>Listen</h2>{examples}
<h2>Plots</h2><div class="plots">{plots}</div>
{curves}
</body></html>
"""


def write_page(
    folder: Path,
    report: Mapping[str, Any],
    examples: Sequence[Example],
    *,
    runs: Mapping[str, Path] | None = None,
) -> Path:
    """Write ``index.html`` and its sounds into ``folder``; return the page.

    Args:
        folder: made if missing.
        report: what ``evaluate.py`` found.
        examples: what can be listened to.
        runs: run folders of the stages, whose curves are shown.
    """
    rows = [_example(folder, number, example) for number, example in enumerate(examples)]
    head = "<tr><th>question</th><th>reply</th><th>the right answer, said by the synthesizer</th></tr>"
    bars = "".join(
        f"<tr><td>{html.escape(bar['name'])}</td><td>{bar['sense']} {percent(bar['bar'])}</td>"
        f'<td>{percent(bar["reached"])}</td><td class="{"yes" if bar["met"] else "no"}">'
        f"{'met' if bar['met'] else 'missed'}</td></tr>"
        for bar in report["bars"]
    )
    figures = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(said)}</td></tr>"
        for name, said in _measures(report)
    )
    machine = report["machine"]
    page = _PAGE.format(
        title=f"{html.escape(Path(report['talker']).name)}, judged",
        intro=f"{report['questions']} held-out questions. What is said is written down by pocketsphinx, "
        "with its stock acoustic model and a plain loop over the world's words. Times: "
        f"{html.escape(machine['processor'])}, {report['speed']['threads']} threads.",
        bars=f"<table>{bars}</table>",
        figures=f"<table>{figures}</table>",
        examples=f"<table>{head}{''.join(rows)}</table>",
        plots="".join(_plots(report)),
        curves="".join(_curves(runs or {})),
    )
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _example(folder: Path, number: int, example: Example) -> str:
    """One row with its players."""
    players = {name: _player(folder, f"{number:02d}-{name}", clip) for name, clip in example.sounds.items()}
    words = {key: html.escape(value) for key, value in example._asdict().items() if isinstance(value, str)}
    before = "".join(f"<small>{html.escape(turn)}</small><br>" for turn in example.turns)
    verdict = "" if example.text == example.expected else ' <span class="no">wrong</span>'
    others = "".join(
        f"<small>{html.escape(name)}</small>{player}"
        for name, player in players.items()
        if name not in ("question", "reply")
    )
    return (
        f"<tr><td>{before}{words['question']}{players['question']}<small>{words['kind']}, "
        f"{words['voice']}<br>transcript: {words['transcript']}</small></td>"
        f"<td>{words['text']}{verdict}{players['reply']}<small>understood: {words['understood']}</small></td>"
        f"<td>{words['expected']}{others}</td></tr>"
    )


def _player(folder: Path, name: str, clip: Clip) -> str:
    """Write a sound and return its player; a word in place of one that has no samples."""
    if not len(clip.samples):
        return "<br><small>no sound</small><br>"
    path = folder / SOUND_FOLDER / f"{name}.flac"
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.nan_to_num(clip.samples).clip(-1, 1)
    soundfile.write(path, samples, clip.sampling_rate, subtype="PCM_16")
    return f'<audio controls preload="none" src="{SOUND_FOLDER}/{path.name}"></audio>'


def _curves(runs: Mapping[str, Path]) -> Iterator[str]:
    """What the stages learned, step by step."""
    for name, folder in runs.items():
        charts = [chart for chart in make_charts(read_log(folder)) if any(chart.curves.values())]
        drawn = "".join(to_svg(draw(chart), title=chart.title) for chart in charts[:3])
        yield f'<h2>Stage {html.escape(name)}</h2><div class="plots">{drawn}</div>'


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description="Put the figures of several talkers into one table.")
    parser.add_argument("reports", nargs="+", type=Path, help="report.json of each")
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in parser.parse_args().reports]
    print(compare(reports), end="")


if __name__ == "__main__":
    main()
