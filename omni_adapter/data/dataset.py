"""Rows of many sources, mixed by weight, in an order that is a pure function of seed and position.

Source settings in, batches out. Knows nothing of file formats or models.

    position -> Mixture.place -> source and its own position -> shuffled index -> row -> Sample -> batch

No draw comes from the global random state, and nothing depends on the number of worker processes. Ranks share
the positions of each window among them, so that two ranks see together what one rank would see alone.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch.utils.data import DataLoader, Dataset, Sampler

from omni_adapter.audio.clips import Frames
from omni_adapter.config import NotNegative, Positive
from omni_adapter.data.collator import Batch, Sample, collate
from omni_adapter.data.layout import GridRules
from omni_adapter.data.packing import bucket, collate_packed, pack
from omni_adapter.data.rows import Rejects, Row, parse_row
from omni_adapter.data.sources import SourceSpec, Stream, mix, open_sources, rename
from omni_adapter.errors import DataError, RowError

_BLOCK = 1000  # positions in which every source has its exact share
_AHEAD = 32  # samples that each worker makes ahead at most
_ATTEMPTS = 20  # rows that are tried for one position
_ROUNDS = 4  # of the Feistel network that shuffles


class Place(NamedTuple):
    """A source's number, and the position within it."""

    source: int
    position: int


class Mixture:
    """Sources mixed by weight into one endless sequence of rows.

    In every 1000 positions each source has its share by weight, to a thousandth and at least once. A source
    is gone through in shuffled passes.

    Args:
        specs: settings of the sources.
        seed: decides order and mixture.

    Raises:
        DataError: if there are no sources, or one cannot be used.
    """

    def __init__(self, specs: Sequence[SourceSpec], *, seed: int = 0) -> None:
        if not 0 < len(specs) <= _BLOCK:
            raise DataError(f"a mixture has 1 to {_BLOCK} sources, got {len(specs)}")
        self.specs, self.seed = tuple(specs), seed
        self.sources = open_sources(specs, seeds=[mix(seed, number) for number in range(len(specs))])
        self._quotas = _quotas([spec.weight for spec in specs], _BLOCK)
        self._order = lru_cache(maxsize=4)(self._block_order)

    @property
    def lost_rows(self) -> int:
        """Rows in damaged parts of files, which no position leads to."""
        return sum(source.lost_rows for source in self.sources)

    @property
    def epoch_length(self) -> int | None:
        """Positions in which every source is seen whole at least once; None with streams among them."""
        if any(isinstance(source, Stream) for source in self.sources):
            return None
        if len(self.sources) == 1:
            return self._length(0)
        passes = (
            math.ceil(self._length(number) * _BLOCK / quota) for number, quota in enumerate(self._quotas)
        )
        return max(passes)

    def place(self, position: int) -> Place:
        """Return which source serves ``position``, and which of its own positions that is."""
        if len(self.sources) == 1:
            return Place(0, position)
        block, offset = divmod(position, _BLOCK)
        source, earlier = self._order(block)[offset]
        return Place(source, block * self._quotas[source] + earlier)

    def read(self, position: int, *, attempt: int = 0) -> Row:
        """Return the row at ``position``, or the ``attempt``-th other row of its source to stand in for it.

        Raises:
            RowError: if the row cannot serve.
        """
        number, own = self.place(position)
        source, spec = self.sources[number], self.specs[number]
        if isinstance(source, Stream):
            values, index = source.read(own, attempt), own - attempt
        else:
            index = self._index(number, own, attempt)
            values = source[index]
        return parse_row(rename(values, spec), task=spec.task, name=f"{spec.path}#{index}", root=source.root)

    def fingerprint(self) -> dict[str, Any]:
        """Return what the sequence depends on, as plain JSON; equal fingerprints give equal sequences."""
        return {
            "seed": self.seed,
            "sources": [
                {
                    "path": spec.path,
                    "task": spec.task,
                    "weight": spec.weight,
                    "limit": spec.limit,
                    "shuffle": spec.shuffle,
                    "rows": None if isinstance(source, Stream) else len(source),
                    "sha256": source.fingerprint(),
                }
                for spec, source in zip(self.specs, self.sources, strict=True)
            ],
        }

    def _length(self, number: int) -> int:
        source, limit = self.sources[number], self.specs[number].limit
        assert not isinstance(source, Stream)
        return min(len(source), limit) if limit else len(source)

    def _index(self, number: int, position: int, attempt: int) -> int:
        """Row of a source for one of its positions."""
        length = self._length(number)
        epoch, index = divmod(position, length)
        if attempt:
            return mix(self.seed, number, position, attempt) % length
        if not self.specs[number].shuffle:
            return index
        return shuffled(index, length=length, key=mix(self.seed, number, epoch))

    def _block_order(self, block: int) -> list[Place]:
        """Source of each position of a block, and how many of its positions came before in the block."""
        sources = [number for number, quota in enumerate(self._quotas) for _ in range(quota)]
        order = [sources[shuffled(i, length=_BLOCK, key=mix(self.seed, -1, block))] for i in range(_BLOCK)]
        seen = [0] * len(self._quotas)
        places = []
        for source in order:
            places.append(Place(source, seen[source]))
            seen[source] += 1
        return places


@pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Batching:
    """How samples become batches.

    Args:
        mode: ``pad`` takes them as they come; ``bucket`` puts similar lengths together; ``pack`` puts several
            into one row.
        batch_size: rows of a batch on one rank.
        max_steps: longest sample that is taken, and the length of packed rows; needed by ``pack``.
        window: samples of one rank among which ``bucket`` and ``pack`` choose; None for 32 batches.
    """

    mode: Literal["pad", "bucket", "pack"] = "pad"
    batch_size: Positive = 1
    max_steps: Positive | None = None
    window: Positive | None = None

    def __post_init__(self) -> None:
        if self.mode == "pack" and self.max_steps is None:
            raise ValueError('mode "pack" needs max_steps, the length of a packed row')

    @property
    def window_size(self) -> int:
        """Samples of one rank that are made into batches together."""
        return self.batch_size if self.mode == "pad" else self.window or 32 * self.batch_size


@dataclass
class LoaderState:
    """Where a loader stands: everything before was consumed, whatever workers have read ahead.

    Attributes:
        window: windows that are through.
        batch: batches of the current window that were given out.
        samples: samples given out so far on this rank.
    """

    window: int = 0
    batch: int = 0
    samples: int = 0


class Fetched(NamedTuple):
    """What became of one position: a sample, and the rejects that it stands in for."""

    sample: Sample | None
    rejects: tuple[tuple[str, str], ...]


