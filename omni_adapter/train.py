"""From a command line to a trained talker: what the recipes run.

Settings in; a run folder with checkpoints, log, report and a talker out. Puts talker, data and loop together;
each of them does its own work.

    run folder
      settings.yaml  run.json         all settings; command, versions, fingerprint of the data, what learned
      log.jsonl  skipped.jsonl        figures by step; steps that were left out, and why
      status.json                     running, stopped, finished or failed, and at which step
      checkpoints/                    to go on from
      answers/step-00000500/          what the talker said on the way
      talker/                         the result: OmniAdapter.from_pretrained loads it
      report.html  curves.png         the curves, row by row
"""

import logging
import os
import random
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env
from torch import Tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from omni_adapter import hub
from omni_adapter.arithmetic import multiplies_bfloat16
from omni_adapter.config import dump, parse
from omni_adapter.data.collator import Sample
from omni_adapter.data.dataset import (
    Batching,
    BatchLoader,
    LengthHistogram,
    Mixture,
    sample_lengths,
)
from omni_adapter.data.rows import Rejects, Row, to_sample
from omni_adapter.data.sources import licences
from omni_adapter.errors import ConfigError, MissingDependencyError, OmniError
from omni_adapter.model import OmniModel
from omni_adapter.talker import OmniAdapter
from omni_adapter.train_answers import Answers
from omni_adapter.training.checkpoint import write_json
from omni_adapter.training.command import read_command
from omni_adapter.training.engine import (
    AllRanks,
    Copies,
    DeepSpeed,
    Engine,
    Shards,
    find_layers,
    take_shard_wish,
)
from omni_adapter.training.lessons import check_lessons, open_mixture
from omni_adapter.training.loop import EXIT_FINISHED, Result, Trainer
from omni_adapter.training.loss import LossSettings, TrainingModel
from omni_adapter.training.metrics import Meter
from omni_adapter.training.objective import RowLosses
from omni_adapter.training.optimizer import make_optimizer
from omni_adapter.training.report import REPORT_FILE, write_report
from omni_adapter.training.settings import (
    LoraSettings,
    TrainSettings,
    describe_run,
    to_yaml,
)
from omni_adapter.training.stages import TrainableTable, get_stage, prepare_stage
from omni_adapter.training.watch import Screen, Trackers, Watchers

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
TALKER_FOLDER = "talker"
AVERAGE_FOLDER = "talker-average"


class Run(NamedTuple):
    """Everything that takes part in a run."""

    talker: OmniAdapter
    table: TrainableTable
    mixture: Mixture
    to_sample: Callable[[Row], Sample]
    trainer: Trainer
    rejects: Rejects
    accelerator: Accelerator


