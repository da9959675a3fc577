"""A page of curves at the end of a run: what was learned, row by row, and what the talker answered.

The log of a run folder in, ``report.html`` (one file, no network) and ``curves.png`` out. Each chart is a
list of lines and words, drawn once as SVG and once as pixels. Knows nothing of models or data.
"""

import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omni_adapter.training.log import SKIPPED_FILE, read_log

REPORT_FILE = "report.html"
PICTURE_FILE = "curves.png"
ANSWER_FOLDER = "answers"

_WIDTH, _HEIGHT = 520, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 92, 34, 40
_TICKS = 4
_POINTS = 400  # of a curve; more cannot be told apart
_COLOURS = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#332288", "#222222",
)  # fmt: skip
_GREY, _INK, _GRID = "#666666", "#222222", "#dddddd"
_FONT_SIZE = 12


class Line(NamedTuple):
    """A chain of points."""

    points: tuple[tuple[float, float], ...]
    colour: str
    width: float = 1.0


class Words(NamedTuple):
    """Text at a point; ``anchor`` is start, middle or end."""

    x: float
    y: float
    text: str
    colour: str = _GREY
    anchor: str = "start"
    size: int = _FONT_SIZE


Shape = Line | Words


class Chart(NamedTuple):
    """Curves over steps.

    Attributes:
        title: what is drawn, with its unit.
        curves: points (step, value) by name.
        is_log: whether the height is the logarithm.
        across: what the curves go over, where it is not steps.
        from_zero: whether the field begins at zero, both ways.
    """

    title: str
    curves: Mapping[str, Sequence[tuple[float, float]]]
    is_log: bool = False
    across: str = "step"
    from_zero: bool = False


def write_report(folder: Path) -> Path:
    """Write the report of a run, finished or not, into its folder; return the page.

    Without Pillow there is no picture, only the page.
    """
    entries = read_log(folder)
    charts = [chart for chart in make_charts(entries) if any(chart.curves.values())]
    page = folder / REPORT_FILE
    page.write_text(_page(folder, entries, charts), encoding="utf-8")
    write_picture(folder / PICTURE_FILE, charts)
    return page


