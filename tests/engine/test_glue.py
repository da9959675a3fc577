"""The compiled calls beside torch's own operators."""

import pytest
import torch
import torch.nn.functional as F

from omni_adapter.engine.glue import ACTIVATIONS, Norm, Rotation, glue

calls = glue()
pytestmark = pytest.mark.skipif(calls is None, reason="no C compiler here")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("width", [1, 7, 64, 896])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_equals_torch(width, offset):
    x, added = torch.randn(3, 1, width), torch.randn(3, 1, width)
    norm = Norm(torch.randn(width), offset, 1e-5)
    expected = F.rms_norm(x, (width,), norm.weight + offset, 1e-5)
    torch.testing.assert_close(calls.norm(x, norm), expected, rtol=1e-5, atol=1e-6)
    total, normed = calls.add_norm(x, added, 0.5, norm)
    torch.testing.assert_close(total, x + 0.5 * added, rtol=1e-6, atol=1e-6)
    expected = F.rms_norm(x + 0.5 * added, (width,), norm.weight + offset, 1e-5)
    torch.testing.assert_close(normed, expected, rtol=1e-5, atol=1e-6)


def rotated(head: list[float], cosines: list[float], sines: list[float], rotation: Rotation) -> list[float]:
    """One head, number by number."""
    out, half = list(head), rotation.turned // 2
    for i in range(half):
        pair = (2 * i, 2 * i + 1) if rotation.pair_step else (i, i + half)
        at = i * rotation.pair_step if rotation.pair_step else i
        (first, second), (cos, sin) = (head[pair[0]], head[pair[1]]), (cosines[at], sines[at])
        out[pair[0]], out[pair[1]] = first * cos - second * sin, second * cos + first * sin
    return out


@pytest.mark.parametrize("pair_step", [0, 1, 2])
@pytest.mark.parametrize("turned", [8, 4])
def test_rotation_equals_a_slow_loop(pair_step, turned):
    rotation, heads, width = Rotation(turned, pair_step=pair_step), 3, 8
    rows = torch.randn(2, 1, heads * width + 5)
    angles = torch.rand(2, 1, turned // 2)
    angles = angles.repeat_interleave(2, -1) if pair_step == 2 else torch.cat([angles, angles], -1)
    tables = angles.cos(), angles.sin()
    came = rows.clone()
    view = came[..., : heads * width]
    calls.rotate(view, heads=heads, width=width, norm=None, rotation=rotation, tables=tables)
    assert torch.equal(came[..., heads * width :], rows[..., heads * width :])
    for row in range(2):
        for head in range(heads):
            cut = slice(head * width, (head + 1) * width)
            own = (table[row, 0].tolist() for table in tables)
            expected = rotated(rows[row, 0, cut].tolist(), *own, rotation)
            torch.testing.assert_close(came[row, 0, cut], torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_tables_of_one_half_and_of_all_rows_together():
    x, angles = torch.randn(3, 1, 16), torch.rand(1, 1, 4)
    narrow, wide = x.clone(), x.clone()
    for rows, own in ((narrow, angles), (wide, torch.cat([angles, angles], -1))):
        tables = own.cos(), own.sin()
        calls.rotate(rows, heads=2, width=8, norm=None, rotation=Rotation(8), tables=tables)
    assert torch.equal(narrow, wide)


def test_heads_are_normalised_before_they_are_rotated():
    x, norm = torch.randn(2, 1, 3 * 8), Norm(torch.randn(8), 1.0, 1e-6)
    expected = F.rms_norm(x.view(2, 1, 3, 8), (8,), norm.weight + 1, 1e-6).view_as(x)
    calls.rotate(x, heads=3, width=8, norm=norm, rotation=None, tables=None)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (128, 128), (192, 64), (8, 8), (24, 12)])
@pytest.mark.parametrize("steps", [1, 5, 300])
def test_attention_equals_torch(width, value_width, steps):
    rows, kv_heads, group = 3, 2, 3
    query = torch.randn(rows, 1, kv_heads * group * width + 7)[..., : kv_heads * group * width]
    keys = torch.randn(rows, kv_heads, steps + 4, width)[:, :, 2 : 2 + steps]
    values = torch.randn(rows, kv_heads, steps + 4, value_width)[:, :, 1 : 1 + steps]
    mask = torch.rand(rows, 1, 1, steps) < 0.7
    mask[..., -1] = True
    heads = query.unflatten(-1, (-1, width)).transpose(1, 2)
    for seen in (None, mask):
        expected = F.scaled_dot_product_attention(
            heads, keys, values, attn_mask=seen, scale=0.2, enable_gqa=True
        )
        came = calls.attend(query, keys, values, seen, 0.2)
        torch.testing.assert_close(came, expected.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-5)


def test_a_padded_row_comes_out_as_it_does_alone():
    query, keys, values = (torch.randn(2, *shape) for shape in ((1, 128), (1, 40, 64), (1, 40, 64)))
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[1, ..., :13] = False
    together = calls.attend(query, keys, values, mask, 0.125)
    alone = calls.attend(query[1:], keys[1:, :, 13:], values[1:, :, 13:], None, 0.125)
    assert torch.equal(together[1:], alone)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gate_equals_torch(activation):
    both = torch.randn(2, 1, 2 * 37) * 8
    gate, up = both.chunk(2, dim=-1)
    expected = ACTIVATIONS[activation](gate) * up
    torch.testing.assert_close(calls.gate(gate, up, activation), expected, rtol=1e-5, atol=1e-5)


def test_extreme_numbers():
    gate = torch.tensor([[[-1e4, -90.0, 0.0, 90.0, 1e4]]])
    came = calls.gate(gate, torch.ones_like(gate), "silu")
    torch.testing.assert_close(came, F.silu(gate), rtol=1e-5, atol=1e-5)
    keys = torch.tensor([[[[1e4], [-1e4], [9900.0]]]])
    came = calls.attend(torch.ones(1, 1, 1), keys, torch.tensor([[[[1.0], [2.0], [3.0]]]]), None, 1.0)
    assert came.item() == 1.0
