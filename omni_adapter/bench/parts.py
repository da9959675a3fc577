"""Measure how fast a talker is: each part alone, then a whole reply.

A talker, or the name of a preset with random weights of true size, in; a ``Report`` out, as data or as a
table. Uses the pieces that ``OmniAdapter.stream`` is made of, not copies of them.
"""

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from omni_adapter.audio.codec import CodecStream
from omni_adapter.bench.machine import describe_machine, peak_bytes, resident_bytes
from omni_adapter.bench.presets import make_question
from omni_adapter.data.collator import Batch, Sample, collate
from omni_adapter.data.layout import get_task
from omni_adapter.errors import ConfigError
from omni_adapter.generation.generator import Decoder, GenerationSettings, Step
from omni_adapter.generation.streaming import Chunk
from omni_adapter.talker import OmniAdapter
from omni_adapter.vocab import NO_TEXT

FORMAT_VERSION = 1
MEASURES = (
    "features",
    "encoder",
    "prefill",
    "step_parallel",
    "step_batch_parallel",
    "step_speech_only",
    "step_text_only",
    "codec_chunk",
    "reply",
)
"""What can be measured, in the order in which it is."""

_SPARE = 64  # steps that a reply may take beyond those that are timed; memory is taken for all of them
_SHORTEST = 16  # steps of a reply that bring some sound under every usual delay pattern
_WARM_UP_STEPS = 3