def run(stage: str, argv: Sequence[str] | None = None, *, also: Sequence[str] = ()) -> int:
    """Train one stage as the command line says.

    Args:
        stage: the stage of the recipe.
        argv: words of the command line; None for those of this process.
        also: further stages that the recipe serves, if the settings name them.

    Returns:
        The exit code: 0 when the run is finished, 75 when a signal stopped it and its state was saved, 1 when
        it failed.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        command = read_command(stage, words, also=also)
        with _processes(command.settings) as (accelerator, shards):
            return (
                dry_run(command.settings, accelerator, shards=shards)
                if command.dry_run
                else train(command.settings, accelerator, shards=shards)
            )
    except OmniError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return EXIT_FAILED


def train(settings: TrainSettings, accelerator: Accelerator, *, shards: bool = False) -> int:
    """Train, and leave a run folder behind; return the exit code."""
    this = prepare(settings, accelerator, shards=shards)
    if accelerator.is_main_process:
        sys.stdout.write(f"stage {settings.stage}, run folder {settings.out}\n\n")
        sys.stdout.write(f"{this.table}\n\n{_list_tasks(this.mixture)}\n\n")
        _write_run_folder(this, settings)
    try:
        result = this.trainer.run()
    finally:
        if accelerator.is_main_process:
            write_report(Path(settings.out))
    if result.exit_code == EXIT_FINISHED:
        save_talker(this, settings)
        this.rejects.check()  # a short run may end before its share of rejects stops it
    if accelerator.is_main_process:
        sys.stdout.write(_last_words(result, Path(settings.out)))
    return result.exit_code


def dry_run(settings: TrainSettings, accelerator: Accelerator, *, shards: bool = False) -> int:
    """Show what a run would do, and take one step of it; nothing is kept."""
    with tempfile.TemporaryDirectory() as folder:
        silent = replace(settings.watch, progress=False, trackers=(), answer_every=0)
        tried = replace(settings, out=folder, watch=silent)
        this = prepare(tried, accelerator, shards=shards)
        say = sys.stdout.write if accelerator.is_main_process else lambda text: len(text)
        lengths, rejects = sample_lengths(this.mixture, this.to_sample)
        say(f"{to_yaml(settings)}\n{this.table}\n\n{_memory_estimate(this.talker.model)}\n\n")
        say(f"{_list_tasks(this.mixture)}\n\n")
        say(f"{rejects.report()}\n" if rejects.total else "no row was rejected\n")
        say(f"lengths of the first {len(lengths)} samples, in tokens, and how many have them\n")
        say(f"{LengthHistogram.of(lengths)}\n\n")
        say(f"{_length_of_run(settings, this.mixture, this.trainer.ranks.world_size)}\n")
        this.trainer.engine.model.train()
        window = this.trainer.take_step()
        loss = window.sums[this.trainer.objective.sum_names[0]]
        say(f"tried one step: loss {loss:.4f}, {window.seconds:.2f} s, ")
        say(f"{peak_bytes(accelerator.device) / 2**30:.2f} GiB of memory at most; nothing was kept\n")
    return EXIT_FINISHED


def prepare(settings: TrainSettings, accelerator: Accelerator, *, shards: bool = False) -> Run:
    """Put talker, data and loop together."""
    ranks = AllRanks()
    talker = build_talker(settings)
    table = apply_stage(talker, settings)
    mixture = open_mixture(settings)
    loss = parse(LossSettings, settings.loss, source="loss")
    check_lessons(loss, mixture)
    sample = partial(
        to_sample,
        processor=talker.processor,
        codec=talker.codec,
        max_steps=settings.data.max_length,
        taught=loss.distil,
    )
    seed_everything(settings.seed + ranks.rank)
    feed = BatchLoader(
        mixture,
        sample,
        rules=talker.processor.rules,
        batching=Batching(
            settings.data.mode, settings.data.batch_size, settings.data.max_length, settings.data.window
        ),
        rank=ranks.rank,
        world=ranks.world_size,
        workers=settings.data.workers,
        rejects=Rejects(limit=settings.data.max_rejected),
    )
    model = TrainingModel(talker.model, loss).train()
    engine = make_engine(model, settings, accelerator, ranks=ranks, shards=shards)
    encoder, spec = talker.processor.log_mel, talker.config.codec_spec
    heard_frames = talker.config.encoder_stride * talker.config.audio_adapter.stack
    trainer = Trainer(
        engine,
        RowLosses(
            model,
            meter=Meter(
                spec.num_codebooks,
                spec.codebook_size,
                seconds_per_frame=1 / spec.frame_rate_hz,
                seconds_per_step=heard_frames * encoder.hop_length / encoder.sampling_rate,
            ),
        ),
        feed,
        settings=settings,
        accelerator=accelerator,
        facts={"data": mixture.fingerprint(), "talker": dump(talker.config)},
        ranks=ranks,
    )
    trainer.watcher = make_watcher(talker, trainer, accelerator)
    return Run(talker, table, mixture, sample, trainer, feed.rejects, accelerator)


def build_talker(settings: TrainSettings) -> OmniAdapter:
    """Wrap a base anew, or load the talker to go on with."""
    model = settings.model
    arguments: dict[str, Any] = {"dtype": model.dtype}
    if model.quantize:
        arguments["quantization_config"] = _four_bits(model.dtype)
    if model.start is not None:
        return OmniAdapter.from_pretrained(model.start, encoder=model.encoder, codec=model.codec, **arguments)
    assert model.base is not None  # read_command refuses settings with neither
    parts: dict[str, Any] = {"encoder": model.encoder, "codec": model.codec}
    named = {name: part for name, part in parts.items() if part is not None}
    return OmniAdapter.wrap(model.base, seed=settings.seed, **arguments, **named, **model.wrap)


def apply_stage(talker: OmniAdapter, settings: TrainSettings) -> TrainableTable:
    """Let the weights of the stage learn, and no others."""
    model = settings.model
    # A talker that comes with LoRA keeps its settings, unless others are asked for.
    has_own = talker.model.backbone.has_lora and model.lora == LoraSettings()
    table = prepare_stage(
        talker.model, settings.stage, lm_mode=model.lm or "lora", lora=None if has_own else model.lora
    )
    if model.gradient_checkpointing:
        talker.model.checkpoint_gradients()
    return table


def make_engine(
    model: TrainingModel, settings: TrainSettings, accelerator: Accelerator, *, ranks: AllRanks, shards: bool
) -> Engine:
    """Return what runs passes and takes steps, as ``accelerate launch`` was told."""

    def optimizer() -> torch.optim.Optimizer:
        learning = {
            group: {name: value for name, value in parameters.items() if value.requires_grad}
            for group, parameters in model.model.groups().items()
        }
        unknown = settings.optim.group_rates.keys() - {group for group, values in learning.items() if values}
        if unknown:
            raise ConfigError(
                f"optim.group_rates names {', '.join(sorted(unknown))}, which does not learn in this stage; "
                f"these do: {', '.join(group for group, values in learning.items() if values)}"
            )
        return make_optimizer(learning, settings.optim, rates={})

    norm = settings.optim.max_grad_norm
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return DeepSpeed(
            model,
            optimizer(),
            accelerator=accelerator,
            ranks=ranks,
            max_norm=norm,
            batch_size=settings.data.batch_size,
        )
    if shards and ranks.world_size > 1:
        return Shards(
            model,
            optimizer,
            accelerator=accelerator,
            ranks=ranks,
            max_norm=norm,
            units=(*find_layers(model.model.backbone), model.model.tts_blocks),
            whole=(model.model.audio_encoder,),
        )
    return Copies(model, optimizer(), accelerator=accelerator, ranks=ranks, max_norm=norm)


def make_watcher(talker: OmniAdapter, trainer: Trainer, accelerator: Accelerator) -> Watchers:
    """Return what shows the run."""
    settings = trainer.settings
    watch = settings.watch
    watchers: list[Any] = []
    trackers = None
    if watch.trackers:
        trackers = Trackers(accelerator, project=watch.project, config=dump(settings))
        watchers.append(trackers)
    if watch.answer_every and watch.prompts:
        watchers.append(Answers(talker, trainer, trackers=trackers))
    if watch.progress:
        watchers.append(Screen(settings.stage, is_shown=accelerator.is_main_process))
    return Watchers(watchers)


def save_talker(this: Run, settings: TrainSettings) -> None:
    """Save the result, whole and loadable by itself; every process calls this."""
    engine, average = this.trainer.engine, this.trainer.average
    weights = engine.whole_weights()
    if this.accelerator.is_main_process:
        talker = this.talker
        if weights is not None:
            # The model at hand is in pieces: the weights go into a new one.
            talker = build_talker(settings)
            apply_stage(talker, settings)
            _copy_weights(talker, weights)
        include = _parts_to_save(talker, settings)
        told: dict[str, Any] = {"include": include, "datasets": licences(this.mixture.specs)}
        talker.save_pretrained(Path(settings.out) / TALKER_FOLDER, **told)
        if average is not None:
            _copy_weights(talker, average)
            talker.save_pretrained(Path(settings.out) / AVERAGE_FOLDER, **told)
    this.accelerator.wait_for_everyone()


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def _processes(settings: TrainSettings) -> Iterator[tuple[Accelerator, bool]]:
    """The processes of the run, and whether they are to share the weights among them."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    shards = take_shard_wish()
    # DeepSpeed would ask for a backend that a machine without an accelerator does not have.
    is_launched = "RANK" in os.environ and not torch.accelerator.is_available()
    handlers = [InitProcessGroupKwargs(backend="gloo")] if is_launched else []
    accelerator = Accelerator(
        mixed_precision=_mixed_precision(settings.precision),
        log_with=list(settings.watch.trackers) or None,
        project_dir=settings.out,
        kwargs_handlers=handlers,
    )
    # Else transformers would load bases in pieces, which cannot be tried out; DeepSpeed cuts them up later.
    forget: Any = unset_hf_deepspeed_config
    forget()
    try:
        yield accelerator, shards
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _mixed_precision(asked: str) -> str:
    """What Accelerate calls a precision."""
    if asked == "auto":
        found = None if parse_flag_from_env("ACCELERATE_USE_CPU") else torch.accelerator.current_accelerator()
        device = found or torch.device("cpu")
        return "bf16" if multiplies_bfloat16(device) else "no"
    return "no" if asked == "fp32" else asked


