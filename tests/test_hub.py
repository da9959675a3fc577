import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from examples.untrained_talker import make_parts
from omni_adapter import BackboneError, CheckpointError, ConfigError, OmniAdapter, SnacCodec, cli, hub
from omni_adapter.model_card import read_license
from tests.fake_hub import TOKEN, FakeHub

BASE, ENCODER, CODEC = "org/base", "org/encoder", "org/codec"
SHORT = {"max_new_tokens": 12}
OWN_FILES = ("README.md", "omni_config.json", "omni_model.safetensors", "preprocessor_config.json")


class Marker:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="session")
def part_folders(tmp_path_factory) -> dict[str, Path]:
    """Base, encoder and codec as their makers would have published them."""
    folder, parts = tmp_path_factory.mktemp("parts"), make_parts()
    parts.lm.config.max_position_embeddings = 192  # replies are over soon
    parts.lm.save_pretrained(folder / "base")
    parts.tokenizer.save_pretrained(folder / "base")
    (folder / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    parts.whisper.save_pretrained(folder / "encoder")
    SnacCodec.from_model(parts.snac).save_pretrained(folder / "codec")
    return {BASE: folder / "base", ENCODER: folder / "encoder", CODEC: folder / "codec"}


@pytest.fixture(scope="session")
def lora_folder(part_folders, tmp_path_factory) -> Path:
    """A saved talker with LoRA."""
    talker = wrap(part_folders[BASE], encoder=part_folders[ENCODER], codec=part_folders[CODEC])
    talker.model.backbone.add_lora(2)
    folder = tmp_path_factory.mktemp("lora")
    talker.save_pretrained(folder)
    return folder


@pytest.fixture
def server(part_folders, tmp_path, monkeypatch):
    """A Hub with base, encoder and codec; this process is a client of it, with an empty cache."""
    with FakeHub() as server:
        for repo, folder in part_folders.items():
            server.commit(repo, folder)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield server


@pytest.fixture
def wrapped(server) -> OmniAdapter:
    """A talker wrapped by Hub ids."""
    return wrap()


def wrap(base=BASE, *, encoder=ENCODER, codec=CODEC, **settings) -> OmniAdapter:
    return OmniAdapter.wrap(base, encoder=encoder, codec=codec, tts_layers=1, **settings)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def changed_config(folder: Path, **values) -> dict[str, bytes]:
    """Files of a folder with other values in its config.json."""
    files = bytes_of(folder)
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), **values}).encode()
    return files


# wrapping by Hub id


