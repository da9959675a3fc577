"""The one training loop: batches in, steps of the optimizer and checkpoints out.

A step takes the micro-batches of all processes as if they were one batch: each loss is divided by the number
of labels in all of them before it is differentiated. A step is whole or it is not there: one that is not
finite, does not fit into memory or is cut short by a signal leaves weights, averages and schedule untouched.
Checkpoints are taken between steps only; a signal in the middle of one saves the state before it, and the
continuation computes it again, bit for bit. Knows nothing of talkers, files of data or command lines.
"""

import gc
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from omni_adapter.config import dump
from omni_adapter.data.collator import Batch
from omni_adapter.errors import CheckpointError, TrainingError
from omni_adapter.training.checkpoint import (
    find_checkpoint,
    random_state,
    read_json,
    read_tensors,
    save_checkpoint,
    set_random_state,
    write_json,
    write_tensors,
)
from omni_adapter.training.engine import AllRanks, Engine, is_out_of_memory
from omni_adapter.training.loss import Losses, TrainingModel
from omni_adapter.training.settings import OptimSettings, TrainSettings, describe_run, find_changes

logger = logging.getLogger(__name__)

EXIT_FINISHED = 0
EXIT_STOPPED = 75
"""Exit code of a run that a signal stopped after it saved its state; the same command goes on with it."""

CHECKPOINT_FOLDER = "checkpoints"
LOG_FILE = "log.jsonl"
SKIPPED_FILE = "skipped.jsonl"
STATUS_FILE = "status.json"