class BatchLoader:
    """Endless batches of one rank, the same for any number of workers, resumed where they were consumed.

    In mode ``pad`` the batches of all ranks at one step are, in order of rank, what one rank with a batch as
    large would see; in the other modes that holds for each window.

    Args:
        mixture: where rows come from.
        to_sample: makes a sample of a row; runs in the workers.
        rules: ids that padding is made of.
        batching: how samples become batches.
        rank: number of this process.
        world: number of processes.
        workers: processes that make samples ahead; 0 makes them here.
        rejects: counts rows; its limit stops the run.
    """

    def __init__(
        self,
        mixture: Mixture,
        to_sample: Callable[[Row], Sample],
        *,
        rules: GridRules,
        batching: Batching,
        rank: int = 0,
        world: int = 1,
        workers: NotNegative = 0,
        rejects: Rejects | None = None,
    ) -> None:
        if not 0 <= rank < world:
            raise DataError(f"rank must lie in 0..{world - 1}, got {rank}")
        self.mixture, self.rules, self.batching = mixture, rules, batching
        self.rank, self.world, self.workers = rank, world, workers
        self.rejects = Rejects() if rejects is None else rejects
        self.state = LoaderState()
        self._samples = _Samples(mixture, to_sample)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from where ``state`` stands; a batch counts as consumed once it is given out."""
        ahead = max(2, min(_AHEAD, -(-2 * self._size // max(1, self.workers))))
        fetched = iter(
            DataLoader(
                self._samples,
                sampler=_Positions(self),
                batch_size=None,
                num_workers=self.workers,
                prefetch_factor=ahead if self.workers else None,
                collate_fn=_as_is,
                generator=torch.Generator(),  # keeps the loader from drawing on the global one
            )
        )
        resumed, first = self.state.window, self.state.batch
        while True:
            window = [self._take(next(fetched), count=self.state.batch == 0) for _ in range(self._size)]
            batches = self._batches(window, self.state.window)
            for number in range(first if self.state.window == resumed else 0, len(batches)):
                batch, count = batches[number], len(batches[number].ids)
                last = number + 1 == len(batches)
                self.state = LoaderState(
                    self.state.window + last, 0 if last else number + 1, self.state.samples + count
                )
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader stands, as plain JSON."""
        return {
            "window": self.state.window,
            "batch": self.state.batch,
            "samples": self.state.samples,
            "world": self.world,
            "window_size": self._size,
            "rejects": self.rejects.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned.

        Raises:
            DataError: if it comes from another number of ranks or another batching, where positions mean
                something else.
        """
        for name, own in (("world", self.world), ("window_size", self._size)):
            if state[name] != own:
                raise DataError(
                    f"the data were left with {name} {state[name]}, now it is {own}; resume with the same"
                )
        self.state = LoaderState(int(state["window"]), int(state["batch"]), int(state["samples"]))
        self.rejects.load_state_dict(state["rejects"])

    @property
    def _size(self) -> int:
        return self.batching.window_size

    def _take(self, fetched: Fetched, *, count: bool) -> Sample:
        """Count what became of a position; a window that is gone through again was counted before."""
        if count:
            for reason, message in fetched.rejects:
                self.rejects.reject(RowError(message, reason=reason))
            self.rejects.take(fetched.sample is not None)
        if fetched.sample is None:
            raise DataError(f"{_ATTEMPTS} rows in a row were rejected:\n{self.rejects.report()}")
        return _owned(fetched.sample) if self.workers else fetched.sample

    def _batches(self, window: Sequence[Sample], number: int) -> list[Batch]:
        """Make the batches of one window."""
        size, mode = self.batching.batch_size, self.batching.mode
        lengths = [sample.layout.grid.shape[1] for sample in window]
        if mode == "pack":
            assert self.batching.max_steps is not None
            rows = [
                [window[index] for index in row] for row in pack(lengths, max_steps=self.batching.max_steps)
            ]
            return [
                collate_packed(rows[start : start + size], rules=self.rules)
                for start in range(0, len(rows), size)
            ]
        groups = [list(range(len(window)))]
        if mode == "bucket":
            seed = mix(self.mixture.seed, number, self.rank) % (1 << 63)
            groups = bucket(lengths, batch_size=size, generator=torch.Generator().manual_seed(seed))
        return [
            collate([window[index] for index in group], rules=self.rules, side="right") for group in groups
        ]


class LengthHistogram(NamedTuple):
    """How many samples have how many steps.

    Attributes:
        edges: first length of each bar, and the first length above the last bar.
        counts: samples of each bar.
    """

    edges: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], *, bars: int = 10) -> "LengthHistogram":
        """Count lengths in bars of equal width."""
        if not lengths:
            raise DataError("there are no samples to count")
        low, high = min(lengths), max(lengths) + 1
        width = max(1, math.ceil((high - low) / bars))
        edges = tuple(range(low, high + width, width))
        counts = [0] * (len(edges) - 1)
        for length in lengths:
            counts[(length - low) // width] += 1
        return cls(edges, tuple(counts))

    def __str__(self) -> str:
        widest = max(self.counts)
        rows = zip(self.edges[:-1], self.edges[1:], self.counts, strict=True)
        return "\n".join(
            f"{low:>6}-{high - 1:<6} {'█' * math.ceil(30 * count / widest):<30} {count}"
            for low, high, count in rows
        )


def sample_lengths(
    mixture: Mixture, to_sample: Callable[[Row], Sample], *, count: int = 200
) -> tuple[list[int], Rejects]:
    """Return the steps of the first ``count`` samples, and what was rejected among them."""
    rejects, lengths, samples = Rejects(limit=1.0), [], _Samples(mixture, to_sample)
    for position in range(count):
        fetched = samples[position]
        for reason, message in fetched.rejects:
            rejects.reject(RowError(message, reason=reason))
        if fetched.sample is not None:
            rejects.take()
            lengths.append(fetched.sample.layout.grid.shape[1])
    return lengths, rejects


def shuffled(index: int, *, length: int, key: int) -> int:
    """Return where ``index`` goes in a permutation of ``range(length)`` that ``key`` picks.

    A Feistel network over the next even number of bits, walked until it lands inside: no table, so that a
    source of any size is shuffled without memory.
    """
    half = max(1, -(-(length - 1).bit_length() // 2))
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (mix(key, turn, right) & mask)
        index = left << half | right
        if index < length:
            return index


class _Samples(Dataset[Fetched]):
    """Samples by position; the first row of a position's source that serves."""

    def __init__(self, mixture: Mixture, to_sample: Callable[[Row], Sample]) -> None:
        self._mixture, self._to_sample = mixture, to_sample

    def __getitem__(self, position: int) -> Fetched:
        rejects: list[tuple[str, str]] = []
        for attempt in range(_ATTEMPTS):
            try:
                with _one_thread():
                    sample = self._to_sample(self._mixture.read(position, attempt=attempt))
                return Fetched(sample, tuple(rejects))
            except RowError as error:
                rejects.append((error.reason, str(error)))
        return Fetched(None, tuple(rejects))


class _Positions(Sampler[int]):
    """Positions of one rank, window by window, from where its loader stands."""

    def __init__(self, loader: BatchLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[int]:
        loader, size = self._loader, self._loader._size
        window = loader.state.window
        while True:
            start = (window * loader.world + loader.rank) * size
            yield from range(start, start + size)
            window += 1


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread inside, as in a worker: the number of threads changes the last bits of sums."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _owned(sample: Sample) -> Sample:
    """A copy in memory of this process: a tensor from a worker holds a file open, and a window has many."""
    layout = sample.layout._replace(grid=sample.layout.grid.clone(), labels=sample.layout.labels.clone())
    recordings = tuple(
        recording._replace(values=recording.values.clone())
        if isinstance(recording, Frames)
        else tuple(window._replace(values=window.values.clone()) for window in recording)
        for recording in sample.recordings
    )
    return sample._replace(layout=layout, recordings=recordings)


def _as_is(fetched: Any) -> Any:
    return fetched


def _quotas(weights: Sequence[float], total: int) -> list[int]:
    """Whole shares of ``total`` by weight, at least one each, by the largest remainder."""
    spare = total - len(weights)
    exact = [weight / sum(weights) * total for weight in weights]
    floors = [max(1, math.floor(share)) for share in exact]
    order = np.argsort(
        [floor - share for floor, share in zip(floors, exact, strict=True)], kind="stable"
    ).tolist()
    assert spare >= 0
    while (missing := total - sum(floors)) > 0:
        for number in order[:missing]:
            floors[number] += 1
    while sum(floors) > total:
        floors[floors.index(max(floors))] -= 1
    return floors
