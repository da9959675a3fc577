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
_NUCLEUS = 1 << 8  # most likely ids among which those of top_p are looked for first
_BLOCK = 1 << 9  # logits among which the largest is looked for at a time
_LEAST_BLOCKS = 1 << 5
_ROUNDING = 1e-5  # of sums of probabilities


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
    if settings.is_greedy or settings.top_k == 1:
        return most_likely(logits)
    assert uniform is not None
    probabilities, ids = _probabilities(logits.float() / settings.temperature, settings)
    if settings.top_p < 1:
        cumulative = probabilities.cumsum(dim=-1)
        # The id that crosses top_p is kept: what is dropped lies wholly beyond it.
        probabilities = probabilities.masked_fill(cumulative - probabilities >= settings.top_p, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, uniform.to(cumulative)[:, None] * total, right=True)  # [R, 1]
    drawn = drawn.minimum((cumulative < total).sum(dim=-1, keepdim=True))  # the last one that is possible
    return (drawn if ids is None else ids.gather(-1, drawn))[:, 0]


def most_likely(logits: Tensor) -> Tensor:
    """Return the id of the largest logit of each row, int64 [R]; of equals, the lowest id.

    Args:
        logits: [R, V].
    """
    rows, size = logits.shape
    count = size // _BLOCK
    if count < _LEAST_BLOCKS or logits.device.type != "cpu":
        return logits.argmax(dim=-1)
    # The largest is found much quicker than where it lies, which is then looked for in one block.
    blocks = logits[:, : count * _BLOCK].view(rows, count, _BLOCK)
    first = blocks.amax(dim=-1).argmax(dim=-1)  # [R]
    index = torch.arange(rows)
    found: Tensor = first * _BLOCK + blocks[index, first].argmax(dim=-1)
    if size == count * _BLOCK:
        return found
    last = size - _BLOCK + logits[:, -_BLOCK:].argmax(dim=-1)  # what it overlaps with wins where it is equal
    return torch.where(logits[index, last] > logits[index, found], last, found)


def _probabilities(scores: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor | None]:
    """Probabilities of the ids that truncation may leave, most likely first, and the ids, [R, C].

    Without truncation they are those of all ids, and in their order: a whole vocabulary is sorted only where
    nothing cheaper tells which ids are left.
    """
    size = scores.shape[-1]
    if settings.top_k:
        top, ids = _most_likely(scores, min(settings.top_k, size))
        return top.softmax(dim=-1), ids
    probabilities = scores.softmax(dim=-1)
    if settings.top_p == 1:
        return probabilities, None
    if size > _NUCLEUS and scores.device.type == "cpu":  # elsewhere, to look would be to wait
        top, ids = _most_likely(probabilities, _NUCLEUS)
        if bool((top.sum(dim=-1) > settings.top_p + _ROUNDING).all()):
            return top, ids
    return _most_likely(probabilities, size)


def _most_likely(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest scores, descending, and their ids, [R, count]; of equals, lower ids first."""
    if count == scores.shape[-1]:
        return scores.sort(dim=-1, descending=True, stable=True)
    ids = scores.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    top, order = scores.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return top, ids.gather(-1, order)


class CodeRows(Protocol):
    """What the code rows of a batch may write, step by step, and when they are done."""

    ends_text: ClassVar[bool]  # whether the text is over too once the code rows are

    @property
    def finished(self) -> Tensor:
        """Whether every row has ended, bool [B]."""

    @property
    def cut(self) -> Tensor:
        """Whether speech was ended because the steps ran out, bool [B]."""

    @property
    def at_limit(self) -> Tensor:
        """``cut`` of those that have finished; anything for others, bool [B]."""

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

    @property
    def at_limit(self) -> Tensor:
        """``cut`` of those that have finished, bool [B]."""
        return self.cut

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
        self.most_frames = self.max_frames.clone()  # [B]; final once the leading row has ended
        illegal = torch.arange(vocabulary.size, device=device) >= vocabulary.codebook_size
        self.illegal = illegal.repeat(len(delays), 1)  # [K, V]
        self.illegal[self.lead_row, vocabulary.end] = False

    @staticmethod
    def least_steps(delays: Sequence[int]) -> int:
        """Return the least number of steps in which every row can end."""
        return max(delays) + 1

    @property
    def frames(self) -> Tensor:
        """Frames of each answer, -1 where its end has not been decided, [B]."""
        decided = self.step > self.most_frames + self.lead_delay
        return torch.where(decided, self.most_frames, _UNKNOWN)

    @property
    def finished(self) -> Tensor:
        """Whether every row has ended, bool [B]."""
        return self.step > self.most_frames + self.last_delay

    @property
    def cut(self) -> Tensor:
        """Whether speech was ended because the steps ran out, bool [B]."""
        return self.at_limit & self.finished

    @property
    def at_limit(self) -> Tensor:
        """``cut`` of those that have finished; of others, whether no end has been drawn yet, bool [B]."""
        return self.most_frames == self.max_frames

    def mask(self, logits: Tensor) -> Tensor:
        """Return logits [B, K, V] with all marks at minus infinity, but for the end in the leading row."""
        return logits.masked_fill(self.illegal, -torch.inf)

    def advance(self, drawn: Tensor) -> Tensor:
        """Return the legal ids of this step, [B, K], for ids drawn under ``mask``, and count the step."""
        frame = self.step - self.lead_delay  # of the leading row, [B]
        ends_now = drawn[:, self.lead_row] == self.vocabulary.end
        if self.lead_delay:
            ends_now = ends_now & (frame >= 0)
        # An end that is drawn after the end comes later, so it changes nothing.
        self.most_frames = torch.where(ends_now, self.most_frames.minimum(frame), self.most_frames)
        frames = self.step[:, None] - self.delays  # frame of each row, [B, K]
        ends = self.most_frames[:, None]
        ids = drawn.masked_fill(frames == ends, self.vocabulary.end)
        ids = ids.masked_fill((frames < 0) | (frames > ends), self.vocabulary.pad)
        self.step = self.step + 1
        return ids

    def keep(self, indices: Tensor) -> None:
        """Keep the conversations ``indices``, [n]."""
        self.max_frames, self.step = self.max_frames[indices], self.step[indices]
        self.most_frames = self.most_frames[indices]

    def join(self, other: Self) -> None:
        """Put the conversations of ``other`` behind these."""
        self.max_frames = torch.cat((self.max_frames, other.max_frames))
        self.step = torch.cat((self.step, other.step))
        self.most_frames = torch.cat((self.most_frames, other.most_frames))


CODE_ROWS: Mapping[CodeRule, type[CodeAutomaton] | type[FreeRows]] = {
    "delayed": CodeAutomaton,
    "free": FreeRows,
}
"""What the code rows may write, by the rule's name in :class:`OmniConfig`."""
