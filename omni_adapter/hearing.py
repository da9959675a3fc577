"""Hear a recording while it is being spoken.

Samples [n] in as they come; embeddings [A, D] that nothing to come can change out. Joined, they are what the
model makes of the whole recording, to the rounding of floats. Knows nothing of prompts, nor where sound is
from.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_adapter.audio.features import LogMel, LogMelState, NewFeatures
from omni_adapter.errors import AudioError, ConfigError
from omni_adapter.model import OmniModel
from omni_adapter.modules.audio_encoder import EncodedAudio, EncoderState


@dataclass(frozen=True)
class Blocks:
    """How a model that attends to whole windows hears in blocks all the same.

    Attributes:
        seconds: length of a block.
        lookahead_seconds: sound after a block that it waits for and attends to; it is computed twice.
    """

    seconds: float = 0.5
    lookahead_seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.lookahead_seconds < 0:
            raise ConfigError(
                "a block must be longer than 0 s and look ahead 0 s or more, "
                f"got {self.seconds:g} s and {self.lookahead_seconds:g} s"
            )


class Hearing:
    """One recording that is being heard.

    In blocks, each block of samples is encoded once it is there: features, encoder and audio adapter run on
    it, and on nothing before it again. Without blocks the encoder attends to a whole window, so that it has
    to wait for the window's end; spectra are computed as the samples come all the same.

    Args:
        model: the model that hears.
        log_mel: features of its encoder.
        blocks: how to hear in blocks; None takes the model's own way, which is blocks only if it was trained
            with ``encoder_block_seconds``. A model trained without hears only roughly so in blocks;
            :func:`measure_hearing_error` says how roughly.

    Raises:
        ConfigError: if the model was trained with blocks of its own, or hears the silence of a full window.
    """

    def __init__(self, model: OmniModel, log_mel: LogMel, *, blocks: Blocks | None = None) -> None:
        self.model, self.log_mel = model, log_mel
        self._padding, trained = model.config.encoder_padding, model.config.encoder_block_seconds
        if blocks is not None and trained is not None:
            raise ConfigError(f"this talker hears in blocks of {trained:g} s and in no others")
        if blocks is not None and self._padding != "true_length":
            raise ConfigError(
                f"this talker hears with encoder_padding={self._padding!r}, which needs the recording's end; "
                "only true_length can be heard in blocks"
            )
        encoder = model.audio_encoder
        self._block_steps = encoder.block_steps(trained if blocks is None else blocks.seconds)
        self._lookahead_steps = (encoder.block_steps(blocks.lookahead_seconds or None) if blocks else 0) or 0
        # Blocks are heard when features and those after them are there, so both come in whole groups.
        group = self._block_steps and math.gcd(self._block_steps, self._lookahead_steps)
        self._features = LogMelState(group and group * encoder.stride)
        self._encoder = EncoderState()
        self._frames: list[Tensor] = []
        self._unstacked = torch.empty(0, model.audio_encoder.width)  # frames that do not fill an LM step yet

    @property
    def frames(self) -> Tensor:
        """Encoder frames so far, [A', E]."""
        return torch.cat(self._frames) if self._frames else self._unstacked[:0]

    def append(self, waveform: Tensor) -> Tensor:
        """Hear the next samples, [n] at the encoder's rate; return new embeddings, [A, D], maybe none."""
        return self._hear(waveform, last=False)

    def finish(self, waveform: Tensor | None = None) -> Tensor:
        """Hear the last samples, and return the rest of the embeddings, [A, D].

        Raises:
            AudioError: if there was nothing to hear.
        """
        rest = self._hear(torch.empty(0) if waveform is None else waveform, last=True)
        if not self._frames:
            raise AudioError("there is nothing to hear: the recording has no samples", reason="empty")
        return rest

    @torch.no_grad()
    def _hear(self, waveform: Tensor, *, last: bool) -> Tensor:
        new = self.log_mel.append(waveform, self._features, padding=self._padding, last=last)
        made = [self._encode(features) for features in new]
        self._frames += [frames for frames in made if len(frames)]
        adapter = self.model.audio_adapter
        weight = self.model.code_embedding.weight
        waiting = [frames.to(device=weight.device, dtype=weight.dtype) for frames in (self._unstacked, *made)]
        frames = torch.cat(waiting)
        count = len(frames) if last else len(frames) // adapter.stack * adapter.stack
        self._unstacked = frames[count:]
        if not count:
            return weight.new_zeros(0, self.model.config.width)
        embeddings: Tensor = adapter(frames[None, :count])[0]
        return embeddings

    def _encode(self, new: NewFeatures) -> Tensor:
        """Frames [s, E] that new features complete."""
        encoder = self.model.audio_encoder
        if self._block_steps is None:
            device = next(encoder.parameters()).device
            lengths = torch.tensor([new.length], device=device)
            encoded: EncodedAudio = encoder(new.values[None].to(device), lengths, padding=self._padding)
            return encoded.frames[0]
        frames = encoder.append(
            new.values,
            self._encoder,
            block_steps=self._block_steps,
            lookahead_steps=self._lookahead_steps,
            last=new.ends_window,
        )
        if new.ends_window:
            self._encoder = EncoderState()
        return frames


@dataclass(frozen=True)
class HearingError:
    """How far hearing in blocks is from hearing whole windows, as root mean squares of differences.

    Attributes:
        seconds: length of what was heard.
        frames: of the encoder's frames, relative to theirs.
        embeddings: of what the LM is fed, relative to that.
        worst_embedding: of the LM step that differs most, likewise.
    """

    seconds: float
    frames: float
    embeddings: float
    worst_embedding: float


def measure_hearing_error(
    model: OmniModel, log_mel: LogMel, *, waveforms: Sequence[Tensor], blocks: Blocks
) -> HearingError:
    """Measure how a model that attends to whole windows hears in blocks.

    Args:
        model: the model that hears.
        log_mel: features of its encoder.
        waveforms: recordings at the encoder's rate, [N] each; at least one.
        blocks: how it hears in them.

    Returns:
        Errors over all recordings.

    Raises:
        ConfigError: as for :class:`Hearing`.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    frames: list[tuple[Tensor, Tensor]] = []
    for waveform in waveforms:
        ways = [Hearing(model, log_mel), Hearing(model, log_mel, blocks=blocks)]
        exact, rough = (way.finish(waveform).cpu().double() for way in ways)
        pairs.append((exact, rough))
        frames.append((ways[0].frames.cpu().double(), ways[1].frames.cpu().double()))
    whole, heard = (torch.cat(side) for side in zip(*pairs, strict=True))
    scale = whole.square().mean().sqrt()
    steps = (heard - whole).square().mean(dim=1).sqrt()
    return HearingError(
        sum(len(waveform) for waveform in waveforms) / log_mel.sampling_rate,
        frames=_relative(*(torch.cat(side) for side in zip(*frames, strict=True))),
        embeddings=_relative(whole, heard),
        worst_embedding=float(steps.max() / scale),
    )


def _relative(expected: Tensor, got: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())
