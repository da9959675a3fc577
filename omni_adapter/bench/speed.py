"""Sections about decoding steps: what one costs beside its floor; in long replies; for many at once; by size.

A workshop in, rows of plain values out. All modes of a section take turns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from omni_adapter.bench.bandwidth import BandwidthMeter, summarise
from omni_adapter.bench.modes import MODES, Mode, StepWeights, why_not
from omni_adapter.bench.presets import PRESETS, SHAPES, question_for, random_talker
from omni_adapter.bench.running import running, speak, speak_served
from omni_adapter.bench.timing import Contestant, Spread, interleave
from omni_adapter.bench.workshop import Workshop
from omni_adapter.talker import OmniAdapter

Row = dict[str, Any]
_WARM_UP = 3
_SPEAKING_ROUNDS = 1
_MANY_STEPS = 4  # in each round
_SIZE_MODES = ("int8",)


def frame_seconds(talker: OmniAdapter) -> float:
    """Sound that a step makes."""
    return 1 / talker.codec.spec.frame_rate_hz


def compare_steps(workshop: Workshop) -> dict[str, Any]:
    """Time a step with its heads and draws in every mode, beside the published implementation."""
    settings = workshop.settings
    contestants: dict[str, Contestant] = {}
    rows: dict[str, Row] = {}
    count = settings.rounds * settings.steps + _WARM_UP
    for variant in workshop.variants:
        for name in workshop.references():
            running = workshop.running_reference(name, variant=variant)
            key = f"{name}/{variant}"
            contestants[key] = running
            model, post = running.reference.model, running.reference.post
            rows[key] = _row(name, variant, text_runs=True, num_bytes=model.step_weight_bytes(post=post))
        for mode in workshop.modes():
            for text_runs in (True, False):
                key = f"{mode.name}/{variant}/{text_runs}"
                contestants[key] = workshop.running(
                    mode.name, variant=variant, text_runs=text_runs, steps=count
                )
                weights = workshop.weights.total(text_runs=text_runs, tts_layers=variant != 0)
                rows[key] = _row(
                    mode.name, variant, text_runs=text_runs, num_bytes=weights * mode.weight_bytes
                )
    workshop.say(f"steps: {len(contestants)} kinds, {settings.rounds} rounds of {settings.steps}")
    times, bandwidth = _with_bandwidth(workshop, contestants)
    frame_s = frame_seconds(workshop.talker("plain"))
    for key, row in rows.items():
        row |= asdict(Spread.of(times[key]))
        row["floor_s"] = row["weight_bytes"] / bandwidth["bytes_per_s"]
        row["floor_ratio"] = row["median_s"] / row["floor_s"]
        row["real_time_factor"] = row["median_s"] / frame_s
        base = times.get(f"reference_fp32/{row['tts_layers']}")
        if base:
            row["speedup"] = Spread.of(base).median_s / row["median_s"]
    return {"frame_s": frame_s, "bandwidth": bandwidth, "rows": list(rows.values())}


def _with_bandwidth(
    workshop: Workshop, contestants: Mapping[str, Contestant]
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Times of contestants, with memory read between their rounds."""
    settings = workshop.settings
    meter = BandwidthMeter(workshop.device, size_bytes=settings.bandwidth_bytes)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    rates = meter.measure(1)
    for rates_of in rates.values():
        rates_of.clear()  # the first round warmed up
    for turn in range(settings.rounds):
        warm_up = 0 if turn else _WARM_UP
        taken = interleave(contestants, rounds=1, repeats=settings.steps, warm_up=warm_up, first_round=turn)
        for name, seconds in taken.items():
            times[name] += seconds
        for way, measured in meter.measure(settings.bandwidth_rounds).items():
            rates[way] += measured
        workshop.say(f"round {turn + 1} of {settings.rounds}")
    return times, asdict(summarise(rates))


def _row(mode: str, variant: int | None, *, text_runs: bool, num_bytes: int) -> Row:
    return {"mode": mode, "tts_layers": variant, "text_runs": text_runs, "weight_bytes": num_bytes}