def make_charts(entries: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return the charts of a log."""

    def curve(key: str) -> list[tuple[float, float]]:
        points = [(float(entry["step"]), float(entry[key])) for entry in entries if key in entry]
        return _thinned([point for point in points if math.isfinite(point[1])])

    def by_row(kind: str) -> dict[str, list[tuple[float, float]]]:
        keys = sorted({key for entry in entries for key in entry if key.endswith(f"/{kind}")})
        return {key.removesuffix(f"/{kind}").replace("_", " "): curve(key) for key in keys}

    return [
        Chart("loss", {"loss": curve("loss")}),
        Chart("loss of each row", by_row("loss")),
        Chart("accuracy of each row", by_row("accuracy")),
        Chart("norm of the gradients (logarithmic)", {"norm": curve("grad_norm")}, is_log=True),
        Chart("learning rate", {"rate": curve("learning_rate")}),
        Chart("tokens a second, padding excluded", {"tokens/s": curve("positions_per_s")}),
        Chart("hours of audio an hour", {"audio": curve("audio_hours_per_h")}),
        Chart("share of padding", {"padding": curve("padding_share")}),
    ]


def draw(chart: Chart) -> list[Shape]:
    """Return the lines and words of a chart, in a field of fixed size."""
    points = [point for curve in chart.curves.values() for point in curve]
    corner = [(0.0, 0.0)] if chart.from_zero else []
    scale = _Scale.over([*points, *corner], is_log=chart.is_log)
    shapes: list[Shape] = [Words(_LEFT, _TOP - 14, chart.title, _INK, size=_FONT_SIZE + 2)]
    for value in scale.values():
        y = scale.y(value)
        shapes.append(Line(((_LEFT, y), (_WIDTH - _RIGHT, y)), _GRID))
        shapes.append(Words(_LEFT - 6, y + 4, _short(value), anchor="end"))
    for step in scale.steps():
        shapes.append(Words(scale.x(step), _HEIGHT - _BOTTOM + 18, f"{step:,.0f}", anchor="middle"))
    shapes.append(Words((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, chart.across, anchor="middle"))
    for number, (name, curve) in enumerate(chart.curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        line = tuple((scale.x(step), scale.y(value)) for step, value in curve)
        shapes.append(Line(line if len(line) > 1 else line * 2, colour, 1.6))
        y = _TOP + 8 + number * (_FONT_SIZE + 4)
        shapes.append(Line(((_WIDTH - _RIGHT + 8, y - 4), (_WIDTH - _RIGHT + 22, y - 4)), colour, 3.0))
        shapes.append(Words(_WIDTH - _RIGHT + 26, y, name, _INK))
    return shapes


class _Scale(NamedTuple):
    """From steps and values to places in the field."""

    first: float
    last: float
    low: float
    high: float
    is_log: bool

    @classmethod
    def over(cls, points: Sequence[tuple[float, float]], *, is_log: bool) -> "_Scale":
        values = [value for _, value in points if value > 0 or not is_log] or [1.0]
        steps = [step for step, _ in points] or [0.0]
        is_log = is_log and min(values) > 0
        low, high = min(values), max(values)
        if high - low < 1e-12 * max(1.0, abs(high)):
            low, high = (
                low * (0.9 if is_log else 1) - (0 if is_log else 0.5),
                high * 1.1 + (0 if is_log else 0.5),
            )
        if not is_log:
            unit = _round_unit((high - low) / _TICKS)
            low, high = math.floor(low / unit) * unit, math.ceil(high / unit) * unit
        return cls(min(steps), max(max(steps), min(steps) + 1), low, high, is_log)

    def x(self, step: float) -> float:
        return _LEFT + (step - self.first) / (self.last - self.first) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.is_log:
            low, high, at = math.log(low), math.log(high), math.log(max(value, low))
        return _HEIGHT - _BOTTOM - (at - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def values(self) -> Iterator[float]:
        """Heights that are written beside the field."""
        if self.is_log:
            yield from (self.low * (self.high / self.low) ** (tick / _TICKS) for tick in range(_TICKS + 1))
        else:
            yield from _multiples(self.low, self.high, _round_unit((self.high - self.low) / (_TICKS + 1)))

    def steps(self) -> Iterator[float]:
        """Steps that are written below the field."""
        unit = max(1.0, _round_unit((self.last - self.first) / (_TICKS + 1)))
        yield from _multiples(self.first, self.last, unit)


def _round_unit(size: float) -> float:
    """The smallest of 1, 2, 5, 10, ... (or 0.5, 0.2, ...) that is at least ``size``."""
    power: float = 10.0 ** math.floor(math.log10(size))
    return next(unit for unit in (power, 2 * power, 5 * power, 10 * power) if unit >= size * (1 - 1e-9))


def _multiples(low: float, high: float, unit: float) -> Iterator[float]:
    """Multiples of ``unit`` from ``low`` to ``high``."""
    slack = 1e-6
    for number in range(math.ceil(low / unit - slack), math.floor(high / unit + slack) + 1):
        yield number * unit


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most ``_POINTS`` points, each the mean of its neighbours."""
    size = math.ceil(len(points) / _POINTS) or 1
    if size == 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def to_svg(shapes: Sequence[Shape], *, title: str, size: tuple[int, int] = (_WIDTH, _HEIGHT)) -> str:
    """Return shapes as an SVG of that width and height, for a page."""
    width, height = size
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">']
    for shape in shapes:
        if isinstance(shape, Line):
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{shape.colour}" '
                f'stroke-width="{shape.width}" stroke-linejoin="round"/>'
            )
        else:
            parts.append(
                f'<text x="{shape.x:.1f}" y="{shape.y:.1f}" fill="{shape.colour}" font-size="{shape.size}" '
                f'text-anchor="{shape.anchor}">{html.escape(shape.text)}</text>'
            )
    return "".join((*parts, "</svg>"))


def draw_all(charts: Sequence[Chart], *, columns: int) -> tuple[list[Shape], tuple[int, int]]:
    """Return the shapes of all charts, ``columns`` beside each other, and the width and height they take."""
    shapes: list[Shape] = []
    for number, chart in enumerate(charts):
        left, top = number % columns * _WIDTH, number // columns * _HEIGHT
        shapes += [_moved(shape, left, top) for shape in draw(chart)]
    rows = math.ceil(len(charts) / columns) or 1
    return shapes, (columns * _WIDTH, rows * _HEIGHT)


