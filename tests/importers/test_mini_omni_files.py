"""The Mini-Omni importer on files: what it accepts, what it refuses, and where the talker then runs."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from tokenizers import Tokenizer
from typer.testing import CliRunner

from examples.untrained_talker import make_parts
from omni_adapter import CheckpointError, ConfigError, OmniAdapter, SnacCodec, cli
from omni_adapter.bench import BenchSettings, measure
from omni_adapter.data.collator import collate
from omni_adapter.data.layout import Answer
from omni_adapter.importers import IMPORTERS, ImportOptions, import_talker
from omni_adapter.training.loss import TrainingModel
from omni_adapter.training.stages import prepare_stage
from tests.importers.mini_omni_checkpoint import SMALL, lit_config, lit_state, write_checkpoint


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("codec")
    SnacCodec.from_model(make_parts().snac).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A checkpoint with a post_adapter; tests must not change it."""
    return write_checkpoint(tmp_path_factory.mktemp("published"), replace(SMALL, post_adapter=True))


@pytest.fixture(scope="module")
def talker_folder(tmp_path_factory, published, codec) -> Path:
    """The talker that the command makes of it."""
    out = tmp_path_factory.mktemp("imported") / "talker"
    words = ["import", "mini-omni", str(published), "--out", str(out), "--codec", codec]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def copy(published, tmp_path) -> Path:
    """A copy of the checkpoint that a test may change."""
    return shutil.copytree(published, tmp_path / "copy")


# --- where it runs ---


def test_the_command_saves_a_whole_talker(talker_folder, codec):
    assert {path.name for path in talker_folder.iterdir() if path.is_dir()} == {"base", "encoder"}
    talker = OmniAdapter.from_pretrained(talker_folder)
    assert talker.config.codec.id == codec
    assert (talker.config.base.id, talker.config.encoder.id) == ("./base", "./encoder")
    assert (talker.config.fusion, talker.config.code_rule) == ("mean", "free")
    assert talker.config.tts.input == "before_norm"
    assert len(talker.model.tts_blocks.blocks) == 6


def test_talk_by_command(talker_folder, question, tmp_path):
    out = tmp_path / "reply.wav"
    words = ["talk", str(question), "-m", str(talker_folder), "--out", str(out), "--max-new-tokens", "16"]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    assert soundfile.info(out).frames > 0


def test_streams_transcribes_reads_out_and_answers_many(talker_folder, question):
    talker = OmniAdapter.from_pretrained(talker_folder)
    chunks = list(talker.stream(question, max_new_tokens=16))
    whole = talker.chat(question, max_new_tokens=16)
    np.testing.assert_array_equal(np.concatenate([chunk.audio for chunk in chunks]), whole.audio)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert talker.transcribe(question, max_new_tokens=8).steps <= 8
    assert len(talker.say("How are you?", max_new_tokens=16).audio)
    asked = [[{"role": "user", "content": text}] for text in ("Yes", "Tell me a story.")]
    together = talker.chat_many(asked, max_new_tokens=12)
    assert [reply.text for reply in together] == [
        talker.chat(messages=messages, max_new_tokens=12).text for messages in asked
    ]


@pytest.mark.slow
def test_bench_measures_it(talker_folder):
    settings = BenchSettings(seconds=0.5, steps=12, rounds=1)
    report = measure(lambda: OmniAdapter.from_pretrained(talker_folder), name="imported", settings=settings)
    assert {"first_text", "first_audio"} <= {timing.name for timing in report.timings}


@pytest.mark.parametrize("lm_mode", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_step_of_stage_3_learns(talker_folder, question, lm_mode):
    talker = OmniAdapter.from_pretrained(talker_folder)
    model = talker.model
    prepare_stage(model, "finetune", lm_mode=lm_mode)
    codes = torch.randint(64, (7, 5), generator=torch.Generator().manual_seed(0))
    answer = Answer(tuple(talker.tokenizer("The wind.")["input_ids"]), codes)
    asked = [{"role": "user", "content": [{"type": "audio", "audio": question}]}]
    sample = talker.processor(asked, task="speech_to_speech", answer=answer)
    training = TrainingModel(model)
    batch = collate([sample], rules=talker.processor.rules)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-3)
    losses = []
    for _ in range(3):
        loss = training(batch).total()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    for group in ("audio_adapter", "code_embedding", "tts_blocks", "code_heads"):
        assert any(parameter.requires_grad for parameter in model.groups()[group].values())


def test_text_is_tokenized_as_by_the_published_file(talker_folder, published):
    talker = OmniAdapter.from_pretrained(talker_folder)
    original = Tokenizer.from_file(str(published / "tokenizer.json"))
    for text in ("What is the capital of France?", " two  spaces", "été 東京 🙂", "it's 12345"):
        assert talker.tokenizer(text)["input_ids"] == original.encode(text).ids


# --- what may differ from file to file ---