def _four_bits(dtype: str) -> Any:
    """Settings of QLoRA's base."""
    try:
        import bitsandbytes  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
        import transformers
    except ImportError as error:
        raise MissingDependencyError("bitsandbytes", extra="quantized", purpose="model.quantize") from error
    make: Any = transformers.BitsAndBytesConfig
    return make(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype))


def _parts_to_save(talker: OmniAdapter, settings: TrainSettings) -> tuple[str, ...]:
    """Parts that cannot be named: the base if it learned, and what lies in the folder that was loaded."""
    learned = {"base"} if settings.model.lm == "full" and get_stage(settings.stage).trains_lm else set()
    for part in hub.PARTS:
        place = getattr(talker.config, part).id
        if not place or place.startswith("./"):
            learned.add(part)
    return tuple(part for part in hub.PARTS if part in learned)


def _copy_weights(talker: OmniAdapter, weights: Mapping[str, Tensor]) -> None:
    """Copy weights of the training model into its talker."""
    own = dict(talker.model.named_parameters())
    for name, value in weights.items():
        own[name.removeprefix("model.")].data.copy_(value)


def _write_run_folder(this: Run, settings: TrainSettings) -> None:
    """Write down all that is needed to do the run again."""
    folder = Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.yaml").write_text(to_yaml(settings), encoding="utf-8")
    about = describe_run(settings, world_size=this.trainer.ranks.world_size, threads=torch.get_num_threads())
    learned = {
        row.group: {"parameters": row.parameters, "trainable": row.trainable} for row in this.table.rows
    }
    write_json(folder / "run.json", {**about, "data": this.mixture.fingerprint(), "groups": learned})


