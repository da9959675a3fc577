"""Which kernel is the quickest for a shape on this machine, found by trying within a bounded time.

A shape in; a class of kernels out. Nothing is measured twice in a process. Knows nothing of models.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from omni_adapter.engine.kernels import KERNELS, Kernel, allowed
from omni_adapter.errors import ConfigError

_TRIED_ELEMENTS = 1 << 23  # of a larger weight only so much is tried
_TRIED_BYTES = 1 << 23  # of weights that are read in turn, so that they come from memory
_MAX_COPIES = 64
_ROUNDS = 3
_MARGIN = 0.95  # another kernel than the preferred, or one for each sibling, must be this much quicker
_LEAST_ELEMENTS = 1 << 16  # of smaller weights nothing is gained
_PROMPT_ROWS = 64
_CHEAP_ROWS = 48  # at most
_PROMPT_SHARE = 0.05  # of a prompt's time that counts beside that of a step

_measured: dict[tuple[str, "Shape", int], float] = {}
"""Seconds by kernel, shape and number of threads."""


@dataclass(frozen=True)
class Shape:
    """A product.

    Attributes:
        outputs: rows of the weight.
        inputs: columns of the weight.
        rows: rows that it is multiplied with, as is usual where it is used.
    """

    outputs: int
    inputs: int
    rows: int

    @property
    def is_small(self) -> bool:
        """Whether the choice makes no difference."""
        return self.outputs * self.inputs < _LEAST_ELEMENTS

    @property
    def tried(self) -> "Shape":
        """The part that is tried."""
        return Shape(min(self.outputs, max(1, _TRIED_ELEMENTS // self.inputs)), self.inputs, self.rows)


class Selection:
    """Chooses kernels for one model.

    Args:
        precision: ``fp32``, ``bf16`` or ``int8``.
        names: kernels to choose from; with a single one nothing is measured. None for all of the precision.
        budget_s: seconds that trying may take altogether; after them the preferred kernel is taken.
        seconds_of: times a kernel on a shape; None tries it.

    Raises:
        ConfigError: if a name is unknown or is not of the precision.
    """

    def __init__(
        self,
        precision: str,
        *,
        names: Sequence[str] | None = None,
        budget_s: float = 1.0,
        seconds_of: Callable[[type[Kernel], Shape], float] | None = None,
    ) -> None:
        usable = allowed(precision)
        if names is not None:
            known = {kernel.name: kernel for kernel in usable}
            unknown = [name for name in names if name not in known]
            if unknown or not names:
                raise ConfigError(
                    f"no kernel {', '.join(unknown) or 'named'} for {precision} here; there are "
                    f"{', '.join(known)} (in all: {', '.join(KERNELS)})"
                )
            usable = tuple(known[name] for name in names)
        self.kernels = usable
        self._left_s = budget_s
        self._seconds_of = seconds_of or seconds_of_kernel

    def kernel(self, shape: Shape) -> type[Kernel]:
        """Return the kernel for a shape."""
        best = self.kernels[0]
        if len(self.kernels) == 1 or shape.is_small:
            return best
        seconds = self._seconds(best, shape)
        for other in self.kernels[1:]:
            if (theirs := self._seconds(other, shape)) < _MARGIN * seconds:
                best, seconds = other, theirs
        return best

    def fuses(self, shapes: Sequence[Shape]) -> bool:
        """Whether one product for siblings of these shapes is about as quick as one for each, or quicker."""
        whole = Shape(sum(shape.outputs for shape in shapes), shapes[0].inputs, shapes[0].rows)
        kernel = self.kernel(whole)
        if kernel.name == "plain-fp32":
            return False  # the plain way is there to be exactly the plain way
        if whole.is_small:
            return True
        together = self._seconds(kernel, whole) * whole.outputs / whole.tried.outputs
        apart = sum(
            self._seconds(self.kernel(shape), shape) * shape.outputs / shape.tried.outputs for shape in shapes
        )
        return math.isinf(together) or _MARGIN * together <= apart

    def _seconds(self, kernel: type[Kernel], shape: Shape) -> float:
        """Seconds of a kernel for the part of a shape that is tried, infinite if there is no time left."""
        key = (kernel.name, shape.tried, torch.get_num_threads())
        if self._seconds_of is not seconds_of_kernel:
            return self._seconds_of(kernel, shape.tried)
        if key not in _measured:
            if self._left_s <= 0:
                return math.inf
            started_s = time.perf_counter()
            _measured[key] = seconds_of_kernel(kernel, shape.tried)
            self._left_s -= time.perf_counter() - started_s
        return _measured[key]


@torch.no_grad()
def cheap_rows(kernels: Sequence[Kernel], inputs: int, *, rows: int) -> int:
    """Return how many more rows take about as long as the first ``rows``, at least 1.

    A product reads its whole weight for few rows as for many: where that takes the time, rows are cheap.

    Args:
        kernels: products of one shape, whose weights together do not fit the caches.
        inputs: columns of their weights.
        rows: as many as a step has.
    """
    generator = torch.Generator().manual_seed(0)
    few, many = (
        _least_seconds(kernels, torch.randn(count, inputs, generator=generator))
        for count in (rows, _CHEAP_ROWS)
    )
    return max(1, min(_CHEAP_ROWS, round(few * (_CHEAP_ROWS - rows) / max(many - few, 1e-3 * few))))


@torch.no_grad()
def seconds_of_kernel(kernel: type[Kernel], shape: Shape) -> float:
    """Return the seconds of one product, the least of a few rounds over weights that do not fit the caches.

    For few rows, a share of the time that a prompt takes is added.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.outputs, shape.inputs, generator=generator)
    first = kernel(weight, None)
    copies = max(1, min(_MAX_COPIES, _TRIED_BYTES // max(1, first.nbytes)))
    kernels = [first, *(kernel(weight, None) for _ in range(copies - 1))]
    seconds = _least_seconds(kernels, torch.randn(shape.rows, shape.inputs, generator=generator))
    if shape.rows < _PROMPT_ROWS:
        prompt = torch.randn(_PROMPT_ROWS, shape.inputs, generator=generator)
        seconds += _PROMPT_SHARE * _least_seconds([first], prompt)
    return seconds


def _least_seconds(kernels: Sequence[Kernel], x: torch.Tensor) -> float:
    """Seconds of a product, the least of a few rounds."""
    best = math.inf
    for _ in range(_ROUNDS):
        started_s = time.perf_counter()
        for one in kernels:
            one(x)
        best = min(best, (time.perf_counter() - started_s) / len(kernels))
    return best
