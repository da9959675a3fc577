"""Every file under recipes/configs is read, says how it is run, and agrees with the table of stages."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from omni_adapter.errors import ConfigError
from omni_adapter.training.command import read_command
from omni_adapter.training.optimizer import rate_share
from omni_adapter.training.settings import load_settings
from omni_adapter.training.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes" / "configs"
ALIGN = str(CONFIGS / "align.yaml")
PROCESSES = 8  # of the paper
SAMPLES = 192  # of a step of the paper


def name_of(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=name_of)
def test_a_stage_opens_with_the_command_that_runs_it(path):
    words = shlex.split(path.read_text().splitlines()[0])
    assert words[:3] == ["#", "accelerate", "launch"]
    recipe = ROOT / words[3]
    stage, also = re.search(r'run\("(\w+)"(?:, also=\("(\w+)",\))?\)', recipe.read_text()).groups()
    settings = read_command(stage, words[4:], also=[also] if also else []).settings
    assert settings == load_settings(path, words[6:])
    assert settings.stage == path.stem
    assert settings.out == f"runs/{path.stem}"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=name_of)
def test_a_stage_has_the_rates_and_steps_of_the_table(path):
    settings, stage = load_settings(path), STAGES[path.stem]
    assert settings.optim.num_steps == stage.num_steps
    assert settings.optim.learning_rate == stage.learning_rate
    last = settings.optim.learning_rate * rate_share(stage.num_steps, settings.optim)
    assert last == pytest.approx(stage.final_rate)
    assert settings.data.batch_size * settings.optim.accumulate * PROCESSES == SAMPLES


def test_every_stage_has_a_file():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(STAGES)


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=name_of)
def test_accelerate_reads_its_configs(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith(f"# accelerate launch --config_file recipes/configs/accelerate/{path.name} ")
    config = load_config_from_file(str(path))
    assert config.num_processes >= 2
    named = (yaml.safe_load(path.read_text()).get("deepspeed_config") or {}).get("deepspeed_config_file")
    assert named is None or (ROOT / named).is_file()


@pytest.mark.parametrize("path", sorted((CONFIGS / "deepspeed").glob("*.json")), ids=name_of)
def test_deepspeed_configs_leave_the_rest_to_the_settings(path):
    config = json.loads(path.read_text())
    assert config["zero_optimization"]["stage"] == int(re.search(r"zero(\d)", path.name).group(1))
    for key in ("gradient_clipping", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu"):
        assert config[key] == "auto"
    assert ("offload_param" in config["zero_optimization"]) == ("offload" in path.name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", ALIGN, "--base", "b", "--data", "d"], "for the stage 'align', this recipe"),
        (["--data", "d"], "no model: give --base ID"),
        (["--base", "b"], "no data: give --data PATH"),
        (["--config"], "--config needs the name"),
        (["--base", "b", "--data", "d", "stage=tune"], "no stage is called 'tune'"),
    ],
)
def test_mistakes_on_the_command_line_are_named(words, message):
    with pytest.raises(ConfigError, match=message):
        read_command("adapt", words)
