"""Sections about sound: from a question to the first of it, speaking in full, and the codec by itself.

A workshop in, rows of plain values out. All modes of a section take turns.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, get_args

import torch
from torch import Tensor

from omni_adapter.audio.codec import CodecStream, SnacCodec
from omni_adapter.audio.snac_decoder import CodecPrecision
from omni_adapter.bench.modes import Mode
from omni_adapter.bench.reference import ReferenceTalker, decode_alone
from omni_adapter.bench.running import first_audio, speak
from omni_adapter.bench.speed import Row, packed
from omni_adapter.bench.timing import Contestant, Spread, interleave, stopwatch, timer
from omni_adapter.bench.workshop import Workshop
from omni_adapter.engine import relative_error
from omni_adapter.errors import ConfigError, OmniError
from omni_adapter.talker import OmniAdapter

_BLOCK_S = 0.24  # sound that is handed over at once while the question is spoken
_FIRST_STEPS = 24  # of a reply that is broken off at its first sound
_CODEC_FRAMES = 24  # over which the error of less context is taken
_WHILE_SPOKEN: dict[str, dict[str, Any]] = {
    "while spoken": {},
    "while spoken, soonest": {"lookahead_frames": 0},
}


def compare_first_audio(workshop: Workshop) -> dict[str, Any]:
    """Time the way from the end of a question to the first sound."""
    settings = workshop.settings
    contestants: dict[str, Contestant] = {}
    waveform, rate = workshop.question()
    for name in workshop.references():
        reference = workshop.reference(name)
        _split(reference, waveform)  # warms up
        contestants[f"{name}/whole"] = timer(lambda r=reference: r.first_audio(waveform), workshop.device)  # type: ignore[misc]
    for mode in workshop.modes():
        contestants[f"{mode.name}/whole"] = whole = _whole(workshop, mode)
        whole()
    failures: dict[str, str] = {}
    for mode in packed(workshop.modes()):
        for question, options in _WHILE_SPOKEN.items():
            spoken = _while_spoken(workshop, mode, waveform, rate, options)
            try:
                spoken()
            except Exception as error:  # a talker that cannot hear so still has its other figures
                failures[mode.name] = " ".join(f"{type(error).__name__}: {error}".split())
            else:
                contestants[f"{mode.name}/{question}"] = spoken
    rounds = max(settings.rounds // 2, 1)
    workshop.say(f"first audio: {len(contestants)} kinds, {rounds} rounds")
    times = interleave(contestants, rounds=rounds, warm_up=0)
    base = times.get("reference_fp32/whole")
    rows = []
    for key, taken in times.items():
        name, question = key.split("/")
        row = {"mode": name, "question": question, **asdict(Spread.of(taken))}
        if base:
            row["speedup"] = Spread.of(base).median_s / row["median_s"]
        rows.append(row)
    split = [{"mode": name, **_split(workshop.reference(name), waveform)} for name in workshop.references()]
    return {"seconds": settings.seconds, "rows": rows, "reference_split": split, "not_available": failures}


def _whole(workshop: Workshop, mode: Mode) -> Contestant:
    """The question is handed over when it has ended."""
    stride, messages = workshop.settings.stride, workshop.messages()

    def contestant() -> float:
        with workshop.varied(mode.name, 0) as talker, stopwatch(workshop.device) as watch:
            first_audio(talker, messages, steps=_FIRST_STEPS, stride=stride)
        return watch.seconds

    return contestant


def _while_spoken(
    workshop: Workshop, mode: Mode, waveform: Tensor, rate: int, options: dict[str, Any]
) -> Contestant:
    """The question is handed over block by block, as it is spoken; only what follows its end counts.

    Blocks see no sound that is still to come, as for a talker that was trained with blocks of that length.
    """
    blocks = torch.split(waveform, round(_BLOCK_S * rate))

    def contestant() -> float:
        with workshop.varied(mode.name, 0) as talker:
            session = talker.session(
                hearing="blocks",
                block_seconds=_BLOCK_S,
                lookahead_seconds=0.0,
                max_new_tokens=_FIRST_STEPS,
                stride=workshop.settings.stride,
                **options,
            )
            for block in blocks[:-1]:
                session.append_audio(block, sampling_rate=rate)
            with stopwatch(workshop.device) as watch:
                session.append_audio(blocks[-1], sampling_rate=rate)
                if not any(len(chunk.audio) for chunk in session.reply()):
                    raise OmniError(f"nothing was said in {_FIRST_STEPS} steps")
            session.close()
        return watch.seconds

    return contestant


def _split(reference: ReferenceTalker, waveform: Tensor) -> dict[str, float]:
    """Where the published implementation's time to the first sound goes."""
    with stopwatch(reference.device) as encoding:
        frames = reference.encode(waveform)
    with stopwatch(reference.device) as reading:
        state = reference.read(frames)
    with stopwatch(reference.device) as stepping:
        for _ in range(reference.first_chunk_steps):
            reference.step(state)
    with stopwatch(reference.device) as decoding:
        reference.decode_chunk(state)
    return {
        "encoder_s": encoding.seconds,
        "prefill_s": reading.seconds,
        "steps_s": stepping.seconds,
        "codec_s": decoding.seconds,
    }


