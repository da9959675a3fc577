"""What the trainings of the tiny talker's parts share: schedule, steps, and going on after a stop.

A module and a function from step to loss in, a trained module out. What a step sees depends on the seed and
the step alone, so that a run that was stopped ends where it would have ended. Knows nothing of texts or of
speech.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from omni_adapter.arithmetic import multiplies_bfloat16

STATE_FILE = "state.pt"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn.

    Attributes:
        num_steps: steps in total.
        learning_rate: the highest; it falls along a cosine, to ``final_share`` of it.
        warmup_steps: steps on which the rate rises.
        weight_decay: for matrices; vectors are left alone.
        check_every: steps between two checks, each of which keeps the state.
        final_share: share of the highest rate at which the cosine ends.
        max_norm: longest gradient that is taken as it is.
        average: decay of the average of the weights that is what comes out; None for the weights themselves.
    """

    num_steps: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    check_every: int
    final_share: float = 0.01
    max_norm: float = 1.0
    average: float | None = None

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * min(1.0, done))) / 2
        return self.learning_rate * (self.final_share + (1 - self.final_share) * cosine)


class PartTrainer:
    """Trains one module; goes on from the state that an earlier run has left.

    Args:
        module: what learns.
        schedule: how long and how fast.
        folder: where the state is kept, ``state.pt``.
    """

    def __init__(self, module: nn.Module, *, schedule: Schedule, folder: Path) -> None:
        self.module = module
        self.schedule = schedule
        self.path = folder / STATE_FILE
        learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in learning if p.dim() > 1], "weight_decay": schedule.weight_decay},
            {"params": [p for p in learning if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98), fused=True)
        decay = schedule.average
        self.average = (
            None
            if decay is None
            else AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay)).requires_grad_(False)
        )
        self.step = 0
        self.minutes = 0.0
        if self.path.is_file():
            self._load()

    def run(
        self,
        loss_of: Callable[[int], Tensor],
        check: Callable[[], str],
        *,
        until: int | None = None,
    ) -> list[float]:
        """Take the steps that are left.

        Args:
            loss_of: the loss of a step, counted from 0.
            check: called at every check, with the module as it comes out; what it returns is printed.
            until: stop before this step, with the state kept; None for the schedule's end.

        Returns:
            The losses of the steps that were taken.
        """
        end = self.schedule.num_steps if until is None else min(until, self.schedule.num_steps)
        losses: list[float] = []
        checked = time.monotonic()
        while self.step < end:
            losses.append(self._take(loss_of(self.step)))
            self.step += 1
            if self.step % self.schedule.check_every and self.step < end:
                continue
            self.minutes += (time.monotonic() - checked) / 60
            self._save()
            recent = losses[-self.schedule.check_every :]
            with self.averaged():
                found = check()
            print(
                f"step {self.step} of {self.schedule.num_steps}, {self.minutes:.1f} min, "
                f"loss {sum(recent) / len(recent):.4f}, {found}",
                flush=True,
            )
            checked = time.monotonic()
        return losses

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the module have what comes out inside: the average of its weights, if one is kept."""
        if self.average is None:
            yield
            return
        kept = {name: value.clone() for name, value in self.module.state_dict().items()}
        self.module.load_state_dict(self.average.module.state_dict())
        try:
            yield
        finally:
            self.module.load_state_dict(kept)

    def _take(self, loss: Tensor) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), self.schedule.max_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.module)
        return float(loss.detach())

    def _save(self) -> None:
        state = {
            "step": self.step,
            "minutes": self.minutes,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }
        write_state(self.path, state)

    def _load(self) -> None:
        device = next(self.module.parameters()).device
        state = torch.load(self.path, map_location=device, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.step, self.minutes = state["step"], state["minutes"]
        print(f"going on after step {self.step}", flush=True)


def training_parser(purpose: str, *, steps: int) -> argparse.ArgumentParser:
    """Return the options that the trainings share, but for where their parts go.

    Args:
        purpose: what is trained, in a sentence.
        steps: steps in total, unless the command line says otherwise.
    """
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--world", type=Path, default=Path("build/tiny/world"), help="folder of the world")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps, ... or auto")
    parser.add_argument("--steps", type=int, default=steps, help="steps in total")
    parser.add_argument("--until", type=int, help="stop before this step, for the next run to go on")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def training_arguments(given: argparse.Namespace, schedule: Schedule) -> dict[str, Any]:
    """Return what the options of :func:`training_parser` say to a training."""
    return {
        "schedule": replace(schedule, num_steps=given.steps),
        "device": given.device,
        "seed": given.seed,
        "until": given.until,
    }


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write what a training needs to go on, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    torch.save(state, new)
    new.replace(path)


def pick_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` is an accelerator where there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def mixed_precision(device: torch.device) -> torch.autocast:
    """Return a context in which products are in bfloat16, where ``device`` multiplies it natively."""
    return torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device))


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return a source of chance that depends on seed and step alone."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def training_folder(out: Path) -> Path:
    """Return where a training keeps what it needs to go on."""
    return out.with_name(f"{out.name}-training")
