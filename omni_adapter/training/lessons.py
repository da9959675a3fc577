"""What a run learns from: sources of the settings in, one mixture of tasks that the stage can use out.

Knows nothing of models or processors.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omni_adapter.config import parse
from omni_adapter.data.dataset import Mixture
from omni_adapter.data.layout import TASKS
from omni_adapter.data.rows import TAUGHT_TASKS, check_columns
from omni_adapter.data.sources import SourceSpec, open_source, usual_tasks
from omni_adapter.errors import ConfigError, DataError
from omni_adapter.training.loss import LossSettings
from omni_adapter.training.settings import TrainSettings, read_mixture
from omni_adapter.training.stages import get_stage

logger = logging.getLogger(__name__)

_MIXTURE_ENDS = (".yaml", ".yml")


def open_mixture(settings: TrainSettings) -> Mixture:
    """Open all sources; those that name no task serve every task of the stage for which they have columns.

    Raises:
        DataError: if a source cannot be read, or serves no task.
    """
    stage = get_stage(settings.stage)
    tasks = settings.data.tasks or dict.fromkeys(stage.tasks, 1.0)
    specs: list[SourceSpec] = []
    for spec, own in _listed(settings.data.sources, place="data.sources"):
        specs.extend([spec] if spec.task is not None else _specs_by_task(spec, own or tasks))
    return Mixture(specs, seed=settings.seed)


def check_lessons(loss: LossSettings, mixture: Mixture) -> None:
    """Refuse a mixture with tasks that the base cannot teach, if it is to teach.

    Raises:
        ConfigError: naming them.
    """
    learned = {spec.task for spec in mixture.specs if spec.task and TASKS[spec.task].text_loss}
    untaught = sorted(learned - TAUGHT_TASKS) if loss.distil else []
    if untaught:
        raise ConfigError(
            f"loss.distil: the base can teach {', '.join(sorted(TAUGHT_TASKS))}, not {', '.join(untaught)}; "
            "name the tasks in data.tasks, such as data.tasks='{speech_to_text: 1, tts: 1}'"
        )


def _listed(
    sources: Sequence[str | dict[str, Any]], *, place: str
) -> Iterator[tuple[SourceSpec, Mapping[str, float]]]:
    """Every source, those of YAML files among them, and the tasks that its file names."""
    for number, source in enumerate(sources):
        values = {"path": source} if isinstance(source, str) else source
        spec = parse(SourceSpec, values, source=f"{place}[{number}]")
        if Path(spec.path).suffix not in _MIXTURE_ENDS:
            yield spec, {}
            continue
        mixture = read_mixture(Path(spec.path))
        for inner, own in _listed(mixture.sources, place=f"{spec.path}: sources"):
            yield replace(inner, weight=inner.weight * spec.weight), own or mixture.tasks


def _specs_by_task(spec: SourceSpec, tasks: Mapping[str, float]) -> list[SourceSpec]:
    """One source for each task that a source without a task can serve."""
    found = open_source(spec).columns
    columns = [spec.columns.get(column, column) for column in found]
    if "task" in columns:
        return [spec]
    specs, reasons = [], []
    usual = usual_tasks(spec)
    for task, weight in tasks.items():
        if usual is not None and task not in usual:
            reasons.append(f"{spec.path} teaches {', '.join(usual)}, not {task}")
            continue
        try:
            check_columns(columns, task=task, source=spec.path)
        except DataError as error:
            reasons.append(str(error))
            continue
        specs.append(replace(spec, task=task, weight=spec.weight * weight))
    if not specs:
        raise DataError(f"{spec.path} serves no task of this stage: {'; '.join(reasons)}")
    for reason in reasons:
        logger.info("left out: %s", reason)
    return specs