def _memory_estimate(model: OmniModel) -> str:
    """What weights, gradients and averages take in one process that holds them whole."""
    held = sum(value.numel() * value.element_size() for value in model.parameters())
    learning = sum(
        value.numel() * value.element_size() for value in model.parameters() if value.requires_grad
    )
    parts = {"weights": held, "gradients": learning, "averages of AdamW": 2 * learning}
    lines = [f"{name:20}{size / 2**30:>10.3f} GiB" for name, size in parts.items()]
    return "\n".join(("memory of one process, activations not counted", *lines))


def _length_of_run(settings: TrainSettings, mixture: Mixture, world_size: int) -> str:
    """Steps, samples and passes over the data."""
    optim = settings.optim
    samples = optim.num_steps * optim.accumulate * world_size * settings.data.batch_size
    unit = "packed rows" if settings.data.mode == "pack" else "samples"
    text = f"{optim.num_steps:,} steps of {samples // optim.num_steps:,} {unit}: {samples:,} {unit}"
    if mixture.epoch_length and settings.data.mode != "pack":
        text += f", {samples / mixture.epoch_length:.2f} passes over the data"
    return text


def _list_tasks(mixture: Mixture) -> str:
    """What is learned from which source, and how often."""
    total = sum(spec.weight for spec in mixture.specs)
    lines = [
        f"{spec.task or '(by row)':18}{spec.weight / total:>6.0%}  {spec.path}" for spec in mixture.specs
    ]
    return "\n".join(("tasks, share of the samples, source", *lines))


def _last_words(result: Result, folder: Path) -> str:
    """How a run ended, and what to do next."""
    curves = f"curves: {folder / REPORT_FILE}\n"
    if result.exit_code != EXIT_FINISHED:
        stopped = f"stopped after step {result.step} (exit code {result.exit_code})"
        return f"{stopped}; the same command goes on from there\n{curves}"
    talker = folder / TALKER_FOLDER
    talk = f'omni-adapter talk --model {talker} --text "Hello" --out reply.wav'
    return f"{talker} is ready; talk to it:\n    {talk}\n{curves}"


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that was held so far, by the accelerator or else the process."""
    if device.type != "cpu":
        return int(torch.accelerator.memory.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
