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
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import soundfile
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor

from omni_adapter.audio.codec import Codec
from omni_adapter.audio.waveform import AudioSource
from omni_adapter.config import Positive, dump
from omni_adapter.data.reader import DEFAULT_MEMORY_BYTES, DEFAULT_TIMEOUT_S, Reader
from omni_adapter.data.rows import Rejects, Row, check_needs, read_row
from omni_adapter.data.sources import PLAN_FILE, TOTALS_FILE, Source, SourceSpec, Stream, open_source, rename
from omni_adapter.data.synthesis import Synthesizer
from omni_adapter.errors import AudioError, DataError, MissingDependencyError, RowError

logger = logging.getLogger(__name__)

QUARANTINE_FILE = "quarantine.jsonl"
JOURNAL_FOLDER = "journal"

_ROW_GROUP = 100  # rows that are lost together when a file is damaged
_ATTEMPTS = 4  # at reading a row over a network
_FIRST_PAUSE_S = 0.5
_CLIPPED_LEVEL, _CLIPPED_SHARE = 0.999, 0.001
_DC_LEVEL = 0.02
_BLOCK_BYTES = 1 << 20

T = TypeVar("T")


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


class Listener(Protocol):
    """A frozen audio encoder, to have questions encoded once."""

    @property
    def mark(self) -> str:
        """What tells its frames from others', see ``encoder_mark``."""

    def frames(self, waveform: Tensor) -> Tensor:
        """Return frames [A', E] of a waveform [N] at the hearing rate."""