def compare_replies(workshop: Workshop) -> dict[str, Any]:
    """Time replies with sound: seconds of work per second of speech once it has begun."""
    settings, rows = workshop.settings, []
    rounds = max(settings.rounds // 2, 1)
    factors: dict[tuple[str, bool], list[float]] = {}
    for turn in range(rounds):
        workshop.say(f"reply: round {turn + 1} of {rounds}")
        for mode in packed(workshop.modes()):
            for text_runs in (True, False):
                with workshop.varied(mode.name, 0) as talker:
                    spoken = _reply(talker, workshop, text_runs=text_runs)
                factors.setdefault((mode.name, text_runs), []).append(spoken)
    for (name, text_runs), found in factors.items():
        spread = Spread.of(found)
        rows.append(
            {
                "mode": name,
                "text_runs": text_runs,
                "real_time_factor": spread.median_s,
                "min": spread.min_s,
                "max": spread.max_s,
                "n": spread.n,
            }
        )
    return {"steps": settings.reply_steps, "stride": settings.stride, "rows": rows}


def _reply(talker: OmniAdapter, workshop: Workshop, *, text_runs: bool) -> float:
    """The real-time factor of a reply whose text never ends, or ends at once."""
    config, settings = talker.config, workshop.settings
    vocabulary = talker.model.backbone.vocab_size
    ends = (vocabulary,) if text_runs else tuple(range(vocabulary))
    talker.config = replace(config, text_end_ids=ends)
    try:
        conversations = [workshop.messages()]
        spoken = speak(talker, conversations, steps=settings.reply_steps, stride=settings.stride)
    finally:
        talker.config = config
    return spoken.steady_real_time_factor or spoken.real_time_factor


def compare_codec(workshop: Workshop) -> dict[str, Any]:
    """Time a chunk of sound: streamed exactly, with less right context, and as published."""
    settings, plain = workshop.settings, workshop.talker("plain").codec
    spec = plain.spec
    codecs: dict[str, Any] = {"exact": plain}
    if isinstance(plain, SnacCodec):
        for precision in set(get_args(CodecPrecision)) - {plain.precision}:
            packed_codec = copy.deepcopy(plain)
            try:
                packed_codec.pack(precision)
            except ConfigError as error:
                workshop.say(f"codec, products in {precision}: {error}")
            else:
                codecs[f"exact, products in {precision}"] = packed_codec
    ways: dict[str, tuple[Any, dict[str, Any]]] = {name: (codec, {}) for name, codec in codecs.items()}
    for frames in range(-(-plain.context_samples[1] // spec.samples_per_frame)):
        ways[f"{frames} frames of right context"] = (plain, {"lookahead_frames": frames})
    size = (spec.num_codebooks, max(_CODEC_FRAMES, settings.stride))
    codes = torch.randint(spec.codebook_size, size, generator=torch.Generator().manual_seed(0))
    codes = codes.to(workshop.device)
    chunk = codes[:, : settings.stride]
    contestants = {name: _pushing(*way, chunk, workshop.device) for name, way in ways.items()}
    if isinstance(plain, SnacCodec):
        alone: Callable[[], Tensor] = lambda: decode_alone(plain, chunk, spec)  # noqa: E731
        contestants["published"] = timer(torch.inference_mode()(alone), workshop.device)
    workshop.say(f"codec: {', '.join(contestants)}")
    times = interleave(contestants, rounds=settings.rounds, repeats=4, warm_up=3)
    whole = plain.decode(codes[None])[0]
    rows: list[Row] = []
    for name, taken in times.items():
        spread = Spread.of([seconds / settings.stride for seconds in taken])
        row: Row = {"decoding": name, **asdict(spread)}
        if name in ways:
            row["error"] = relative_error(_streamed(*ways[name], codes, settings.stride), whole)
        rows.append(row)
    return {"stride": settings.stride, "frame_s": 1 / spec.frame_rate_hz, "rows": rows}


def _pushing(codec: Any, options: dict[str, Any], codes: Tensor, device: torch.device) -> Contestant:
    """The next chunk of a stream that goes on and on."""
    stream = CodecStream(codec, **options)
    return timer(lambda: stream.push(codes), device)


def _streamed(codec: Any, options: dict[str, Any], codes: Tensor, stride: int) -> Tensor:
    """Sound of codes [K, T] that come in chunks."""
    stream = CodecStream(codec, **options)
    return torch.cat([*(stream.push(chunk) for chunk in torch.split(codes, stride, dim=-1)), stream.finish()])
