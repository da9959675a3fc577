"""Which arithmetic a device has of its own, by what torch says of it.

A device in, yes or no out. What it lacks it can often do all the same, tens of times slower.
"""

from collections.abc import Mapping
from typing import Any

import torch

BFLOAT16 = ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16")
"""What a processor that multiplies bfloat16 has one of."""


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 natively."""
    if device.type == "cpu":
        found = processor_capabilities()
        return any(found.get(name) for name in BFLOAT16)
    tell = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return bool(tell and tell())


def has_vectors_of_64_bytes() -> bool:
    """Whether the processor's vectors hold 16 numbers in float32."""
    return bool(processor_capabilities().get("avx512_f"))


def processor_capabilities() -> Mapping[str, Any]:
    """What torch says that the processor can do, by name; empty where it does not tell."""
    tell = getattr(torch.cpu, "get_capabilities", None)
    found: Mapping[str, Any] = tell() if tell else {}
    return found
