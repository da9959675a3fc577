"""JSON lines as a source: files of JSON objects, one a line, whose rows may differ in form.

Knows nothing of the schema or of models.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from omni_adapter.data.sources.files import digest_files
from omni_adapter.errors import DataError, RowError

_SAMPLED_ROWS = 100  # to find the columns


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

    def only(self, columns: Sequence[str]) -> Self:
        """Return the rows as they are: a line is read whole."""
        return self

    def fingerprint(self) -> str:
        """Return a digest that changes when the data do."""
        return digest_files(self._files)

    def _try(self, index: int) -> Mapping[str, Any] | None:
        try:
            return self[index]
        except RowError:
            return None
