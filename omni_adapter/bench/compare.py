"""``bench --compare``: our modes beside the published implementation, section by section.

A talker's name or a size in, a comparison out as plain values, ready for JSON. Each section is kept in the
file as soon as it is done, so that a run that was stopped goes on with the next one; one that failed is tried
again. Every ratio is made of times that were taken in turns within one section.

On an accelerator the same program runs, with the floor of its memory; that has never been executed.
"""

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from omni_adapter.bench.cost import compare_error, compare_memory, compare_startup
from omni_adapter.bench.machine import available_bytes, describe_machine
from omni_adapter.bench.modes import MODES
from omni_adapter.bench.presets import SHAPES
from omni_adapter.bench.speech import compare_codec, compare_first_audio, compare_replies
from omni_adapter.bench.speed import compare_length, compare_many, compare_sizes, compare_steps
from omni_adapter.bench.workshop import CompareSettings, Workshop, settings_for
from omni_adapter.errors import ConfigError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1

Section = Callable[[Workshop], dict[str, Any]]

_SECTIONS: Mapping[str, Section] = {
    "startup": compare_startup,
    "memory": compare_memory,
    "steps": compare_steps,
    "first_audio": compare_first_audio,
    "reply": compare_replies,
    "codec": compare_codec,
    "length": compare_length,
    "many": compare_many,
    "error": compare_error,
    "size": compare_sizes,
}


def compare(
    name: str,
    *,
    settings: CompareSettings,
    device: torch.device,
    say: Callable[[str], None],
    save: Path | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Compare a talker's modes with each other and with the published implementation.

    Args:
        name: folder or Hub id of a talker, or a key of ``SHAPES``.
        settings: how to compare.
        device: where to compute.
        say: called with a line whenever something begins.
        save: file that keeps what was measured; sections in it are not measured again.
        folder: where a talker with random weights is kept; None for a while only.

    Raises:
        ConfigError: if the file holds another comparison.
    """
    started_s = time.perf_counter()
    result = _load(save, name=name, settings=settings, device=device)

    def tell(line: str) -> None:
        say(f"{time.perf_counter() - started_s:5.0f} s  {line}")

    todo = [
        section for section in settings.sections if "error" in result["sections"].get(section, {"error": 0})
    ]
    kept = [section for section in settings.sections if section not in todo]
    if kept:
        tell(f"kept from {save}: {', '.join(kept)}")
    if not todo:
        return result
    with ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workshop = Workshop(name, settings=settings, device=device, folder=place, say=tell)
        workshop.prepare()
        for section in todo:
            tell(f"== {section}")
            result["sections"][section] = _measure(workshop, section)
            _note_subject(result, workshop)
            _keep(save, result)
    tell("done")
    return result


def read_comparison(path: Path) -> dict[str, Any]:
    """Read what ``compare`` saved.

    Raises:
        ConfigError: if the file holds no comparison.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as the JSON of a comparison: {error}") from error
    if (
        not isinstance(values, dict)
        or values.get("format_version") != FORMAT_VERSION
        or "sections" not in values
    ):
        raise ConfigError(
            f"{path} holds no comparison of format {FORMAT_VERSION}; make one with: "
            "omni-adapter bench --compare --shape 0.5b --save FILE.json"
        )
    return values


def _measure(workshop: Workshop, section: str) -> dict[str, Any]:
    """One section; if it fails, why."""
    started_s, load = time.perf_counter(), _load_average()
    try:
        measured = _SECTIONS[section](workshop)
    except Exception as error:  # the other sections are still worth their figures
        logger.debug("section %s", section, exc_info=True)
        measured = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        workshop.say(f"{section} failed: {measured['error']}")
    took_s = time.perf_counter() - started_s
    section_of = {**measured, "took_s": took_s, "load_average": [load, _load_average()]}
    plain: dict[str, Any] = json.loads(json.dumps(section_of))
    return plain


def _load(save: Path | None, *, name: str, settings: CompareSettings, device: torch.device) -> dict[str, Any]:
    """A fresh comparison, or the one that was begun in the file."""
    how = json.loads(json.dumps({key: value for key, value in asdict(settings).items() if key != "sections"}))
    fresh: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "random_weights": SHAPES.get(name),
        "command": _command(name, settings),
        "machine": describe_machine(device),
        "available_bytes": available_bytes(),
        "settings": how,
        "modes": {mode.name: {"what": mode.what} for mode in MODES},
        "sections": {},
    }
    if save is None or not save.exists():
        return fresh
    found = read_comparison(save)
    for key in ("name", "settings"):
        if found.get(key) != fresh[key]:
            raise ConfigError(
                f"{save} holds a comparison with another {key}: expected {fresh[key]}, found "
                f"{found.get(key)}; remove the file, or name another"
            )
    for key in ("processor", "accelerator", "threads", "torch"):
        here, there = fresh["machine"][key], found["machine"].get(key)
        if here != there:
            raise ConfigError(
                f"{save} was measured elsewhere: {key} is {here!r} here and {there!r} there; remove the "
                "file, or name another"
            )
    return found


def _command(name: str, settings: CompareSettings) -> str:
    """What was typed, as far as it changes figures."""
    usual = settings_for(name if name in SHAPES else None)
    words = ["omni-adapter bench --compare", f"--shape {name}" if name in SHAPES else name]
    words += [
        f"--{option} {getattr(settings, option):g}"
        for option in ("seconds", "rounds", "steps", "stride")
        if getattr(settings, option) != getattr(usual, option)
    ]
    return " ".join((*words, f"--threads {torch.get_num_threads()}"))


def _note_subject(result: dict[str, Any], workshop: Workshop) -> None:
    """Note what is known by now of the talker and of modes that cannot be had."""
    for name, reason in workshop.failures.items():
        result["modes"].setdefault(name, {})["not_available"] = reason
    weights = workshop.known_weights
    if weights is not None:
        result["step_weights"] = asdict(weights)
    for name, report in workshop.pack_reports().items():
        result["modes"][name]["packed"] = report


def _keep(save: Path | None, result: dict[str, Any]) -> None:
    """Write the file whole or not at all."""
    if save is None:
        return
    save.parent.mkdir(parents=True, exist_ok=True)
    beside = save.with_name(f"{save.name}.writing")
    beside.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(beside, save)


def _load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
