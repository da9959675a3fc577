"""What a device multiplies natively, and what follows for trainings."""

import pytest
import torch

from omni_adapter import arithmetic, train


@pytest.mark.parametrize(
    ("found", "native"),
    [({}, False), ({"avx2": True, "avx512_bf16": False}, False), ({"amx_bf16": True}, True)],
)
def test_a_processor_multiplies_what_it_says(monkeypatch, found, native):
    monkeypatch.setattr(arithmetic, "processor_capabilities", lambda: found)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert arithmetic.multiplies_bfloat16(torch.device("cpu")) is native
    assert train._mixed_precision("auto") == ("bf16" if native else "no")


def test_what_is_asked_for_is_done(monkeypatch):
    monkeypatch.setattr(arithmetic, "processor_capabilities", dict)
    assert [train._mixed_precision(asked) for asked in ("fp32", "bf16", "fp16")] == ["no", "bf16", "fp16"]
