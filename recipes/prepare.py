"""Encode a data set's recordings once, so that training reads codes instead of sound.

    python recipes/prepare.py data/stories --out stories-codes --column audio=audio_out --column text=text_out
    accelerate launch recipes/prepare.py chats.jsonl --out chats-codes --speak audio_out --voice flite:slt
    python recipes/prepare.py chats.jsonl --out chats-codes --speak audio_out --engine ray --workers 64
    python recipes/prepare.py libritts:train.clean.100 --out libritts-codes

The source is a published data set by name, a folder or file of audio, JSON lines or parquet, or a data set of
the Hub. A killed run goes on where it stopped when the same command is run again. Bad rows are listed in
quarantine.jsonl; too many of them end the run.

With --engine ray the workers of a Ray cluster do the work, each with its own codec and encoder; killed ones
are replaced. Source, folder and models must be at the same paths on all machines. The files are those of a
single process, bit for bit, where processors and threads (--worker-cpus, OMP_NUM_THREADS) are alike.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast, get_args

import torch
import typer
from accelerate import PartialState
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import Tensor

from omni_adapter import SnacCodec
from omni_adapter.audio.clips import Clips, encoder_mark
from omni_adapter.config import EncoderPadding, parse
from omni_adapter.data.prepare import Preparation, PrepareSettings, Totals
from omni_adapter.data.prepare_ray import Pool, import_ray, run_on_ray
from omni_adapter.data.sources import SourceSpec
from omni_adapter.data.synthesis import make_synthesizer
from omni_adapter.errors import ConfigError, OmniError
from omni_adapter.modules.audio_encoder import AudioEncoder

SECONDS_AN_HOUR = 3600
ENGINES = ("local", "ray")


class Encoder:
    """An audio encoder that turns waveforms into frames."""

    def __init__(
        self,
        name: str,
        *,
        padding: EncoderPadding,
        device: torch.device,
        block_seconds: float | None = None,
    ) -> None:
        self._encoder, self._padding = AudioEncoder.from_pretrained(name).to(device), padding
        self._log_mel = self._encoder.log_mel()
        self._block_steps = self._encoder.block_steps(block_seconds)
        self.mark = encoder_mark(self._encoder.fingerprint(), padding=padding, block_seconds=block_seconds)

    @torch.no_grad()
    def frames(self, waveform: Tensor) -> Tensor:
        """Return frames [A', E] of a waveform [N]."""
        device = next(self._encoder.parameters()).device
        block_frames = self._block_steps and self._block_steps * self._encoder.stride
        windows = self._log_mel.windows(waveform, padding=self._padding, block_frames=block_frames)
        clips = Clips.of([windows]).to(device)
        frames, lengths = self._encoder(
            clips.features, clips.lengths, padding=self._padding, block_steps=self._block_steps
        )
        return torch.cat([window[:length] for window, length in zip(frames, lengths.tolist(), strict=True)])


def make_encoder(
    name: str | None, padding: str, device: torch.device, *, block_seconds: float | None = None
) -> Encoder | None:
    """The encoder that was asked for."""
    if padding not in get_args(EncoderPadding):
        raise ConfigError(f"padding must be one of {', '.join(get_args(EncoderPadding))}, got {padding!r}")
    if block_seconds is not None and padding != "true_length":
        raise ConfigError(f"--block-seconds goes with --padding true_length, got {padding!r}")
    if not name:
        return None
    return Encoder(name, padding=cast(EncoderPadding, padding), device=device, block_seconds=block_seconds)


@dataclass(frozen=True)
class Job:
    """What is made of what, in plain values that other machines can be sent."""

    spec: SourceSpec
    out: str
    settings: PrepareSettings
    codec: str
    encoder: str | None
    padding: str
    block_seconds: float | None
    voice: str

    def open(self, device: torch.device) -> Preparation:
        """Open it, with models on ``device``."""
        return Preparation(
            self.spec,
            self.out,
            codec=SnacCodec.from_pretrained(self.codec).to(device),
            settings=self.settings,
            listener=make_encoder(self.encoder, self.padding, device, block_seconds=self.block_seconds),
            synthesizer=make_synthesizer(self.voice, device=device) if self.settings.speak else None,
        )


class Rate(ProgressColumn):
    """Rows a second, over the last minute."""

    def render(self, task: Task) -> Text:
        """Return the rate, once there is one."""
        return Text(f"{task.speed:.1f} rows/s" if task.speed else "")


def prepare(  # noqa: PLR0913 - one option each
    source: Annotated[str, typer.Argument(help="published data set by name, file, folder or Hub id")],
    out: Annotated[str, typer.Option(help="folder to write")],
    task: Annotated[str | None, typer.Option(help="task that every row must be able to serve")] = None,
    column: Annotated[list[str] | None, typer.Option(help="theirs=ours; repeatable")] = None,
    recipe: Annotated[str | None, typer.Option(help="published data set that it is a copy of")] = None,
    codec: Annotated[str, typer.Option(help="codec: Hub id or folder")] = "hubertsiuzdak/snac_24khz",
    encoder: Annotated[
        str | None, typer.Option(help="audio encoder: keep its frames of questions too")
    ] = None,
    padding: Annotated[
        str, typer.Option(help="the talker's: true_length, window, mini_omni")
    ] = "true_length",
    block_seconds: Annotated[
        float | None, typer.Option(help="the talker's encoder_block_seconds, where it hears in blocks")
    ] = None,
    speak: Annotated[
        list[str] | None, typer.Option(help="audio_in or audio_out: speak it where missing")
    ] = None,
    voice: Annotated[
        str, typer.Option(help="espeak-ng[:voice], flite[:voice] or transformers:MODEL")
    ] = "espeak-ng",
    split: Annotated[str, typer.Option(help="split of a Hub data set")] = "train",
    limit: Annotated[int | None, typer.Option(help="only so many rows")] = None,
    shard_rows: Annotated[int, typer.Option(help="rows of a shard")] = PrepareSettings.shard_rows,
    max_bad: Annotated[float, typer.Option(help="largest share of bad rows")] = PrepareSettings.max_bad,
    max_seconds: Annotated[float, typer.Option(help="longest recording")] = PrepareSettings.max_seconds,
    engine: Annotated[str, typer.Option(help="local: this process and those beside it; or ray")] = "local",
    workers: Annotated[int | None, typer.Option(help="ray: workers; all that there is room for")] = None,
    worker_cpus: Annotated[int | None, typer.Option(help="ray: cores and threads of a worker; 1")] = None,
    worker_gpus: Annotated[
        float | None, typer.Option(help="ray: GPUs of a worker, such as 0.5; 1 where there are any")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="ray: of the cluster; RAY_ADDRESS, or a new one on this machine")
    ] = None,
) -> None:
    """Encode recordings into sharded parquet; speak texts that have none."""
    state = PartialState()
    asked = {"workers": workers, "cpus": worker_cpus, "gpus": worker_gpus, "address": ray_address}
    pool = make_pool(engine, {name: value for name, value in asked.items() if value is not None})
    if wrong := [pair for pair in column or () if "=" not in pair]:
        raise ConfigError(f"--column takes theirs=ours, such as audio=audio_out; got {wrong[0]!r}")
    columns = dict(pair.split("=", 1) for pair in column or ())
    spec = parse(
        SourceSpec,
        {
            "path": anywhere(source),
            "task": task,
            "columns": columns,
            "recipe": recipe,
            "split": split,
            "limit": limit,
        },
        source="command line",
    )
    settings = parse(
        PrepareSettings,
        {
            "shard_rows": shard_rows,
            "max_bad": max_bad,
            "max_seconds": max_seconds,
            "speak": tuple(speak or ()),
        },
        source="command line",
    )
    job = Job(
        spec,
        os.path.abspath(out),
        settings,
        codec=anywhere(codec),
        encoder=encoder and anywhere(encoder),
        padding=padding,
        block_seconds=block_seconds,
        voice=voice,
    )
    if pool is not None:
        if state.num_processes > 1:
            raise ConfigError(
                f"--engine ray starts its own workers; run one process, got {state.num_processes}"
            )
        work = job.open(torch.device("cpu"))

        def on_ray(shards: Sequence[int], progress: Callable[[int, float], None]) -> None:
            run_on_ray(work, shards, open_work=job.open, pool=pool, progress=progress)

        run(work, work.pending(), on_ray, show=True)
    else:
        with state.main_process_first():
            work = job.open(state.device)
            pending = work.pending()
        state.wait_for_everyone()
        # Every process keeps its share; what one of them loses, the next run makes up for.
        with state.split_between_processes(pending) as mine:
            run(
                work,
                mine,
                lambda shards, progress: work.run(shards, progress=progress),
                show=state.is_main_process,
            )
        state.wait_for_everyone()
    if state.is_main_process:
        report(work.finish(), out)


