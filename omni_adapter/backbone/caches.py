"""What an LM hands from one step to the next, and rows of it.

A cache of B rows and indices [n] in, a cache of n rows out. Goes by the shapes of the tensors that it finds.
Rows join and steps are forgotten in caches of fixed size, whose layers know how. Knows no other kind of cache
but transformers' base class, which can reorder itself, and nothing of models.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from omni_adapter.backbone.fixed import CachePlan, RowLayer
from omni_adapter.errors import BackboneError


@dataclass
class BackboneCache:
    """State of an LM after some steps. Opaque to callers: the next ``forward`` that gets it consumes it.

    Args:
        states: what the LM returned, by the argument name under which it takes it back.
        rows: rows B of the batch that it belongs to.
        steps: steps that it has seen, padding included.
        capacity: steps that it can hold, in memory taken once; None if it grows.
        step: what runs its next step, if its shapes never change.
    """

    states: dict[str, Any]
    rows: int
    steps: int
    capacity: int | None = None
    step: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes held, room for rows and steps to come included."""
        held: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return tensor

        _rebuild(self.states, count, {})
        return sum(held.values())


def make(plan: CachePlan, *, rows: int, capacity: int) -> BackboneCache:
    """Return an empty cache of fixed size."""
    return BackboneCache({plan.name: plan.make(rows, capacity)}, rows, steps=0, capacity=capacity)


def select_rows(cache: BackboneCache, indices: Tensor) -> BackboneCache:
    """Gather rows of a cache: repeat, reorder or drop them.

    Args:
        cache: stays as it is.
        indices: int64 rows of ``cache``, [n].

    Returns:
        A cache of n rows that shares no memory with ``cache``.
    """
    states = {name: _select(value, cache.rows, indices) for name, value in cache.states.items()}
    return BackboneCache(states, len(indices), cache.steps, cache.capacity)


def keep_rows(cache: BackboneCache, indices: Sequence[int]) -> BackboneCache:
    """Drop rows of a cache of fixed size in place.

    Without any row left it is an empty place for rows to ``join``; it keeps its number of steps, which
    ``trim`` can take back.

    Args:
        cache: it is consumed.
        indices: rows that stay, ascending.

    Raises:
        BackboneError: if the cache is of no fixed size.
    """
    for layer in _layers(cache):
        layer.keep_rows(indices)
    return BackboneCache(cache.states, len(indices), cache.steps, cache.capacity)


def join(first: BackboneCache, second: BackboneCache) -> BackboneCache:
    """Put the rows of two caches into one, so that all end at the same step.

    Rows with fewer steps get columns in front, which the caller's ``attention_mask`` must mask from then on;
    positions are in the keys already. The rows are written into the room that ``first`` has left; if it has
    none, it gets more. The result can hold as many steps as ``first``.

    Args:
        first: it is consumed; a fresh cache, unless it was left without rows, cannot be joined to.
        second: of the same LM; it is consumed.

    Returns:
        The rows of ``first`` and then those of ``second``.

    Raises:
        BackboneError: if a cache is of no fixed size, as that of an LM whose state is no list of steps.
        ContextOverflowError: if ``second`` has more steps than ``first`` can hold.
    """
    assert first.steps or not first.rows, "rows that have seen no step cannot be joined to"
    for layer, other in zip(_layers(first), _layers(second), strict=True):
        layer.join(other)
    steps = max(first.steps, second.steps)
    return BackboneCache(first.states, first.rows + second.rows, steps, first.capacity)


def trim(cache: BackboneCache, steps: int) -> BackboneCache:
    """Forget the first ``steps`` columns of a cache of fixed size, where all rows have padding.

    Args:
        cache: it is consumed.
        steps: columns to forget.

    Raises:
        BackboneError: if the cache is of no fixed size.
    """
    for layer in _layers(cache):
        layer.trim(steps)
    return BackboneCache(cache.states, cache.rows, cache.steps - steps, cache.capacity)


def _layers(cache: BackboneCache) -> list[RowLayer]:
    """Layers of a cache of fixed size."""
    if cache.capacity is None:
        kinds = ", ".join(sorted(type(state).__name__ for state in cache.states.values()))
        raise BackboneError(
            f"rows can join and leave caches of fixed size only, got {kinds}; make it with "
            "Backbone.new_cache, and run the rows apart where that gives None"
        )
    ((_, state),) = cache.states.items()
    layers: list[RowLayer] = state.layers
    return layers


def _select(value: Any, rows: int, indices: Tensor) -> Any:
    """Copy a state of any kind, taking ``indices`` of its ``rows``."""
    untouched: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        untouched.add(id(tensor))
        return tensor

    def take(tensor: Tensor) -> Tensor:
        return _take(tensor, rows, indices) if id(tensor) in untouched else tensor

    clone = _rebuild(value, note, {})
    if isinstance(clone, Cache):
        clone.reorder_cache(indices)  # type: ignore[arg-type]  # knows where its own layers keep the batch
    return _rebuild(clone, take, {})  # what is left: tensors that layers hold beside keys and values


def _rebuild(value: Any, change: Callable[[Tensor], Tensor], done: dict[int, Any]) -> Any:
    """Copy the containers of a state, with ``change`` of each tensor in them.

    Args:
        value: a tensor, a container of any kind, or anything else, which is kept as it is.
        change: called once for each tensor, however often it occurs.
        done: results by the id of what they were made from.
    """
    if id(value) in done:
        return done[id(value)]
    result = value
    if isinstance(value, Tensor):
        result = change(value)
    elif isinstance(value, (list, tuple)):
        items = [_rebuild(item, change, done) for item in value]
        result = items if isinstance(value, list) else tuple(items)
    elif isinstance(value, dict):
        result = {key: _rebuild(item, change, done) for key, item in value.items()}
    elif _is_container(value):
        result = done[id(value)] = copy.copy(value)  # first, as objects may point to one another
        vars(result).update({key: _rebuild(item, change, done) for key, item in vars(value).items()})
    done[id(value)] = result
    return result


def _is_container(value: Any) -> bool:
    """Whether ``value`` is an object that may hold tensors of a cache."""
    foreign = (nn.Module, PreTrainedConfig, type)
    return hasattr(value, "__dict__") and not isinstance(value, foreign) and not callable(value)


def _take(tensor: Tensor, rows: int, indices: Tensor) -> Tensor:
    """Take ``indices`` along the batch, the first dimension of that size; a copy if there is none."""
    for dimension, size in enumerate(tensor.shape):
        if size == rows:
            return tensor.index_select(dimension, indices.to(tensor.device))
    return tensor.clone()