def _moved(shape: Shape, left: float, top: float) -> Shape:
    if isinstance(shape, Line):
        return shape._replace(points=tuple((x + left, y + top) for x, y in shape.points))
    return shape._replace(x=shape.x + left, y=shape.y + top)


def write_picture(path: Path, charts: Sequence[Chart], *, columns: int = 2, zoom: int = 2) -> bool:
    """Draw all charts as one picture; return False, and write nothing, without Pillow."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        return False
    shapes, (width, height) = draw_all(charts, columns=columns)
    image = Image.new("RGB", (width * zoom, height * zoom), "white")
    canvas = ImageDraw.Draw(image)
    anchors = {"start": "ls", "middle": "ms", "end": "rs"}
    for shape in shapes:
        if isinstance(shape, Line):
            points = [(x * zoom, y * zoom) for x, y in shape.points]
            canvas.line(points, fill=shape.colour, width=round(shape.width * zoom), joint="curve")
        else:
            font = ImageFont.load_default(shape.size * zoom)
            place = (shape.x * zoom, shape.y * zoom)
            canvas.text(place, shape.text, fill=shape.colour, font=font, anchor=anchors[shape.anchor])
    image.save(path)
    return True


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222 }}
body {{ max-width: 1100px; margin: 2rem auto; padding: 0 1rem }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 1rem }}
svg {{ width: 100%; font-family: inherit; border: 1px solid #eee; border-radius: 6px }}
table {{ border-collapse: collapse }}
td, th {{ padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }}
td.n {{ text-align: right; font-variant-numeric: tabular-nums }}
pre {{ background: #f6f6f6; padding: .8rem; overflow: auto; font-size: 13px }}
</style></head><body>
<h1>{title}</h1>
{summary}
<h2>Curves</h2><div class="charts">{charts}</div>
{answers}
{skipped}
<h2>Settings</h2><pre>{settings}</pre>
</body></html>
"""


def _page(folder: Path, entries: Sequence[Mapping[str, Any]], charts: Sequence[Chart]) -> str:
    run = _read(folder / "run.json")
    settings = (folder / "settings.yaml").read_text("utf-8") if (folder / "settings.yaml").is_file() else ""
    stage = run.get("settings", {}).get("stage", "run")
    return _PAGE.format(
        title=html.escape(f"{stage}: {folder.resolve().name}"),
        summary=_summary(entries, run),
        charts="".join(to_svg(draw(chart), title=chart.title) for chart in charts),
        answers=_answers(folder),
        skipped=_skipped(folder),
        settings=html.escape(settings),
    )


def _summary(entries: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> str:
    """First and last entry side by side, and how the run was started."""
    if not entries:
        return "<p>No step was logged.</p>"
    first, last = entries[0], entries[-1]
    keys = [key for key in last if key != "step"]
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td>"
        f'<td class="n">{_figure(first.get(key))}</td><td class="n">{_figure(last.get(key))}</td></tr>'
        for key in keys
    )
    head = f"<tr><th></th><th>step {first['step']}</th><th>step {last['step']}</th></tr>"
    command = f"<pre>{html.escape(str(run.get('command', '')))}</pre>" if run else ""
    return f"{command}<table>{head}{rows}</table>"


def _answers(folder: Path) -> str:
    """What the talker said on the way, with sound."""
    parts = []
    for text in sorted((folder / ANSWER_FOLDER).glob("step-*/*.txt")):
        sound = text.with_suffix(".wav")
        player = ""
        if sound.is_file():
            source = sound.relative_to(folder).as_posix()
            player = f'<audio controls preload="none" src="{html.escape(source)}"></audio>'
        said = html.escape(text.read_text(encoding="utf-8"))
        parts.append(
            f"<tr><td>{html.escape(text.parent.name)}</td><td>{html.escape(text.stem)}</td>"
            f"<td>{said}</td><td>{player}</td></tr>"
        )
    return f"<h2>Answers on the way</h2><table>{''.join(parts)}</table>" if parts else ""


def _skipped(folder: Path) -> str:
    path = folder / SKIPPED_FILE
    if not path.is_file():
        return ""
    return f"<h2>Steps that were skipped</h2><pre>{html.escape(path.read_text(encoding='utf-8'))}</pre>"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _figure(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
