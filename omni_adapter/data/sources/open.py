"""Open one source of rows: parquet, JSON lines, audio folders, the Hub, streams.

Source settings in, rows by number out. Everything is read through ``datasets`` but JSON lines, whose rows may
differ in form, and audio folders. Recordings stay undecoded, and damaged parts of files are counted. Knows
nothing of mixtures, samples or models.
"""

import csv
import difflib
import hashlib
import json
import logging
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Protocol

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass

from omni_adapter.config import Positive
from omni_adapter.data.rows import COLUMNS, check_columns
from omni_adapter.errors import DataError, MissingDependencyError, RowError

logger = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
"""Written first into a folder of prepared data."""

TOTALS_FILE = "prepared.json"
"""Written last into a folder of prepared data."""

_STREAM_BUFFER = 1000  # rows of a stream that are shuffled at a time
_STREAM_SPARES = 64  # last rows of a stream that can stand in for a reject
_SAMPLED_BYTES = 1 << 16  # read from both ends of a file for its fingerprint
_SAMPLED_ROWS = 100  # of JSON lines, to find the columns
_MASK64 = (1 << 64) - 1


@pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SourceSpec:
    """One source of rows.

    Args:
        path: id of a data set of the Hub; or a file or folder of parquet, JSON lines or audio, or a folder
            that ``datasets`` saved; ``*`` stands for several files.
        task: what its rows teach; None where each row names its own task.
        weight: share among all sources.
        columns: names of its columns -> names of the schema's, where they differ.
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
                nearest = difflib.get_close_matches(column, COLUMNS, n=1)
                advice = f"did you mean {nearest[0]!r}?" if nearest else f"they are {', '.join(COLUMNS)}"
                raise ValueError(f"columns: {column!r} is no column of the schema; {advice}")


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

    def fingerprint(self) -> str:
        """Return a digest that changes when the data do."""


class JsonLines:
    """Files of JSON objects, one a line, found by their offsets; a broken line costs one row.

    Args:
        files: in order.
        name: what to call the source.

    Raises:
        DataError: if a file cannot be read or no line holds an object.
    """

    lost_rows = 0

    def __init__(self, files: Sequence[Path], *, name: str) -> None:
        self.name = name
        self.root: Path | None = files[0].parent if len(files) == 1 else Path(name.split("*", 1)[0])
        self.root = self.root if self.root.is_dir() else files[0].parent
        self._files = tuple(files)
        self._offsets: list[tuple[int, int]] = []
        for number, file in enumerate(files):
            try:
                with file.open("rb") as lines:
                    start = 0
                    for line in lines:
                        if line.strip():
                            self._offsets.append((number, start))
                        start += len(line)
            except OSError as error:
                raise DataError(f"{file} cannot be read: {error}") from error
        first = next(
            (row for index in range(min(len(self), _SAMPLED_ROWS)) if (row := self._try(index))), None
        )
        if first is None:
            raise DataError(f"{name} holds no row: expected one JSON object a line")
        rows = (self._try(index) or {} for index in range(min(len(self), _SAMPLED_ROWS)))
        self.columns = tuple(dict.fromkeys(column for row in rows for column in row))

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        number, start = self._offsets[index]
        with self._files[number].open("rb") as file:
            file.seek(start)
            line = file.readline()
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RowError(f"{self.name}, row {index}: no JSON: {error}", reason="bad_json") from error
        if not isinstance(row, dict):
            raise RowError(f"{self.name}, row {index}: no JSON object", reason="bad_json")
        return row

    def values(self, column: str) -> Iterator[Any]:
        """Yield one column of all rows, None where a row cannot be read or lacks it."""
        for index in range(len(self)):
            yield (self._try(index) or {}).get(column)

    def fingerprint(self) -> str:
        """Return a digest that changes when the data do."""
        return _digest_files(self._files)

    def _try(self, index: int) -> Mapping[str, Any] | None:
        try:
            return self[index]
        except RowError:
            return None


class AudioFolder:
    """Recordings in a folder, with what ``metadata.jsonl`` or ``metadata.csv`` says of each ``file_name``.

    Without such a file every recording below the folder is a row, named by its path. ``datasets`` cannot read
    such folders without a decoder of its own.

    Args:
        folder: the folder.
        files: its files.
    """

    lost_rows = 0

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self.name = str(folder)
        self.root: Path | None = folder
        self._folder = folder
        self._files = tuple(files)
        self._rows: Source | list[dict[str, Any]]
        if folder / "metadata.jsonl" in files:
            self._rows = JsonLines([folder / "metadata.jsonl"], name=str(folder / "metadata.jsonl"))
            found: Sequence[str] = self._rows.columns
        elif folder / "metadata.csv" in files:
            with (folder / "metadata.csv").open(newline="", encoding="utf-8") as table:
                self._rows = list(csv.DictReader(table))
            found = list(self._rows[0]) if self._rows else []
        else:
            recordings = [file for file in files if _kind(file) == "audio"]
            self._rows = [{"file_name": file.relative_to(folder).as_posix()} for file in recordings]
            found = ["file_name"]
        if "file_name" not in found:
            raise DataError(f"the metadata of {folder} have no column file_name; found {', '.join(found)}")
        self.columns = tuple(dict.fromkeys(("id", "audio", *(name for name in found if name != "file_name"))))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row = dict(self._rows[index])
        file_name = row.pop("file_name", None)
        return {"id": file_name, "audio": file_name, **row}

    def values(self, column: str) -> Iterator[Any]:
        """Yield one column of all rows, None where a row cannot be read or lacks it."""
        for index in range(len(self)):
            try:
                yield self[index].get(column)
            except RowError:
                yield None

    def fingerprint(self) -> str:
        """Return a digest of names, sizes and metadata; there are too many recordings to read."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(f"{file.relative_to(self._folder)} {file.stat().st_size}\n".encode())
        metadata = [file for file in self._files if file.name.startswith("metadata.")]
        return hashlib.sha256((digest.hexdigest() + _digest_files(metadata)).encode()).hexdigest()


