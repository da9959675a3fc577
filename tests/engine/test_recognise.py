"""Layers that go the quick way: only those that compute what the formula says, wherever it is looked."""

import copy
import ctypes

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from omni_adapter.backbone import Backbone
from omni_adapter.backbone.probes import sample
from omni_adapter.engine import PackSettings, relative_error
from omni_adapter.engine import recognise as recognising
from omni_adapter.engine.glue import glue
from omni_adapter.engine.kernels import MixedFloat32
from omni_adapter.engine.linears import PackedLinear, Siblings
from omni_adapter.engine.quick import Formula, FusedFormula, QuickLayer
from omni_adapter.engine.recognise import quicken_backbone
from omni_adapter.engine.rehearsal import Part, cast, linear_bias, linear_weight, replace_module
from omni_adapter.modules.tts_blocks import TtsCache
from tests.families import build_fresh
from tests.talkers import fresh_talker

calls = glue()
pytestmark = pytest.mark.skipif(calls is None, reason="no C compiler here")

RECOGNISED = ("gemma3_text", "glm4", "granite", "llama", "olmo2", "phi3", "qwen2", "qwen3")
"""Of different make: norms before and after, of heads, one product or three, other rotations, scales."""
NOT = ("gpt2", "mixtral", "falcon_h1", "gemma2")
"""No gate, experts, a state space beside, capped attention."""


def backbone_of(family: str, implementation: str | None = None) -> Backbone:
    torch.manual_seed(0)
    lm = build_fresh(family).eval()
    for parameter in lm.parameters():  # norms that are all ones would hide what they multiply
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    if implementation:
        lm.set_attn_implementation(implementation)
    return Backbone(lm)


def quick_layers(backbone: Backbone) -> list[QuickLayer]:
    return [own for module in backbone.lm.modules() if (own := vars(module).get("forward")) is not None]


@torch.inference_mode()
def states(backbone: Backbone, *, padded: bool = False) -> torch.Tensor:
    """Hidden states of a prompt of two rows and three steps."""
    pair = torch.cat([sample(backbone), sample(backbone).flip(1)])
    mask = torch.ones(2, pair.shape[1], dtype=torch.long)
    mask[1, :2] = 0
    cache, found = backbone.new_cache(2, 8), []
    for start, end in ((0, 3), (3, 4), (4, 5), (5, 6)):
        output = backbone(
            pair[:, start:end],
            attention_mask=mask[:, :end] if padded else None,
            cache=cache,
            use_cache=True,
            logits_to_keep=None,
        )
        cache = output.cache
        found.append(output.hidden)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", RECOGNISED)
def test_quick_steps_are_the_plain_ones(family, padded):
    backbone = backbone_of(family)
    expected = states(backbone, padded=padded)
    assert quicken_backbone(backbone, calls) == {}
    assert len(quick_layers(backbone)) == 2
    came = states(backbone, padded=padded)
    seen = slice(2, None) if padded else slice(None)
    assert relative_error(came[:, seen], expected[:, seen]) <= 1e-5
    assert not torch.equal(came, expected), "the steps went the plain way"


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", RECOGNISED)
@torch.inference_mode()
def test_several_steps_go_the_quick_way_too(family, padded, rows, monkeypatch):
    """A prompt, and pieces of it after one another, with masks of their own."""
    backbone = backbone_of(family)
    pair = torch.cat([sample(backbone), sample(backbone).flip(1)])[-rows:]
    mask = torch.ones(rows, pair.shape[1], dtype=torch.long)
    mask[-1, :2] = 0

    def pieces(*ends: int) -> torch.Tensor:
        cache, found, start = backbone.new_cache(rows, 8), [], 0
        for end in ends:
            own = mask[:, :end] if padded else None
            output = backbone(pair[:, start:end], attention_mask=own, cache=cache, use_cache=True)
            cache, start = output.cache, end
            found.append(output.hidden)
        return torch.cat(found, dim=1)

    splits = ((6,), (3, 6), (2, 4, 5, 6))
    expected = [pieces(*ends) for ends in splits]
    assert quicken_backbone(backbone, calls) == {}
    monkeypatch.delattr(QuickLayer, "_plain")
    seen = slice(2, None) if padded else slice(None)
    for ends, plain in zip(splits, expected, strict=True):
        assert relative_error(pieces(*ends)[:, seen], plain[:, seen]) <= 1e-5


