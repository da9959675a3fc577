"""Log-mel features of a waveform, as Whisper sees sound.

Waveform [N] -> windows of features [M, F]. Only what was said is turned into features, unless the full window
is asked for; what is longer than one window becomes several. Knows nothing of files or encoders.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor

from omni_adapter.config import EncoderPadding
from omni_adapter.errors import AudioError, CheckpointError, ConfigError


class Features(NamedTuple):
    """Features of one window of a recording."""

    values: Tensor  # [M, F] float32
    length: int  # frames that cover the recording; the rest, if any, is silence up to the full window


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

    def windows(self, waveform: Tensor, *, padding: EncoderPadding = "true_length") -> list[Features]:
        """Turn a recording into features, all of it.

        Args:
            waveform: float samples in -1..1 at ``sampling_rate``, [N].
            padding: ``true_length`` for the frames that cover the recording; ``window`` for as many as a full
                window has, the rest silence, as Whisper was trained; ``whole_window`` and ``mini_omni``
                likewise, with other counts of frames. Their common frames are the same.

        Returns:
            One entry for each window of ``window_samples``, in order; the last may be shorter.

        Raises:
            AudioError: if the waveform is not one float channel, or is empty.
        """
        if waveform.dim() != 1 or not waveform.is_floating_point():
            came = f"{waveform.dtype} {list(waveform.shape)}"
            raise AudioError(f"features are made of float samples [N], got {came}", reason="wrong_type")
        if waveform.numel() == 0:
            raise AudioError("there is nothing to hear: the waveform has no samples", reason="empty")
        return [self._extract(part, padding) for part in torch.split(waveform, self.window_samples)]

    def _extract(self, waveform: Tensor, padding: EncoderPadding) -> Features:
        (length,) = self.num_frames(len(waveform), padding=padding)
        # Silence up to where the last frame's Fourier transform ends: the same frames as in a full window.
        num_samples = length * self.hop_length + int(self._extractor.n_fft)
        if padding != "true_length" or num_samples > self.window_samples:
            num_samples = self.window_samples
        silence = num_samples - len(waveform)
        values = self._extractor(
            torch.nn.functional.pad(waveform.detach().float().cpu(), (0, silence)).numpy(),
            sampling_rate=self.sampling_rate,
            padding="do_not_pad",
            truncation=False,
            return_tensors="pt",
        ).input_features[0]
        return Features(values[:, :length].contiguous() if padding == "true_length" else values, length)
