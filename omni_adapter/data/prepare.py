"""Encode recordings once: rows with audio in, rows with codes out, in shards that survive a kill.

Source in, folder of parquet files in the schema of ``rows`` out. A shard counts once its record in the
journal is in place, which is written after the shard itself; everything else is redone. The result depends on
the source and the settings alone, not on the number of processes, interruptions or the time of day. Knows
nothing of language models.

    out/
      plan.json            written first: what is made of what; a run that goes on must agree
      shard-00000.parquet
      journal/00000.json   the shard's size, digest, and rejects; written after it
      quarantine.jsonl     every reject with path, sha256 and reason
      prepared.json        written last: totals
"""

import errno
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass

from omni_adapter.audio.codec import Codec
from omni_adapter.config import Positive, dump
from omni_adapter.data.encode import Listener, RowEncoder, to_parquet
from omni_adapter.data.reader import DEFAULT_MEMORY_BYTES, DEFAULT_TIMEOUT_S, Reader
from omni_adapter.data.rows import Rejects
from omni_adapter.data.sources import PLAN_FILE, TOTALS_FILE, Source, SourceSpec, Stream, open_source
from omni_adapter.data.synthesis import Synthesizer
from omni_adapter.errors import DataError, RowError

logger = logging.getLogger(__name__)

QUARANTINE_FILE = "quarantine.jsonl"
JOURNAL_FOLDER = "journal"
UNFINISHED = ".partial"
"""Ends the name of a file that a killed process may leave; the end of the work removes it."""

Record = Mapping[str, Any]
"""What the journal holds of a shard that is done."""


@pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PrepareSettings:
    """How data are prepared.

    Args:
        shard_rows: rows of a shard; what a kill can cost.
        max_bad: largest share of rejects, 0..1.
        speak: columns that are spoken by the synthesizer where they are missing and their text is there.
        hearing_rate: rate at which questions are kept, Hz; the audio encoder's.
        max_seconds: longest recording that is taken.
        decode_memory_bytes: memory that decoding one file may take.
        decode_timeout_s: time that decoding one file may take.
    """

    shard_rows: Positive = 500
    max_bad: float = 0.05
    speak: tuple[Literal["audio_in", "audio_out"], ...] = ()
    hearing_rate: Positive = 16_000
    max_seconds: float = 300.0
    decode_memory_bytes: Positive = DEFAULT_MEMORY_BYTES
    decode_timeout_s: float = DEFAULT_TIMEOUT_S

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad must lie in 0..1, got {self.max_bad}")


_FREE_TO_CHANGE = ("max_bad", "decode_memory_bytes", "decode_timeout_s")
"""Settings that a run may change when it goes on."""


@dataclass
class Totals:
    """What was made.

    Attributes:
        rows: rows in all shards.
        rejected: rows in quarantine.
        seconds: hours' worth of speech by column, in seconds.
        reasons: rejects by reason.
        columns: columns with a value in any row; the others are empty.
    """

    rows: int = 0
    rejected: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)


