"""What a person sees of a run while it goes on: a line on the screen, and the trackers.

Entries of the log in, text and tracker calls out. Knows nothing of models or data.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

from accelerate import Accelerator
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from omni_adapter.errors import MissingDependencyError
from omni_adapter.training.metrics import estimate_seconds_left

logger = logging.getLogger(__name__)


class Watcher(Protocol):
    """Sees what happens; called on every rank."""

    def on_start(self, step: int, total: int) -> None:
        """The run starts after ``step`` of ``total`` steps."""

    def on_record(self, record: Mapping[str, Any]) -> None:
        """An entry of the log was made."""

    def on_step(self, step: int) -> None:
        """A step was taken."""

    def on_end(self) -> None:
        """The run is over, finished or not."""


class Silent:
    """A watcher that does nothing."""

    def on_start(self, step: int, total: int) -> None:
        """Do nothing."""

    def on_record(self, record: Mapping[str, Any]) -> None:
        """Do nothing."""

    def on_step(self, step: int) -> None:
        """Do nothing."""

    def on_end(self) -> None:
        """Do nothing."""


class Screen(Silent):
    """A progress bar and the newest figures below it; a line for each entry where there is no terminal.

    Args:
        stage: what to call the run.
        is_shown: whether this process draws; only one should.
        console: where to.
    """

    def __init__(self, stage: str, *, is_shown: bool, console: Console | None = None) -> None:
        self._bar = _Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self._task = self._bar.add_task(stage, left="")
        self._is_shown = is_shown
        self._total = 0
        # Elsewhere a bar would be one squeezed line at the end of a file.
        self._bar.disable = not (is_shown and self._bar.console.is_terminal)

    def on_start(self, step: int, total: int) -> None:
        """Draw the bar."""
        self._total = total
        self._bar.update(self._task, completed=step, total=total)
        self._bar.start()
        if step and self._is_shown:
            self._bar.console.print(f"goes on after step {step}", highlight=False)

    def on_record(self, record: Mapping[str, Any]) -> None:
        """Show the newest figures."""
        figures, left = describe_record(record), describe_rest(record, total=self._total)
        self._bar.figures = figures
        self._bar.update(self._task, completed=record["step"], left=left)
        if self._is_shown and self._bar.disable:
            line = f"step {record['step']}/{self._total}  {figures}  {left}"
            self._bar.console.print(line, highlight=False, soft_wrap=True)

    def on_step(self, step: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step)

    def on_end(self) -> None:
        """Leave the bar as it is."""
        self._bar.stop()


class _Bar(Progress):
    """A bar with a text below it, which wraps where the terminal is narrow."""

    figures = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yield the bar, then the text."""
        yield self.make_tasks_table(self.tasks)
        yield Text(self.figures)


class Trackers(Silent):
    """Hands the log to tensorboard, wandb or trackio, through Accelerate.

    Args:
        accelerator: made with ``log_with`` and a ``project_dir``.
        project: name under which the run is filed.
        config: settings of the run, as plain values.

    Raises:
        MissingDependencyError: if a tracker is not installed.
    """

    def __init__(self, accelerator: Accelerator, *, project: str, config: Mapping[str, Any]) -> None:
        self._accelerator = accelerator
        try:
            accelerator.init_trackers(project, config=_scalars(config))
        except ImportError as error:
            raise MissingDependencyError("a tracker", extra="train", purpose="watch.trackers") from error

    def on_record(self, record: Mapping[str, Any]) -> None:
        """Log one entry."""
        values = {name: value for name, value in record.items() if name != "step"}
        self._accelerator.log(values, step=int(record["step"]))

    def on_answer(self, name: str, text: str, audio: Any, sampling_rate: int, step: int) -> None:
        """Log an answer of the talker in text and sound, where the tracker takes them."""
        for tracker in self._accelerator.trackers:
            if not self._accelerator.is_main_process:
                continue
            if tracker.name == "tensorboard":
                tracker.writer.add_text(name, text, step)
                if len(audio):
                    tracker.writer.add_audio(name, audio[None], step, sample_rate=sampling_rate)
            elif tracker.name in ("wandb", "trackio"):
                self._log_media(tracker, name, text, audio, sampling_rate, step)

    def on_end(self) -> None:
        """Close the trackers."""
        self._accelerator.end_training()

    def _log_media(
        self, tracker: Any, name: str, text: str, audio: Any, sampling_rate: int, step: int
    ) -> None:
        """The same for trackers that are modules with a class for sound."""
        import importlib

        module = importlib.import_module(tracker.name)
        values: dict[str, Any] = {f"{name}/text": text}
        if len(audio):
            values[f"{name}/audio"] = module.Audio(audio, sample_rate=sampling_rate)
        tracker.log(values, step=step)


class Watchers(Silent):
    """Several watchers as one.

    Args:
        watchers: told in this order.
    """

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = watchers

    def on_start(self, step: int, total: int) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.on_start(step, total)

    def on_record(self, record: Mapping[str, Any]) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.on_record(record)

    def on_step(self, step: int) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.on_step(step)

    def on_end(self) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.on_end()


def describe_record(record: Mapping[str, Any]) -> str:
    """Return the figures of an entry of the log in one line."""
    parts = [f"loss {record['loss']:.4f}"]
    shares = {name: value for name, value in record.items() if name.endswith("/accuracy")}
    text = shares.pop("text/accuracy", None)
    codes = " ".join(f"{100 * share:.0f}" for share in shares.values())
    right = [f"codes {codes}%"] * bool(codes) + ([] if text is None else [f"text {100 * text:.0f}%"])
    if right:
        parts.append(f"right: {', '.join(right)}")
    parts.append(f"{record['positions_per_s']:,.0f} tokens/s")
    parts.append(f"{record['audio_hours_per_h']:.1f} h of audio/h")
    parts.append(f"padding {record['padding_share']:.0%}")
    if record["memory_skips"] or record["bad_steps"]:
        skips = f"{record['memory_skips']} did not fit, {record['bad_steps']} not finite"
        parts.append(f"steps skipped: {skips}")
    return "  ".join(parts)


def describe_rest(record: Mapping[str, Any], *, total: int) -> str:
    """Return how long the rest of ``total`` steps takes at the pace so far."""
    left = estimate_seconds_left(done=record["step"], total=total, seconds=record["seconds"])
    return "" if left is None else f"{timedelta(seconds=round(left))} left"


def _scalars(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as flat text and numbers, which is all that trackers take."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found.update(_scalars(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value if isinstance(value, int | float | bool) else str(value)
    return found
