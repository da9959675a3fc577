"""Layers of a transformers cache whose memory is taken once.

A cache that an LM made in; empty caches of the same kinds of layers out. Keys and values are written in place
and handed to attention as views of the filled part: shapes and numbers are those of transformers' own layers,
without a copy of all steps at each of them. Layers that hold a state instead of steps, such as convolutions
and recurrences, are of constant size as they are. Knows nothing of models.

    transformers' layer                     kept here as
    DynamicLayer                            FixedLayer         all steps
    DynamicSlidingWindowLayer               FixedWindowLayer   the steps of a window
    LinearAttentionLayer                    StateLayer         a state of constant size
    LinearAttentionAndFullAttentionLayer    FixedHybridLayer   both
    DummyLayer                              NothingLayer       nothing
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from omni_adapter.step_buffer import StepBuffer

_WINDOWS = 2  # windows of steps in a buffer, so that it is moved to its front once a window


class RowLayer(Protocol):
    """A layer whose rows come and go."""

    def keep_rows(self, indices: Sequence[int]) -> None:
        """Keep the rows ``indices``, which ascend, in place."""

    def join(self, other: Any) -> None:
        """Take the rows of a layer of the same class behind the own ones; all end at the same step."""

    def trim(self, steps: int) -> None:
        """Forget the first ``steps`` steps, which every row has as padding."""


class FixedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of all steps.

    Args:
        rows: rows to take memory for.
        capacity: steps to take memory for.
    """

    def __init__(self, *, rows: int, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._hold(rows, capacity)

    def _hold(self, rows: int, capacity: int) -> None:
        """Make the buffers; their memory is taken when the first keys come."""
        self.key_buffer = StepBuffer(rows=rows, capacity=capacity)
        self.value_buffer = StepBuffer(rows=rows, capacity=capacity)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values of new steps; return those of all.

        Args:
            key_states: [B, H, S, W].
            value_states: likewise.
            args: other things that transformers passes.
            kwargs: likewise.

        Raises:
            ContextOverflowError: if they go beyond the capacity.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self.key_buffer.append(key_states)
        self.values = self.value_buffer.append(value_states)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget everything but the memory."""
        super().reset()
        self._each(StepBuffer.clear)
        self.keys = self.values = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last steps; their number is given below zero, as transformers does."""
        self._each(lambda buffer: buffer.crop(-tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Gather rows into memory of their own."""
        self.key_buffer = self.key_buffer.selected(beam_idx)
        self.value_buffer = self.value_buffer.selected(beam_idx)
        self._look()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Gather rows into memory of their own."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        rows = torch.arange(self.key_buffer.rows)
        self.reorder_cache(rows.repeat_interleave(repeats))

    def keep_rows(self, indices: Sequence[int]) -> None:
        """Keep the rows ``indices``, which ascend, in place."""
        self._each(lambda buffer: buffer.keep_rows(indices))

    def join(self, other: "FixedLayer") -> None:
        """Take the rows of ``other`` behind the own ones; all end at the same step."""
        if not self.is_initialized and other.keys is not None and other.values is not None:
            self.lazy_initialization(other.keys, other.values)
        self.key_buffer.join(other.key_buffer)
        self.value_buffer.join(other.value_buffer)
        self._look()

    def trim(self, steps: int) -> None:
        """Forget the first ``steps`` steps, which every row has as padding."""
        if self.is_initialized:
            self._each(lambda buffer: buffer.trim(steps))

    def _each(self, change: Callable[[StepBuffer], None]) -> None:
        """Change both buffers."""
        change(self.key_buffer)
        change(self.value_buffer)
        self._look()

    def _look(self) -> None:
        """Let keys and values be what the buffers hold."""
        if self.is_initialized:
            self.keys, self.values = self.key_buffer.filled, self.value_buffer.filled


class FixedWindowLayer(FixedLayer, DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """Keys and values of the last steps, one fewer than the window, as the newest step is the window's last.

    Args:
        rows: rows to take memory for.
        capacity: steps that the layers without a window take memory for.
        window: steps that a step sees, itself included.
    """

    def __init__(self, *, rows: int, capacity: int, window: int) -> None:
        DynamicSlidingWindowLayer.__init__(self, sliding_window=window)
        self._hold(rows, min(capacity, _WINDOWS * window))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values of new steps; return those of the window before them and theirs.

        Args:
            key_states: [B, H, S, W].
            value_states: likewise.
            args: other things that transformers passes.
            kwargs: likewise.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        keys = self._append(self.key_buffer, key_states)
        values = self._append(self.value_buffer, value_states)
        self._look()
        return keys, values

    def _append(self, buffer: StepBuffer, new: Tensor) -> Tensor:
        """Write new steps; return the window before them and them; keep what the next step can see."""
        kept = self.sliding_window - 1
        capacity = buffer.capacity
        assert capacity is not None
        if buffer.steps + new.shape[2] <= capacity:
            everything = buffer.append(new)
        else:  # a long prompt, of which the window is the end
            past = buffer.filled
            everything = new if past is None else torch.cat([past, new], dim=2)
            buffer.clear()
            buffer.append(everything[:, :, max(0, everything.shape[2] - kept) :])
        buffer.trim(max(0, buffer.steps - kept))
        return everything

    def activate_past_recording(self) -> None:
        """Nothing, as steps that left the window are gone."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last steps, as long as none left the window.

        Raises:
            RuntimeError: as transformers' layer does, if some did.
        """
        if self.cumulative_length >= self.sliding_window:
            raise RuntimeError("steps that left the attention window cannot come back")
        FixedLayer.crop(self, tokens_to_remove)
        self.cumulative_length += tokens_to_remove

    def join(self, other: FixedLayer) -> None:
        """Take the rows of ``other`` behind the own ones; all end at the same step."""
        assert isinstance(other, FixedWindowLayer)
        super().join(other)
        self.cumulative_length = max(self.cumulative_length, other.cumulative_length)

    def trim(self, steps: int) -> None:
        """Forget the first ``steps`` steps, of which some may have left the window already."""
        self.cumulative_length -= steps
        super().trim(max(0, self.key_buffer.steps - self.cumulative_length))


class StateLayer(LinearAttentionLayer):
    """States of constant size: convolutions and recurrences, as transformers keeps them.

    Args:
        number_of_states: states of each kind in this layer.
    """

    def __init__(self, *, number_of_states: int) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def keep_rows(self, indices: Sequence[int]) -> None:
        """Keep the rows ``indices``."""
        LinearAttentionLayer.reorder_cache(self, torch.tensor(indices, dtype=torch.long))  # type: ignore[arg-type]

    def join(self, other: "StateLayer") -> None:
        """Take the rows of ``other`` behind the own ones; a state knows no steps to align."""
        self.device, self.dtype = self.device or other.device, self.dtype or other.dtype
        for index in range(self.number_of_states):
            for mine, theirs in (
                (self.conv_states, other.conv_states),
                (self.recurrent_states, other.recurrent_states),
            ):
                pair = [state for state in (mine[index], theirs[index]) if state is not None]
                mine[index] = torch.cat(pair) if pair else None
            for name in (
                "is_conv_states_initialized",
                "is_recurrent_states_initialized",
                "has_previous_state",
                "conv_kernel_size",
            ):
                mine, theirs = getattr(self, name), getattr(other, name)
                mine[index] = mine[index] or theirs[index]

    def trim(self, steps: int) -> None:
        """Nothing: a state holds no single steps."""


class FixedHybridLayer(  # type: ignore[misc, override, no-untyped-call]  # transformers' own mix of bases
    StateLayer, FixedLayer, LinearAttentionAndFullAttentionLayer
):
    """A state and keys and values beside it.

    Args:
        rows: rows to take memory for.
        capacity: steps to take memory for.
        number_of_states: states of each kind in this layer.
    """

    is_compileable = False

    def __init__(self, *, rows: int, capacity: int, number_of_states: int) -> None:
        LinearAttentionAndFullAttentionLayer.__init__(self, number_of_states=number_of_states)
        self._hold(rows, capacity)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Note type and device of keys, or make a state."""
        LinearAttentionAndFullAttentionLayer.lazy_initialization(self, *args, **kwargs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Gather rows into memory of their own."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]
        FixedLayer.reorder_cache(self, beam_idx)

    def keep_rows(self, indices: Sequence[int]) -> None:
        """Keep the rows ``indices``."""
        StateLayer.keep_rows(self, indices)
        FixedLayer.keep_rows(self, indices)

    def join(self, other: Any) -> None:
        """Take the rows of ``other`` behind the own ones; all end at the same step."""
        StateLayer.join(self, other)
        FixedLayer.join(self, other)

    def trim(self, steps: int) -> None:
        """Forget the first ``steps`` steps of keys and values."""
        FixedLayer.trim(self, steps)


class NothingLayer(DummyLayer):
    """No state at all."""

    def keep_rows(self, indices: Sequence[int]) -> None:
        """Nothing."""

    def join(self, other: Any) -> None:
        """Nothing."""

    def trim(self, steps: int) -> None:
        """Nothing."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a cache that an LM made.

    Attributes:
        make: makes an empty one for rows and capacity.
        step_bytes: bytes of a row's keys and values of one step.
        window: steps that a step sees; None for all.
        state_bytes: bytes of a row's state.
        other_bytes: bytes that do not depend on rows and steps.
    """

    make: Callable[[int, int], RowLayer]
    step_bytes: int = 0
    window: int | None = None
    state_bytes: int = 0
    other_bytes: int = 0

    def nbytes(self, rows: int, capacity: int) -> int:
        """Bytes that the layer takes at most."""
        steps = capacity if self.window is None else min(capacity, _WINDOWS * self.window)
        return rows * (steps * self.step_bytes + self.state_bytes) + self.other_bytes


@dataclass(frozen=True)
class CachePlan:
    """A cache that an LM made, as it can be made again with its memory fixed.

    Attributes:
        name: argument of the LM's forward that takes it.
        layers: its layers.
    """

    name: str
    layers: tuple[LayerPlan, ...]

    def make(self, rows: int, capacity: int) -> Cache:
        """Return an empty cache."""
        cache = DynamicCache()
        cache.layers = [layer.make(rows, capacity) for layer in self.layers]  # type: ignore[misc]
        cache.layer_class_to_replicate = None
        return cache

    def nbytes(self, rows: int, capacity: int) -> int:
        """Bytes that the cache takes at most."""
        return sum(layer.nbytes(rows, capacity) for layer in self.layers)


def plan_cache(states: dict[str, Any], *, rows: int) -> CachePlan | None:
    """Read off a cache that an LM made how to make it with fixed memory; None if it is of an unknown kind.

    Args:
        states: what the LM returned, by argument name, after a few steps.
        rows: rows of its batch.
    """
    if len(states) != 1:
        return None
    ((name, cache),) = states.items()
    if type(cache) is not DynamicCache or cache.offloading:
        return None
    layers = [_plan_layer(layer, rows) for layer in cache.layers]
    known = tuple(layer for layer in layers if layer is not None)
    return CachePlan(name, known) if layers and len(known) == len(layers) else None


def _plan_layer(layer: Any, rows: int) -> LayerPlan | None:
    """How to make one layer; None if it is of an unknown class."""
    kind = type(layer)
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    step_bytes = 0
    if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.numel():
        step_bytes = (keys.nbytes + values.nbytes) // (rows * keys.shape[2])
    if kind is DynamicLayer:
        return LayerPlan(lambda rows, capacity: FixedLayer(rows=rows, capacity=capacity), step_bytes)
    if kind is DynamicSlidingWindowLayer:
        window: int = layer.sliding_window
        return LayerPlan(
            lambda rows, capacity: FixedWindowLayer(rows=rows, capacity=capacity, window=window),
            step_bytes,
            window,
            other_bytes=layer._sliding_window_tensor.nbytes,
        )
    if kind is DummyLayer:
        return LayerPlan(lambda rows, capacity: NothingLayer())  # type: ignore[no-untyped-call]
    if kind not in (LinearAttentionLayer, LinearAttentionAndFullAttentionLayer):
        return None
    count: int = layer.number_of_states
    tensors = (*layer.conv_states.values(), *layer.recurrent_states.values())
    state_bytes = sum(state.nbytes for state in tensors if state is not None) // rows
    if kind is LinearAttentionLayer:
        return LayerPlan(lambda rows, capacity: StateLayer(number_of_states=count), state_bytes=state_bytes)
    return LayerPlan(
        lambda rows, capacity: FixedHybridLayer(rows=rows, capacity=capacity, number_of_states=count),
        step_bytes,
        state_bytes=state_bytes,
    )
