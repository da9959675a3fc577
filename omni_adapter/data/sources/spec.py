"""What a source is: the settings that name one, and the port through which its rows are read.

Knows nothing of formats, published data sets or models.
"""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Protocol, Self

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass

from omni_adapter.config import Positive
from omni_adapter.data.rows import COLUMNS

PLAN_FILE = "plan.json"
"""Written first into a folder of prepared data."""

TOTALS_FILE = "prepared.json"
"""Written last into a folder of prepared data."""

_MASK64 = (1 << 64) - 1


@pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SourceSpec:
    """One source of rows.

    Args:
        path: name of a published data set, with ``:`` and a part of it if not its usual one; id of a data
            set of the Hub; or a file or folder of parquet, JSON lines or audio, or a folder that ``datasets``
            saved; ``*`` stands for several files.
        task: what its rows teach; None where each row names its own task.
        weight: share among all sources.
        columns: names of its columns -> names of the schema's, where they differ.
        recipe: name of the published data set, and perhaps of a part of it, that ``path`` is a copy of.
        name: configuration of a data set of the Hub.
        split: split of a data set of the Hub.
        revision: branch, tag or commit of a data set of the Hub.
        streaming: read a data set front to back without copying it first.
        limit: only that many rows from the start.
        shuffle: mix the rows in each pass; a source that is not shuffled keeps its order.
    """

    path: str
    task: str | None = None
    weight: float = 1.0
    columns: dict[str, str] = field(default_factory=dict)
    recipe: str | None = None
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    limit: Positive | None = None
    shuffle: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight must be above 0, got {self.weight}")
        for column in self.columns.values():
            if column not in COLUMNS:
                raise ValueError(
                    f"columns: {column!r} is no column of the schema; {nearest(column, COLUMNS)}"
                )


class Source(Protocol):
    """Rows by number."""

    name: str
    columns: tuple[str, ...]
    root: Path | None
    lost_rows: int

    def __len__(self) -> int:
        """Rows of one pass."""

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Return one row; a RowError if it cannot be read."""

    def values(self, column: str) -> Iterator[Any]:
        """Yield one column of all rows, None where a row cannot be read or lacks it."""

    def only(self, columns: Sequence[str]) -> Self:
        """Return the same rows with no more than the wanted columns, where that saves reading."""

    def fingerprint(self) -> str:
        """Return a digest that changes when the data do."""


def rename(values: Mapping[str, Any], spec: SourceSpec) -> dict[str, Any]:
    """Give a row the column names of the schema."""
    kept = {column: value for column, value in values.items() if column not in spec.columns}
    return kept | {ours: values[theirs] for theirs, ours in spec.columns.items() if theirs in values}


def mix(*numbers: int) -> int:
    """Hash numbers into 64 bits (the finalizer of splitmix64, chained)."""
    state = 0
    for number in numbers:
        state = (state + (number & _MASK64) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


def nearest(word: str, known: Iterable[str]) -> str:
    """Advice that names the known word nearest to an unknown one, or all of them."""
    known = list(known)
    found = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {found[0]!r}?" if found else f"they are {', '.join(known)}"
