"""Folders of recordings as a source, with what is known of each: a table, or a text beside it.

Knows nothing of the schema or of models. Names stay as they are written; whether they lead out of the folder
is checked where a recording is read, and here for texts.
"""

import csv
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Self

from omni_adapter.data.rows import resolve_inside
from omni_adapter.data.sources.files import digest_files, kind_of
from omni_adapter.data.sources.json_lines import JsonLines
from omni_adapter.data.sources.spec import Source
from omni_adapter.errors import DataError, RowError

_LJ_SEPARATOR = "|"
_LJ_FOLDER = "wavs"
_TEXT_ENDS = (".normalized.txt", ".txt")
_CHAPTER_END = ".trans.txt"
_TEXT_FOLDER = "txt"  # beside the folders of recordings, with the same names in it
_TEXT_BYTES = 1 << 20  # the longest text that is read


class AudioFolder:
    """Recordings in a folder, with what ``metadata.jsonl`` or ``metadata.csv`` says of each ``file_name``.

    ``metadata.csv`` may also be as in LJ Speech: lines ``name|text|text in words`` without a header, for
    recordings in ``wavs``. Without such a file every recording below the folder is a row, named by its path,
    with the text that lies beside it: ``a.normalized.txt`` or ``a.txt`` for ``a.wav``; a line of
    ``1-2.trans.txt`` for ``1-2-0003.flac``; ``txt/p1/p1_001.txt`` for ``any/p1/p1_001_mic1.flac``.
    ``datasets`` cannot read such folders without a decoder of its own.

    Args:
        folder: the folder.
        files: its files.

    Raises:
        DataError: if the metadata cannot be read or do not name the recordings.
    """

    lost_rows = 0

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self.name = str(folder)
        self.root: Path | None = folder
        self._folder = folder
        self._files = tuple(files)
        self._texts = _Texts(folder, frozenset())
        self._rows: Source | list[dict[str, Any]]
        if folder / "metadata.jsonl" in files:
            self._rows = JsonLines([folder / "metadata.jsonl"], name=str(folder / "metadata.jsonl"))
            found: Sequence[str] = self._rows.columns
        elif folder / "metadata.csv" in files:
            self._rows = _read_table(folder / "metadata.csv")
            found = list(self._rows[0]) if self._rows else []
        else:
            names = [file.relative_to(folder).as_posix() for file in files if kind_of(file) == "audio"]
            texts = (file.relative_to(folder).as_posix() for file in files if file.suffix == ".txt")
            self._texts = _Texts(folder, frozenset(texts))
            self._rows = [{"file_name": name} for name in names]
            has_text = any(self._texts.find(name) is not None for name in names)
            found = ["file_name", "text"] if has_text else ["file_name"]
        if "file_name" not in found:
            raise DataError(f"the metadata of {folder} have no column file_name; found {', '.join(found)}")
        self.columns = tuple(dict.fromkeys(("id", "audio", *(name for name in found if name != "file_name"))))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row = dict(self._rows[index])
        file_name = row.pop("file_name", None)
        if "text" in self.columns and isinstance(file_name, str) and self._texts.find(file_name) is not None:
            row["text"] = self._texts.read(file_name)
        return {"id": file_name, "audio": file_name, **row}

    def values(self, column: str) -> Iterator[Any]:
        """Yield one column of all rows, None where a row cannot be read or lacks it."""
        for index in range(len(self)):
            try:
                yield self[index].get(column)
            except RowError:
                yield None

    def only(self, columns: Sequence[str]) -> Self:
        """Return the rows as they are: they hold names, not recordings."""
        return self

    def fingerprint(self) -> str:
        """Return a digest of names, sizes and metadata; there are too many recordings to read."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(f"{file.relative_to(self._folder)} {file.stat().st_size}\n".encode())
        metadata = [file for file in self._files if file.name.startswith("metadata.")]
        return hashlib.sha256((digest.hexdigest() + digest_files(metadata)).encode()).hexdigest()


class _Texts:
    """What is said in recordings, from files beside them.

    Args:
        folder: top of the recordings.
        names: text files below it, by their paths.
    """

    def __init__(self, folder: Path, names: frozenset[str]) -> None:
        self._folder, self._names = folder, names
        self._chapter = lru_cache(maxsize=8)(self._read_chapter)

    def find(self, recording: str) -> str | None:
        """Return the text file of a recording, None without one."""
        path = PurePosixPath(recording)
        candidates = [path.with_name(path.stem + end) for end in _TEXT_ENDS]
        candidates.append(path.with_name(path.stem.rpartition("-")[0] + _CHAPTER_END))
        for stem in dict.fromkeys((path.stem, path.stem.rpartition("_")[0])):
            candidates.append(PurePosixPath(_TEXT_FOLDER, *path.parts[1:-1], f"{stem}.txt"))
        return next((str(name) for name in candidates if str(name) in self._names), None)

    def read(self, recording: str) -> str | None:
        """Return what is said in a recording, None if no file has it.

        Raises:
            RowError: if its file cannot be read, or lies outside of the folder.
        """
        name = self.find(recording)
        if name is None:
            return None
        if name.endswith(_CHAPTER_END):
            return self._chapter(name).get(PurePosixPath(recording).stem)
        return self._read(name).strip()

    def _read_chapter(self, name: str) -> dict[str, str]:
        """Texts of a chapter by recording."""
        lines = (line.partition(" ") for line in self._read(name).splitlines())
        return {recording: text.strip() for recording, _, text in lines}

    def _read(self, name: str) -> str:
        path = resolve_inside(name, self._folder)
        try:
            with path.open("rb") as file:
                content = file.read(_TEXT_BYTES + 1)
            if len(content) > _TEXT_BYTES:
                raise RowError(f"the text {name} is longer than {_TEXT_BYTES} bytes", reason="bad_transcript")
            return content.decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise RowError(f"the text {name} cannot be read: {error}", reason="bad_transcript") from error


def _read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of ``metadata.csv``, with a header or as in LJ Speech."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as table:
            first = table.readline()
            table.seek(0)
            if _LJ_SEPARATOR in first and "file_name" not in first:
                return _read_lj(csv.reader(table, delimiter=_LJ_SEPARATOR, quoting=csv.QUOTE_NONE))
            return list(csv.DictReader(table))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_lj(lines: Iterator[list[str]]) -> list[dict[str, Any]]:
    return [
        {
            "file_name": f"{_LJ_FOLDER}/{name}.wav",
            "text": rest[0] if rest else None,
            "normalized_text": rest[1] if len(rest) > 1 else None,
        }
        for name, *rest in (line for line in lines if line)
    ]
