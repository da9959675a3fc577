"""Log-mel features of a waveform, as Whisper sees sound.

Waveform [N] -> windows of features [M, F], whole or as it comes. Only what was said is turned into features,
unless the full window is asked for; what is longer than one window becomes several. Knows nothing of files or
encoders.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor

from omni_adapter.config import EncoderPadding
from omni_adapter.errors import AudioError, CheckpointError, ConfigError

_LEAST_POWER = 1e-10  # what Whisper takes for silence
_RANGE = (
    8.0  # of the logarithms to base 10 of power, 80 dB: what is weaker than the loudest by more is raised
)


class Features(NamedTuple):
    """Features of one window of a recording."""

    values: Tensor  # [M, F] float32
    length: int  # frames that cover the recording; the rest, if any, is silence up to the full window


class NewFeatures(NamedTuple):
    """Features of a recording that is still growing, which nothing that follows can change."""

    values: Tensor  # [M, F] float32, may be empty
    length: int  # as in ``Features``
    ends_window: bool  # the next ones belong to the next window


@dataclass
class LogMelState:
    """What must be remembered of a recording that is still growing; owned by the caller.

    Attributes:
        block_frames: see :meth:`LogMel.windows`.
        samples: the window that is growing, silent after ``num_samples``, [window_samples]; made when needed.
        num_samples: samples of that window so far.
        num_frames: its frames whose spectrum is known.
        spectra: logarithms of those that were not given out yet, [M, n] each.
        num_given: frames of the window that were given out.
        loudest: largest logarithm among those, None if there are none.
    """

    block_frames: int | None = None
    samples: Tensor | None = None
    num_samples: int = 0
    num_frames: int = 0
    spectra: list[Tensor] = field(default_factory=list)
    num_given: int = 0
    loudest: Tensor | None = None


class LogMel:
    """Log-mel features with the arithmetic of transformers' ``WhisperFeatureExtractor``.

    Args:
        num_mel_bins: mel bins M.
        sampling_rate: rate of the waveforms, Hz.
        n_fft: samples of one Fourier transform.
        hop_length: samples from one feature frame to the next.
        window_seconds: longest stretch that becomes one window.

    Raises:
        ConfigError: if a window is not a whole number of feature frames.
    """

    def __init__(
        self,
        num_mel_bins: int = 80,
        *,
        sampling_rate: int = 16_000,
        n_fft: int = 400,
        hop_length: int = 160,
        window_seconds: float = 30,
    ) -> None:
        seconds = int(window_seconds) if float(window_seconds).is_integer() else window_seconds
        extractor = WhisperFeatureExtractor(  # type: ignore[no-untyped-call]
            feature_size=num_mel_bins,
            sampling_rate=sampling_rate,
            n_fft=n_fft,
            hop_length=hop_length,
            chunk_length=seconds,
        )
        self._wrap(extractor)

    def _wrap(self, extractor: Any) -> None:
        self._extractor = extractor
        self.num_mel_bins = int(extractor.feature_size)
        self.sampling_rate = int(extractor.sampling_rate)
        self.hop_length = int(extractor.hop_length)
        self._n_fft = int(extractor.n_fft)
        self._mel_filters = torch.from_numpy(extractor.mel_filters).float()  # [frequencies, M]
        self.window_samples = round(extractor.chunk_length * extractor.sampling_rate)
        self.window_frames = self.window_samples // self.hop_length
        if self.window_frames * self.hop_length != self.window_samples or self.window_frames == 0:
            raise ConfigError(
                f"a window must be a whole number of feature frames of {self.hop_length} samples, "
                f"got {self.window_samples} samples"
            )

    @classmethod
    def from_extractor(cls, extractor: WhisperFeatureExtractor) -> "LogMel":
        """Take over the settings of a feature extractor of transformers."""
        log_mel = cls.__new__(cls)
        log_mel._wrap(extractor)
        return log_mel

    @classmethod
    def from_pretrained(cls, id_or_folder: str | Path, **hub_options: Any) -> "LogMel":
        """Read ``preprocessor_config.json`` of a folder or a repository of the Hub.

        Args:
            id_or_folder: folder or Hub id.
            hub_options: revision, token, cache_dir and local_files_only, as transformers takes them.

        Raises:
            CheckpointError: if there is none or its settings are unusable.
        """
        try:
            extractor = WhisperFeatureExtractor.from_pretrained(str(id_or_folder), **hub_options)
            return cls.from_extractor(extractor)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{id_or_folder} has no usable preprocessor_config.json of Whisper: {error}"
            ) from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``preprocessor_config.json``; :meth:`from_pretrained` reads it."""
        self._extractor.save_pretrained(str(folder))

    @property
    def frame_rate_hz(self) -> float:
        """Feature frames a second."""
        return self.sampling_rate / self.hop_length

    def num_frames(self, num_samples: int, *, padding: EncoderPadding = "true_length") -> list[int]:
        """Return the feature frames of each window of a recording of ``num_samples``.

        The silence that fills up the last window counts only with ``whole_window``.
        """
        full_windows, rest = divmod(num_samples, self.window_samples)
        if padding == "mini_omni":  # the frame that begins where the recording ends is counted as well
            frames = min(rest // self.hop_length + 1, self.window_frames)
        elif padding == "whole_window":
            frames = self.window_frames
        else:
            frames = -(-rest // self.hop_length)
        return [self.window_frames] * full_windows + ([frames] if rest else [])

    def windows(
        self, waveform: Tensor, *, padding: EncoderPadding = "true_length", block_frames: int | None = None
    ) -> list[Features]:
        """Turn a recording into features, all of it.

        Args:
            waveform: float samples in -1..1 at ``sampling_rate``, [N].
            padding: ``true_length`` for the frames that cover the recording; ``window`` for as many as a full
                window has, the rest silence, as Whisper was trained; ``whole_window`` and ``mini_omni``
                likewise, with other counts of frames. Their common frames are the same.
            block_frames: what is 80 dB below the loudest frame, and less, counts as that. None looks for the
                loudest in the whole window, as Whisper does. With a number, blocks of so many frames are
                heard one after the other, and the loudest is that of all frames up to the one that follows
                the block, so that no later sound changes it; only with ``true_length``.

        Returns:
            One entry for each window of ``window_samples``, in order; the last may be shorter.

        Raises:
            AudioError: if the waveform is not one float channel, or is empty.
        """
        self._check(waveform)
        if waveform.numel() == 0:
            raise AudioError("there is nothing to hear: the waveform has no samples", reason="empty")
        windows = torch.split(waveform, self.window_samples)
        if block_frames is None:
            return [self._extract(part, padding) for part in windows]
        return [self._extract_blocks(part, padding, block_frames) for part in windows]

    def append(
        self,
        waveform: Tensor,
        state: LogMelState,
        *,
        padding: EncoderPadding = "true_length",
        last: bool = False,
    ) -> list[NewFeatures]:
        """Turn the next samples of a recording into features: :meth:`windows` for sound that still grows.

        A frame's spectrum is computed as soon as the samples under its Fourier transform are there. It is
        given out when the loudest frame that it is compared with is known: without ``state.block_frames``
        that is at the window's end, otherwise when its block and one frame more are there. What comes is what
        :meth:`windows` makes of the whole, to the rounding of floats.

        Args:
            waveform: the next samples, [n], any number of them.
            state: of the recording; changed in place.
            padding: as for :meth:`windows`.
            last: nothing follows; the last window is ended.

        Raises:
            AudioError: if the waveform is not one float channel.
        """
        self._check(waveform)
        found = []
        waveform = waveform.detach().float().cpu()
        while waveform.numel():
            room = self.window_samples - state.num_samples
            part, waveform = waveform[:room], waveform[room:]
            self._fill(state, part)
            is_full = state.num_samples == self.window_samples
            found.append(self._take(state, padding, ends=is_full))
        if last and state.num_samples:
            found.append(self._take(state, padding, ends=True))
        return [new for new in found if new.ends_window or new.length]

    def _check(self, waveform: Tensor) -> None:
        if waveform.dim() != 1 or not waveform.is_floating_point():
            came = f"{waveform.dtype} {list(waveform.shape)}"
            raise AudioError(f"features are made of float samples [N], got {came}", reason="wrong_type")

    def _extract(self, waveform: Tensor, padding: EncoderPadding) -> Features:
        length, num_samples = self._extent(len(waveform), padding)
        silence = num_samples - len(waveform)
        values = self._extractor(
            torch.nn.functional.pad(waveform.detach().float().cpu(), (0, silence)).numpy(),
            sampling_rate=self.sampling_rate,
            padding="do_not_pad",
            truncation=False,
            return_tensors="pt",
        ).input_features[0]
        return Features(values[:, :length].contiguous() if padding == "true_length" else values, length)

    def _extract_blocks(self, waveform: Tensor, padding: EncoderPadding, block_frames: int) -> Features:
        if padding != "true_length":
            raise ConfigError(f'features in blocks go with padding="true_length", got {padding!r}')
        length, num_samples = self._extent(len(waveform), padding)
        samples = torch.nn.functional.pad(waveform.detach().float().cpu(), (0, num_samples - len(waveform)))
        spectra = self._log_spectra(samples, 0, length)
        return Features(_normalised(spectra, _loudest_heard(spectra, block_frames)), length)

    def _extent(self, num_samples: int, padding: EncoderPadding) -> tuple[int, int]:
        """Frames of one window with ``num_samples``, and samples with the silence that they look at."""
        (length,) = self.num_frames(num_samples, padding=padding)
        # Silence up to where the last frame's Fourier transform ends: the same frames as in a full window.
        reach = length * self.hop_length + self._n_fft
        if padding != "true_length" or reach > self.window_samples:
            reach = self.window_samples
        return length, reach

    def _fill(self, state: LogMelState, samples: Tensor) -> None:
        """Add samples that the window has room for, and the spectra that they complete."""
        if state.samples is None:
            state.samples = torch.zeros(self.window_samples)
        end = state.num_samples + len(samples)
        state.samples[state.num_samples : end] = samples
        state.num_samples = end
        half = self._n_fft // 2  # a frame looks so far to both sides, and the first sees itself mirrored
        ready = (end - half) // self.hop_length + 1 if end > half else 0
        self._add_spectra(state, state.samples[:end], min(ready, self.window_frames))

    def _add_spectra(self, state: LogMelState, samples: Tensor, num_frames: int) -> None:
        if num_frames > state.num_frames:
            state.spectra.append(self._log_spectra(samples, state.num_frames, num_frames))
            state.num_frames = num_frames

    def _take(self, state: LogMelState, padding: EncoderPadding, *, ends: bool) -> NewFeatures:
        """Give out the features that can no longer change; if the window ends, all that it still has."""
        assert state.samples is not None
        if ends:
            length, num_samples = self._extent(state.num_samples, padding)
            # In one piece the frames of the silence that follows are compared with as well, as in Whisper.
            frames = num_samples // self.hop_length if state.block_frames is None else length
            self._add_spectra(state, state.samples[:num_samples], frames)
        else:
            length = _final_frames(state)
        new = self._take_blocks(state, length) if state.block_frames else self._take_window(state, length)
        if not ends:
            return new
        values = new.values[:, :length] if padding == "true_length" else new.values
        vars(state).update(vars(LogMelState(state.block_frames)))
        return NewFeatures(values.contiguous(), new.length, True)

    def _take_window(self, state: LogMelState, length: int) -> NewFeatures:
        """Give out a whole window, once it has a length."""
        if not length:
            return NewFeatures(torch.empty(self.num_mel_bins, 0), 0, False)
        spectra = torch.cat(state.spectra, dim=1)
        return NewFeatures(_normalised(spectra, spectra.max()), length, False)

    def _take_blocks(self, state: LogMelState, length: int) -> NewFeatures:
        """Give out the frames before ``length``, each compared with what came up to its block's end."""
        assert state.block_frames is not None
        given, count = state.num_given, length - state.num_given
        if not count:
            return NewFeatures(torch.empty(self.num_mel_bins, 0), 0, False)
        spectra = torch.cat(state.spectra, dim=1)
        new, state.spectra = spectra[:, :count], [spectra[:, count:]]
        loudest = _loudest_heard(new, state.block_frames, first=given, before=state.loudest)
        state.num_given, state.loudest = length, loudest[-1]
        return NewFeatures(_normalised(new, loudest), count, False)

    def _log_spectra(self, samples: Tensor, first: int, end: int) -> Tensor:
        """Logarithms of the mel spectra of frames ``first`` to ``end`` of a window [N], [M, end - first].

        The arithmetic of transformers' feature extractor: frames are centred, both ends are mirrored.
        """
        half = self._n_fft // 2
        start, stop = first * self.hop_length - half, (end - 1) * self.hop_length + half
        before, after = max(0, -start), max(0, stop - len(samples))
        left, right = samples[1 : before + 1], samples[len(samples) - 1 - after : len(samples) - 1]
        heard = torch.cat((left.flip(0), samples[max(0, start) : stop], right.flip(0)))
        spectra = torch.stft(
            heard,
            self._n_fft,
            self.hop_length,
            window=torch.hann_window(self._n_fft),
            center=False,
            return_complex=True,
        )
        mel = self._mel_filters.T @ spectra.abs().square()
        return mel.clamp(min=_LEAST_POWER).log10()


def _final_frames(state: LogMelState) -> int:
    """Frames of the growing window that nothing can change: whole blocks and one frame after them."""
    if state.block_frames is None or not state.num_frames:
        return 0
    blocks = (state.num_frames - 1) // state.block_frames
    return blocks * state.block_frames + 1 if blocks else 0


def _loudest_heard(
    spectra: Tensor, block_frames: int, *, first: int = 0, before: Tensor | None = None
) -> Tensor:
    """Return what each frame is compared with: the loudest up to the frame after its block, [F].

    The frame after a block counts as the block's last, since a convolution over the block sees it.

    Args:
        spectra: logarithms of frames ``first`` and on, up to the end of a block or of the window, [M, F].
        block_frames: frames of a block.
        first: number of the first frame.
        before: the loudest of the frames before.
    """
    loudest = spectra.amax(dim=0).cummax(dim=0).values  # [F]
    if before is not None:
        loudest = loudest.maximum(before)
    frames = torch.arange(first, first + spectra.shape[1])
    ends = ((frames - 1).clamp(min=0) // block_frames + 1) * block_frames
    return loudest[(ends - first).clamp(max=len(loudest) - 1)]


def _normalised(spectra: Tensor, loudest: Tensor) -> Tensor:
    """Features of logarithms [M, F]: what is 80 dB below ``loudest`` is raised to that, then scaled."""
    return (spectra.maximum(loudest - _RANGE) + 4.0) / 4.0