class Feed(Protocol):
    """Batches of one rank, endless, and where they stand."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from where the feed stands; must not draw from the global random generators."""

    def state_dict(self) -> dict[str, Any]:
        """Return, as plain values, where the feed stands after the last batch it yielded."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""


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


class Objective(Protocol):
    """What is minimised, and what is to be seen of it."""

    @property
    def sum_names(self) -> tuple[str, ...]:
        """Names of the sums that ``measure`` returns; the first is the loss."""

    def count(self, batch: Batch) -> Tensor:
        """Return the labels of each row in a batch, [R]."""

    def measure(self, model: nn.Module, batch: Batch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the share of a batch in the loss of a step with ``counts`` labels, and sums [n]."""

    def describe(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return means, shares and the like of sums over ``sums["steps"]`` steps."""


class RowLosses:
    """The objective of a talker: its code rows and its text.

    Args:
        model: the talker with its loss.
        seconds_per_code: duration of a frame of codes.
        seconds_per_step: duration of what is heard in one step of the LM.
    """

    def __init__(self, model: TrainingModel, *, seconds_per_code: float, seconds_per_step: float) -> None:
        self._count = model.counts
        self._seconds_per_code = seconds_per_code
        self._seconds_per_step = seconds_per_step
        rows = model.model.config.codec_spec.num_codebooks
        self.row_names = (*(f"row_{row}" for row in range(rows)), "text")

    @property
    def sum_names(self) -> tuple[str, ...]:
        """Names of the sums that ``measure`` returns; the first is the loss."""
        kinds = ("nll", "correct", "labels")
        return ("loss", *(f"{row}/{kind}" for kind in kinds for row in self.row_names), "audio_seconds")

    def count(self, batch: Batch) -> Tensor:
        """Return the labels of each row in a batch, [K + 1]."""
        return self._count(batch)

    def measure(self, model: nn.Module, batch: Batch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the share of a batch in the loss of a step with ``counts`` labels, and sums [n]."""
        losses: Losses = model(batch)
        loss = losses.total(counts)
        heard = self._seconds_per_step * sum(place.length for place in batch.places)
        seconds = heard + self._seconds_per_code * losses.counts[0]
        sums = (loss.detach()[None], losses.nll, losses.correct, losses.counts, seconds[None])
        return loss, torch.cat([part.float() for part in sums])

    def describe(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the loss, and the loss and accuracy of each row that had labels."""
        values = {"loss": sums["loss"] / sums["steps"]}
        for row in self.row_names:
            labels = sums[f"{row}/labels"]
            if labels:
                values[f"{row}/loss"] = sums[f"{row}/nll"] / labels
                values[f"{row}/accuracy"] = sums[f"{row}/correct"] / labels
        return values


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


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: steps taken.
        memory_skips: steps skipped because a batch did not fit into memory.
        bad_steps: steps skipped because a loss or gradient was not finite.
        bad_in_a_row: those since the last step taken.
        positions: steps of sequences seen, padding excluded.
        seconds: of training, without pauses between continuations.
        sums: sums since the last entry of the log, by name.
    """

    step: int = 0
    memory_skips: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    positions: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)


class Result(NamedTuple):
    """How a run ended.

    Attributes:
        exit_code: ``EXIT_FINISHED`` or ``EXIT_STOPPED``.
        step: steps taken.
    """

    exit_code: int
    step: int


class _Window(NamedTuple):
    """What came of the micro-batches of one step, over all ranks."""

    sums: dict[str, float]
    did_not_fit: bool
    was_cut_short: bool
    stop_asked: bool
    seconds: float


class Trainer:
    """Takes steps until the run is done or stopped.

    Args:
        engine: runs passes and takes steps.
        objective: what is minimised.
        feed: batches of this rank.
        settings: of the run.
        accelerator: device and mixed precision.
        facts: what must be the same when the run goes on, such as the fingerprint of its data.
        ranks: the processes.
        watcher: shows what happens.
    """

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        feed: Feed,
        *,
        settings: TrainSettings,
        accelerator: Accelerator,
        facts: Mapping[str, Any] | None = None,
        ranks: AllRanks | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        self.engine = engine
        self.objective = objective
        self.feed = feed
        self.settings = settings
        self.accelerator = accelerator
        self.facts = dict(facts or {})
        self.ranks = ranks or AllRanks()
        self.watcher = watcher or Silent()
        self.progress = Progress()
        self.folder = Path(settings.out)
        self.average = self._start_average()
        self._batches: Iterator[Batch] | None = None
        self._stop_asked = False

    def run(self) -> Result:
        """Train to the end, or until a signal asks to stop.

        Raises:
            TrainingError: if too many steps are not sound, or too many batches do not fit into memory.
            CheckpointError: if a checkpoint cannot be written, or the one at hand belongs to another run.
        """
        self.resume()
        total, every = self.settings.optim.num_steps, self.settings.checkpoint.every_steps
        self._note("running")
        self.watcher.on_start(self.progress.step, total)
        try:
            with self._signals():
                saved = self.progress.step
                while self.progress.step < total:
                    before = self._snapshot()
                    window = self.take_step()
                    if window.stop_asked:
                        self.save(before if window.was_cut_short else None)
                        self._note("stopped")
                        return Result(EXIT_STOPPED, self.progress.step)
                    if self.progress.step % every == 0 and self.progress.step > saved:
                        self.save()
                        saved = self.progress.step
                if saved < total:
                    self.save()
            self._note("finished")
            return Result(EXIT_FINISHED, self.progress.step)
        except BaseException:
            self._note("failed")
            raise
        finally:
            self.watcher.on_end()

    def take_step(self) -> _Window:
        """Take one step, or skip it for a stated reason.

        Raises:
            TrainingError: if too many steps were skipped.
        """
        batches = self._next_batches()
        window = self._run_batches(batches)
        self.progress.seconds += window.seconds
        if window.was_cut_short:
            self.engine.drop()
        elif window.did_not_fit:
            self._skip_for_memory(batches)
        else:
            self._finish_step(window, batches)
        return window

    def save(self, snapshot: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint of now, or of the moment between steps at which ``snapshot`` was taken."""
        state = snapshot or self._snapshot()
        rank = self.ranks.rank

        def write(folder: Path) -> None:
            self.engine.save(folder)
            write_json(folder / f"rank-{rank:05d}.json", {"random": state["random"], "feed": state["feed"]})
            write_tensors(folder / f"rank-{rank:05d}.safetensors", state["generators"])
            if rank == 0:
                write_json(folder / "state.json", {"progress": state["progress"], **self._about()})
                if self.average is not None:
                    write_tensors(folder / "average.safetensors", self.average)

        save_checkpoint(
            self.folder / CHECKPOINT_FOLDER,
            step=int(state["progress"]["step"]),
            write=write,
            ranks=self.ranks,
            keep=self.settings.checkpoint.keep,
            num_bytes=self._bytes_of_state(),
        )

    def resume(self) -> None:
        """Go on from the newest whole checkpoint of the run folder, as the settings say.

        Raises:
            CheckpointError: if there is none although there must be, there is one although there may not be,
                or it belongs to a run with other settings, data or number of processes.
        """
        root, wish = self.folder / CHECKPOINT_FOLDER, self.settings.checkpoint.resume
        found: Path | None = self.ranks.gather(find_checkpoint(root) if self.ranks.rank == 0 else None)[0]
        if found is None and wish == "must":
            raise CheckpointError(f"{root} holds no whole checkpoint to go on from")
        if found is not None and wish == "never":
            raise CheckpointError(
                f"{found} is there already; go on with checkpoint.resume=auto, or choose another out"
            )
        if found is None:
            self._write_log(())
            return
        state = read_json(found / "state.json")
        self._check_same_run(state, found)
        self.engine.load(found)
        if self.average is not None:
            self.average = read_tensors(found / "average.safetensors")
            self.average = {name: value.to(self.accelerator.device) for name, value in self.average.items()}
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        own = read_json(found / f"rank-{self.ranks.rank:05d}.json")
        generators = read_tensors(found / f"rank-{self.ranks.rank:05d}.safetensors")
        self.feed.load_state_dict(own["feed"])
        set_random_state(own["random"], generators, self.accelerator.device)
        self._write_log(entry for entry in read_log(self.folder) if entry["step"] <= self.progress.step)
        logger.info("the run goes on from %s", found)

    def _next_batches(self) -> list[Batch]:
        """The micro-batches of the next step."""
        if self._batches is None:
            self._batches = iter(self.feed)
        return [next(self._batches) for _ in range(self.settings.optim.accumulate)]

    def _run_batches(self, batches: Sequence[Batch]) -> _Window:
        """Gradients of this rank's micro-batches; what the ranks must agree on is added up."""
        device, names = self.accelerator.device, self.objective.sum_names
        started = _now(device)
        counts = sum((self.objective.count(batch) for batch in batches), start=torch.zeros(()))
        counts = self.ranks.add(counts.to(device))
        sums = torch.zeros(len(names), device=device)
        did_not_fit = was_cut_short = False
        try:
            for number, batch in enumerate(batches):
                if self._stop_asked and not self.engine.meets_in_layers:
                    was_cut_short = True
                    break
                with self.accelerator.autocast():
                    loss, further = self.objective.measure(self.engine.model, batch.to(device), counts)
                self.engine.backward(loss, is_last=number + 1 == len(batches))
                sums += further.detach()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or self.engine.meets_in_layers:
                raise
            logger.warning("a batch did not fit into memory: %s", str(error).splitlines()[0])
            did_not_fit = True
        positions = sum(int(batch.attention_mask.sum()) for batch in batches)
        flags = torch.tensor([did_not_fit, was_cut_short, self._stop_asked, positions], device=device)
        told = self.ranks.add(torch.cat((sums, flags.to(sums.dtype)))).tolist()
        values = dict(zip(names, told, strict=False)) | {"positions": told[-1], "steps": 1.0}
        seconds = _now(device) - started
        return _Window({**values, "seconds": seconds}, told[-4] > 0, told[-3] > 0, told[-2] > 0, seconds)

    def _finish_step(self, window: _Window, batches: Sequence[Batch]) -> None:
        """Let the optimizer step if the step is sound."""
        share = rate_share(self.progress.step, self.settings.optim)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
        is_sound = math.isfinite(window.sums[self.objective.sum_names[0]])
        if not self.engine.step(is_sound=is_sound):
            self._skip_as_bad(batches)
            return
        progress = self.progress
        progress.step += 1
        progress.bad_in_a_row = 0
        progress.positions += int(window.sums["positions"])
        for name, value in {**window.sums, "grad_norm": self.engine.norm}.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + value
        self._update_average()
        if progress.step % self.settings.watch.log_every == 0 or progress.step == 1:
            self._log(share)
        self.watcher.on_step(progress.step)

    def _skip_for_memory(self, batches: Sequence[Batch]) -> None:
        """Forget a step whose batch did not fit, on all ranks."""
        self.engine.drop()
        self.progress.memory_skips += 1
        self._write_down_skip("memory", batches)
        gc.collect()
        if self.accelerator.device.type != "cpu":
            torch.accelerator.memory.empty_cache()
        limit = self.settings.limits.memory_skips
        if self.progress.memory_skips > limit:
            raise TrainingError(
                f"{self.progress.memory_skips} steps did not fit into memory (limits.memory_skips: {limit}); "
                f"lower data.batch_size or data.max_length; the samples are in {self.folder / SKIPPED_FILE}"
            )

    def _skip_as_bad(self, batches: Sequence[Batch]) -> None:
        """Forget a step that is not finite."""
        self.progress.bad_steps += 1
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() > 1:
            return  # fp16 looks for its scale
        self.progress.bad_in_a_row += 1
        self._write_down_skip("not finite", batches)
        limit = self.settings.limits.bad_steps
        if self.progress.bad_in_a_row >= limit:
            raise TrainingError(
                f"{limit} steps in a row had a loss or gradient that is not finite (limits.bad_steps); lower "
                "the rate or look at the data; the newest checkpoint is from before them, the samples are "
                f"in {self.folder / SKIPPED_FILE}"
            )

    def _write_down_skip(self, reason: str, batches: Sequence[Batch]) -> None:
        """Name the samples of a skipped step, those of all ranks."""
        names = [name for batch in batches for name in batch.ids]
        everywhere = self.ranks.gather(names)
        entry = {"after_step": self.progress.step, "reason": reason, "samples": everywhere}
        logger.warning("step skipped (%s) after step %d", reason, self.progress.step)
        if self.ranks.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / SKIPPED_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def _log(self, share: float) -> None:
        """Make an entry of the log from the sums since the last one."""
        progress = self.progress
        sums, progress.sums = progress.sums, {}
        steps, seconds = sums["steps"], max(sums["seconds"], 1e-9)
        record = {
            "step": progress.step,
            **self.objective.describe(sums),
            "learning_rate": self.settings.optim.learning_rate * share,
            "grad_norm": sums["grad_norm"] / steps,
            "positions_per_s": sums["positions"] / seconds,
            "audio_hours_per_h": sums.get("audio_seconds", 0.0) / seconds,
            "seconds": progress.seconds,
            "memory_skips": progress.memory_skips,
            "bad_steps": progress.bad_steps,
        }
        if self.ranks.rank == 0:
            with open(self.folder / LOG_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        self.watcher.on_record(record)

    def _write_log(self, entries: Any) -> None:
        """Start the log anew with earlier entries."""
        if self.ranks.rank == 0:
            text = "".join(json.dumps(entry) + "\n" for entry in entries)
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / LOG_FILE).write_text(text, encoding="utf-8")

    def _snapshot(self) -> dict[str, Any]:
        """All that a checkpoint needs besides weights and optimizer, which move in steps only."""
        random, generators = random_state(self.accelerator.device)
        return {
            "progress": asdict(self.progress),
            "random": random,
            "generators": generators,
            "feed": self.feed.state_dict(),
        }

    def _about(self) -> dict[str, Any]:
        """What a checkpoint says of its run."""
        about = describe_run(self.settings, world_size=self.ranks.world_size, threads=torch.get_num_threads())
        scaler = self.accelerator.scaler
        return {"run": about, "facts": self.facts, "scaler": scaler.state_dict() if scaler else None}

    def _check_same_run(self, state: Mapping[str, Any], found: Path) -> None:
        """Refuse to go on with another run; other threads only cost the last bits.

        Raises:
            CheckpointError: naming what differs, with both values.
        """
        old, now = state["run"], self._about()
        problems = find_changes(old["settings"], dump(self.settings))
        if old["world_size"] != now["run"]["world_size"]:
            problems.append(f"processes were {old['world_size']}, are {now['run']['world_size']}")
        problems += find_changes({"fact": state["facts"]}, {"fact": json.loads(json.dumps(self.facts))})
        if problems:
            raise CheckpointError(
                f"{found} belongs to another run: {'; '.join(problems)}; go on with the settings it was made "
                "with, or start a new run with another out (and start=its talker, to go on from its weights)"
            )
        if old["threads"] != now["run"]["threads"]:
            logger.warning(
                "threads were %d, are %d: the run goes on, but not bit for bit; see the setting threads",
                old["threads"],
                now["run"]["threads"],
            )

    def _start_average(self) -> dict[str, Tensor] | None:
        """A copy of what learns, if an average of it is kept."""
        if self.settings.optim.ema_decay is None:
            return None
        if self.engine.meets_in_layers:
            raise TrainingError("optim.ema_decay needs whole weights on each process; leave it out here")
        return {name: value.detach().clone() for name, value in self.engine.parameters.items()}

    def _update_average(self) -> None:
        decay = self.settings.optim.ema_decay
        if self.average is None or decay is None:
            return
        for name, value in self.engine.parameters.items():
            self.average[name].lerp_(value.detach(), 1 - decay)

    def _bytes_of_state(self) -> int:
        """About what a checkpoint of whole weights takes: weights and two averages."""
        tensors = self.engine.parameters.values()
        return 3 * sum(value.numel() * value.element_size() for value in tensors)

    def _note(self, state: str) -> None:
        """Write down how the run stands, for whoever started it."""
        if self.ranks.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / STATUS_FILE, {"state": state, "step": self.progress.step})

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Note SIGTERM and SIGINT inside; a second SIGINT interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            if self._stop_asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop_asked = True

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def rate_share(step: int, settings: OptimSettings) -> float:
    """Return the share of the highest rate at which the step after ``step`` steps is taken.

    It rises evenly to 1 over the warm-up and falls along half a cosine to ``final_share`` at the last step.
    """
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    rest = max(1, settings.num_steps - settings.warmup_steps)
    done = min(1.0, (step - settings.warmup_steps) / rest)
    return settings.final_share + (1 - settings.final_share) * (1 + math.cos(math.pi * done)) / 2


def make_optimizer(
    groups: Mapping[str, Mapping[str, Tensor]], settings: OptimSettings, *, rates: Mapping[str, float]
) -> torch.optim.AdamW:
    """Return AdamW over all that learns.

    Args:
        groups: parameters of each weight group that learns.
        settings: rates, decay and averages.
        rates: highest rate of single groups; those of ``settings.group_rates`` come before them.

    Raises:
        TrainingError: if nothing learns.
    """
    by_kind: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameters in groups.items():
        rate = settings.group_rates.get(name, rates.get(name, settings.learning_rate))
        for parameter in parameters.values():
            # Norms and biases have one dimension; to pull them to zero helps nobody.
            decay = settings.weight_decay if parameter.dim() > 1 else 0.0
            by_kind.setdefault((rate, decay), []).append(parameter)
    if not by_kind:
        raise TrainingError("nothing learns: the stage leaves every weight as it is")
    options = [
        {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in by_kind.items()
    ]
    try:
        return torch.optim.AdamW(options, betas=settings.betas, eps=settings.eps, fused=True)
    except RuntimeError:  # a device or type without a fused kernel
        return torch.optim.AdamW(options, betas=settings.betas, eps=settings.eps)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of a run's log; a last line that a kill cut off is left out."""
    entries = []
    path = folder / LOG_FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def _now(device: torch.device) -> float:
    """Seconds on a clock, when all that was asked of the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
