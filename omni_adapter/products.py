"""Weights in tiles, and their products with rows, each in one compiled call.

Rows in float32 in and out, on the processor. The calls are those of ``products.c``, compiled by the machine's
own compiler; where there is none, a weight in tiles cannot be made, and the error says why. Knows nothing of
models, or of how numbers are quantised.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from omni_adapter.arena import Place
from omni_adapter.compiling import Signature, compiled, declared, why_not

SOURCE = Path(__file__).with_name("products.c")
TILE_OUTPUTS = 16
"""Outputs of a tile; pieces of a weight begin at multiples of it."""

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long
_SIGNATURES: dict[str, Signature] = {
    "omni_product_int8": (ctypes.c_int, (_POINTER, _POINTER, _LONG, _POINTER)),
    "omni_product_bf16": (ctypes.c_int, (_POINTER, _POINTER, _LONG, _POINTER)),
    "omni_product_fp32": (ctypes.c_int, (_POINTER, _POINTER, _LONG, _POINTER)),
    "omni_tiled_bytes": (_LONG, (_LONG,) * 3),
    "omni_tile": (None, (_POINTER, _LONG, _LONG, _LONG, _LONG, ctypes.c_uint8, _POINTER)),
}
_CALLS = {
    torch.int8: "omni_product_int8",
    torch.bfloat16: "omni_product_bf16",
    torch.float32: "omni_product_fp32",
}
_OFFSETS = {torch.int8: 128}
"""Added to each byte of a weight: bytes without a sign are multiplied with those that have one."""


class _Weight(ctypes.Structure):
    """As the sources declare it."""

    _fields_ = (
        ("weight", _POINTER),
        ("scale", _POINTER),
        ("bias", _POINTER),
        ("outputs", _LONG),
        ("inputs", _LONG),
    )


class TiledWeight:
    """A weight [out, in] in tiles; calling it multiplies rows with it.

    Args:
        outputs: rows of the weight.
        inputs: columns of the weight.
        dtype: of its numbers.
        scale: of each output, float32 [out]; of weights in 8 bits only.
        bias: float32 [out], or None.

    Raises:
        NotImplementedError: if the calls cannot be compiled here.
    """

    def __init__(
        self, outputs: int, inputs: int, *, dtype: torch.dtype, scale: Tensor | None, bias: Tensor | None
    ) -> None:
        library = _library()
        if library is None:
            raise NotImplementedError(why_not(SOURCE))
        self.outputs, self.inputs, self.dtype = outputs, inputs, dtype
        self.scale, self.bias = scale, bias  # read by address, so they must stay
        self._place = Place(library.omni_tiled_bytes(outputs, inputs, dtype.itemsize))
        self._tile: Callable[..., None] = library.omni_tile
        self._multiply: Callable[..., int] = getattr(library, _CALLS[dtype])
        self._weight = _Weight(
            self._place.memory.data_ptr(),
            None if scale is None else scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            outputs,
            inputs,
        )
        self._address = ctypes.addressof(self._weight)

    @property
    def native(self) -> tuple[int, int]:
        """Addresses of the compiled call and of the weight that it takes, for other compiled code."""
        call = ctypes.cast(self._multiply, _POINTER).value  # type: ignore[arg-type]
        assert call is not None
        return call, self._address

    @property
    def nbytes(self) -> int:
        """Memory of the tiles."""
        return self._place.memory.nbytes

    def fill(self, start: int, piece: Tensor) -> None:
        """Write rows of the weight, [n, in], from row ``start``, a multiple of ``TILE_OUTPUTS``."""
        assert piece.dtype == self.dtype
        assert piece.is_contiguous()
        assert start % TILE_OUTPUTS == 0
        rows, inputs = piece.shape
        offset, width = _OFFSETS.get(self.dtype, 0), self.dtype.itemsize
        self._tile(piece.data_ptr(), start, rows, inputs, width, offset, self._place.memory.data_ptr())

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias``, [..., out], of rows [..., in] in float32, contiguous."""
        out = torch.empty(*x.shape[:-1], self.outputs)
        if self._multiply(self._address, x.data_ptr(), x.numel() // self.inputs, out.data_ptr()):
            raise MemoryError(f"no memory for a product of rows {list(x.shape)}")
        return out


def can_tile() -> bool:
    """Whether the calls can be compiled here."""
    return _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    return _declared(compiled(SOURCE))


def _declared(library: ctypes.CDLL | None) -> ctypes.CDLL | None:
    return None if library is None else declared(library, _SIGNATURES)
