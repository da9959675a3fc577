"""Join samples into one batch.

Layouts and features in, padded tensors out: [K + 1, S] each -> [B, K + 1, S]. Knows nothing of tokenizers or
models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from omni_adapter.audio.clips import Clips, Recording
from omni_adapter.data.layout import GridRules, Layout
from omni_adapter.vocab import IGNORE_INDEX

PADDING = -1
"""Segment of a packed row's steps that hold no sample."""


class Sample(NamedTuple):
    """One prompt, with or without its answer, and the recordings in it.

    Attributes:
        layout: the sample on the grid.
        recordings: what is heard, in order.
        id: name, for messages.
        teacher: the same answer after a prompt in text alone, where the base itself is to teach it.
        transcript: ids of what the last recording says, where that is known.
    """

    layout: Layout
    recordings: tuple[Recording, ...] = ()
    id: str = ""
    teacher: "Sample | None" = None
    transcript: tuple[int, ...] | None = None


class ClipPlace(NamedTuple):
    """Where a recording's embeddings go: batch row, first step, number of steps."""

    row: int
    start: int
    length: int


@dataclass(frozen=True)
class Batch:
    """What the model reads.

    Attributes:
        grid: ids, int64 [B, K + 1, S]; the last row is text.
        labels: [B, K + 1, S], IGNORE_INDEX where nothing is learned.
        attention_mask: int64 [B, S], zero at padding.
        position_ids: int64 [B, S], counted over the true steps.
        places: where each recording goes, in the order of ``clips``.
        clips: the recordings, None if there are none.
        segments: number of the sample that each step belongs to, int64 [B, S], -1 at padding; None if every
            row holds one sample.
        ids: names of the samples, row by row.
        teacher: the samples that the base itself teaches, after prompts in text alone, in the same order.
        transcripts: ids of what each of ``clips`` says, None where that is unknown.
    """

    grid: Tensor
    labels: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    places: tuple[ClipPlace, ...] = ()
    clips: Clips | None = None
    segments: Tensor | None = None
    ids: tuple[str, ...] = ()
    teacher: "Batch | None" = None
    transcripts: tuple[tuple[int, ...] | None, ...] = ()

    @property
    def is_padded(self) -> bool:
        """Whether any row is shorter than the longest."""
        return not bool(self.attention_mask.all())

    @property
    def model_mask(self) -> Tensor | None:
        """The model's ``attention_mask``: None, [B, S] where rows are padded, [B, 1, S, S] where packed."""
        if self.segments is not None:
            return segment_mask(self.segments)
        return self.attention_mask if self.is_padded else None

    def to(self, device: torch.device | str) -> Self:
        """Return the same batch on ``device``."""
        return type(self)(
            self.grid.to(device),
            self.labels.to(device),
            self.attention_mask.to(device),
            self.position_ids.to(device),
            self.places,
            self.clips.to(device) if self.clips else None,
            self.segments.to(device) if self.segments is not None else None,
            self.ids,
            self.teacher.to(device) if self.teacher else None,
            self.transcripts,
        )


def collate(samples: Sequence[Sample], *, rules: GridRules, side: Literal["left", "right"] = "left") -> Batch:
    """Pad samples to one length.

    Args:
        samples: at least one.
        rules: ids that padding is made of.
        side: where the padding goes; ``left`` for decoding, ``right`` for training.
    """
    layouts = [sample.layout for sample in samples]
    longest = max(layout.grid.shape[1] for layout in layouts)
    grid = torch.full((len(layouts), rules.num_codebooks + 1, longest), rules.vocabulary.pad)
    grid[:, -1] = rules.no_text
    labels = torch.full_like(grid, IGNORE_INDEX)
    mask = torch.zeros(len(layouts), longest, dtype=torch.long)
    places: list[ClipPlace] = []
    for row, layout in enumerate(layouts):
        steps = layout.grid.shape[1]
        start = longest - steps if side == "left" else 0
        grid[row, :, start : start + steps] = layout.grid
        labels[row, :, start : start + steps] = layout.labels
        mask[row, start : start + steps] = 1
        places.extend(ClipPlace(row, start + span.start, span.length) for span in layout.spans)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    recordings = [recording for sample in samples for recording in sample.recordings]
    clips = Clips.of(recordings) if recordings else None
    ids = tuple(sample.id for sample in samples)
    teacher = teacher_of(samples, rules=rules)
    return Batch(
        grid,
        labels,
        mask,
        positions,
        tuple(places),
        clips,
        ids=ids,
        teacher=teacher,
        transcripts=transcripts_of(samples),
    )


def transcripts_of(samples: Sequence[Sample]) -> tuple[tuple[int, ...] | None, ...]:
    """Return what each recording of the samples says, as far as it is known: the last one of each sample."""
    return tuple(
        sample.transcript if recording is sample.recordings[-1] else None
        for sample in samples
        for recording in sample.recordings
    )


def teacher_of(samples: Sequence[Sample], *, rules: GridRules) -> Batch | None:
    """Return what the base reads to teach some of ``samples``, in their order; None if it teaches none."""
    teachers = [sample.teacher for sample in samples if sample.teacher is not None]
    return collate(teachers, rules=rules, side="right") if teachers else None


def segment_mask(segments: Tensor) -> Tensor:
    """Return which step may see which: earlier ones of its own sample, bool [B, 1, S, S].

    Args:
        segments: sample of each step, ``PADDING`` where there is none, int64 [B, S]. A step of padding sees
            itself, so that its softmax has something to stand on.
    """
    steps = segments.shape[1]
    same = segments[:, :, None] == segments[:, None]
    causal = torch.ones(steps, steps, dtype=torch.bool, device=segments.device).tril()
    own = torch.eye(steps, dtype=torch.bool, device=segments.device)
    visible = (same & causal & (segments != PADDING)[:, None]) | own  # [B, S, S]
    return visible[:, None]