def test_a_base_of_a_known_type_keeps_a_tokenizer_of_its_own(tmp_path):
    """transformers gives some types their own class, whatever tokenizer the base was made with."""
    words = Tokenizer(models.WordLevel({"<end>": 0, "two": 1, "plus": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="?")
    assert own("two plus two three")["input_ids"] == [1, 2, 1, 3]
    for kind in ("qwen2", "llama", "phi3"):
        folder = tmp_path / kind
        AutoConfig.for_model(kind).save_pretrained(folder)
        own.save_pretrained(folder)
        loaded = hub.load_tokenizer(str(folder), hub.HubOptions())
        assert loaded("two plus two three")["input_ids"] == [1, 2, 1, 3], kind
    (tmp_path / "phi3" / "tokenizer.json").unlink()
    with pytest.raises(BackboneError, match="phi3 has no tokenizer that transformers can load"):
        hub.load_tokenizer(str(tmp_path / "phi3"), hub.HubOptions())


def test_parts_are_named_by_id_and_commit(server, wrapped):
    config = wrapped.config
    for part, repo in (("base", BASE), ("encoder", ENCODER), ("codec", CODEC)):
        ref = getattr(config, part)
        assert (ref.id, ref.revision) == (repo, server.repos[repo].branches["main"])
        assert ref.fingerprint
    assert config.base.license == "apache-2.0"


def test_loading_pins_the_commits_that_were_wrapped(server, wrapped, part_folders, tmp_path):
    wrapped.save_pretrained(tmp_path / "talker")
    server.commit(BASE, changed_config(part_folders[BASE], rms_norm_eps=0.5))
    server.commit(CODEC, {"config.json": b"{}"})
    server.commit(ENCODER, {})
    loaded = OmniAdapter.from_pretrained(tmp_path / "talker", cache_dir=tmp_path / "fresh")
    assert loaded.config == wrapped.config
    with pytest.raises(CheckpointError, match=r"rms_norm_eps was 1e-06, is 0\.5"):
        OmniAdapter.from_pretrained(tmp_path / "talker", base=BASE)


def test_all_files_of_a_part_come_from_one_commit(server, part_folders, monkeypatch):
    load = hub.parts._load_lm

    def load_while_it_changes(*args):
        lm = load(*args)
        server.commit(BASE, {"config.json": b"{}"})  # the tokenizer is gone from the main branch
        return lm

    monkeypatch.setattr(hub.parts, "_load_lm", load_while_it_changes)
    assert wrap().tokenizer.chat_template


def test_wrapping_by_folder_means_the_same_everywhere(part_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(part_folders[BASE].parent)
    wrap("./base", encoder="encoder", codec="codec").save_pretrained(tmp_path / "talker")
    monkeypatch.chdir(tmp_path)
    config = OmniAdapter.from_pretrained("talker").config
    assert [config.base.id, config.encoder.id, config.codec.id] == [
        str(part_folders[r]) for r in (BASE, ENCODER, CODEC)
    ]
    assert config.base.license == "apache-2.0"
    with pytest.raises(CheckpointError, match=r"the base is .*/base on this machine.*include=\('base',\)"):
        OmniAdapter.from_pretrained("talker").push_to_hub("me/talker", token=TOKEN)


# what is refused


def test_a_missing_repository(server):
    message = (
        "org/nothing is neither a folder nor a repository on the Hub that can be read.*Repository Not Found"
    )
    with pytest.raises(BackboneError, match=f"(?s){message}"):
        wrap("org/nothing")
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        wrap(encoder="org/nothing")
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        wrap(codec="org/nothing")
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        OmniAdapter.from_pretrained("org/nothing")
    with pytest.raises(BackboneError, match=r"(?s)Revision Not Found.*Invalid rev id: v9"):
        wrap(revision="v9")


def test_a_gated_base_gives_the_message_of_the_hub(server, part_folders):
    server.commit(BASE, part_folders[BASE], gated=True)
    with pytest.raises(
        BackboneError, match=r"(?s)org/base cannot be loaded.*is restricted.*Visit .*to ask for access"
    ):
        wrap()
    assert wrap(token=TOKEN).config.base.id == BASE


@pytest.mark.parametrize("repo", [BASE, ENCODER, CODEC, "me/talker"])
def test_a_talker_with_a_gated_part_gives_the_message_of_the_hub(server, wrapped, repo, tmp_path):
    wrapped.push_to_hub("me/talker", token=TOKEN)
    server.repos[repo].gated = True
    fresh = {"cache_dir": str(tmp_path / "fresh")}
    with pytest.raises((BackboneError, CheckpointError)) as caught:
        OmniAdapter.from_pretrained("me/talker", **fresh)
    message = str(caught.value)
    assert f"Access to model {repo} is restricted" in message
    assert f"Visit {server.url}/{repo} to ask for access" in message
    assert OmniAdapter.from_pretrained("me/talker", token=TOKEN, **fresh).config == wrapped.config


def test_a_private_talker_needs_a_token(server, wrapped):
    wrapped.push_to_hub("me/talker", private=True, token=TOKEN)
    with pytest.raises(CheckpointError, match=r"(?s)me/talker is neither.*make sure you are authenticated"):
        OmniAdapter.from_pretrained("me/talker")
    assert OmniAdapter.from_pretrained("me/talker", token=TOKEN)


@pytest.mark.parametrize(("repo", "error"), [(BASE, BackboneError), (ENCODER, CheckpointError)])
def test_pickles_are_not_read(server, part_folders, tmp_path, repo, error):
    files = bytes_of(part_folders[repo])
    del files["model.safetensors"]
    files["pytorch_model.bin"] = pickle.dumps(Marker(tmp_path / "made"))
    server.commit(repo, files)
    with pytest.raises(error, match=r"cannot be loaded.* from safetensors"):
        wrap()
    assert not (tmp_path / "made").exists()
    assert not any(path.endswith(".bin") for path in server.downloads())


def test_the_published_weights_of_a_codec_are_read_without_running_them(server, part_folders, tmp_path):
    files = bytes_of(part_folders[CODEC])
    weights = load_file(part_folders[CODEC] / "model.safetensors")
    del files["model.safetensors"]
    torch.save(weights, tmp_path / "weights.bin")
    server.commit(CODEC, {**files, "pytorch_model.bin": (tmp_path / "weights.bin").read_bytes()})
    assert wrap().codec.spec.num_codebooks == 7
    torch.save({"weights": Marker(tmp_path / "made")}, tmp_path / "weights.bin")
    server.commit(CODEC, {**files, "pytorch_model.bin": (tmp_path / "weights.bin").read_bytes()})
    with pytest.raises(CheckpointError, match="weights_only=True"):
        wrap()
    assert not (tmp_path / "made").exists()


def test_code_of_others_is_never_run(server, part_folders, tmp_path):
    code = f"open({str(tmp_path / 'made')!r}, 'w')\n".encode()
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    unknown = changed_config(part_folders[BASE], model_type="evil", auto_map=auto_map)
    server.commit("org/evil", {**unknown, "evil.py": code})
    with pytest.raises(
        BackboneError, match=r"needs code from its repository \(auto_map in its config\), which is never"
    ):
        wrap("org/evil")
    known = changed_config(part_folders[BASE], auto_map=auto_map)
    server.commit("org/evil", {**known, "evil.py": code})
    assert wrap("org/evil").config.base.id == "org/evil"  # transformers has the class, and takes its own
    for key in ("trust_remote_code", "use_safetensors"):
        with pytest.raises(ConfigError, match=f"{key} cannot be set: only safetensors"):
            wrap(**{key: True})
    assert not (tmp_path / "made").exists()
    assert not any(path.endswith(".py") for path in server.downloads())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "must hold one JSON object, got list"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "nested more than 32 levels deep"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": "' + b"x" * (1 << 20) + b'"}', "bytes, at most 1048576 are read"),
        (b"{}", "cannot be loaded as a causal LM"),
    ],
    ids=["cut", "list", "nan", "deep", "very deep", "large", "empty"],
)
def test_hostile_configs(part_folders, tmp_path, config, message):
    for name, error in (("config.json", BackboneError), ("omni_config.json", CheckpointError)):
        (tmp_path / name).write_bytes(config)
        with pytest.raises(
            error, match=message if name == "config.json" or config != b"{}" else "format_version None"
        ):
            wrap(tmp_path, encoder=None) if error is BackboneError else OmniAdapter.from_pretrained(tmp_path)


def test_a_base_of_absurd_size(part_folders, tmp_path):
    for name, content in changed_config(part_folders[BASE], num_hidden_layers=10**9).items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BackboneError, match="claims 1000000000 layers, at most 1000 are built"):
        wrap(tmp_path)


