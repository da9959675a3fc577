"""The loop on a toy: accumulated == one batch, resumed == straight through, steps that must not be taken."""

import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch.profiler import ProfilerActivity, profile

from omni_adapter.data.dataset import Batching
from omni_adapter.errors import CheckpointError, TrainingError
from omni_adapter.training.checkpoint import list_checkpoints, read_json
from omni_adapter.training.engine import is_out_of_memory
from omni_adapter.training.log import read_log
from omni_adapter.training.loop import (
    CHECKPOINT_FOLDER,
    EXIT_FINISHED,
    EXIT_STOPPED,
    SHORT_POSITIONS,
    attention_for,
)
from omni_adapter.training.optimizer import rate_share
from tests.training.toy import ToyModel, curve, make_settings, make_trainer, run, stop_at, weights, write_rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _fresh_process():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
    torch.set_num_threads(before)


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path)


@pytest.fixture
def straight(rows, tmp_path):
    """Loss curve and weights of a run that nobody stops."""
    trainer = make_trainer(rows, make_settings(tmp_path / "straight"))
    assert run(trainer) == (EXIT_FINISHED, 10)
    return curve(tmp_path / "straight"), weights(trainer)


def test_accumulated_is_one_batch(rows, tmp_path):
    one = make_trainer(rows, make_settings(tmp_path / "one", "optim.accumulate=1"), dropout=0.0, batch_size=6)
    three = make_trainer(rows, make_settings(tmp_path / "three"), dropout=0.0)
    for trainer, size in ((one, 6), (three, 2)):
        trainer.feed.batching = Batching("pad", size)
        trainer.engine.model.has_moods = False
    run(one), run(three)
    for a, b in zip(read_log(tmp_path / "one"), read_log(tmp_path / "three"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    for name, value in one.engine.parameters.items():
        torch.testing.assert_close(value, three.engine.parameters[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(1, id="first pass"),
        pytest.param(5, id="in a step, in the warm-up"),
        pytest.param(12, id="last batch of an epoch"),
        pytest.param(13, id="first of the next"),
        pytest.param(17, id="in a step, past a checkpoint"),
        pytest.param(30, id="last pass"),
    ],
)
def test_stopped_and_resumed_is_straight_through(rows, tmp_path, straight, call):
    out = tmp_path / "stopped"
    trainer = make_trainer(rows, make_settings(out))
    trainer.engine.model.at_call = stop_at(call)
    code, step = run(trainer)
    assert code == EXIT_STOPPED
    assert read_json(out / "status.json") == {"state": "stopped", "step": step}
    resumed = make_trainer(rows, make_settings(out), workers=0)
    torch.rand(7)  # what others drew in between does not matter
    assert run(resumed) == (EXIT_FINISHED, 10)
    assert (curve(out), weights(resumed)) == straight


def test_workers_do_not_change_a_bit(rows, tmp_path, straight):
    out = tmp_path / "workers"
    trainer = make_trainer(rows, make_settings(out), workers=2)
    trainer.engine.model.at_call = stop_at(11)
    run(trainer)
    resumed = make_trainer(rows, make_settings(out), workers=2)
    run(resumed)
    assert (curve(out), weights(resumed)) == straight


def test_resumes_from_the_one_before_if_the_newest_is_broken(rows, tmp_path, straight):
    out = tmp_path / "broken"
    run(make_trainer(rows, make_settings(out)))
    newest = list_checkpoints(out / CHECKPOINT_FOLDER)[-1]
    (newest / "weights.safetensors").write_bytes(b"")
    resumed = make_trainer(rows, make_settings(out))
    assert run(resumed) == (EXIT_FINISHED, 10)
    assert (curve(out), weights(resumed)) == straight


def test_log_is_the_same_when_entries_span_a_stop(rows, tmp_path):
    for name in ("a", "b"):
        trainer = make_trainer(rows, make_settings(tmp_path / name, "watch.log_every=5"))
        if name == "b":
            trainer.engine.model.at_call = stop_at(24)
            run(trainer)
            trainer = make_trainer(rows, make_settings(tmp_path / name, "watch.log_every=5"))
        run(trainer)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_and_resumes(rows, tmp_path, precision):
    words = (f"precision={precision}", "optim.ema_decay=0.9")
    trainer = make_trainer(rows, make_settings(tmp_path / "a", *words))
    run(trainer)
    losses = [entry["loss"] for entry in read_log(tmp_path / "a")]
    assert losses[-1] < losses[0]
    stopped = make_trainer(rows, make_settings(tmp_path / "b", *words))
    stopped.engine.model.at_call = stop_at(14)
    run(stopped)
    resumed = make_trainer(rows, make_settings(tmp_path / "b", *words))
    run(resumed)
    assert weights(resumed) == weights(trainer)
    assert all(torch.equal(value, resumed.average[name]) for name, value in trainer.average.items())


def test_average_follows_the_weights(rows, tmp_path):
    trainer = make_trainer(rows, make_settings(tmp_path / "run", "optim.ema_decay=0.5", "optim.num_steps=1"))
    start = {name: value.detach().clone() for name, value in trainer.engine.parameters.items()}
    run(trainer)
    for name, value in trainer.engine.parameters.items():
        torch.testing.assert_close(trainer.average[name], (start[name] + value.detach()) / 2)


def poison(model: ToyModel, calls: set[int]):
    """Make the loss of some passes infinite or not a number."""

    def hook(module, inputs, outputs):
        return (outputs[0] * (math.nan if model.calls in calls else 1),)

    model.register_forward_hook(hook)


@pytest.mark.parametrize(("device", "is_fused"), [("cpu", False), ("meta", True)])
def test_short_samples_attend_by_products_on_a_cpu(device, is_fused):
    def gradients(context):
        query = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with context, profile(activities=[ProfilerActivity.CPU]) as seen:
            F.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
        return query.grad, any("flash" in event.key for event in seen.key_averages())

    plain, was_fused = gradients(nullcontext())
    assert was_fused
    for positions in (1, SHORT_POSITIONS, SHORT_POSITIONS + 1):
        found, was_fused = gradients(attention_for(positions, torch.device(device)))
        assert was_fused == (is_fused or positions > SHORT_POSITIONS)
        torch.testing.assert_close(found, plain)


def test_step_that_is_not_finite_is_not_taken(rows, tmp_path):
    trainer = make_trainer(rows, make_settings(tmp_path / "run"))
    poison(trainer.engine.model, {5})
    states = []
    take_step = trainer.take_step

    def watched():
        window = take_step()
        states.append((trainer.progress.step, weights(trainer)))
        return window

    trainer.take_step = watched
    assert run(trainer).step == 10
    assert [step for step, _ in states] == [1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert states[0][1] == states[1][1] != states[2][1]
    assert trainer.progress.bad_steps == 1
    skipped = json.loads((tmp_path / "run" / "skipped.jsonl").read_text())
    assert skipped["reason"] == "not finite"
    assert len(skipped["samples"][0]) == 6
    rates = [entry["learning_rate"] for entry in read_log(tmp_path / "run")]
    expected = [0.05 * rate_share(step, trainer.settings.optim) for step in range(10)]
    assert rates == pytest.approx(expected), "the schedule counts the steps taken"


def test_run_stops_after_too_many_in_a_row(rows, tmp_path):
    trainer = make_trainer(
        rows, make_settings(tmp_path / "run", "limits.bad_steps=3", "checkpoint.every_steps=1")
    )
    poison(trainer.engine.model, set(range(10, 100)))
    with pytest.raises(TrainingError, match="3 steps in a row had a loss or gradient that is not finite"):
        run(trainer)
    assert read_json(tmp_path / "run" / "status.json") == {"state": "failed", "step": 3}
    assert [path.name for path in list_checkpoints(tmp_path / "run" / CHECKPOINT_FOLDER)][
        -1
    ] == "step-00000003"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
    ],
)
def test_batch_that_does_not_fit_is_left_out(rows, tmp_path, error):
    """The rest goes on as if the step had never been there."""
    words = ("optim.accumulate=1", "limits.memory_skips=1", "optim.num_steps=8")
    trainer = make_trainer(rows, make_settings(tmp_path / "run", *words), dropout=0.0)
    trainer.engine.model.at_call = lambda call, batch: raise_at(call, {4}, error)
    run(trainer)
    without = make_trainer(rows, make_settings(tmp_path / "without", *words), dropout=0.0)
    next_batches, count = without._next_batches, iter(range(100))

    def skipping():
        batches = next_batches()
        return next_batches() if next(count) == 3 else batches

    without._next_batches = skipping
    run(without)
    assert weights(trainer) == weights(without)
    assert trainer.progress.memory_skips == 1
    again = make_trainer(rows, make_settings(tmp_path / "again", *words))
    again.engine.model.at_call = lambda call, batch: raise_at(call, {2, 3}, error)
    with pytest.raises(TrainingError, match=r"2 steps did not fit into memory \(limits.memory_skips: 1\)"):
        run(again)


def raise_at(call: int, calls: set[int], error: Exception) -> None:
    if call in calls:
        raise error


def test_other_errors_are_not_taken_for_memory(rows, tmp_path):
    trainer = make_trainer(rows, make_settings(tmp_path / "run"))
    trainer.engine.model.at_call = lambda call, batch: raise_at(call, {2}, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(trainer)
    assert not is_out_of_memory(ValueError("can't allocate memory"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.learning_rate=1"], "optim.learning_rate was 0.05, is 1.0"),
        (["seed=5"], "seed was 0, is 5"),
        (["checkpoint.resume=never"], "is there already"),
    ],
)
def test_another_run_is_not_gone_on_with(rows, tmp_path, words, message):
    run(make_trainer(rows, make_settings(tmp_path / "run")))
    with pytest.raises(CheckpointError, match=message):
        run(make_trainer(rows, make_settings(tmp_path / "run", *words)))


def test_other_data_or_processes_are_refused_and_other_threads_warned_of(rows, tmp_path, caplog):
    out = tmp_path / "run"
    run(make_trainer(rows, make_settings(out, "checkpoint.resume=auto")))
    torch.set_num_threads(2)
    run(make_trainer(rows, make_settings(out)))
    assert "threads were 1, are 2: the run goes on, but not bit for bit" in caplog.text
    trainer = make_trainer(rows, make_settings(out))
    trainer.ranks = type("Two", (), {"rank": 0, "world_size": 2, "gather": lambda self, value: [value]})()
    with pytest.raises(CheckpointError, match="processes were 1, are 2"):
        trainer.resume()
    write_rows(tmp_path, count=25)
    with pytest.raises(CheckpointError, match=r"fact.sources was .*'rows': 24.* is .*'rows': 25"):
        run(make_trainer(rows, make_settings(out)))
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        run(make_trainer(rows, make_settings(tmp_path / "new", "checkpoint.resume=must")))


def launch(scenario: str, folder: Path) -> dict:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0",
        str(ROOT / "tests/training/toy.py"), scenario, str(folder),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((folder / "report.json").read_text())


def test_two_ranks_are_one_rank_and_resume(rows, tmp_path):
    report = launch("two_ranks", tmp_path)
    one = make_trainer(rows, make_settings(tmp_path / "one", "optim.accumulate=4"), dropout=0.0)
    share_windows(one, ranks=2)
    run(one)
    for a, b in zip(read_log(tmp_path / "one"), read_log(tmp_path / "equal"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    for name, bits in report["equal/weights"].items():
        values = torch.tensor([float.fromhex(value) for value in bits])
        torch.testing.assert_close(
            one.engine.parameters[name].detach().flatten(), values, rtol=1e-3, atol=1e-5
        )
    for name in ("mid", "late"):
        assert report[f"stop-{name}/weights"] == report["straight/weights"]
        assert curve(tmp_path / f"stop-{name}") == curve(tmp_path / "straight")
    assert report["memory/skips"] == 1
    skipped = json.loads((tmp_path / "memory" / "skipped.jsonl").read_text())
    assert [len(names) for names in skipped["samples"]] == [2, 2]
    assert report["memory/result"] == [EXIT_FINISHED, 10]


def share_windows(trainer, *, ranks: int) -> None:
    """Let one rank see the batches of several, in turn."""
    feeds = []
    for rank in range(ranks):
        feed = make_trainer_feed(trainer, rank, ranks)
        feeds.append(iter(feed))

    def alternate():
        per_rank = trainer.settings.optim.accumulate // ranks
        while True:
            for feed in feeds:
                for _ in range(per_rank):
                    yield next(feed)

    trainer._batches = alternate()


def make_trainer_feed(trainer, rank: int, world: int):
    from tests.training.toy import make_feed

    return make_feed(Path(trainer.feed.mixture.specs[0].path), rank=rank, world=world)


@pytest.mark.slow
def test_shards_are_copies_and_resume(rows, tmp_path):
    report = launch("shards", tmp_path)
    assert report["copies"].keys() == report["shards"].keys()
    for name, value in report["copies"].items():
        if name.startswith(("unused", "sometimes")):
            continue  # decays under shards, where every weight has a gradient
        torch.testing.assert_close(
            torch.tensor(report["shards"][name]), torch.tensor(value), rtol=1e-3, atol=1e-5
        )
    assert report["stopped/result"][0] == EXIT_STOPPED
    assert report["resumed"] == report["straight"]
