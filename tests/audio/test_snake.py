"""Compiled Snakes give what torch gives, each row as it is alone."""

import copy
import pickle

import pytest
import snac
import torch
import torch.nn.functional as F

from omni_adapter.audio import snac_decoder
from omni_adapter.audio.codec import SnacCodec
from omni_adapter.audio.snake import snake_calls
from omni_adapter.compiling import find_compiler

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C compiler here")

WIDTHS = (1, 5, 64, 100, 512)  # channels; a stripe has 64


@pytest.fixture
def calls():
    found = snake_calls()
    assert found is not None
    return found


def rows(count: int, width: int, *, size: float = 3.0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(width)) * size


def wave(argument):
    """In double precision."""
    argument = argument.double()
    return argument + argument.sin().square()


@pytest.mark.parametrize("width", WIDTHS)
def test_snake_is_right(calls, width):
    x, (scale, shift, after) = rows(7, width), rows(3, width)
    expected = wave(x.double() * scale + shift)
    torch.testing.assert_close(calls.snake(x, scale, shift).double(), expected, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(
        calls.snake(x, scale, shift, after=after).double(), expected * after, rtol=1e-6, atol=1e-5
    )
    torch.testing.assert_close(calls.snake(x, scale).double(), wave(x.double() * scale), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(
        calls.snake(x, scale, after=after).double(), wave(x.double() * scale) * after, rtol=1e-6, atol=1e-5
    )
    out = torch.empty_like(x)
    assert calls.snake(x, out=out) is out
    torch.testing.assert_close(out.double(), wave(x), rtol=1e-6, atol=2e-6)


def test_snake_is_right_far_from_zero(calls):
    x = torch.linspace(-1e4, 1e4, 200_001).view(-1, 1)
    error = (calls.snake(x).double() - wave(x)).abs().max()
    assert error <= 1.1 * ((x + x.sin().square()).double() - wave(x)).abs().max(), "as exact as torch"


def test_snake_of_nothing_and_of_no_number(calls):
    assert calls.snake(torch.empty(0, 4)).shape == (0, 4)
    assert calls.snake(torch.tensor([[float("nan"), float("inf")]])).isnan().all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("places", "dilation"), [(7, 1), (7, 6), (3, 2), (1, 1)])
def test_depthwise_snake_is_right(calls, width, places, dilation):
    x, weight, bias = rows(60, width), rows(places, width, size=0.5), rows(1, width)[0]
    for offset in (bias, None):
        image = F.conv1d(
            x.double().t(), weight.double().t()[:, None], None if offset is None else offset.double(),
            dilation=dilation, groups=width,
        ).t()  # fmt: skip
        came = calls.depthwise_snake(x, weight, offset, dilation=dilation)
        torch.testing.assert_close(came.double(), wave(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_come_out_in_a_batch_as_they_do_alone(calls, width):
    x, weight, bias = rows(4096, width), rows(7, width), rows(1, width)[0]
    whole = calls.snake(x, weight[0], bias)
    assert torch.equal(whole[9:10], calls.snake(x[9:10], weight[0], bias))
    whole = calls.depthwise_snake(x, weight, bias, dilation=2)
    assert torch.equal(whole[9:10], calls.depthwise_snake(x[9:22], weight, bias, dilation=2))


def test_rounding_is_that_of_torch(calls):
    bits = torch.randint(-(2**31), 2**31, (1000, 64), generator=torch.Generator().manual_seed(0))
    x = bits.to(torch.int32).view(torch.float32)  # numbers of every size, and some that are none
    x[0, :4] = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.4e38])
    assert torch.equal(calls.round(x).float().nan_to_num(1.0), x.to(torch.bfloat16).float().nan_to_num(1.0))
    x = rows(9, 64)
    assert torch.equal(calls.snake(x, rounded=True), calls.snake(x).to(torch.bfloat16))
    weight = rows(7, 64)
    exact, rounded = (
        calls.depthwise_snake(x, weight, None, dilation=1, rounded=way) for way in (False, True)
    )
    assert torch.equal(rounded, exact.to(torch.bfloat16))


def test_rounded_rows_are_added_with_their_factors(calls):
    total, added, factor = rows(9, 64), rows(9, 64).to(torch.bfloat16), rows(9, 1)[:, 0].contiguous()
    for times in (None, factor):
        expected = total + (added.float() if times is None else times[:, None] * added.float())
        came = total.clone()
        calls.add_rounded(came, added, times)
        torch.testing.assert_close(came, expected)


def test_copies_use_the_same_calls(calls):
    assert copy.deepcopy(calls) is calls
    assert pickle.loads(pickle.dumps(calls)) is calls


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("depthwise", [True, False])
def test_codec_sounds_the_same_without_a_compiler(monkeypatch, depthwise, precision):
    torch.manual_seed(0)
    model = snac.SNAC(
        encoder_dim=4, encoder_rates=[2, 4], decoder_dim=64, decoder_rates=[4, 2], attn_window_size=None,
        codebook_size=16, vq_strides=[2, 1], depthwise=depthwise,
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    codec = SnacCodec.from_model(model)
    if precision == "bf16" and not snac_decoder.can_round(torch.device("cpu")):
        pytest.skip("this processor does not multiply bfloat16")
    codec.pack(precision)
    codes = torch.randint(0, 16, (3, 3, 6), generator=torch.Generator().manual_seed(0))
    native = codec.decode(codes)
    assert torch.equal(copy.deepcopy(codec).decode(codes), native)
    monkeypatch.setattr(snac_decoder, "snake_calls", lambda: None)
    codec.pack(precision)
    plain = codec.decode(codes)
    assert plain.std() > 0.01
    bound = 1e-5 if precision == "fp32" else 0.05  # of the loudest sample
    assert (native - plain).abs().max() <= bound * plain.abs().max()
