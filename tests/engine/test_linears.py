"""Layers with a kernel instead of a weight, and siblings that share a product."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from omni_adapter.engine.linears import PackedLinear, Siblings
from omni_adapter.errors import ConfigError, TrainingError


def packed(linear: nn.Linear) -> PackedLinear:
    return PackedLinear(
        lambda x: F.linear(x, linear.weight, linear.bias),
        weight=linear.weight,
        dtype=torch.float32,
        label="int8",
        bias=linear.bias,
    )


class Counted:
    """Products of three layers with 2, 3 and 4 outputs."""

    def __init__(self):
        torch.manual_seed(0)
        self.weight = torch.randn(9, 5)
        self.calls = 0
        siblings = Siblings(self, (2, 3, 4))
        self.members = [siblings.member(index) for index in range(3)]
        self.slices = [slice(0, 2), slice(2, 5), slice(5, 9)]
        self.siblings = siblings

    def __call__(self, x):
        self.calls += 1
        return x @ self.weight.T

    def assert_right(self, index, x):
        expected = (x @ self.weight.T)[..., self.slices[index]]
        assert torch.equal(self.members[index](x), expected)


@torch.no_grad()
def test_siblings_share_one_product():
    world, x = Counted(), torch.randn(2, 5)
    for index in range(3):
        world.assert_right(index, x)
    assert world.calls == 1
    assert world.siblings._held is None, "nothing is kept when all have been served"


@torch.no_grad()
def test_a_follower_with_another_input_is_right():
    world, x, other = Counted(), torch.randn(2, 5), torch.randn(3, 5)
    world.assert_right(0, x)
    world.assert_right(1, other)
    world.assert_right(1, x)
    world.assert_right(2, x.clone())
    assert world.calls == 3


@torch.no_grad()
def test_an_input_that_was_changed_in_place_is_computed_anew():
    world, x = Counted(), torch.randn(2, 5)
    world.assert_right(0, x)
    x.mul_(2)
    world.assert_right(1, x)


def test_inference_tensors_are_right_too():
    world = Counted()
    with torch.inference_mode():
        x = torch.randn(2, 5)
        world.assert_right(0, x)
        x.mul_(2)
        world.assert_right(1, x)


def test_siblings_that_are_known_to_follow_share_a_product_in_inference_mode():
    world = Counted()
    siblings = Siblings(world, (2, 3, 4), in_order=True)
    world.members = [siblings.member(index) for index in range(3)]
    with torch.inference_mode():
        x = torch.randn(2, 5)
        for index in range(3):
            world.assert_right(index, x)
        assert world.calls == 1
        assert siblings._held is None
        world.assert_right(0, x)
        x.mul_(2)  # a pass broke off; the next begins with the first
        for index in range(3):
            world.assert_right(index, x)
    assert world.calls == 3


@torch.no_grad()
def test_followers_alone_and_first_again_are_right():
    world, x = Counted(), torch.randn(2, 5)
    for index in (2, 1, 0, 0, 2, 1):
        world.assert_right(index, x)


def test_a_packed_layer_answers_for_the_layer_it_replaces():
    linear = nn.Linear(8, 6)
    layer = packed(linear)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        assert torch.equal(layer(x), linear(x))
    assert layer.weight.shape == linear.weight.shape
    assert layer.weight.dtype == torch.float32
    assert layer.weight.isnan().all(), "code that reads the weight must not get numbers"
    assert layer.weight.untyped_storage().nbytes() == 4
    assert list(layer.parameters()) == []
    assert "8, 6, int8" in repr(layer)


def test_a_packed_layer_refuses_to_learn_and_to_move():
    model = nn.Sequential(packed(nn.Linear(8, 6)))
    with pytest.raises(
        TrainingError, match="packed for int8 cannot learn; load the talker without precision"
    ):
        model.train()
    with pytest.raises(TrainingError, match="no gradient flows"):
        model(torch.randn(1, 8, requires_grad=True))
    with pytest.raises(ConfigError, match=r"stay on cpu, asked for cpu and torch\.bfloat16"):
        model.to(torch.bfloat16)
    model.eval()
    model.to("cpu")
