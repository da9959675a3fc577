"""The way out: what transformers and PEFT alone make of an exported talker, and what it says once back."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from typer.testing import CliRunner

from examples.untrained_talker import make_parts
from omni_adapter import CheckpointError, ConfigError, OmniAdapter, SnacCodec, cli
from omni_adapter.backbone import Backbone
from tests.families import build_fresh
from tests.talkers import fresh_talker

SHORT = {"max_new_tokens": 16}
IDS = torch.tensor([[5, 9, 4, 77, 31, 8], [3, 3, 90, 12, 60, 41]])


def with_lora(talker: OmniAdapter, **settings) -> OmniAdapter:
    """Give the talker LoRA as if it had learned something."""
    talker.model.backbone.add_lora(4, **settings)
    generator = torch.Generator().manual_seed(1)
    for parameter in talker.model.groups()["lora"].values():
        noise = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data.copy_(noise if parameter.dim() > 1 else noise.abs() + 1)
    return talker


def own_logits(talker: OmniAdapter) -> torch.Tensor:
    backbone = talker.model.backbone
    with torch.no_grad():
        return backbone(backbone.embed(IDS)).logits


def plain_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def assert_same_stream(first: OmniAdapter, second: OmniAdapter, question) -> None:
    for asked in ({"audio": question}, {"text": "How are you?"}):
        chunks = [list(talker.stream(**asked, **SHORT)) for talker in (first, second)]
        assert [chunk.text for chunk in chunks[0]] == [chunk.text for chunk in chunks[1]]
        for one, other in zip(*chunks, strict=True):
            np.testing.assert_array_equal(one.audio, other.audio)
        assert sum(len(chunk.audio) for chunk in chunks[0]) > 0


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"targets": ["q_proj", "v_proj"], "alpha": 3}])
def test_base_and_adapter_as_transformers_and_peft_know_them(tmp_path, question, settings):
    talker = with_lora(fresh_talker(), **settings)
    talker.export(tmp_path, form="peft")
    expected = own_logits(talker)
    with talker.model.backbone.lora_disabled():
        without = own_logits(talker)
    assert not torch.allclose(expected, without, atol=1e-2)
    base, info = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(plain_logits(base), without)
    torch.testing.assert_close(
        plain_logits(PeftModel.from_pretrained(base, tmp_path / "lora")), expected, rtol=1e-6, atol=1e-6
    )
    back = OmniAdapter.from_pretrained(tmp_path, local_files_only=True)
    assert torch.equal(own_logits(back), expected)
    assert_same_stream(talker, back, question)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_lora_merged_into_a_plain_base(tmp_path, question, settings):
    talker = with_lora(fresh_talker(), **settings)
    talker.export(tmp_path)
    assert not (tmp_path / "lora").exists()
    assert not any("lora" in name for name in load_file(tmp_path / "base" / "model.safetensors"))
    base, info = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(plain_logits(base), own_logits(talker), rtol=1e-4, atol=1e-4)
    back = OmniAdapter.from_pretrained(tmp_path, local_files_only=True)
    assert not back.model.backbone.has_lora
    assert_same_stream(talker, back, question)
    assert talker.model.backbone.has_lora  # a copy was merged


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "mixtral"])
def test_other_families_leave_the_same_way(tmp_path, family):
    parts = make_parts()
    talker = OmniAdapter.wrap(
        build_fresh(family),
        tokenizer=parts.tokenizer,
        encoder=parts.whisper,
        codec=SnacCodec.from_model(parts.snac),
        tts_layers=0,
        text_end_ids=[2],
    )
    with_lora(talker)
    expected = own_logits(talker)
    talker.export(tmp_path / "peft", form="peft")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "peft" / "base")
    adapted = PeftModel.from_pretrained(base, tmp_path / "peft" / "lora")
    torch.testing.assert_close(plain_logits(adapted), expected, rtol=1e-5, atol=1e-5)
    talker.export(tmp_path / "merged", form="merged")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "base")
    torch.testing.assert_close(plain_logits(base), expected, rtol=1e-4, atol=1e-4)


def test_the_other_parts_are_those_of_their_libraries(tmp_path):
    talker = fresh_talker()
    talker.export(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    text = "What is the capital of France?"
    assert tokenizer(text).input_ids == talker.tokenizer(text).input_ids
    assert tokenizer.chat_template == talker.tokenizer.chat_template
    encoder = WhisperEncoder.from_pretrained(tmp_path / "encoder")
    for name, weight in talker.model.audio_encoder.encoder.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], weight)
    added = load_file(tmp_path / "omni_model.safetensors")
    assert added.keys() == dict(talker.model.added_parameters()).keys()


def test_the_adapter_names_its_base_on_the_hub_and_nothing_of_this_machine(tmp_path, monkeypatch):
    talker = with_lora(fresh_talker())
    talker.export(tmp_path / "first", form="peft")
    again = OmniAdapter.from_pretrained(tmp_path / "first")
    again.export(tmp_path / "second", form="peft")
    first, second = (tmp_path / name / "lora" / "adapter_config.json" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    for path in (tmp_path / "second").rglob("*.json"):
        assert str(tmp_path) not in path.read_text()
    settings = json.loads(second.read_text())
    assert settings["base_model_name_or_path"] is None
    talker.model.backbone.save_lora(tmp_path / "named", base=str(tmp_path / "first" / "base"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "named")
    torch.testing.assert_close(plain_logits(loaded), own_logits(talker), rtol=1e-6, atol=1e-6)
    fresh = Backbone(make_parts().lm)
    fresh.load_lora(tmp_path / "named")
    assert fresh.lora_config.task_type is None


def test_what_cannot_be_exported(tmp_path):
    talker = fresh_talker()
    with pytest.raises(
        CheckpointError, match="has no LoRA, so there is nothing for PEFT; export it as merged"
    ):
        talker.export(tmp_path / "out", form="peft")
    with pytest.raises(ConfigError, match="exported as merged or peft, got 'onnx'"):
        talker.export(tmp_path / "out", form="onnx")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_both_forms(tmp_path):
    talker = with_lora(fresh_talker())
    talker.save_pretrained(tmp_path / "talker", include=("base", "encoder", "codec"))
    expected = own_logits(talker)
    for form in ("merged", "peft"):
        out = tmp_path / form
        arguments = ["export", str(tmp_path / "talker"), "--out", str(out), "--as", form]
        assert CliRunner().invoke(cli.app, arguments).exit_code == 0
        base = AutoModelForCausalLM.from_pretrained(out / "base")
        model = PeftModel.from_pretrained(base, out / "lora") if form == "peft" else base
        torch.testing.assert_close(plain_logits(model), expected, rtol=1e-4, atol=1e-4)
    refused = CliRunner().invoke(cli.app, arguments)
    assert refused.exit_code == 2
    assert "holds a talker already" in refused.stderr


@pytest.mark.slow
def test_a_merged_folder_answers_offline_in_a_process_of_its_own(tmp_path, question):
    talker = with_lora(fresh_talker())
    talker.export(tmp_path / "whole")
    program = (
        "import sys; from omni_adapter import OmniAdapter; "
        "print(OmniAdapter.from_pretrained(sys.argv[1]).chat(sys.argv[2], max_new_tokens=16).text, end='')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "whole"), str(question)],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == talker.chat(question, **SHORT).text
