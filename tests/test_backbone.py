import ast
import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import omni_adapter.backbone
from omni_adapter.backbone import Backbone, BackboneCache
from omni_adapter.errors import BackboneError, CheckpointError
from omni_adapter.vocab import NO_TEXT
from tests.families import VOCAB_SIZE, WIDTH, build_family, build_fresh

IDS = torch.tensor([[5, 9, 33, 7, 60, 21, 8]])

# Lowest first, as the package's docstring has them.
FILES = (
    "inspection",
    "fixed",
    "caches",
    "runner",
    "probes",
    "projection",
    "static",
    "packing",
    "lora",
    "carried",
    "backbone",
    "__init__",
)


@pytest.fixture
def llama():
    return Backbone(build_fresh("llama"))


@pytest.mark.parametrize("file", FILES)
def test_files_of_the_package_import_from_lower_ones_only(file):
    folder = Path(omni_adapter.backbone.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} == set(FILES)
    package = "omni_adapter.backbone"
    imports = [
        node
        for node in ast.walk(ast.parse((folder / f"{file}.py").read_text()))
        if isinstance(node, ast.ImportFrom)
    ]
    used = {
        node.module.removeprefix(f"{package}.") for node in imports if node.module.startswith(f"{package}.")
    }
    used |= {alias.name for node in imports if node.module == package for alias in node.names}
    assert used <= set(FILES[: FILES.index(file)])


def test_no_text_embeds_to_zero_and_ids_to_their_vectors(llama):
    embeddings = llama.embed(torch.tensor([[5, NO_TEXT, 9]]))
    assert torch.equal(embeddings[0, 1], torch.zeros(WIDTH))
    assert torch.equal(embeddings[0, ::2], llama.lm.get_input_embeddings()(torch.tensor([5, 9])))


def test_embeddings_scaled_in_the_module_are_scaled_once():
    backbone = Backbone(build_family("gemma3_text"))
    table = backbone.lm.get_input_embeddings()
    assert torch.allclose(backbone.embed(IDS), table.weight[IDS] * WIDTH**0.5)
    assert backbone.embedding_rms == pytest.approx(
        float(table.weight.square().mean().sqrt()) * WIDTH**0.5, rel=1e-3
    )


def test_facts_are_read_from_the_model(llama):
    assert (llama.width, llama.hidden_width, llama.vocab_size) == (WIDTH, WIDTH, VOCAB_SIZE)
    assert llama.max_positions == 256
    assert Backbone(build_family("bloom")).max_positions is None
    assert Backbone(build_family("rembert")).width != Backbone(build_family("rembert")).hidden_width


def test_wrapping_leaves_the_model_as_it_was():
    lm = build_fresh("qwen2").train()
    lm.model.norm.eval()
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    modes = [module.training for module in lm.modules()]
    Backbone(lm)
    assert [module.training for module in lm.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in lm.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.modules())


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "bert",
            {"is_decoder": False},
            "BertLMHeadModel is bidirectional: set is_decoder=True in its config",
        ),
        ("cpmant", {}, r"forward\(\) of CpmAntForCausalLM takes no inputs_embeds"),
        ("gemma3n_text", {}, "builds per-layer inputs from input_ids, in model.embed_tokens_per_layer"),
        ("musicgen", {}, "gives ModuleList; pass a causal LM with one table"),
    ],
)
def test_refusals_name_what_is_missing(family, changes, message):
    with pytest.raises(BackboneError, match=message):
        Backbone(build_fresh(family, **changes))


def test_encoder_decoders_and_other_things_are_refused():
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    with pytest.raises(BackboneError, match="T5ForConditionalGeneration is an encoder-decoder"):
        Backbone(T5ForConditionalGeneration(config))
    with pytest.raises(BackboneError, match=r"expected a causal LM of transformers.*got Linear"):
        Backbone(nn.Linear(2, 2))


def test_an_lm_without_weights_can_be_wrapped_unprobed():
    backbone = Backbone(build_fresh("llama").to("meta"))
    assert (backbone.width, backbone.vocab_size) == (WIDTH, VOCAB_SIZE)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta", "opt"])