def tensors(talker: OmniAdapter) -> dict[str, torch.Tensor]:
    return dict(talker.model.named_parameters())


def test_weights_may_stand_under_model_and_a_tied_head_may_be_left_out(tmp_path, codec):
    size = replace(SMALL, tie_word_embeddings=True)
    state = lit_state(size)
    options = ImportOptions(codec=codec)
    plain = import_talker("mini-omni", write_checkpoint(tmp_path / "plain", size), options=options)
    del state["lm_head.weight"]
    short = write_checkpoint(tmp_path / "short", size)
    torch.save({"model": state, "step": 7}, short / "lit_model.pth", _use_new_zipfile_serialization=False)
    other = import_talker("mini-omni", short, options=options)
    assert all(torch.equal(tensor, tensors(other)[name]) for name, tensor in tensors(plain).items())


def test_half_precision_stays_unless_another_is_asked_for(tmp_path, codec):
    state = {name: tensor.bfloat16() for name, tensor in lit_state(SMALL).items()}
    folder = write_checkpoint(tmp_path / "half", state=state)
    kept = import_talker("mini-omni", folder, options=ImportOptions(codec=codec))
    assert kept.model.backbone.dtype == kept.model.code_heads.proj.weight.dtype == torch.bfloat16
    raised = import_talker("mini-omni", folder, options=ImportOptions(codec=codec, dtype="float32"))
    assert raised.model.backbone.dtype == torch.float32
    with pytest.raises(ConfigError, match="dtype must be auto, float32, bfloat16 or float16, got 'int8'"):
        import_talker("mini-omni", folder, options=ImportOptions(codec=codec, dtype="int8"))


def test_without_biases_of_query_key_and_value(tmp_path, codec):
    size = replace(SMALL, add_qkv_bias=False, post_adapter=True)
    talker = import_talker(
        "mini-omni", write_checkpoint(tmp_path / "plain", size), options=ImportOptions(codec=codec)
    )
    assert talker.model.tts_blocks.blocks[0].query.bias is None
    assert not talker.model.backbone.lm.model.layers[0].self_attn.q_proj.bias.any()


def test_a_config_may_speak_of_a_post_adapter_that_was_not_published(tmp_path, codec, caplog):
    """The published inference code switches it off before it loads the weights."""
    folder = write_checkpoint(tmp_path / "off")
    values = lit_config(replace(SMALL, post_adapter=True))
    (folder / "model_config.yaml").write_text(yaml.safe_dump(values))
    talker = import_talker("mini-omni", folder, options=ImportOptions(codec=codec))
    assert talker.config.tts.layers == 0
    assert "has no post_adapter, although its config says so" in caplog.text


def test_without_its_encoder_the_published_one_is_named(copy, codec):
    (copy / "small.pt").unlink()
    with pytest.raises(CheckpointError, match="openai/whisper-small"):
        import_talker("mini-omni", copy, options=ImportOptions(codec=codec))


# --- what is refused ---


@pytest.mark.parametrize("name", ["lit_model.pth", "model_config.yaml", "tokenizer.json"])
def test_missing_file(copy, name):
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"holds no {name}; pass the folder or Hub id that has it"):
        import_talker("mini-omni", copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel_residual": True}, "parallel_residual=True instead of False"),
        ({"norm_class_name": "LayerNorm"}, "norm_class_name='LayerNorm' instead of 'RMSNorm'"),
        ({"asr_adapter": "mlp"}, "asr_adapter='mlp' instead of 'llamamlp'"),
        ({"rotary_percentage": 0.25}, "rotary_percentage=0.25 instead of 1"),
        ({"name": "Gemma-2b"}, "name='Gemma-2b', whose norms"),
        ({"n_embd": "wide"}, "n_embd: Input should be a valid integer"),
        ({"n_layer": 10**9}, "n_layer: Input should be less than or equal to 1000"),
        ({"n_query_groups": 3}, "n_query_groups must divide n_head"),
        ({"head_size": 5}, "head_size must be n_embd / n_head, got 5"),
        ({"audio_vocab_size": 64}, "hold 64 marks beside their ids"),
        ({"cat_audio_vocab_size": 129}, "must be a multiple of audio_vocab_size"),
    ],
)
def test_config_that_a_talker_cannot_have(copy, changes, message):
    path = copy / "model_config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=message):
        import_talker("mini-omni", copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold settings by name, got list"),
        ("{", "is not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("a: " + "x" * (1 << 20), "is larger than 1048576 bytes"),
    ],
)
def test_broken_config(copy, text, message):
    (copy / "model_config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        import_talker("mini-omni", copy)


def _drop(state):
    del state["transformer.h.1.mlp.proj.weight"]


def _cut(state):
    state["lm_head.weight"] = state["lm_head.weight"][:-1]


def _add(state):
    state["transformer.h.2.norm_1.weight"] = torch.ones(32)


def _poison(state):
    state["transformer.ln_f.weight"][0] = torch.nan


def _count(state):
    state["transformer.ln_f.weight"] = torch.ones(32, dtype=torch.long)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, "missing: transformer.h.1.mlp.proj.weight"),
        (_cut, r"wrongly shaped: lm_head.weight \[1407, 32\] instead of \[1408, 32\]"),
        (_add, "unknown: transformer.h.2.norm_1.weight"),
        (_poison, "holds NaN or infinity in: transformer.ln_f.weight"),
        (_count, "holds numbers of type torch.int64 in transformer.ln_f.weight"),
    ],
)
def test_weights_that_do_not_fit_their_config(tmp_path, change, message):
    state = lit_state(SMALL)
    change(state)
    with pytest.raises(CheckpointError, match=message):
        import_talker("mini-omni", write_checkpoint(tmp_path / "x", state=state))


