"""All settings of a training run: one YAML file per stage, any key of it given again on the command line.

YAML and words of the command line in, frozen dataclasses that checked themselves out. Knows nothing of
models, data or torch.
"""

import difflib
import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from omni_adapter.config import NotNegative, Positive, dump, parse
from omni_adapter.errors import ConfigError, MissingDependencyError

Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]
Precision = Literal["auto", "fp32", "bf16", "fp16"]

_STRICT = ConfigDict(extra="forbid", strict=False)
_PACKAGES = (
    "omni-adapter", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "snac",
    "deepspeed",
)  # fmt: skip


@dataclass(frozen=True, config=_STRICT)
class LoraSettings:
    """LoRA on the base, where the stage asks for it.

    Args:
        rank: rank of the updates.
        alpha: scale of the updates; None for twice the rank.
        dropout: share of inputs that are dropped.
        targets: ``all-linear``, or names of linear layers, separated by commas.
        dora: learn magnitudes apart from directions (DoRA).
    """

    rank: Positive = 16
    alpha: float | None = None
    dropout: Share = 0.0
    targets: str = "all-linear"
    dora: bool = False


@dataclass(frozen=True, config=_STRICT)
class ModelSettings:
    """What is trained.

    Args:
        base: Hub id or folder of a causal LM that is wrapped anew.
        start: folder or Hub id of a talker to go on from, such as the result of the stage before.
        encoder: Hub id or folder of the audio encoder; None for the usual one, or the talker's.
        codec: Hub id or folder of the codec; None for the usual one, or the talker's.
        wrap: further arguments of ``OmniAdapter.wrap``, such as ``tts_layers`` and ``fusion``.
        dtype: type of the base's weights.
        lm: how the base learns where the stage lets it: ``lora`` or ``full``; None for the stage's default.
        lora: settings of LoRA.
        quantize: load the base in 4 bits (QLoRA); needs bitsandbytes.
        gradient_checkpointing: compute states again in the backward pass instead of keeping them.
    """

    base: str | None = None
    start: str | None = None
    encoder: str | None = None
    codec: str | None = None
    wrap: dict[str, Any] = field(default_factory=dict)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    lm: Literal["lora", "full"] | None = None
    lora: LoraSettings = LoraSettings()
    quantize: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.base is not None and self.start is not None:
            raise ValueError("base wraps a new talker and start goes on with one: give one of them")


@dataclass(frozen=True, config=_STRICT)
class DataSettings:
    """What is learned from, and how it is put into batches.

    Args:
        sources: data sets to mix; each the name of a published data set, a path or a Hub id, a YAML file with
            further ``sources`` and perhaps their ``tasks``, or a mapping with ``path`` and the further keys
            of ``omni_adapter.data.sources.SourceSpec``.
        tasks: weight of each task of sources that name none; empty for the stage's own, as often each.
        batch_size: rows of one micro-batch of one process.
        max_length: steps of the longest sample; longer ones are rejected and counted.
        mode: ``bucket`` batches samples of similar length; ``pack`` puts several samples into one row of up
            to ``max_length`` steps; ``pad`` takes them as they come.
        window: samples among which ``bucket`` and ``pack`` choose; None for 32 batches.
        workers: processes that read and lay out samples beside each training process.
        max_rejected: share of rejected rows that stops the run.
    """

    sources: tuple[str | dict[str, Any], ...] = ()
    tasks: dict[str, Rate] = field(default_factory=dict)
    batch_size: Positive = 8
    max_length: Positive = 1024
    mode: Literal["bucket", "pack", "pad"] = "bucket"
    window: Positive | None = None
    workers: NotNegative = 0
    max_rejected: Share = 0.05


@dataclass(frozen=True, config=_STRICT)
class OptimSettings:
    """How weights move.

    Args:
        num_steps: optimizer steps of the whole run.
        learning_rate: highest rate, after the warm-up.
        group_rates: rates of single weight groups instead, such as ``{"lora": 2e-4}``.
        warmup_steps: steps over which the rate rises from zero.
        final_share: share of the highest rate at which the cosine ends.
        weight_decay: of weights with two or more dimensions.
        betas: decay of AdamW's averages.
        eps: epsilon of AdamW.
        max_grad_norm: gradients are scaled down to this norm; 0 for never.
        accumulate: micro-batches of each process that make one step.
        ema_decay: decay of an average of the weights that is saved beside them; None for none.
    """

    num_steps: Positive = 1000
    learning_rate: Rate = 1e-4
    group_rates: dict[str, Rate] = field(default_factory=dict)
    warmup_steps: NotNegative = 0
    final_share: Share = 0.1
    weight_decay: Rate = 0.01
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Rate = 1.0
    accumulate: Positive = 1
    ema_decay: Share | None = None


