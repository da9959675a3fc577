"""``--precision`` on the command line."""

import json

import pytest
from typer.testing import CliRunner

from omni_adapter.cli import app


def run(*arguments: str):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("precision", ["int8", "auto"])
def test_say_in_a_precision(talker_folder, tmp_path, precision):
    out = tmp_path / "reply.wav"
    done = run(
        "say", "Yes.", "--model", talker_folder, "--device", "cpu", "--precision", precision,
        "--max-new-tokens", 12, "--out", out, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert out.stat().st_size > 1000
    assert "precision " in done.stderr
    assert "Warning" not in done.stderr
    assert json.loads(done.stdout)["steps"] == 12


def test_an_unknown_precision_is_refused(talker_folder):
    done = run("say", "Yes.", "--model", talker_folder, "--precision", "int3")
    assert done.exit_code == 2
    assert "int3" in done.output
