"""Data sets that ``datasets`` reads, as sources: tables by row, and streams front to back.

Recordings stay undecoded. Those that a data set names by path are only read where they belong: below the
folder of the data, or in the caches of the Hub. Knows nothing of the schema or of models.
"""

import copy
import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from omni_adapter.data.sources.files import digest_files
from omni_adapter.data.sources.spec import SourceSpec, mix
from omni_adapter.errors import DataError, MissingDependencyError, RowError

logger = logging.getLogger(__name__)

_STREAM_BUFFER = 1000  # rows of a stream that are shuffled at a time
_STREAM_SPARES = 64  # last rows of a stream that can stand in for a reject
_BATCH = 100  # rows of a column that are read together

_Either = TypeVar("_Either", bound="Table | Stream")


class Table:
    """A map-style data set of ``datasets``; recordings stay undecoded.

    Args:
        dataset: a ``datasets.Dataset``.
        name: what to call the source.
        root: folder that paths must stay inside.
        lost_rows: rows that were dropped because their part of a file is damaged.
        files: local files that it was made of, for the fingerprint.
        caches: folders in which recordings lie that ``datasets`` fetched and names by path.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        name: str,
        root: Path | None = None,
        lost_rows: int = 0,
        files: Sequence[Path] = (),
        caches: Sequence[Path] = (),
    ) -> None:
        self.name, self.root, self.lost_rows = name, root, lost_rows
        self.columns = tuple(dataset.column_names)
        self._dataset, self._recordings = _undecoded(dataset)
        self._files, self._caches = tuple(files), tuple(caches)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return _placed(self._dataset[index], self._recordings, self._caches)

    def values(self, column: str) -> Iterator[Any]:
        """Yield one column of all rows, None where a row lacks it."""
        if column not in self.columns:
            yield from (None for _ in range(len(self)))
            return
        for batch in self._dataset.select_columns([column]).iter(batch_size=_BATCH):
            yield from batch[column]

    def only(self, columns: Sequence[str]) -> Self:
        """Return the same rows with the wanted columns alone."""
        return _only(self, columns)

    def fingerprint(self) -> str:
        """Return a digest that changes when the data do."""
        if self._files:
            return digest_files(self._files)
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
        root: folder that paths must stay inside.
        caches: folders in which recordings lie that ``datasets`` fetched and names by path.
    """

    lost_rows = 0

    def __init__(
        self,
        dataset: Any,
        *,
        name: str,
        seed: int | None,
        root: Path | None = None,
        caches: Sequence[Path] = (),
    ) -> None:
        self.name, self.root = name, root
        self._dataset, self._recordings = _undecoded(dataset)
        self._seed, self._caches = seed, tuple(caches)
        self._convert: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _as_it_is
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
        return self._convert(_placed(self._spares[-1 - attempt], self._recordings, self._caches))

    def only(self, columns: Sequence[str]) -> Self:
        """Return the same rows with the wanted columns alone; before the first row is read."""
        return _only(self, columns)

    @property
    def passes(self) -> int:
        """Passes that are behind the row that was read last."""
        return max(0, self._epoch)

    def keep(self, column: str, test: Callable[[Any], bool]) -> None:
        """Leave out rows whose value of ``column`` does not pass a test; before the first row is read."""
        self._dataset = self._dataset.filter(test, input_columns=[column])

    def convert(
        self, row: Callable[[Mapping[str, Any]], Mapping[str, Any]], *, columns: Sequence[str], name: str
    ) -> None:
        """Give rows another form.

        Args:
            row: one row in, one row out.
            columns: what they have then.
            name: what to call the source then.
        """
        self._convert, self.columns, self.name = row, tuple(columns), name

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


def open_parquet(spec: SourceSpec, files: Sequence[Path], *, root: Path, seed: int | None) -> Table | Stream:
    """Open parquet files; where a part of one is damaged, what can be read of them.

    Raises:
        DataError: if nothing of them can be read.
    """
    names = [str(file) for file in files]
    if spec.streaming:
        return Stream(_load("parquet", spec, data_files=names), name=spec.path, seed=seed, root=root)
    try:
        return Table(_load("parquet", spec, data_files=names), name=spec.path, root=root, files=files)
    except DataError as error:
        logger.warning("%s", error)
    good, lost = _scan_parquet(files)
    if not good:
        raise DataError(f"{spec.path}: no row group of {len(files)} parquet files can be read")
    logger.warning("%s: %d rows are lost in damaged row groups; the rest is used", spec.path, lost)
    dataset = _datasets().Dataset.from_generator(_read_groups, gen_kwargs={"groups": good})
    return Table(dataset, name=spec.path, root=root, lost_rows=lost, files=files)