@dataclass(frozen=True, config=_STRICT)
class CheckpointSettings:
    """When the state of the run is saved, and from where it goes on.

    Args:
        every_steps: steps between checkpoints.
        keep: checkpoints kept, at least two.
        resume: ``auto`` goes on from the newest whole checkpoint of the run folder if there is one;
            ``never`` wants an empty run folder; ``must`` wants a checkpoint.
    """

    every_steps: Positive = 500
    keep: Annotated[int, Field(ge=2)] = 2
    resume: Literal["auto", "never", "must"] = "auto"


@dataclass(frozen=True, config=_STRICT)
class LimitSettings:
    """What a run puts up with before it stops.

    Args:
        bad_steps: steps in a row with a loss or gradient that is not finite.
        memory_skips: steps of the whole run that were skipped because a batch did not fit into memory.
    """

    bad_steps: Positive = 8
    memory_skips: NotNegative = 20


@dataclass(frozen=True, config=_STRICT)
class PromptSettings:
    """A question that the talker answers while it is trained: to hear how far it is.

    Args:
        text: the question in words.
        audio: the question as a recording.
        task: ``asr``, ``tts`` or None for a spoken answer.
    """

    text: str | None = None
    audio: str | None = None
    task: Literal["asr", "tts"] | None = None


@dataclass(frozen=True, config=_STRICT)
class WatchSettings:
    """What is shown and written down on the way.

    Args:
        log_every: steps between entries of the log.
        progress: show a progress bar.
        trackers: any of tensorboard, wandb, trackio.
        project: name under which the trackers file the run.
        answer_every: steps between answers to ``prompts``; 0 for never.
        prompts: questions to answer.
        max_new_tokens: steps of an answer at most.
    """

    log_every: Positive = 10
    progress: bool = True
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    project: str = "omni-adapter"
    answer_every: NotNegative = 0
    prompts: tuple[PromptSettings, ...] = ()
    max_new_tokens: Positive = 128


@dataclass(frozen=True, config=_STRICT)
class TrainSettings:
    """Everything about a run.

    Args:
        stage: row of the table of stages: align, adapt, finetune, anneal.
        out: run folder.
        seed: of new weights, order of data and dropout.
        precision: type of the arithmetic; weights keep theirs. ``auto`` is bf16 where the machine multiplies
            it natively, else fp32.
        threads: threads of each process on the CPU; None leaves it to torch. Other threads, other bits.
        model: what is trained.
        data: what is learned from.
        loss: keys of the loss settings.
        optim: how weights move.
        checkpoint: when state is saved.
        limits: what stops the run.
        watch: what is shown.
    """

    stage: str = "align"
    out: str = "runs/align"
    seed: NotNegative = 0
    precision: Precision = "fp32"
    threads: Positive | None = None
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    loss: dict[str, Any] = field(default_factory=dict)
    optim: OptimSettings = OptimSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    limits: LimitSettings = LimitSettings()
    watch: WatchSettings = WatchSettings()


SHORTCUTS: Mapping[str, str] = {
    "base": "model.base",
    "start": "model.start",
    "encoder": "model.encoder",
    "codec": "model.codec",
    "data": "data.sources",
    "steps": "optim.num_steps",
    "resume": "checkpoint.resume",
}
"""Short names on the command line."""

MAY_CHANGE = ("out", "threads", "checkpoint", "limits", "watch")
"""Settings that may differ between a run and its continuation; others would make it another run."""


def load_settings(path: Path | None, words: Sequence[str] = (), *, stage: str | None = None) -> TrainSettings:
    """Read a YAML file, and let words of the command line replace single keys.

    Args:
        path: the YAML file; None for the defaults.
        words: ``optim.learning_rate=1e-4``, ``--optim.learning_rate 1e-4``, or short names such as
            ``--base ID``. Of a key that comes twice the last value counts; ``--data`` collects.
        stage: the stage where neither file nor words name one; the run folder is called after it.

    Raises:
        ConfigError: if a key is unknown (the nearest is named) or a value is wrong.
    """
    values = _read_yaml(path) if path is not None else {}
    source = str(path) if path is not None else "command line"
    _check_keys(TrainSettings, values, (), source=source)
    collected: list[Any] = []
    for key, value in split_words(words):
        if key == SHORTCUTS["data"]:
            collected.extend(value if isinstance(value, list) else [value])
        else:
            _put(values, key.split("."), value)
    if collected:
        _put(values, SHORTCUTS["data"].split("."), collected)
    values.setdefault("stage", stage or TrainSettings.stage)
    values.setdefault("out", f"runs/{values['stage']}")
    _check_keys(TrainSettings, values, (), source=source)
    return parse(TrainSettings, values, source=source)


