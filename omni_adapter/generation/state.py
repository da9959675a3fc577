"""What a decode remembers between steps, and how conversations join and leave it.

What decides which rows run (roles, lengths, who has ended) is kept in plain lists, so that no step waits for
the device to learn it; ids, masks and counts that the step itself reads are tensors. Knows nothing of how ids
are chosen or models are run.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from omni_adapter.backbone import Backbone, caches
from omni_adapter.generation.sampling import CodeRows
from omni_adapter.model import OmniCache

Role = Literal["speech", "text", "joint"]

_DRAWS_AHEAD = 64  # steps whose numbers are drawn at once
_MASK_BLOCK = 256  # columns by which a mask grows where the capacity is not known


_LISTS = ("names", "speaks", "has_given", "steps", "max_steps", "context_limited", "written", "said")
_TENSORS = ("last", "text_done", "talks", "silent", "seen_text", "seen_codes")


class Row(NamedTuple):
    """One row of the LM's batch: whose it is, and what is read off it.

    Attributes:
        conversation: its place among the conversations of the state.
        role: ``speech`` writes codes, ``text`` writes text, ``joint`` writes both.
    """

    conversation: int
    role: Role


class Draws:
    """Numbers in [0, 1) that decide draws: each conversation has its own, the same alone and among others.

    Args:
        seeds: start of each conversation's stream, length n.
        width: numbers a step.
        device: where they are needed.
    """

    def __init__(self, seeds: Sequence[int], *, width: int, device: torch.device) -> None:
        self.seeds, self.taken = list(seeds), [0] * len(seeds)
        self.width, self.device = width, device
        self.block = torch.empty(0, device=device)  # [n, _DRAWS_AHEAD, width]
        self.used = _DRAWS_AHEAD

    def take(self) -> Tensor:
        """Return the numbers of the next step, [n, width]."""
        if self.used == _DRAWS_AHEAD:
            drawn = [self._drawn(seed, taken) for seed, taken in zip(self.seeds, self.taken, strict=True)]
            self.block, self.used = torch.stack(drawn).to(self.device), 0
        numbers = self.block[:, self.used]
        self.used += 1
        self.taken = [taken + 1 for taken in self.taken]
        return numbers

    def keep(self, places: Sequence[int]) -> None:
        """Keep the conversations at ``places``, in that order."""
        self.seeds, self.taken = [self.seeds[at] for at in places], [self.taken[at] for at in places]
        self.used = _DRAWS_AHEAD

    def join(self, other: "Draws") -> None:
        """Take over the conversations of ``other``."""
        self.seeds, self.taken = self.seeds + other.seeds, self.taken + other.taken
        self.used = _DRAWS_AHEAD

    def _drawn(self, seed: int, taken: int) -> Tensor:
        """The next numbers of a stream of which ``taken`` steps were taken, [_DRAWS_AHEAD, width]."""
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(taken + _DRAWS_AHEAD, self.width, generator=generator)[taken:]


@dataclass
class Given:
    """Texts that are fed instead of sampled.

    Attributes:
        ids: text ids, filled up with anything, [n, G].
        lengths: ids of each text, [n]; 0 for a conversation whose text is sampled.
        step: answer steps done, [n].
    """

    ids: Tensor
    lengths: Tensor
    step: Tensor

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], *, device: torch.device) -> "Given":
        """Put texts side by side."""
        longest = max([1, *(len(text) for text in texts)])
        filled = [[*text, *[0] * (longest - len(text))] for text in texts]
        ids = torch.tensor(filled, dtype=torch.long, device=device).view(len(texts), longest)
        lengths = torch.tensor([len(text) for text in texts], dtype=torch.long, device=device)
        return cls(ids, lengths, torch.zeros_like(lengths))

    def keep(self, indices: Tensor) -> "Given":
        """Keep the conversations ``indices``, [m]."""
        return Given(self.ids[indices], self.lengths[indices], self.step[indices])

    def join(self, other: "Given") -> "Given":
        """Put the conversations of ``other`` behind these."""
        longest = max(self.ids.shape[1], other.ids.shape[1])
        ids = [torch.nn.functional.pad(one.ids, (0, longest - one.ids.shape[1])) for one in (self, other)]
        return Given(
            torch.cat(ids), torch.cat((self.lengths, other.lengths)), torch.cat((self.step, other.step))
        )


Index = slice | Tensor
"""Entries of a tensor: a slice where they lie side by side, else int64 [m]."""


class Plan(NamedTuple):
    """Where rows lie, and who is behind them; made anew only when rows change.

    Attributes:
        owners: conversation of each row, int64 [R].
        speaking: rows that write codes.
        speakers: conversations of those rows.
        num_speaking: how many there are.
        silent: rows that carry no codes.
        writing: rows that write text.
        writers: conversations of those rows.
        num_writing: how many there are.
        all_speak: whether ``speakers`` are all conversations, in order.
        all_write: likewise ``writers``.
        num_sampled: rows whose text is sampled and goes on; 0 if no row needs the LM's logits.
        mask: which columns of each row hold steps, int64 [R, columns]; None if all do.
        padding: columns before the first step of each row, int64 [R, 1]; None if there are none.
    """

    owners: Tensor
    speaking: Index
    speakers: Index
    num_speaking: int
    silent: Index
    writing: Index
    writers: Index
    num_writing: int
    all_speak: bool
    all_write: bool
    num_sampled: int
    mask: Tensor | None
    padding: Tensor | None


@dataclass
class DecodingState:
    """Everything a decode remembers between steps. Dropping it frees all of it.

    Lists and tensors of length n have an entry for each conversation.

    Attributes:
        names: what steps call the conversations, length n.
        rows: rows of the LM's batch, in the order of the cache.
        cache: state of LM and TTS blocks; the latter has the rows that speak, in the same order.
        capacity: columns that there is room for; None if room is made as the reply goes on.
        padding: columns before each conversation's first step, length n.
        speaks: whether the answer has codes, length n.
        has_given: whether the text is given, length n.
        steps: answer steps done, length n.
        max_steps: answer steps at most, length n.
        context_limited: whether ``max_steps`` comes from the base's positions, length n.
        written: whether the text was over after the last step, length n.
        said: whether the codes were, length n.
        last: ids of the last step as on the grid, [n, K + 1]: codes, then text.
        text_done: whether the text has ended, bool [n].
        talks: ``speaks`` as a tensor, bool [n].
        silent: its opposite.
        automaton: what is legal in the code rows; None if no conversation speaks.
        draws: numbers that decide draws; None if nothing is drawn.
        given: texts that are fed; None if all are sampled.
        seen_text: ids that came before, bool [n, V]; None without a repetition penalty.
        seen_codes: likewise, bool [n, K, V].
        write_logits: logits of the next step of the rows that write text, [W, V]; None if none needs them.
        code_logits: logits of the next step of the rows that speak, [P, K, V]; None if none speaks.
        length: columns read so far.
    """

    names: list[int]
    rows: list[Row]
    cache: OmniCache
    capacity: int | None
    padding: list[int]
    speaks: list[bool]
    has_given: list[bool]
    steps: list[int]
    max_steps: list[int]
    context_limited: list[bool]
    written: list[bool]
    said: list[bool]
    last: Tensor
    text_done: Tensor
    talks: Tensor
    silent: Tensor
    draws: Draws | None = None
    given: Given | None = None
    seen_text: Tensor | None = None
    seen_codes: Tensor | None = None
    automaton: CodeRows | None = None
    write_logits: Tensor | None = None
    code_logits: Tensor | None = None
    length: int = 0
    _plan: Plan | None = None

    @property
    def num_speaking(self) -> int:
        """Rows that carry codes."""
        return sum(row.role != "text" for row in self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the caches, room for what is to come included."""
        cache = self.cache.backbone
        return self.cache.tts.nbytes + (0 if cache is None else cache.nbytes)

    @property
    def text_logits(self) -> Tensor:
        """Logits of the next step, [R, V]; NaN in rows that write no text."""
        assert self.write_logits is not None
        logits = self.write_logits.new_full((len(self.rows), self.write_logits.shape[-1]), torch.nan)
        logits[self.plan.writing] = self.write_logits
        return logits

    @property
    def plan(self) -> Plan:
        """Where the rows lie."""
        if self._plan is None:
            self._plan = self._make_plan(self.length + 1)
        return self._plan

    def set_rows(self, rows: list[Row]) -> None:
        """Say anew which rows run; the caches are the caller's to change."""
        self.rows, self._plan = rows, None

    def refresh(self) -> None:
        """Note that texts have ended or columns have gone, so that another plan fits the rows."""
        self._plan = None

    def keep_conversations(self, places: Sequence[int]) -> None:
        """Keep the conversations at ``places``, in ascending order; the rows must be theirs already."""
        if len(places) == len(self.names):
            return
        indices = torch.tensor(places, device=self.last.device, dtype=torch.long)
        moved = {old: new for new, old in enumerate(places)}
        self.set_rows([row._replace(conversation=moved[row.conversation]) for row in self.rows])
        for name in ("padding", *_LISTS):
            setattr(self, name, [getattr(self, name)[place] for place in places])
        for name in _TENSORS:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor[indices])
        if self.draws is not None:
            self.draws.keep(places)
        if self.given is not None:
            self.given = self.given.keep(indices)
        if self.automaton is not None:
            self.automaton.keep(indices)
            self.automaton = self.automaton if places else None

    def trim(self) -> None:
        """Forget columns that are padding in every row, where the cache can."""
        steps = min(self.padding, default=self.length)
        cache = self.cache.backbone
        if not steps or cache is None or cache.capacity is None:
            return
        later = self.length - self.cache.tts.length  # columns that the TTS blocks have not seen
        self.cache.tts.trim(max(0, steps - later))
        self.cache.backbone = caches.trim(cache, steps)
        self.padding = [padding - steps for padding in self.padding]
        self.length -= steps
        self.refresh()

    def join(self, other: "DecodingState") -> None:
        """Put the conversations of ``other`` behind these; all end at the same column."""
        device, count, more = self.last.device, len(self.names), len(other.names)
        length = max(self.length, other.length)
        beside = (
            ("write_logits", self._count("speech"), other._count("speech")),
            ("code_logits", self._count("text"), other._count("text")),
        )
        for name, mine, theirs in beside:
            setattr(self, name, _beside(getattr(self, name), mine, getattr(other, name), theirs))
        self.cache.backbone = caches.join(self.cache.backbone, other.cache.backbone)
        if other.num_speaking:
            self.cache.tts.join(other.cache.tts)
        self.automaton = _joined(self.automaton, count, other.automaton, more)
        if self.given or other.given:
            given = self.given or Given.of([()] * count, device=device)
            self.given = given.join(other.given or Given.of([()] * more, device=device))
        if self.draws and other.draws:
            self.draws.join(other.draws)
        self.padding = [padding + length - self.length for padding in self.padding]
        self.padding += [padding + length - other.length for padding in other.padding]
        self.length = length
        for name in _LISTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in _TENSORS:
            if getattr(self, name) is not None:
                setattr(self, name, torch.cat((getattr(self, name), getattr(other, name))))
        newcomers = [row._replace(conversation=row.conversation + count) for row in other.rows]
        self.set_rows([*self.rows, *newcomers])

    def _count(self, other_role: Role) -> int:
        """Rows that have another role."""
        return sum(row.role != other_role for row in self.rows)

    def attention(self, steps: int) -> tuple[Tensor | None, Tensor | None]:
        """Mask [R, columns] and positions [R, steps] of the next ``steps`` columns; None without padding."""
        plan, end = self.plan, self.length + steps
        if plan.mask is None or plan.padding is None:
            return None, None
        if end > plan.mask.shape[1]:
            self._plan = self._make_plan(end)
            return self.attention(steps)
        columns = torch.arange(self.length, end, device=self.last.device)
        return plan.mask[:, :end], (columns - plan.padding).clamp_(min=0)

    def _make_plan(self, columns: int) -> Plan:
        device = self.last.device
        owners, everybody = [row.conversation for row in self.rows], list(range(len(self.names)))
        speaking = [index for index, row in enumerate(self.rows) if row.role != "text"]
        silent = [index for index, row in enumerate(self.rows) if row.role == "text"]
        writing = [index for index, row in enumerate(self.rows) if row.role != "speech"]
        sampled = [at for at in writing if not (self.has_given[owners[at]] or self.written[owners[at]])]
        mask = before = None
        if any(self.padding):
            before = torch.tensor([[self.padding[owner]] for owner in owners], device=device)
            columns = max(columns, self.capacity or _MASK_BLOCK * (columns // _MASK_BLOCK + 1))
            mask = (torch.arange(columns, device=device) >= before).long()
        return Plan(
            owners=torch.tensor(owners, device=device),
            speaking=index_of(speaking, device=device),
            speakers=index_of([owners[at] for at in speaking], device=device),
            num_speaking=len(speaking),
            silent=index_of(silent, device=device),
            writing=index_of(writing, device=device),
            writers=index_of([owners[at] for at in writing], device=device),
            num_writing=len(writing),
            all_speak=[owners[at] for at in speaking] == everybody,
            all_write=[owners[at] for at in writing] == everybody,
            num_sampled=len(sampled),
            mask=mask,
            padding=before,
        )


def index_of(places: Sequence[int], *, device: torch.device) -> Index:
    """Return what takes the entries at ``places`` out of a tensor, without a copy where that can be."""
    first = places[0] if places else 0
    if list(places) == list(range(first, first + len(places))):
        return slice(first, first + len(places))
    return torch.tensor(places, device=device)


def keep_cache_rows(
    cache: OmniCache, rows: Sequence[int], speaking: Sequence[int], backbone: Backbone
) -> None:
    """Drop rows of the caches.

    Args:
        cache: changed in place.
        rows: rows of the LM's cache that stay, ascending.
        speaking: rows of the TTS blocks' cache that stay, ascending.
        backbone: the LM.
    """
    state = cache.backbone
    if state is not None and state.capacity is not None:
        cache.backbone = caches.keep_rows(state, rows)
    elif state is not None:
        indices = torch.tensor(rows, device=backbone.device)
        cache.backbone = backbone.select_rows(state, indices) if rows else None
    cache.tts.select_rows(torch.tensor(speaking, device=backbone.device, dtype=torch.long))
    if not speaking:
        cache.tts.trim(cache.tts.length)


def _beside(first: Tensor | None, count: int, second: Tensor | None, more: int) -> Tensor | None:
    """Rows of both, zeros in place of rows that have no logits."""
    known = first if first is not None else second
    if known is None:
        return None
    parts = ((first, count), (second, more))
    return torch.cat(
        [known.new_zeros(rows, *known.shape[1:]) if part is None else part for part, rows in parts]
    )


def _joined(first: CodeRows | None, count: int, second: CodeRows | None, more: int) -> CodeRows | None:
    """Code rows of both; conversations that do not speak get some of others, which nobody reads."""
    if first is None and second is None:
        return None
    if first is None:
        assert second is not None
        first = _repeated(second, count)
    first.join(_repeated(first, more) if second is None else second)
    return first


def _repeated(rows: CodeRows, count: int) -> CodeRows:
    """The first conversation of ``rows``, so many times."""
    repeated = copy.copy(rows)
    repeated.keep(torch.zeros(count, dtype=torch.long))
    return repeated