@dataclass
class Totals:
    """What was made.

    Attributes:
        rows: rows in all shards.
        rejected: rows in quarantine.
        seconds: hours' worth of speech by column, in seconds.
        reasons: rejects by reason.
    """

    rows: int = 0
    rejected: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)


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
        self._label = Path(spec.path.rstrip("/")).name
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
        rejects = Rejects(limit=self.settings.max_bad)
        for record in self._records():
            rejects.take(record["rows"])
            for reject in record["rejects"]:
                rejects.reject(RowError(reject["message"], reason=reject["reason"]))
        settings = self.settings
        reader = Reader(
            max_seconds=settings.max_seconds,
            memory_bytes=settings.decode_memory_bytes,
            timeout_s=settings.decode_timeout_s,
        )
        with reader:
            for shard in shards:
                self._make_shard(shard, reader, rejects, progress or _no_progress)

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
        for record in self._records():
            totals.rows += record["rows"]
            for column, seconds in record["seconds"].items():
                totals.seconds[column] = round(totals.seconds.get(column, 0.0) + seconds, 3)
            for reject in record["rejects"]:
                lines.append(json.dumps(reject, ensure_ascii=False) + "\n")
                rejects.examples.setdefault(reject["reason"], []).append(reject["message"])
                rejects.counts[reject["reason"]] += 1
        rejects.examples = {reason: examples[:3] for reason, examples in rejects.examples.items()}
        rejects.take(totals.rows)
        totals.rejected, totals.reasons = rejects.total, dict(sorted(rejects.counts.items()))
        _write(self.out / QUARANTINE_FILE, "".join(lines).encode())
        if totals.rejected:
            logger.warning(
                "%d rows are in %s:\n%s", totals.rejected, self.out / QUARANTINE_FILE, rejects.report()
            )
        rejects.check()
        _write(self.out / TOTALS_FILE, _json(vars(totals)))
        return totals

    def _agree_on_plan(self) -> None:
        """Write what is going to be made of what, or check that it is what an earlier run began."""
        settings = {name: value for name, value in dump(self.settings).items() if name not in _FREE_TO_CHANGE}
        plan = {
            "source": {**dump(self.spec), "path": self._label},
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

    def _make_shard(
        self, shard: int, reader: Reader, rejects: Rejects, progress: Callable[[int, float], None]
    ) -> None:
        first = shard * self.settings.shard_rows
        rows: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        for index in range(first, min(first + self.settings.shard_rows, self.num_rows)):
            seconds = 0.0
            try:
                rows.append(self._make_row(index, reader))
                seconds = rows[-1]["seconds_in"] + rows[-1]["seconds_out"]
                rejects.take()
            except RowError as error:
                bad.append(self._describe(index, error))
                rejects.reject(error)
            progress(1, seconds)
        content = _parquet(rows)
        record = {
            "rows": len(rows),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "seconds": {
                name: round(sum(row[name] for row in rows), 3) for name in ("seconds_in", "seconds_out")
            },
            "rejects": bad,
        }
        _write(self._shard(shard), content)
        _write(self._journal(shard), _json(record))

    def _make_row(self, index: int, reader: Reader) -> dict[str, Any]:
        """One row of the result."""
        row = self._read(index)
        texts = {
            "audio_in": row.text_in,
            "audio_out": row.text_out,
        }
        waveforms: dict[str, Tensor | None] = {}
        rates = {"audio_in": self.settings.hearing_rate, "audio_out": self._codec.spec.sampling_rate}
        for column, rate in rates.items():
            source = getattr(row, column)
            if column == "audio_out" and row.codes_out is not None:
                source = None
            elif source is None and column in self.settings.speak:
                source = self._speak(texts[column], row)
            waveforms[column] = None
            if source is not None:
                waveforms[column] = _read_audio(reader, source, rate, f"{row.id}: {column}", column)
        codes = row.codes_out
        if codes is None and waveforms["audio_out"] is not None:
            codes = self._codec.encode(waveforms["audio_out"]).cpu()
        self._check(row, codes, heard=waveforms["audio_in"] is not None)
        result = _result(row, codes, waveforms, rates, self._codec)
        heard = waveforms["audio_in"]
        if self._listener is not None and heard is not None:
            frames = self._listener.frames(heard).float().cpu().numpy().astype("<f2")
            mark = self._listener.mark
            result["frames_in"] = {"values": frames.tobytes(), "width": frames.shape[1], "encoder": mark}
        return result

    def _read(self, index: int) -> Row:
        values = _retried(lambda: self._source[index])
        row = read_row(
            rename(values, self.spec),
            task=self.spec.task,
            name=f"{self._label}#{index}",
            root=self._source.root,
        )
        if any(not isinstance(turn["content"], str) for turn in row.turns):
            raise RowError(
                f"{row.id}: turns with recordings cannot be prepared; keep them as text", reason="bad_turns"
            )
        return row

    def _speak(self, text: str | None, row: Row) -> AudioSource | None:
        if text is None:
            return None
        assert self._synthesizer is not None
        speech = self._synthesizer.speak(text, speaker=row.speaker, language=row.language)
        if isinstance(speech.audio, bytes):
            return speech.audio
        assert speech.sampling_rate is not None
        return speech.audio, speech.sampling_rate

    def _check(self, row: Row, codes: Tensor | None, *, heard: bool) -> None:
        """Refuse a row that serves nothing."""
        spec = self._codec.spec
        if codes is not None and (
            codes.shape[0] != spec.num_codebooks or not _in_range(codes, spec.codebook_size)
        ):
            raise RowError(
                f"{row.id}: codes_out must be [{spec.num_codebooks}, T] of 0..{spec.codebook_size - 1}, "
                f"got {list(codes.shape)} of {int(codes.min())}..{int(codes.max())}",
                reason="bad_codes",
            )
        if row.task:
            made = {"audio_in": b"" if heard else None, "codes_out": codes}
            check_needs(Row(**{**vars(row), **made}))
        elif codes is None and not heard:
            raise RowError(f"{row.id} has no recording and no codes", reason="no_audio_out")

    def _describe(self, index: int, error: RowError) -> dict[str, Any]:
        """The quarantine's record of a row: which file, which bytes, why."""
        path, digest, name = None, None, f"{self._label}#{index}"
        try:
            values = rename(self._source[index], self.spec)
            name = str(values.get("id") or name)
            column = (
                "audio_out"
                if error.reason.startswith("audio_out") or not values.get("audio_in")
                else "audio_in"
            )
            recording = values.get(column)
            if isinstance(recording, Mapping):
                path, content = recording.get("path"), recording.get("bytes")
                digest = hashlib.sha256(content).hexdigest() if content is not None else None
            elif isinstance(recording, str | Path):
                path = str(recording)
            if path is not None and digest is None and error.reason != "outside_root":
                digest = _digest_file(Path(self._source.root or ".") / path)
        except RowError:
            logger.debug("row %d cannot be read", index)
        what = {"index": index, "id": name, "path": path, "sha256": digest}
        return {**what, "reason": error.reason, "message": str(error)}


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


def _read_audio(reader: Reader, source: AudioSource, rate: int, name: str, column: str) -> Tensor:
    try:
        return reader.read(source, sampling_rate=rate)
    except AudioError as error:
        raise RowError(f"{name}: {error}", reason=f"{column}_{error.reason}") from error


def _result(
    row: Row,
    codes: Tensor | None,
    waveforms: Mapping[str, Tensor | None],
    rates: Mapping[str, int],
    codec: Codec,
) -> dict[str, Any]:
    """A row as it is stored."""
    heard = waveforms["audio_in"]
    tags = [
        f"{column}:{tag}"
        for column, waveform in waveforms.items()
        if waveform is not None
        for tag in _tags(waveform)
    ]
    return {
        "id": row.id,
        "task": row.task or None,
        "audio_in": None if heard is None else {"bytes": _flac(heard, rates["audio_in"]), "path": None},
        "text_in": row.text_in,
        "codes_out": None if codes is None else codes.tolist(),
        "text_out": row.text_out,
        "turns": json.dumps(row.turns, ensure_ascii=False) if row.turns else None,
        "system": row.system,
        "speaker": row.speaker,
        "language": row.language,
        "seconds_in": 0.0 if heard is None else heard.shape[0] / rates["audio_in"],
        "seconds_out": 0.0 if codes is None else codes.shape[1] / codec.spec.frame_rate_hz,
        "tags": tags,
    }


def _tags(waveform: Tensor) -> list[str]:
    """What is odd about a recording that can be used all the same."""
    clipped = float((waveform.abs() >= _CLIPPED_LEVEL).float().mean()) > _CLIPPED_SHARE
    offset = abs(float(waveform.mean())) > _DC_LEVEL
    return ["clipped"] * clipped + ["dc"] * offset


def _flac(waveform: Tensor, rate: int) -> bytes:
    """A waveform as a lossless 16-bit file."""
    samples = (waveform.numpy() * np.iinfo(np.int16).max).round().astype(np.int16)
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _in_range(codes: Tensor, size: int) -> bool:
    return codes.numel() > 0 and 0 <= int(codes.min()) and int(codes.max()) < size


def _parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    """Rows as the bytes of a parquet file, the same ones for the same rows."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependencyError("pyarrow", extra="train", purpose="writing parquet files") from error
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("task", pa.string()),
            ("audio_in", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            (
                "frames_in",
                pa.struct([("values", pa.binary()), ("width", pa.int32()), ("encoder", pa.string())]),
            ),
            ("text_in", pa.string()),
            ("codes_out", pa.list_(pa.list_(pa.int32()))),
            *((name, pa.string()) for name in ("text_out", "turns", "system", "speaker", "language")),
            ("seconds_in", pa.float64()),
            ("seconds_out", pa.float64()),
            ("tags", pa.list_(pa.string())),
        ]
    )
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist(list(rows), schema=schema),
        sink,
        row_group_size=_ROW_GROUP,
        write_page_checksum=True,
    )
    return sink.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, whenever the machine stops.

    Raises:
        DataError: if the disk is full or the folder may not be written; nothing is left of the file then.
    """
    unfinished = path.with_name(f".{path.name}.partial")
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
        item.name.endswith(".partial") or (item.name == JOURNAL_FOLDER and not any(item.iterdir()))
        for item in folder.iterdir()
    )


def _retried(read: Callable[[], T]) -> T:
    """Try again what a network may lose."""
    for attempt in range(_ATTEMPTS - 1):
        try:
            return read()
        except (ConnectionError, TimeoutError) as error:
            logger.warning("reading again: %s", error)
            time.sleep(_FIRST_PAUSE_S * 2**attempt)
    return read()


def _digest_file(path: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


def _no_progress(rows: int, seconds: float) -> None:
    """Tell nobody."""
