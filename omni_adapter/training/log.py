"""What a run writes down: figures by step, steps that were left out, and how it stands.

Entries in, lines of JSON in the run folder out. Knows nothing of models, batches or who reads them.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_adapter.training.checkpoint import write_json

LOG_FILE = "log.jsonl"
SKIPPED_FILE = "skipped.jsonl"
STATUS_FILE = "status.json"


class RunLog:
    """The log of a run.

    Args:
        folder: the run folder; made when the first line is written.
        writes: whether this process writes; only one should.
    """

    def __init__(self, folder: Path, *, writes: bool) -> None:
        self._folder = folder
        self._writes = writes

    def start(self, entries: Iterable[Mapping[str, Any]] = ()) -> None:
        """Start anew, with entries of before."""
        if self._writes:
            text = "".join(json.dumps(entry) + "\n" for entry in entries)
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / LOG_FILE).write_text(text, encoding="utf-8")

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write down the figures of a step."""
        self._append(LOG_FILE, entry)

    def add_skip(self, *, after_step: int, reason: str, samples: Sequence[Sequence[str]]) -> None:
        """Write down a step that was left out, with the names of its samples, process by process."""
        self._append(SKIPPED_FILE, {"after_step": after_step, "reason": reason, "samples": samples})

    def note(self, state: str, step: int) -> None:
        """Write down how the run stands, for whoever started it."""
        if self._writes:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(self._folder / STATUS_FILE, {"state": state, "step": step})

    def _append(self, name: str, entry: Mapping[str, Any]) -> None:
        if self._writes:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._folder / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of a run's log; a last line that a kill cut off is left out."""
    entries = []
    path = folder / LOG_FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries
