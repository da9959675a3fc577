"""Say what training on a source takes: steps, memory and hours of one stage.

A talker or a base by name, and a ``Report`` on a source, in; an ``Estimate`` out. Weights are counted and
rows laid out from configs and tokenizer alone. Time is never guessed: it is that of steps tried here, or left
open.
"""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from rich.text import Text

from omni_adapter import hub, train
from omni_adapter.audio.features import LogMel
from omni_adapter.config import dump, parse
from omni_adapter.data.check import CountSteps, Report
from omni_adapter.data.processor import OmniProcessor
from omni_adapter.data.rows import Row, to_sample
from omni_adapter.data.sources import SourceSpec
from omni_adapter.doctor import diagnose, facts_of_stage, processor_without_weights
from omni_adapter.errors import CheckpointError, DataError
from omni_adapter.training.settings import TrainSettings
from omni_adapter.training.stages import LmMode, get_stage, learning_groups

_TRIED_STEPS = 3  # the first one warms up


@dataclass(frozen=True)
class Planned:
    """What is to be trained, without its weights.

    Attributes:
        name: folder or Hub id of a talker or base.
        is_talker: which of the two.
        processor: lays rows out.
        groups: parameters of each weight group.
        dtype: type of the base's weights in training.
    """

    name: str
    is_talker: bool
    processor: OmniProcessor
    groups: dict[str, int]
    dtype: str = "float32"

    def counter(self, *, max_steps: int) -> CountSteps:
        """Return a function that counts the steps of a row."""

        def count_steps(row: Row) -> int:
            return to_sample(row, self.processor, max_steps=max_steps).layout.grid.shape[1]

        return count_steps


@dataclass(frozen=True)
class Estimate:
    """What one stage takes on one source. ``dataclasses.asdict`` gives plain JSON.

    Attributes:
        model: what is trained.
        stage: the stage.
        trains: weight groups that learn.
        parameters: how many weights those are.
        memory_bytes: weights, and gradients and AdamW's averages of those that learn, without activations.
        batch_size: samples of a step.
        samples: of one pass over the source, all tasks together.
        mean_length: steps of a sample in the model, on average.
        steps_of_a_pass: optimizer steps of one pass.
        steps_of_the_stage: optimizer steps that the stage's recipe takes.
        passes_of_the_stage: passes over the source that these are.
        seconds_per_step: measured; None if no step was tried.
        peak_bytes: most memory that the steps that were tried held; likewise.
        device: where they were tried; likewise.
        hours_of_a_pass: from the seconds of a step; likewise.
        hours_of_the_stage: likewise.
        basis: what the figures rest on.
    """

    model: str
    stage: str
    trains: tuple[str, ...]
    parameters: int
    memory_bytes: int
    batch_size: int
    samples: int
    mean_length: float
    steps_of_a_pass: int
    steps_of_the_stage: int
    passes_of_the_stage: float
    seconds_per_step: float | None
    peak_bytes: int | None
    device: str | None
    hours_of_a_pass: float | None
    hours_of_the_stage: float | None
    basis: list[str]


@dataclass(frozen=True)
class Tried:
    """What steps cost that were tried."""

    seconds: float
    peak_bytes: int
    device: str


def plan(model: str) -> Planned:
    """Look at a talker or a base without loading its weights.

    Raises:
        OmniError: if it is neither, or cannot be wrapped; the message says what is missing.
    """
    is_talker = (Path(model) / hub.CONFIG_FILE).is_file() or not (Path(model).is_dir() or _is_base(model))
    if not is_talker:
        return Planned(model, False, processor_without_weights(model), _groups(model))
    folder = hub.fetch_folder(model, options=hub.HubOptions(), without=hub.PARTS)
    config = hub.read_config(folder)
    trusted = Path(model).is_dir()
    places: dict[str, Any] = {
        part: str(hub.part_location(getattr(config, part), folder, trusted=trusted)) for part in hub.PARTS
    }
    base = places.pop("base")
    options = hub.HubOptions(revision=config.base.revision)
    plain = processor_without_weights(base, hub_options=options, **places)
    processor = OmniProcessor(plain.tokenizer, LogMel.from_pretrained(folder), config=config)
    shapes = {name: dump(getattr(config, name)) for name in ("tts", "audio_adapter", "delay")}
    groups = _groups(base, hub_options=options, fusion=config.fusion, **places, **shapes)
    return Planned(model, True, processor, groups)


def _is_base(name: str) -> bool:
    """Whether a repository of the Hub is a plain language model: it holds no talker."""
    try:
        hub.fetch_folder(name, options=hub.HubOptions(), without=hub.PARTS)
    except CheckpointError:
        return True
    return False


def _groups(base: str, **settings: Any) -> dict[str, int]:
    diagnosis = diagnose(base, **settings)
    if diagnosis.missing:
        raise DataError(f"{base} cannot be trained as it is: {'; '.join(diagnosis.missing)}")
    return diagnosis.groups


def estimate(
    planned: Planned,
    report: Report,
    *,
    stage: str,
    batch_size: int,
    limit: int | None = None,
    tried: Tried | None = None,
) -> Estimate:
    """Put together what a stage takes.

    Args:
        planned: what is trained.
        report: what the source holds, with steps counted by ``planned``.
        stage: the stage.
        batch_size: samples of a step.
        limit: rows that the source is cut to.
        tried: steps that were tried.

    Raises:
        ConfigError: if there is no such stage.
        DataError: if no row of the source serves the stage.
    """
    facts = get_stage(stage)
    lm_mode: LmMode = "lora" if facts.trains_lm else "frozen"
    trains = sorted(learning_groups(stage, lm_mode=lm_mode))
    weights = facts_of_stage(planned.groups, trains, planned.dtype)
    steps = {task: spread for task, spread in report.steps.items() if task in facts.tasks}
    if not steps:
        raise DataError(f"no row of {report.source} serves the stage {stage}: {', '.join(facts.tasks)}")
    rows = report.rows if report.rows is not None else report.looked_at
    scale = min(rows, limit or rows) / max(1, report.looked_at)
    served = {task: report.tasks[task]["rows"] * scale for task in steps}
    samples = round(sum(served.values()))
    length = sum(served[task] * steps[task]["mean"] for task in steps) / max(1.0, sum(served.values()))
    pass_steps = math.ceil(samples / batch_size)
    laid_out = sum(spread["count"] for spread in steps.values())
    hours = None if tried is None else tried.seconds / 3600
    basis = [
        f"weights: counted from the configs of {planned.name}, in {planned.dtype}; gradients and averages of "
        "AdamW in float32; activations come on top",
        f"lengths: {laid_out:.0f} rows laid out by its tokenizer",
        f"the stage's steps are the recipe's; one has 192 samples in the paper, {batch_size} here",
    ]
    if scale > 1:
        basis.append(f"samples: scaled up from {report.looked_at} rows that were looked at")
    basis.append(
        "hours: not known; pass --measure to try steps on this machine"
        if tried is None
        else f"hours: {_TRIED_STEPS - 1} steps of this data tried on {tried.device}, after one to warm up"
    )
    return Estimate(
        model=planned.name,
        stage=stage,
        trains=tuple(trains),
        parameters=weights.parameters,
        memory_bytes=weights.memory_bytes,
        batch_size=batch_size,
        samples=samples,
        mean_length=length,
        steps_of_a_pass=pass_steps,
        steps_of_the_stage=facts.num_steps,
        passes_of_the_stage=facts.num_steps * batch_size / max(1, samples),
        seconds_per_step=None if tried is None else tried.seconds,
        peak_bytes=None if tried is None else tried.peak_bytes,
        device=None if tried is None else tried.device,
        hours_of_a_pass=None if hours is None else hours * pass_steps,
        hours_of_the_stage=None if hours is None else hours * facts.num_steps,
        basis=basis,
    )


def try_steps(planned: Planned, spec: SourceSpec, *, stage: str, batch_size: int, max_steps: int) -> Tried:
    """Load the model and take a few steps of the stage on the source; nothing is kept.

    Raises:
        OmniError: as the recipe of the stage.
    """
    source = {name: value for name, value in dump(spec).items() if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "stage": stage,
            "out": folder,
            "model": {"start" if planned.is_talker else "base": planned.name},
            "data": {"sources": [source], "batch_size": batch_size, "max_length": max_steps},
            "watch": {"progress": False},
        }
        accelerator = Accelerator()
        run = train.prepare(parse(TrainSettings, values, source="estimate"), accelerator)
        run.trainer.engine.model.train()
        seconds = [run.trainer.take_step().seconds for _ in range(_TRIED_STEPS)][1:]
        return Tried(
            sum(seconds) / len(seconds), train.peak_bytes(accelerator.device), str(accelerator.device)
        )


def show(found: Estimate, console: Console) -> None:
    """Print an estimate for people."""
    title = f"Training stage {found.stage} of {found.model}"
    table = Table(box=None, show_header=False, title=title, title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    peak, hours, all_hours = found.peak_bytes, found.hours_of_a_pass, found.hours_of_the_stage
    rows = {
        "learns": f"{', '.join(found.trains)}: {found.parameters / 1e6:,.1f} M weights",
        "memory": f"{found.memory_bytes / 2**30:,.2f} GiB without activations"
        + ("" if peak is None else f"; {peak / 2**30:,.2f} GiB at most in the steps tried on {found.device}"),
        "samples": f"{found.samples:,} of {found.mean_length:.0f} steps on average",
        "one pass": f"{found.steps_of_a_pass:,} steps of {found.batch_size} samples"
        + ("" if hours is None else f", {hours:,.2f} h"),
        "the stage": f"{found.steps_of_the_stage:,} steps, {found.passes_of_the_stage:,.1f} passes"
        + ("" if all_hours is None else f", {all_hours:,.1f} h"),
    }
    if found.seconds_per_step is not None:
        rows["a step"] = f"{found.seconds_per_step:.2f} s, measured"
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))
    console.print(table)
    for line in found.basis:
        console.print(Text(f"· {line}", style="dim"), soft_wrap=True)
