"""The files of a saved talker: what they are called, and how JSON of strangers is read.

A path in, a dict out. What is too large, too deep or no JSON object is refused. Knows nothing of what the
values mean.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omni_adapter.errors import CheckpointError

CONFIG_FILE = "omni_config.json"
WEIGHTS_FILE = "omni_model.safetensors"
FEATURES_FILE = "preprocessor_config.json"
EVALUATION_FILE = "evaluation.json"
DATASETS_FILE = "datasets.json"
FACT_FILES = (EVALUATION_FILE, DATASETS_FILE)
LORA_FOLDER = "lora"
PARTS = ("base", "encoder", "codec")
BASE_ADAPTER = "base_adapter"
PART_SUFFIXES = ("safetensors", "json", "jinja", "txt", "model")

TINY_TALKER = Path(__file__).resolve().parents[1] / "assets" / "tiny_talker"
"""Folder of the talker that comes with the package: small, trained on a world of some hundred words."""

_MAX_JSON_BYTES = 1 << 20
_MAX_JSON_DEPTH = 32


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object of a stranger.

    Raises:
        CheckpointError: if it is too large or too deep, or no JSON object.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, at most {_MAX_JSON_BYTES} are read")
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold one JSON object, got {type(values).__name__}")
    level: list[Any] = [values]
    for _ in range(_MAX_JSON_DEPTH):
        inner = [item.values() if isinstance(item, dict) else item for item in level]
        level = [value for items in inner for value in items if isinstance(value, dict | list)]
    if level:
        raise CheckpointError(f"{path} is nested more than {_MAX_JSON_DEPTH} levels deep")
    return values


def read_figures(folder: Path) -> dict[str, float]:
    """Read what was measured of a talker, by name; nothing if its folder has no ``evaluation.json``.

    Raises:
        CheckpointError: if the file is no JSON object of numbers.
    """
    return _read_facts(
        folder / EVALUATION_FILE,
        fits=lambda value: isinstance(value, int | float) and not isinstance(value, bool),
        form='names and numbers, such as {"WER, test-clean": 0.06}',
    )


def read_datasets(folder: Path) -> dict[str, str]:
    """Read what a talker was trained on: Hub id or name, and the licence of each; nothing if none is stated.

    Raises:
        CheckpointError: if the file is no JSON object of texts.
    """
    return _read_facts(
        folder / DATASETS_FILE,
        fits=lambda value: isinstance(value, str),
        form='data sets and their licences, such as {"org/speech": "cc-by-4.0"}',
    )


def short(value: Any, limit: int = 60) -> str:
    """Return a value as it is written in Python, cut to ``limit`` characters for a message."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _read_facts(path: Path, *, fits: Callable[[Any], bool], form: str) -> dict[str, Any]:
    """Values by name, every one of the same form; nothing without the file."""
    values = read_json(path) if path.is_file() else {}
    for name, value in values.items():
        if not fits(value):
            raise CheckpointError(f"{path} must hold {form}; {short(name)} is {short(value)}")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
