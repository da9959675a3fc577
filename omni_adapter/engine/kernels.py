"""One matrix times some rows, in each of the ways that this machine has.

Rows in, [..., in]; rows out, [..., out], in the type of the rows that came. A kernel takes a weight [out, in]
and holds it in the form that it reads quickest. Operators of torch are called, or those of ``products``; one
that is missing here, or that gives a wrong product, says so. Knows nothing of models, or of which kernel is
the best.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_adapter.products import TiledWeight

_FEW_ROWS = 3  # up to here the product that reads rows of a plain weight one by one is the quicker one
_PIECE_ROWS = 1 << 10  # rows of a weight that are converted at once
_INT8_LIMIT = 127
_LANES = 16
_LEAST_SCALE = 1e-30  # of a row of zeros
_CHECKED_SHAPE = (3, 48, 64)  # rows, in, out of the product that a kernel is tried on

Used = Callable[[Tensor], None]
"""Told of a part of a weight that will not be read again."""


class Kernel:
    """Holds a weight and multiplies rows with it.

    Attributes:
        name: by which it is asked for.
        precision: of what it computes with.
        nbytes: memory of what it holds.
    """

    name: ClassVar[str]
    precision: ClassVar[str]
    tolerance: ClassVar[float]  # of the norm of a product of random numbers
    nbytes: int

    def __init__(self, weight: Tensor, bias: Tensor | None, *, used: Used | None = None) -> None:
        """Take a weight [out, in] and a bias [out] over; ``used`` is told of pieces that were read."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias``, [..., out], of rows [..., in]."""
        raise NotImplementedError


class PlainFloat32(Kernel):
    """What a linear layer does, in float32."""

    name, precision, tolerance = "plain-fp32", "fp32", 1e-5

    def __init__(self, weight: Tensor, bias: Tensor | None, *, used: Used | None = None) -> None:
        self.weight, self.bias = _owned(weight, torch.float32), _float(bias)
        self.nbytes = self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """As every kernel."""
        return F.linear(x.float(), self.weight, self.bias).to(x.dtype)


class MixedFloat32(PlainFloat32):
    """Few rows as a linear layer does it; more by oneDNN, which reads the same weight once for all."""

    name = "mixed-fp32"

    def __call__(self, x: Tensor) -> Tensor:
        """As every kernel."""
        if x.numel() <= _FEW_ROWS * x.shape[-1]:
            return super().__call__(x)
        return _pointwise(x.float().contiguous(), self.weight, self.bias).to(x.dtype)


