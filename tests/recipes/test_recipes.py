"""Every stage by its real command: one process, two, and those that share the weights out."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from omni_adapter import OmniAdapter
from omni_adapter.train import prepare, run
from omni_adapter.training.command import read_command
from omni_adapter.training.log import read_log
from omni_adapter.training.loop import EXIT_FINISHED
from omni_adapter.training.stages import learning_groups
from tests.recipes.world import small_words, write_parts, write_rows

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = "recipes/configs"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_parts(folder)
    write_rows(folder)
    return folder


def align_words(world: Path, out: Path, *words: str) -> list[str]:
    parts = [word for name in ("base", "encoder", "codec") for word in (f"--{name}", str(world / name))]
    return [
        "--config", f"{CONFIGS}/align.yaml", *parts, "--data", str(world / "rows.jsonl"),
        "model.wrap={tts_layers: 1}", *small_words(out, *words),
    ]  # fmt: skip


def next_words(name: str, world: Path, start: Path, out: Path, *words: str) -> list[str]:
    return [
        "--config", f"{CONFIGS}/{name}.yaml", "--start", str(start), "--data", str(world / "rows.jsonl"),
        *small_words(out, *words),
    ]  # fmt: skip


def launch(arguments: list[str], words: list[str], **environment: str) -> subprocess.Popen:
    command = [
        str(Path(sys.executable).parent / "accelerate"), "launch", "--main_process_port", "0",
        *arguments, *words,
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, *, expected: int | None = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert expected is None or process.returncode == expected, output[-6000:]
    return output


def plain(count: int) -> list[str]:
    """Arguments of ``accelerate launch`` for copies in ``count`` processes."""
    if count == 1:
        return ["--cpu", "--num_processes", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return ["--config_file", f"{CONFIGS}/accelerate/cpu.yaml", "--num_processes", str(count)]


def added(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "omni_model.safetensors")


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(out)]


def test_stages_in_turn(world, tmp_path):
    """Loss falls, what is frozen stays bit for bit, LoRA merges, the result talks."""
    words = ("data.mode=pad", "data.batch_size=8", "optim.num_steps=14")
    prompts = ("watch.answer_every=7", "watch.prompts=[{text: hello}]", "watch.max_new_tokens=10")
    trackers = ["watch.trackers=[tensorboard]"] if find_spec("tensorboard") else []
    align, adapt, finetune, anneal = (tmp_path / name for name in ("align", "adapt", "finetune", "anneal"))
    assert run("align", align_words(world, align, *words, *prompts, *trackers)) == EXIT_FINISHED
    assert run("adapt", next_words("adapt", world, align / "talker", adapt, *words)) == EXIT_FINISHED
    assert run("finetune", next_words("finetune", world, adapt / "talker", finetune, *words)) == EXIT_FINISHED
    few = (*words[:2], "optim.num_steps=2")
    code = run("finetune", next_words("anneal", world, finetune / "talker", anneal, *few), also=("anneal",))
    assert code == EXIT_FINISHED

    for out in (align, adapt, finetune):
        values = losses(out)
        assert sum(values[-4:]) < 0.95 * sum(values[:4]), out.name
    base = load_file(world / "base" / "model.safetensors")
    for out in (align, adapt, finetune, anneal):
        # The talker refers to the base of the world, which learns through LoRA at most.
        assert load_file(world / "base" / "model.safetensors").keys() == base.keys()
        assert OmniAdapter.from_pretrained(out / "talker").config.base.id == str(world / "base")
    before, after = added(align / "talker"), added(adapt / "talker")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (align / "talker" / "lora").exists()
    lora = [load_file(out / "talker/lora/adapter_model.safetensors") for out in (adapt, finetune)]
    assert any(not torch.equal(lora[0][name], lora[1][name]) for name in lora[0])
    later = added(finetune / "talker")
    for group in ("audio_adapter", "code_embedding", "tts_blocks", "code_heads"):
        names = [name for name in later if name.startswith(group)]
        assert any(not torch.equal(after[name], later[name]) for name in names), group

    talker = OmniAdapter.from_pretrained(anneal / "talker")
    reply = talker.chat(text="How are you today?", max_new_tokens=12)
    talker.export(tmp_path / "merged")
    merged = OmniAdapter.from_pretrained(tmp_path / "merged").chat(
        text="How are you today?", max_new_tokens=12
    )
    assert (reply.text, len(reply.audio)) == (merged.text, len(merged.audio))

    for name in ("settings.yaml", "run.json", "log.jsonl", "status.json", "report.html"):
        assert (align / name).is_file(), name
    about = json.loads((align / "run.json").read_text())
    assert about["groups"]["language_model"]["trainable"] == 0
    assert about["data"]["sources"][0]["rows"] == 8
    assert (align / "answers/step-00000007/prompt-0.txt").is_file()
    assert not trackers or list((align / "omni-adapter").glob("**/events*")), "tensorboard wrote nothing"


@pytest.mark.parametrize("stage", ["align", "adapt", "finetune"])
def test_what_is_frozen_stays_bit_for_bit(world, tmp_path, stage):
    words = align_words(
        world, tmp_path / stage, f"stage={stage}", "model.lora={dropout: 0.1}", "optim.num_steps=6"
    )
    settings = read_command(stage, words[2:]).settings
    this = prepare(settings, Accelerator(cpu=True))
    learning = learning_groups(stage)
    before = {
        group: {name: value.detach().clone() for name, value in values.items()}
        for group, values in this.talker.model.groups().items()
    }
    assert this.trainer.run().step == 6
    for group, values in this.talker.model.groups().items():
        moved = [name for name, value in values.items() if not torch.equal(value, before[group][name])]
        assert bool(moved) == (group in learning), (group, moved[:3])


def test_whole_base_learns_and_is_saved(world, tmp_path):
    out = tmp_path / "finetune"
    words = ("model.lm=full", "optim.group_rates={language_model: 1e-3}", "optim.ema_decay=0.5")
    run("align", align_words(world, tmp_path / "align", "optim.num_steps=1"))
    AcceleratorState._reset_state(True)
    assert (
        run("finetune", next_words("finetune", world, tmp_path / "align/talker", out, *words))
        == EXIT_FINISHED
    )
    talker = OmniAdapter.from_pretrained(out / "talker")
    assert talker.config.base.id == "./base"
    before, after = (
        load_file(world / "base/model.safetensors"),
        load_file(out / "talker/base/model.safetensors"),
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)
    average = load_file(out / "talker-average/base/model.safetensors")
    assert any(not torch.equal(average[name], after[name]) for name in after)


@pytest.mark.parametrize("mode", ["pad", "pack"])
def test_hearing_is_learned_from_the_base_itself(world, tmp_path, mode):
    """Distillation: the divergence from the base's own answers to the questions in text falls."""
    words = ("loss.distil=true", f"data.mode={mode}", "data.tasks={speech_to_text: 1}", "optim.num_steps=14")
    assert run("align", align_words(world, tmp_path, *words)) == EXIT_FINISHED
    values = losses(tmp_path)
    assert sum(values[-4:]) < 0.9 * sum(values[:4])


