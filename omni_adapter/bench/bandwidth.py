"""How fast the machine reads memory: the floor under every decoding step, which reads all weights once.

A device in, bytes a second of several ways to read out; the quickest way counts. They go through more memory
than caches hold, with the threads that decoding uses. On an accelerator this has never been run.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_adapter.bench.timing import Contestant, interleave, timer

WAYS = {
    "sum": "sum of float32",
    "copy": "copy of float32, read and written bytes counted",
    "gemv_fp32": "float32 matrix by two vectors",
    "gemv_bf16": "bfloat16 matrix by two vectors",
    "gemv_int8": "8-bit matrix by two vectors (quantised on the fly)",
}
"""Ways to read memory, in words."""

_WIDTH = 1024
_ROWS = 2
_PARTS = 4  # matrices that take turns


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second.

    Attributes:
        best: key of ``WAYS``: the way with the highest median, which counts.
        bytes_per_s: its median.
        ways: median and highest of each way.
    """

    best: str
    bytes_per_s: float
    ways: dict[str, tuple[float, float]]


class BandwidthMeter:
    """Reads memory in several ways, again and again.

    Args:
        device: whose memory.
        size_bytes: memory that each way goes through; a quarter at a time.
    """

    def __init__(self, device: torch.device, *, size_bytes: int) -> None:
        self._device = device
        self._numbers = max(size_bytes // _PARTS // _WIDTH, 1) * _WIDTH  # bytes of a part
        self._memory = torch.ones(_PARTS * self._numbers // 4, device=device)
        self._ways: dict[str, tuple[Contestant, int]] = {}
        parts = self._memory.chunk(_PARTS)
        self._add("sum", cycle(parts).__next__, torch.Tensor.sum, self._numbers)
        self._add("copy", cycle(parts).__next__, parts[-1].copy_, 2 * self._numbers)
        for name, dtype in (("gemv_fp32", torch.float32), ("gemv_bf16", torch.bfloat16)):
            self._add_gemv(name, dtype)
        self._add_int8()

    def measure(self, rounds: int) -> dict[str, list[float]]:
        """Return bytes a second of each way, ``rounds`` of each."""
        times = interleave(
            {name: way for name, (way, _) in self._ways.items()}, rounds=rounds, repeats=_PARTS
        )
        return {name: [self._ways[name][1] / seconds for seconds in taken] for name, taken in times.items()}

    def _add(
        self, name: str, part: Callable[[], Tensor], work: Callable[[Tensor], object], num_bytes: int
    ) -> None:
        self._ways[name] = timer(lambda: work(part()), self._device), num_bytes

    def _add_gemv(self, name: str, dtype: torch.dtype) -> None:
        matrices = self._memory.view(dtype).view(-1, _WIDTH).chunk(_PARTS)
        vectors = torch.ones(_ROWS, _WIDTH, dtype=dtype, device=self._device)
        self._add(name, cycle(matrices).__next__, lambda matrix: F.linear(vectors, matrix), self._numbers)

    def _add_int8(self) -> None:
        """The quantised product of the processor, where this torch has one."""
        if self._device.type != "cpu" or torch.backends.quantized.engine == "none":
            return
        try:
            pack = torch.ops.quantized.linear_prepack
            scales, zeros = torch.ones(1).expand(self._numbers // _WIDTH).double(), torch.zeros(1)
            zeros = zeros.expand(self._numbers // _WIDTH).long()
            matrix = torch.ones(self._numbers // _WIDTH, _WIDTH, dtype=torch.int8)
            with warnings.catch_warnings(action="ignore"):  # torch means to drop it, and has nothing else
                quantised = torch._make_per_channel_quantized_tensor(matrix, scales, zeros, 0)
            packed = cycle([pack(quantised, None) for _ in range(_PARTS)])
        except (RuntimeError, AttributeError):
            return
        vectors = torch.ones(_ROWS, _WIDTH)
        work = torch.ops.quantized.linear_dynamic
        self._ways["gemv_int8"] = timer(lambda: work(vectors, next(packed)), self._device), self._numbers


def summarise(measured: dict[str, list[float]]) -> Bandwidth:
    """Return the quickest way by its median."""
    ways = {name: (_median(rates), max(rates)) for name, rates in measured.items()}
    best = max(ways, key=lambda name: ways[name][0])
    return Bandwidth(best, ways[best][0], ways)


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())
