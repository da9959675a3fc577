"""Read recordings of any kind into one form, and write wav files while they grow.

File, bytes, file object or array -> waveform [N], float32 in -1..1, mono, at the rate that is asked for; or
pieces of sound as they come -> pieces of that waveform. Decodes in blocks, so that what a header claims is
never allocated. Knows nothing of features or codes.
"""

import io
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from omni_adapter.errors import AudioError

logger = logging.getLogger(__name__)

Samples = np.ndarray[Any, np.dtype[Any]]
AudioSource = str | Path | bytes | BinaryIO | Samples | Tensor | tuple[Samples | Tensor, int]
"""A recording: a path, a file's bytes, an open file, or samples, alone or in a pair with their rate."""

DEFAULT_MAX_SECONDS = 1800.0

_MIN_RATE, _MAX_RATE = 1000, 1_000_000
_MAX_ARRAY_CHANNELS = 32
_BLOCK_VALUES = 1 << 18  # frames * channels decoded at a time
_UNKNOWN_FRAMES = 1 << 62  # libsndfile's count for a stream that does not say its length is above this
_UNKNOWN_BYTES = 0x7FFFF000  # sizes from here on are what programs write that do not know the size yet
_SILENT_PEAK = 1e-4  # -80 dB
_CANCELLED_ENERGY = 1e-4  # the mix is this much weaker than a channel: the channels cancel each other
_MAX_PEAK = 8.0  # louder floats are not samples in -1..1 that went a bit too high
_MAGIC = (b"RIFF", b"RIFX", b"RF64", b"FORM", b"fLaC", b"OggS")
_SMALLEST_FILE = 512
# What is decoded at all: decoders of rare formats are seldom tested, and files may come from strangers.
_CONTAINERS = frozenset({"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "NIST", "FLAC", "OGG", "MP3"})
_ENCODINGS = frozenset(
    {
        "PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW", "ALAC_16",
        "ALAC_20", "ALAC_24", "ALAC_32", "VORBIS", "OPUS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III",
    }
)  # fmt: skip
_TORN_CHUNK = re.compile(r"^\s*(?:data|SSND)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE)


def read_waveform(
    source: AudioSource,
    *,
    sampling_rate: int,
    array_rate: int | None = None,
    max_seconds: float = DEFAULT_MAX_SECONDS,
    allow_silent: bool = False,
) -> Tensor:
    """Read a recording as mono at ``sampling_rate``.

    Args:
        source: path, bytes or open file, in wav, flac, ogg, mp3, aiff, au or caf; or samples, [N],
            [N, channels] or [channels, N] (the shorter axis counts as channels), floats in -1..1 or integers
            in the range of their type.
        sampling_rate: rate of the result, Hz.
        array_rate: rate of samples that come without one, Hz.
        max_seconds: longest recording that is read.
        allow_silent: whether a recording without any sound is fine.

    Returns:
        float32 samples in -1..1, [N]: the mean of all channels. Where the channels cancel each other, the
        loudest one alone, with a warning; where samples are louder than 1, all scaled down, with a warning.

    Raises:
        AudioError: with ``reason`` one of ``wrong_type``, ``bad_rate``, ``not_found``, ``unreadable``,
            ``unsupported``, ``empty``, ``truncated``, ``too_long``, ``not_finite``, ``out_of_range``,
            ``silent``.
    """
    recording = _open(source, array_rate, max_seconds)
    waveform, levels = _decode(recording, sampling_rate, max_seconds, channel=None)
    if levels.channels_cancel:
        logger.warning(
            "%s: the channels cancel each other (one is inverted); only the loudest is used", recording.name
        )
        waveform, levels = _decode(recording, sampling_rate, max_seconds, channel=levels.loudest)
    if levels.peak > _MAX_PEAK:
        raise _out_of_range(recording.name, levels.peak)
    if levels.peak > 1.0:
        logger.warning("%s: samples reach %.3g; scaled down to -1..1", recording.name, levels.peak)
        waveform = waveform / levels.peak
    if levels.peak < _SILENT_PEAK and not allow_silent:
        raise _silent(recording.name)
    return torch.from_numpy(waveform).clamp_(-1.0, 1.0)


class WaveformStream:
    """A recording that is still growing: pieces of sound in, pieces of its waveform out.

    Joined, they are what :func:`read_waveform` makes of the whole, but for what needs the whole: samples
    louder than 1 are clipped, not scaled down, and channels are mixed even if they cancel each other.

    Args:
        sampling_rate: rate of the waveform, Hz.
        max_seconds: longest recording.

    Attributes:
        num_samples: samples that came in, of each channel.
        peak: largest of their sizes.
    """

    def __init__(self, *, sampling_rate: int, max_seconds: float = DEFAULT_MAX_SECONDS) -> None:
        self.sampling_rate, self.max_seconds = sampling_rate, max_seconds
        self.num_samples, self.peak = 0, 0.0
        self._rate: int | None = None
        self._resampler: Any = None
        self._byte = b""  # half of a sample
        self._is_over = False

    @property
    def duration_s(self) -> float:
        """Length of what came in, seconds."""
        return self.num_samples / self._rate if self._rate else 0.0

    def append(self, samples: Samples | Tensor | bytes, *, sampling_rate: int) -> Tensor:
        """Take the next piece, and return the samples of the waveform that it makes final.

        Args:
            samples: floats in -1..1, or integers in the range of their type, [n] or [n, channels]; or bytes
                of 16-bit little-endian mono PCM, cut anywhere.
            sampling_rate: of the samples, Hz; the same for every piece.

        Returns:
            float32 samples in -1..1, mono, at the waveform's rate, [m]; a resampler lags behind.

        Raises:
            AudioError: with ``reason`` one of ``wrong_type``, ``bad_rate``, ``too_long``, ``not_finite``,
                ``out_of_range``, ``over``; the stream is then as it was before.
        """
        if self._is_over:
            raise AudioError("the recording is over; begin a new one", reason="over")
        rate = _checked_rate(sampling_rate)
        if self._rate not in (None, rate):
            raise AudioError(
                f"pieces of a recording share a sampling rate, it began at {self._rate} Hz, got {rate} Hz",
                reason="bad_rate",
            )
        held = b""
        if isinstance(samples, bytes | bytearray | memoryview):
            pcm = self._byte + bytes(samples)
            whole = len(pcm) // 2 * 2
            samples, held = np.frombuffer(pcm[:whole], dtype="<i2"), pcm[whole:]
        block = _piece(samples)  # [n, channels]
        peak = float(np.abs(block).max()) if len(block) else 0.0
        self._check(block, rate, peak)
        if peak > 1.0 >= self.peak:
            logger.warning("the recording reaches %.3g; clipped to -1..1", peak)
        self.num_samples, self.peak = self.num_samples + len(block), max(self.peak, peak)
        if self._rate is None and rate != self.sampling_rate:
            self._resampler = soxr.ResampleStream(rate, self.sampling_rate, 1, dtype="float32")
        self._rate, self._byte = rate, held
        return self._resampled(block.mean(axis=1, dtype=np.float32), last=False)

    def finish(self, *, allow_silent: bool = False) -> Tensor:
        """End the recording, and return the rest of its waveform, [m].

        Raises:
            AudioError: if nothing came in, or no sound (``empty``, ``silent``).
        """
        if self.num_samples == 0:
            raise AudioError("the recording is empty: no samples came", reason="empty")
        if self.peak < _SILENT_PEAK and not allow_silent:
            raise _silent("the recording")
        self._is_over = True
        return self._resampled(np.zeros(0, dtype=np.float32), last=True)

    def _check(self, block: Samples, rate: int, peak: float) -> None:
        if not np.isfinite(block).all():
            raise AudioError(
                f"the recording holds NaN or infinity after {self.duration_s:.1f} s; clean it first",
                reason="not_finite",
            )
        if peak > _MAX_PEAK:
            raise _out_of_range("the recording", peak)
        if self.num_samples + len(block) > self.max_seconds * rate:
            raise _too_long("the recording", (self.num_samples + len(block)) / rate, self.max_seconds)

    def _resampled(self, mix: Samples, *, last: bool) -> Tensor:
        if self._resampler is not None and (len(mix) or last):
            mix = self._resampler.resample_chunk(mix, last=last)
        return torch.from_numpy(mix).clamp_(-1.0, 1.0)


def write_wav(
    path: str | Path, audio: Samples | Tensor | Iterable[Samples | Tensor], *, sampling_rate: int
) -> None:
    """Write a mono 16-bit wav file.

    Args:
        path: the file.
        audio: samples in -1..1, [N], or chunks of them as they come.
        sampling_rate: rate of the samples, Hz.

    Raises:
        AudioError: if the file cannot be written or the samples are no finite floats [n].
    """
    with WavWriter(path, sampling_rate=sampling_rate) as wav:
        for chunk in [audio] if isinstance(audio, np.ndarray | Tensor) else audio:
            wav.write(chunk)


class WavWriter:
    """A mono 16-bit wav file that grows, playable after every chunk even if the program is stopped.

    Args:
        path: the file.
        sampling_rate: rate of the samples, Hz.

    Attributes:
        num_samples: samples written so far.

    Raises:
        AudioError: if the file cannot be written.
    """

    def __init__(self, path: str | Path, *, sampling_rate: int) -> None:
        self.num_samples = 0
        try:
            self._file = soundfile.SoundFile(
                path, "w", samplerate=sampling_rate, channels=1, format="WAV", subtype="PCM_16"
            )
        except (soundfile.LibsndfileError, OSError) as error:
            raise AudioError(f"{path} cannot be written: {error}", reason="not_writable") from error
        self._file.flush()

    def write(self, chunk: Samples | Tensor) -> None:
        """Append samples in -1..1, [n]; louder ones are clipped."""
        samples = chunk.detach().float().cpu().numpy() if isinstance(chunk, Tensor) else np.asarray(chunk)
        if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
            came = f"{samples.dtype} {list(samples.shape)}"
            raise AudioError(
                f"a wav file is written from floats of the shape [n], got {came}", reason="wrong_type"
            )
        if not np.isfinite(samples).all():
            raise AudioError("NaN or infinity cannot be written to a wav file", reason="not_finite")
        self._file.write(np.clip(samples, -1.0, 1.0))
        self._file.flush()  # also brings the header up to date
        self.num_samples += len(samples)

    def close(self) -> None:
        """Close the file; writing again after this is an error."""
        self._file.close()

    def __enter__(self) -> "WavWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


# --- what every kind of source is turned into ---


class _Forward(soundfile.SoundFile):  # type: ignore[misc]
    """A file read from front to back; soundfile's seek after each block fails where the length is unknown."""

    def seekable(self) -> bool:
        return False


class _Bytes(io.BytesIO):
    """Bytes as a file; libsndfile seeks before the start of broken ones, where a file would stay in place."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()


@dataclass(frozen=True)
class _Recording:
    """A source that can be decoded from its beginning, as often as needed."""

    name: str
    rate: int
    blocks: Callable[[], Iterator[Samples]]  # float32 [n, channels]


@dataclass
class _Levels:
    """How loud the channels and their mix are, over all blocks so far."""

    peak: float = 0.0
    mix_energy: float = 0.0
    energies: Samples = field(default_factory=lambda: np.zeros(1))

    def add(self, block: Samples, mix: Samples) -> None:
        self.peak = max(self.peak, float(np.abs(block).max()))
        self.mix_energy += float(np.square(mix, dtype=np.float64).sum())
        self.energies = self.energies + np.square(block, dtype=np.float64).sum(axis=0)

    @property
    def loudest(self) -> int:
        return int(self.energies.argmax())

    @property
    def channels_cancel(self) -> bool:
        audible = self.peak >= _SILENT_PEAK
        return audible and self.mix_energy < _CANCELLED_ENERGY * float(self.energies.max())


def _decode(
    recording: _Recording, sampling_rate: int, max_seconds: float, *, channel: int | None
) -> tuple[Samples, _Levels]:
    """Mix (or take one channel), measure and resample block by block."""
    levels, pieces, num_frames = _Levels(), [], 0
    same_rate = recording.rate == sampling_rate
    resampler = None if same_rate else soxr.ResampleStream(recording.rate, sampling_rate, 1, dtype="float32")
    for block in recording.blocks():
        start, num_frames = num_frames, num_frames + len(block)
        if num_frames > max_seconds * recording.rate:
            raise _too_long(recording.name, num_frames / recording.rate, max_seconds)
        if not np.isfinite(block).all():
            seconds = start / recording.rate
            raise AudioError(
                f"{recording.name} holds NaN or infinity after {seconds:.1f} s; clean it first",
                reason="not_finite",
            )
        mix = block.mean(axis=1, dtype=np.float32) if channel is None else block[:, channel].copy()
        levels.add(block, mix)
        pieces.append(mix if resampler is None else resampler.resample_chunk(mix))
    if num_frames == 0:
        raise AudioError(f"{recording.name} is empty: it holds no samples", reason="empty")
    if resampler is not None:
        pieces.append(resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
    return np.concatenate(pieces), levels


def _open(source: AudioSource, array_rate: int | None, max_seconds: float) -> _Recording:
    match source:
        case (np.ndarray() | Tensor() as samples, rate):
            return _open_array(samples, rate)
        case np.ndarray() | Tensor():
            if array_rate is None:
                raise AudioError(
                    "samples do not say their rate; pass (samples, rate) or array_rate=…", reason="bad_rate"
                )
            return _open_array(source, array_rate)
        case str() | Path():
            return _open_path(Path(source), max_seconds)
        case bytes():
            return _open_file(_Bytes(source), "the recording", max_seconds)
    if hasattr(source, "read") and hasattr(source, "seek"):
        return _open_file(source, str(getattr(source, "name", "the recording")), max_seconds)
    raise AudioError(
        f"a recording is a path, bytes, a binary file or (samples, rate), got {type(source).__name__}",
        reason="wrong_type",
    )


def _open_array(samples: Samples | Tensor, rate: Any) -> _Recording:
    if isinstance(samples, Tensor):
        samples = (samples.float() if samples.is_floating_point() else samples).detach().cpu().numpy()
    rate = _checked_rate(rate)
    channels_last = samples[:, None] if samples.ndim == 1 else samples
    if channels_last.ndim == 2 and 0 < channels_last.shape[0] < channels_last.shape[1]:
        channels_last = channels_last.T
    if channels_last.ndim != 2 or channels_last.shape[1] > _MAX_ARRAY_CHANNELS:
        raise AudioError(
            f"samples have the shape [N], [N, channels] or [channels, N], got {list(samples.shape)}",
            reason="wrong_type",
        )
    scaled = _to_unit_range(channels_last)
    return _Recording("the array", rate, lambda: _blocks_of_array(scaled))


def _checked_rate(rate: Any) -> int:
    if isinstance(rate, bool) or not isinstance(rate, int | np.integer) or not _MIN_RATE <= rate <= _MAX_RATE:
        raise AudioError(
            f"a sampling rate is a whole number from {_MIN_RATE} to {_MAX_RATE} Hz, got {rate!r}",
            reason="bad_rate",
        )
    return int(rate)


def _piece(samples: Any) -> Samples:
    """A piece of sound as floats, [n, channels]."""
    if isinstance(samples, Tensor):
        samples = (samples.float() if samples.is_floating_point() else samples).detach().cpu().numpy()
    if not isinstance(samples, np.ndarray):
        raise AudioError(
            f"a piece of sound is an array, a tensor or bytes of 16-bit PCM, got {type(samples).__name__}",
            reason="wrong_type",
        )
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and not 0 < samples.shape[1] <= _MAX_ARRAY_CHANNELS):
        raise AudioError(
            f"a piece of sound has the shape [n] or [n, channels], got {list(samples.shape)}",
            reason="wrong_type",
        )
    return _to_unit_range(samples[:, None] if samples.ndim == 1 else samples)


def _to_unit_range(samples: Samples) -> Samples:
    """Floats as they are; integers by the full scale of their type, unsigned ones around its middle."""
    if np.issubdtype(samples.dtype, np.floating):
        return samples.astype(np.float32)
    if not np.issubdtype(samples.dtype, np.integer):
        raise AudioError(f"samples are floats or integers, got {samples.dtype}", reason="wrong_type")
    full_scale = 2.0 ** (8 * samples.dtype.itemsize - 1)
    middle = full_scale if np.issubdtype(samples.dtype, np.unsignedinteger) else 0.0
    scaled: Samples = ((samples.astype(np.float64) - middle) / full_scale).astype(np.float32)
    return scaled


def _blocks_of_array(samples: Samples) -> Iterator[Samples]:
    size = max(1, _BLOCK_VALUES // max(1, samples.shape[1]))
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def _open_path(path: Path, max_seconds: float) -> _Recording:
    try:
        if not path.is_file():
            kind = "is a folder, not a recording" if path.is_dir() else "does not exist"
            raise AudioError(f"{_short(path)} {kind}; pass the path of an audio file", reason="not_found")
        with path.open("rb") as file:
            file.read(1)
    except (OSError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        raise AudioError(f"{_short(path)} cannot be opened: {error}", reason="not_found") from error
    return _open_file(path, str(path), max_seconds)


def _open_file(source: Any, name: str, max_seconds: float) -> _Recording:
    """Check what the header claims before anything is decoded."""
    start = None if isinstance(source, Path) else source.tell()
    head, num_bytes = _peek(source)
    if num_bytes == 0:
        raise AudioError(f"{name} is empty: it holds no bytes", reason="empty")
    try:
        with _Forward(source) as file:
            rate, num_frames, log = file.samplerate, file.frames, file.extra_info
            kind, encoding = file.format, file.subtype
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        if head.startswith(_MAGIC) and num_bytes < _SMALLEST_FILE:
            text = f"{name} is empty: it breaks off within its header"
            raise AudioError(text, reason="empty") from error
        raise AudioError(
            f"{name} is not audio that can be read: {error}; wav, flac, ogg, mp3 and aiff are among what can",
            reason="unreadable",
        ) from error
    if kind not in _CONTAINERS or encoding not in _ENCODINGS:
        raise AudioError(
            f"{name} is {encoding} in {kind}, which is not decoded; convert it to 16-bit wav or to flac",
            reason="unsupported",
        )
    claimed = None if num_frames >= _UNKNOWN_FRAMES else num_frames
    if claimed is not None and claimed > max_seconds * rate:
        raise _too_long(name, claimed / rate, max_seconds)
    torn = _TORN_CHUNK.search(log)
    if torn and claimed and int(torn[1]) < _UNKNOWN_BYTES:
        raise _truncated(name, f"{torn[2]} of {torn[1]} bytes of sound are there")
    # The length of an mp3 is an estimate where no header gives it.
    least = 0 if claimed is None else claimed - (claimed // 20 + rate // 4 if kind == "MP3" else 0)
    return _Recording(name, rate, lambda: _blocks_of_file(source, start, name, least))


def _blocks_of_file(source: Any, start: int | None, name: str, least: int) -> Iterator[Samples]:
    """Decode block by block, and compare with what the header promised at the end."""
    if start is not None:
        source.seek(start)
    num_frames = 0
    with _Forward(source) as file:
        size = max(1, _BLOCK_VALUES // file.channels)
        while True:
            try:
                block = file.read(size, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                raise _truncated(
                    name, f"decoding stops after {num_frames / file.samplerate:.1f} s: {error}"
                ) from error
            if len(block) == 0:
                break
            num_frames += len(block)
            yield block
        if num_frames < least:
            raise _truncated(name, f"{num_frames} of {file.frames} samples are there")


def _peek(source: Any) -> tuple[bytes, int]:
    """First bytes and size of a file; an open file is left where it was."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return file.read(4), source.stat().st_size
    start = source.tell()
    head = source.read(4)
    size = source.seek(0, io.SEEK_END) - start
    source.seek(start)
    return head, size


def _truncated(name: str, what: str) -> AudioError:
    return AudioError(f"{name} is truncated: {what}; copy or download it again", reason="truncated")


def _too_long(name: str, seconds: float, max_seconds: float) -> AudioError:
    return AudioError(
        f"{name} is at least {seconds:.0f} s long, at most {max_seconds:.0f} s are read; "
        "cut it, or raise max_seconds",
        reason="too_long",
    )


def _out_of_range(name: str, peak: float) -> AudioError:
    return AudioError(
        f"{name}: samples reach {peak:.3g}, expected -1..1; divide by their full scale", reason="out_of_range"
    )


def _silent(name: str) -> AudioError:
    return AudioError(
        f"{name} is silent: no sample above {_SILENT_PEAK}; check the microphone or the file", reason="silent"
    )


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:200]}…"