@dataclass(frozen=True, config=_STRICT)
class MixtureFile:
    """What a YAML file in ``data.sources`` holds.

    Args:
        sources: as in ``DataSettings``; paths are relative to where the command runs.
        tasks: weight of each task of its sources that name none; empty for the run's.
    """

    sources: tuple[str | dict[str, Any], ...]
    tasks: dict[str, Rate] = field(default_factory=dict)


def read_mixture(path: Path) -> MixtureFile:
    """Read a YAML file of sources.

    Raises:
        ConfigError: if it cannot be read, or holds something else.
    """
    mixture = parse(MixtureFile, _read_yaml(path), source=str(path))
    if not mixture.sources:
        raise ConfigError(f"{path}: sources is empty")
    return mixture


def split_words(words: Sequence[str]) -> list[tuple[str, Any]]:
    """Return the full key and the value of every setting on a command line.

    Raises:
        ConfigError: if a word is no setting, or a key has no value.
    """
    found, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--"):
                raise ConfigError(f"{word!r} is no setting; write key=value or --key value")
            if not rest:
                raise ConfigError(f"{word} has no value; write {word}=value")
            text = rest.pop(0)
        found.append((SHORTCUTS.get(key, key), _value(text)))
    return found


def describe_run(settings: TrainSettings, *, world_size: int, threads: int) -> dict[str, Any]:
    """Return what is needed to do a run again: settings, command, versions, processes and threads."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "settings": dump(settings),
        "command": shlex.join([sys.executable, *sys.argv]),
        "python": platform.python_version(),
        "versions": versions,
        "world_size": world_size,
        "threads": threads,
    }


def to_yaml(settings: TrainSettings) -> str:
    """Return the settings as YAML; ``load_settings`` reads it."""
    return str(_yaml().safe_dump(dump(settings), sort_keys=False, allow_unicode=True))


def find_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return in words which settings of a run differ that may not, empty if it can go on."""
    changes = []
    for key in sorted({*_flat(old), *_flat(new)}):
        if key.split(".")[0] in MAY_CHANGE:
            continue
        before, after = _flat(old).get(key), _flat(new).get(key)
        if before != after:
            changes.append(f"{key} was {before!r}, is {after!r}")
    return changes


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined with dots."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found.update(_flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError("pyyaml", extra="train", purpose="reading settings") from error
    return yaml


def _read_yaml(path: Path) -> dict[str, Any]:
    yaml = _yaml()
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(values).__name__}")
    return values


def _value(text: str) -> Any:
    """A word of the command line as YAML reads it."""
    yaml = _yaml()
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a nested key."""
    for step in path[:-1]:
        inner = values.setdefault(step, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{'.'.join(path)}: {step!r} is {inner!r}, which has no keys")
        values = inner
    values[path[-1]] = value


def _check_keys(kind: Any, values: Any, path: tuple[str, ...], *, source: str) -> None:
    """Refuse unknown keys by name, wherever they are; the nearest known one is found by its last word."""
    if not is_dataclass(kind) or not isinstance(values, Mapping):
        return
    known = {item.name: item.type for item in fields(kind)}
    for key, value in values.items():
        if key not in known:
            dotted = ".".join((*path, str(key)))
            nearest = _nearest(dotted, [".".join((*path, name)) for name in known])
            raise ConfigError(f"{source}: unknown key {dotted!r}; {nearest}")
        _check_keys(known[key], value, (*path, key), source=source)


def _nearest(key: str, siblings: Sequence[str]) -> str:
    """Advice that names the known key nearest to an unknown one: beside it, or anywhere."""
    everywhere = list(_flat(dump(TrainSettings())))
    nearest = difflib.get_close_matches(key, siblings, n=1) or difflib.get_close_matches(key, everywhere, n=1)
    last = key.rpartition(".")[2]
    same = nearest or [name for name in everywhere if name.rpartition(".")[2] == last]
    return f"did you mean {same[0]!r}?" if same else f"known keys are {', '.join(sorted(siblings))}"