def test_a_base_without_some_weights(part_folders, tmp_path):
    shutil.copytree(part_folders[BASE], tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        BackboneError, match=r"lacks 1 weights that its config needs, such as model\.layers\.1\.mlp\.up"
    ):
        wrap(tmp_path)


@pytest.mark.parametrize(
    ("part", "name", "message"),
    [
        ("base", "./../../etc", "is not one of base, encoder, codec, base_adapter inside"),
        ("base", "/etc", "which is no Hub id"),
        ("encoder", "../evil.pt", "which is no Hub id"),
        ("codec", "", "names no id for one of its parts"),
    ],
)
def test_a_strangers_talker_names_nothing_on_this_machine(server, wrapped, part, name, message):
    wrapped.push_to_hub("me/talker", token=TOKEN)
    files = dict(server.repos["me/talker"].files)
    config = json.loads(files["omni_config.json"])
    config[part]["id"] = name
    server.commit("me/talker", {**files, "omni_config.json": json.dumps(config).encode()})
    with pytest.raises(CheckpointError, match=message):
        OmniAdapter.from_pretrained("me/talker")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 10**9}, r"ranks must be from 1 to 64, got \[1000000000\]"),
        ({"rank_pattern": {"q_proj": 10**9}}, "ranks must be from 1 to 64"),
        ({"target_modules": "(a+)+$"}, "target_modules must be a list of names"),
        (
            {"megatron_config": {}, "megatron_core": "antigravity", "modules_to_save": ["lm_head"]},
            "sets modules_to_save",
        ),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "sets megatron_config"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be true or false"),
        ({"peft_type": "IA3"}, "LoRA was expected|IA3"),
    ],
)
def test_hostile_lora(lora_folder, tmp_path, values, message):
    shutil.copytree(lora_folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises((CheckpointError, BackboneError), match=message):
        OmniAdapter.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "values", [{"n_fft": 10**10}, {"chunk_length": -1}, {"feature_size": "x"}, {"hop_length": 0}]
)
def test_hostile_features(talker_folder, tmp_path, values):
    shutil.copytree(talker_folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(CheckpointError, match=f"{next(iter(values))} must be above 0 and at most"):
        OmniAdapter.from_pretrained(tmp_path)


@pytest.mark.parametrize("subfolder", ["..", "a/../../b", "/etc", "a\\b"])
def test_subfolders_stay_inside(tmp_path, subfolder):
    with pytest.raises(CheckpointError, match="subfolder must be a folder inside"):
        OmniAdapter.from_pretrained(tmp_path, subfolder=subfolder)


# pushing


def test_a_push_is_one_commit_of_what_was_added(server, wrapped):
    address = wrapped.push_to_hub("me/talker", token=TOKEN)
    repo = server.repos["me/talker"]
    assert address == f"{server.url}/me/talker/commit/{repo.branches['main']}"
    assert repo.messages == ["initial commit", "Upload talker"]
    assert repo.files.keys() == {".gitattributes", *OWN_FILES}
    assert server.large_files  # the weights went another way than the config, and still into the one commit


@pytest.mark.parametrize(
    ("place", "at"),
    [("break_commit_at", 0), ("break_commit_at", 3000), ("break_upload_at", 0), ("break_upload_at", 3000)],
)
def test_a_push_that_breaks_off_changes_nothing_and_can_be_repeated(server, wrapped, tmp_path, place, at):
    wrapped.save_pretrained(tmp_path / "talker")
    before = bytes_of(tmp_path / "talker")
    setattr(server, place, at)
    with pytest.raises(CheckpointError, match=r"(?s)not pushed to me/talker: .*pushing again sends it whole"):
        wrapped.push_to_hub("me/talker", token=TOKEN)
    assert server.repos["me/talker"].files.keys() == {".gitattributes"}
    assert bytes_of(tmp_path / "talker") == before
    setattr(server, place, None)
    wrapped.push_to_hub("me/talker", token=TOKEN)
    assert server.repos["me/talker"].messages == ["initial commit", "Upload talker"]
    pushed = server.repos["me/talker"].files
    assert {name: pushed[name] for name in before if name != "README.md"} == {
        name: content for name, content in before.items() if name != "README.md"
    }


def test_a_push_without_permission(server, wrapped):
    with pytest.raises(CheckpointError, match=r"(?s)not pushed to me/talker: .*401"):
        wrapped.push_to_hub("me/talker")
    server.down = "cut"
    with pytest.raises(CheckpointError, match="not pushed to me/talker"):
        wrapped.push_to_hub("me/talker", token=TOKEN)


def test_a_push_replaces_the_earlier_talker_and_nothing_else(server, wrapped):
    wrapped.model.backbone.add_lora(2)
    wrapped.push_to_hub("me/talker", token=TOKEN, include=("codec",))
    files = dict(server.repos["me/talker"].files)
    assert {"lora/adapter_model.safetensors", "codec/model.safetensors"} <= files.keys()
    server.commit("me/talker", {**files, "notes/base.txt": b"mine", "lora.txt": b"mine"})
    wrap().push_to_hub("me/talker", token=TOKEN)
    after = server.repos["me/talker"].files
    assert not any(name.startswith(("lora/", "codec/")) for name in after)
    assert {"notes/base.txt", "lora.txt", "omni_config.json"} <= after.keys()
    assert server.repos["me/talker"].messages == [
        "initial commit",
        "Upload talker",
        "commit",
        "Upload talker",
    ]


def test_a_push_that_another_one_overtakes_leaves_theirs(server, wrapped):
    wrapped.push_to_hub("me/talker", token=TOKEN)
    theirs = {**server.repos["me/talker"].files, "lora/adapter_model.safetensors": b"theirs"}
    server.before_commit.append(lambda: server.commit("me/talker", theirs))
    with pytest.raises(CheckpointError, match=r"(?s)not pushed to me/talker: .*A commit has happened since"):
        wrapped.push_to_hub("me/talker", token=TOKEN)
    assert server.repos["me/talker"].files == theirs
    wrapped.push_to_hub("me/talker", token=TOKEN)
    assert "lora/adapter_model.safetensors" not in server.repos["me/talker"].files


def test_a_saved_folder_is_pushed_with_what_was_measured_since(server, wrapped, question, tmp_path):
    folder = tmp_path / "talker"
    wrapped.model.backbone.add_lora(2)
    wrapped.save_pretrained(folder, include=("codec",), datasets={"org/speech": "cc-by-4.0"})
    (folder / "evaluation.json").write_text('{"WER, org/test-clean": 0.0612, "UTMOS": 4}')
    (folder / "samples").mkdir()
    shutil.copy(question, folder / "samples" / "a reply.wav")
    (folder / "optimizer.pt").write_bytes(b"mine")
    (folder / "base").mkdir()
    (folder / "base" / "run.py").write_bytes(b"mine")
    before = bytes_of(folder)
    options = hub.PushOptions(token=TOKEN, commit_message="Measured")
    hub.push_folder(folder, "me/talker", options=options)
    assert bytes_of(folder) == before
    repo = server.repos["me/talker"]
    assert repo.messages == ["initial commit", "Measured"]
    facts = {"evaluation.json", "datasets.json", "samples/a reply.wav"}
    lora = {"lora/adapter_config.json", "lora/adapter_model.safetensors"}
    codec = {"codec/config.json", "codec/model.safetensors"}
    assert repo.files.keys() == {".gitattributes", *OWN_FILES, *facts, *lora, *codec}
    assert all(repo.files[name] == before[name] for name in before.keys() & repo.files.keys() - {"README.md"})
    card = repo.files["README.md"].decode()
    metadata = metadata_of(card)
    assert metadata["datasets"] == ["org/speech"]
    (measured,) = metadata["model-index"][0]["results"]
    assert metadata["model-index"][0]["name"] == "me/talker"
    assert measured["dataset"] == {"type": "org/test-clean", "name": "org/test-clean"}
    assert measured["metrics"] == [{"type": "wer", "value": 0.0612, "name": "WER"}]
    assert "| WER, org/test-clean | 0.0612 |\n| UTMOS | 4 |" in card
    assert "| org/speech | cc-by-4.0 |" in card
    assert '<audio controls src="samples/a%20reply.wav"></audio>' in card
    added = sum(weight.numel() for _, weight in wrapped.model.added_parameters())
    added += sum(weight.numel() for weight in wrapped.model.groups()["lora"].values())
    assert f"| added parameters | {added:,} |" in card
    assert 'from_pretrained("me/talker")' in card
    wrap().push_to_hub("me/talker", token=TOKEN)  # another talker: nothing was measured of it
    assert server.repos["me/talker"].files.keys() == {".gitattributes", *OWN_FILES}


def test_the_command_pushes_a_saved_folder(server, wrapped, tmp_path, monkeypatch):
    wrapped.save_pretrained(tmp_path / "talker", datasets={"org/speech": "cc-by-4.0"})
    words = ["push", str(tmp_path / "talker"), "me/talker", "--private", "--message", "First"]
    refused = CliRunner().invoke(cli.app, words)
    assert refused.exit_code == 2
    assert "the talker was not pushed to me/talker" in " ".join(refused.stderr.split())
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.stderr
    repo = server.repos["me/talker"]
    assert (repo.messages, repo.private) == (["initial commit", "First"], True)
    assert f"/me/talker/commit/{repo.branches['main']}" in done.stderr
    assert repo.files.keys() == {".gitattributes", "datasets.json", *OWN_FILES}
    assert OmniAdapter.from_pretrained("me/talker", token=TOKEN).config == wrapped.config
    for folder, message in (
        (tmp_path, "so no talker was saved there"),
        ("nowhere", "there is no folder nowhere"),
    ):
        empty = CliRunner().invoke(cli.app, ["push", str(folder), "me/talker"])
        assert empty.exit_code == 2
        assert message in " ".join(empty.stderr.split())


def test_a_card_that_its_owner_wrote_is_pushed_as_it_is(server, wrapped, tmp_path):
    wrapped.save_pretrained(tmp_path / "talker")
    own = "---\nlicense: mit\n---\n# Mine\n"
    (tmp_path / "talker" / "README.md").write_text(own)
    hub.push_folder(tmp_path / "talker", "me/talker", options=hub.PushOptions(token=TOKEN))
    assert server.repos["me/talker"].files["README.md"].decode() == own


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("evaluation.json", '{"WER": "low"}', "must hold names and numbers.*'WER' is 'low'"),
        ("evaluation.json", '{"WER": NaN}', "NaN is not JSON"),
        ("evaluation.json", '{"done": true}', "'done' is True"),
        ("datasets.json", '{"org/speech": null}', "data sets and their licences.*'org/speech' is None"),
    ],
)
def test_facts_that_say_nothing_are_refused(server, wrapped, tmp_path, name, content, message):
    wrapped.save_pretrained(tmp_path / "talker")
    (tmp_path / "talker" / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        hub.push_folder(tmp_path / "talker", "me/talker", options=hub.PushOptions(token=TOKEN))
    assert "me/talker" not in server.repos


def test_what_a_talker_was_trained_on_goes_with_it(server, wrapped, tmp_path):
    wrapped.push_to_hub("me/first", token=TOKEN, datasets={"org/speech": "cc-by-4.0"}, evaluation={"WER": 1})
    second = OmniAdapter.from_pretrained("me/first")
    assert second.datasets == {"org/speech": "cc-by-4.0"}
    second.push_to_hub("me/second", token=TOKEN, datasets={"org/chat": "mit"})
    assert OmniAdapter.from_pretrained("me/second").datasets == {"org/speech": "cc-by-4.0", "org/chat": "mit"}
    card = server.repos["me/second"].files["README.md"].decode()
    assert "| org/speech | cc-by-4.0 |\n| org/chat | mit |" in card
    assert "## Evaluation" not in card  # figures are of one set of weights
    second.export(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "datasets.json").read_text()) == second.datasets


