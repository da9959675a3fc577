"""How weights are held and multiplied: as they came, in float32, in bfloat16 or in 8 bits.

What was asked for and a device in; the precision and the reason out. Goes by what torch says of the machine.
Knows nothing of models or kernels.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch

from omni_adapter.arithmetic import BFLOAT16, multiplies_bfloat16, processor_capabilities
from omni_adapter.errors import ConfigError

Precision = Literal["fp32", "bf16", "int8", "auto"]
"""``fp32`` computes as exactly as the plain way; ``bf16`` and ``int8`` narrow weights of linear layers."""

PRECISIONS: tuple[str, ...] = get_args(Precision)

_DOT_PRODUCTS = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "dot", "sve_i8mm")


class Choice(NamedTuple):
    """A precision, never ``auto``, and why."""

    precision: str
    reason: str


def choose_precision(
    asked: str, device: torch.device, *, capabilities: Mapping[str, Any] | None = None
) -> Choice:
    """Return the precision for a device.

    ``auto`` takes bfloat16 where the machine multiplies it natively, else 8 bits where it has dot products of
    those, else float32. 8 bits are quicker still than bfloat16, and coarser: they are for those who ask.

    Args:
        asked: one of ``PRECISIONS``.
        device: where the weights are.
        capabilities: what the processor can do; None asks torch.

    Raises:
        ConfigError: if there is no such precision.
    """
    if asked not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {asked!r}")
    if asked != "auto":
        return Choice(asked, "asked for")
    if device.type != "cpu":
        if multiplies_bfloat16(device):
            return Choice("bf16", f"{device.type} computes in bfloat16")
        return Choice("fp32", f"{device.type} does not say that it computes in bfloat16")
    found = processor_capabilities() if capabilities is None else capabilities
    for precision, wanted in (("bf16", BFLOAT16), ("int8", _DOT_PRODUCTS)):
        if has := [name for name in wanted if found.get(name)]:
            return Choice(precision, f"the processor has {', '.join(has)}")
    return Choice("fp32", "the processor multiplies neither bfloat16 nor 8 bits natively")
