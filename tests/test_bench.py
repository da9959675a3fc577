"""What the bench measures, on a preset that is small enough to measure here."""

import json
from dataclasses import asdict
from itertools import islice

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from omni_adapter import ConfigError, cli
from omni_adapter.bench import (
    MEASURES,
    PRESETS,
    BenchSettings,
    load_talker,
    measure,
    random_talker,
    show,
)
from omni_adapter.generation.generator import Decoder

QUICK = BenchSettings(seconds=0.5, steps=12, rounds=2)


@pytest.fixture(scope="module")
def report():
    return measure(lambda: random_talker("tiny"), name="tiny", settings=QUICK)


def test_everything_is_measured(report):
    names = [timing.name for timing in report.timings]
    assert names == [*MEASURES[:-1], "first_text", "first_audio"]
    for timing in report.timings:
        assert 0 < timing.min_s <= timing.median_s <= timing.max_s < 10
        assert timing.count == (12 if timing.name.startswith("step") else 2)
    assert 0 < report.steady_real_time_factor < report.real_time_factor
    assert report.frame_s == 2048 / 24000
    assert (
        report.prompt_steps == 25 + 2 + 4
    )  # half a second, its two marks, and a plain template of four words


def test_memory_is_that_of_the_process(report):
    assert 100e6 < report.memory_after_load_bytes <= report.peak_memory_bytes


def test_report_is_json_with_units_in_its_names(report):
    values = json.loads(json.dumps(asdict(report), allow_nan=False))
    assert values["format_version"] == 1
    assert list(values) == [
        "format_version", "subject", "machine", "settings", "prompt_steps", "frame_s", "timings",
        "real_time_factor", "steady_real_time_factor", "load_s", "memory_after_load_bytes",
        "peak_memory_bytes",
    ]  # fmt: skip
    assert list(values["timings"][0]) == ["name", "what", "median_s", "min_s", "max_s", "count"]
    assert values["subject"]["name"] == "tiny"
    assert values["subject"]["dtype"] == "float32"
    assert values["subject"]["parameters"]["language_model"] == PRESET_SIZES["tiny"]
    machine = values["machine"]
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == torch.get_num_threads()
    assert machine["processor"]


PRESET_SIZES = {
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "llama-3.2-1b": 1_235_814_400,
    "tiny": 106_816,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_sizes_of_their_names(preset):
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**PRESETS[preset].lm))
    assert sum(parameter.numel() for parameter in lm.parameters()) == PRESET_SIZES[preset]


def test_random_talkers_are_the_same_and_talk():
    first, second = random_talker("tiny"), random_talker("tiny", dtype="bfloat16")
    assert second.model.backbone.dtype == second.model.code_heads.proj.weight.dtype == torch.bfloat16
    reply = first.chat(text="word", max_new_tokens=12)
    assert reply.text.startswith("word")
    assert len(reply.audio) > 0
    assert random_talker("tiny").chat(text="word", max_new_tokens=12).text == reply.text


def test_a_step_with_speech_runs_the_rows_it_says():
    """The kinds of steps differ in the rows that the LM runs."""
    talker = random_talker("tiny")
    rows: dict[str, set[int]] = {}
    for name in ("step_parallel", "step_batch_parallel", "step_speech_only", "step_text_only"):
        seen: list[tuple[int, int]] = []
        hook = talker.model.backbone.register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.append(tuple(inputs[0].shape[:2]))
        )
        measure(lambda: talker, name="tiny", settings=BenchSettings(seconds=0.5, steps=5, only=(name,)))
        hook.remove()
        rows[name] = {batch for batch, steps in seen[-5:] if steps == 1}
    assert rows == {
        "step_parallel": {1}, "step_batch_parallel": {2}, "step_speech_only": {1}, "step_text_only": {1},
    }  # fmt: skip


def test_a_saved_talker_and_a_plain_model_can_be_measured(talker_folder, monkeypatch):
    assert load_talker(str(talker_folder)).config.tts.layers == 2
    asked = []
    monkeypatch.setattr("omni_adapter.OmniAdapter.wrap", lambda *a, **k: asked.append((a, k)))
    load_talker(str(talker_folder / "base"), dtype="bfloat16")
    assert asked == [((str(talker_folder / "base"),), {"dtype": "bfloat16"})]


def test_replies_that_end_early_are_begun_again(monkeypatch):
    """An end of speech at some step must not stop the timing."""
    run, begun = Decoder.run, []

    def run_ten(self, samples, **options):
        begun.append(samples)
        yield from islice(run(self, samples, **options), 10)

    monkeypatch.setattr(Decoder, "run", run_ten)
    settings = BenchSettings(seconds=0.5, steps=40, only=("step_parallel",))
    [timing] = measure(lambda: random_talker("tiny"), name="ends", settings=settings).timings
    assert timing.count == 40
    assert len(begun) == 5  # 9 steps after each prefill, 3 of all to warm up


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"only": ("speed",)}, "cannot measure speed; known are features, encoder, prefill, step_parallel"),
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"seconds": -1.0}, r"seconds must be positive, got -1\.0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        BenchSettings(**settings)


def test_table(report):
    console = Console(width=120)
    with console.capture() as shown:
        show(report, console)
    for words in (
        "tiny: 1 M parameters, float32", "audio encoder and adapter, 0.5 s", "prefill of 31 steps",
        "step, text in a row of its own", "a chunk of 4 frames (341 ms)",
        "from the question to the first sound", "one step makes 85.3 ms of sound",
        "after the first sound (below 1 keeps up with speech)", "memory at most",
    ):  # fmt: skip
        assert words in shown.get(), words


def test_command(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(cli.app, ["bench", *arguments])

    quick = (
        "--random",
        "tiny",
        "--only",
        "features,reply",
        "--rounds",
        "1",
        "--steps",
        "16",
        "--seconds",
        "0.5",
    )
    values = json.loads(run(*quick, "--json", "--threads", "1").stdout)
    assert [timing["name"] for timing in values["timings"]] == ["features", "first_text", "first_audio"]
    assert values["machine"]["threads"] == 1
    assert "one step makes 85.3 ms of sound" in run(*quick).stdout
    for arguments, message in (
        ((), "name either a model, or --random with one of qwen2-0.5b"),
        (("model", "--random", "tiny"), "name either a model, or --random with one of qwen2-0.5b"),
        (("--random", "huge"), "no preset is called 'huge'; there are qwen2-0.5b, "),
        (("--random", "tiny", "--only", "speed"), "cannot measure speed"),
        (("some/model",), "some/model is neither a folder nor"),
        ((str(tmp_path),), "holds no config.json, so it is no model of transformers"),
    ):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