def test_an_earlier_commit_of_a_talker_is_still_there(server, wrapped):
    address = wrapped.push_to_hub("me/talker", token=TOKEN)
    commit = address.rpartition("/")[2]
    first = wrapped.model.code_heads.proj.weight.clone()
    wrapped.model.code_heads.proj.weight.data.zero_()
    wrapped.push_to_hub("me/talker", token=TOKEN)
    assert not OmniAdapter.from_pretrained("me/talker").model.code_heads.proj.weight.any()
    earlier = OmniAdapter.from_pretrained("me/talker", revision=commit)
    assert torch.equal(earlier.model.code_heads.proj.weight, first)
    with pytest.raises(CheckpointError, match=r"(?s)me/talker is neither.*Invalid rev id: v9"):
        OmniAdapter.from_pretrained("me/talker", revision="v9")


def test_a_push_to_a_branch(server, wrapped):
    wrapped.push_to_hub("me/talker", token=TOKEN, revision="trial", commit_message="A trial")
    repo = server.repos["me/talker"]
    assert repo.files.keys() == {".gitattributes"}
    with pytest.raises(CheckpointError, match=r"holds no omni_config\.json"):
        OmniAdapter.from_pretrained("me/talker")
    loaded = OmniAdapter.from_pretrained("me/talker", revision="trial")
    assert loaded.config == wrapped.config


