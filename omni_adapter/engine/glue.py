"""What lies between the products of one step, each in one call: norms, rotary positions, attention, gates.

Rows in float32 in and out, on the processor. The calls are those of ``glue.c``, compiled by the machine's own
compiler; where there is none, ``glue()`` is None and callers go on with torch. Knows nothing of models.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_adapter.compiling import Signature, checked, declared

SOURCE = Path(__file__).with_name("glue.c")

_CHECKED_SHAPE = (2, 5, 64)  # rows, steps, width of a head of the check
_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
_SIGNATURES: dict[str, Signature] = {
    "omni_norm": (
        None,
        (
            *(_POINTER, _POINTER, _FLOAT, _POINTER, _POINTER, _FLOAT, _FLOAT, _POINTER),
            *(_LONG, _LONG),
        ),
    ),
    "omni_rotate": (
        None,
        (
            *(_POINTER, _LONG, _LONG, _LONG, _LONG, _POINTER, _FLOAT, _FLOAT),
            *(_POINTER, _POINTER, _LONG, _LONG, _LONG, _LONG),
        ),
    ),
    "omni_attend": (
        _INT,
        (
            *(_POINTER, _LONG),
            *(_POINTER, _LONG, _LONG, _LONG),
            *(_POINTER, _LONG, _LONG, _LONG),
            *(_POINTER, _LONG, _POINTER),
            *(_LONG,) * 6,
            _FLOAT,
        ),
    ),
    "omni_gate": (None, (_POINTER, _POINTER, _LONG, _POINTER, _LONG, _LONG, _LONG)),
    "omni_layer_begin": (
        _INT,
        (
            *(_POINTER, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG),
            *(_POINTER, _POINTER),
        ),
    ),
    "omni_layer_end": (
        _INT,
        (
            *(_POINTER, _POINTER, _LONG, _POINTER),
            *(_POINTER, _LONG, _LONG, _LONG),
            *(_POINTER, _LONG, _LONG, _LONG),
            *(_POINTER, _LONG, _LONG, _POINTER, _POINTER),
        ),
    ),
}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "gelu": F.gelu,
}
"""Activations of gated layers; those that ``glue.c`` knows come first, in its order."""

NATIVE_ACTIVATIONS = ("silu", "gelu_tanh", "relu")
"""Those that the compiled calls know."""


@dataclass(frozen=True)
class Norm:
    """Division by the root of the mean square, then a weight.

    Attributes:
        weight: [W].
        offset: added to the weight.
        epsilon: added to the mean square.
    """

    weight: Tensor
    offset: float
    epsilon: float


@dataclass(frozen=True)
class Rotation:
    """How heads are rotated by their positions.

    Attributes:
        turned: columns of each head that are, from the first.
        pair_step: neighbours are rotated together, and pairs take every so manieth cosine; 0 if each column
            is rotated with one of the other half.
    """

    turned: int
    pair_step: int = 0


class Glue:
    """The compiled calls on tensors: contiguous rows in float32, unless a call says otherwise."""

    def __init__(self, library: ctypes.CDLL) -> None:
        declared(library, _SIGNATURES)
        self._norm, self._rotate = library.omni_norm, library.omni_rotate
        self._attend, self._gate = library.omni_attend, library.omni_gate
        self.begin_layer, self.end_layer = library.omni_layer_begin, library.omni_layer_end

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """Return the norm of rows [..., W]."""
        out = torch.empty_like(x)
        pointer, width = norm.weight.data_ptr(), x.shape[-1]
        rows = x.numel() // width
        self._norm(
            x.data_ptr(), None, 0.0, None, pointer, norm.offset, norm.epsilon, out.data_ptr(), rows, width
        )
        return out

    def add_norm(self, x: Tensor, added: Tensor, scale: float, norm: Norm) -> tuple[Tensor, Tensor]:
        """Return ``x + scale * added`` and the norm of it."""
        total, out = torch.empty_like(x), torch.empty_like(x)
        pointer, width = norm.weight.data_ptr(), x.shape[-1]
        self._norm(
            *(x.data_ptr(), added.data_ptr(), scale, total.data_ptr(), pointer, norm.offset, norm.epsilon),
            *(out.data_ptr(), x.numel() // width, width),
        )
        return total, out

    def rotate(
        self,
        x: Tensor,
        *,
        heads: int,
        width: int,
        norm: Norm | None,
        rotation: Rotation | None,
        tables: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Normalise and rotate the heads of rows in place.

        Args:
            x: rows of ``heads`` heads of ``width``, [B, 1, heads * width], by any stride between rows.
            heads: of each row.
            width: of a head.
            norm: of each head.
            rotation: how they are rotated.
            tables: cosines and sines, [B or 1, ..., turned or turned / 2].
        """
        weight = None if norm is None else norm.weight.data_ptr()
        offset, epsilon = (0.0, 0.0) if norm is None else (norm.offset, norm.epsilon)
        cosines = sines = None
        turned = table_stride = second_half = pair_step = 0
        if rotation is not None and tables is not None:
            turned, pair_step = rotation.turned, rotation.pair_step
            cosines, sines, table_stride, second_half = table_places(tables, turned)
        self._rotate(
            *(x.data_ptr(), x.shape[0], x.stride(0), heads, width, weight, offset, epsilon),
            *(cosines, sines, turned, table_stride, second_half, pair_step),
        )

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Return what one query a row reads from all steps, [B, 1, H * W].

        Args:
            query: [B, 1, H * W], by any stride between rows.
            keys: [B, h, steps, W], by any strides but those of W.
            values: likewise.
            mask: bool [B, 1, 1, steps], true at what is seen; None for all.
            scale: of the products of queries and keys.
        """
        rows, kv_heads, steps, width = keys.shape
        assert mask is None or mask.shape[3] == steps
        group = query.shape[-1] // (kv_heads * width)
        value_width = values.shape[-1]
        out = torch.empty(rows, 1, kv_heads * group * value_width)
        key_row, key_head, key_step, _ = keys.stride()
        value_row, value_head, value_step, _ = values.stride()
        failed = self._attend(
            *(query.data_ptr(), query.stride(0), keys.data_ptr(), key_row, key_head, key_step),
            *(values.data_ptr(), value_row, value_head, value_step),
            *((None, 0) if mask is None else (mask.data_ptr(), mask.stride(0))),
            *(out.data_ptr(), rows, kv_heads, group, steps, width, value_width, scale),
        )
        if failed:
            raise MemoryError(f"no memory for attention over {steps} steps")
        return out

    def gate(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """Return ``activation(gate) * up``, [B, 1, W]; rows of both lie by any stride, the same for both."""
        if activation not in NATIVE_ACTIVATIONS:
            return ACTIVATIONS[activation](gate) * up
        rows, _, width = gate.shape
        out = torch.empty(rows, 1, width)
        code = NATIVE_ACTIVATIONS.index(activation)
        self._gate(gate.data_ptr(), up.data_ptr(), gate.stride(0), out.data_ptr(), rows, width, code)
        return out


def table_places(tables: tuple[Tensor, Tensor], turned: int) -> tuple[int, int, int, int]:
    """Where cosines and sines lie, numbers from row to row, and from the first half's to the second's."""
    cosines, sines = tables
    columns = cosines.shape[-1]
    row = 0 if cosines.shape[0] == 1 else columns
    return cosines.data_ptr(), sines.data_ptr(), row, turned // 2 if columns == turned else 0


@cache
def glue() -> Glue | None:
    """The compiled calls; None where they cannot be compiled, or give wrong numbers."""
    return checked(SOURCE, Glue, _is_right)


def _is_right(calls: Glue) -> bool:
    """Whether the calls give what torch gives."""
    rows, steps, width = _CHECKED_SHAPE
    with torch.inference_mode():
        x = torch.randn(rows, 1, 2 * width, generator=torch.Generator().manual_seed(0))
        norm = Norm(torch.ones(2 * width), 1.0, 1e-6)
        heads = x.view(rows, 1, 2, width)
        query, keys = heads.transpose(1, 2), heads.repeat(1, steps, 1, 1).cumsum(1).transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, keys, keys, scale=1.0).transpose(1, 2).flatten(2)
        gate, up = x.chunk(2, dim=-1)
        pairs = (
            (calls.norm(x, norm), F.rms_norm(x, (2 * width,), norm.weight + 1, 1e-6)),
            (calls.attend(x, keys, keys, None, 1.0), attended),
            (calls.gate(gate, up, "silu"), F.silu(gate) * up),
            (calls.gate(gate, up, "gelu_tanh"), F.gelu(gate, approximate="tanh") * up),
        )
        return all(torch.allclose(came, expected, rtol=1e-4, atol=1e-4) for came, expected in pairs)
