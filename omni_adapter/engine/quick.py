"""One step of a transformer layer: its products, and between them one call each for all that lies there.

Hidden states of single steps in and out, [B, 1, D], in float32 on the processor; the cache is the layer's
own. What a layer computes is given as a formula, which ``recognise`` finds by comparing numbers. A layer goes
the quick way only where a call is of the kind that it was recognised in; else it runs its own code. Knows no
models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from omni_adapter.engine.glue import Glue, Norm, Rotation, glue
from omni_adapter.engine.linears import PackedLinear, Siblings
from omni_adapter.modules.tts_blocks import TtsBlock, TtsCache

Update = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes keys and values of a step, [B, h, 1, W]; returns those of all steps."""


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

    def __call__(self, x: Tensor) -> Tensor:
        """Return what all layers make of rows [B, 1, in], side by side, [B, 1, sum of outs]."""
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

    def __call__(
        self,
        projected: Tensor,
        *,
        tables: tuple[Tensor, Tensor] | None,
        update: Update,
        mask: Tensor | None,
        calls: Glue,
    ) -> Tensor:
        """Return what is read, [B, 1, heads * value_width].

        Args:
            projected: queries, keys and values side by side, [B, 1, sum of sizes]; changed in place.
            tables: cosines and sines.
            update: stores keys and values.
            mask: bool [B, 1, 1, steps], true at what is seen; None for all.
            calls: the compiled calls.
        """
        rows, (queries, keys, _) = projected.shape[0], self.sizes
        row, width, value_width = projected.stride(0), self.width, self.value_width
        start = projected.storage_offset()
        query = projected.as_strided((rows, 1, queries), (row, queries, 1), start)
        key_rows = projected.as_strided((rows, 1, keys), (row, keys, 1), start + queries)
        self._turn(query, self.heads, self.query_norm, tables, calls)
        self._turn(key_rows, self.kv_heads, self.key_norm, tables, calls)
        all_keys, all_values = update(
            projected.as_strided((rows, self.kv_heads, 1, width), (row, width, width, 1), start + queries),
            projected.as_strided(
                (rows, self.kv_heads, 1, value_width),
                (row, value_width, value_width, 1),
                start + queries + keys,
            ),
        )
        return calls.attend(query, all_keys, all_values, mask, self.scale)

    def _turn(
        self,
        x: Tensor,
        heads: int,
        norm: Norm | None,
        tables: tuple[Tensor, Tensor] | None,
        calls: Glue,
    ) -> None:
        """Normalise and rotate heads in place."""
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
        """Return [B, 1, W] of gates and others side by side, [B, 1, 2 W]."""
        first, second = projected.chunk(2, dim=-1)
        gate, up = (first, second) if self.gate_first else (second, first)
        return calls.gate(gate, up, self.activation)


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

    def __call__(
        self,
        hidden: Tensor,
        *,
        tables: tuple[Tensor, Tensor] | None,
        update: Update,
        mask: Tensor | None,
        calls: Glue,
    ) -> Tensor:
        """Return the layer's output, [B, 1, D], of its input; the rest as for ``Attention``."""
        first, second = self.attending, self.mixing
        entered = hidden if first.norm is None else calls.norm(hidden, first.norm)
        read = self.attention(first.enter(entered), tables=tables, update=update, mask=mask, calls=calls)
        came = first.leave(read)
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
    """

    cache: str
    layer: int
    tables: str | None
    mask: str | None
    names: frozenset[str]
    as_tuple: bool


class QuickLayer:
    """Stands in the place of a layer's ``forward``.

    Args:
        module: the layer.
        formula: what it computes.
        calling: how it was called.
    """

    def __init__(self, module: nn.Module, formula: Formula, calling: Calling) -> None:
        self.module, self.formula, self.calling = module, formula, calling

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer returns."""
        calling, calls = self.calling, glue()
        if calls is None or len(args) != 1 or not kwargs.keys() <= calling.names:
            return self._plain(*args, **kwargs)
        hidden, cache = args[0], kwargs.get(calling.cache)
        mask = None if calling.mask is None else kwargs.get(calling.mask)
        tables = None if calling.tables is None else kwargs.get(calling.tables)
        if not (isinstance(cache, Cache) and is_step(hidden) and sees(mask) and self._can_rotate(tables)):
            return self._plain(*args, **kwargs)

        def update(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            return cache.update(keys, values, calling.layer)

        output = self.formula(hidden, tables=tables, update=update, mask=mask, calls=calls)
        return (output,) if calling.as_tuple else output

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def _can_rotate(self, tables: Any) -> bool:
        """Whether positions came as they are read."""
        if self.formula.attention.rotation is None:
            return True
        return (
            isinstance(tables, tuple)
            and len(tables) == 2
            and tables[0].dtype == torch.float32
            and tables[0].is_contiguous()
            and tables[1].is_contiguous()
        )


class QuickBlock:
    """A step of a block that speaks.

    Args:
        formula: what the block computes.
    """

    def __init__(self, formula: Formula) -> None:
        self.formula = formula

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

        return self.formula(hidden, tables=rotation, update=update, mask=bias, calls=calls)


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


def is_step(hidden: Any) -> bool:
    """Whether hidden states are those of single steps that nobody learns from, as the compiled calls want."""
    return (
        isinstance(hidden, Tensor)
        and hidden.dim() == 3
        and hidden.shape[1] == 1
        and hidden.dtype == torch.float32
        and hidden.device.type == "cpu"
        and hidden.is_contiguous()
        and not (hidden.requires_grad and torch.is_grad_enabled())
    )


def sees(mask: Any) -> bool:
    """Whether a mask is one that the compiled calls read."""
    return mask is None or (
        isinstance(mask, Tensor)
        and mask.dtype == torch.bool
        and mask.dim() == 4
        and mask.shape[1] == mask.shape[2] == 1
        and mask.stride(3) == 1
    )
