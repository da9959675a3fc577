"""What learns in each stage, by name; wrong sets are errors."""

import copy

import pytest
import torch

from omni_adapter.data.layout import TASKS, GridRules
from omni_adapter.errors import ConfigError
from omni_adapter.model import ADDED_GROUPS
from omni_adapter.training.loss import TrainingModel
from omni_adapter.training.settings import LoraSettings
from omni_adapter.training.stages import (
    STAGES,
    check_trainable,
    count_trainable,
    get_stage,
    learning_groups,
    prepare_stage,
)
from tests.training.talkers import build_model, make_batch

ADDED = set(ADDED_GROUPS)
EXPECTED = {
    # stage, mode of the base: what learns
    ("align", "lora"): ADDED,
    ("align", "full"): ADDED,
    ("align", "frozen"): ADDED,
    ("adapt", "lora"): {"lora"},
    ("adapt", "full"): {"language_model"},
    ("finetune", "lora"): ADDED | {"lora"},
    ("finetune", "full"): ADDED | {"language_model"},
    ("finetune", "frozen"): ADDED,
    ("anneal", "lora"): ADDED | {"lora"},
    ("anneal", "full"): ADDED | {"language_model"},
}
FAMILIES = ("llama", "qwen2", "mistral", "gpt2")


@pytest.mark.parametrize(("stage", "lm_mode"), EXPECTED)
def test_groups_that_learn(stage, lm_mode):
    model = build_model()
    table = prepare_stage(model, stage, lm_mode=lm_mode)
    assert learning_groups(stage, lm_mode=lm_mode) == EXPECTED[stage, lm_mode]
    assert {row.group for row in table.rows if row.trainable} == EXPECTED[stage, lm_mode]
    for group, parameters in model.groups().items():
        assert all(p.requires_grad == (group in EXPECTED[stage, lm_mode]) for p in parameters.values())
    assert table == check_trainable(model, stage, lm_mode=lm_mode) == count_trainable(model)


def test_table_of_stages():
    assert list(STAGES) == ["align", "adapt", "finetune", "anneal"]
    for stage in STAGES.values():
        assert stage.groups <= ADDED
        assert set(stage.tasks) <= set(TASKS)
        assert 4e-6 <= stage.final_rate < stage.learning_rate <= 1e-3
    assert not any(TASKS[task].code_loss for task in get_stage("adapt").tasks)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", STAGES)
def test_only_what_learns_changes(family, stage):
    model = build_model(family)
    prepare_stage(model, stage)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    training = TrainingModel(model).train()
    batch = make_batch(GridRules.of(model.config), get_stage(stage).tasks)
    for _ in range(2):  # LoRA's first matrix learns once its second is not zero any more
        optimizer.zero_grad()
        training(batch).total().backward()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed == expected


def test_lora_goes_on_learning_in_the_next_stage():
    model = build_model()
    prepare_stage(model, "adapt", lora=LoraSettings(rank=4))
    weights = model.backbone.lora_state_dict()
    prepare_stage(model, "align")
    assert not any(p.requires_grad for p in model.groups()["lora"].values())
    table = prepare_stage(model, "finetune")
    assert {row.group for row in table.rows if row.trainable} == ADDED | {"lora"}
    again = model.backbone.lora_state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    prepare_stage(model, "anneal", lora=LoraSettings(rank=4))
    with pytest.raises(ConfigError, match="rank is 4, asked for 8; dora is False, asked for True"):
        prepare_stage(model, "anneal", lora=LoraSettings(rank=8, dora=True))


@pytest.mark.parametrize("dora", [False, True])
def test_settings_of_lora(dora):
    model = build_model()
    lora = LoraSettings(rank=2, alpha=6, dropout=0.25, targets="q_proj, down_proj", dora=dora)
    table = prepare_stage(model, "adapt", lora=lora)
    assert {name.rsplit(".", 1)[-1] for name in model.backbone.lora_targets} == {"q_proj", "down_proj"}
    config = model.backbone.lora_config
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora) == (2, 6, 0.25, dora)
    lm = model.backbone.lm.config
    width, inner = lm.hidden_size, lm.intermediate_size
    per_layer = 2 * (width + width) + 2 * (inner + width) + (2 * width if dora else 0)
    assert table.trainable == lm.num_hidden_layers * per_layer


def test_full_mode_refuses_lora_that_is_there():
    model = build_model()
    prepare_stage(model, "adapt")
    with pytest.raises(ConfigError, match="carries LoRA from an earlier stage; merge it"):
        prepare_stage(model, "finetune", lm_mode="full")
    model.backbone.merge_lora()
    prepare_stage(model, "finetune", lm_mode="full")


def test_quantised_base_learns_through_lora_only():
    """Weights in 8 bits, stored as bitsandbytes stores them."""
    model = build_model()
    norm = model.backbone.lm.model.norm
    norm.weight = torch.nn.Parameter(norm.weight.to(torch.uint8), requires_grad=False)
    assert model.backbone.is_quantized
    with pytest.raises(ConfigError, match=r"the base is quantised, .* use lm_mode 'lora' \(QLoRA\)"):
        prepare_stage(model, "finetune", lm_mode="full")
    prepare_stage(model, "align")
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())


@pytest.mark.parametrize(
    ("name", "lm_mode", "reason"),
    [
        ("alingn", "lora", "no stage is called 'alingn'; the stages are align, adapt, finetune, anneal"),
        ("align", "qlora", "by one of lora, full, frozen, got 'qlora'"),
        ("adapt", "frozen", "trains nothing but the base, so it cannot be frozen"),
    ],
)
def test_wrong_names_are_refused(name, lm_mode, reason):
    with pytest.raises(ConfigError, match=reason):
        prepare_stage(build_model(), name, lm_mode=lm_mode)


def test_wrong_sets_are_named():
    model = build_model()
    prepare_stage(model, "align")
    next(model.tts_blocks.parameters()).requires_grad_(False)
    model.backbone.lm.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ConfigError) as caught:
        check_trainable(model, "align")
    text = str(caught.value)
    assert "tts_blocks (" in text
    assert "all should" in text
    assert "language_model (4,096 of" in text
    assert "none should" in text
    assert "code_heads" not in text
    with pytest.raises(ConfigError, match=r"lora \(there is none\)"):
        check_trainable(build_model(), "adapt")


def test_table_prints():
    model = build_model()
    text = str(prepare_stage(model, "align"))
    lines = text.splitlines()
    assert lines[0].split() == ["group", "parameters", "trainable"]
    assert [line.split()[0] for line in lines[1:-1]] == [*model.groups(), "total"]
    total = sum(p.numel() for p in model.parameters())
    assert f"{total:,}" in lines[-2]
    assert lines[-1].endswith("% of parameters learn")


def test_preparing_a_copy_leaves_the_original():
    model = build_model()
    other = copy.deepcopy(model)
    prepare_stage(other, "adapt")
    assert not model.backbone.has_lora
    assert other.backbone.linear_head is other.backbone.lm.get_output_embeddings()