@pytest.mark.parametrize("family", NOT)
def test_layers_that_compute_something_else_are_left_alone(family):
    backbone = backbone_of(family)
    expected = states(backbone)
    assert len(quicken_backbone(backbone, calls)) == 2
    assert not quick_layers(backbone)
    assert torch.equal(states(backbone), expected)


def capped(module, query, key, value, attention_mask, **kwargs):
    """Keys and queries whose large numbers are cut, which small ones do not show."""
    limit = 5.0
    return sdpa_attention_forward(
        module, query.clamp(-limit, limit), key.clamp(-limit, limit), value, attention_mask, **kwargs
    )


def fading(module, query, key, value, attention_mask, **kwargs):
    """Queries that grow with the position, far from the first one only."""
    far = kwargs["position_ids"][:, None, :, None] > 100
    return sdpa_attention_forward(
        module, torch.where(far, 2 * query, query), key, value, attention_mask, **kwargs
    )


@pytest.mark.parametrize(("attention", "reason"), [(capped, "numbers are large"), (fading, "attention")])
def test_what_shows_only_elsewhere_is_looked_for(attention, reason):
    AttentionInterface.register(attention.__name__, attention)
    AttentionMaskInterface.register(attention.__name__, sdpa_mask)
    backbone = backbone_of("llama", attention.__name__)
    kept = quicken_backbone(backbone, calls)
    assert len(kept) == 2
    assert all(reason in text for text in kept.values())


def test_watching_leaves_the_model_as_it_was():
    backbone = backbone_of("qwen3")
    before = {name: value.clone() for name, value in backbone.lm.state_dict().items()}
    expected = states(backbone)
    quicken_backbone(backbone, calls)
    after = backbone.lm.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())
    for module in backbone.modules():
        vars(module).pop("forward", None)
    assert torch.equal(states(backbone), expected)


def test_a_layer_that_is_called_otherwise_goes_its_own_way():
    backbone = backbone_of("llama")
    quicken_backbone(backbone, calls)
    quick = quick_layers(backbone)[0]
    asked = []
    layer = copy.copy(quick.module)
    quick._plain = lambda *args, **kwargs: asked.append(kwargs)
    for hidden, more in (
        (torch.zeros(1, 2, 32), {}),
        (torch.zeros(1, 1, 32, dtype=torch.bfloat16), {}),
        (torch.zeros(1, 1, 32), {}),
        (torch.zeros(1, 1, 32), {"something": "new"}),
    ):
        layer.forward(hidden, **more)
    assert len(asked) == 4


def test_a_copy_of_a_packed_talker_has_layers_of_its_own():
    talker = fresh_talker().pack("fp32", settings=PackSettings(kernels=("mixed-fp32",)))
    assert talker.pack_report.quick == 3
    assert "3 blocks quick" in str(talker.pack_report)
    twin = copy.deepcopy(talker)
    own = {id(module) for module in twin.model.modules()}
    layers = quick_layers(twin.model.backbone)
    assert len(layers) == 2
    assert all(id(layer.module) in own for layer in layers)
    for block in twin.model.tts_blocks.blocks:
        assert block.quick.formula.attending.norm.weight is block.attention_norm.weight


CALL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p)


