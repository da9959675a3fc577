"""Each kernel against the plain product, for rows of any number and type."""

import pytest
import torch
import torch.nn.functional as F

from omni_adapter import compiling, products
from omni_adapter.arithmetic import processor_capabilities
from omni_adapter.engine import kernels, selection
from omni_adapter.engine.kernels import (
    KERNELS,
    Kernel,
    PlainFloat32,
    RowwiseInt8,
    allowed,
    quantise_rows,
    why_not,
)
from omni_adapter.engine.selection import Selection, Shape
from omni_adapter.errors import ConfigError

USABLE = [kernel for kernel in KERNELS.values() if not why_not(kernel)]


def relative(came, expected) -> float:
    return float((came.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kernel", USABLE, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("shape", [(1, 64), (2, 1, 64), (9, 64), (2, 40, 64)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@torch.no_grad()
def test_product_is_the_plain_one_within_its_tolerance(kernel, shape, has_bias):
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 64), torch.randn(48) if has_bias else None
    x = torch.randn(shape)
    expected = F.linear(x, weight, bias)
    came = kernel(weight, bias)(x)
    assert came.shape == expected.shape
    assert came.dtype == torch.float32
    assert relative(came, expected) <= kernel.tolerance


@pytest.mark.parametrize("kernel", USABLE, ids=lambda kernel: kernel.name)
@torch.no_grad()
def test_activations_keep_their_type(kernel):
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64), torch.randn(3, 64)
    came = kernel(weight.bfloat16(), None)(x.bfloat16())
    assert came.dtype == torch.bfloat16
    assert relative(came, F.linear(x, weight)) <= 3e-2


@pytest.mark.parametrize("kernel", USABLE, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(("outputs", "inputs"), [(29, 37), (17, 16), (100, 24)])
@torch.no_grad()
def test_odd_sizes(kernel, outputs, inputs):
    torch.manual_seed(0)
    weight, x = torch.randn(outputs, inputs), torch.randn(3, inputs)
    own = kernel(weight, None)
    assert relative(own(x), F.linear(x, weight)) <= kernel.tolerance
    if kernel.name == "weight-only-int8":
        assert own.weight.shape[1] % 16 == 0, "torch's operator reads beyond the end of other rows"


@torch.no_grad()
def test_plain_kernel_is_bit_identical():
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 64), torch.randn(48), torch.randn(5, 64)
    assert torch.equal(KERNELS["plain-fp32"](weight, bias)(x), F.linear(x, weight, bias))
    few = KERNELS["mixed-fp32"](weight, bias)
    assert torch.equal(few(x[:2]), F.linear(x[:2], weight, bias))
    assert few.weight.data_ptr() == weight.data_ptr(), "the weight is not copied"


@pytest.mark.skipif(RowwiseInt8 not in USABLE, reason=f"no 8-bit products here: {why_not(RowwiseInt8)}")
@torch.no_grad()
def test_a_row_in_8_bits_comes_out_as_it_does_alone():
    """A neighbour with values a thousand times as large changes nothing, unlike with one scale for all."""
    torch.manual_seed(0)
    kernel = RowwiseInt8(torch.randn(48, 64), torch.randn(48))
    rows = torch.randn(4, 64) * torch.tensor([[1.0], [1000.0], [0.001], [0.0]])
    together = kernel(rows)
    for index in range(4):
        assert torch.equal(kernel(rows[index : index + 1]), together[index : index + 1])
    torch.testing.assert_close(together[3], kernel.bias)


TILED = [kernel for kernel in USABLE if kernel.name.startswith("tiled")]


@pytest.mark.parametrize("kernel", TILED, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(1, 1), (16, 64), (17, 65), (131, 300), (40, 31), (530, 600)]
)
@torch.no_grad()
def test_tiles_of_any_shape_multiply_any_number_of_rows_each_as_it_does_alone(kernel, outputs, inputs):
    torch.manual_seed(0)
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
    rows = torch.randn(70, inputs)
    made = kernel(weight, bias)
    alone = torch.cat([made(row[None]) for row in rows])
    assert relative(alone, F.linear(rows, weight, bias)) <= kernel.tolerance
    for count in (*range(1, 10), 17, 33, 70):
        assert torch.equal(made(rows[:count]), alone[:count]), f"{count} rows"


