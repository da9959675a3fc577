"""One pass of an LM over embeddings.

Steps in, [B, S, D] with mask and positions; logits [B, S, V], the hidden state that enters the head [B, S,
hidden width] and a cache out. Gives each LM the arguments that it takes, and runs those that keep no state
again from the start. Knows nothing of whether what comes out is right: that is for ``probes``.
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from omni_adapter.backbone.caches import BackboneCache
from omni_adapter.backbone.inspection import class_name, find_bodies, inspect_base
from omni_adapter.errors import BackboneError
from omni_adapter.vocab import NO_TEXT


class BackboneOutput(NamedTuple):
    """What one pass of the LM returns."""

    logits: Tensor  # [B, S or logits_to_keep, V], by the LM's own head
    hidden: Tensor  # [B, S, hidden width], what enters the LM head, at all positions
    cache: BackboneCache | None
    tapped: Tensor  # [B, S, hidden width], ``hidden``, or what enters the final norm if that is tapped


class BodyCall(NamedTuple):
    """One call of a module that may be the LM's body."""

    module: nn.Module
    output_class: type[Any]
    hidden: Tensor  # [B, S, hidden width]


@dataclass(frozen=True)
class Steps:
    """What goes into one pass.

    Args:
        embeddings: [B, S, D].
        attention_mask: 1 for steps and 0 for padding on the left, [B, past + S]; None if nothing is padded.
        position_ids: position of each step, from 0, [B, S]; None if they follow from the mask.
    """

    embeddings: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None

    def one(self, index: int, *, past: int) -> "Steps":
        """The step at ``index``, after ``past`` steps and those before it."""
        mask, positions = self.attention_mask, self.position_ids
        return Steps(
            self.embeddings[:, index : index + 1],
            None if mask is None else mask[:, : past + index + 1],
            None if positions is None else positions[:, index : index + 1],
        )

    def after(self, past: "Steps") -> "Steps":
        """These steps and those before them; the mask of these spans both already."""
        positions = past.position_ids
        if positions is not None and self.position_ids is not None:
            positions = torch.cat([positions, self.position_ids], dim=1)
        embeddings = torch.cat([past.embeddings, self.embeddings], dim=1)
        return Steps(embeddings, self.attention_mask, positions)


