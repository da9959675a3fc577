"""What an LM hands from one step to the next, and rows of it.

A cache of B rows and indices [n] in, a cache of n rows out. Goes by the shapes of the tensors that it finds.
Knows no kind of cache but transformers' base class, which can reorder itself, and nothing of models.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig


@dataclass
class BackboneCache:
    """State of an LM after some steps. Opaque to callers: the next ``forward`` that gets it consumes it.

    Args:
        states: what the LM returned, by the argument name under which it takes it back.
        rows: rows B of the batch that it belongs to.
        steps: steps that it has seen, padding included.
    """

    states: dict[str, Any]
    rows: int
    steps: int


def select_rows(cache: BackboneCache, indices: Tensor) -> BackboneCache:
    """Gather rows of a cache: repeat, reorder or drop them.

    Args:
        cache: stays as it is.
        indices: int64 rows of ``cache``, [n].

    Returns:
        A cache of n rows that shares no memory with ``cache``.
    """
    states = {name: _select(value, cache.rows, indices) for name, value in cache.states.items()}
    return BackboneCache(states, rows=len(indices), steps=cache.steps)


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