@pytest.mark.parametrize("kernel", TILED, ids=lambda kernel: kernel.name)
@torch.no_grad()
def test_tiles_multiply_what_is_not_contiguous_and_no_rows_at_all(kernel):
    torch.manual_seed(0)
    made, x = kernel(torch.randn(48, 64), None), torch.randn(64, 5)
    assert torch.equal(made(x.T), made(x.T.contiguous()))
    assert made(x.T[:0]).shape == (0, 48)


@pytest.mark.parametrize("kernel", TILED, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("count", [2, 20])
@torch.no_grad()
def test_a_row_that_is_not_finite_spoils_no_other(kernel, broken, count):
    torch.manual_seed(0)
    made, rows = kernel(torch.randn(48, 64), torch.randn(48)), torch.randn(count, 64)
    whole = made(rows)
    rows[1, 3] = broken
    came = made(rows)
    assert not came[1].isfinite().any()
    assert torch.equal(came[0], whole[0])
    assert torch.equal(came[2:], whole[2:])


@pytest.mark.parametrize("kernel", TILED, ids=lambda kernel: kernel.name)
@torch.no_grad()
def test_tiles_come_out_the_same_with_any_number_of_threads(kernel):
    torch.manual_seed(0)
    made, rows = kernel(torch.randn(300, 500), None), torch.randn(20, 500)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = made(rows)
        torch.set_num_threads(3)
        assert torch.equal(made(rows), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not TILED, reason="no C compiler here")
@pytest.mark.parametrize("processor", ["x86-64", "haswell", "alderlake", "icelake-server"])
@torch.no_grad()
def test_tiles_are_right_on_other_processors(processor, monkeypatch, tmp_path):
    """With fewer instructions than this machine may have, down to none for products of bytes."""
    monkeypatch.setattr(compiling, "_TRIED", ((f"-march={processor}", "-fopenmp", "-Wno-psabi"),))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    needed = {"haswell": "avx2", "alderlake": "avx_vnni", "icelake-server": "avx512_vnni"}.get(processor)
    if needed and not processor_capabilities().get(needed):
        pytest.skip(f"this processor has no {needed}")
    library = products._declared(compiling.compiled.__wrapped__(products.SOURCE))
    if library is None:
        pytest.skip(f"no compiler for {processor} here")
    monkeypatch.setattr(products, "_library", lambda: library)
    torch.manual_seed(0)
    weight, bias, rows = torch.randn(131, 300), torch.randn(131), torch.randn(19, 300)
    weight[0], rows[0] = weight.abs().max(), 1.0  # where sums that are too narrow would overflow
    expected = F.linear(rows, weight, bias)
    for name in ("tiled-int8", "tiled-bf16"):
        made = KERNELS[name](weight, bias)
        came = made(rows)
        assert relative(came, expected) <= 1e-2
        assert torch.equal(made(rows[3:10]), came[3:10])
        assert torch.equal(made(rows[4:5]), came[4:5])


@pytest.mark.skipif(not TILED, reason="no C compiler here")
@pytest.mark.parametrize("num_rows", [1, 2, 3, 9, 40])
@torch.no_grad()
def test_sums_in_8_bits_are_exact_however_large(num_rows):
    """Rows and weights at their limits everywhere, where sums in 16 bits would be cut off."""
    generator = torch.Generator().manual_seed(num_rows)
    weight = torch.randint(-127, 128, (50, 301), generator=generator).float()
    rows = torch.randint(-127, 128, (num_rows, 301), generator=generator).float()
    weight[0], rows[0] = 127, 127
    weight[1], rows[-1, ::3] = -127, -127
    weight[:, 0], rows[:, 0] = 127, 127  # so that all scales are 1
    assert torch.equal(KERNELS["tiled-int8"](weight, None)(rows), rows @ weight.T)


def test_without_a_compiler_tiles_are_not_offered(monkeypatch):
    monkeypatch.setattr(products, "_library", lambda: None)
    monkeypatch.setattr(products, "why_not", lambda source: "no C compiler here")
    monkeypatch.setattr(kernels, "_why_not", kernels._why_not.__wrapped__)
    for name in ("tiled-int8", "tiled-bf16"):
        assert why_not(KERNELS[name]) == "this machine has no such operator: no C compiler here"
    assert not [kernel for kernel in allowed("int8") if kernel.name.startswith("tiled")]


@torch.no_grad()
def test_quantised_rows_are_half_a_step_off_at_most(monkeypatch):
    monkeypatch.setattr(kernels, "_PIECE_ROWS", 5)
    torch.manual_seed(0)
    weight = torch.randn(13, 32) * torch.logspace(-3, 3, 13)[:, None]
    weight[4] = 0
    quantised, scale = quantise_rows(weight)
    assert quantised.dtype == torch.int8
    error = (quantised.float() * scale[:, None] - weight).abs()
    assert bool((error <= 0.501 * scale[:, None]).all())
    assert int(quantised.abs().max()) == 127


def test_a_kernel_that_is_missing_or_wrong_says_so(monkeypatch):
    class Missing(Kernel):
        name, precision, tolerance = "missing", "int8", 1e-2

        def __init__(self, weight, bias):
            torch.ops.onednn.no_such_operator(weight)

    class Wrong(KERNELS["plain-fp32"]):
        name, precision = "wrong", "int8"

        def __call__(self, x):
            return super().__call__(x) * 1.01

    monkeypatch.setitem(KERNELS, "missing", Missing)
    monkeypatch.setitem(KERNELS, "wrong", Wrong)
    assert "no such operator" in why_not(Missing)
    assert why_not(Wrong) == "its product is off by 1.0%"
    assert not {Missing, Wrong} & set(allowed("int8"))


@pytest.mark.parametrize(
    ("missing", "precision", "stand_in"),
    [(("int8",), "int8", "bf16"), (("int8", "bf16"), "int8", "fp32"), (("bf16",), "bf16", "fp32")],
)
def test_where_a_precision_has_no_kernel_another_stands_in(monkeypatch, missing, precision, stand_in):
    monkeypatch.setattr(kernels, "why_not", lambda kernel: "gone" * (kernel.precision in missing))
    assert {kernel.precision for kernel in allowed(precision)} == {stand_in}


def test_float32_uses_float32_arithmetic_only():
    assert {kernel.precision for kernel in allowed("fp32")} == {"fp32"}


BIG = Shape(512, 512, rows=2)


def named(*names):
    return [KERNELS[name] for name in names]


def test_the_quickest_kernel_is_chosen():
    mixed, packed = named("mixed-fp32", "packed-fp32")
    choose = {"names": ["mixed-fp32", "packed-fp32"]}
    quicker = {mixed: 2.0, packed: 1.0}
    selection = Selection("fp32", seconds_of=lambda kernel, shape: quicker[kernel], **choose)
    assert selection.kernel(BIG) is packed
    nearly = {mixed: 2.0, packed: 1.95}
    selection = Selection("fp32", seconds_of=lambda kernel, shape: nearly[kernel], **choose)
    assert selection.kernel(BIG) is mixed, "the preferred one stays unless another is clearly quicker"
    assert selection.kernel(Shape(8, 8, rows=2)) is mixed


def test_measuring_stops_when_its_time_is_over(monkeypatch):
    monkeypatch.setattr("omni_adapter.engine.selection._measured", {})
    selection = Selection("fp32", budget_s=0.0)
    assert selection.kernel(BIG) is selection.kernels[0]
    assert selection.fuses([BIG, BIG])


def test_siblings_are_fused_where_that_pays():
    cost = {512: 3.0, 1024: 4.0}
    selection = Selection("bf16", seconds_of=lambda kernel, shape: cost[shape.outputs])
    assert selection.fuses([BIG, BIG])
    cost[1024] = 7.0
    assert not selection.fuses([BIG, BIG])
    plain = Selection("fp32", names=["plain-fp32"])
    assert not plain.fuses([BIG, BIG])


def test_real_measurement_gives_a_kernel_of_the_precision():
    selection = Selection("fp32", budget_s=0.5)
    assert selection.kernel(BIG).precision == "fp32"


@pytest.mark.parametrize(
    ("seconds", "rows"), [({2: 1.0, 48: 1.0}, 48), ({2: 1.0, 48: 11.0}, 5), ({2: 1.0, 48: 99.0}, 1)]
)
def test_rows_are_as_cheap_as_they_are_measured(monkeypatch, seconds, rows):
    monkeypatch.setattr(selection, "_least_seconds", lambda kernels, x: seconds[len(x)])
    assert selection.cheap_rows([PlainFloat32(torch.randn(4, 8), None)], 8, rows=2) == rows


def test_unknown_kernels_are_refused():
    with pytest.raises(ConfigError, match=r"no kernel fastest for fp32 here; there are .*mixed-fp32"):
        Selection("fp32", names=["fastest"])
    with pytest.raises(ConfigError, match="no kernel packed-bf16 for fp32"):
        Selection("fp32", names=["packed-bf16"])
