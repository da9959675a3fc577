"""Checkpoints of a training run that survive a kill at any moment.

Files of every rank in, one complete folder out, or none: what is written goes into a hidden folder, is
flushed and hashed, gets its manifest last and is renamed into place; only then are old ones removed. Tensors
are safetensors and the rest is JSON. Knows nothing of models, optimizers or data.

    checkpoints/
      step-00000200/        complete: every file is listed in manifest.json with its size and sha256
      step-00000400/        complete
      .partial-00000600-0/  being written, or left by a kill; the next save removes it
"""

import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni_adapter.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
LEAST_KEPT = 2
"""Checkpoints that are kept at the least: the newest, and one to fall back to."""

_COMPLETE, _PARTIAL, _REMOVED = "step-", ".partial-", ".removed-"
_BLOCK_BYTES = 1 << 20


class Ranks(Protocol):
    """The processes of a run, as far as a checkpoint needs them."""

    @property
    def rank(self) -> int:
        """Which of the processes this one is."""

    @property
    def world_size(self) -> int:
        """Number of processes."""

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process, in order of rank, to every process; nobody leaves early."""


class OneRank:
    """A run of one process."""

    rank = 0
    world_size = 1

    def gather(self, value: Any) -> list[Any]:
        """Return the value alone."""
        return [value]


def save_checkpoint(
    root: Path,
    *,
    step: int,
    write: Callable[[Path], None],
    ranks: Ranks | None = None,
    keep: int = LEAST_KEPT,
    num_bytes: int = 0,
) -> Path:
    """Write one checkpoint. Every rank calls this at the same step.

    Args:
        root: folder of all checkpoints, on a disk that every rank sees.
        step: optimizer steps taken so far.
        write: writes the files of this rank into the folder it is given; names must differ between ranks.
        ranks: the processes of the run.
        keep: checkpoints to keep, at least ``LEAST_KEPT``.
        num_bytes: what all ranks are about to write, if known; more than is free is refused at once.

    Returns:
        The folder of the new checkpoint.

    Raises:
        CheckpointError: if any rank could not write. Nothing is left of this checkpoint then, and the earlier
            ones are as they were.
    """
    ranks = ranks or OneRank()
    partial = _together(ranks, lambda: _open_partial(root, step=step, num_bytes=num_bytes), only_first=True)
    cleanup = lambda: _remove(partial)  # noqa: E731 - handed to three calls
    _together(ranks, lambda: _write(partial, write), on_failure=cleanup)
    digests = _together(ranks, lambda: _flush_and_hash(partial, ranks), on_failure=cleanup)
    final: Path = _together(
        ranks,
        lambda: _complete(root, partial, step=step, digests=digests, keep=keep),
        only_first=True,
        on_failure=cleanup,
    )
    return final


def find_checkpoint(root: Path) -> Path | None:
    """Return the newest checkpoint whose every byte is as it was written, None if there is none.

    Broken ones are passed over with a warning that says what is wrong with them.
    """
    for folder in reversed(list_checkpoints(root)):
        problem = find_damage(folder)
        if problem is None:
            return folder
        logger.warning("checkpoint %s is passed over: %s", folder, problem)
    return None


def list_checkpoints(root: Path) -> list[Path]:
    """Return the folders of checkpoints, oldest first; they may be damaged."""
    found = [path for path in root.glob(f"{_COMPLETE}*") if path.is_dir() and _number(path) is not None]
    return sorted(found, key=lambda path: _number(path) or (0, 0))


def step_of(folder: Path) -> int:
    """Return the step at which a checkpoint was written."""
    number = _number(folder)
    if number is None:
        raise CheckpointError(f"{folder} is not named like a checkpoint, {_COMPLETE}00000000")
    return number[0]


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint in words, None if every byte is as it was written."""
    try:
        listed = _read_manifest(folder)
        present = {_name_in(folder, path) for path in _files(folder)} - {MANIFEST_FILE}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST_FILE} cannot be read: {error}"
    if present != listed.keys():
        return f"files differ from {MANIFEST_FILE}: {', '.join(sorted(present ^ listed.keys()))}"
    for name, facts in listed.items():
        try:
            found = _digest(folder / name)
        except OSError as error:
            return f"{name} cannot be read: {error}"
        if found != facts:
            return f"{name} has {found['bytes']} bytes with sha256 {found['sha256'][:12]}…, written were " + (
                f"{facts.get('bytes')} bytes with sha256 {str(facts.get('sha256'))[:12]}…"
            )
    return None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device to a safetensors file."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read what ``write_tensors`` wrote, onto the CPU.

    Raises:
        CheckpointError: if the file is missing or broken.
    """
    try:
        return load_file(path, device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values; floats come back bit for bit."""
    path.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read what ``write_json`` wrote.

    Raises:
        CheckpointError: if the file is missing or broken.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold one JSON object, got {type(values).__name__}")
    return values


