"""A step of an LM in shapes that never change, for an accelerator to record once and to play again.

Embeddings [R, 1, D] in; what enters the LM's head [R, 1, hidden width] out. All inputs are copied into places
that stay, transformers' static cache holds the steps, and nothing waits for the device. The same step runs
unrecorded on any machine, where it is compared with an ordinary one.

Recording itself was never executed: it needs an accelerator, and none was at hand.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import LinearAttentionLayer, StaticLayer

from omni_adapter.backbone.caches import BackboneCache
from omni_adapter.backbone.inspection import class_name
from omni_adapter.backbone.probes import PROBE_STEPS, Tolerated, is_close, probe, sample
from omni_adapter.backbone.runner import BackboneOutput, Runner, Steps, taken, watched_inputs
from omni_adapter.errors import BackboneError

_RECORDABLE = (
    StaticLayer,
    LinearAttentionLayer,
)  # others count steps in Python, which a recording would freeze
_REHEARSALS = 3  # runs before a recording, in which libraries take the memory that they need
_CACHE_SLACK = 10.0  # as for cached steps in ``probes``


def static_cache(runner: Runner, *, name: str, rows: int, capacity: int) -> BackboneCache:
    """Return an empty cache whose shapes never change.

    Args:
        runner: the LM.
        name: argument of its forward that takes the cache.
        rows: rows B of the batch.
        capacity: steps that it can hold.

    Raises:
        BackboneError: if a layer of it counts steps in Python.
    """
    cache = StaticCache(config=runner.lm.config, max_cache_len=capacity)
    others = sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in _RECORDABLE})
    if others:
        raise BackboneError(
            f"steps of {class_name(runner.lm)} cannot be recorded: its cache has {', '.join(others)}; "
            "run it with caches of fixed size, which need no recording"
        )
    return BackboneCache({name: cache}, rows, steps=0)


def is_static(cache: BackboneCache) -> bool:
    """Whether a cache's shapes never change."""
    return any(type(state) is StaticCache for state in cache.states.values())