class Table:
    """A map-style data set of ``datasets``; recordings stay undecoded.

    Args:
        dataset: a ``datasets.Dataset``.
        name: what to call the source.
        root: folder that paths must stay inside.
        lost_rows: rows that were dropped because their part of a file is damaged.
        files: local files that it was made of, for the fingerprint.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        name: str,
        root: Path | None = None,
        lost_rows: int = 0,
        files: Sequence[Path] = (),
    ) -> None:
        self.name, self.root, self.lost_rows = name, root, lost_rows
        self.columns = tuple(dataset.column_names)
        self._dataset, self._files = _undecoded(dataset), tuple(files)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row: Mapping[str, Any] = self._dataset[index]
        return row

    def values(self, column: str) -> Iterator[Any]:
        """Yield one column of all rows, None where a row lacks it."""
        if column not in self.columns:
            yield from (None for _ in range(len(self)))
            return
        for row in self._dataset.select_columns([column]):
            yield row[column]

    def fingerprint(self) -> str:
        """Return a digest that changes when the data do."""
        if self._files:
            return _digest_files(self._files)
        return hashlib.sha256(f"{self._dataset._fingerprint}".encode()).hexdigest()


class Stream:
    """A streaming data set of ``datasets``: rows by position, each next one by reading on.

    Every reader goes through the whole stream and keeps the positions that it is asked for; going back starts
    over.
    A position keeps its row whoever reads it. Rows that cannot be used are replaced by rows shortly before.

    Args:
        dataset: a ``datasets.IterableDataset``.
        name: what to call the source.
        seed: seed of the shuffling; None keeps the order.
    """

    root: Path | None = None
    lost_rows = 0

    def __init__(self, dataset: Any, *, name: str, seed: int | None) -> None:
        self.name = name
        self._dataset, self._seed = _undecoded(dataset), seed
        features = dataset.column_names
        self.columns = tuple(features if features is not None else next(iter(self._dataset), {}))
        self._rows: Iterator[Mapping[str, Any]] = iter(())
        self._next, self._epoch = 0, -1
        self._spares: deque[Mapping[str, Any]] = deque(maxlen=_STREAM_SPARES)

    def read(self, position: int, attempt: int) -> Mapping[str, Any]:
        """Return the row at ``position`` of the endless stream, or the one ``attempt`` rows before."""
        if self._epoch < 0 or position < self._next - 1:
            self._next, self._epoch = 0, -1
            self._rows = iter(())
            self._spares.clear()
        while self._next <= position:
            self._spares.append(self._advance())
            self._next += 1
        if attempt >= len(self._spares):
            raise DataError(f"{self.name}: no usable row among {len(self._spares)} in a row")
        return self._spares[-1 - attempt]

    def _advance(self) -> Mapping[str, Any]:
        for row in self._rows:
            return row
        self._epoch += 1
        dataset = self._dataset
        if self._seed is not None:
            dataset = dataset.shuffle(
                seed=mix(self._seed, self._epoch) % (1 << 32), buffer_size=_STREAM_BUFFER
            )
        self._rows = iter(dataset)
        for row in self._rows:
            return row
        raise DataError(f"{self.name} is an empty stream")

    def fingerprint(self) -> str:
        """Return a digest that changes when the data do."""
        return hashlib.sha256(f"{self.name} {self._dataset.info.version}".encode()).hexdigest()


def open_source(spec: SourceSpec, *, seed: int = 0) -> Source | Stream:
    """Open a source and check that it has the columns its task needs.

    Args:
        spec: what to open.
        seed: shuffles a stream.

    Raises:
        DataError: if it cannot be read, is empty, or lacks a column; the columns found are listed.
        MissingDependencyError: if ``datasets`` is not installed and the source needs it.
    """
    source = _open(spec, seed=seed)
    unknown = [column for column in spec.columns if column not in source.columns]
    if unknown:
        raise DataError(
            f"{spec.path} has no column {', '.join(unknown)}; found the columns {', '.join(source.columns)}"
        )
    if spec.task is not None:
        names = {spec.columns.get(column, column) for column in source.columns}
        check_columns(names, task=spec.task, source=spec.path)
    if not isinstance(source, Stream) and len(source) == 0:
        raise DataError(f"{spec.path} is empty")
    return source


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


def _open(spec: SourceSpec, *, seed: int) -> Source | Stream:
    files = _local_files(spec.path)
    shuffle_seed = seed if spec.shuffle else None
    if files is None:
        return _open_hub(spec, shuffle_seed)
    kinds, folder = {_kind(file) for file in files} - {""}, Path(spec.path)
    if folder / PLAN_FILE in files and folder / TOTALS_FILE not in files:
        raise DataError(
            f"{spec.path} is not finished: run recipes/prepare.py again, it goes on where it stopped"
        )
    if "parquet" in kinds:
        return _open_parquet(spec, [file for file in files if _kind(file) == "parquet"], shuffle_seed)
    if "json" in kinds and "audio" not in kinds and not spec.streaming:
        return JsonLines([file for file in files if _kind(file) == "json"], name=spec.path)
    datasets = _datasets()
    if (folder / "state.json").is_file() and "arrow" in kinds:
        return Table(_one_split(datasets.load_from_disk(spec.path), spec), name=spec.path, files=files)
    if "audio" in kinds and folder.is_dir():
        return AudioFolder(folder, files)
    if "json" in kinds:
        return Stream(
            _load("json", spec, data_files=[str(file) for file in files]), name=spec.path, seed=shuffle_seed
        )
    found = ", ".join(sorted({file.suffix or file.name for file in files})) or "nothing"
    raise DataError(f"{spec.path} holds no parquet, JSON lines or audio; found {found}")


def _open_hub(spec: SourceSpec, seed: int | None) -> Source | Stream:
    path = Path(spec.path)
    if path.is_absolute() or spec.path.startswith((".", "~")) or "*" in spec.path:
        raise DataError(f"{spec.path} does not exist")
    dataset = _load(spec.path, spec, name=spec.name, revision=spec.revision)
    return Stream(dataset, name=spec.path, seed=seed) if spec.streaming else Table(dataset, name=spec.path)


def _open_parquet(spec: SourceSpec, files: list[Path], seed: int | None) -> Source | Stream:
    """Parquet files; where a part of one is damaged, what can be read of them."""
    names = [str(file) for file in files]
    if spec.streaming:
        return Stream(_load("parquet", spec, data_files=names), name=spec.path, seed=seed)
    try:
        return Table(_load("parquet", spec, data_files=names), name=spec.path, files=files)
    except DataError as error:
        logger.warning("%s", error)
    good, lost = _scan_parquet(files)
    if not good:
        raise DataError(f"{spec.path}: no row group of {len(files)} parquet files can be read")
    logger.warning("%s: %d rows are lost in damaged row groups; the rest is used", spec.path, lost)
    dataset = _datasets().Dataset.from_generator(_read_groups, gen_kwargs={"groups": good})
    return Table(dataset, name=spec.path, lost_rows=lost, files=files)


def _scan_parquet(files: Sequence[Path]) -> tuple[list[tuple[str, int]], int]:
    """Row groups that can be read, as file and number, and the rows of those that cannot.

    Raises:
        DataError: if the footer of a file is damaged, so that nobody can tell how many rows are lost.
    """
    pq = _parquet()

    good: list[tuple[str, int]] = []
    lost = 0
    for file in files:
        try:
            parquet = pq.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise DataError(f"{file} is no parquet file, or its end is missing: {error}") from error
        for group in range(parquet.num_row_groups):
            try:
                parquet.read_row_group(group)
                good.append((str(file), group))
            except (OSError, ValueError) as error:
                rows = parquet.metadata.row_group(group).num_rows
                logger.warning("%s, row group %d of %d rows is damaged: %s", file, group, rows, error)
                lost += rows
    return good, lost


def _read_groups(groups: Sequence[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    pq = _parquet()

    for file, group in groups:
        yield from pq.ParquetFile(file).read_row_group(group).to_pylist()


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("datasets", extra="train", purpose="reading training data") from error
    return datasets


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", extra="train", purpose="reading parquet files") from error
    return pyarrow.parquet


def _load(kind: str, spec: SourceSpec, **arguments: Any) -> Any:
    """``datasets.load_dataset`` with its many errors as one."""
    datasets = _datasets()
    split = "train" if kind in ("parquet", "json") else spec.split
    try:
        return datasets.load_dataset(kind, split=split, streaming=spec.streaming, **arguments)
    except Exception as error:  # builders raise whatever their formats do
        cause = error.__cause__ or error
        raise DataError(f"{spec.path} cannot be read: {type(cause).__name__}: {cause}") from error


def _one_split(dataset: Any, spec: SourceSpec) -> Any:
    if not isinstance(dataset, Mapping):
        return dataset
    if spec.split not in dataset:
        raise DataError(f"{spec.path} has no split {spec.split!r}; it has {', '.join(dataset)}")
    return dataset[spec.split]


def _undecoded(dataset: Any) -> Any:
    """The same data set with recordings as bytes and paths."""
    audio = _datasets().Audio
    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, audio):
            dataset = dataset.cast_column(column, audio(decode=False))
    return dataset


_KINDS: Mapping[str, str] = {
    ".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".arrow": "arrow",
    **dict.fromkeys((".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".au", ".m4a"), "audio"),
}  # fmt: skip


def _kind(file: Path) -> str:
    return _KINDS.get(file.suffix.lower(), "")


def _local_files(path: str) -> list[Path] | None:
    """Files that a path means, in order of name; None if it is not on this disk."""
    if "*" in path:
        folder, _, pattern = path.partition("*")
        top = Path(folder) if folder.endswith("/") or not folder else Path(folder).parent
        prefix = "" if folder.endswith("/") or not folder else Path(folder).name
        found = (
            sorted(file for file in top.glob(f"{prefix}*{pattern}") if file.is_file()) if top.is_dir() else []
        )
        return found or None
    place = Path(path)
    if place.is_file():
        return [place]
    if not place.is_dir():
        return None
    return sorted(
        file
        for file in place.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(place).parts)
    )


def _digest_files(files: Sequence[Path]) -> str:
    """Digest of names, sizes, and both ends of files."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            digest.update(content.read(_SAMPLED_BYTES))
            content.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(content.read(_SAMPLED_BYTES))
    return digest.hexdigest()