def native_product(kernel, weight_shape: tuple[int, int]):
    """A kernel's product as compiled code would call it."""
    outputs, inputs = weight_shape

    def call(weight, x, rows, out) -> int:
        given = (ctypes.c_float * (rows * inputs)).from_address(x)
        taken = (ctypes.c_float * (rows * outputs)).from_address(out)
        answer = kernel(torch.frombuffer(given, dtype=torch.float32).view(rows, inputs))
        torch.frombuffer(taken, dtype=torch.float32).view(rows, outputs).copy_(answer)
        return 0

    return CALL(call)


def let_compiled_code_multiply(model: nn.Module) -> list:
    """Let all kernels be called from compiled code; return what must live as long."""
    kept = []
    for module in model.modules():
        if isinstance(module, PackedLinear) and not hasattr(module.kernel, "native"):
            outputs = module.siblings.size if module.siblings else module.out_features
            kept.append(native_product(module.kernel, (outputs, module.in_features)))
            module.kernel.native = ctypes.cast(kept[-1], ctypes.c_void_p).value, None
    return kept


@pytest.mark.parametrize("family", RECOGNISED)
def test_layers_in_two_calls_are_the_same(family):
    expected, came = [], []
    for found in (expected, came):
        backbone = backbone_of(family)
        part = Part("lm", backbone.lm, lambda own=backbone: (own(sample(own)).hidden,), 2)
        for group in cast(part).groups:
            replace_by_kernels(backbone.lm, group)
        assert quicken_backbone(backbone, calls) == {}
        kept = let_compiled_code_multiply(backbone.lm) if found is came else []
        for padded in (False, True):
            found.append(states(backbone, padded=padded))
        ways = {type(layer._way) for layer in quick_layers(backbone)}
        assert ways == ({FusedFormula} if kept else {Formula})
    for one, other in zip(came, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def replace_by_kernels(lm: nn.Module, group: tuple[str, ...]) -> None:
    layers = [lm.get_submodule(name) for name in group]
    weight = torch.cat([linear_weight(layer).detach() for layer in layers])
    biases = [linear_bias(layer) for layer in layers]
    bias = None if biases[0] is None else torch.cat([one.detach() for one in biases])
    kernel = MixedFloat32(weight, bias)
    siblings = Siblings(kernel, [len(linear_weight(layer)) for layer in layers], in_order=True)
    for index, (name, layer) in enumerate(zip(group, layers, strict=True)):
        packed = PackedLinear(
            siblings.member(index) if len(group) > 1 else kernel,
            weight=linear_weight(layer),
            dtype=torch.float32,
            label="fp32",
            kernel=kernel,
            siblings=siblings if len(group) > 1 else None,
        )
        replace_module(lm, name, packed)


def test_without_a_compiler_everything_goes_as_it_did(monkeypatch):
    monkeypatch.setattr(recognising, "glue", lambda: None)
    talker = fresh_talker().pack("int8")
    assert talker.pack_report.quick == 0
    assert not quick_layers(talker.model.backbone)


def test_blocks_that_speak_are_quick_too():
    talker = fresh_talker(tts={"init": "scaled", "qkv_bias": True}, tts_layers=2)
    blocks = talker.model.tts_blocks
    for parameter in blocks.parameters():
        nn.init.normal_(parameter, std=0.1)

    @torch.inference_mode()
    def said() -> torch.Tensor:
        torch.manual_seed(0)
        hidden = torch.randn(2, 6, talker.config.hidden_width)
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[1, :2] = 0
        cache, found = TtsCache(capacity=8, rows=2), []
        for start, end in ((0, 3), (3, 4), (4, 5), (5, 6)):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
            found.append(
                blocks(
                    hidden[:, start:end], attention_mask=mask[:, :end], position_ids=positions, cache=cache
                )
            )
        return torch.cat(found, dim=1)

    expected = said()
    talker.pack("fp32", settings=PackSettings(kernels=("plain-fp32",), fuse=False))
    came = said()
    assert relative_error(came, expected) <= 1e-5
    assert not torch.equal(came, expected), "the steps went the plain way"
