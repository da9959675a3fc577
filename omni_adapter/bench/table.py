"""A comparison as a table: in the terminal, and in Markdown between the marks of a README.

What ``compare`` returns in, text out. Every figure is one of the JSON's, rounded.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from omni_adapter.bench.compare import read_comparison
from omni_adapter.errors import ConfigError

Row = Mapping[str, Any]
Line = tuple[str, list[str]]

COLUMNS = {
    "reference_fp32": "published, fp32",
    "reference_bf16": "published, bf16",
    "plain": "plain fp32",
    "fp32": "fp32",
    "bf16": "bf16",
    "int8": "int8",
}
"""Modes and what their columns are called."""

_NOTHING = "–"
_START = re.compile(r"<!-- bench: (?P<file>\S+) -->\n")
_END = "<!-- bench ends -->"
_BUSY = 0.5  # processes for each core before a measurement, above which it is disturbed
_CURVES = "A step over the length of a reply; conversations at once; sizes"


def show_comparison(result: Row, console: Console) -> None:
    """Print a comparison for people."""
    for line in headline(result):
        console.print(Text(line, style="bold"))
    table = Table()
    table.add_column("")
    for name in _columns(result):
        table.add_column(COLUMNS[name], justify="right")
    for what, cells in lines(result):
        table.add_row(what, *cells)
    console.print(table)
    for note in notes(result):
        console.print(Text(note))


def to_markdown(result: Row) -> str:
    """Return a comparison as Markdown."""
    columns = _columns(result)
    out = [*headline(result), "", f"| | {' | '.join(COLUMNS[name] for name in columns)} |"]
    out.append("|---|" + "---|" * len(columns))
    out += [f"| {what} | {' | '.join(cells)} |" for what, cells in lines(result)]
    out += ["", *(f"- {note}" for note in notes(result))]
    return "\n".join(out) + "\n"


def update_markdown(path: Path) -> list[Path]:
    """Write the table of every ``<!-- bench: FILE.json -->`` of a Markdown file, up to its end mark.

    Args:
        path: the file; the JSON's name counts from its folder.

    Returns:
        The JSON files that it names.

    Raises:
        ConfigError: if there is no such mark, one has no end, or its JSON holds no comparison.
    """
    text = path.read_text(encoding="utf-8")
    updated, files = render(text, path.parent)
    path.write_text(updated, encoding="utf-8")
    return files


def render(text: str, folder: Path) -> tuple[str, list[Path]]:
    """Return Markdown with its tables made anew, and the JSON files that it names.

    Behind the table come the curves, where an SVG of the JSON's name lies beside it.
    """
    parts, files, position = [], [], 0
    for match in _START.finditer(text):
        end = text.find(_END, match.end())
        if end < 0:
            raise ConfigError(f"{match[0].strip()} has no end; put {_END} behind its table")
        file = folder / match["file"]
        files.append(file)
        parts += [text[position : match.end()], to_markdown(read_comparison(file))]
        if file.with_suffix(".svg").is_file():
            parts.append(f"\n![{_CURVES}]({Path(match['file']).with_suffix('.svg').as_posix()})\n")
        position = end
    if not files:
        raise ConfigError(f"there is no table to make; mark its place with <!-- bench: FILE.json -->, {_END}")
    return "".join((*parts, text[position:])), files


def headline(result: Row) -> list[str]:
    """Return what was measured, where and how."""
    machine, settings = result["machine"], result["settings"]
    where = machine["accelerator"] or machine["processor"]
    weights = result.get("step_weights")
    size = f", {sum(weights.values()) / 1e6:,.3g} M weights a step" if weights else ""
    kind = f"{result['name']} ({result['random_weights']}, random weights{size})"
    name = kind if result.get("random_weights") else f"{result['name']}{size}"
    lines_of = [
        f"{name} on {where}, {machine['threads']} threads, torch {machine['torch']}: "
        f"medians of {settings['rounds']} rounds in turns, shortest and longest in brackets."
    ]
    bandwidth = result["sections"].get("steps", {}).get("bandwidth")
    if bandwidth:
        lines_of.append(
            f"Floor: bytes of the weights that a step reads at {bandwidth['bytes_per_s'] / 1e9:.1f} GB/s, "
            f"the fastest way to read memory in the same run ({bandwidth['best'].replace('_', ' ')})."
        )
    return lines_of


def lines(result: Row) -> list[Line]:
    """Return the rows of the table: what, and a cell for each column."""
    columns, sections = _columns(result), result["sections"]
    found: list[tuple[str, Mapping[str, str]]] = []
    for part in (_step_lines, _speech_lines, _long_lines, _cost_lines):
        found += part(sections)
    return [(what, [cells.get(name, _NOTHING) for name in columns]) for what, cells in found if cells]


def _step_lines(sections: Row) -> Iterator[tuple[str, dict[str, str]]]:
    section = sections.get("steps", {})
    rows = section.get("rows", [])
    variants = list(dict.fromkeys(row["tts_layers"] for row in rows))
    for variant in variants:
        blocks = f", {variant} TTS blocks" if variant else ""
        running = [row for row in rows if row["tts_layers"] == variant and row["text_runs"]]
        ended = [row for row in rows if row["tts_layers"] == variant and not row["text_runs"]]
        yield f"step, ms{blocks}", _cells(running, _span_ms)
        yield f"× faster than published fp32{blocks}", _cells(running, _times("speedup"))
        yield f"× its floor{blocks}", _cells(running, _times("floor_ratio"))
        yield f"real-time factor without codec{blocks}", _cells(running, _plain("real_time_factor"))
        yield f"step once the text has ended, ms{blocks}", _cells(ended, _span_ms)
        yield f"real-time factor then, without codec{blocks}", _cells(ended, _plain("real_time_factor"))


def _speech_lines(sections: Row) -> Iterator[tuple[str, dict[str, str]]]:
    rows = sections.get("reply", {}).get("rows", [])
    for text_runs, when in ((True, "text and speech"), (False, "the text has ended")):
        chosen = [row for row in rows if row["text_runs"] == text_runs]
        yield f"real-time factor in full, exact codec, {when}", _cells(chosen, _plain("real_time_factor"))
    section = sections.get("first_audio", {})
    for question, words in (
        ("whole", "heard at its end"),
        ("while spoken", "heard while it is spoken"),
        ("while spoken, soonest", "heard while it is spoken, no right context in the first sound"),
    ):
        chosen = [row for row in section.get("rows", []) if row["question"] == question]
        asked = f"end of a {section.get('seconds', 0):g} s question → first sound, {words}"
        yield f"{asked}, ms", _cells(chosen, _span_ms)
        yield f"× sooner than published fp32, {words}", _cells(chosen, _times("speedup"))


def _long_lines(sections: Row) -> Iterator[tuple[str, dict[str, str]]]:
    section = sections.get("length", {})
    yield f"step {section.get('steps')} / step 10", _cells(section.get("rows", []), _plain("ratio"))
    many = sections.get("many", {})
    for key, words in (("rows", "without codec"), ("speaking", "speaking from question to end")):
        rows = many.get(key, [])
        words += next((f", {row['steps']} steps" for row in rows if "steps" in row), "")
        for number in sorted({row["conversations"] for row in rows} - {1}):
            chosen = [row for row in rows if row["conversations"] == number]
            yield f"{number} at once / in turn, {words}", _cells(chosen, _times("throughput_ratio"))


def _cost_lines(sections: Row) -> Iterator[tuple[str, dict[str, str]]]:
    rows = sections.get("memory", {}).get("rows", [])
    yield "peak memory, GiB", _cells(rows, _gibibytes("peak_bytes"))
    yield "memory while it talks, GiB", _cells(rows, _gibibytes("resident_bytes"))
    ours = [row for row in rows if not row["mode"].startswith("reference")]
    yield "load, s", _cells(ours, _plain("load_s"))
    yield "warm-up, s", _cells(ours, _plain("warm_up_s"))
    yield (
        "first reply / second reply",
        _cells(ours, lambda row: f"{row['first_reply_s'] / row['second_reply_s']:.2f}"),
    )
    rows = sections.get("error", {}).get("rows", [])
    for key, words in (("text", "text logits"), ("codes", "code logits"), ("heard", "heard frames")):
        yield f"error of {words}", _cells(rows, _small(f"{key}_error"))
    for key, words in (("text", "text ids"), ("codes", "code ids")):
        yield f"same likeliest {words} (random weights)", _cells(rows, _percent(f"{key}_agreement"))


def notes(result: Row) -> list[str]:
    """Return what does not fit into columns, and what could not be measured."""
    sections, found = result["sections"], []
    codec = sections.get("codec", {})
    if codec.get("rows"):
        kinds = "; ".join(f"{row['decoding']} {_span_ms(row)}{_decibels(row)}" for row in codec["rows"])
        found.append(f"Codec, ms a frame of {codec['frame_s'] * 1000:.1f} ms: {kinds}.")
    for row in sections.get("first_audio", {}).get("reference_split", []):
        parts = ", ".join(
            f"{words} {row[key] * 1000:,.0f}"
            for key, words in (
                ("encoder_s", "encoder"),
                ("prefill_s", "prompt"),
                ("steps_s", "steps"),
                ("codec_s", "codec"),
            )
        )
        found.append(f"{COLUMNS[row['mode']]}, to its first sound, ms: {parts}.")
    startup = sections.get("startup", {})
    if "own_s" in startup:
        found.append(
            f"Import: {startup['import_s']:.2f} s; with everything that a talker needs "
            f"{startup['import_all_s']:.2f} s, of which {startup['own_s']:.2f} s our own."
        )
    for name, mode in result["modes"].items():
        if "not_available" in mode:
            found.append(f"{COLUMNS.get(name, name)} is not available: {mode['not_available']}.")
    for name, section in sections.items():
        if "error" in section and isinstance(section["error"], str):
            found.append(f"Not measured, {name}: {section['error']}.")
        for mode, reason in section.get("not_available", {}).items():
            found.append(f"Not measured, {name} of {COLUMNS.get(mode, mode)}: {reason}.")
    loads = [section["load_average"][0] or 0 for section in sections.values() if "load_average" in section]
    cores = result["machine"]["cores"] or 1
    if loads and loads[0] > _BUSY * cores:
        found.append(
            f"The machine was busy with other work (load average {loads[0]:.1f} on {cores} cores when it "
            "began): these figures only show that everything runs."
        )
    found.append(f"`{result['command']}`")
    return found


def _columns(result: Row) -> list[str]:
    """Modes that have a figure in any section."""
    seen = {
        row["mode"]
        for section in result["sections"].values()
        for rows in (section.get("rows", []), section.get("speaking", []))
        for row in rows
        if "mode" in row
    }
    return [name for name in COLUMNS if name in seen]


def _cells(rows: Sequence[Row], cell: Callable[[Row], str]) -> dict[str, str]:
    return {row["mode"]: cell(row) for row in rows if row}


def _span_ms(row: Row) -> str:
    median, low, high = (row[key] * 1000 for key in ("median_s", "min_s", "max_s"))
    digits = 0 if high >= 100 else 1
    return f"{median:,.{digits}f} [{low:,.{digits}f}–{high:,.{digits}f}]"


def _decibels(row: Row) -> str:
    """The error of a sound, where there is one."""
    return f" (error {20 * math.log10(row['error']):.0f} dB)" if row.get("error") else ""


def _plain(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key]:.2f}" if row.get(key) is not None else _NOTHING


def _times(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key]:.1f}" if row.get(key) is not None else _NOTHING


def _small(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key]:.1e}"


def _percent(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key] * 100:.0f} %"


def _gibibytes(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key] / 2**30:.2f}" if row.get(key) else _NOTHING