def open_json_stream(spec: SourceSpec, files: Sequence[Path], *, root: Path, seed: int | None) -> Stream:
    """Open JSON lines as a stream."""
    names = [str(file) for file in files]
    return Stream(_load("json", spec, data_files=names), name=spec.path, seed=seed, root=root)


def open_saved(spec: SourceSpec, files: Sequence[Path]) -> Table:
    """Open a folder that ``datasets`` saved."""
    dataset = _datasets().load_from_disk(spec.path)
    if isinstance(dataset, Mapping):
        if spec.split not in dataset:
            raise DataError(f"{spec.path} has no split {spec.split!r}; it has {', '.join(dataset)}")
        dataset = dataset[spec.split]
    return Table(dataset, name=spec.path, root=Path(spec.path), files=files)


def open_repository(spec: SourceSpec, *, files: Sequence[str] = (), seed: int | None) -> Table | Stream:
    """Open a data set of the Hub, or a folder that is a copy of one.

    Args:
        spec: its id or folder, configuration and split.
        files: patterns of the files to read; empty for what its card says.
        seed: shuffles a stream.

    Raises:
        DataError: if it cannot be read.
    """
    folder = Path(spec.path)
    is_copy = folder.is_dir()
    revision = None if is_copy else spec.revision
    patterns = {"data_files": list(files)} if files else {}
    dataset = _load(spec.path, spec, name=spec.name, revision=revision, **patterns)
    caches = () if is_copy else _caches()
    root = folder if is_copy else caches[0]
    if spec.streaming:
        return Stream(dataset, name=spec.path, seed=seed, root=root, caches=caches)
    return Table(dataset, name=spec.path, root=root, caches=caches)


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
        if spec.streaming and "+" in split:  # streams have no sums of splits
            one_by_one = [
                datasets.load_dataset(kind, split=name, streaming=True, **arguments)
                for name in split.split("+")
            ]
            return datasets.concatenate_datasets(one_by_one)
        return datasets.load_dataset(kind, split=split, streaming=spec.streaming, **arguments)
    except Exception as error:  # builders raise whatever their formats do
        cause = error.__cause__ or error
        raise DataError(f"{spec.path} cannot be read: {type(cause).__name__}: {cause}") from error


def _caches() -> tuple[Path, ...]:
    """Where the Hub's files come to lie on this disk: as they are, and unpacked."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE), Path(_datasets().config.HF_DATASETS_CACHE)


def _only(source: _Either, columns: Sequence[str]) -> _Either:
    """The same rows with the wanted columns alone."""
    part = copy.copy(source)
    part.columns = tuple(column for column in source.columns if column in columns)
    part._dataset = source._dataset.select_columns(list(part.columns))
    part._recordings = tuple(column for column in source._recordings if column in columns)
    return part


def _undecoded(dataset: Any) -> tuple[Any, tuple[str, ...]]:
    """The same data set with recordings as bytes and paths, and their columns."""
    audio = _datasets().Audio
    recordings = tuple(
        column for column, feature in (dataset.features or {}).items() if isinstance(feature, audio)
    )
    for column in recordings:
        dataset = dataset.cast_column(column, audio(decode=False))
    return dataset, recordings


def _as_it_is(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return row


def _placed(row: Mapping[str, Any], recordings: Sequence[str], caches: Sequence[Path]) -> Mapping[str, Any]:
    """A row whose recordings lie in the caches, if they are named by path."""
    named = {
        column: row[column]["path"]
        for column in recordings
        if caches and row.get(column) and row[column].get("bytes") is None and row[column].get("path")
    }
    if not named:
        return row
    found: dict[str, Any] = {}
    for column, name in named.items():
        path = Path(name).resolve()
        if not Path(name).is_absolute() or not any(path.is_relative_to(top.resolve()) for top in caches):
            raise RowError(
                f"the path {name!r} leaves the Hub's caches; copy the data set and name the copy",
                reason="outside_root",
            )
        found[column] = path
    return {**row, **found}