class Preparation:
    """One source on its way into one folder. Several processes may each do some of the shards.

    Args:
        spec: the source.
        out: the folder; it may hold the beginning of the same work.
        codec: encodes the answers.
        settings: how.
        synthesizer: speaks what has no recording.
        listener: encodes the questions too; None leaves that to training.

    Raises:
        DataError: if the source cannot be used, has duplicate ids, or the folder holds something else.
    """

    def __init__(
        self,
        spec: SourceSpec,
        out: str | Path,
        *,
        codec: Codec,
        settings: PrepareSettings | None = None,
        synthesizer: Synthesizer | None = None,
        listener: Listener | None = None,
    ) -> None:
        self.settings = settings or PrepareSettings()
        if self.settings.speak and synthesizer is None:
            raise DataError(
                f"speaking {', '.join(self.settings.speak)} needs a synthesizer, such as espeak-ng"
            )
        source = open_source(spec)
        if isinstance(source, Stream):
            raise DataError(f"{spec.path}: streams cannot be counted and shared; drop streaming")
        self.spec, self.out, self._source = spec, Path(out), source
        self._codec, self._synthesizer, self._listener = codec, synthesizer, listener
        self.num_rows = min(len(source), spec.limit) if spec.limit else len(source)
        self.num_shards = -(-self.num_rows // self.settings.shard_rows)
        self._rows = RowEncoder(
            source,
            spec,
            codec=codec,
            hearing_rate=self.settings.hearing_rate,
            speak=self.settings.speak,
            synthesizer=synthesizer,
            listener=listener,
        )
        if not (self.out / PLAN_FILE).exists():  # who wrote it has checked the same rows
            _check_ids(source, spec, self.num_rows)
        self._agree_on_plan()

    def pending(self) -> list[int]:
        """Return the shards that are not done."""
        return [shard for shard in range(self.num_shards) if self._record(shard) is None]

    def run(self, shards: Iterable[int], *, progress: Callable[[int, float], None] | None = None) -> None:
        """Make shards.

        Args:
            shards: which; those of several processes must not overlap.
            progress: called after each row with rows and seconds of speech done since the last call.

        Raises:
            DataError: if too large a share of rows is bad, or the folder cannot be written.
        """
        rejects = self.tally()
        with self.reader() as reader:
            for shard in shards:
                self.make(shard, reader, rejects=rejects, progress=progress)

    def tally(self) -> Rejects:
        """Return the counts of all finished shards.

        Raises:
            DataError: if too large a share of their rows is bad.
        """
        rejects = Rejects(limit=self.settings.max_bad)
        for record in self._records():
            add_record(record, rejects)
        return rejects

    def reader(self) -> Reader:
        """Return what decodes recordings, within the limits of the settings."""
        return Reader(
            max_seconds=self.settings.max_seconds,
            memory_bytes=self.settings.decode_memory_bytes,
            timeout_s=self.settings.decode_timeout_s,
        )

    def make(
        self,
        shard: int,
        reader: Reader,
        *,
        rejects: Rejects | None = None,
        progress: Callable[[int, float], None] | None = None,
    ) -> Record:
        """Return the journal's record of a shard, which is made unless it is there.

        Whoever makes a shard writes the same bytes, so that two who do so at once cannot harm each other.

        Args:
            shard: which.
            reader: decodes recordings.
            rejects: counts the rows; its limit stops the run.
            progress: called after each row with 1 and its seconds of speech.

        Raises:
            DataError: if too large a share of rows is bad, or the folder cannot be written.
        """
        if (record := self._record(shard)) is not None:
            return record
        first = shard * self.settings.shard_rows
        rows: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        for index in range(first, min(first + self.settings.shard_rows, self.num_rows)):
            seconds = 0.0
            try:
                rows.append(self._rows.encode(index, reader))
                seconds = rows[-1]["seconds_in"] + rows[-1]["seconds_out"]
                if rejects is not None:
                    rejects.take()
            except RowError as error:
                bad.append(self._rows.describe(index, error))
                if rejects is not None:
                    rejects.reject(error)
            if progress is not None:
                progress(1, seconds)
        content = to_parquet(rows)
        record = {
            "rows": len(rows),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "seconds": {
                name: round(sum(row[name] for row in rows), 3) for name in ("seconds_in", "seconds_out")
            },
            "columns": sorted({name for row in rows for name, value in row.items() if value is not None}),
            "rejects": bad,
        }
        _write(self._shard(shard), content)
        _write(self._journal(shard), _json(record))
        return record

    def finish(self) -> Totals:
        """Check that all shards are there and write quarantine and totals; one process calls this, last.

        Raises:
            DataError: if shards are missing, too large a share of rows is bad, or no row is left.
        """
        if missing := self.pending():
            raise DataError(
                f"{len(missing)} of {self.num_shards} shards are not done; run the same command again"
            )
        totals, rejects, lines = Totals(), Rejects(limit=self.settings.max_bad), []
        columns: set[str] = set()
        for record in self._records():
            totals.rows += record["rows"]
            columns.update(record["columns"])
            for column, seconds in record["seconds"].items():
                totals.seconds[column] = round(totals.seconds.get(column, 0.0) + seconds, 3)
            for reject in record["rejects"]:
                lines.append(json.dumps(reject, ensure_ascii=False) + "\n")
                rejects.examples.setdefault(reject["reason"], []).append(reject["message"])
                rejects.counts[reject["reason"]] += 1
        rejects.examples = {reason: examples[:3] for reason, examples in rejects.examples.items()}
        rejects.take(totals.rows)
        totals.rejected, totals.reasons = rejects.total, dict(sorted(rejects.counts.items()))
        totals.columns = sorted(columns)
        _write(self.out / QUARANTINE_FILE, "".join(lines).encode())
        if totals.rejected:
            logger.warning(
                "%d rows are in %s:\n%s", totals.rejected, self.out / QUARANTINE_FILE, rejects.report()
            )
        rejects.check()
        for folder in (self.out, self.out / JOURNAL_FOLDER):
            for leftover in folder.glob(f".*{UNFINISHED}"):  # of processes that were killed
                leftover.unlink(missing_ok=True)
        _write(self.out / TOTALS_FILE, _json(vars(totals)))
        return totals

    def _agree_on_plan(self) -> None:
        """Write what is going to be made of what, or check that it is what an earlier run began."""
        settings = {name: value for name, value in dump(self.settings).items() if name not in _FREE_TO_CHANGE}
        plan = {
            "source": {**dump(self.spec), "path": self._rows.label},
            "source_sha256": self._source.fingerprint(),
            "codec": self._codec.fingerprint(),
            "synthesizer": self._synthesizer.name if self._synthesizer else None,
            "encoder": self._listener.mark if self._listener else None,
            "rows": self.num_rows,
            "settings": settings,
        }
        plan = json.loads(json.dumps(plan))
        path = self.out / PLAN_FILE
        if not path.exists():
            if self.out.is_dir() and any(self.out.iterdir()) and not _only_leftovers(self.out):
                raise DataError(f"{self.out} holds other files; name an empty folder")
            (self.out / JOURNAL_FOLDER).mkdir(parents=True, exist_ok=True)
            _write(path, _json(plan))
            return
        begun = json.loads(path.read_text(encoding="utf-8"))
        differing = [
            f"{key}: {begun.get(key)!r} then, {plan[key]!r} now"
            for key in plan
            if begun.get(key) != plan[key]
        ]
        if differing:
            raise DataError(
                f"{self.out} was begun with something else ({'; '.join(differing)}); name another folder"
            )
        (self.out / JOURNAL_FOLDER).mkdir(exist_ok=True)

    def _record(self, shard: int) -> dict[str, Any] | None:
        """The journal's record of a shard, None if the shard is not done."""
        try:
            record: dict[str, Any] = json.loads(self._journal(shard).read_bytes())
            return record if self._shard(shard).stat().st_size == record["bytes"] else None
        except (OSError, ValueError):
            return None

    def _records(self) -> Iterator[dict[str, Any]]:
        return (record for shard in range(self.num_shards) if (record := self._record(shard)) is not None)

    def _journal(self, shard: int) -> Path:
        return self.out / JOURNAL_FOLDER / f"{shard:05d}.json"

    def _shard(self, shard: int) -> Path:
        return self.out / f"shard-{shard:05d}.parquet"


def add_record(record: Record, rejects: Rejects) -> None:
    """Count the rows of a finished shard.

    Raises:
        DataError: if by now too large a share is bad.
    """
    rejects.take(record["rows"])
    for reject in record["rejects"]:
        rejects.reject(RowError(reject["message"], reason=reject["reason"]))


def _check_ids(source: Source, spec: SourceSpec, num_rows: int) -> None:
    """Refuse a source in which two rows have one name."""
    column = next((theirs for theirs, ours in spec.columns.items() if ours == "id"), "id")
    seen: dict[str, int] = {}
    doubles = []
    for index, value in zip(range(num_rows), source.values(column), strict=False):
        if value is not None and (first := seen.setdefault(str(value), index)) != index:
            doubles.append(f"{value!r} in rows {first} and {index}")
    if doubles:
        raise DataError(
            f"{spec.path} has {len(doubles)} duplicate ids: {', '.join(doubles[:5])}; make them unique"
        )


def _write(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, whenever the machine stops.

    Raises:
        DataError: if the disk is full or the folder may not be written; nothing is left of the file then.
    """
    # Another process, on another machine perhaps, may be writing the same file.
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}{UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        cause = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else str(error)
        raise DataError(
            f"{path} cannot be written: {cause}; finished shards are kept, run the same command again"
        ) from error


def _only_leftovers(folder: Path) -> bool:
    """Whether a folder holds nothing but what a kill at the very start leaves."""
    return all(
        item.name.endswith(UNFINISHED) or (item.name == JOURNAL_FOLDER and not any(item.iterdir()))
        for item in folder.iterdir()
    )


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
