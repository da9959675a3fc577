"""Linear layers without parameters: a kernel instead of a weight, alone or one for several siblings.

Hidden states in, [..., in]; hidden states out, [..., out]. They stand in the place of ``nn.Linear`` in a
model that only runs; asked to learn, to move or to change their type, they say why not. Know nothing of
models, or of how kernels are chosen.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from omni_adapter.engine.kernels import Kernel
from omni_adapter.errors import ConfigError, TrainingError

Product = Callable[[Tensor], Tensor]


class PackedLinear(nn.Module):
    """A linear layer whose weight only its kernel can read.

    Args:
        product: multiplies rows with the weight.
        weight: of the layer in whose place it comes, for shape and device; it is not kept.
        dtype: of the activations.
        label: what it was packed as, for messages.
        bias: of that layer, which the product adds.
        kernel: what holds the weight, maybe with others'.
        siblings: those whose weights it holds; None if it holds this one alone.
    """

    def __init__(
        self,
        product: Product,
        *,
        weight: Tensor,
        dtype: torch.dtype,
        label: str,
        bias: Tensor | None = None,
        kernel: Kernel | None = None,
        siblings: "Siblings | None" = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.detach()
        self.label = label
        self.kernel = kernel
        self.siblings = siblings
        self._product = product
        self._stand_in = torch.full((1, 1), torch.nan, dtype=dtype, device=weight.device)
        self.training = False

    @property
    def weight(self) -> Tensor:
        """Shape, type and device of the weight, for code that asks for them; its values are not a number."""
        return self._stand_in.expand(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] of [..., in]."""
        if x.requires_grad and torch.is_grad_enabled():
            raise TrainingError(f"no gradient flows through weights packed for {self.label}; {_UNPACKED}")
        return self._product(x)

    def train(self, mode: bool = True) -> Self:
        """Refuse to learn."""
        if mode:
            raise TrainingError(f"weights that are packed for {self.label} cannot learn; {_UNPACKED}")
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Refuse to move or to change type."""
        changed = fn(self._stand_in)
        if (changed.device, changed.dtype) != (self._stand_in.device, self._stand_in.dtype):
            raise ConfigError(
                f"weights that are packed for {self.label} stay on {self._stand_in.device}, asked for "
                f"{changed.device} and {changed.dtype}; load the talker without precision, move it, then "
                "call its pack()"
            )
        return self

    def extra_repr(self) -> str:
        """Sizes and kind."""
        return f"{self.in_features}, {self.out_features}, {self.label}"


_UNPACKED = "load the talker without precision to train it"


class _Held(NamedTuple):
    """What the first sibling was asked, and all of their answers."""

    x: Tensor
    version: int
    answers: Tensor


class Siblings:
    """One product for layers that get the same input one after another.

    The first that is asked computes for all; the others hand their part out if the input is the same tensor,
    unchanged, and compute anew if it is not.

    Args:
        product: of the weights one below the other.
        sizes: outputs of each sibling.
        in_order: whether they are known to be asked one after another, without a change of their input in
            between. Tensors of inference mode, which do not tell whether they were changed, are shared only
            so: from the first that is asked to the last.

    Attributes:
        size: outputs of all.
    """

    def __init__(self, product: Product, sizes: Sequence[int], *, in_order: bool = False) -> None:
        self.product, self.size = product, sum(sizes)
        self._sizes, self._in_order = tuple(sizes), in_order
        self._held: _Held | None = None  # replaced as a whole, so that threads cannot mix two answers

    def member(self, index: int) -> Product:
        """Return the product of one sibling."""
        start = sum(self._sizes[:index])
        end, is_last = start + self._sizes[index], index + 1 == len(self._sizes)

        def product(x: Tensor) -> Tensor:
            held = self._held
            if x.is_inference():
                if not self._in_order:
                    return self.product(x)[..., start:end]
                version, is_same = 0, index > 0
            else:
                version, is_same = x._version, True
            if is_same and held is not None and held.x is x and held.version == version:
                answers = held.answers
            else:
                answers = self.product(x)
                held = _Held(x, version, answers)
                self._held = held if index == 0 else self._held
            if is_last:
                self._held = None
            return answers[..., start:end]

        return product