def test_post_adapter_that_the_config_does_not_have(copy):
    (copy / "model_config.yaml").write_text(yaml.safe_dump(lit_config(SMALL)))
    with pytest.raises(CheckpointError, match=r"unknown: transformer\.post_adapter\.0\.attn"):
        import_talker("mini-omni", copy)


def test_tied_tables_that_differ(copy):
    size = replace(SMALL, post_adapter=True, tie_word_embeddings=True)
    (copy / "model_config.yaml").write_text(yaml.safe_dump(lit_config(size)))
    with pytest.raises(CheckpointError, match=r"says tie_word_embeddings, but .* differ"):
        import_talker("mini-omni", copy)


class _Trap:
    def __reduce__(self):
        return Path.touch, (Path("trapped"),)


@pytest.mark.parametrize("name", ["lit_model.pth", "small.pt"])
def test_code_in_a_pickle_is_not_run(copy, codec, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"transformer.wte.weight": _Trap()}}, copy / name)
    with pytest.raises(CheckpointError, match="cannot be read with weights_only=True"):
        import_talker("mini-omni", copy, options=ImportOptions(codec=codec))
    (copy / name).write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(CheckpointError, match="cannot be read with weights_only=True"):
        import_talker("mini-omni", copy, options=ImportOptions(codec=codec))
    assert not Path("trapped").exists()


@pytest.mark.parametrize("content", [[1, 2], {"model": {"a": 1}}, {"a": torch.ones(1), "step": 3}])
def test_weights_that_are_no_tensors_by_name(copy, content):
    torch.save(content, copy / "lit_model.pth")
    with pytest.raises(CheckpointError, match="must hold tensors by name, alone or under 'model'"):
        import_talker("mini-omni", copy)


def test_truncated_weights(copy):
    path = copy / "lit_model.pth"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cannot be read with weights_only=True"):
        import_talker("mini-omni", copy)


def test_tokenizer_that_reaches_into_the_marks(tmp_path):
    size = replace(SMALL, text_vocab_size=192)
    with pytest.raises(CheckpointError, match=r"by model_config\.yaml the marks begin at 128"):
        import_talker("mini-omni", write_checkpoint(tmp_path / "x", size))


def test_parts_of_another_size(tmp_path, codec):
    size = replace(SMALL, audio_vocab_size=192)
    options = ImportOptions(codec=codec)
    with pytest.raises(CheckpointError, match="speaks 7 code rows of 128 codes, the codec has 7 of 64"):
        import_talker("mini-omni", write_checkpoint(tmp_path / "codes", size), options=options)
    state = lit_state(replace(SMALL, whisper_adapter_dim=16))
    folder = write_checkpoint(tmp_path / "wide", state=state)
    values = lit_config(replace(SMALL, whisper_adapter_dim=16))
    (folder / "model_config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(CheckpointError, match=r"has frames of width 32, but model_config\.yaml says"):
        import_talker("mini-omni", folder, options=options)
    with pytest.raises(CheckpointError, match="hears frames of width 16, the encoder gives 32"):
        import_talker("mini-omni", folder, options=replace(options, encoder=str(folder / "small.pt")))


def test_unknown_importer_and_useless_option(published):
    with pytest.raises(ConfigError, match=f"no importer is called 'maxi'; there are {', '.join(IMPORTERS)}"):
        import_talker("maxi", published)
    with pytest.raises(ConfigError, match="no use for base; it takes codec, encoder"):
        import_talker("mini-omni", published, options=ImportOptions(base="some/model"))


def test_refusals_of_the_command(published, talker_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, message in (
        (["mini-omni", "nowhere at all", "--out", "x"], "nowhere at all does not exist"),
        (["mini-omni", str(published), "--out", str(talker_folder)], "holds a talker already"),
        (["maxi", str(published), "--out", "x"], "no importer is called 'maxi'"),
    ):
        result = CliRunner().invoke(cli.app, ["import", *words])
        assert result.exit_code == cli.EXIT_REFUSED
        assert message in " ".join(result.output.split())
    assert not Path("x").exists()
