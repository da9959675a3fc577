"""Encode one row: recordings and texts in, codes out, or the reason why not.

A row of a source in, a row of prepared data out, in the schema of ``rows``. Knows nothing of shards, of
folders, or of how many processes do the work.
"""

import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import soundfile
from torch import Tensor

from omni_adapter.audio.codec import Codec
from omni_adapter.audio.waveform import AudioSource
from omni_adapter.data.reader import Reader
from omni_adapter.data.rows import Row, check_needs, read_row
from omni_adapter.data.sources import Source, SourceSpec, rename
from omni_adapter.data.synthesis import Synthesizer
from omni_adapter.errors import AudioError, MissingDependencyError, RowError

logger = logging.getLogger(__name__)

_ROW_GROUP = 100  # rows that are lost together when a file is damaged
_ATTEMPTS = 4  # at reading a row over a network
_FIRST_PAUSE_S = 0.5
_CLIPPED_LEVEL, _CLIPPED_SHARE = 0.999, 0.001
_DC_LEVEL = 0.02
_BLOCK_BYTES = 1 << 20

T = TypeVar("T")


class Listener(Protocol):
    """A frozen audio encoder, to have questions encoded once."""

    @property
    def mark(self) -> str:
        """What tells its frames from others', see ``encoder_mark``."""

    def frames(self, waveform: Tensor) -> Tensor:
        """Return frames [A', E] of a waveform [N] at the hearing rate."""


class RowEncoder:
    """Encodes the rows of one source.

    Args:
        source: the rows.
        spec: how they are named and what they must serve.
        codec: encodes the answers.
        hearing_rate: rate at which questions are kept, Hz.
        speak: columns that are spoken where they are missing and their text is there.
        synthesizer: speaks them.
        listener: encodes the questions too; None leaves that to training.

    Attributes:
        label: what rows without an id are called after.
    """

    def __init__(
        self,
        source: Source,
        spec: SourceSpec,
        *,
        codec: Codec,
        hearing_rate: int,
        speak: Collection[str] = (),
        synthesizer: Synthesizer | None = None,
        listener: Listener | None = None,
    ) -> None:
        self._source, self._spec = source, spec
        self._codec, self._synthesizer, self._listener = codec, synthesizer, listener
        self._hearing_rate, self._speak_columns = hearing_rate, frozenset(speak)
        self.label = Path(spec.path.rstrip("/")).name

    def encode(self, index: int, reader: Reader) -> dict[str, Any]:
        """Return one row of the result, by the names of ``to_parquet``.

        Raises:
            RowError: if the row cannot serve.
        """
        row = self._read(index)
        texts = {
            "audio_in": row.text_in,
            "audio_out": row.text_out,
        }
        waveforms: dict[str, Tensor | None] = {}
        rates = {"audio_in": self._hearing_rate, "audio_out": self._codec.spec.sampling_rate}
        for column, rate in rates.items():
            source = getattr(row, column)
            if column == "audio_out" and row.codes_out is not None:
                source = None
            elif source is None and column in self._speak_columns:
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
            rename(values, self._spec),
            task=self._spec.task,
            name=f"{self.label}#{index}",
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

    def describe(self, index: int, error: RowError) -> dict[str, Any]:
        """Return the quarantine's record of a row: which file, which bytes, why."""
        path, digest, name = None, None, f"{self.label}#{index}"
        try:
            values = rename(self._source[index], self._spec)
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
    odd = [
        f"{column}:{tag}"
        for column, waveform in waveforms.items()
        if waveform is not None
        for tag in tags(waveform)
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
        "tags": odd,
    }


def tags(waveform: Tensor) -> list[str]:
    """Return what is odd about a recording [N] that can be used all the same."""
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


def to_parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    """Return rows as the bytes of a parquet file, the same ones for the same rows."""
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