def test_tasks_that_the_base_cannot_teach_are_refused(world, tmp_path, capsys):
    assert run("align", align_words(world, tmp_path, "loss.distil=true")) != EXIT_FINISHED
    assert "the base can teach speech_to_speech, speech_to_text, not asr" in capsys.readouterr().err


def test_packed_and_checkpointed_rows_train(world, tmp_path):
    words = ("data.mode=pack", "data.max_length=96", "model.gradient_checkpointing=true", "data.workers=2")
    assert run("align", align_words(world, tmp_path / "align", *words)) == EXIT_FINISHED
    assert len(losses(tmp_path / "align")) == 4


def test_dry_run_shows_everything_and_keeps_nothing(world, tmp_path, capsys):
    out = tmp_path / "align"
    assert run("align", [*align_words(world, out), "--dry-run"]) == EXIT_FINISHED
    shown = capsys.readouterr().out
    for text in ("learning_rate: 0.003", "code_heads", "averages of AdamW",
                 "lengths of the first 200 samples", "no row was rejected",
                 "4 steps of 2 samples", "one step: loss"):  # fmt: skip
        assert text in shown
    assert not out.exists()


def test_too_many_bad_rows_fail_the_run(world, tmp_path, capsys):
    lines = (world / "rows.jsonl").read_text().splitlines()
    bad = [json.dumps({**json.loads(line), "codes_out": [[1]]}) for line in lines[:4]]
    path = world / "bad.jsonl"
    path.write_text("\n".join([*bad, *lines[4:]]) + "\n")
    words = align_words(world, tmp_path / "align", f"data.sources=[{{path: {path}, task: tts}}]")
    words = words[: words.index("--data")] + words[words.index("--data") + 2 :]
    assert run("align", words) == 1
    assert "bad_codes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.learning_rat=1"], "did you mean 'optim.learning_rate'?"),
        (["loss.text_wieght=1"], "did you mean 'text_weight'?"),
        (["data.sources=[{path: rows.jsonl, wieght: 2}]"], "did you mean 'weight'?"),
        (["data.sources=[./nowhere/rows.jsonl]"], "nowhere/rows.jsonl"),
        (["optim.group_rates={lora: 1}"], "lora, which does not learn in this stage"),
    ],
)
def test_mistakes_end_the_run_in_one_line(world, tmp_path, capsys, words, message):
    assert run("align", align_words(world, tmp_path / "align", *words)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_real_command_with_one_process_and_two(world, tmp_path):
    """Two processes see together what one sees; a signal stops them, and the same command goes on."""
    one, two = tmp_path / "one", tmp_path / "two"
    words = ("data.mode=pad", "optim.num_steps=40", "watch.progress=false")
    first = launch([*plain(1), "recipes/stage1.py"], align_words(world, one, *words, "data.batch_size=4"))
    finish(first)
    command = align_words(world, two, *words, "data.batch_size=2")
    process = launch([*plain(2), "recipes/stage1.py"], command)
    wait_for_steps(two, 5, process)
    os.killpg(process.pid, signal.SIGTERM)
    finish(process, expected=None)
    assert json.loads((two / "run.json").read_text())["world_size"] == 2
    status = json.loads((two / "status.json").read_text())
    assert status["state"] == "stopped"
    assert 5 <= status["step"] < 40
    finish(launch([*plain(2), "recipes/stage1.py"], command))
    assert json.loads((two / "status.json").read_text()) == {"state": "finished", "step": 40}
    assert losses(two)[:8] == pytest.approx(losses(one)[:8], rel=1e-3)
    assert losses(two) == pytest.approx(losses(one), rel=0.05)
    assert losses(two)[-1] < losses(two)[0]
    assert OmniAdapter.from_pretrained(two / "talker").chat(text="hello", max_new_tokens=8).steps > 0


def wait_for_steps(out: Path, count: int, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if len(read_log(out)) >= count:
            return
        assert process.poll() is None, process.communicate()[0][-6000:]
        time.sleep(0.05)
    raise AssertionError("no steps were taken")


@pytest.mark.slow
@pytest.mark.timeout(900)  # DeepSpeed compiles its communication when it is first used
@pytest.mark.parametrize("way", ["zero2", "zero3", "fsdp2"])
def test_shared_weights_learn_as_copies_do(world, tmp_path, way):
    """DeepSpeed and FSDP2 by their config files; stopped and resumed; the result is whole."""
    if way != "fsdp2":
        pytest.importorskip("deepspeed", reason="DeepSpeed is in the extra train")
        if shutil.which("g++") is None:
            pytest.skip("DeepSpeed compiles its communication with g++")
    copies, shared, stopped = tmp_path / "copies", tmp_path / way, tmp_path / "stopped"
    words = ("data.mode=pad", "optim.num_steps=6", "optim.accumulate=2", "watch.progress=false")
    finish(launch([*plain(2), "recipes/stage1.py"], align_words(world, copies, *words)))
    config = [
        "--config_file",
        f"{CONFIGS}/accelerate/{way}.yaml",
        "--num_processes",
        "2",
        "recipes/stage1.py",
    ]
    environment = {"DS_ACCELERATOR": "cpu"}
    finish(launch(config, align_words(world, shared, *words), **environment))
    assert json.loads((shared / "run.json").read_text())["world_size"] == 2
    assert losses(shared) == pytest.approx(losses(copies), rel=1e-3)
    expected, found = added(copies / "talker"), added(shared / "talker")
    start = OmniAdapter.wrap(
        str(world / "base"), encoder=str(world / "encoder"), codec=str(world / "codec"), tts_layers=1
    )
    moved = {name: value for name, value in start.model.added_parameters()}
    for name, value in expected.items():
        step = (value - moved[name].detach()).norm()
        assert (found[name] - value).norm() <= 0.02 * step + 1e-6, name
    # The same again, with a checkpoint to go on from.
    part = [word for word in align_words(world, stopped, *words) if word != "optim.num_steps=6"]
    part += ["optim.num_steps=6", "checkpoint.every_steps=3"]
    finish(launch(config, part, **environment))
    newest = sorted((stopped / "checkpoints").glob("step-*"))[-1]
    shutil.rmtree(newest)
    finish(launch(config, part, **environment))
    assert [value.hex() for value in losses(stopped)] == [value.hex() for value in losses(shared)]
    again = added(stopped / "talker")
    assert all(torch.equal(again[name], found[name]) for name in found)


@pytest.mark.slow
def test_killed_run_goes_on_bit_for_bit(world, tmp_path):
    """One of two processes is killed at once; the run fails, and the same command goes on with it."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    words = ("optim.num_steps=60", "checkpoint.every_steps=5", "watch.progress=false")
    finish(launch([*plain(2), "recipes/stage1.py"], align_words(world, straight, *words)))
    command = [*plain(2), "recipes/stage1.py"], align_words(world, killed, *words)
    process = launch(*command)
    wait_for_steps(killed, 12, process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    finish(process, expected=1)
    assert len(losses(killed)) < 60
    finish(launch(*command))
    assert [value.hex() for value in losses(killed)] == [value.hex() for value in losses(straight)]
    one, other = added(killed / "talker"), added(straight / "talker")
    assert all(torch.equal(one[name], other[name]) for name in other)


def children(parent: int) -> list[int]:
    """Processes that a process started."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
