"""Every causal-LM family as a packed talker: as before in float32, bounded in 8 bits.

A few families of different make run always, the popular ones with ``-m slow``, all with ``-m all_families``.
"""

import copy
import gc

import pytest
import torch

from omni_adapter.engine import PackSettings, relative_error
from omni_adapter.engine.pack import parts_of
from tests.families import ALL_FAMILIES, POPULAR
from tests.test_family_grid import NOT_BUILT, REFUSED
from tests.test_family_talkers import (  # noqa: F401 - fixtures are used by name
    check_many_at_once_equal_each_alone,
    check_spoken_text_is_the_written_text,
    check_streamed_equals_whole,
    hearing_and_voice,
    hum,
    tokenizer,
    wrap,
)

ALWAYS = ("falcon_h1", "gemma2", "gpt2", "mixtral", "qwen2")
"""Attention beside a state space, scaled embeddings and caps, transposed weights, experts, biases."""

SLOW = tuple(family for family in POPULAR if family not in ALWAYS)
REST = tuple(name for name in ALL_FAMILIES if name not in {*POPULAR, *NOT_BUILT, *REFUSED})

PACKED = PackSettings(kernels=("packed-fp32",), fuse=True)
FLOAT32_BOUND, INT8_BOUND = 1e-4, 0.6


@torch.no_grad()
def text_outputs(talker) -> list[torch.Tensor]:
    part = next(parts_of(talker.model))
    return [out.clone() for out in part.run()]


def check_family(family: str, tokenizer, hearing_and_voice, hum) -> None:  # noqa: F811
    talker = wrap(family, tokenizer, copy.deepcopy(hearing_and_voice))
    expected = text_outputs(talker)
    report = talker.pack("fp32", settings=PACKED).pack_report
    assert report.layers, f"nothing of {family} could be packed: {report.kept}"
    assert any(name.startswith("backbone") for layer in report.layers for name in layer.names), report.kept
    for came, plain in zip(text_outputs(talker), expected, strict=True):
        assert relative_error(came, plain) <= FLOAT32_BOUND
    for check in (
        check_spoken_text_is_the_written_text,
        check_many_at_once_equal_each_alone,
        check_streamed_equals_whole,
    ):
        check(talker, hum, None)

    talker = wrap(family, tokenizer, copy.deepcopy(hearing_and_voice))
    talker.pack("int8")
    for came, plain in zip(text_outputs(talker), expected, strict=True):
        assert bool(came[plain.isfinite()].isfinite().all())
        seen = plain.isfinite()
        assert relative_error(came[seen], plain[seen]) <= INT8_BOUND
    check_streamed_equals_whole(talker, hum, None)


@pytest.mark.parametrize("family", ALWAYS)
def test_family_of_another_make(family, tokenizer, hearing_and_voice, hum):  # noqa: F811
    check_family(family, tokenizer, hearing_and_voice, hum)


@pytest.mark.slow
@pytest.mark.parametrize("family", SLOW)
def test_popular_family(family, tokenizer, hearing_and_voice, hum):  # noqa: F811
    check_family(family, tokenizer, hearing_and_voice, hum)


@pytest.mark.all_families
@pytest.mark.parametrize("family", REST)
def test_family(family, tokenizer, hearing_and_voice, hum):  # noqa: F811
    try:
        check_family(family, tokenizer, hearing_and_voice, hum)
    finally:
        gc.collect()
