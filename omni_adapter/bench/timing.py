"""Times of pieces of work, taken in turns, so that whatever else the machine does hits all of them alike."""

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Contestant = Callable[[], float]
"""Does its work once and returns the seconds that it took."""


@dataclass(frozen=True)
class Spread:
    """Several times of one thing.

    Attributes:
        median_s: seconds.
        min_s: likewise.
        max_s: likewise.
        n: how many.
    """

    median_s: float
    min_s: float
    max_s: float
    n: int

    @classmethod
    def of(cls, times: Collection[float]) -> "Spread":
        """Summarise times, of which there must be one at least."""
        return cls(statistics.median(times), min(times), max(times), len(times))


class Stopwatch:
    """Seconds of a ``with`` block, in ``seconds`` once it is over."""

    seconds = 0.0


@contextmanager
def stopwatch(device: torch.device) -> Iterator[Stopwatch]:
    """Time a block; what was given to an accelerator before and in it is waited for."""
    watch = Stopwatch()
    _synchronise(device)
    started_s = time.perf_counter()
    yield watch
    _synchronise(device)
    watch.seconds = time.perf_counter() - started_s


def timer(action: Callable[[], object], device: torch.device) -> Contestant:
    """Make a contestant of a piece of work."""

    def contestant() -> float:
        with stopwatch(device) as watch:
            action()
        return watch.seconds

    return contestant


def interleave(
    contestants: Mapping[str, Contestant],
    *,
    rounds: int,
    repeats: int = 1,
    warm_up: int = 1,
    first_round: int = 0,
) -> dict[str, list[float]]:
    """Time all contestants in turns; each round begins with another of them.

    Args:
        contestants: by name.
        rounds: turns of each.
        repeats: times that are taken in a turn.
        warm_up: times before the first round that do not count.
        first_round: its number, which decides who begins.
    """
    names: Sequence[str] = list(contestants)
    for name in names:
        for _ in range(warm_up):
            contestants[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(first_round, first_round + rounds):
        first = turn % len(names) if names else 0
        for name in (*names[first:], *names[:first]):
            times[name] += [contestants[name]() for _ in range(repeats)]
    return times


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
