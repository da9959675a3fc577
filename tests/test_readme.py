"""What the README says runs: its Python as it stands, its commands with the options that they name."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from examples.untrained_talker import make_parts
from omni_adapter import SnacCodec
from omni_adapter.cli import app
from tests.fake_hub import FakeHub

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(line.split("  #")[0])
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
BASES = ("Qwen/Qwen2.5-0.5B-Instruct", "openai/whisper-small", "hubertsiuzdak/snac_24khz")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub on this machine that has small random parts under the names that the README uses."""
    folder, parts = tmp_path_factory.mktemp("hub"), make_parts()
    parts.lm.config.max_position_embeddings = 224  # replies are over soon
    parts.lm.save_pretrained(folder / "lm")
    parts.tokenizer.save_pretrained(folder / "lm")
    parts.whisper.save_pretrained(folder / "whisper")
    SnacCodec.from_model(parts.snac).save_pretrained(folder / "snac")
    with FakeHub() as hub:
        for name, part in zip(BASES, ("lm", "whisper", "snac"), strict=True):
            hub.commit(name, folder / part)
        yield hub


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_python_runs_as_it_stands(number, hub, question, tmp_path):
    shutil.copy(question, tmp_path / "question.wav")
    done = subprocess.run(
        [sys.executable, "-c", SNIPPETS[number]],
        cwd=tmp_path,
        env=hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if "reply.wav" in SNIPPETS[number]:
        assert (tmp_path / "reply.wav").stat().st_size > 1000


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_know_the_options_that_are_named(command):
    program, *rest = command
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert rest[0] in targets
    elif program == "omni-adapter":
        name = rest[:2] if rest[0] == "data" else rest[:1]
        known = CliRunner().invoke(app, [*name, "--help"], terminal_width=200)
        assert known.exit_code == 0, known.output
        for option in (word for word in rest if word.startswith("--")):
            assert option in known.output
    else:
        assert program in {"pip", "accelerate", "python", "git", "cd"}, program
        for word in rest:
            if word.startswith("recipes/"):
                assert (ROOT / word).is_file(), word


def test_there_is_something_to_run():
    assert len(SNIPPETS) >= 2
    assert len(COMMANDS) >= 8
