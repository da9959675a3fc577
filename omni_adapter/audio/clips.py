"""Recordings of a batch as the audio encoder wants them: windows of features, and whose they are.

Features in, one padded tensor out. Knows nothing of encoders or LMs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from omni_adapter.audio.features import Features


@dataclass(frozen=True)
class Clips:
    """Features of several recordings; long ones take several windows.

    Attributes:
        features: [W, M, F], zero after each window's length.
        lengths: true feature frames of each window, int64 [W].
        windows: number of windows of each recording, in order; they sum to W.
    """

    features: Tensor
    lengths: Tensor
    windows: tuple[int, ...]

    @classmethod
    def of(cls, recordings: Sequence[Sequence[Features]]) -> Self:
        """Pad and join the windows of several recordings."""
        windows = [window for recording in recordings for window in recording]
        longest = max(window.values.shape[-1] for window in windows)
        features = torch.stack(
            [torch.nn.functional.pad(w.values, (0, longest - w.values.shape[-1])) for w in windows]
        )
        lengths = torch.tensor([window.length for window in windows])
        return cls(features, lengths, tuple(len(recording) for recording in recordings))

    def to(self, device: torch.device | str) -> Self:
        """Return the same clips on ``device``."""
        return type(self)(self.features.to(device), self.lengths.to(device), self.windows)