def compare_length(workshop: Workshop) -> dict[str, Any]:
    """Time steps over a long reply: whether what was said makes the next step dearer."""
    settings = workshop.settings
    block = max(settings.length_steps // 32, 1)
    contestants = {
        mode.name: workshop.running(mode.name, steps=settings.length_steps + _WARM_UP)
        for mode in packed(workshop.modes())
    }
    workshop.say(f"length: {settings.length_steps} steps of {', '.join(contestants)}")
    times = interleave(contestants, rounds=settings.length_steps // block, repeats=block, warm_up=_WARM_UP)
    rows = []
    for name, taken in times.items():
        early, late = _around(taken, min(10, len(taken) // 4)), _around(taken, len(taken) - 1)
        curve = [
            [start + block // 2, Spread.of(taken[start : start + block]).median_s]
            for start in range(0, len(taken), block)
        ]
        rows.append({"mode": name, "early_s": early, "late_s": late, "ratio": late / early, "curve": curve})
    for name in workshop.references():
        running = workshop.running_reference(name)
        last = min(settings.length_steps, running.reference.model.shape.context_steps // 2)
        curve = []
        for step in (10, last):
            running.go_to(step)
            taken = [running() for _ in range(settings.steps + 1)][1:]
            curve.append([step, Spread.of(taken).median_s])
        (_, early), (_, late) = curve
        rows.append({"mode": name, "early_s": early, "late_s": late, "ratio": late / early, "curve": curve})
    return {"steps": settings.length_steps, "rows": rows}


def _around(times: Sequence[float], step: int, *, reach: int = 8) -> float:
    """Median of the steps near one."""
    return Spread.of(times[max(step - reach, 0) : step + reach + 1]).median_s


def compare_many(workshop: Workshop) -> dict[str, Any]:
    """Time steps of several conversations at once, beside as many in turn."""
    settings, rows = workshop.settings, []
    rounds, steps = -(-settings.rounds // 2), min(settings.steps, _MANY_STEPS)
    for mode in packed(workshop.modes()):
        workshop.say(f"many: {mode.name}, {', '.join(map(str, settings.conversations))} at once")
        count = rounds * steps + _WARM_UP
        contestants = {
            str(number): workshop.running(mode.name, count=number, steps=count)
            for number in settings.conversations
        }
        times = interleave(contestants, rounds=rounds, repeats=steps, warm_up=_WARM_UP)
        alone = Spread.of(times[str(settings.conversations[0])]).median_s / settings.conversations[0]
        for number in settings.conversations:
            spread = Spread.of(times[str(number)])
            row = {"mode": mode.name, "conversations": number, **asdict(spread)}
            row["throughput_ratio"] = number * alone / spread.median_s
            rows.append(row)
    return {"rows": rows, "speaking": _speaking_at_once(workshop)}


def _speaking_at_once(workshop: Workshop) -> list[Row]:
    """The same with sound, from the question to the last chunk."""
    settings, rows = workshop.settings, []
    numbers = sorted({1, max(settings.conversations)})
    for mode in packed(workshop.modes()):
        factors: dict[int, list[float]] = {number: [] for number in numbers}
        with workshop.varied(mode.name, 0) as talker:
            for turn in range(_SPEAKING_ROUNDS):
                workshop.say(f"many, speaking: {mode.name}, round {turn + 1} of {_SPEAKING_ROUNDS}")
                for number in numbers:
                    factors[number].append(_factor(talker, workshop, number))
        medians = {number: Spread.of(found).median_s for number, found in factors.items()}
        rows += [
            {
                "mode": mode.name,
                "conversations": number,
                "steps": settings.conversation_steps,
                "real_time_factor": medians[number] * number,
                "throughput_ratio": medians[1] / medians[number],
            }
            for number in numbers
        ]
    return rows


def _factor(talker: OmniAdapter, workshop: Workshop, number: int) -> float:
    """Seconds of work per second of sound: streamed alone, or many through a server."""
    options = {"steps": workshop.settings.conversation_steps, "stride": workshop.settings.stride}
    conversations = [workshop.messages()] * number
    if number == 1:
        return speak(talker, conversations, **options).real_time_factor
    return speak_served(talker, conversations, **options)


def compare_sizes(workshop: Workshop) -> dict[str, Any]:
    """Time steps of talkers of several sizes, one at a time, with random weights."""
    workshop.release()
    modes = [
        mode
        for mode in MODES
        if mode.name in _SIZE_MODES and mode.name not in workshop.failures and why_not(mode) is None
    ] or [mode for mode in MODES if mode.precision is None]
    meter = BandwidthMeter(workshop.device, size_bytes=workshop.settings.bandwidth_bytes)
    meter.measure(1)
    rows = []
    for size in workshop.settings.sizes:
        for mode in modes:
            workshop.say(f"size {size}: {mode.name}")
            rows.append(_time_size(workshop, size, mode, meter))
    return {"rows": rows}


def _time_size(workshop: Workshop, size: str, mode: Mode, meter: BandwidthMeter) -> Row:
    settings, preset = workshop.settings, SHAPES[size]
    loading: dict[str, Any] = {"precision": mode.precision} if mode.precision else {}
    dtype = "bfloat16" if mode.precision else "float32"
    talker = random_talker(preset, tts_layers=0, dtype=dtype, **loading).to(workshop.device)
    weights = StepWeights.of_preset(PRESETS[preset])
    question = question_for(talker, settings.seconds)
    step = running(talker, question, steps=settings.steps * settings.rounds + _WARM_UP)
    times = interleave({"step": step}, rounds=settings.rounds, repeats=settings.steps, warm_up=_WARM_UP)
    bandwidth = summarise(meter.measure(settings.bandwidth_rounds))
    num_bytes = weights.total(text_runs=True, tts_layers=False) * mode.weight_bytes
    spread = Spread.of(times["step"])
    return {
        "size": size,
        "preset": preset,
        "mode": mode.name,
        "weights": weights.total(text_runs=True, tts_layers=False),
        **asdict(spread),
        "floor_s": num_bytes / bandwidth.bytes_per_s,
        "real_time_factor": spread.median_s / frame_seconds(talker),
    }


def packed(modes: Sequence[Mode]) -> list[Mode]:
    """Modes with weights repacked; the plain one where there is no other."""
    return [mode for mode in modes if mode.precision] or list(modes)
