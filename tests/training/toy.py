"""A toy world for the loop: a model of a few hundred weights with dropout, on rows of letters.

Run as a script it is one of several processes:
``torchrun --nproc_per_node 2 tests/training/toy.py SCENARIO FOLDER``.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from omni_adapter.data.collator import Batch, Sample
from omni_adapter.data.dataset import Batching, BatchLoader, Mixture, SourceSpec
from omni_adapter.data.layout import Answer, GridRules, TextSegment, lay_out
from omni_adapter.data.rows import Row
from omni_adapter.training.engine import AllRanks, Copies, Shards, find_layers
from omni_adapter.training.log import read_log
from omni_adapter.training.loop import Result, Trainer
from omni_adapter.training.optimizer import make_optimizer
from omni_adapter.training.settings import TrainSettings, load_settings
from omni_adapter.vocab import IGNORE_INDEX, CodeVocabulary

RULES = GridRules(CodeVocabulary(8), (1, 2), text_end_id=0)
LETTERS = 32


def to_sample(row: Row) -> Sample:
    """A row of letters as a sample of text."""
    ids = tuple(ord(letter) % LETTERS for letter in row.text_in or "")
    answer = Answer(tuple(ord(letter) % LETTERS for letter in row.text_out or ""))
    return Sample(lay_out([TextSegment(ids)], task="text_to_text", rules=RULES, answer=answer), (), row.id)


def write_rows(folder: Path, *, count: int = 24) -> Path:
    """Rows of different lengths."""
    path = folder / "rows.jsonl"
    words = ["sea", "wind", "star", "boat", "small", "story"]
    rows = [
        {"text_in": words[i % 6] * (1 + i % 3), "text_out": " ".join(words[i % 5 : i % 5 + 1 + i % 4])}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_feed(
    path: Path, *, rank: int = 0, world: int = 1, workers: int = 0, batch_size: int = 2
) -> BatchLoader:
    mixture = Mixture([SourceSpec(str(path), task="text_to_text")], seed=3)
    return BatchLoader(
        mixture,
        to_sample,
        rules=RULES,
        batching=Batching("bucket", batch_size, window=3 * batch_size),
        rank=rank,
        world=world,
        workers=workers,
    )


class ToyModel(nn.Module):
    """Letters in, next letters out; ``at_call`` is told the number of each pass before it."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(LETTERS, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.unused = nn.Linear(2, 2)
        self.sometimes = nn.Linear(8, 8)
        self.head = nn.Linear(8, LETTERS)
        self.dropout = nn.Dropout(dropout)
        self.has_moods = True
        self.calls = 0
        self.at_call: Any = lambda call, batch: None

    def forward(self, batch: Batch) -> tuple[torch.Tensor]:
        self.calls += 1
        self.at_call(self.calls, batch)
        states = self.embedding(batch.grid[:, -1].clamp(min=0))
        for layer in self.layers:
            states = self.dropout(torch.tanh(layer(states)))
        if self.has_moods and batch.grid.shape[-1] % 2:  # not every batch needs every weight
            states = states + self.sometimes(states)
        labels = batch.labels[:, -1, 1:]
        loss = nn.functional.cross_entropy(
            self.head(states)[:, :-1].flatten(0, 1),
            labels.flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )
        return (loss,)


class ToyObjective:
    sum_names = ("loss", "labels")

    def count(self, batch: Batch) -> torch.Tensor:
        return (batch.labels[:, -1, 1:] != IGNORE_INDEX).sum()[None].float()

    def measure(
        self, model: nn.Module, batch: Batch, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss = model(batch)[0] / counts[0]
        return loss, torch.stack((loss.detach(), self.count(batch)[0]))

    def describe(self, sums: Any) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["steps"], "labels": sums["labels"]}


def make_settings(out: Path, *words: str) -> TrainSettings:
    defaults = [
        f"out={out}", "optim.num_steps=10", "optim.warmup_steps=3", "optim.learning_rate=0.05",
        "watch.log_every=1", "optim.accumulate=3", "checkpoint.every_steps=4",
    ]  # fmt: skip
    return load_settings(None, [*defaults, *words])


