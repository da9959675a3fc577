"""What the README says of VoiceAssistant-400K runs: its commands as they stand, on the miniature."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from typer.testing import CliRunner

from omni_adapter.cli import app
from omni_adapter.data.sources import SOURCES
from omni_adapter.train import run
from omni_adapter.training.log import read_log
from omni_adapter.training.loop import EXIT_FINISHED
from tests.recipes.world import small_words

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("### Fine-tune on VoiceAssistant-400K")[2].partition("`--dry-run`")[0]
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL)
    for line in block.splitlines()
]
TRAINING = [command for command in COMMANDS if command[0] == "accelerate"]


@pytest.fixture(autouse=True)
def _fresh_process():
    before = torch.get_num_threads()
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path, talker_folder, copies, monkeypatch) -> Path:
    """A folder in which the names of the section mean something."""
    (tmp_path / "my-talker").symlink_to(talker_folder)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    shutil.copytree(copies["gpt-omni/VoiceAssistant-400K"], tmp_path / "copies" / "voiceassistant")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_something_to_run():
    assert len(TRAINING) == 5
    assert all(command[:3] == ["accelerate", "launch", "recipes/stage3.py"] for command in TRAINING)


@pytest.mark.parametrize("command", TRAINING, ids=lambda command: command[-1])
def test_training_commands_train(command, folder, hub, question, capsys):
    words = small_words(folder / "runs" / "anneal", "optim.num_steps=1", "data.window=2")
    assert run("finetune", [*command[3:], *words], also=("anneal",)) == EXIT_FINISHED
    said = capsys.readouterr().out
    if "--dry-run" in command:
        assert "no row was rejected" in said
        assert "tried one step" in said
        return
    assert len(read_log(folder / "runs" / "anneal")) == 1
    learned = json.loads((folder / "runs" / "anneal" / "talker" / "datasets.json").read_text())
    assert learned == {"gpt-omni/VoiceAssistant-400K": SOURCES["voiceassistant-400k"].licence}
    (talk,) = (command for command in COMMANDS if command[0] == "omni-adapter")
    if command[-1] == "voiceassistant-400k":
        shutil.copy(question, folder / "question.wav")
        done = CliRunner().invoke(app, [*talk[1:], "--max-new-tokens", "12"])
        assert done.exit_code == 0, done.output


def test_every_name_is_listed_with_its_licence():
    rows = [line.split("|")[1:-1] for line in SECTION.splitlines() if line.startswith("| `")]
    listed = {}
    for names, parts, teaches, licences in rows:
        found = re.findall(r"`([^`]+)`", names)
        owners = [word.strip() for word in licences.split(",")] if licences.strip() else [""]
        for number, name in enumerate(found):
            listed[name] = owners[min(number, len(owners) - 1)]
            assert set(re.findall(r"`([\w.]+)`", parts)) <= SOURCES[name].parts.keys()
            tasks = set(SOURCES[name].tasks)
            assert teaches.strip() == "all tasks" or {word.strip() for word in teaches.split(",")} == tasks
    assert listed.keys() == SOURCES.keys()
    for name, licence in listed.items():
        assert licence in SOURCES[name].licence
