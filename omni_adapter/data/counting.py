"""Counts of many values in bounded memory: distributions, bars, names, and what is there twice.

Numbers, names and contents in, facts about all of them out. Knows nothing of rows.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from omni_adapter.data.dataset import LengthHistogram

_BAR = math.log(1.05)  # width of a bar of ``Spread``: 5 %
_KEPT_DIGESTS = 1 << 17
_KEPT_NAMES = 200
_EXAMPLES = 3


class Spread:
    """A distribution of positive numbers, in bars of 5 %.

    Attributes:
        count: numbers so far.
        total: their sum.
        low: the smallest one.
        high: the largest one.
    """

    def __init__(self) -> None:
        self.count, self.total, self.low, self.high = 0, 0.0, math.inf, -math.inf
        self._bars: Counter[int] = Counter()

    def add(self, value: float) -> None:
        """Count a number."""
        self.count += 1
        self.total += value
        self.low, self.high = min(self.low, value), max(self.high, value)
        self._bars[math.floor(math.log(max(value, 1e-9)) / _BAR)] += 1

    def quantile(self, share: float) -> float:
        """Return the number that ``share`` of all lie below, to 5 %."""
        seen = 0
        for bar in sorted(self._bars):
            seen += self._bars[bar]
            if seen >= share * self.count:
                return min(max(math.exp((bar + 0.5) * _BAR), self.low), self.high)
        return 0.0

    def outside(self, low: float, high: float) -> int:
        """Return how many numbers lie below ``low`` or above ``high``, to 5 %."""
        return sum(
            count for bar, count in self._bars.items() if not low <= math.exp((bar + 0.5) * _BAR) <= high
        )

    def facts(self) -> dict[str, float]:
        """Return the distribution in a few numbers; all of them 0 without any."""
        if not self.count:
            return dict.fromkeys(("count", "mean", "low", "p5", "median", "p95", "high"), 0.0)
        return {
            "count": self.count,
            "mean": self.total / self.count,
            "low": self.low,
            "p5": self.quantile(0.05),
            "median": self.quantile(0.5),
            "p95": self.quantile(0.95),
            "high": self.high,
        }


class Digests:
    """Finds what is there twice, in bounded memory.

    All digests are kept up to a limit. Beyond it, half of them are forgotten, and only digests with one more
    zero bit at their end are looked at from then on; counts are scaled up. As digests are random numbers,
    the rows that are left are a fair sample, and the same one in every source.

    Args:
        limit: digests that are kept at most; None for 131,072.

    Attributes:
        bits: zero bits at the end of every digest that is kept; with 0, counts are exact.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.bits, self._limit = 0, limit or _KEPT_DIGESTS
        self._first: dict[int, int] = {}
        self._again: dict[int, list[int]] = {}

    def add(self, content: bytes, index: int) -> None:
        """Take what row ``index`` holds."""
        digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
        if digest & ((1 << self.bits) - 1):
            return
        if digest in self._first:
            again = self._again.setdefault(digest, [index, 0])
            again[1] += 1
            return
        self._first[digest] = index
        while len(self._first) > self._limit:
            self.bits += 1
            self._first = self._thinned(self._first, self.bits)
            self._again = self._thinned(self._again, self.bits)

    @property
    def doubles(self) -> int:
        """Rows that hold what a row before them holds."""
        return sum(count for _, count in self._again.values()) << self.bits

    def examples(self) -> list[tuple[int, int]]:
        """Return the first few pairs of rows that hold the same."""
        pairs = ((self._first[digest], again[0]) for digest, again in self._again.items())
        return sorted(pairs)[:_EXAMPLES]

    def shared(self, other: "Digests") -> tuple[int, list[tuple[int, int]]]:
        """Return how many rows hold what rows of ``other`` hold, and the first few pairs of rows."""
        bits = max(self.bits, other.bits)
        found = [digest for digest in self._thinned(self._first, bits) if digest in other._first]
        rows = sum(1 + self._again.get(digest, (0, 0))[1] for digest in found)
        pairs = sorted((self._first[digest], other._first[digest]) for digest in found)
        return rows << bits, pairs[:_EXAMPLES]

    @staticmethod
    def _thinned(digests: dict[int, Any], bits: int) -> dict[int, Any]:
        mask = (1 << bits) - 1
        return {digest: value for digest, value in digests.items() if not digest & mask}


class Bars:
    """A histogram over fixed bars.

    Args:
        edges: where the bars begin; the last edge ends the last bar.
    """

    def __init__(self, edges: Sequence[int]) -> None:
        self._edges, self._counts = tuple(edges), [0] * (len(edges) - 1)

    def add(self, value: float) -> None:
        """Count a number."""
        bar = int(np.searchsorted(self._edges, value, "right")) - 1
        self._counts[min(max(bar, 0), len(self._counts) - 1)] += 1

    def histogram(self) -> LengthHistogram | None:
        """Return the bars up to the last one that holds anything, None if none does."""
        used = max((number + 1 for number, count in enumerate(self._counts) if count), default=0)
        if not used:
            return None
        return LengthHistogram(self._edges[: used + 1], tuple(self._counts[:used]))


class Names(Counter[str]):
    """Counts names; all that come after the first few hundred are one."""

    def add(self, name: str) -> None:
        """Count a name."""
        self[name if name in self or len(self) < _KEPT_NAMES else "(others)"] += 1
