"""Choose the next ids: settings, masks and draws.

Logits in, ids out: [R, V] -> [R], and for code rows [B, K, V] -> [B, K] under the delay automaton. Knows
nothing of models, prompts or codecs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from omni_adapter.config import CodeRule
from omni_adapter.errors import ConfigError
from omni_adapter.vocab import CodeVocabulary

_UNKNOWN = -1  # number of frames of an answer whose end has not been decided


@dataclass(frozen=True)
class SamplingSettings:
    """How ids are drawn; the names and meanings are those of ``transformers.GenerationConfig``.

    Attributes:
        do_sample: draw; otherwise take the most likely id.
        temperature: divides the logits; 0 takes the most likely id.
        top_k: only that many most likely ids; 0 for all.
        top_p: only the most likely ids whose probabilities sum to this.
        repetition_penalty: divides (or multiplies, below zero) logits of ids that came before; 1 for none.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, legal, expected in (
            ("temperature", self.temperature >= 0, ">= 0"),
            ("top_k", self.top_k >= 0, ">= 0, 0 for all"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "> 0, 1 for none"),
        ):
            if not legal:
                raise ConfigError(f"{name} must be {expected}, got {getattr(self, name)}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely id is taken."""
        return not self.do_sample or self.temperature == 0


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make ids that came before less likely (Keskar et al. 2019, equation 3).

    Args:
        logits: [..., V].
        seen: bool [..., V], true for ids that came before.
        penalty: above 1 to avoid them.
    """
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalised, logits)


def sample(logits: Tensor, settings: SamplingSettings, *, uniform: Tensor | None = None) -> Tensor:
    """Return one id per row, int64 [R].

    Args:
        logits: [R, V]; illegal ids at minus infinity.
        settings: how to draw.
        uniform: numbers in [0, 1), one per row, that decide the draw; needed unless ``settings.is_greedy``.
            Drawing them outside keeps a conversation's draws the same alone and in a batch.
    """
    if settings.is_greedy:
        return logits.argmax(dim=-1)
    assert uniform is not None
    scores, ids = (logits.float() / settings.temperature).sort(dim=-1, descending=True, stable=True)
    if settings.top_k:
        scores[:, settings.top_k :] = -torch.inf
    probabilities = scores.softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    # The id that crosses top_p is kept: what is dropped lies wholly beyond it.
    probabilities = probabilities.masked_fill(cumulative - probabilities >= settings.top_p, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    target = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True)  # [R, 1]
    last_possible = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    return ids.gather(-1, drawn.minimum(last_possible))[:, 0]


class CodeRows(Protocol):
    """What the code rows of a batch may write, step by step, and when they are done."""

    ends_text: ClassVar[bool]  # whether the text is over too once the code rows are

    @property
    def finished(self) -> Tensor:
        """Whether every row has ended, bool [B]."""

    @property
    def cut(self) -> Tensor:
        """Whether speech was ended because the steps ran out, bool [B]."""

    def mask(self, logits: Tensor) -> Tensor:
        """Return logits [B, K, V] with ids that may not be drawn at minus infinity."""

    def advance(self, drawn: Tensor) -> Tensor:
        """Return the ids of this step, [B, K], for ids drawn under ``mask``, and count the step."""

    def keep(self, indices: Tensor) -> None:
        """Keep the conversations ``indices``, [n]."""

    def join(self, other: Self) -> None:
        """Put the conversations of ``other`` behind these."""


class FreeRows:
    """Lets every code row write what it will; the end mark of the last row ends the reply, text and all.

    This is how Mini-Omni decodes: nothing is masked, and what is drawn is what the model reads next.

    Args:
        vocabulary: ids of the code rows.
        delays: steps by which each row lags behind the text, length K.
        max_steps: steps at most, [B].
        device: where the state lives.
    """

    ends_text: ClassVar[bool] = True

    def __init__(
        self, vocabulary: CodeVocabulary, *, delays: Sequence[int], max_steps: Tensor, device: torch.device
    ) -> None:
        self.vocabulary = vocabulary
        self.last_row = max(range(len(delays)), key=lambda row: delays[row])
        self.finished = torch.zeros_like(max_steps, dtype=torch.bool, device=device)  # [B]

    @property
    def cut(self) -> Tensor:
        """Whether speech was ended because the steps ran out: never, bool [B]."""
        return torch.zeros_like(self.finished)

    def mask(self, logits: Tensor) -> Tensor:
        """Return the logits as they are."""
        return logits

    def advance(self, drawn: Tensor) -> Tensor:
        """Return the ids drawn, [B, K]; pad for conversations that have ended."""
        ids = torch.where(self.finished[:, None], self.vocabulary.pad, drawn)
        self.finished = self.finished | (ids[:, self.last_row] == self.vocabulary.end)
        return ids

    def keep(self, indices: Tensor) -> None:
        """Keep the conversations ``indices``, [n]."""
        self.finished = self.finished[indices]

    def join(self, other: Self) -> None:
        """Put the conversations of ``other`` behind these."""
        self.finished = torch.cat((self.finished, other.finished))


class CodeAutomaton:
    """Knows for every code row and step whether pad, code or end is legal; samples nothing else.

    The row with the least delay decides where speech ends. From then on every row is determined: codes up to
    the last frame, one end mark, then pad. All conversations of a batch count their own steps.

    Args:
        vocabulary: ids of the code rows.
        delays: steps by which each row lags behind the text, length K.
        max_steps: steps at most, [B]; speech is ended early enough for every row to finish.
        device: where the state lives.
    """

    ends_text: ClassVar[bool] = False

    def __init__(
        self, vocabulary: CodeVocabulary, *, delays: Sequence[int], max_steps: Tensor, device: torch.device
    ) -> None:
        self.vocabulary = vocabulary
        self.delays = torch.tensor(delays, device=device)  # [K]
        self.lead_row = int(self.delays.argmin())
        self.lead_delay, self.last_delay = min(delays), max(delays)
        self.max_frames = max_steps.to(device) - 1 - self.last_delay  # [B]
        self.step = torch.zeros_like(self.max_frames)  # [B]
        self.frames = torch.full_like(self.max_frames, _UNKNOWN)  # [B]

    @staticmethod
    def least_steps(delays: Sequence[int]) -> int:
        """Return the least number of steps in which every row can end."""
        return max(delays) + 1

    @property
    def finished(self) -> Tensor:
        """Whether every row has ended, bool [B]."""
        return (self.frames != _UNKNOWN) & (self.step > self.frames + self.last_delay)

    @property
    def cut(self) -> Tensor:
        """Whether speech was ended because the steps ran out, bool [B]."""
        return self.frames == self.max_frames

    def mask(self, logits: Tensor) -> Tensor:
        """Return logits [B, K, V] with all marks at minus infinity, but for the end in the leading row."""
        masked = logits.clone()
        masked[..., self.vocabulary.codebook_size :] = -torch.inf
        row, end = self.lead_row, self.vocabulary.end
        masked[:, row, end] = logits[:, row, end]
        return masked

    def advance(self, drawn: Tensor) -> Tensor:
        """Return the legal ids of this step, [B, K], for ids drawn under ``mask``, and count the step."""
        step, vocabulary = self.step[:, None], self.vocabulary
        ends_now = (drawn[:, self.lead_row] == vocabulary.end) | (
            self.step - self.lead_delay >= self.max_frames
        )
        ends_now &= (self.frames == _UNKNOWN) & (self.step >= self.lead_delay)
        self.frames = torch.where(ends_now, self.step - self.lead_delay, self.frames)
        known = (self.frames != _UNKNOWN)[:, None]
        end_step = self.frames[:, None] + self.delays  # [B, K]
        ids = torch.where(known & (step == end_step), vocabulary.end, drawn)
        ids = torch.where((step < self.delays) | (known & (step > end_step)), vocabulary.pad, ids)
        self.step = self.step + 1
        return ids

    def keep(self, indices: Tensor) -> None:
        """Keep the conversations ``indices``, [n]."""
        self.max_frames, self.step = self.max_frames[indices], self.step[indices]
        self.frames = self.frames[indices]

    def join(self, other: Self) -> None:
        """Put the conversations of ``other`` behind these."""
        self.max_frames = torch.cat((self.max_frames, other.max_frames))
        self.step = torch.cat((self.step, other.step))
        self.frames = torch.cat((self.frames, other.frames))


CODE_ROWS: Mapping[CodeRule, type[CodeAutomaton] | type[FreeRows]] = {
    "delayed": CodeAutomaton,
    "free": FreeRows,
}
"""What the code rows may write, by the rule's name in :class:`OmniConfig`."""