@dataclass(frozen=True)
class BenchSettings:
    """How to measure.

    Attributes:
        seconds: length of the question.
        steps: decoding steps that are timed, and of the whole reply.
        rounds: repetitions of everything else, after one that warms up.
        stride: frames per chunk of sound.
        only: names out of ``MEASURES``; empty for all.
    """

    seconds: float = 3.0
    steps: int = 40
    rounds: int = 5
    stride: int = 4
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = sorted(set(self.only) - set(MEASURES))
        if unknown:
            raise ConfigError(f"cannot measure {', '.join(unknown)}; known are {', '.join(MEASURES)}")
        for name in ("seconds", "steps", "rounds", "stride"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class Timing:
    """Times of one piece of work, in seconds.

    Attributes:
        name: out of ``MEASURES``, or ``first_text`` and ``first_audio`` of the whole reply.
        what: the same in words.
        median_s: of all repetitions.
        min_s: likewise.
        max_s: likewise.
        count: repetitions.
    """

    name: str
    what: str
    median_s: float
    min_s: float
    max_s: float
    count: int


@dataclass(frozen=True)
class Report:
    """What was measured; ``dataclasses.asdict`` gives plain JSON.

    Attributes:
        format_version: of these keys.
        subject: what was measured: name, parameters by weight group, type, device.
        machine: where: processor, cores, load (of the last minute, processes), threads, versions.
        settings: how: seconds, steps, rounds, stride.
        prompt_steps: steps of the prompt.
        frame_s: sound that one decoding step makes, seconds.
        timings: each part, and the first text and sound of a whole reply.
        real_time_factor: of the whole reply: seconds of work per second of sound; below 1 keeps up.
        steady_real_time_factor: likewise, after the first sound.
        load_s: seconds until the talker was ready.
        memory_after_load_bytes: resident memory then; None where the system does not tell.
        peak_memory_bytes: largest resident memory; likewise.
    """

    format_version: int
    subject: dict[str, Any]
    machine: dict[str, Any]
    settings: dict[str, Any]
    prompt_steps: int
    frame_s: float
    timings: list[Timing]
    real_time_factor: float | None
    steady_real_time_factor: float | None
    load_s: float
    memory_after_load_bytes: int | None
    peak_memory_bytes: int | None


def measure(load: Callable[[], OmniAdapter], *, name: str, settings: BenchSettings | None = None) -> Report:
    """Time a talker.

    Args:
        load: makes it; that is timed too.
        name: what to call it.
        settings: how to measure.
    """
    settings = settings or BenchSettings()
    started_s = time.perf_counter()
    talker = load()
    load_s = time.perf_counter() - started_s
    loaded_bytes = resident_bytes()
    work = _Work(talker, settings)
    timings = [timing for timing in _parts(work) if timing]
    real_time_factor = steady = None
    if work.wants("reply"):
        replies, real_time_factor, steady = _replies(work)
        timings += replies
    return Report(
        format_version=FORMAT_VERSION,
        subject=_subject(talker, name),
        machine=describe_machine(talker.model.device),
        settings={
            "seconds": settings.seconds,
            "steps": settings.steps,
            "rounds": settings.rounds,
            "stride": settings.stride,
        },
        prompt_steps=work.batch.grid.shape[-1],
        frame_s=1 / talker.codec.spec.frame_rate_hz,
        timings=timings,
        real_time_factor=real_time_factor,
        steady_real_time_factor=steady,
        load_s=load_s,
        memory_after_load_bytes=loaded_bytes,
        peak_memory_bytes=peak_bytes(),
    )


# --- what is timed ---


class _Work:
    """A question, laid out, and the means to decode it."""

    def __init__(self, talker: OmniAdapter, settings: BenchSettings) -> None:
        self.talker, self.settings = talker, settings
        self.rate = talker.processor.log_mel.sampling_rate
        self.question = make_question(settings.seconds, self.rate)
        self.messages = [
            {"role": "user", "content": [{"type": "audio", "audio": (self.question, self.rate)}]}
        ]
        self.sample = talker.processor(self.messages, task="speech_to_speech")
        batch = collate([self.sample], rules=talker.processor.rules)
        self.batch: Batch = batch.to(talker.model.device)

    def wants(self, name: str) -> bool:
        return not self.settings.only or name in self.settings.only

    def decoder(
        self, task: str, *, batch_parallel: bool, text_end_ids: Sequence[int] = (NO_TEXT,)
    ) -> Decoder:
        """A decoder whose text never ends, unless told otherwise."""
        return Decoder(
            self.talker.model,
            rules=self.talker.processor.rules,
            task=get_task(task),
            text_end_ids=text_end_ids,
            settings=GenerationSettings(
                max_new_tokens=self.settings.steps + _WARM_UP_STEPS + _SPARE, batch_parallel=batch_parallel
            ),
        )

    def time(self, name: str, what: str, action: Callable[[], object]) -> Timing | None:
        """Time ``action`` in rounds, after one that warms up."""
        if not self.wants(name):
            return None
        times = [self._time_once(action) for _ in range(self.settings.rounds + 1)]
        return _timing(name, what, times[1:])

    def time_steps(self, name: str, what: str, decoder: Decoder, sample: Sample) -> Timing | None:
        """Time decoding steps, each with the choice of ids before it, after three that warm up."""
        if not self.wants(name):
            return None
        times: list[float] = []
        wanted = self.settings.steps + _WARM_UP_STEPS
        while len(times) < wanted:  # a reply that happens to end is begun again
            with closing(decoder.run([sample])) as steps:
                next(steps)
                times += _times_of(steps, wanted - len(times), self._synchronise)
        return _timing(name, what, times[_WARM_UP_STEPS:])

    def _time_once(self, action: Callable[[], object]) -> float:
        self._synchronise()
        started_s = time.perf_counter()
        action()
        self._synchronise()
        return time.perf_counter() - started_s

    def _synchronise(self) -> None:
        device = self.talker.model.device
        if device.type != "cpu":
            torch.accelerator.synchronize(device)


def _times_of(steps: Iterator[Step], count: int, synchronise: Callable[[], None]) -> list[float]:
    """Seconds of each of the next ``count`` steps, or fewer if they end."""
    times = []
    for _ in range(count):
        started_s = time.perf_counter()
        if next(steps, None) is None:
            break
        synchronise()
        times.append(time.perf_counter() - started_s)
    return times


def _parts(work: _Work) -> Iterator[Timing | None]:
    """Time each part alone."""
    talker, batch, settings = work.talker, work.batch, work.settings
    waveform = torch.from_numpy(work.question)
    log_mel, padding = talker.processor.log_mel, talker.config.encoder_padding
    yield work.time(
        "features",
        f"log-mel features of {settings.seconds:g} s",
        lambda: log_mel.windows(waveform, padding=padding),
    )
    clips = batch.clips
    assert clips is not None
    with torch.inference_mode():
        yield work.time(
            "encoder",
            f"audio encoder and adapter, {settings.seconds:g} s",
            lambda: talker.model.hear(clips),
        )
    # The same number of steps without the recording, so that the encoder is not timed again.
    unheard = replace(batch, places=(), clips=None)
    speech = work.decoder("speech_to_speech", batch_parallel=True)
    steps = batch.grid.shape[-1]
    yield work.time("prefill", f"prefill of {steps} steps, encoder excluded", lambda: speech.prefill(unheard))
    yield from _steps(work, speech)
    spec = talker.codec.spec
    stream = CodecStream(talker.codec)
    codes = torch.randint(spec.codebook_size, (spec.num_codebooks, settings.stride))
    codes = codes.to(talker.model.device)
    yield work.time(
        "codec_chunk",
        f"codec, a chunk of {settings.stride} frames ({settings.stride / spec.frame_rate_hz * 1000:.0f} ms)",
        lambda: stream.push(codes),
    )


def _steps(work: _Work, speech: Decoder) -> Iterator[Timing | None]:
    """Time a decoding step in each of its kinds."""
    every_id = range(work.talker.model.backbone.vocab_size)
    written = work.talker.processor(work.messages, task="speech_to_text")
    for name, what, decoder, sample in (
        (
            "step_parallel",
            "step, text and codes in one row",
            work.decoder("speech_to_speech", batch_parallel=False),
            work.sample,
        ),
        ("step_batch_parallel", "step, text in a row of its own", speech, work.sample),
        (
            "step_speech_only",
            "step, codes only (the text has ended)",
            work.decoder("speech_to_speech", batch_parallel=True, text_end_ids=every_id),
            work.sample,
        ),
        (
            "step_text_only",
            "step, text only (no speech wanted)",
            work.decoder("speech_to_text", batch_parallel=False),
            written,
        ),
    ):
        yield work.time_steps(name, what, decoder, sample)


def _replies(work: _Work) -> tuple[list[Timing], float | None, float | None]:
    """Time whole replies: first text, first sound, real-time factors (medians)."""
    settings, first_texts, first_sounds, factors, steady_factors = work.settings, [], [], [], []
    for _ in range(settings.rounds + 1):
        chunks = list(
            work.talker.stream(
                (work.question, work.rate),
                max_new_tokens=max(settings.steps, _SHORTEST),
                stride=settings.stride,
            )
        )
        texts = [chunk.elapsed_s for chunk in chunks if chunk.text]
        sounds = [chunk for chunk in chunks if len(chunk.audio)]
        first_texts.append(texts[0] if texts else None)
        first_sounds.append(sounds[0].elapsed_s if sounds else None)
        factors.append(_factor(sounds, chunks[-1].elapsed_s))
        steady_factors.append(
            _factor(sounds[1:], chunks[-1].elapsed_s - sounds[0].elapsed_s) if sounds else None
        )
    timings = [
        _timing(name, what, known)
        for name, what, times in (
            ("first_text", "from the question to the first text", first_texts),
            ("first_audio", "from the question to the first sound", first_sounds),
        )
        if (known := [seconds for seconds in times[1:] if seconds is not None])
    ]
    return timings, _median(factors[1:]), _median(steady_factors[1:])


def _factor(sounds: Sequence[Chunk], seconds: float) -> float | None:
    """Seconds of work per second of sound."""
    samples = sum(len(chunk.audio) for chunk in sounds)
    return seconds * sounds[0].sampling_rate / samples if samples else None


def _median(values: Collection[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _timing(name: str, what: str, times: Sequence[float]) -> Timing:
    return Timing(name, what, statistics.median(times), min(times), max(times), len(times))


def _subject(talker: OmniAdapter, name: str) -> dict[str, Any]:
    groups = talker.model.groups()
    codec = talker.codec
    weights: Iterator[Tensor] = codec.parameters() if isinstance(codec, torch.nn.Module) else iter(())
    parameters = {group: sum(p.numel() for p in members.values()) for group, members in groups.items()}
    return {
        "name": name,
        "dtype": str(talker.model.backbone.dtype).removeprefix("torch."),
        "device": str(talker.model.device),
        "parameters": {**parameters, "codec": sum(weight.numel() for weight in weights)},
    }


# --- the table ---


def show(report: Report, console: Console) -> None:
    """Print a report for people."""
    subject, machine = report.subject, report.machine
    millions = sum(subject["parameters"].values()) / 1e6
    where = machine["accelerator"] or f"{machine['processor']}, {machine['threads']} threads"
    console.print(Text(f"{subject['name']}: {millions:,.0f} M parameters, {subject['dtype']}", style="bold"))
    console.print(Text(f"on {where}, torch {machine['torch']}", style="dim"))
    table = Table()
    table.add_column("milliseconds", no_wrap=True)
    for title in ("median", "min - max", "n"):
        table.add_column(title, justify="right")
    for timing in report.timings:
        span = f"{_milliseconds(timing.min_s)} - {_milliseconds(timing.max_s)}"
        table.add_row(timing.what, _milliseconds(timing.median_s), span, str(timing.count))
    console.print(table)
    console.print(f"one step makes {report.frame_s * 1000:.1f} ms of sound")
    if report.real_time_factor is not None:
        steady = report.steady_real_time_factor
        after = f", {steady:.2f} after the first sound" if steady is not None else ""
        console.print(f"real-time factor {report.real_time_factor:.2f}{after} (below 1 keeps up with speech)")
    if report.peak_memory_bytes is not None:
        console.print(f"memory at most {report.peak_memory_bytes / 2**30:.2f} GiB")
    console.print(f"ready after {report.load_s:.1f} s")


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.1f}"
