"""Find out what the layers of an LM compute, by running a few steps and comparing numbers.

A backbone in; layers that go the quick way out, where every number that lies between their products came out
as the formula has it: near the first position and far from it, with padding and without. What a formula is
tried with comes from the shapes of what was seen; names of families or modules tell nothing. The other layers
stay as they are.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache
from transformers.pytorch_utils import Conv1D

from omni_adapter.backbone import Backbone, BackboneCache
from omni_adapter.backbone.probes import quiet, sample
from omni_adapter.engine.glue import ACTIVATIONS, Glue, Norm, Rotation, glue
from omni_adapter.engine.linears import PackedLinear
from omni_adapter.engine.quick import (
    Around,
    Attention,
    Branch,
    Calling,
    Formula,
    Gated,
    Products,
    QuickLayer,
    are_of_each_step,
    are_steps,
    of_each_step,
    quick_block,
    sees,
)
from omni_adapter.model import OmniModel
from omni_adapter.modules.tts_blocks import TtsBlock

logger = logging.getLogger(__name__)

_TOLERANCE = 2e-5  # of the largest value
_SMALL = 1e-3  # of numbers of which a norm's epsilon is a good part
_FAR = 1 << 20  # positions, for an LM whose positions do not end before
_LOUD = 100.0  # largest product of queries and keys where caps and clips are to show
_LOUD_TOLERANCE = 1e-3
_PADDING = 2  # columns before the shorter row
_SEVERAL = 3  # steps at once
_OFFSETS = (0.0, 1.0)


def _is_product(module: nn.Module) -> bool:
    return isinstance(module, PackedLinear | nn.Linear | Conv1D)


class _UnknownError(Exception):
    """A layer computes something else, or is called otherwise."""


@dataclass(frozen=True)
class _Event:
    """A call of a module without children, with copies of what went in and came out."""

    module: nn.Module
    given: Tensor
    returned: Tensor
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class _Stored:
    """What a layer put into the cache, and what it got."""

    layer: int
    new_keys: Tensor
    new_values: Tensor
    keys: Tensor
    values: Tensor


@dataclass
class _Record:
    """One call of a layer for a single step."""

    module: nn.Module
    hidden: Tensor
    arguments: Mapping[str, Any]
    events: list[_Event] = field(default_factory=list)
    stored: list[_Stored] = field(default_factory=list)
    before: int = 0  # events before the cache was written
    output: Tensor | None = None
    as_tuple: bool = False


@torch.no_grad()
def quicken(model: OmniModel) -> int:
    """Let layers of a talking model go the quick way where they can; return how many do.

    Those of the LM are asked what they compute; the blocks that speak are known.
    """
    calls = glue()
    if calls is None or model.device.type != "cpu":
        return 0
    layers = dict(_layers(model.backbone))
    kept = quicken_backbone(model.backbone, calls)
    for name, reason in kept.items():
        logger.debug("%s goes its own way: %s", name, reason)
    blocks = [block for block in model.tts_blocks.blocks if isinstance(block, TtsBlock)]
    for block in blocks:
        block.quick = quick_block(block)
    return len(layers) - len(kept) + len(blocks)


def quicken_backbone(backbone: Backbone, calls: Glue) -> dict[str, str]:
    """Let layers of an LM go the quick way; return why others do not, by name."""
    layers = dict(_layers(backbone))
    if backbone.replays:
        return dict.fromkeys(layers, "the LM keeps no state")
    try:
        with quiet(backbone):
            return _quicken(backbone, layers, calls)
    except Exception as error:  # other people's code may raise anything
        return dict.fromkeys(layers, f"steps cannot be watched: {error}")


def _quicken(backbone: Backbone, layers: Mapping[str, nn.Module], calls: Glue) -> dict[str, str]:
    """Run an LM in several ways, and let those layers go the quick way that follow their formula in all."""
    runs = [_run(backbone, layers), _run(backbone, layers, far=True)]
    if backbone.padding_is_exact:
        runs.append(_run(backbone, layers, padded=True))
    found: dict[str, tuple[Formula, Calling]] = {}
    kept: dict[str, str] = {}
    for name in layers:
        try:
            found[name] = _derive(runs[0].get(name), calls)
            for run in runs:
                _verify(*found[name], run.get(name), calls)
        except _UnknownError as reason:
            kept[name] = str(reason)
    found = {name: one for name, one in found.items() if name not in kept}
    loudness = {name: _loudness(one[0].attention, runs[0][name], calls) for name, one in found.items()}
    with _loud_norms({name: one[0].attention for name, one in found.items()}, loudness):
        loud = _run(backbone, layers, loudness=loudness)
        for name, one in found.items():
            try:
                _verify(*one, loud.get(name), calls, tolerance=_LOUD_TOLERANCE)
            except _UnknownError as reason:
                kept[name] = f"where numbers are large, {reason}"
    found = {name: one for name, one in found.items() if name not in kept}
    several = _several(backbone, layers, found, calls)
    for name, (formula, calling) in found.items():
        calling = replace(calling, takes_several=name in several)
        layers[name].forward = QuickLayer(layers[name], formula, calling)
    return kept


def _several(
    backbone: Backbone,
    layers: Mapping[str, nn.Module],
    found: Mapping[str, tuple[Formula, Calling]],
    calls: Glue,
) -> set[str]:
    """Names of layers that follow their formula for several steps, too: a prompt, and those after it."""
    kinds: list[dict[str, Any]] = [{"last": 0}]
    if backbone.takes_chunks:  # else none follow
        kinds.append({"last": _SEVERAL})
    if backbone.padding_is_exact:
        kinds += [kind | {"padded": True} for kind in kinds]
    names = set(found)
    for kind in kinds:
        records = _run(backbone, layers, **kind)
        for name in sorted(names):
            try:
                _verify(*found[name], records.get(name), calls)
            except _UnknownError as reason:
                logger.debug("%s takes one step at a time: %s", name, reason)
                names.discard(name)
    return names


def _loudness(attention: Attention, record: _Record, calls: Glue) -> float:
    """By what queries and keys are to be multiplied so that their products are large."""
    roles = _Roles.of(record)
    projected = _side_by_side(roles.entering)
    _attend(attention, record, projected, calls)  # turns the queries in place
    query = projected[..., : attention.heads * attention.width]
    query = query.reshape(len(query), attention.kv_heads, -1, attention.width)  # [B, h, heads / h, W]
    largest = float((query @ record.stored[0].keys.mT).abs().max()) * attention.scale
    return float(max(1.0, (_LOUD / max(largest, _SMALL * _SMALL)) ** 0.5))


@contextmanager
def _loud_norms(attentions: Mapping[str, Attention], loudness: Mapping[str, float]) -> Iterator[None]:
    """Let the norms of queries and keys give large numbers inside."""
    weights: dict[int, tuple[Norm, float]] = {}
    for name, attention in attentions.items():
        for norm in (attention.query_norm, attention.key_norm):
            if norm is not None:
                weights[id(norm.weight)] = norm, loudness[name]
    before = [norm.weight.clone() for norm, _ in weights.values()]
    try:
        for norm, factor in weights.values():
            norm.weight.add_(norm.offset).mul_(factor).sub_(norm.offset)
        yield
    finally:
        for (norm, _), own in zip(weights.values(), before, strict=True):
            norm.weight.copy_(own)


def _layers(backbone: Backbone) -> Iterator[tuple[str, nn.Module]]:
    """Modules of lists, of which the layers of an LM are some."""
    for name, module in backbone.lm.named_modules():
        if isinstance(module, nn.ModuleList):
            for index, child in enumerate(module):
                if "forward" not in vars(child) and any(True for _ in child.children()):
                    yield f"{name}.{index}", child


def _run(
    backbone: Backbone,
    layers: Mapping[str, nn.Module],
    *,
    far: bool = False,
    padded: bool = False,
    last: int = 1,
    loudness: Mapping[str, float] | None = None,
) -> dict[str, _Record]:
    """Run a prompt and a step of two rows, or several; return what each layer did in these.

    Args:
        backbone: runs them.
        layers: by name.
        far: at the end of the LM's positions.
        padded: with columns before the second row.
        last: steps that are taken at once; all for 0.
        loudness: by which what each layer's products give is multiplied; None to let it be.
    """
    steps = sample(backbone)
    pair = torch.cat([steps, steps.flip(1)])  # [2, S, D]
    count = pair.shape[1]
    mask = positions = None
    if far:
        most = min(backbone.max_positions or _FAR, _FAR)
        positions = torch.arange(most - count, most).clamp(min=0).repeat(2, 1)
        positions[1] -= 1
        positions.clamp_(min=0)
    if padded:
        mask = torch.ones(2, count, dtype=torch.long)
        mask[1, :_PADDING] = 0

    def parts(tensor: Tensor | None, cut: slice) -> Tensor | None:
        return None if tensor is None else tensor[:, cut]

    start = count - last if last else 0
    prompt, rest = slice(0, start), slice(start, count)
    cache: BackboneCache | None = backbone.new_cache(2, count)
    if start:
        cache = backbone(
            pair[:, prompt],
            attention_mask=parts(mask, prompt),
            position_ids=parts(positions, prompt),
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
        ).cache
    assert cache is not None
    with _Watch(layers, cache.states, loudness=loudness or {}) as watch:
        backbone(
            pair[:, rest],
            attention_mask=mask,
            position_ids=parts(positions, rest),
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return watch.records


class _Watch:
    """Notes what layers do; one that is called twice, or otherwise than layers are, is not noted.

    Args:
        layers: by name.
        states: with the cache that they write to.
        loudness: by which what their products give is multiplied.

    Attributes:
        records: what was noted, by name.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], states: Mapping[str, Any], *, loudness: Mapping[str, float]
    ) -> None:
        self._layers, self._states, self._loudness = layers, states, loudness
        self._running: _Record | None = None
        self._spoiled: set[str] = set()
        self._stack = ExitStack()
        self.records: dict[str, _Record] = {}

    def __enter__(self) -> Self:
        """Begin."""
        for name, layer in self._layers.items():
            enter, leave = partial(self._enter, name), partial(self._leave, name)
            self._undo(layer.register_forward_pre_hook(enter, with_kwargs=True))
            self._undo(layer.register_forward_hook(leave))
            for part in layer.modules():
                if any(True for _ in part.children()):
                    continue
                if name in self._loudness and _is_product(part):
                    self._undo(part.register_forward_hook(partial(self._amplify, self._loudness[name])))
                self._undo(part.register_forward_hook(self._note))
        for state in self._states.values():
            if isinstance(state, Cache):
                state.update = partial(self._store, state.update)  # type: ignore[method-assign]
                self._stack.callback(vars(state).pop, "update")
        return self

    def __exit__(self, *error: object) -> None:
        """Leave layers and cache as they were."""
        self._stack.close()
        for name in self._spoiled:
            self.records.pop(name, None)

    def _undo(self, handle: RemovableHandle) -> None:
        self._stack.callback(handle.remove)

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in self.records or self._running or len(args) != 1 or not are_steps(args[0]):
            self._spoiled.add(name)
            return
        self._running = self.records[name] = _Record(module, args[0].clone(), dict(kwargs))

    def _leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        record = self._running
        if record is None or record is not self.records.get(name):
            return
        self._running = None
        record.as_tuple = isinstance(output, tuple)
        first = output[0] if isinstance(output, tuple) and len(output) == 1 else output
        record.output = first.clone() if isinstance(first, Tensor) else None

    def _amplify(self, factor: float, module: nn.Module, inputs: Any, output: Any) -> Any:
        return output if self._running is None else output * factor

    def _note(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [one for one in (*inputs[:1], output) if isinstance(one, Tensor)]
        if self._running is None or len(tensors) != 2:
            return
        given, returned = tensors
        if given.shape == returned.shape and torch.equal(given, returned):
            return  # dropout and the like
        self._running.events.append(_Event(module, given, returned, given.clone(), returned.clone()))

    def _store(
        self, update: Callable[..., Any], keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> Any:
        new_keys, new_values = keys.clone(), values.clone()
        held = update(keys, values, layer, *args, **kwargs)
        if (record := self._running) is not None:
            record.stored.append(_Stored(layer, new_keys, new_values, *(one.clone() for one in held)))
            record.before = len(record.events)
        return held


def _need(condition: bool, reason: str) -> None:
    """Give a layer up if a condition does not hold."""
    if not condition:
        raise _UnknownError(reason)


def _is_same(came: Tensor, expected: Tensor, tolerance: float = _TOLERANCE) -> bool:
    """Whether numbers are equal but for rounding, whatever the shape."""
    if came.numel() != expected.numel() or came.dtype != expected.dtype:
        return False
    difference = (came.flatten() - expected.flatten()).abs().max()
    return bool(difference <= tolerance * expected.abs().max().clamp(min=1e-20))


# --- from a record to a formula ---


@dataclass(frozen=True)
class _Roles:
    """Which call of a record does what."""

    entering: tuple[_Event, ...]
    leaving: _Event
    mixing: tuple[_Event, ...]
    closing: _Event
    others: tuple[_Event, ...]

    @classmethod
    def of(cls, record: _Record) -> "_Roles":
        """Tell the roles by the order of calls."""
        _need(len(record.stored) == 1, "it does not write to a cache of keys and values once")
        products = [(at, event) for at, event in enumerate(record.events) if _is_product(event.module)]
        entering = tuple(event for at, event in products if at < record.before)
        after = [event for at, event in products if at >= record.before]
        _need(len(entering) in (1, 3), f"{len(entering)} products come before attention")
        _need(len(after) in (3, 4), f"{len(after)} products come after attention")
        same = all(event.given is entering[0].given for event in entering)
        mixing = tuple(after[1:-1])
        same = same and all(event.given is mixing[0].given for event in mixing)
        _need(same, "products side by side get different inputs")
        others = tuple(event for event in record.events if not _is_product(event.module))
        return cls(entering, after[0], mixing, after[-1], others)

    def norm_into(self, event: _Event, calls: Glue) -> tuple[Norm | None, Tensor]:
        """The norm before a product, and what goes into it; or into the product if there is none."""
        for other in self.others:
            if other.returned is event.given:
                return _norm_of(other, calls), other.x
        return None, event.x

    def norm_after(self, event: _Event, calls: Glue) -> tuple[Norm | None, Tensor]:
        """The norm after a product, and what comes out of it; or of the product if there is none."""
        for other in self.others:
            if other.given is event.returned:
                return _norm_of(other, calls), other.y
        return None, event.y


def _derive(record: _Record | None, calls: Glue) -> tuple[Formula, Calling]:
    """What a layer computes, as far as shapes and order of calls tell; numbers are for ``_verify``."""
    if record is None or record.output is None:
        raise _UnknownError("it is not called as layers are")
    roles = _Roles.of(record)
    first_norm, _ = roles.norm_into(roles.entering[0], calls)
    after_attention, added = roles.norm_after(roles.leaving, calls)
    second_norm, middle = roles.norm_into(roles.mixing[0], calls)
    after_gate, closed = roles.norm_after(roles.closing, calls)
    caching = [name for name, value in record.arguments.items() if isinstance(value, Cache)]
    _need(len(caching) == 1, "it is given no cache")
    tables = next((name for name, value in record.arguments.items() if _are_tables(value)), None)
    masks = [name for name in record.arguments if "mask" in name]
    _need(len(masks) <= 1, "it is given several masks")
    _need(not masks or sees(record.arguments[masks[0]]), "it is given a mask of another kind")
    calling = Calling(
        caching[0],
        record.stored[0].layer,
        tables,
        masks[0] if masks else None,
        frozenset(record.arguments),
        record.as_tuple,
    )
    attending = Branch(
        first_norm,
        Products([event.module for event in roles.entering]),
        Products([roles.leaving.module]),
        after_attention,
        _scale(middle - record.hidden.view_as(middle), added),
    )
    mixing = Branch(
        second_norm,
        Products([event.module for event in roles.mixing]),
        Products([roles.closing.module]),
        after_gate,
        _scale(record.output - middle.view_as(record.output), closed),
    )
    attention = _attention(record, roles, calls, None if tables is None else record.arguments[tables])
    return Formula(attending, attention, mixing, _gated(roles, calls)), calling


def _are_tables(value: Any) -> bool:
    """Whether an argument is made of cosines and sines."""
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(one, Tensor) and one.is_floating_point() for one in value)
        and value[0].shape == value[1].shape
        and bool((value[0].square() + value[1].square()).std() < _TOLERANCE)
    )


