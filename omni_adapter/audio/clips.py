"""Recordings of a batch as the audio encoder wants them: windows of features, and whose they are.

Features in, one padded tensor out. Knows nothing of encoders or LMs.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from omni_adapter.audio.features import Features


class Frames(NamedTuple):
    """What an audio encoder made of a whole recording, earlier."""

    values: Tensor  # [A', E]
    encoder: str  # mark of the encoder, see ``encoder_mark``


Recording = Sequence[Features] | Frames
"""A recording on its way to the model: windows to encode, or frames that were encoded before."""


def encoder_mark(fingerprint: Mapping[str, Any], *, padding: str, block_seconds: float | None = None) -> str:
    """Return what tells frames of one encoder, used in one way, from those of any other.

    Args:
        fingerprint: of the encoder.
        padding: as in ``OmniConfig.encoder_padding``.
        block_seconds: as in ``OmniConfig.encoder_block_seconds``.
    """
    facts: dict[str, Any] = {"encoder": dict(fingerprint), "padding": padding}
    if block_seconds is not None:
        facts["block_seconds"] = block_seconds
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Clips:
    """Features of several recordings; long ones take several windows.

    Attributes:
        features: [W, M, F], zero after each window's length.
        lengths: true feature frames of each window, int64 [W].
        windows: number of windows of each recording, in order; they sum to W.
        frames: for each recording its frames [A', E] where they were encoded before, else None; empty if none
            was.
    """

    features: Tensor
    lengths: Tensor
    windows: tuple[int, ...]
    frames: tuple[Tensor | None, ...] = ()

    @classmethod
    def of(cls, recordings: Sequence[Recording]) -> Self:
        """Pad and join the windows of several recordings."""
        cached = tuple(r.values if isinstance(r, Frames) else None for r in recordings)
        to_encode = [() if isinstance(recording, Frames) else recording for recording in recordings]
        windows = [window for recording in to_encode for window in recording]
        longest = max((window.values.shape[-1] for window in windows), default=0)
        padded = [torch.nn.functional.pad(w.values, (0, longest - w.values.shape[-1])) for w in windows]
        features = torch.stack(padded) if padded else torch.empty(0, 0, 0)
        lengths = torch.tensor([window.length for window in windows], dtype=torch.long)
        frames = cached if any(values is not None for values in cached) else ()
        return cls(features, lengths, tuple(len(recording) for recording in to_encode), frames)

    def to(self, device: torch.device | str) -> Self:
        """Return the same clips on ``device``."""
        frames = tuple(None if values is None else values.to(device) for values in self.frames)
        return type(self)(self.features.to(device), self.lengths.to(device), self.windows, frames)
