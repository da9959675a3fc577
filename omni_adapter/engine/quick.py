"""One step of a transformer layer: its products, and between them one call each for all that lies there.

Hidden states of single steps in and out, [B, 1, D], or of several, [B, S, D], whose attention is torch's; in
float32 on the processor; the cache is the layer's own. What a layer computes is given as a formula, which
``recognise`` finds by comparing numbers. A layer goes the quick way only where a call is of the kind that it
was recognised in; else it runs its own code. Knows no models.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from omni_adapter.engine.glue import NATIVE_ACTIVATIONS, Glue, Norm, Rotation, glue, table_places
from omni_adapter.engine.linears import PackedLinear, Siblings
from omni_adapter.modules.tts_blocks import TtsBlock, TtsCache

Native = tuple[int, int]
"""Addresses of a compiled call, as the source declares it, and of the weight that it takes."""

Update = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes keys and values of new steps, [B, h, S, W]; returns those of all steps."""


class Around(NamedTuple):
    """What a step needs besides its hidden states.

    Attributes:
        tables: cosines and sines; None without.
        update: stores keys and values.
        mask: bool [B, 1, S, steps], true at what is seen; None for all up to the own step.
        calls: the compiled calls.
    """

    tables: tuple[Tensor, Tensor] | None
    update: Update
    mask: Tensor | None
    calls: Glue


