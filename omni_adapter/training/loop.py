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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

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
from omni_adapter.training.log import SKIPPED_FILE, RunLog, read_log
from omni_adapter.training.objective import Objective
from omni_adapter.training.optimizer import rate_share
from omni_adapter.training.settings import TrainSettings, describe_run, find_changes
from omni_adapter.training.watch import Silent, Watcher

logger = logging.getLogger(__name__)

EXIT_FINISHED = 0
EXIT_STOPPED = 75
"""Exit code of a run that a signal stopped after it saved its state; the same command goes on with it."""

CHECKPOINT_FOLDER = "checkpoints"

SHORT_POSITIONS = 128
"""Up to so many positions attention trains quicker on a CPU as plain products than by the fused kind, whose
backward pass is slow there, in bfloat16 above all."""


class Feed(Protocol):
    """Batches of one rank, endless, and where they stand."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from where the feed stands; must not draw from the global random generators."""

    def state_dict(self) -> dict[str, Any]:
        """Return, as plain values, where the feed stands after the last batch it yielded."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: steps taken.
        memory_skips: steps skipped because a batch did not fit into memory.
        bad_steps: steps skipped because a loss or gradient was not finite.
        bad_in_a_row: those since the last step taken.
        seconds: of training, without pauses between continuations.
        sums: sums since the last entry of the log, by name.
    """

    step: int = 0
    memory_skips: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0
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
    seconds: float = 0.0


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
        self.log = RunLog(self.folder, writes=self.ranks.rank == 0)
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
        self.log.note("running", self.progress.step)
        self.watcher.on_start(self.progress.step, total)
        try:
            with self._signals():
                saved = self.progress.step
                while self.progress.step < total:
                    before = self._snapshot()
                    window = self.take_step()
                    if window.stop_asked:
                        self.save(before if window.was_cut_short else None)
                        self.log.note("stopped", self.progress.step)
                        return Result(EXIT_STOPPED, self.progress.step)
                    if self.progress.step % every == 0 and self.progress.step > saved:
                        self.save()
                        saved = self.progress.step
                if saved < total:
                    self.save()
            self.log.note("finished", self.progress.step)
            return Result(EXIT_FINISHED, self.progress.step)
        except BaseException:
            self.log.note("failed", self.progress.step)
            raise
        finally:
            self.watcher.on_end()

    def take_step(self) -> _Window:
        """Take one step, or skip it for a stated reason.

        Raises:
            TrainingError: if too many steps were skipped.
        """
        started = _now(self.accelerator.device)
        batches = self._next_batches()
        window = self._run_batches(batches)
        stepped = False
        if window.was_cut_short:
            self.engine.drop()
        elif window.did_not_fit:
            self._skip_for_memory(batches)
        else:
            stepped = self._step(window, batches)
        window = window._replace(seconds=_now(self.accelerator.device) - started)
        self.progress.seconds += window.seconds
        if stepped:
            self._finish_step(window)
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
            self.log.start()
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
        self.log.start([entry for entry in read_log(self.folder) if entry["step"] <= self.progress.step])
        logger.info("the run goes on from %s", found)

    def _next_batches(self) -> list[Batch]:
        """The micro-batches of the next step."""
        if self._batches is None:
            self._batches = iter(self.feed)
        return [next(self._batches) for _ in range(self.settings.optim.accumulate)]

    def _run_batches(self, batches: Sequence[Batch]) -> _Window:
        """Gradients of this rank's micro-batches; what the ranks must agree on is added up."""
        device, names = self.accelerator.device, self.objective.sum_names
        counts = sum((self.objective.count(batch) for batch in batches), start=torch.zeros(()))
        counts = self.ranks.add(counts.to(device))
        sums = torch.zeros(len(names), device=device)
        did_not_fit = was_cut_short = False
        try:
            for number, batch in enumerate(batches):
                if self._stop_asked and not self.engine.meets_in_layers:
                    was_cut_short = True
                    break
                with attention_for(batch.grid.shape[-1], device):
                    with self.accelerator.autocast():
                        loss, further = self.objective.measure(self.engine.model, batch.to(device), counts)
                    self.engine.backward(loss, is_last=number + 1 == len(batches))
                sums += further.detach()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or self.engine.meets_in_layers:
                raise
            logger.warning("a batch did not fit into memory: %s", str(error).splitlines()[0])
            did_not_fit = True
        flags = torch.tensor([did_not_fit, was_cut_short, self._stop_asked], device=device)
        *told, any_did_not_fit, any_cut_short, any_stop = self.ranks.add(
            torch.cat((sums, flags.to(sums.dtype)))
        ).tolist()
        return _Window(
            dict(zip(names, told, strict=True)), any_did_not_fit > 0, any_cut_short > 0, any_stop > 0
        )

    def _step(self, window: _Window, batches: Sequence[Batch]) -> bool:
        """Let the optimizer step if the step is sound; return whether it did."""
        share = rate_share(self.progress.step, self.settings.optim)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
        is_sound = math.isfinite(window.sums[self.objective.sum_names[0]])
        if not self.engine.step(is_sound=is_sound):
            self._skip_as_bad(batches)
            return False
        return True

    def _finish_step(self, window: _Window) -> None:
        """Count a step that was taken, and tell of it."""
        progress = self.progress
        progress.step += 1
        progress.bad_in_a_row = 0
        further = {"grad_norm": self.engine.norm, "steps": 1.0, "seconds": window.seconds}
        for name, value in {**window.sums, **further}.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + value
        self._update_average()
        if progress.step % self.settings.watch.log_every == 0 or progress.step == 1:
            self._log()
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
        logger.warning("step skipped (%s) after step %d", reason, self.progress.step)
        self.log.add_skip(after_step=self.progress.step, reason=reason, samples=everywhere)

    def _log(self) -> None:
        """Make an entry of the log from the sums since the last one."""
        progress, optim = self.progress, self.settings.optim
        sums, progress.sums = progress.sums, {}
        record = {
            "step": progress.step,
            **self.objective.describe(sums),
            "learning_rate": optim.learning_rate * rate_share(progress.step - 1, optim),
            "grad_norm": sums["grad_norm"] / sums["steps"],
            "seconds": progress.seconds,
            "memory_skips": progress.memory_skips,
            "bad_steps": progress.bad_steps,
        }
        self.log.add(record)
        self.watcher.on_record(record)

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


def attention_for(num_positions: int, device: torch.device) -> AbstractContextManager[None]:
    """Return the context for a pass forward and backward: how attention over so many positions runs."""
    if device.type == "cpu" and num_positions <= SHORT_POSITIONS:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _now(device: torch.device) -> float:
    """Seconds on a clock, when all that was asked of the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