def test_positions_count_from_zero_for_every_lm(family):
    backbone = Backbone(build_family(family))
    expected = backbone.lm(input_ids=IDS).logits
    positions = torch.arange(IDS.shape[1])[None]
    torch.testing.assert_close(backbone(backbone.embed(IDS), position_ids=positions).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["openai-gpt", "recurrent_gemma", "rwkv"])
def test_an_lm_without_a_usable_state_runs_again_from_the_start(family):
    backbone = Backbone(build_family(family))
    assert backbone.replays
    embeddings = backbone.embed(IDS.repeat(2, 1))
    embeddings[1] = embeddings[1].flip(0)
    whole = backbone(embeddings)
    first = backbone(embeddings[:, :4], use_cache=True)
    cache = backbone.select_rows(first.cache, torch.tensor([1, 0, 1]))
    second = backbone(embeddings[[1, 0, 1], 4:], cache=cache, use_cache=True, logits_to_keep=1)
    torch.testing.assert_close(second.hidden, whole.hidden[[1, 0, 1], 4:], rtol=1e-4, atol=1e-4)
    assert second.logits.shape == (3, 1, VOCAB_SIZE)
    assert second.cache.steps == IDS.shape[1]


@torch.no_grad()
def test_steps_after_a_cache_are_fed_singly_where_the_state_takes_one():
    backbone = Backbone(build_family("falcon_mamba"))
    assert not backbone._chunks_are_exact
    embeddings = backbone.embed(IDS)
    whole = backbone(embeddings)
    first = backbone(embeddings[:, :3], use_cache=True)
    second = backbone(embeddings[:, 3:], cache=first.cache, use_cache=True, logits_to_keep=2)
    torch.testing.assert_close(second.hidden, whole.hidden[:, 3:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second.logits, whole.logits[:, -2:], rtol=1e-4, atol=1e-4)


def test_rows_of_any_kind_of_cache_are_selected(llama):
    shared = torch.arange(6.0).view(3, 2)
    state = SimpleNamespace(
        layers=[{"conv": shared}, (shared, None)],
        by_head=torch.arange(12.0).view(2, 3, 2),
        count=torch.tensor(4),
        length=4,
    )
    cache = BackboneCache({"state": state}, rows=3, steps=4)
    picked = llama.select_rows(cache, torch.tensor([2, 2, 0, 1]))
    expected = shared[[2, 2, 0, 1]]
    got = picked.states["state"]
    assert torch.equal(got.layers[0]["conv"], expected)
    assert torch.equal(got.layers[1][0], expected)
    assert torch.equal(got.by_head, state.by_head[:, [2, 2, 0, 1]])
    assert (got.length, int(got.count), picked.rows, picked.steps) == (4, 4, 4, 4)
    assert torch.equal(state.layers[0]["conv"], torch.arange(6.0).view(3, 2))


def test_lora_is_added_once_where_it_is_told(llama):
    assert llama.add_lora(rank=2, targets=["q_proj"]) == llama.lora_targets
    assert {name.rsplit(".", 1)[-1] for name in llama.lora_targets} == {"q_proj"}
    with pytest.raises(BackboneError, match="LoRA was added already, to 2 modules of LlamaForCausalLM"):
        llama.add_lora()


def test_lora_on_nothing_is_an_error(llama):
    with pytest.raises(BackboneError, match="no linear layer of LlamaForCausalLM fits LoRA targets 'w_q'"):
        llama.add_lora(targets="w_q")


@pytest.mark.parametrize(
    ("family", "left_out"),
    [("mamba2", "out_proj"), ("deepseek_v32", "indexer"), ("zamba", "shared_transf"), ("phimoe", "router")],
)
def test_lora_leaves_out_what_it_could_not_train(family, left_out):
    targets = Backbone(build_fresh(family)).add_lora(rank=2)
    assert targets
    assert not any(left_out in name for name in targets)


def test_towers_that_text_does_not_run_through_carry_no_lora():
    targets = Backbone(build_fresh("gemma3")).add_lora(rank=2)
    assert targets
    assert not any("vision" in name for name in targets)


def test_lora_weights_of_another_rank_are_refused(llama):
    llama.add_lora(rank=2)
    other = Backbone(build_fresh("llama"))
    other.add_lora(rank=4)
    with pytest.raises(BackboneError, match=r"28 LoRA weights do not fit.*expected \[4, 32\], got \[2, 32\]"):
        other.load_lora_state_dict(llama.lora_state_dict())


def test_lora_disabled_keeps_what_learns(llama):
    llama.add_lora(rank=2)
    llama.lm.requires_grad_(False)
    with llama.lora_disabled():
        pass
    assert not any(parameter.requires_grad for parameter in llama.parameters())


def test_fingerprint_is_plain_json_and_tells_models_apart(llama):
    fingerprint = llama.fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert Backbone(build_fresh("llama")).fingerprint() == fingerprint
    assert Backbone(
        build_fresh("llama", rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    ).fingerprint() != (fingerprint)
    assert "_name_or_path" not in fingerprint


@pytest.mark.parametrize("family", ["llama", "mamba2", "mixtral", "gemma2"])
def test_rounding_of_half_precision_is_no_reason_to_run_again(family):
    backbone = Backbone(build_fresh(family).to(torch.bfloat16))
    assert not backbone.replays
    assert backbone.padding_is_exact


def test_lora_that_does_not_fit_leaves_the_base_as_it_was(tmp_path):
    backbone = Backbone(build_fresh("llama"))
    backbone.add_lora(rank=2, targets=["q_proj"])
    backbone.save_lora(tmp_path)
    wider = Backbone(build_fresh("llama", hidden_size=48))
    with pytest.raises(CheckpointError):
        wider.load_lora(tmp_path)
    assert not wider.has_lora
    assert not any("lora_" in name for name, _ in wider.lm.named_parameters())


def test_lora_of_others_may_name_its_targets_by_a_pattern(tmp_path):
    backbone = Backbone(build_fresh("llama"))
    names = backbone.add_lora(rank=2, targets=["q_proj"])
    backbone.save_lora(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": r".*\.q_proj"}))
    again = Backbone(build_fresh("llama"))
    again.load_lora(tmp_path)
    assert again.lora_targets == tuple(sorted(names))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "bloom", "mamba2", "cohere2"])
def test_what_enters_the_final_norm_can_be_tapped(family):
    """The norm makes the last hidden state of it, in whole passes and in cached steps."""
    backbone = Backbone(build_fresh(family))
    embeddings = backbone.embed(IDS)
    plain = backbone(embeddings)
    assert plain.tapped is plain.hidden
    backbone.tap_final_norm()
    whole = backbone(embeddings)
    assert torch.equal(whole.hidden, plain.hidden)
    (norm,) = backbone.tapped_norm
    torch.testing.assert_close(norm(whole.tapped), whole.hidden)
    assert not torch.allclose(whole.tapped, whole.hidden)
    first = backbone(embeddings[:, :-2], use_cache=True)
    rest = backbone(embeddings[:, -2:], cache=first.cache, use_cache=True)
    steps = torch.cat((first.tapped, rest.tapped), dim=1)
    torch.testing.assert_close(steps, whole.tapped, atol=1e-4, rtol=1e-4)


def test_a_tapped_norm_is_no_weight_of_its_own_and_is_copied_along(llama):
    names = [name for name, _ in llama.named_parameters()]
    llama.tap_final_norm()
    assert [name for name, _ in llama.named_parameters()] == names
    twin = copy.deepcopy(llama)
    assert twin.tapped_norm[0] is twin.lm.model.norm


def test_an_lm_without_a_final_norm_cannot_be_tapped():
    lm = build_fresh("llama")
    lm.model.norm = nn.Identity()
    backbone = Backbone(lm)
    with pytest.raises(BackboneError, match=r"LlamaForCausalLM has no norm that makes its last hidden state"):
        backbone.tap_final_norm()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "jamba"])
