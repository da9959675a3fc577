"""Snakes on rows in one call each: the activation ``x + sin(a x)^2 / a`` of SNAC (Ziyin et al., 2020).

Contiguous rows in float32 in, in float32 or bfloat16 out, on the processor. The calls are those of
``snake.c``, compiled by the machine's own compiler; where there is none, ``snake_calls()`` is None and
callers go on with torch. Knows nothing of codecs.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_adapter.compiling import Signature, checked, declared

SOURCE = Path(__file__).with_name("snake.c")

_CHECKED_SHAPE = (9, 40)  # rows, width of the check
_CHECKED_SIZE = 100.0  # of its arguments
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_SIGNATURES: dict[str, Signature] = {
    "omni_snake": (None, (*(_POINTER,) * 5, _LONG, _LONG, _INT)),
    "omni_depthwise_snake": (None, (*(_POINTER,) * 4, *(_LONG,) * 4, _INT)),
    "omni_add_rounded": (None, (_POINTER, _POINTER, _POINTER, _LONG, _LONG)),
    "omni_round": (None, (_POINTER, _POINTER, _LONG, _LONG)),
}


class SnakeCalls:
    """The compiled calls on tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        declared(library, _SIGNATURES)
        self._snake, self._depthwise_snake = library.omni_snake, library.omni_depthwise_snake
        self._round, self._add_rounded = library.omni_round, library.omni_add_rounded

    def __reduce__(self) -> tuple[Callable[[], "SnakeCalls | None"], tuple[()]]:
        """Copies, and what another process unpickles, use the calls compiled there."""
        return snake_calls, ()

    def snake(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        after: Tensor | None = None,
        out: Tensor | None = None,
        rounded: bool = False,
    ) -> Tensor:
        """Return ``(u + sin(u)^2) * after`` with ``u = x * scale + shift``.

        Args:
            x: rows [..., W].
            scale: [W], or None for 1; what follows goes with a scale.
            shift: [W], or None for 0.
            after: [W], or None for 1.
            out: where to write it, of the shape of ``x``.
            rounded: return bfloat16; with an ``out``, what that is decides.
        """
        out = _room(x.shape, rounded) if out is None else out
        width = x.shape[-1]
        self._snake(
            *(x.data_ptr(), _address(scale), _address(shift), _address(after), out.data_ptr()),
            *(x.numel() // width, width, out.dtype == torch.bfloat16),
        )
        return out

    def depthwise_snake(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *, dilation: int, rounded: bool = False
    ) -> Tensor:
        """Return ``u + sin(u)^2`` of what a convolution of each channel by itself makes of rows.

        Args:
            x: rows [n, C].
            weight: of each place and channel, [places, C].
            bias: [C], or None for 0.
            dilation: rows from one place to the next.
            rounded: return bfloat16.

        Returns:
            [n - (places - 1) * dilation, C], which must not be negative.
        """
        places, width = weight.shape
        out = _room((x.shape[0] - (places - 1) * dilation, width), rounded)
        self._depthwise_snake(
            *(x.data_ptr(), weight.data_ptr(), _address(bias), out.data_ptr()),
            *(out.shape[0], width, places, dilation, rounded),
        )
        return out

    def round(self, x: Tensor) -> Tensor:
        """Return rows [n, W] as bfloat16."""
        out = _room(x.shape, rounded=True)
        self._round(x.data_ptr(), out.data_ptr(), *x.shape)
        return out

    def add_rounded(self, total: Tensor, added: Tensor, factor: Tensor | None = None) -> None:
        """Add ``factor * added`` to rows in place.

        Args:
            total: [n, W].
            added: bfloat16 [n, W].
            factor: of each row, [n], or None for 1.
        """
        self._add_rounded(total.data_ptr(), added.data_ptr(), _address(factor), *total.shape)


def _room(shape: Sequence[int], rounded: bool) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16 if rounded else torch.float32)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def snake_calls() -> SnakeCalls | None:
    """The compiled calls; None where they cannot be compiled, or give wrong numbers."""
    return checked(SOURCE, SnakeCalls, _is_right)


def _is_right(calls: SnakeCalls) -> bool:
    """Whether the calls give what torch gives."""
    rows, width = _CHECKED_SHAPE
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(rows, width, generator=generator) * _CHECKED_SIZE
        weight = torch.randn(3, width, generator=generator)
        bias, scale = weight[0], weight[1]
        argument = x * scale + bias
        image = F.conv1d(x.t(), weight.t()[:, None].contiguous(), bias, dilation=2, groups=width).t()
        rounded = calls.round(x)
        total = x.clone()
        calls.add_rounded(total, rounded, x[:, 0].contiguous())
        pairs = (
            (calls.snake(x, scale, bias), argument + argument.sin().square()),
            (calls.depthwise_snake(x, weight, bias, dilation=2), image + image.sin().square()),
            (rounded, x.to(torch.bfloat16)),
            (total, x + x[:, :1] * rounded),
        )
        return all(torch.allclose(came, expected, rtol=1e-4, atol=1e-4) for came, expected in pairs)