def _scale(added: Tensor, branch: Tensor) -> float:
    """By what a branch was multiplied before it was added."""
    branch = branch.view_as(added)
    scale = float((added * branch).sum() / branch.square().sum().clamp(min=1e-30))
    return 1.0 if abs(scale - 1) < _SMALL else scale


def _norm_of(event: _Event, calls: Glue) -> Norm:
    """The norm that a module is, found by its answers; raises if it is none."""
    width = event.x.shape[-1]
    parameters = [one for one in event.module.parameters(recurse=False) if one.dim() == 1]
    _need(len(list(event.module.parameters())) == len(parameters) <= 1, "a norm has other weights")
    weight = parameters[0].detach() if parameters else torch.ones(width)
    _need(weight.shape == (width,) and weight.dtype == torch.float32, "a norm is of another shape")
    small = _SMALL * event.x
    answer = event.module(small).flatten(0, -2)
    rows = small.flatten(0, -2)
    for offset in _OFFSETS:
        scaled = rows * (weight + offset)
        factor = (answer * scaled).sum(-1) / scaled.square().sum(-1).clamp(min=1e-30)
        epsilon = float((factor.double() ** -2 - rows.double().square().mean(-1)).median())
        norm = Norm(weight, offset, max(epsilon, 0.0))
        if _is_same(calls.norm(event.x.contiguous(), norm), event.y) and _is_same(
            calls.norm(small.contiguous(), norm), answer
        ):
            return norm
    raise _UnknownError("a norm computes something else")


