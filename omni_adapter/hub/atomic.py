"""Replace a saved talker whole or not at all.

A folder in, an empty folder to write into out; what is written there takes the place of what was. Every step
can be finished or undone by the next process that comes by. Knows nothing of models; of the earlier talker
it reads only which parts lie in its folder.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from omni_adapter.errors import CheckpointError
from omni_adapter.hub.files import BASE_ADAPTER, CONFIG_FILE, FACT_FILES, LORA_FOLDER, PARTS, read_json
from omni_adapter.model_card import SAMPLES_FOLDER

_STAGING = ".saving"  # files of a save that is being written
_READY = ".saved"  # the same files, complete, while they move to their places
_RETIRED = ".replaced"  # files of the earlier save, until the new ones are in their places


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder; what is written there takes the place of an earlier talker in ``folder``.

    A save that fails, or is killed at any moment, leaves the earlier talker or the new one, never a mixture.
    Files of others in ``folder`` stay.

    Raises:
        CheckpointError: if a folder of others is where a part would go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder)
    staging = folder / _STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        retiring = _retiring(folder, staging)
        for path in staging.rglob("*"):
            if path.is_file():
                _sync(path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    # The config goes first and comes last: in between, the folder holds no talker instead of half of one.
    (folder / _RETIRED).mkdir()
    for name in sorted(retiring, key=lambda name: name != CONFIG_FILE):
        os.rename(folder / name, folder / _RETIRED / name)
    os.rename(staging, folder / _READY)
    recover(folder)


def recover(folder: Path) -> None:
    """Finish or undo a save that was interrupted while files moved to their places.

    Raises:
        CheckpointError: if the files cannot be moved.
    """
    ready, retired = folder / _READY, folder / _RETIRED
    try:
        if ready.is_dir():
            _move_all(ready, folder)
            shutil.rmtree(retired, ignore_errors=True)
            ready.rmdir()
        elif retired.is_dir():
            _move_all(retired, folder)
            retired.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"{folder} holds an interrupted save that cannot be completed ({error}); move what is in "
            f"{_READY} or else {_RETIRED} into {folder}"
        ) from error


def _retiring(folder: Path, staging: Path) -> set[str]:
    """Names in ``folder`` that make way for a new talker.

    Raises:
        CheckpointError: if one of them is a folder that no talker wrote.
    """
    own = {*FACT_FILES, LORA_FOLDER, SAMPLES_FOLDER} if (folder / CONFIG_FILE).is_file() else set()
    if own:
        earlier = read_json(folder / CONFIG_FILE)
        references = {part: earlier.get(part) for part in (*PARTS, BASE_ADAPTER)}
        own |= {
            part for part, ref in references.items() if isinstance(ref, dict) and ref.get("id") == f"./{part}"
        }
    new = {path.name for path in staging.iterdir()}
    taken = sorted(name for name in new - own if (folder / name).is_dir())
    if taken:
        raise CheckpointError(
            f"{folder} holds a folder {taken[0]!r} that no talker wrote; it is not replaced, save elsewhere"
        )
    return {name for name in new | own if (folder / name).exists()}


def _move_all(source: Path, target: Path) -> None:
    """Move everything, the config last; a process beside this one may be doing the same."""
    for path in sorted(source.iterdir(), key=lambda path: path.name == CONFIG_FILE):
        with suppress(FileNotFoundError):
            os.rename(path, target / path.name)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
