"""Give pages of a mapped checkpoint back to the system when their weights were used.

Tensors in. A weight that was loaded by memory map takes no memory until it is read, and then keeps it; as
long as nothing was written there, the system can read it again from the file. Elsewhere than on Linux, and
for tensors that lie in no file, nothing happens. Knows nothing of models.
"""

import ctypes
import mmap
import sys
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

_MAPS = Path("/proc/self/smaps")
_SUFFIX = ".safetensors"
_WRITTEN = ("Anonymous:", "Swap:")  # pages of a private mapping that are no longer the file's


def let_go(*roots: nn.Module) -> None:
    """Give back what the weights of ``roots`` hold of mapped checkpoints, and what was freed elsewhere."""
    files = MappedFiles()
    for root in roots:
        for weight in root.parameters():
            files.release(weight)
    trim()


def trim() -> None:
    """Give back memory that was freed and that the allocator keeps for later."""
    trim_heap = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim_heap is not None:
        trim_heap(0)


class MappedFiles:
    """Checkpoints that are mapped into this process and were not written to since.

    They are those at the time when it is made: whoever writes to a weight in between makes a new one.
    """

    def __init__(self) -> None:
        self._ranges = sorted(_clean_ranges()) if sys.platform == "linux" else []
        self._starts = [start for start, _ in self._ranges]
        self._advise: Any = getattr(ctypes.CDLL(None), "madvise", None) if self._ranges else None

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in one of the files."""
        if not self._ranges or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return False
        start = tensor.data_ptr()
        index = bisect_right(self._starts, start) - 1
        return index >= 0 and start + tensor.nbytes <= self._ranges[index][1]

    def release(self, tensor: Tensor) -> None:
        """Give back the pages that belong to ``tensor`` alone, if it lies in one of the files."""
        if self._advise is None or not self.holds(tensor):
            return
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self._advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)

    @contextmanager
    def released_after_use(self, *roots: nn.Module) -> Iterator[None]:
        """Let modules give their weights back after each call inside."""

        def release(module: nn.Module, inputs: Any, output: Any) -> None:
            for weight in module.parameters(recurse=False):
                self.release(weight)

        owners = [
            module
            for root in roots
            for module in root.modules()
            if any(self.holds(weight) for weight in module.parameters(recurse=False))
        ]
        handles = [module.register_forward_hook(release) for module in owners]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _clean_ranges() -> Iterator[tuple[int, int]]:
    """Addresses of mapped checkpoints of which no page was written to by this process."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    current: tuple[int, int] | None = None
    written_kb = 0
    for line in [*lines, "0-0"]:
        head = line.split(maxsplit=1)[0]
        if not head.endswith(":"):
            if current is not None and not written_kb:
                yield current
            start, _, end = head.partition("-")
            current = (int(start, 16), int(end, 16)) if line.rstrip().endswith(_SUFFIX) else None
            written_kb = 0
        elif head in _WRITTEN:
            written_kb += int(line.split()[1])