def random_state(device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the state of the random generators of Python, NumPy and torch: plain values and tensors."""
    version, words, spare = random.getstate()
    legacy: dict[str, Any] = np.random.get_state(legacy=False)
    values = {
        "python": [version, list(words), spare],
        "numpy": {**legacy, "state": {**legacy["state"], "key": legacy["state"]["key"].tolist()}},
    }
    tensors = {"torch": torch.get_rng_state()}
    if device.type != "cpu":
        tensors["device"] = torch.get_device_module(device).get_rng_state(device)
    return values, tensors


def set_random_state(values: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore what ``random_state`` returned."""
    version, words, spare = values["python"]
    random.setstate((version, tuple(words), spare))
    legacy = values["numpy"]
    key = np.array(legacy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**legacy, "state": {**legacy["state"], "key": key}})
    torch.set_rng_state(tensors["torch"])
    if "device" in tensors:
        torch.get_device_module(device).set_rng_state(tensors["device"], device)


def _together(
    ranks: Ranks,
    action: Callable[[], Any],
    *,
    only_first: bool = False,
    on_failure: Callable[[], None] = lambda: None,
) -> Any:
    """Run ``action`` on every rank, or on the first alone, and return its result to all.

    If it fails anywhere, the first rank cleans up and all raise.
    """
    result: Any = None
    failure: str | None = None
    if not only_first or ranks.rank == 0:
        try:
            result = action()
        except (OSError, SafetensorError, CheckpointError, RuntimeError) as error:
            failure = f"{type(error).__name__}: {error}"
    answers = ranks.gather((result, failure))
    failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(answers) if text]
    if not failures:
        return answers[0][0] if only_first else [value for value, _ in answers]
    if ranks.rank == 0:
        on_failure()
    ranks.gather(None)
    raise CheckpointError(
        f"no checkpoint was written ({'; '.join(failures)}); the earlier ones are untouched; "
        "is the disk full or the folder not shared by all ranks?"
    )


def _open_partial(root: Path, *, step: int, num_bytes: int) -> Path:
    """Remove what earlier kills left, and make the folder to write into."""
    root.mkdir(parents=True, exist_ok=True)
    for pattern in (_PARTIAL, _REMOVED):
        for leftover in root.glob(f"{pattern}*"):
            shutil.rmtree(leftover)
    free = shutil.disk_usage(root).free
    if num_bytes > free:
        raise CheckpointError(f"{num_bytes} bytes are to be written to {root}, {free} are free")
    partial = root / f"{_PARTIAL}{step:08d}"
    partial.mkdir()
    return partial


def _write(partial: Path, write: Callable[[Path], None]) -> None:
    """Let this rank write."""
    if not partial.is_dir():
        raise CheckpointError(f"{partial} was made by rank 0, but is not there")
    write(partial)


def _flush_and_hash(partial: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Bring this rank's share of all files to the disk, and return their sizes and digests."""
    share = _files(partial)[ranks.rank :: ranks.world_size]
    for path in share:
        _flush(path)
    return {_name_in(partial, path): _digest(path) for path in share}


def _complete(
    root: Path, partial: Path, *, step: int, digests: Sequence[Mapping[str, Any]], keep: int
) -> Path:
    """Write the manifest, give the folder its name and remove old checkpoints."""
    files = {name: facts for share in digests for name, facts in share.items()}
    write_json(partial / MANIFEST_FILE, {"version": MANIFEST_VERSION, "files": dict(sorted(files.items()))})
    _flush(partial / MANIFEST_FILE)
    for folder in sorted({path.parent for path in _files(partial)} | {partial}):
        _flush(folder)
    taken = [number for number in map(_number, list_checkpoints(root)) if number and number[0] == step]
    again = f".{max(serial for _, serial in taken) + 1}" if taken else ""
    final = root / f"{_COMPLETE}{step:08d}{again}"
    os.rename(partial, final)
    _flush(root)
    _rotate(root, keep=max(keep, LEAST_KEPT))
    return final


def _rotate(root: Path, *, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints; what cannot be removed stays with a warning."""
    complete = [folder for folder in list_checkpoints(root) if (folder / MANIFEST_FILE).is_file()]
    for folder in complete[:-keep]:
        removed = root / f"{_REMOVED}{folder.name}"
        try:
            # Renamed first: a kill while files go one by one must not leave half a checkpoint with a name.
            os.rename(folder, removed)
            shutil.rmtree(removed)
        except OSError as error:
            logger.warning("old checkpoint %s cannot be removed: %s", folder, error)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    if manifest["version"] != MANIFEST_VERSION:
        raise ValueError(f"version {manifest['version']!r}, this omni-adapter reads {MANIFEST_VERSION}")
    listed = manifest["files"]
    root = folder.resolve()
    for name in listed:
        if not (root / name).resolve().is_relative_to(root):
            raise ValueError(f"{name!r} leaves the folder")
    return dict(listed)


def _number(folder: Path) -> tuple[int, int] | None:
    """Step of a checkpoint, and how many of that step came before it."""
    step, _, serial = folder.name.removeprefix(_COMPLETE).partition(".")
    if not folder.name.startswith(_COMPLETE) or not step.isdigit() or not (serial or "0").isdigit():
        return None
    return int(step), int(serial or 0)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _name_in(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _digest(path: Path) -> dict[str, Any]:
    sha256, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            sha256.update(block)
            size += len(block)
    return {"bytes": size, "sha256": sha256.hexdigest()}


def _flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
