"""Curves of a comparison: a step over the length of a reply, conversations at once, and size.

What ``compare`` returns in, an SVG or a picture out, drawn with the charts of training reports.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omni_adapter.bench.table import COLUMNS
from omni_adapter.errors import ConfigError, MissingDependencyError
from omni_adapter.training.report import Chart, draw_all, to_svg, write_picture

Points = list[tuple[float, float]]

SUFFIXES = (".svg", ".png")
"""Kinds of files that can be drawn."""


def scaling_charts(result: Mapping[str, Any]) -> list[Chart]:
    """Return the charts for which there are figures."""
    sections = result["sections"]
    frame_ms = sections.get("steps", {}).get("frame_s", 0) * 1000
    length = {
        COLUMNS[row["mode"]]: [(float(step), seconds * 1000) for step, seconds in row["curve"]]
        for row in sections.get("length", {}).get("rows", [])
        if not row["mode"].startswith("reference")
    }
    many = _curves(
        sections.get("many", {}).get("rows", []), "conversations", lambda row: row["throughput_ratio"]
    )
    size = _curves(
        sections.get("size", {}).get("rows", []),
        lambda row: row["weights"] / 1e6,
        lambda row: row["median_s"] * 1000,
    )
    floors = _curves(
        sections.get("size", {}).get("rows", []),
        lambda row: row["weights"] / 1e6,
        lambda row: row["floor_s"] * 1000,
    )
    size |= {f"{name}, floor": points for name, points in floors.items()}
    limit = f" (real time is {frame_ms:.1f})" if frame_ms else ""
    charts = [
        Chart(f"ms a step{limit}", length, across="step of the reply", from_zero=True),
        Chart("times the throughput of one at a time", many, across="conversations at once", from_zero=True),
        Chart(f"ms a step{limit}", size, across="million weights that a step reads", from_zero=True),
    ]
    return [chart for chart in charts if any(chart.curves.values())]


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw the curves into a file, an SVG or a PNG by its name.

    Raises:
        ConfigError: if there are no figures to draw, or the name ends otherwise.
        MissingDependencyError: if a PNG is asked for without Pillow.
    """
    charts = scaling_charts(result)
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"curves are drawn as {' or '.join(SUFFIXES)}, got {path.name!r}")
    if not charts:
        raise ConfigError("there are no curves to draw: measure one of the sections length, many, size")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        if not write_picture(path, charts, columns=len(charts)):
            raise MissingDependencyError("Pillow", extra="train", purpose="curves as PNG")
        return
    shapes, size = draw_all(charts, columns=len(charts))
    svg = to_svg(shapes, title="How decoding scales", size=size)
    standalone = '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" '
    path.write_text(svg.replace("<svg ", standalone, 1) + "\n", encoding="utf-8")


def _curves(rows: Iterable[Mapping[str, Any]], across: Any, height: Any) -> dict[str, Points]:
    """Points by mode."""
    place = across if callable(across) else lambda row: row[across]
    found: dict[str, Points] = {}
    for row in rows:
        found.setdefault(COLUMNS[row["mode"]], []).append((float(place(row)), float(height(row))))
    return {name: sorted(points) for name, points in found.items()}
