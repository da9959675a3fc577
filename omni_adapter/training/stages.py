"""The stages of training as a table: which weights learn, from which tasks, how fast (paper, section 3.3).

Model and name of a stage in, a model whose right weights learn out, and a table of them to print. Weights are
chosen by the name of their group, and what learns in the end is checked against it. Knows nothing of data,
losses or optimizers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from omni_adapter.data.layout import TASKS
from omni_adapter.errors import ConfigError
from omni_adapter.model import ADDED_GROUPS, OmniModel
from omni_adapter.training.settings import LoraSettings

LmMode = Literal["lora", "full", "frozen"]

ALL_LINEAR = "all-linear"
"""Targets of LoRA: every linear layer that the text path runs."""

_LM_GROUPS: Mapping[LmMode, frozenset[str]] = {
    "lora": frozenset({"lora"}),
    "full": frozenset({"language_model"}),
    "frozen": frozenset(),
}
"""Which group learns for the base."""


@dataclass(frozen=True)
class Stage:
    """A row of the table.

    Attributes:
        groups: weight groups that learn, besides the base.
        trains_lm: whether the base learns, fully or through LoRA.
        tasks: tasks to draw from, each as often.
        learning_rate: highest learning rate.
        final_rate: learning rate at the end of the cosine.
        num_steps: optimizer steps.
    """

    groups: frozenset[str]
    trains_lm: bool
    tasks: tuple[str, ...]
    learning_rate: float
    final_rate: float
    num_steps: int


STAGES: Mapping[str, Stage] = {
    "align": Stage(frozenset(ADDED_GROUPS), False, ("asr", "tts"), 1e-3, 4e-6, 20_000),
    "adapt": Stage(frozenset(), True, ("asr", "speech_to_text", "text_to_text"), 4e-4, 4e-6, 30_000),
    "finetune": Stage(frozenset(ADDED_GROUPS), True, tuple(TASKS), 4e-4, 4e-6, 60_000),
    # The paper gives no number of steps: about five passes over its 470 thousand rows in batches of 192.
    "anneal": Stage(frozenset(ADDED_GROUPS), True, tuple(TASKS), 5e-5, 4e-6, 12_000),
}


class GroupRow(NamedTuple):
    """Parameters of one weight group."""

    group: str
    parameters: int
    trainable: int


@dataclass(frozen=True)
class TrainableTable:
    """What learns and what does not; ``str`` gives it in columns."""

    rows: tuple[GroupRow, ...]

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(row.parameters for row in self.rows)

    @property
    def trainable(self) -> int:
        """Parameters that learn."""
        return sum(row.trainable for row in self.rows)

    def __str__(self) -> str:
        head = f"{'group':16}{'parameters':>16}{'trainable':>16}"
        total = GroupRow("total", self.parameters, self.trainable)
        lines = [f"{row.group:16}{row.parameters:>16,}{row.trainable:>16,}" for row in (*self.rows, total)]
        return "\n".join(
            (head, *lines, f"{self.trainable / max(1, self.parameters):.2%} of parameters learn")
        )


def get_stage(name: str) -> Stage:
    """Return the stage called ``name``.

    Raises:
        ConfigError: if there is none.
    """
    if name not in STAGES:
        raise ConfigError(f"no stage is called {name!r}; the stages are {', '.join(STAGES)}")
    return STAGES[name]


def learning_groups(name: str, *, lm_mode: LmMode = "lora") -> frozenset[str]:
    """Return the weight groups that learn in a stage.

    Args:
        name: the stage.
        lm_mode: how the base learns where the stage lets it: through LoRA, fully, or not at all.

    Raises:
        ConfigError: if there is no such stage or mode, or nothing would learn.
    """
    stage = get_stage(name)
    if lm_mode not in _LM_GROUPS:
        raise ConfigError(f"the base learns by one of {', '.join(_LM_GROUPS)}, got {lm_mode!r}")
    groups = stage.groups | (_LM_GROUPS[lm_mode] if stage.trains_lm else frozenset())
    if not groups:
        raise ConfigError(f"stage {name!r} trains nothing but the base, so it cannot be {lm_mode}")
    return groups


def prepare_stage(
    model: OmniModel, name: str, *, lm_mode: LmMode = "lora", lora: LoraSettings | None = None
) -> TrainableTable:
    """Let exactly the weights of a stage learn, adding LoRA where the stage needs it and there is none.

    LoRA from an earlier stage goes on learning.

    Args:
        model: the talker; changed in place.
        name: the stage.
        lm_mode: how the base learns where the stage lets it: through LoRA, fully, or not at all.
        lora: settings of LoRA; None for those it has, or the defaults.

    Returns:
        What learns, to be printed.

    Raises:
        ConfigError: if stage, mode and model do not fit together.
        BackboneError: if no layer of the base fits the settings of LoRA.
    """
    groups = learning_groups(name, lm_mode=lm_mode)
    backbone = model.backbone
    if "language_model" in groups and backbone.is_quantized:
        raise ConfigError("the base is quantised, and such weights cannot learn; use lm_mode 'lora' (QLoRA)")
    if "language_model" in groups and backbone.stacks:
        raise ConfigError(
            "the base carries an adapter beside its weights; wrap it with merge_base_adapter=True before it "
            "learns fully, or use lm_mode 'lora'"
        )
    if "language_model" in groups and backbone.has_lora:
        raise ConfigError(
            "the base carries LoRA from an earlier stage; merge it before the base learns fully"
        )
    if "lora" in groups:
        _add_lora(model, lora)
    for group, parameters in model.groups().items():
        for parameter in parameters.values():
            if parameter.requires_grad != (group in groups):  # quantised weights may not even be asked
                parameter.requires_grad_(group in groups)
    return check_trainable(model, name, lm_mode=lm_mode)


def check_trainable(model: OmniModel, name: str, *, lm_mode: LmMode = "lora") -> TrainableTable:
    """Check that exactly the weights of a stage learn.

    Raises:
        ConfigError: if not; the text names the groups that are wrong, and how.
    """
    groups = learning_groups(name, lm_mode=lm_mode)
    table = count_trainable(model)
    wrong = [
        f"{row.group} ({row.trainable:,} of {row.parameters:,} parameters learn, "
        f"{'all' if row.group in groups else 'none'} should)"
        for row in table.rows
        if row.trainable != (row.parameters if row.group in groups else 0)
    ]
    wrong += [f"{group} (there is none)" for group in groups & {"lora"} if not model.groups()[group]]
    if wrong:
        raise ConfigError(f"stage {name!r}, base {lm_mode!r}: these groups are wrong: {'; '.join(wrong)}")
    return table


def count_trainable(model: OmniModel) -> TrainableTable:
    """Return how many parameters of each group there are, and how many learn."""
    return TrainableTable(
        tuple(
            GroupRow(
                group,
                sum(parameter.numel() for parameter in parameters.values()),
                sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad),
            )
            for group, parameters in model.groups().items()
        )
    )


def _add_lora(model: OmniModel, settings: LoraSettings | None) -> None:
    """Add LoRA, or check that what is there has these settings."""
    backbone = model.backbone
    config = backbone.lora_config
    if config is None:
        settings = settings or LoraSettings()
        targets: str | list[str] = settings.targets
        if targets != ALL_LINEAR:
            targets = [target.strip() for target in settings.targets.split(",")]
        backbone.add_lora(
            settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            targets=targets,
            use_dora=settings.dora,
        )
        return
    if settings is None:
        return
    pairs = (("rank", config.r, settings.rank), ("dora", config.use_dora, settings.dora))
    differing = [f"{key} is {own!r}, asked for {asked!r}" for key, own, asked in pairs if own != asked]
    if differing:
        raise ConfigError(
            f"the base carries LoRA from an earlier stage with other settings: {'; '.join(differing)}; "
            "go on with its own, or merge it first"
        )