class PackedFloat32(Kernel):
    """A weight in the blocks that oneDNN reads quickest."""

    name, precision, tolerance = "packed-fp32", "fp32", 1e-5
    dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(self, weight: Tensor, bias: Tensor | None, *, used: Used | None = None) -> None:
        weight = weight.to(self.dtype).contiguous()
        self.nbytes = weight.nbytes
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias = None if bias is None else _owned(bias, self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """As every kernel."""
        return _pointwise(x.to(self.dtype).contiguous(), self.packed, self.bias).to(x.dtype)


class PackedBfloat16(PackedFloat32):
    """The same in bfloat16; products are added up in float32."""

    name, precision, tolerance = "packed-bf16", "bf16", 2e-2
    dtype = torch.bfloat16


class PlainBfloat16(Kernel):
    """What a linear layer does, in bfloat16."""

    name, precision, tolerance = "plain-bf16", "bf16", 2e-2

    def __init__(self, weight: Tensor, bias: Tensor | None, *, used: Used | None = None) -> None:
        self.weight = _owned(weight, torch.bfloat16)
        self.bias = None if bias is None else _owned(bias, torch.bfloat16)
        self.nbytes = self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """As every kernel."""
        return F.linear(x.to(torch.bfloat16), self.weight, self.bias).to(x.dtype)


class RowwiseInt8(Kernel):
    """Weight and rows in 8 bits: a scale for each output of the weight, and one for each row when it comes.

    A row is never coarser for what stands beside it, so that rows come out as they do alone. Sums of products
    are exact in 32 bits; they are scaled, and the bias is added, in float32.
    """

    name, precision, tolerance = "rowwise-int8", "int8", 3e-2

    def __init__(self, weight: Tensor, bias: Tensor | None, *, used: Used | None = None) -> None:
        quantised, self.scale = quantise_rows(weight, used=used)
        self.packed: Tensor = torch.ops.onednn.qlinear_prepack(quantised, None)
        self.nbytes = quantised.nbytes + self.scale.nbytes
        self.zero = torch.zeros(len(quantised), dtype=torch.int32)
        self.bias = _float(bias)
        self._multiply: Callable[..., Tensor] = torch.ops.onednn.qlinear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        """As every kernel."""
        rows = x.float()
        scale = rows.abs().amax(dim=-1, keepdim=True).clamp_(min=_LEAST_SCALE).mul_(1 / _INT8_LIMIT)
        whole = (rows / scale).round_().to(torch.int8)
        sums = self._multiply(
            whole, 1.0, 0, self.packed, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        product = sums.mul_(scale) if self.bias is None else torch.addcmul(self.bias, sums, scale)
        return product.to(x.dtype)


class _Tiled(Kernel):
    """A weight in tiles, multiplied in one call."""

    _product: TiledWeight

    @property
    def native(self) -> tuple[int, int]:
        """As ``TiledWeight`` says."""
        return self._product.native

    def __call__(self, x: Tensor) -> Tensor:
        """As every kernel."""
        if x.dtype == torch.float32 and x.is_contiguous():
            return self._product(x)
        return self._product(x.float().contiguous()).to(x.dtype)


class TiledFloat32(_Tiled):
    """A weight in float32, multiplied in one call."""

    name, precision, tolerance = "tiled-fp32", "fp32", 1e-5
    dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(self, weight: Tensor, bias: Tensor | None, *, used: Used | None = None) -> None:
        self._product = TiledWeight(*weight.shape, dtype=self.dtype, scale=None, bias=_float(bias))
        for start in range(0, len(weight), _PIECE_ROWS):
            read = weight[start : start + _PIECE_ROWS]
            self._product.fill(start, _owned(read, self.dtype))
            if used is not None:
                used(read)
        self.nbytes = self._product.nbytes


class TiledBfloat16(TiledFloat32):
    """The same in bfloat16; products are added up in float32."""

    name, precision, tolerance = "tiled-bf16", "bf16", 2e-2
    dtype = torch.bfloat16


class TiledInt8(_Tiled):
    """As ``RowwiseInt8``, quantised, multiplied and scaled in one call, and quicker for few rows."""

    name, precision, tolerance = "tiled-int8", "int8", 3e-2

    def __init__(self, weight: Tensor, bias: Tensor | None, *, used: Used | None = None) -> None:
        scale = torch.empty(len(weight))
        self._product = TiledWeight(*weight.shape, dtype=torch.int8, scale=scale, bias=_float(bias))
        for start, quantised, scales in quantised_pieces(weight, used=used):
            self._product.fill(start, quantised.contiguous())
            scale[start : start + len(scales)] = scales
        self.nbytes = self._product.nbytes + scale.nbytes


class WeightOnlyInt8(Kernel):
    """A weight in 8 bits, with a scale for each output; rows stay in bfloat16."""

    name, precision, tolerance = "weight-only-int8", "int8", 3e-2

    def __init__(self, weight: Tensor, bias: Tensor | None, *, used: Used | None = None) -> None:
        quantised, scale = quantise_rows(weight, used=used)
        # The operator reads so many columns at once, and beyond the end where they are fewer.
        self.missing = -weight.shape[1] % _LANES
        self.weight = F.pad(quantised, (0, self.missing)) if self.missing else quantised
        self.scale = scale.to(torch.bfloat16)
        self.bias = _float(bias)
        self.nbytes = self.weight.nbytes + self.scale.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """As every kernel."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
        if self.missing:
            rows = F.pad(rows, (0, self.missing))
        product: Tensor = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)
        product = product.view(*x.shape[:-1], -1)
        return product.to(x.dtype) if self.bias is None else (product + self.bias).to(x.dtype)


KERNELS: dict[str, type[Kernel]] = {
    kernel.name: kernel
    for kernel in (
        TiledFloat32,
        MixedFloat32,
        PackedFloat32,
        PlainFloat32,
        TiledBfloat16,
        PackedBfloat16,
        PlainBfloat16,
        TiledInt8,
        RowwiseInt8,
        WeightOnlyInt8,
    )
}
"""Kernels by name, those that are preferred unmeasured first."""


def allowed(precision: str) -> tuple[type[Kernel], ...]:
    """Kernels of a precision that work on this machine, at least one.

    Where none of 8 bits does, those of bfloat16 stand in.
    """
    order = {"fp32": ("fp32",), "bf16": ("bf16",), "int8": ("int8", "bf16")}[precision]
    for one in order:
        found = tuple(
            kernel for kernel in KERNELS.values() if kernel.precision == one and not why_not(kernel)
        )
        if found:
            return found
    return (PlainFloat32,)


def why_not(kernel: type[Kernel]) -> str:
    """Return why a kernel cannot be used on this machine, empty if it can: it is tried on a small product."""
    return _why_not(kernel.name)


@cache
def _why_not(name: str) -> str:
    kernel = KERNELS[name]
    rows, width, outputs = _CHECKED_SHAPE
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator)
    # One row and one output at their limits, where sums that are too narrow would overflow.
    x[0], weight = 1.0, torch.randn(outputs, width, generator=generator)
    weight[0] = weight.abs().max()
    bias = torch.randn(outputs, generator=generator)
    try:
        with torch.no_grad():
            came, expected = kernel(weight, bias)(x), F.linear(x, weight, bias)
    except (AttributeError, RuntimeError) as error:  # NotImplementedError is one
        return f"this machine has no such operator: {str(error).splitlines()[0]}"
    worst = float(((came - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    return "" if worst <= kernel.tolerance else f"its product is off by {worst:.1%}"


def quantise_rows(weight: Tensor, *, used: Used | None = None) -> tuple[Tensor, Tensor]:
    """Return a weight [out, in] in 8 bits and the scale of each of its rows, float32 [out].

    Args:
        weight: read piece by piece.
        used: told of each piece that was read.
    """
    quantised = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight))
    for start, piece, scale in quantised_pieces(weight, used=used):
        quantised[start : start + len(piece)] = piece
        scales[start : start + len(piece)] = scale
    return quantised, scales


def quantised_pieces(weight: Tensor, *, used: Used | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield pieces of a weight [out, in] in 8 bits: their first row, int8 [n, in], and scales, float32 [n].

    Args:
        weight: read piece by piece, as the float32 of all would not fit.
        used: told of each piece that was read.
    """
    for start in range(0, len(weight), _PIECE_ROWS):
        read = weight[start : start + _PIECE_ROWS]
        piece = read.detach().float()
        scale = piece.abs().amax(dim=1).clamp_(min=_LEAST_SCALE).mul_(1 / _INT8_LIMIT)
        yield start, (piece / scale[:, None]).round_().to(torch.int8), scale
        if used is not None:
            used(read)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _owned(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another type; the one that came if it is of that type."""
    return tensor.detach().to(dtype).contiguous()


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else _owned(bias, torch.float32)