def make_trainer(
    rows: Path, settings: TrainSettings, *, dropout: float = 0.2, workers: int = 0, batch_size: int = 2,
    shard: bool = False,
) -> Trainer:  # fmt: skip
    accelerator = Accelerator(cpu=True, mixed_precision=settings.precision.replace("fp32", "no"))
    ranks = AllRanks()
    torch.manual_seed(settings.seed + ranks.rank)
    state = torch.get_rng_state()
    model = ToyModel(dropout)
    torch.set_rng_state(state)

    def optimizer() -> torch.optim.Optimizer:
        return make_optimizer({"all": dict(model.named_parameters())}, settings.optim, rates={})

    norm = settings.optim.max_grad_norm
    if shard:
        engine: Any = Shards(
            model, optimizer, accelerator=accelerator, ranks=ranks, max_norm=norm, units=find_layers(model)
        )
    else:
        engine = Copies(model, optimizer(), accelerator=accelerator, ranks=ranks, max_norm=norm)
    feed = make_feed(rows, rank=ranks.rank, world=ranks.world_size, workers=workers, batch_size=batch_size)
    return Trainer(
        engine, ToyObjective(), feed, settings=settings, accelerator=accelerator, ranks=ranks,
        facts=feed.mixture.fingerprint(),
    )  # fmt: skip


def weights(trainer: Trainer) -> dict[str, list[str]]:
    """Every bit of every weight."""
    whole = trainer.engine.whole_weights() or trainer.engine.parameters
    return {
        name: [value.hex() for value in tensor.detach().flatten().tolist()] for name, tensor in whole.items()
    }


def curve(out: Path) -> list[tuple[int, str, str]]:
    """Every bit of the loss and the norm of the gradients."""
    return [(entry["step"], entry["loss"].hex(), entry["grad_norm"].hex()) for entry in read_log(out)]


def stop_at(call: int, *, rank: int = 0) -> Any:
    """Send ourselves SIGTERM in the middle of a pass."""

    def at_call(number: int, batch: Batch) -> None:
        if number == call and AllRanks().rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)

    return at_call


def run(trainer: Trainer) -> Result:
    trainer.engine.model.train()
    return trainer.run()


def scenario_two_ranks(folder: Path) -> None:
    """Everything that two ranks are to show, in one start of processes: it takes seconds to start them."""
    ranks, rows = AllRanks(), folder / "rows.jsonl"
    Accelerator(cpu=True)
    report: dict[str, Any] = {}

    def train(name: str, *words: str, at_call: Any = None, **options: Any) -> Trainer:
        trainer = make_trainer(rows, make_settings(folder / name, *words), **options)
        if at_call:
            trainer.engine.model.at_call = at_call
        report[f"{name}/result"] = list(run(trainer))
        return trainer

    # One rank with batches twice as large must do the same.
    plain = train("equal", "optim.accumulate=2", dropout=0.0)
    report["equal/weights"] = weights(plain)

    straight = train("straight")
    report["straight/weights"] = weights(straight)
    for name, call, workers in (("mid", 8, 0), ("late", 20, 2)):
        train(f"stop-{name}", at_call=stop_at(call, rank=1), workers=workers)
        resumed = train(f"stop-{name}", workers=workers)
        report[f"stop-{name}/weights"] = weights(resumed)

    def no_memory(number: int, batch: Batch) -> None:
        if number == 4 and ranks.rank == 1:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
            )

    skipped = train("memory", "optim.accumulate=1", dropout=0.0, at_call=no_memory)
    report["memory/skips"] = skipped.progress.memory_skips
    report["memory/weights"] = weights(skipped)
    if ranks.rank == 0:
        (folder / "report.json").write_text(json.dumps(report))


def scenario_shards(folder: Path) -> None:
    """FSDP2: as copies, but for rounding; resumed bit for bit."""
    rows = folder / "rows.jsonl"
    Accelerator(cpu=True)
    report: dict[str, Any] = {}
    for name, shard in (("copies", False), ("shards", True)):
        trainer = make_trainer(rows, make_settings(folder / name), dropout=0.0, shard=shard)
        # A weight that a step does not need stays as it is on copies; shards let its averages fade.
        trainer.engine.model.has_moods = False
        run(trainer)
        whole = trainer.engine.whole_weights() or trainer.engine.parameters
        report[name] = {key: value.detach().tolist() for key, value in whole.items()}
    straight = make_trainer(rows, make_settings(folder / "straight"), shard=True)
    run(straight)
    report["straight"] = weights(straight)
    stopped = make_trainer(rows, make_settings(folder / "stopped"), shard=True)
    stopped.engine.model.at_call = stop_at(8)
    report["stopped/result"] = list(run(stopped))
    resumed = make_trainer(rows, make_settings(folder / "stopped"), shard=True)
    run(resumed)
    report["resumed"] = weights(resumed)
    if AllRanks().rank == 0:
        (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"two_ranks": scenario_two_ranks, "shards": scenario_shards}[sys.argv[1]](Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
