"""Memory for weights that are read at every step: large pages, where the machine lends them.

Sizes in, tensors of bytes out. Weights lie one behind the other in large chunks, so that a processor looks
few addresses up while it reads them; the room of one that is dropped goes to the next, and a chunk in which
none is left goes back. Knows nothing of what is stored.
"""

import mmap
import threading
import weakref
from collections import deque
from typing import ClassVar

import torch
from torch import Tensor

_CHUNK_BYTES = 1 << 26
_PAGE_BYTES = 1 << 21  # a large one
_STEP = 64  # places are multiples of it


class _Chunk:
    """A piece of memory with places that are taken and given back."""

    def __init__(self, size: int) -> None:
        self.memory = _large_pages(size)
        self.given_back: deque[tuple[int, int]] = (
            deque()
        )  # appended to while garbage is collected, at any time
        self._gaps = [(0, size)]  # starts and ends, in order

    def take(self, size: int) -> int | None:
        """Return the first place of a size, None if there is none."""
        while self.given_back:
            self._gaps = _merged(sorted([*self._gaps, self.given_back.popleft()]))
        for index, (start, end) in enumerate(self._gaps):
            if end - start >= size:
                self._gaps[index : index + 1] = [(start + size, end)] if end - start > size else []
                return start
        return None


class Place:
    """Memory of a size, zeros at first; it is given back with the object.

    Args:
        size: in bytes.

    Attributes:
        memory: uint8 [size].
    """

    _chunks: ClassVar[weakref.WeakSet[_Chunk]] = weakref.WeakSet()
    """Those in which something lies."""

    _taking: ClassVar[threading.Lock] = threading.Lock()
    """Held while a place is looked for; what is given back waits in a queue and needs none."""

    def __init__(self, size: int) -> None:
        needed = _rounded(size, _STEP)
        with self._taking:
            self._chunk, start = self._find(needed)
        self.memory: Tensor = self._chunk.memory[start : start + size].zero_()
        weakref.finalize(self, self._chunk.given_back.append, (start, start + needed))

    @classmethod
    def _find(cls, size: int) -> tuple[_Chunk, int]:
        for chunk in list(cls._chunks):
            start = chunk.take(size)
            if start is not None:
                return chunk, start
        chunk = _Chunk(max(_CHUNK_BYTES, _rounded(size, _PAGE_BYTES)))
        cls._chunks.add(chunk)
        start = chunk.take(size)
        assert start is not None
        return chunk, start


def _large_pages(size: int) -> Tensor:
    """Memory that begins with a page, uint8 [size]; what is not touched takes none."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return torch.empty(size, dtype=torch.uint8)
    mapped = mmap.mmap(-1, size + _PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        mapped.madvise(advice)
    except OSError:  # a kernel without them
        pass
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -memory.data_ptr() % _PAGE_BYTES
    return memory[start : start + size]


def _merged(gaps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Gaps in order, of which none touches the next."""
    merged = gaps[:1]
    for start, end in gaps[1:]:
        if start == merged[-1][1]:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def _rounded(size: int, step: int) -> int:
    return -(-size // step) * step
