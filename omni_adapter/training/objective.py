"""What is minimised: batch and model in, the loss of a step and sums to be seen of it out.

Knows nothing of optimizers, processes or logs.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from omni_adapter.data.collator import Batch
from omni_adapter.training.loss import Losses, TrainingModel
from omni_adapter.training.metrics import Meter, describe


class Objective(Protocol):
    """What is minimised, and what is to be seen of it."""

    @property
    def sum_names(self) -> tuple[str, ...]:
        """Names of the sums that ``measure`` returns; the first is the loss."""

    def count(self, batch: Batch) -> Tensor:
        """Return the labels of each row in a batch, [R]."""

    def measure(self, model: nn.Module, batch: Batch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the share of a batch in the loss of a step with ``counts`` labels, and sums [n]."""

    def describe(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return means, shares and the like of sums over ``sums["steps"]`` steps of ``sums["seconds"]``."""


class RowLosses:
    """The objective of a talker: its code rows and its text.

    Args:
        model: the talker with its loss.
        meter: measures what is to be seen.
    """

    def __init__(self, model: TrainingModel, *, meter: Meter) -> None:
        self._count = model.counts
        self._meter = meter

    @property
    def sum_names(self) -> tuple[str, ...]:
        """Names of the sums that ``measure`` returns; the first is the loss."""
        return ("loss", *self._meter.names)

    def count(self, batch: Batch) -> Tensor:
        """Return the labels of each row in a batch, [K + 1]."""
        return self._count(batch)

    def measure(self, model: nn.Module, batch: Batch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the share of a batch in the loss of a step with ``counts`` labels, and sums [n]."""
        losses: Losses = model(batch)
        loss = losses.total(counts)
        return loss, torch.cat((loss.detach().float()[None], self._meter.measure(losses, batch)))

    def describe(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the loss, loss and accuracy of each row that had labels, share of padding and pace."""
        figures = describe(sums, seconds=sums["seconds"], rows=self._meter.rows)
        return {"loss": sums["loss"] / sums["steps"], **figures}