class StaticStep:
    """One step of an LM after a static cache, again and again.

    Args:
        runner: the LM.
        body: its body, which is run in its place.
        cache: a static cache after the prompt; it is written from now on.
        steps: the first step.
    """

    def __init__(self, runner: Runner, body: nn.Module, cache: BackboneCache, steps: Steps) -> None:
        ((name, state),) = cache.states.items()
        self._runner, self._body, self._name, self._state = runner, body, name, state
        rows, device = steps.embeddings.shape[0], steps.embeddings.device
        self._embeddings = torch.empty_like(steps.embeddings)
        self._positions = torch.empty(rows, 1, dtype=torch.long, device=device)
        self._mask: Tensor | None = None
        if steps.attention_mask is not None:  # padding is in front; what is not filled yet is never seen
            columns = steps.attention_mask.shape[1]
            self._mask = steps.attention_mask.new_ones(rows, state.get_max_length())
            self._mask[:, :columns] = steps.attention_mask
        self._hidden: Tensor | None = None
        self._tapped: Tensor | None = None
        self._graph: Any = None

    def __call__(self, steps: Steps, *, past: int) -> tuple[Tensor, Tensor]:
        """Run a step after ``past`` others; return its hidden and tapped states, [R, 1, hidden width].

        Both are overwritten by the next step.
        """
        self._embeddings.copy_(steps.embeddings)
        if steps.position_ids is not None:
            self._positions.copy_(steps.position_ids + self._runner.position_offset)
        else:
            self._positions.fill_(past + self._runner.position_offset)
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
        assert self._hidden is not None
        assert self._tapped is not None
        return self._hidden, self._tapped

    def record(self) -> None:
        """Record the step on the accelerator; from now on it is played. Never executed so far.

        Raises:
            BackboneError: if this torch cannot record.
        """
        if not hasattr(torch.accelerator, "Graph"):
            raise BackboneError(f"torch {torch.__version__} has no torch.accelerator.Graph; update torch")
        lengths = [layer.cumulative_length.clone() for layer in self._counting()]
        states = [state.clone() for state in self._overwritten()]
        stream: Any = torch.Stream(device=self._embeddings.device)
        with stream:
            for _ in range(_REHEARSALS):
                self._run()
        torch.accelerator.synchronize()
        graph = torch.accelerator.Graph()
        with stream, graph:
            self._run()
        for layer, length in zip(self._counting(), lengths, strict=True):
            layer.cumulative_length.copy_(length)
        for state, old in zip(self._overwritten(), states, strict=True):
            state.copy_(old)
        self._graph = graph

    def _run(self) -> None:
        """Run the body over what lies in the places of the inputs, into those of the outputs."""
        arguments = self._runner.accepted(
            attention_mask=self._mask, position_ids=self._positions, use_cache=True, return_dict=True
        )
        arguments |= {"inputs_embeds": self._embeddings.clone(), self._name: self._state}
        with watched_inputs(self._runner.tapped_norm) as inputs:
            hidden: Tensor = self._body(**taken(self._body, arguments)).last_hidden_state
        tapped = inputs[-1] if inputs else hidden
        if self._hidden is None or self._tapped is None:
            self._hidden, self._tapped = torch.empty_like(hidden), torch.empty_like(tapped)
        self._hidden.copy_(hidden)
        self._tapped.copy_(tapped)

    def _counting(self) -> list[StaticLayer]:
        """Layers that count their steps."""
        return [layer for layer in self._state.layers if isinstance(layer, StaticLayer)]

    def _overwritten(self) -> list[Tensor]:
        """States that every step overwrites."""
        layers = [layer for layer in self._state.layers if isinstance(layer, LinearAttentionLayer)]
        found = [(*layer.conv_states.values(), *layer.recurrent_states.values()) for layer in layers]
        return [state for states in found for state in states if state is not None]


def step(
    runner: Runner, body: nn.Module, cache: BackboneCache, steps: Steps
) -> tuple[BackboneCache, Tensor, Tensor]:
    """Run one step after a static cache, recorded where there is an accelerator.

    Returns:
        The cache for the next step, the hidden and the tapped states.
    """
    static = cache.step
    if static is None:
        static = StaticStep(runner, body, cache, steps)
        hidden, tapped = static(steps, past=cache.steps)
        if hidden.device.type != "cpu":
            static.record()  # after a step that ran as it is, with which everything has its place
    else:
        hidden, tapped = static(steps, past=cache.steps)
    return BackboneCache(cache.states, cache.rows, cache.steps + 1, step=static), hidden, tapped


@probe
def is_exact(runner: Runner, body: nn.Module, *, name: str) -> bool:
    """Compare steps in fixed shapes, unrecorded, with ordinary ones."""
    embeddings = sample(runner)
    half = PROBE_STEPS // 2
    with Tolerated():
        own = runner.run(Steps(embeddings[:, :half]), use_cache=True)
        cache: BackboneCache | None = static_cache(runner, name=name, rows=1, capacity=PROBE_STEPS)
        mask = torch.ones(1, PROBE_STEPS, dtype=torch.long, device=embeddings.device)
        prompt = Steps(embeddings[:, :half], mask[:, :half])
        found: BackboneOutput = runner.run(prompt, cache, use_cache=True)
        cache = found.cache
        static: StaticStep | None = None
        for index in range(half, PROBE_STEPS):
            new = Steps(embeddings[:, index : index + 1], mask[:, : index + 1])
            own = runner.run(new, own.cache, use_cache=True)
            assert cache is not None
            static = static or StaticStep(runner, body, cache, new)
            hidden, _ = static(new, past=index)
            if not is_close(hidden, own.hidden, runner=runner, slack=_CACHE_SLACK):
                return False
        return True
    return False
