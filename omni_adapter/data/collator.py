"""Join samples into one batch.

Layouts and features in, padded tensors out: [K + 1, S] each -> [B, K + 1, S]. Knows nothing of tokenizers or
models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from omni_adapter.audio.clips import Clips
from omni_adapter.audio.features import Features
from omni_adapter.data.layout import GridRules, Layout
from omni_adapter.vocab import IGNORE_INDEX


class Sample(NamedTuple):
    """One prompt, with or without its answer, and the recordings in it."""

    layout: Layout
    recordings: tuple[Sequence[Features], ...] = ()


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
    """

    grid: Tensor
    labels: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    places: tuple[ClipPlace, ...] = ()
    clips: Clips | None = None

    @property
    def is_padded(self) -> bool:
        """Whether any row is shorter than the longest."""
        return not bool(self.attention_mask.all())

    def to(self, device: torch.device | str) -> Self:
        """Return the same batch on ``device``."""
        return type(self)(
            self.grid.to(device),
            self.labels.to(device),
            self.attention_mask.to(device),
            self.position_ids.to(device),
            self.places,
            self.clips.to(device) if self.clips else None,
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
    return Batch(grid, labels, mask, positions, tuple(places), Clips.of(recordings) if recordings else None)
