"""Run a model a little, to see how its linear layers are called and whether others can stand in for them.

A part of a model and a way to run it in; the layers that can be replaced and those that get the same input
one after another out. Nothing goes by names of families or modules. Knows nothing of kernels.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from omni_adapter.engine.linears import PackedLinear, Siblings

logger = logging.getLogger(__name__)

_LEAST_SIZE = 16  # a smaller layer costs nothing, and often decides something
_TOLERANCE = 1e-4  # of the largest value; the plain way is compared with itself
_TOLERANCE_HALF = 2e-2


@dataclass(frozen=True)
class Part:
    """A part of a model that can be run alone.

    Attributes:
        name: of it in the model, before the names of its modules.
        root: the module.
        run: runs it on a few steps, always the same ones; returns what comes out.
        rows: rows that its products usually have.
    """

    name: str
    root: nn.Module
    run: Callable[[], Sequence[Tensor]]
    rows: int


@dataclass
class Casting:
    """Which layers of a part others can stand in for.

    Attributes:
        groups: names of layers, together where one product may serve them; in the order of calls.
        kept: layers that stay as they are, and why.
        outputs: what came out of the part, the plain way.
    """

    groups: list[tuple[str, ...]] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    outputs: tuple[Tensor, ...] = ()


def linear_weight(module: nn.Module) -> Tensor:
    """Weight of a linear layer as [out, in]."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


def linear_bias(module: nn.Module) -> Tensor | None:
    """Bias of a linear layer."""
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one that is called ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


@torch.no_grad()
def cast(part: Part, *, fuse: bool = True) -> Casting:
    """Find out which layers of a part can be replaced; it is left as it was."""
    layers = {name: module for name, module in part.root.named_modules() if _is_linear(module)}
    found = Casting()
    for name, module in layers.items():
        if min(linear_weight(module).shape) < _LEAST_SIZE:
            found.kept[name] = "too small to pay"
        elif not linear_weight(module).is_floating_point():
            found.kept[name] = "quantised already"
    layers = {name: module for name, module in layers.items() if name not in found.kept}
    calls, found.outputs = _watch(part, layers)
    called = {_role(call.name) for call in calls}
    for name in [name for name in layers if _role(name) not in called]:
        found.kept[name] = "its parent does not call it"
        del layers[name]
    alone: list[tuple[str, ...]] = [(name,) for name in layers]
    for candidate in (_groups(calls, layers) if fuse else alone, alone):
        if _plays(part, layers, candidate, found.outputs):
            found.groups = candidate
            return found
    for role in sorted({_role(name) for name in layers}):
        one = [group for group in alone if _role(group[0]) == role]
        if _plays(part, layers, one, found.outputs):
            found.groups += one
        else:
            found.kept |= {group[0]: "its parent reads the weight itself" for group in one}
    return found


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing more; those of quantised models are more."""
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward and not hasattr(module, "parametrizations")
    return type(module) is Conv1D


def _role(name: str) -> str:
    """What layers of all blocks of a model have in common."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", name)


class _Call(NamedTuple):
    """A call of a layer: its name, what it got, and how often that had been changed in place."""

    name: str
    x: Tensor
    version: int


def _watch(part: Part, layers: Mapping[str, nn.Module]) -> tuple[list[_Call], tuple[Tensor, ...]]:
    """Run a part; return the calls of its layers in order, and what came out."""
    calls: list[_Call] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs:
                calls.append(_Call(name, inputs[0], 0 if inputs[0].is_inference() else inputs[0]._version))

        return add

    with ExitStack() as stack:
        for name, module in layers.items():
            stack.callback(module.register_forward_pre_hook(note(name)).remove)
        outputs = tuple(part.run())
    return calls, outputs


def _groups(calls: Sequence[_Call], layers: Mapping[str, nn.Module]) -> list[tuple[str, ...]]:
    """Layers of one parent that get the same input one after another, and the others alone."""
    runs: list[list[str]] = []
    last: _Call | None = None
    for call in calls:
        together = (
            last is not None
            and last.x is call.x
            and last.version == call.version
            and last.name.rpartition(".")[0] == call.name.rpartition(".")[0]
            and last.name != call.name
        )
        if together:
            runs[-1].append(call.name)
        else:
            runs.append([call.name])
        last = call
    seen = Counter(tuple(run) for run in runs)
    of_layer: dict[str, set[tuple[str, ...]]] = {}
    for run in seen:
        for name in run:
            of_layer.setdefault(name, set()).add(run)
    # A layer that is called in other company at times, or several times in a row, stays alone.
    groups = [
        run
        for run in seen
        if len(run) > 1 and len(set(run)) == len(run) and all(of_layer[name] == {run} for name in run)
    ]
    fused = {name for run in groups for name in run}
    return groups + [(name,) for name in layers if name not in fused]


def _plays(
    part: Part,
    layers: Mapping[str, nn.Module],
    groups: Sequence[tuple[str, ...]],
    expected: Sequence[Tensor],
) -> bool:
    """Whether a part comes out the same with others in the place of its layers, which compute the same."""
    try:
        with _understudies(part.root, layers, groups):
            outputs = part.run()
    except Exception as error:  # other people's code may raise anything
        logger.debug("%s does not run with other layers: %s", part.name, error)
        return False
    return all(_is_same(one, other) for one, other in zip(outputs, expected, strict=True))


def _is_same(one: Tensor, other: Tensor) -> bool:
    tolerance = _TOLERANCE if other.dtype in (torch.float32, torch.float64) else _TOLERANCE_HALF
    if not bool(other.isfinite().all()):
        return torch.equal(one.isfinite(), other.isfinite())
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


@contextmanager
def _understudies(
    root: nn.Module, layers: Mapping[str, nn.Module], groups: Sequence[tuple[str, ...]]
) -> Iterator[None]:
    """Put packed layers that multiply with the plain weights in the place of layers, inside."""
    for group in groups:
        members = [layers[name] for name in group]

        def product(x: Tensor, members: Sequence[nn.Module] = members) -> Tensor:
            return torch.cat([member(x) for member in members], dim=-1)

        siblings = Siblings(product, [linear_weight(member).shape[0] for member in members])
        for index, (name, member) in enumerate(zip(group, members, strict=True)):
            weight = linear_weight(member)
            stand_in = PackedLinear(
                siblings.member(index),
                weight=weight,
                dtype=weight.dtype,
                label="a rehearsal",
                bias=linear_bias(member),
            )
            replace_module(root, name, stand_in)
    try:
        yield
    finally:
        for group in groups:
            for name in group:
                replace_module(root, name, layers[name])