def _attention(
    record: _Record, roles: _Roles, calls: Glue, tables: tuple[Tensor, Tensor] | None
) -> Attention:
    """The attention of a layer."""
    stored = record.stored[0]
    _, kv_heads, _, width = stored.keys.shape
    value_width = stored.values.shape[-1]
    projected = _side_by_side(roles.entering)
    queries = projected.shape[-1] - kv_heads * (width + value_width)
    _need(queries > 0 and queries % (kv_heads * width) == 0, "heads do not divide its products")
    own_keys = projected[..., queries : queries + kv_heads * width]
    norms = _head_norms(roles, projected[..., :queries], own_keys, calls)
    rotations: list[Rotation | None] = [None]
    if tables is not None and tables[0].shape[-1] <= width and tables[0].shape[-1] % 2 == 0:
        turned = tables[0].shape[-1]
        rotations = [*(Rotation(turned, pair_step=step) for step in (0, 1, 2)), None]
    scales = [width**-0.5, 1.0]
    for module in record.module.modules():
        scales += [value for value in vars(module).values() if isinstance(value, float) and 0 < value <= 1]
    for rotation in rotations:
        for scale in dict.fromkeys(scales):
            attention = Attention(queries // width, kv_heads, width, value_width, scale, rotation, *norms)
            keys_are_right, read = _attend(attention, record, _side_by_side(roles.entering), calls)
            if not keys_are_right:
                break
            if _is_same(read, roles.leaving.x):
                return attention
    raise _UnknownError("its attention computes something else")


def _side_by_side(events: Sequence[_Event]) -> Tensor:
    """Outputs of products, [B, S, sum of sizes], a copy."""
    outputs = [event.y if event.y.dim() == 3 else event.y.flatten(1)[:, None] for event in events]
    return torch.cat(outputs, dim=-1)


def _head_norms(roles: _Roles, queries: Tensor, keys: Tensor, calls: Glue) -> tuple[Norm | None, Norm | None]:
    """Norms that get queries and keys."""
    found: list[Norm | None] = []
    for states in (queries, keys):
        own = [
            event
            for event in roles.others
            if event.x.numel() == states.numel() and torch.equal(event.x.flatten(), states.flatten())
        ]
        found.append(_norm_of(own[0], calls) if own else None)
        has_weight = not own or any(True for _ in own[0].module.parameters())
        _need(has_weight, "its heads have a norm without weight")
    return found[0], found[1]


def _attend(
    attention: Attention,
    record: _Record,
    projected: Tensor,
    calls: Glue,
    *,
    tolerance: float = _TOLERANCE,
) -> tuple[bool, Tensor]:
    """Whether a formula stores the keys and values that a layer stored, and what it reads.

    Args:
        attention: the formula.
        record: of the layer.
        projected: what its products gave, side by side; changed in place.
        calls: the compiled calls.
        tolerance: of the largest value.
    """
    stored, right = record.stored[0], []

    def update(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        right.append(
            _is_same(keys, stored.new_keys, tolerance) and _is_same(values, stored.new_values, tolerance)
        )
        return stored.keys, stored.values

    rows, count, _ = projected.shape
    mask = next((value for name, value in record.arguments.items() if "mask" in name), None)
    tables = next((value for value in record.arguments.values() if _are_tables(value)), None)
    if count > 1:
        _need(tables is None or are_of_each_step(tables, count), "its positions are not those of steps")
        tables = of_each_step(tables, rows, count)
    read = attention(projected, Around(tables, update, mask if sees(mask, count) else None, calls))
    return right[0], read


def _gated(roles: _Roles, calls: Glue) -> Gated:
    """The gate of a layer."""
    projected = _side_by_side(roles.mixing)
    _need(projected.shape[-1] == 2 * roles.closing.x.shape[-1], "it has no gate")
    for activation in ACTIVATIONS:
        for gate_first in (True, False):
            gated = Gated(activation, gate_first)
            if _is_same(gated(projected, calls=calls), roles.closing.x):
                return gated
    raise _UnknownError("its gate computes something else")


def _verify(
    formula: Formula,
    calling: Calling,
    record: _Record | None,
    calls: Glue,
    *,
    tolerance: float = _TOLERANCE,
) -> None:
    """Compare every number between the products with what the layer computed; raise if one is another."""
    if record is None or record.output is None:
        raise _UnknownError("it is not called as layers are")
    roles = _Roles.of(record)
    same = (
        record.arguments.keys() == calling.names
        and record.as_tuple == calling.as_tuple
        and record.stored[0].layer == calling.layer
    )
    _need(same, "it is not always called the same way")
    first, second = formula.attending, formula.mixing
    mask = None if calling.mask is None else record.arguments[calling.mask]
    if sees(mask, record.hidden.shape[1]):  # with another the layer is asked itself
        projected = _side_by_side(roles.entering)
        right, read = _attend(formula.attention, record, projected, calls, tolerance=tolerance)
        _need(right and _is_same(read, roles.leaving.x, tolerance), "its attention computes something else")
    middle = torch.add(record.hidden, _after(roles.leaving, first, calls), alpha=first.scale)
    output = torch.add(middle, _after(roles.closing, second, calls), alpha=second.scale)
    for came, expected, what in (
        (_before(record.hidden, first, calls), roles.entering[0].x, "what enters its attention"),
        (_before(middle, second, calls), roles.mixing[0].x, "what enters its gate"),
        (formula.gated(_side_by_side(roles.mixing), calls=calls), roles.closing.x, "its gate"),
        (output, record.output, "what comes out"),
    ):
        _need(_is_same(came, expected, tolerance), f"{what} is something else")


def _before(hidden: Tensor, branch: Branch, calls: Glue) -> Tensor:
    """What enters a branch."""
    return hidden if branch.norm is None else calls.norm(hidden, branch.norm)


def _after(event: _Event, branch: Branch, calls: Glue) -> Tensor:
    """What leaves a branch whose last product was called."""
    return event.y if branch.norm_after is None else calls.norm(event.y, branch.norm_after)
