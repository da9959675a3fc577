"""The two ways of a training step, on a preset that is small enough to train here."""

import json

import pytest
from typer.testing import CliRunner

from omni_adapter import ConfigError, cli
from omni_adapter.bench_train import WAYS, TrainBenchSettings


def test_both_ways_learn_the_same_and_are_timed():
    done = CliRunner().invoke(
        cli.app, ["bench", "--train", "--random", "tiny", "--batch-size", "2", "--length", "96", "--json"]
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["settings"]["length"] == 96
    plain, ours = report["timings"]
    assert [plain["way"], ours["way"]] == list(WAYS)
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    for timing in (plain, ours):
        assert len(timing["pass_s"]) == len(timing["update_s"]) == report["settings"]["steps"]
        assert timing["optimizer_bytes"] > 2 * 4 * 300_000
        assert timing["positions_per_s"] > 0
        assert 1e8 < timing["weights_bytes"] <= timing["peak_bytes"]


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="length must be at least 64, got 8"):
        TrainBenchSettings("tiny", length=8)
    with pytest.raises(ConfigError, match="dtype must be float32 or bfloat16, got 'int8'"):
        TrainBenchSettings("tiny", dtype="int8")