# fetching


def test_a_talker_is_fetched_once_and_only_its_own_files(server, wrapped, tmp_path, question):
    wrapped.push_to_hub("me/talker", token=TOKEN)
    extra = {
        "huge.bin": b"x",
        "base/model.safetensors": b"x",
        "optimizer/state.safetensors": b"x",
        "setup.py": b"x",
    }
    server.commit("me/talker", {**server.repos["me/talker"].files, **extra})
    options = {"cache_dir": str(tmp_path / "elsewhere")}
    base = wrapped.model.backbone.lm
    parts = {"encoder": make_parts().whisper, "codec": wrapped.codec, "tokenizer": wrapped.tokenizer}
    server.requests.clear()
    first = OmniAdapter.from_pretrained("me/talker", base=base, **options, **parts)
    assert sorted(server.downloads()) == [
        "omni_config.json",
        "omni_model.safetensors",
        "preprocessor_config.json",
    ]
    server.requests.clear()
    options |= {"local_files_only": True}
    again = OmniAdapter.from_pretrained("me/talker", base=base, **options, **parts)
    assert server.requests == []
    np.testing.assert_array_equal(first.chat(question, **SHORT).audio, again.chat(question, **SHORT).audio)


def test_what_was_never_fetched_is_not_there_offline(server, wrapped, monkeypatch, tmp_path):
    wrapped.push_to_hub("me/talker", token=TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for options in ({}, {"local_files_only": True}):
        with pytest.raises(CheckpointError, match=r"me/talker is neither a folder nor"):
            OmniAdapter.from_pretrained("me/talker", **options)
    assert wrap().config == wrapped.config  # these parts were


@pytest.mark.parametrize("how", ["cut", "busy"])
def test_the_parts_of_a_talker_come_from_the_cache_when_the_hub_is_down(server, wrapped, how):
    wrapped.push_to_hub("me/talker", token=TOKEN)
    OmniAdapter.from_pretrained("me/talker")
    server.down = how
    assert OmniAdapter.from_pretrained("me/talker").config == wrapped.config


def test_a_broken_download_goes_on(server, wrapped):
    wrapped.push_to_hub("me/talker", token=TOKEN)
    server.break_download_at = [5, 2000]
    loaded = OmniAdapter.from_pretrained("me/talker")
    for name, tensor in loaded.model.added_parameters():
        assert torch.equal(tensor, dict(wrapped.model.added_parameters())[name])


def test_a_talker_in_a_subfolder_with_all_its_parts(server, wrapped, tmp_path, question):
    wrapped.save_pretrained(tmp_path / "repo" / "small", include=("base", "encoder", "codec"))
    server.commit("me/talkers", tmp_path / "repo")
    for repo in (BASE, ENCODER, CODEC):
        del server.repos[repo]
    loaded = OmniAdapter.from_pretrained("me/talkers", subfolder="small")
    assert loaded.chat(question, **SHORT).text == wrapped.chat(question, **SHORT).text
    with pytest.raises(CheckpointError, match=r"holds no omni_config\.json"):
        OmniAdapter.from_pretrained("me/talkers", subfolder="large")


def run(code: str, *, folder: Path, environment: dict[str, str]) -> str:
    """Run a program of a user in a process of its own and return what it prints."""
    root = Path(__file__).resolve().parent.parent
    variables = {**os.environ, "PYTHONPATH": str(root), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=variables, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_snippet_of_a_pushed_card_runs_and_then_runs_offline(server, wrapped, tmp_path, question):
    wrapped.push_to_hub("me/talker", token=TOKEN)
    card = server.repos["me/talker"].files["README.md"].decode()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    shutil.copy(question, tmp_path / "question.wav")
    environment = server.environment(tmp_path / "home")
    online = run(snippet, folder=tmp_path, environment=environment)
    assert online.strip()
    server.requests.clear()
    assert run(snippet, folder=tmp_path, environment={**environment, "HF_HUB_OFFLINE": "1"}) == online
    assert server.requests == []


# saving


def test_a_loaded_talker_takes_its_own_parts_along(server, wrapped, tmp_path):
    wrapped.save_pretrained(tmp_path / "first", include=("base", "codec"))
    first = OmniAdapter.from_pretrained(tmp_path / "first")
    assert (first.config.base.id, first.config.base.origin) == ("./base", BASE)
    assert (first.config.encoder.id, first.config.encoder.origin) == (ENCODER, None)
    first.save_pretrained(tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    second = OmniAdapter.from_pretrained(tmp_path / "second")
    assert second.config == first.config
    assert second.config.base.revision == server.repos[BASE].branches["main"]
    assert {path.name for path in (tmp_path / "second").iterdir()} >= {"base", "codec"}
    assert not (tmp_path / "second" / "encoder").exists()
    with pytest.raises(CheckpointError, match="parts that can be saved are base, encoder, codec, got base"):
        second.save_pretrained(tmp_path / "third", include="base")


def test_saving_again_leaves_nothing_of_the_earlier_talker_and_all_of_others(wrapped, tmp_path):
    wrapped.save_pretrained(tmp_path, include=("base",), evaluation={"wer": 1.0})
    (tmp_path / "base" / "model-00001-of-00002.safetensors").write_bytes(b"an old shard")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec" / "mine.txt").write_text("mine")
    with_lora = wrap()
    with_lora.model.backbone.add_lora(2)
    with_lora.save_pretrained(tmp_path)
    assert (tmp_path / "lora").is_dir()
    assert not (tmp_path / "base").exists()
    wrapped.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"codec", "notes.txt", *OWN_FILES}
    assert not OmniAdapter.from_pretrained(tmp_path).model.backbone.has_lora
    with pytest.raises(
        CheckpointError, match="holds a folder 'codec' that no talker wrote; it is not replaced"
    ):
        wrapped.save_pretrained(tmp_path, include=("codec",))
    assert (tmp_path / "codec" / "mine.txt").read_text() == "mine"
    assert OmniAdapter.from_pretrained(tmp_path)


def test_a_save_that_fails_leaves_the_earlier_talker(wrapped, tmp_path, monkeypatch):
    folder = tmp_path / "talker"
    wrapped.save_pretrained(folder)
    before = bytes_of(folder)
    wrapped.model.code_heads.proj.weight.data.zero_()
    with monkeypatch.context() as patch:
        patch.setattr("omni_adapter.hub.saving.write_model_card", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            wrapped.save_pretrained(folder)
    assert bytes_of(folder) == before


OLD = {
    "omni_config.json": '{"base": {"id": "./base"}}',
    "omni_model.safetensors": "old",
    "base/a": "old",
    "lora/a": "old",
}
NEW = {
    "omni_config.json": "{}",
    "omni_model.safetensors": "new",
    "README.md": "new",
    "lora/b": "new",
    "preprocessor_config.json": "{}",
}
OTHERS = {"notes.txt": "mine", "codec/b": "mine"}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def save_and_die(folder: Path, step: int) -> bool:
    """Replace OLD by NEW in a child that kills itself before call number ``step``; returns whether it did."""
    pid = os.fork()
    if pid == 0:
        calls = 0

        def deadly(call):
            def wrapper(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return wrapper

        for name in ("rename", "mkdir", "rmdir", "unlink", "fsync", "open"):
            setattr(os, name, deadly(getattr(os, name)))
        with hub.replacing(folder) as staging:
            write(staging, NEW)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def test_a_save_that_is_killed_at_any_call_leaves_one_whole_talker(tmp_path):
    step, seen = 1, set()
    while True:
        folder = tmp_path / str(step)
        write(folder, {**OLD, **OTHERS})
        died = save_and_die(folder, step)
        hub.fetch_folder(folder, options=hub.HubOptions())  # what from_pretrained does first
        left = {
            name: content.decode()
            for name, content in bytes_of(folder).items()
            if not name.startswith(".sav")
        }
        assert left in ({**OLD, **OTHERS}, {**NEW, **OTHERS}), f"killed before call {step}"
        seen.add(left == {**NEW, **OTHERS})
        with hub.replacing(folder) as staging:  # the next save cleans up
            write(staging, NEW)
        assert {name: content.decode() for name, content in bytes_of(folder).items()} == {**NEW, **OTHERS}
        if not died:
            break
        step += 1
    assert step > 20
    assert seen == {True, False}


# the model card


def metadata_of(card: str) -> dict:
    from huggingface_hub import ModelCard

    return ModelCard(card).data.to_dict()


def test_the_card_states_base_licence_tasks_and_size(wrapped, tmp_path):
    wrapped.save_pretrained(tmp_path / "talker")
    card = (tmp_path / "talker" / "README.md").read_text()
    metadata = metadata_of(card)
    assert metadata["base_model"] == BASE
    assert metadata["base_model_relation"] == "adapter"
    assert metadata["license"] == "apache-2.0"
    assert metadata["library_name"] == "omni-adapter"
    assert metadata["pipeline_tag"] == "any-to-any"
    added = sum(parameter.numel() for _, parameter in wrapped.model.added_parameters())
    assert f"| added parameters | {added:,} |" in card
    assert "| tasks | asr, tts, speech to text" in card
    assert f"[{BASE}](https://huggingface.co/{BASE}) (by reference)" in card
    assert "Evaluation" not in card
    assert "Samples" not in card
    wrapped.export(tmp_path / "merged")
    merged = metadata_of((tmp_path / "merged" / "README.md").read_text())
    assert (merged["base_model"], merged["base_model_relation"], merged["license"]) == (
        BASE,
        "finetune",
        "apache-2.0",
    )


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (None, None),
        ("no metadata", None),
        ("---\nlicense: [mit\n---\n", None),
        ("---\nlicense: {a: b}\n---\n", None),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("---\nlicense: mit\n---\n" + "x" * (1 << 20), None),
        ("---\nlicense: mit\n---\n", "mit"),
    ],
)
def test_licences_of_all_kinds(tmp_path, card, licence):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert read_license(tmp_path / "README.md") == licence


@pytest.mark.parametrize("card", [{}, {"README.md": b"---\nlicense: [mit, apache-2.0]\n---\n"}])
def test_the_licence_of_a_base_that_states_none_or_two(server, part_folders, tmp_path, card):
    files = bytes_of(part_folders[BASE])
    del files["README.md"]
    server.commit(BASE, {**files, **card})
    wrap().save_pretrained(tmp_path / "talker")
    metadata = metadata_of((tmp_path / "talker" / "README.md").read_text())
    assert (metadata["license"], metadata["license_name"]) == ("other", "that-of-the-base-model")
    assert metadata["license_link"] == f"https://huggingface.co/{BASE}"


def test_the_card_carries_figures_samples_and_data(wrapped, question, tmp_path):
    wrapped.save_pretrained(
        tmp_path / "talker",
        evaluation={"WER, test-clean": 0.0612, "UTMOS": 4.1},
        samples=[question],
        datasets={"org/speech": "cc-by-4.0", "my recordings": "private"},
    )
    card = (tmp_path / "talker" / "README.md").read_text()
    assert "| WER, test-clean | 0.0612 |\n| UTMOS | 4.1 |" in card
    assert "| org/speech | cc-by-4.0 |" in card
    assert metadata_of(card)["datasets"] == ["org/speech"]
    (measured,) = metadata_of(card)["model-index"][0]["results"]
    assert measured["dataset"] == {"type": "test-clean", "name": "test-clean"}
    assert measured["metrics"] == [{"type": "wer", "value": 0.0612, "name": "WER"}]
    assert f'<audio controls src="samples/{question.name}"></audio>' in card
    assert (tmp_path / "talker" / "samples" / question.name).read_bytes() == question.read_bytes()
    wrapped.save_pretrained(tmp_path / "talker")
    assert not (tmp_path / "talker" / "samples").exists()
    for samples, message in (
        ([tmp_path / "none.wav"], r"must be an existing recording .*got .*none\.wav"),
        ([tmp_path / "talker" / "README.md"], "must be an existing recording"),
        ([question, question], "two samples are called"),
    ):
        with pytest.raises(CheckpointError, match=message):
            wrapped.save_pretrained(tmp_path / "talker", samples=samples)
    with pytest.raises(CheckpointError, match="must be finite, 'WER' is nan"):
        wrapped.save_pretrained(tmp_path / "talker", evaluation={"WER": float("nan")})


def test_the_snippet_of_a_saved_card_runs(wrapped, tmp_path, question, monkeypatch, capsys):
    wrapped.save_pretrained(tmp_path / "a talker", include=("base", "encoder", "codec"))
    card = (tmp_path / "a talker" / "README.md").read_text()
    assert metadata_of(card)["base_model_relation"] == "finetune"
    shutil.copy(question, tmp_path / "question.wav")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
    assert capsys.readouterr().out.strip()
