"""What the doctor says must be what wrapping does."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from omni_adapter import BackboneError, ConfigError, OmniAdapter, cli
from omni_adapter.doctor import diagnose
from tests.families import build_family, tiny_config


@pytest.fixture(scope="module")
def grafts(talker_folder):
    return {"encoder": talker_folder / "encoder", "codec": talker_folder / "codec"}


@pytest.fixture
def folder(tmp_path, talker_folder):
    """Make the folder of a model: a config and a tokenizer, with weights if there are any."""

    def make(config=None, *, lm=None):
        place = tmp_path / "model"
        (lm or config).save_pretrained(place)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(talker_folder / "base" / name, place)
        return place

    return make


def test_facts_of_a_base(talker_folder, grafts):
    base = diagnose(talker_folder / "base", **grafts).base
    assert (base.architecture, base.model_type, base.dtype) == ("LlamaForCausalLM", "llama", "float32")
    assert (base.width, base.hidden_width, base.vocab_size, base.max_positions) == (64, 64, 365, 2048)
    assert (base.tied_head, base.chat_template, base.text_end_tokens) == (False, True, {2: "<|end|>"})
    assert base.cache == "DynamicCache (2 × DynamicLayer)"
    assert base.padding_is_exact is None


def test_parameters_are_those_of_the_wrapped_model(talker, talker_folder, grafts):
    diagnosis = diagnose(talker_folder / "base", tts_layers=2, **grafts)
    counted = {name: sum(p.numel() for p in group.values()) for name, group in talker.model.groups().items()}
    del counted["lora"]
    assert counted == {name: count for name, count in diagnosis.groups.items() if name != "lora"}
    assert diagnosis.encoder["width"] == talker.model.audio_encoder.width
    assert diagnosis.codec["num_codebooks"] == 7


def test_lora_is_counted_as_it_is_added(talker_folder, grafts):
    diagnosis = diagnose(talker_folder / "base", lora_rank=3, **grafts)
    talker = OmniAdapter.from_pretrained(talker_folder)
    talker.model.backbone.add_lora(rank=3)
    assert sum(p.numel() for p in talker.model.groups()["lora"].values()) == diagnosis.groups["lora"]


def test_cache_is_as_large_as_it_is(talker, talker_folder, grafts):
    backbone, steps = talker.model.backbone, 1000
    with torch.no_grad():
        output = backbone(torch.zeros(1, steps, backbone.width), use_cache=True, logits_to_keep=1)
    layers = output.cache.states["past_key_values"].layers
    size = sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))
    assert diagnose(talker_folder / "base", **grafts).base.cache_bytes == size


def test_stages_and_memory(talker_folder, grafts):
    diagnosis = diagnose(talker_folder / "base", **grafts)
    groups, stages = diagnosis.groups, diagnosis.stages
    added = sum(groups[name] for name in ("audio_adapter", "code_embedding", "tts_blocks", "code_heads"))
    assert [stage.parameters for stage in stages.values()] == [
        added, groups["lora"], added + groups["language_model"],
    ]  # fmt: skip
    everything = added + groups["language_model"] + groups["audio_encoder"]
    assert stages["2 adapt"].memory_bytes == 4 * everything + 16 * groups["lora"]
    assert (
        stages["3 finetune"].memory_bytes
        == 4 * groups["audio_encoder"] + 16 * stages["3 finetune"].parameters
    )
    codec = 4 * diagnosis.codec["parameters"]
    assert diagnosis.inference_bytes["float32"] == 4 * everything + codec
    assert diagnosis.inference_bytes["bfloat16"] == 2 * (everything + groups["audio_encoder"]) + codec


def test_loading_does_all_checks(talker_folder, grafts):
    diagnosis = diagnose(talker_folder / "base", load=True, **grafts)
    assert diagnosis.base.padding_is_exact is True
    assert diagnosis.missing == diagnosis.skipped == []


def test_without_weights_says_what_was_not_checked(talker_folder, grafts):
    assert "pass --load" in " ".join(diagnose(talker_folder / "base", **grafts).skipped)


@pytest.mark.parametrize(
    "family", ["gpt2", "opt", "gemma2", "mixtral", "qwen3_moe", "mamba2", "falcon_h1", "bloom"]
)
def test_families_from_their_config_alone(folder, grafts, family):
    place = folder(tiny_config(family))
    diagnosis = diagnose(place, **grafts)
    assert diagnosis.missing == ["weights: no *.safetensors file is there"]
    base, lm = diagnosis.base, build_family(family)
    assert base.parameters == sum(p.numel() for p in lm.parameters())
    assert base.width == lm.get_input_embeddings().weight.shape[1]
    assert base.cache is not None
    assert base.cache_bytes > 0
    assert base.tied_head == (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight)


def test_a_base_that_cannot_be_fed_embeddings(folder, grafts):
    diagnosis = diagnose(folder(tiny_config("gemma3n_text")), load=False, **grafts)
    assert diagnosis.base.parameters > 0
    assert isinstance(json.dumps(asdict(diagnosis)), str)


def test_refusals_of_wrapping_are_what_is_missing(folder, grafts):
    config = tiny_config("bert")
    config.is_decoder = False
    lm = AutoModelForCausalLM.from_config(config)
    with pytest.raises(BackboneError) as refusal:
        OmniAdapter.wrap(lm, tokenizer=object(), **grafts)
    place = folder(lm=lm)
    assert str(refusal.value) in diagnose(place, load=True, **grafts).missing


def test_large_models_cost_no_memory(folder, grafts):
    config = AutoConfig.for_model(
        "llama", vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=8,
        num_attention_heads=64, num_key_value_heads=8, dtype="bfloat16", max_position_embeddings=131072,
    )  # fmt: skip
    diagnosis = diagnose(folder(config), **grafts)
    assert diagnosis.base.parameters == 8_946_589_696  # 36 GB, if there were weights
    assert diagnosis.base.dtype == "bfloat16"
    assert diagnosis.base.cache_bytes == 8 * 2 * 8 * 128 * 1000 * 2


def test_default_parts_are_known_offline(talker_folder):
    diagnosis = diagnose(talker_folder / "base")
    assert diagnosis.groups["audio_encoder"] == 88_154_112
    assert diagnosis.encoder == {"name": "openai/whisper-small", "width": 768, "window_steps": 1500}
    assert diagnosis.codec["codebook_size"] == 4096
    assert diagnosis.codec["parameters"] == 19_842_914
    assert sum("so its published shape is used" in line for line in diagnosis.skipped) == 2


# --- what is missing ---


def test_no_chat_template_is_no_obstacle(folder, talker_folder, grafts):
    place = folder(lm=build_family("llama"))
    (place / "chat_template.jinja").unlink()
    diagnosis = diagnose(place, **grafts)
    assert diagnosis.base.chat_template is False
    assert diagnosis.missing == []
    assert any("no chat template" in note for note in diagnosis.notes)


def test_no_tokenizer(folder, grafts):
    place = folder(lm=build_family("llama"))
    for path in place.glob("*token*"):
        path.unlink()
    [missing] = diagnose(place, **grafts).missing
    assert missing.startswith("a tokenizer that can be loaded: ")


def test_pickled_weights(folder, grafts):
    place = folder(tiny_config("llama"))
    (place / "pytorch_model.bin").write_bytes(b"")
    [missing] = diagnose(place, **grafts).missing
    assert missing.startswith("weights as safetensors: there is only pytorch_model.bin, a pickle")


def test_broken_weights(folder, grafts):
    lm = AutoModelForCausalLM.from_config(tiny_config("llama"))
    next(lm.parameters()).data[0, 0] = torch.nan
    missing = diagnose(folder(lm=lm), load=True, **grafts).missing
    assert any(
        "model.embed_tokens.weight holds NaN or infinity; download it again" in line for line in missing
    )


def test_few_positions_are_pointed_out(folder, grafts):
    notes = diagnose(folder(lm=build_family("gpt2")), **grafts).notes
    assert any("takes 1500 of the base's 256 positions" in note for note in notes)


def test_wrong_parts(talker_folder, grafts):
    base = talker_folder / "base"
    diagnosis = diagnose(base, encoder=base, codec=base)
    assert any(
        "an encoder: " in line and "is a llama model; pass a Whisper model" in line
        for line in diagnosis.missing
    )
    assert any(f"the codec {base}: " in line for line in diagnosis.missing)
    assert diagnosis.stages == diagnosis.inference_bytes == {}


def test_wrong_names_and_settings(talker_folder, grafts, tmp_path):
    with pytest.raises(BackboneError, match="some/model cannot be loaded as a causal LM"):
        diagnose("some/model")
    with pytest.raises(BackboneError, match=r"holds no config\.json, so it is no model of transformers"):
        diagnose(tmp_path)
    with pytest.raises(ConfigError, match=r"fusion: Input should be 'add' or 'mean'"):
        diagnose(talker_folder / "base", fusion="mix", **grafts)
    with pytest.raises(ConfigError, match=r"unknown key 'fusio'; did you mean 'fusion'"):
        diagnose(talker_folder / "base", fusio="add", **grafts)


# --- what is shown ---


def test_table(talker_folder, grafts):
    shown = CliRunner().invoke(cli.app, ["doctor", str(talker_folder / "base"), *_options(grafts)]).stdout
    lines = " ".join(shown.split())  # wherever long paths break them
    for words in (
        "LlamaForCausalLM (llama)", "0.1 M, float32", "'<|end|>' (2)", "7 rows of 64 codes", "stage 1 align",
        "learns", "weights in bfloat16", "cache of 1000 steps", "pass --load", "can be wrapped.",
    ):  # fmt: skip
        assert words in lines, words


def test_json_and_exit_codes(talker_folder, grafts, folder):
    run = CliRunner().invoke
    good = run(cli.app, ["doctor", str(talker_folder / "base"), "--json", "--load", *_options(grafts)])
    assert good.exit_code == 0
    values = json.loads(good.stdout)
    assert values["base"]["text_end_tokens"] == {"2": "<|end|>"}
    assert list(values) == [
        "base", "encoder", "codec", "groups", "stages", "inference_bytes", "missing", "notes", "skipped",
    ]  # fmt: skip
    bad = run(cli.app, ["doctor", str(folder(tiny_config("llama"))), *_options(grafts)])
    assert bad.exit_code == 2
    assert "weights: no *.safetensors file is there" in bad.stdout
    assert "cannot be wrapped as it is." in bad.stdout
    wrong = run(cli.app, ["doctor", "some/model", *_options(grafts)])
    assert wrong.exit_code == 2
    assert wrong.stderr.startswith("error: some/model cannot be loaded as a causal LM")
    assert len(wrong.stderr.splitlines()) == 1


def _options(grafts) -> list[str]:
    return [text for name, value in grafts.items() for text in (f"--{name}", str(value))]