def make_pool(engine: str, asked: dict[str, object]) -> Pool | None:
    """The workers that were asked for; None for the local engine."""
    if engine not in ENGINES:
        raise ConfigError(f"--engine must be {' or '.join(ENGINES)}, got {engine!r}")
    if engine == "ray":
        import_ray()
        return parse(Pool, asked, source="command line")
    if asked:
        raise ConfigError(
            "--workers, --worker-cpus, --worker-gpus and --ray-address belong to --engine ray; "
            "accelerate launch --num_processes N gives the local engine more processes"
        )
    return None


def anywhere(name: str) -> str:
    """A file or folder by its whole path, for processes that start elsewhere; other names as they are."""
    return os.path.abspath(name) if "*" in name or Path(name).exists() else name


def run(
    work: Preparation,
    shards: list[int],
    engine: Callable[[Sequence[int], Callable[[int, float], None]], None],
    *,
    show: bool,
) -> None:
    """Let an engine make shards under a bar with rate and time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TextColumn("{task.fields[hours]:.2f} h of speech"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not show, speed_estimate_period=60) as bar:
        size = work.settings.shard_rows
        total = sum(min(size, work.num_rows - shard * size) for shard in shards)
        done = bar.add_task("prepare", total=total, hours=0.0)
        seconds = 0.0

        def advance(rows: int, more: float) -> None:
            nonlocal seconds
            seconds += more
            bar.update(done, advance=rows, hours=seconds / SECONDS_AN_HOUR)

        engine(shards, advance)


def report(totals: Totals, out: str) -> None:
    """Say what was made."""
    hours = {name: seconds / SECONDS_AN_HOUR for name, seconds in totals.seconds.items()}
    print(
        f"{totals.rows} rows in {out}: {hours['seconds_in']:.2f} h of questions, "
        f"{hours['seconds_out']:.2f} h of answers; {totals.rejected} rows in quarantine"
    )


def main() -> None:
    """Run the command; problems with the data or the settings are one message, not a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        typer.run(prepare)
    except OmniError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