class Runner(nn.Module):
    """An LM and the way to run it, which probes explore and ``Backbone`` builds on.

    Args:
        lm: any causal LM of transformers; its weights, embeddings and vocabulary stay as they are.

    Attributes:
        accepts: argument names that the LM's forward takes.
        replays: whether all steps are run again at each cached step, for want of a usable state.
        position_offset: position id that means the first position to the LM.
        tapped_norm: the norm whose input passes return as well, if any.
        activation_dtype: type that the input embeddings come out in, None for that of their table.
        cheap_columns: columns of prompts with which a pass takes about a step's time longer, as weights are
            read once for all of them; up to the machine, and measured when weights are packed.

    Raises:
        BackboneError: if the LM cannot be run on embeddings; the text names what it lacks.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.accepts = inspect_base(lm)
        self.lm = lm
        self.replays = False
        self.position_offset = 0
        self.activation_dtype: torch.dtype | None = None
        self.cheap_columns = 32
        self.tapped_norm: tuple[nn.Module, ...] = ()  # in a tuple: it is the LM's already
        self._bodies: tuple[list[nn.Module], list[nn.Module]] = ([], [])  # children of the LM, and its bodies

    @property
    def embedding_table(self) -> Tensor:
        """Weight of the LM's input embeddings, a row for each id."""
        return next(self.lm.get_input_embeddings().parameters())

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings."""
        return self.embedding_table.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the input embeddings, as they come out."""
        return self.activation_dtype or self.embedding_table.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Look ids up in the LM's input embedding.

        Args:
            ids: int64 ids, [B, S]; ``NO_TEXT`` gives a zero vector.

        Returns:
            Embeddings as the LM itself looks them up, [B, S, D].
        """
        embeddings: Tensor = self.lm.get_input_embeddings()(ids.clamp(min=0))
        return embeddings.masked_fill((ids == NO_TEXT).unsqueeze(-1), 0)

    def run(
        self,
        steps: Steps,
        cache: BackboneCache | None = None,
        *,
        use_cache: bool = False,
        logits_to_keep: int | None = 0,
        alone: nn.Module | None = None,
    ) -> BackboneOutput:
        """Run the LM over ``steps``, after those that ``cache`` has seen.

        Args:
            steps: what to run.
            cache: what the last call returned; it is consumed.
            use_cache: return a cache for the next call.
            logits_to_keep: compute the logits of the last so many steps; 0 for all, None for none.
            alone: the LM's body, to be run in its place where no logits are asked for.
        """
        run = self._run_again if self.replays else self._run_once
        return run(steps, cache, use_cache=use_cache, logits_to_keep=logits_to_keep, alone=alone)

    def accepted(self, **arguments: Any) -> dict[str, Any]:
        """Those of the arguments that the LM's forward takes and that are not None."""
        return {
            name: value for name, value in arguments.items() if name in self.accepts and value is not None
        }

    def _run_once(
        self,
        steps: Steps,
        cache: BackboneCache | None,
        *,
        use_cache: bool,
        logits_to_keep: int | None,
        alone: nn.Module | None,
    ) -> BackboneOutput:
        """One pass of the LM's own forward, or of its body's."""
        past = 0 if cache is None else cache.steps
        states = {} if cache is None else cache.states
        mask, positions = self._mask_and_positions(steps, past)
        arguments = self.accepted(
            attention_mask=mask,
            position_ids=positions,
            use_cache=use_cache or cache is not None,  # some LMs heed no cache that they are not to write
            return_dict=True,
        )
        arguments |= states
        # A copy, since some LMs scale their input in place.
        arguments["inputs_embeds"] = steps.embeddings.clone()
        with watched_inputs(self.tapped_norm) as inputs:
            if logits_to_keep is None and alone is not None:
                output = alone(**taken(alone, arguments))
                hidden: Tensor = output.last_hidden_state
                logits = hidden[:, :0]
            else:
                output, hidden = self._call(arguments | self.accepted(logits_to_keep=logits_to_keep or 0))
                logits = output["logits"]
                logits = logits[:, :0] if logits_to_keep is None else logits[:, -logits_to_keep:]
        tapped = inputs[-1] if self.tapped_norm else hidden
        if not use_cache:
            return BackboneOutput(logits, hidden, None, tapped)
        if states := self.accepted(**output):
            rows, count = steps.embeddings.shape[:2]
            capacity = None if cache is None else cache.capacity
            return BackboneOutput(logits, hidden, BackboneCache(states, rows, past + count, capacity), tapped)
        self.replays = True
        return BackboneOutput(logits, hidden, _kept(steps), tapped)

    def _call(self, arguments: dict[str, Any]) -> tuple[Any, Tensor]:
        """Run the LM; return its output and the hidden state that entered its head."""
        children, bodies = list(self.lm.children()), self._bodies[1]
        if children != self._bodies[0]:
            bodies = find_bodies(self.lm)
            self._bodies = children, bodies
        with watched(bodies) as calls:
            output = self.lm(**arguments)
        if not calls:
            raise BackboneError(f"{class_name(self.lm)} has no body whose last hidden state enters its head")
        return output, calls[-1].hidden

    def _mask_and_positions(self, steps: Steps, past: int) -> tuple[Tensor | None, Tensor | None]:
        """Mask and position ids as the LM counts them, derived where they are not given."""
        mask, positions, count = steps.attention_mask, steps.position_ids, steps.embeddings.shape[1]
        if mask is not None and positions is None:
            positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -count:]
        elif past and positions is None:
            positions = torch.arange(past, past + count, device=steps.embeddings.device)[None]
        if mask is not None and "past_key_values" not in self.accepts:
            mask = mask[:, -count:]  # a state that is no list of steps has no place for the past's padding
        return mask, None if positions is None else positions + self.position_offset

    def _run_again(
        self,
        steps: Steps,
        cache: BackboneCache | None,
        *,
        use_cache: bool,
        logits_to_keep: int | None,
        alone: nn.Module | None,
    ) -> BackboneOutput:
        """Run all steps so far, for an LM that keeps no state."""
        count = steps.embeddings.shape[1]
        if cache is not None:
            steps = steps.after(Steps(**cache.states))
        kept = count if logits_to_keep == 0 else logits_to_keep
        output = self._run_once(steps, None, use_cache=False, logits_to_keep=kept, alone=alone)
        cache = _kept(steps) if use_cache else None
        return BackboneOutput(output.logits, output.hidden[:, -count:], cache, output.tapped[:, -count:])


def _kept(steps: Steps) -> BackboneCache:
    """A cache of the steps themselves."""
    rows, count = steps.embeddings.shape[:2]
    return BackboneCache(dict(vars(steps)), rows, count)


@cache
def _parameters(kind: type[nn.Module]) -> frozenset[str] | None:
    """Argument names of a module's forward; None if it takes any."""
    parameters = inspect.signature(kind.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return frozenset(parameters)


def taken(module: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a module takes."""
    names = _parameters(type(module))  # type: ignore[arg-type]  # a class can be hashed
    return arguments if names is None else {name: arguments[name] for name in arguments if name in names}


def watched_bodies(lm: PreTrainedModel) -> AbstractContextManager[list[BodyCall]]:
    """Collect the calls of modules that may be the LM's body; the outermost comes last."""
    return watched(find_bodies(lm))


@contextmanager
def watched(bodies: Iterable[nn.Module]) -> Iterator[list[BodyCall]]:
    """Collect the calls of ``bodies`` that return a last hidden state."""
    calls: list[BodyCall] = []

    def collect(module: nn.Module, inputs: Any, output: Any) -> None:
        if hasattr(output, "last_hidden_state"):
            calls.append(BodyCall(module, type(output), output.last_hidden_state))

    handles = [body.register_forward_hook(collect) for body in bodies]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched_inputs(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the first argument of each call of ``modules``."""
    found: list[Tensor] = []

    def collect(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])

    handles = [module.register_forward_pre_hook(collect) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