def test_steps_in_fixed_shapes_come_out_as_others_do(family):
    """Unrecorded; two rows, of which one is padded and then goes on alone."""
    backbone = Backbone(build_fresh(family))
    embeddings = backbone.embed(torch.stack((IDS[0], IDS[0].flip(0))))
    embeddings[1, :2] = 0
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 0
    whole = backbone(embeddings, attention_mask=mask)
    backbone.fix_shapes()
    assert not backbone.rows_can_join
    output = backbone(
        embeddings[:, :4],
        attention_mask=mask[:, :4],
        cache=backbone.new_cache(2, 12),
        use_cache=True,
        logits_to_keep=None,
    )
    for index in (4, 5):
        output = backbone(
            embeddings[:, index : index + 1],
            attention_mask=mask[:, : index + 1],
            position_ids=mask[:, : index + 1].sum(dim=1, keepdim=True) - 1,
            cache=output.cache,
            use_cache=True,
            logits_to_keep=None,
        )
        expected = whole.hidden[:, index : index + 1]
        torch.testing.assert_close(output.hidden, expected, rtol=1e-4, atol=1e-4)
        assert (output.logits.shape, output.cache.steps) == ((2, 0, VOCAB_SIZE), index + 1)
    first_step = output.cache.step
    cache = backbone.select_rows(output.cache, torch.tensor([1]))
    assert cache.step is None  # another number of rows is another recording
    output = backbone(
        embeddings[1:, 6:],
        attention_mask=mask[1:],
        position_ids=torch.tensor([[4]]),
        cache=cache,
        use_cache=True,
        logits_to_keep=None,
    )
    torch.testing.assert_close(output.hidden, whole.hidden[1:, 6:], rtol=1e-4, atol=1e-4)
    assert output.cache.step is not first_step


