"""What is shown of a run: sums that add up over batches and processes, and the figures made of them.

Losses and batch in, sums by name out; sums over any stretch of training in, means, shares and rates out.
Knows nothing of models, loggers or clocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_adapter.data.collator import Batch
from omni_adapter.training.loss import Losses


@dataclass(frozen=True)
class Meter:
    """Measures batches.

    Args:
        num_codebooks: code rows K.
        codebook_size: ids below this are codes; those from it on are marks.
        seconds_per_frame: duration of a frame of codes.
        seconds_per_step: duration of what is heard in one step of the LM.
    """

    num_codebooks: int
    codebook_size: int
    seconds_per_frame: float
    seconds_per_step: float

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the K code rows and the text row, in the order of the losses."""
        return (*(f"row_{row}" for row in range(self.num_codebooks)), "text")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sums, in the order of ``measure``."""
        by_row = (f"{row}/{kind}" for kind in ("nll", "correct", "labels") for row in self.rows)
        return (*by_row, "positions", "padding", "audio_seconds")

    def measure(self, losses: Losses, batch: Batch) -> Tensor:
        """Return the sums of a batch, float32 [n]; those of several batches or processes may be added up.

        Nothing waits for the device.
        """
        mask = batch.attention_mask
        codes = batch.labels[:, 0]
        frames = ((codes >= 0) & (codes < self.codebook_size)).sum()  # marks make no sound
        heard = self.seconds_per_step * sum(place.length for place in batch.places)
        rest = (mask.sum(), (mask == 0).sum(), heard + self.seconds_per_frame * frames)
        rows = (losses.nll, losses.correct, losses.counts)
        return torch.cat((*(part.float() for part in rows), torch.stack([part.float() for part in rest])))


def describe(sums: Mapping[str, float], *, seconds: float, rows: Sequence[str]) -> dict[str, float]:
    """Return what sums over ``seconds`` of training mean.

    Args:
        sums: by name, over all processes.
        seconds: how long it took.
        rows: names of the rows; those without labels are left out.
    """
    figures: dict[str, float] = {}
    for row in rows:
        if labels := sums[f"{row}/labels"]:
            figures[f"{row}/loss"] = sums[f"{row}/nll"] / labels
            figures[f"{row}/accuracy"] = sums[f"{row}/correct"] / labels
    steps = sums["positions"] + sums["padding"]
    figures["padding_share"] = sums["padding"] / steps if steps else 0.0
    figures["positions_per_s"] = sums["positions"] / seconds if seconds else 0.0
    figures["audio_hours_per_h"] = sums["audio_seconds"] / seconds if seconds else 0.0
    return figures


def estimate_seconds_left(*, done: int, total: int, seconds: float) -> float | None:
    """Return how long the rest of ``total`` steps takes at the pace of those done, None before the first."""
    return (total - done) * seconds / done if done else None
