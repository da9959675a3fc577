"""Settings: every key of the YAML can be given again on the command line, unknown ones name the nearest."""

import sys
from pathlib import Path

import pytest

from omni_adapter.config import dump
from omni_adapter.errors import ConfigError
from omni_adapter.training.settings import (
    TrainSettings,
    _flat,
    describe_run,
    find_changes,
    load_settings,
    to_yaml,
)


@pytest.mark.parametrize(
    "words",
    [
        ["optim.learning_rate=1e-4"],
        ["--optim.learning_rate=1e-4"],
        ["--optim.learning_rate", "1e-4"],
        ["--optim.learning_rate", "0.0001"],
    ],
)
def test_a_key_can_be_given_in_every_usual_way(words):
    assert load_settings(None, ["optim.learning_rate=5", *words]).optim.learning_rate == 1e-4


def test_words_replace_single_keys_of_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("stage: adapt\noptim: {num_steps: 7, learning_rate: 3e-4}\ndata: {sources: [a]}\n")
    settings = load_settings(path, ["--steps", "9", "--data", "b", "--data", "{path: c, weight: 2}"])
    assert settings.stage == "adapt"
    assert (settings.optim.num_steps, settings.optim.learning_rate) == (9, 3e-4)
    assert settings.data.sources == ("b", {"path": "c", "weight": 2})


def test_every_key_can_be_given_on_the_command_line():
    for key, value in _flat(dump(TrainSettings())).items():
        word = "null" if value is None else str(value).replace("'", '"')
        assert load_settings(None, [f"{key}={word}"]) == TrainSettings(), key


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.learning_rat=1", "unknown key 'optim.learning_rat'; did you mean 'optim.learning_rate'?"),
        ("sede=1", "unknown key 'sede'; did you mean 'seed'?"),
        ("learning_rate=1", "unknown key 'learning_rate'; did you mean 'optim.learning_rate'?"),
        ("model.lora.rnak=1", "did you mean 'model.lora.rank'?"),
        ("optim.num_steps=none", "optim.num_steps: .* got 'none'"),
        ("optim.num_steps=0", "greater than or equal to 1, got 0"),
        ("precision=bf8", "precision: .* 'bf16'"),
        ("seed.x=1", "unknown key|has no keys"),
        ("checkpoint.keep=1", "checkpoint.keep"),
        ("nonsense", "'nonsense' is no setting; write key=value"),
        ("--seed", "--seed has no value"),
    ],
)
def test_mistakes_are_named(word, message):
    with pytest.raises(ConfigError, match=message):
        load_settings(None, ["seed=3", word])


def test_base_and_start_exclude_each_other():
    with pytest.raises(ConfigError, match="give one of them"):
        load_settings(None, ["--base", "x", "--start", "y"])


def test_broken_file_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("a: [")
    with pytest.raises(ConfigError, match=r"run\.yaml cannot be read"):
        load_settings(path)
    path.write_text("just words")
    with pytest.raises(ConfigError, match="must hold keys and values, got str"):
        load_settings(path)
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read"):
        load_settings(Path("nowhere.yaml"))


def test_yaml_comes_back(tmp_path):
    settings = load_settings(
        None, ["--data", "x", "watch.prompts=[{text: hello}]", "optim.group_rates={lora: 1e-3}"]
    )
    path = tmp_path / "settings.yaml"
    path.write_text(to_yaml(settings))
    assert load_settings(path) == settings


def test_a_continued_run_may_change_only_how_it_is_watched():
    old = dump(load_settings(None, []))
    assert (
        find_changes(old, dump(load_settings(None, ["out=b", "watch.log_every=3", "checkpoint.keep=5"])))
        == []
    )
    new = dump(load_settings(None, ["optim.learning_rate=1", "data.sources=[x]"]))
    assert find_changes(old, new) == [
        "data.sources was [], is ['x']",
        "optim.learning_rate was 0.0001, is 1.0",
    ]


def test_a_run_is_described_by_command_and_versions(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes/stage1.py", "--data", "my rows.jsonl"])
    facts = describe_run(TrainSettings(), world_size=2, threads=1)
    assert facts["versions"]["torch"].startswith("2")
    assert facts["command"].endswith(" recipes/stage1.py --data 'my rows.jsonl'")
    assert (facts["world_size"], facts["threads"]) == (2, 1)