def test_steps_whose_cache_counts_in_python_are_not_recorded():
    backbone = Backbone(build_fresh("gemma2"))
    with pytest.raises(BackboneError, match="cannot be recorded: its cache has StaticSlidingWindowLayer"):
        backbone.fix_shapes()
    assert backbone.new_cache(1, 4).capacity == 4
    for family in ("rwkv", "bloom"):  # no state; a mask that must be as long as the steps
        with pytest.raises(BackboneError, match="ForCausalLM come out otherwise in fixed shapes"):
            Backbone(build_fresh(family)).fix_shapes()


@pytest.mark.gpu
@torch.no_grad()
def test_a_recorded_step_gives_what_was_recorded():
    """Never executed so far: no accelerator was at hand."""
    device = torch.accelerator.current_accelerator()
    backbone = Backbone(build_fresh("llama").to(device))
    backbone.fix_shapes()
    embeddings = backbone.embed(IDS.to(device).repeat(2, 1))
    whole = backbone(embeddings)
    output = backbone(embeddings[:, :3], cache=backbone.new_cache(2, 12), use_cache=True, logits_to_keep=None)
    for index in range(3, 7):  # the first as it is, the others played
        output = backbone(
            embeddings[:, index : index + 1], cache=output.cache, use_cache=True, logits_to_keep=None
        )
        torch.testing.assert_close(output.hidden, whole.hidden[:, index : index + 1], rtol=1e-3, atol=1e-3)
    assert output.cache.step._graph is not None


@torch.no_grad()
def test_passes_in_inference_mode_give_the_same(llama):
    """Its bookkeeping costs less; caches made inside serve inside."""
    embeddings = llama.embed(IDS)
    whole = llama(embeddings)
    with torch.inference_mode():
        first = llama(embeddings[:, :4], cache=llama.new_cache(1, 7), use_cache=True)
        rest = llama(embeddings[:, 4:], cache=first.cache, use_cache=True)
    assert torch.allclose(torch.cat((first.hidden, rest.hidden), dim=1), whole.hidden, atol=1e-5)
