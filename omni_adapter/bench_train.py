"""How much a training step costs: ours beside the plain way, on random weights of true size.

A preset and a batch in, a report out. Each way runs in a process of its own, so that its peak memory is its
own.

    python -m omni_adapter.bench_train '{"way": "ours", "preset": "tiny", …}'   # what the processes run
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from torch import Tensor

from omni_adapter.bench import random_talker
from omni_adapter.data.collator import Batch, Sample, collate
from omni_adapter.data.layout import Answer, AudioSegment, TextSegment, lay_out
from omni_adapter.errors import ConfigError, OmniError
from omni_adapter.model import OmniModel
from omni_adapter.talker import OmniAdapter
from omni_adapter.training.loop import attention_for
from omni_adapter.training.loss import LossSettings, TrainingModel
from omni_adapter.training.stages import prepare_stage
from omni_adapter.vocab import IGNORE_INDEX

LmMode = Literal["lora", "full", "frozen"]

WAYS = {
    "plain": "logits of all heads at all steps, every state kept, torch's default AdamW",
    "ours": "chunked losses at labelled steps, gradient checkpointing, fused AdamW, attention by length",
}
_PROMPT_SHARE = 0.3  # of a sample's steps: a spoken question of some seconds
_STEPS_PER_TOKEN = 4  # frames of speech for a text token; a token every third of a second


@dataclass(frozen=True)
class TrainBenchSettings:
    """What to train on.

    Attributes:
        preset: key of ``bench.PRESETS``.
        batch_size: samples.
        length: steps of each sample.
        steps: passes and updates that are timed, after one that warms up.
        dtype: type of the computation; bfloat16 through autocast, weights stay float32.
        lm_mode: how the LM learns, as in ``prepare_stage``; LoRA is the recipe's default.
    """

    preset: str
    batch_size: int = 4
    length: int = 512
    steps: int = 2
    dtype: str = "float32"
    lm_mode: LmMode = "lora"

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("length", 64), ("steps", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")


@dataclass(frozen=True)
class TrainTiming:
    """A stage-3 step of one way.

    Attributes:
        way: key of ``WAYS``.
        pass_s: seconds of each timed pass forward and backward.
        update_s: seconds of each update of the weights.
        positions_per_s: steps of samples a second, of the median pass and update together.
        weights_bytes: resident memory once the model is built, before the first pass.
        peak_bytes: largest resident memory of the passes: weights, gradients and states.
        optimizer_bytes: what the optimizer keeps from then on, the same for both ways.
        loss: of the first pass; the same for both ways.
    """

    way: str
    pass_s: list[float]
    update_s: list[float]
    positions_per_s: float
    weights_bytes: int
    peak_bytes: int
    optimizer_bytes: int
    loss: float


def measure_training(settings: TrainBenchSettings) -> list[TrainTiming]:
    """Time each way in a process of its own.

    Raises:
        OmniError: if a process fails; the message holds what it said.
    """
    timings = []
    for way in WAYS:
        task = json.dumps({"way": way, **asdict(settings)})
        command = [sys.executable, "-m", "omni_adapter.bench_train", task]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OmniError(f"timing the {way} way failed: {done.stderr.strip() or done.returncode}")
        line = done.stdout.strip().splitlines()[-1]
        timings.append(TypeAdapter(TrainTiming).validate_json(line))
    return timings


def show(timings: list[TrainTiming], console: Console) -> None:
    """Print a table, the plain way first, and what the ways are."""
    table = Table(
        "way", "passes", "update", "positions/s", "peak", "of plain's", "with optimizer", "of plain's"
    )
    plain = timings[0]
    for timing in timings:
        total = timing.peak_bytes + timing.optimizer_bytes
        table.add_row(
            timing.way,
            f"{_median(timing.pass_s):.2f} s",
            f"{_median(timing.update_s):.2f} s",
            f"{timing.positions_per_s:.1f}",
            f"{timing.peak_bytes / 2**30:.2f} GiB",
            f"{timing.peak_bytes / plain.peak_bytes:.2f}",
            f"{total / 2**30:.2f} GiB",
            f"{total / (plain.peak_bytes + plain.optimizer_bytes):.2f}",
        )
    console.print(table)
    for way, what in WAYS.items():
        console.print(f"{way}: {what}")


def run_way(way: str, settings: TrainBenchSettings) -> TrainTiming:
    """Time one way in this process: first all passes, so that their peak is theirs, then the updates."""
    talker = random_talker(settings.preset)
    talker.model.train()
    prepare_stage(talker.model, "finetune", lm_mode=settings.lm_mode, lora=None)
    batch = _batch(talker, settings)
    learning = [parameter for parameter in talker.model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.grad = torch.zeros_like(parameter)
    loss: Callable[[], Tensor]
    attention: AbstractContextManager[None] = nullcontext()
    if way == "ours":
        attention = attention_for(settings.length, batch.grid.device)
        talker.model.checkpoint_gradients()
        training = TrainingModel(talker.model, LossSettings())
        loss = lambda: training(batch).total()  # noqa: E731 - the two ways differ in this line
    else:
        loss = lambda: _plain_loss(talker.model, batch)  # noqa: E731
    weights_bytes = _peak_bytes()
    losses: list[float] = []

    def run_pass() -> None:
        with torch.autocast(batch.grid.device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
            total = loss()
        total.backward()
        losses.append(float(total.detach()))

    with attention:
        pass_s = _times(run_pass, settings.steps)
    peak_bytes = _peak_bytes()
    optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=True if way == "ours" else None)
    update_s = _times(optimizer.step, settings.steps)
    kept = (value for state in optimizer.state.values() for value in state.values())
    optimizer_bytes = sum(value.numel() * value.element_size() for value in kept)
    positions = int(batch.attention_mask.sum())
    rate = positions / (_median(pass_s) + _median(update_s))
    return TrainTiming(way, pass_s, update_s, rate, weights_bytes, peak_bytes, optimizer_bytes, losses[0])


def _times(work: Callable[[], Any], count: int) -> list[float]:
    """Seconds of ``count`` calls, after one that warms up."""
    work()
    seconds = []
    for _ in range(count):
        started_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started_s)
    return seconds


def _plain_loss(model: OmniModel, batch: Batch) -> Tensor:
    """Joint negative log-likelihood from the logits of all heads at all steps."""
    output = model(batch.grid, places=batch.places, clips=batch.clips)
    labels = batch.labels[..., 1:]
    pairs = [(output.text_logits[:, :-1], labels[:, -1])]
    pairs += [(output.code_logits[:, row, :-1], labels[:, row]) for row in range(labels.shape[1] - 1)]
    sums = [
        F.cross_entropy(
            logits.flatten(0, 1).float(), ids.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        for logits, ids in pairs
    ]
    return torch.stack(sums).sum() / (labels != IGNORE_INDEX).sum()


def _batch(talker: OmniAdapter, settings: TrainBenchSettings) -> Batch:
    """Spoken answers to spoken questions, all of one length."""
    rules, generator = talker.processor.rules, torch.Generator().manual_seed(0)
    heard = int(settings.length * _PROMPT_SHARE)
    samples = []
    for _ in range(settings.batch_size):
        waveform = torch.randn(_samples_for(talker, heard), generator=generator) * 0.1
        features = talker.processor.log_mel.windows(waveform)
        steps = talker.processor.num_steps(waveform.shape[0])
        frames = settings.length - steps - 4 - max(rules.delays) - 1
        text = tuple(torch.randint(3, 200, (frames // _STEPS_PER_TOKEN,), generator=generator).tolist())
        size = (rules.num_codebooks, frames)
        codes = torch.randint(0, rules.vocabulary.codebook_size, size, generator=generator)
        segments: list[TextSegment | AudioSegment] = [
            TextSegment((3,)),
            AudioSegment(steps),
            TextSegment((4,)),
        ]
        layout = lay_out(segments, task="speech_to_speech", rules=rules, answer=Answer(text, codes))
        samples.append(Sample(layout, (features,)))
    return collate(samples, rules=rules, side="right").to(talker.model.device)


def _samples_for(talker: OmniAdapter, steps: int) -> int:
    """Samples of a recording that takes ``steps`` steps."""
    log_mel, config = talker.processor.log_mel, talker.config
    return steps * config.audio_adapter.stack * config.encoder_stride * log_mel.hop_length


def _median(values: list[float]) -> float:
    return float(torch.tensor(values).median())


def _peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    given: dict[str, Any] = json.loads(sys.argv[1])
    chosen = given.pop("way")
    sys.stdout.write(json.dumps(asdict(run_way(chosen, TrainBenchSettings(**given)))) + "\n")