class Products:
    """One product for layers that get the same input, or one for each.

    Args:
        layers: linear layers, in order.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = tuple(layers)
        packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
        shared = {layer.siblings for layer in packed}
        siblings = shared.pop() if len(shared) == 1 and len(packed) == len(layers) else None
        self._shared: Siblings | None = None
        if siblings is not None and siblings.size == sum(layer.out_features for layer in packed):
            self._shared = siblings

    @property
    def native(self) -> Native | None:
        """What computes it from compiled code; None if nothing does."""
        kernel: Any = getattr(self._layers[0], "kernel", None)
        alone = len(self._layers) == 1 and getattr(self._layers[0], "siblings", None) is None
        found: Native | None = getattr(kernel, "native", None) if alone or self._shared else None
        return found

    @property
    def outputs(self) -> int:
        """Columns that come out."""
        return sum(layer.out_features for layer in self._layers)  # type: ignore[misc]

    def __call__(self, x: Tensor) -> Tensor:
        """Return what all layers make of rows [B, S, in], side by side, [B, S, sum of outs]."""
        if self._shared is not None:
            return self._shared.product(x)
        if len(self._layers) == 1:
            answers: Tensor = self._layers[0](x)
            return answers
        return torch.cat([layer(x) for layer in self._layers], dim=-1)


@dataclass(frozen=True)
class Attention:
    """How a layer attends.

    Attributes:
        heads: heads of the queries.
        kv_heads: heads of keys and values.
        width: of a head of queries and keys.
        value_width: of a head of values.
        scale: of the products of queries and keys.
        rotation: of queries and keys by their positions; None for none.
        query_norm: of queries before it: of each head or, where it is as wide, of all; None for none.
        key_norm: likewise.
    """

    heads: int
    kv_heads: int
    width: int
    value_width: int
    scale: float
    rotation: Rotation | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Columns of queries, keys and values."""
        return self.heads * self.width, self.kv_heads * self.width, self.kv_heads * self.value_width

    def __call__(self, projected: Tensor, around: Around) -> Tensor:
        """Return what is read, [B, S, heads * value_width].

        Args:
            projected: queries, keys and values side by side, [B, S, sum of sizes]; changed in place.
            around: all else.
        """
        rows, count, (queries, keys, _) = *projected.shape[:2], self.sizes
        row, start = projected.stride(0 if count == 1 else 1), projected.storage_offset()
        query = projected.as_strided((rows * count, 1, queries), (row, queries, 1), start)
        key_rows = projected.as_strided((rows * count, 1, keys), (row, keys, 1), start + queries)
        self._turn(query, self.heads, self.query_norm, around)
        self._turn(key_rows, self.kv_heads, self.key_norm, around)
        all_keys, all_values = map(readable, around.update(*self.to_store(projected)))
        if count == 1:
            return around.calls.attend(query, all_keys, all_values, around.mask, self.scale)
        shape, group = (rows, self.heads, count, self.width), self.heads // self.kv_heads
        several = projected.as_strided(shape, (projected.stride(0), self.width, row, 1), start)
        read = F.scaled_dot_product_attention(
            several,
            all_keys.repeat_interleave(group, dim=1),
            all_values.repeat_interleave(group, dim=1),
            attn_mask=around.mask,
            is_causal=around.mask is None,
            scale=self.scale,
        )
        return read.transpose(1, 2).reshape(rows, count, -1)

    def to_store(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values in what was projected, each [B, h, S, W]."""
        rows, count, (queries, keys, _) = *projected.shape[:2], self.sizes
        row, step, start = projected.stride(0), projected.stride(1), projected.storage_offset() + queries
        heads, width, value_width = self.kv_heads, self.width, self.value_width
        return (
            projected.as_strided((rows, heads, count, width), (row, width, step, 1), start),
            projected.as_strided(
                (rows, heads, count, value_width), (row, value_width, step, 1), start + keys
            ),
        )

    def _turn(self, x: Tensor, heads: int, norm: Norm | None, around: Around) -> None:
        """Normalise and rotate heads in place."""
        tables, calls = around.tables, around.calls
        if norm is not None and len(norm.weight) != self.width:  # all heads as one
            calls.rotate(x, heads=1, width=heads * self.width, norm=norm, rotation=None, tables=None)
            norm = None
        if norm is not None or self.rotation is not None:
            calls.rotate(x, heads=heads, width=self.width, norm=norm, rotation=self.rotation, tables=tables)


@dataclass(frozen=True)
class Gated:
    """A gated layer: ``activation(gate) * up``, from one product.

    Attributes:
        activation: by name.
        gate_first: whether the gate's columns come before the others.
    """

    activation: str
    gate_first: bool = True

    def __call__(self, projected: Tensor, *, calls: Glue) -> Tensor:
        """Return [B, S, W] of gates and others side by side, [B, S, 2 W]."""
        first, second = projected.view(-1, 1, projected.shape[-1]).chunk(2, dim=-1)
        gate, up = (first, second) if self.gate_first else (second, first)
        return calls.gate(gate, up, self.activation).view(*projected.shape[:-1], -1)


@dataclass(frozen=True)
class Branch:
    """What is added to the hidden states, and how.

    Attributes:
        norm: of what goes in; None for none.
        enter: products on the way in.
        leave: product on the way out.
        norm_after: of what comes out; None for none.
        scale: of what is added.
    """

    norm: Norm | None
    enter: Products
    leave: Products
    norm_after: Norm | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Formula:
    """What a layer computes: attention is added to the hidden states, then a gated layer.

    Attributes:
        attending: products around the attention.
        attention: between them.
        mixing: products around the gate.
        gated: between them.
    """

    attending: Branch
    attention: Attention
    mixing: Branch
    gated: Gated

    def __call__(self, hidden: Tensor, around: Around) -> Tensor:
        """Return the layer's output, [B, S, D], of its input."""
        first, second, calls = self.attending, self.mixing, around.calls
        entered = hidden if first.norm is None else calls.norm(hidden, first.norm)
        came = first.leave(self.attention(first.enter(entered), around))
        if first.norm_after is not None:
            came = calls.norm(came, first.norm_after)
        if second.norm is None:
            hidden = entered = torch.add(hidden, came, alpha=first.scale)
        else:
            hidden, entered = calls.add_norm(hidden, came, first.scale, second.norm)
        came = second.leave(self.gated(second.enter(entered), calls=calls))
        if second.norm_after is not None:
            came = calls.norm(came, second.norm_after)
        return torch.add(hidden, came, alpha=second.scale)


class _Product(ctypes.Structure):
    """As the source declares it."""

    _fields_ = (("call", ctypes.c_void_p), ("weight", ctypes.c_void_p), ("outputs", ctypes.c_long))


class _Norm(ctypes.Structure):
    """As the source declares it."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("offset", ctypes.c_float),
        ("epsilon", ctypes.c_float),
        ("width", ctypes.c_long),
    )


_NORMS = ("before_attention", "of_queries", "of_keys", "after_attention", "before_gate", "after_gate")
_PRODUCTS = ("entering", "leaving", "mixing", "closing")
_COUNTS = (
    *("width", "heads", "kv_heads", "head_width", "value_width"),
    *("turned", "pair_step", "activation", "gate_first", "gates"),
)
_SCALES = ("scale", "attention_scale", "gate_scale")


class _Layer(ctypes.Structure):
    """As the source declares it."""

    _fields_ = (
        *((name, _Norm) for name in _NORMS),
        *((name, _Product) for name in _PRODUCTS),
        *((name, ctypes.c_long) for name in _COUNTS),
        *((name, ctypes.c_float) for name in _SCALES),
    )


class FusedFormula:
    """A formula in two compiled calls, one before keys and values are stored and one after.

    Args:
        formula: what is computed; its weights are read by address, so it is kept.
        layer: the same as the source declares it.
    """

    def __init__(self, formula: Formula, layer: _Layer) -> None:
        self._formula, self._layer, self._address = formula, layer, ctypes.addressof(layer)
        self._projected = sum(formula.attention.sizes)
        attention = formula.attention
        self._scratch = attention.heads * attention.value_width + 3 * layer.width
        self._scratch += layer.mixing.outputs + layer.gates

    def __call__(self, hidden: Tensor, around: Around) -> Tensor:
        """As ``Formula``."""
        rows, attention = hidden.shape[0], self._formula.attention
        tables, update, mask, calls = around
        scratch, projected = torch.empty(rows * self._scratch), torch.empty(rows, 1, self._projected)
        places: tuple[int | None, int | None, int, int] = (None, None, 0, 0)
        if attention.rotation is not None and tables is not None:
            places = table_places(tables, attention.rotation.turned)
        read, written = hidden.data_ptr(), scratch.data_ptr()
        failed = calls.begin_layer(self._address, read, rows, *places, written, projected.data_ptr())
        keys, values = map(readable, update(*attention.to_store(projected)))
        steps, out = keys.shape[2], torch.empty_like(hidden)
        assert mask is None or mask.shape[3] == steps
        failed = failed or calls.end_layer(
            *(self._address, read, rows, projected.data_ptr()),
            *(keys.data_ptr(), *keys.stride()[:3], values.data_ptr(), *values.stride()[:3]),
            *((None, 0) if mask is None else (mask.data_ptr(), mask.stride(0))),
            *(steps, written, out.data_ptr()),
        )
        if failed:
            raise MemoryError(f"no memory for a step of {rows} rows after {steps} steps")
        return out


def fused(formula: Formula) -> FusedFormula | None:
    """Return a formula in two compiled calls, None if one of its products is none of compiled code."""
    first, second, attention, gated = formula.attending, formula.mixing, formula.attention, formula.gated
    products = (first.enter, first.leave, second.enter, second.leave)
    natives = [one.native for one in products]
    if gated.activation not in NATIVE_ACTIVATIONS or any(native is None for native in natives):
        return None
    layer, rotation = _Layer(), attention.rotation
    norms = (first.norm, attention.query_norm, attention.key_norm, first.norm_after)
    for name, norm in zip(_NORMS, (*norms, second.norm, second.norm_after), strict=True):
        if norm is not None:
            own = _Norm(norm.weight.data_ptr(), norm.offset, norm.epsilon, len(norm.weight))
            setattr(layer, name, own)
    for name, product, native in zip(_PRODUCTS, products, natives, strict=True):
        assert native is not None
        setattr(layer, name, _Product(*native, product.outputs))
    counts = (
        *(first.leave.outputs, attention.heads, attention.kv_heads, attention.width, attention.value_width),
        *((0, 0) if rotation is None else (rotation.turned, rotation.pair_step)),
        *(NATIVE_ACTIVATIONS.index(gated.activation), int(gated.gate_first), second.enter.outputs // 2),
    )
    for name, value in zip(
        (*_COUNTS, *_SCALES), (*counts, attention.scale, first.scale, second.scale), strict=True
    ):
        setattr(layer, name, value)
    return FusedFormula(formula, layer)


class Step:
    """A step by a formula: in two compiled calls where its products can be called from compiled code.

    Args:
        formula: what is computed.
    """

    def __init__(self, formula: Formula) -> None:
        self.formula = formula
        self._way: Formula | FusedFormula | None = None

    def run(self, hidden: Tensor, around: Around) -> Tensor:
        """Return the output of ``hidden``."""
        way = self._way
        if way is None:
            way = self._way = fused(self.formula) or self.formula
        return way(hidden, around)

    def __getstate__(self) -> dict[str, Any]:
        """All but addresses, which a copy must find out for itself."""
        return vars(self) | {"_way": None}


@dataclass(frozen=True)
class Calling:
    """How a layer's forward was called when it was recognised.

    Attributes:
        cache: argument with the cache.
        layer: of the cache.
        tables: argument with cosines and sines; None without.
        mask: argument with the mask; None if there was none.
        names: all arguments but the first.
        as_tuple: whether the output comes in a tuple.
        takes_several: whether the formula holds for several steps at once, too.
    """

    cache: str
    layer: int
    tables: str | None
    mask: str | None
    names: frozenset[str]
    as_tuple: bool
    takes_several: bool = False


class QuickLayer(Step):
    """Stands in the place of a layer's ``forward``.

    Args:
        module: the layer.
        formula: what it computes.
        calling: how it was called.
    """

    def __init__(self, module: nn.Module, formula: Formula, calling: Calling) -> None:
        super().__init__(formula)
        self.module, self.calling = module, calling

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer returns."""
        calling, calls = self.calling, glue()
        if calls is None or len(args) != 1 or not kwargs.keys() <= calling.names:
            return self._plain(*args, **kwargs)
        hidden, cache = args[0], kwargs.get(calling.cache)
        mask = None if calling.mask is None else kwargs.get(calling.mask)
        tables = None if calling.tables is None else kwargs.get(calling.tables)
        if not (isinstance(cache, Cache) and are_steps(hidden)):
            return self._plain(*args, **kwargs)
        rows, count, _ = hidden.shape
        if not (self._can_rotate(tables, count) and sees(mask, count)):
            return self._plain(*args, **kwargs)
        if count > 1 and not self._takes_several(cache, mask):
            return self._plain(*args, **kwargs)

        def update(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            return cache.update(keys, values, calling.layer)

        if count == 1:
            output = self.run(hidden, Around(tables, update, mask, calls))
        else:
            output = self.formula(hidden, Around(of_each_step(tables, rows, count), update, mask, calls))
        return (output,) if calling.as_tuple else output

    def _takes_several(self, cache: Cache, mask: Tensor | None) -> bool:
        """Whether several steps may go the quick way; without a mask only from the first one on."""
        layer = self.calling.layer
        return self.calling.takes_several and (mask is not None or cache.get_seq_length(layer) == 0)

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def _can_rotate(self, tables: Any, count: int) -> bool:
        """Whether positions came as they are read."""
        if self.formula.attention.rotation is None:
            return True
        return (
            isinstance(tables, tuple)
            and len(tables) == 2
            and tables[0].dtype == torch.float32
            and tables[0].is_contiguous()
            and tables[1].is_contiguous()
            and (count == 1 or are_of_each_step(tables, count))
        )


class QuickBlock(Step):
    """A step of a block that speaks."""

    def __call__(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        *,
        bias: Tensor | None,
        cache: TtsCache,
        index: int,
    ) -> Tensor | None:
        """Return the block's output, None if it is to be computed otherwise; the rest as for ``TtsBlock``."""
        calls = glue()
        if calls is None or not (is_step(hidden) and sees(bias) and rotation[0].dtype == torch.float32):
            return None

        def update(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            return cache.append(index, keys, values)

        return self.run(hidden, Around(rotation, update, bias, calls))


def quick_block(block: TtsBlock) -> QuickBlock:
    """Return what a block that speaks computes in a step."""
    width = block.head_width

    def norm(module: nn.RMSNorm) -> Norm:
        assert module.eps is not None
        return Norm(module.weight, 0.0, module.eps)

    heads, kv_heads = (layer.out_features // width for layer in (block.query, block.key))
    return QuickBlock(
        Formula(
            Branch(
                norm(block.attention_norm),
                Products([block.query, block.key, block.value]),
                Products([block.output]),
            ),
            Attention(heads, kv_heads, width, width, width**-0.5, Rotation(width)),
            Branch(norm(block.mlp_norm), Products([block.gate, block.up]), Products([block.down])),
            Gated("silu"),
        )
    )


def readable(states: Tensor) -> Tensor:
    """Keys or values as the compiled calls read them, which is how nearly all caches give them."""
    if states.dtype == torch.float32 and states.stride(3) == 1:
        return states
    return states.float().contiguous()


def are_steps(hidden: Any) -> bool:
    """Whether hidden states are those of steps that nobody learns from, as the compiled calls want."""
    return (
        isinstance(hidden, Tensor)
        and hidden.dim() == 3
        and hidden.dtype == torch.float32
        and hidden.device.type == "cpu"
        and hidden.is_contiguous()
        and not (hidden.requires_grad and torch.is_grad_enabled())
    )


def is_step(hidden: Any) -> bool:
    """Whether they are those of single steps."""
    return are_steps(hidden) and hidden.shape[1] == 1


def sees(mask: Any, count: int = 1) -> bool:
    """Whether a mask is one that the compiled calls, or several steps, read."""
    return mask is None or (
        isinstance(mask, Tensor)
        and mask.dtype == torch.bool
        and mask.dim() == 4
        and mask.shape[1] == 1
        and mask.shape[2] == count
        and mask.stride(3) == 1
    )


def are_of_each_step(tables: tuple[Tensor, Tensor], count: int) -> bool:
    """Whether cosines and sines are [B or 1, S, W] for S = ``count``."""
    return all(table.dim() == 3 and table.shape[1] == count for table in tables)


def of_each_step(tables: tuple[Tensor, Tensor] | None, rows: int, count: int) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines [B or 1, S, W] with a row for each step of each of ``rows``, [B S, 1, W]."""
    if tables is None:
        return None
    cosines, sines = (
        table.expand(rows, count, table.shape[-1]).reshape(-1, 1, table.shape[-1]) for table in tables
    )
    return cosines, sines
