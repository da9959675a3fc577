"""The README's section on Mini-Omni, command by command, on a Hub with a small checkpoint of that layout."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from examples.untrained_talker import make_parts
from omni_adapter import OmniAdapter, SnacCodec
from tests.fake_hub import FakeHub
from tests.importers.mini_omni_checkpoint import write_checkpoint
from tests.recipes.world import small_words, write_rows

ROOT = Path(__file__).resolve().parents[2]
SECTION = (
    (ROOT / "README.md").read_text(encoding="utf-8").split("## Start from Mini-Omni")[1].split("\n## ")[0]
)
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL)
    for line in block.splitlines()
]
SHORTER = {  # what is added to a command so that it is over soon
    "talk": ["--max-new-tokens", "20"],
    "bench": ["--seconds", "0.5", "--steps", "12", "--rounds", "1"],
    "recipes/stage3.py": small_words(Path("runs/finetune"), "optim.num_steps=1"),
}


def as_run_here(command: list[str]) -> list[str]:
    """The same command with this Python, one process, and few steps."""
    if command[:2] == ["accelerate", "launch"]:
        script, *rest = command[2:]
        return [sys.executable, str(ROOT / script), *rest, *SHORTER[script]]
    assert command[0] == "omni-adapter"
    return [sys.executable, "-m", "omni_adapter", *command[1:], *SHORTER.get(command[1], [])]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_commands_of_the_readme_run_in_turn(tmp_path, question):
    published = write_checkpoint(tmp_path / "published")
    SnacCodec.from_model(make_parts().snac).save_pretrained(tmp_path / "snac")
    here = tmp_path / "here"
    here.mkdir()
    shutil.copy(question, here / "question.wav")
    (here / "recipes").symlink_to(ROOT / "recipes")
    write_rows(here)
    (here / "rows.jsonl").rename(here / "chats-codes.jsonl")
    assert [command[1] for command in COMMANDS] == ["import", "talk", "bench", "launch"]
    with FakeHub() as hub:
        hub.commit("gpt-omni/mini-omni", published)
        hub.commit("hubertsiuzdak/snac_24khz", tmp_path / "snac")
        environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        for command in COMMANDS:
            words = [word + ".jsonl" if word == "chats-codes" else word for word in as_run_here(command)]
            done = subprocess.run(
                words, cwd=here, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr[-3000:]
    assert (here / "reply.wav").stat().st_size > 1000
    talker = OmniAdapter.from_pretrained(here / "mini-omni", codec=tmp_path / "snac")
    assert talker.config.base.origin == "gpt-omni/mini-omni"
    learned = OmniAdapter.from_pretrained(here / "runs/finetune/talker", codec=tmp_path / "snac")
    assert learned.config.code_rule == "free"
    assert not (learned.model.code_heads.proj.weight == talker.model.code_heads.proj.weight).all()
