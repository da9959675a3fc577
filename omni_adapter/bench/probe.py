"""One mode of a talker in a process of its own, so that its memory and start are its own.

    python -m omni_adapter.bench.probe '{"mode": "int8", "source": "talker", …}'   # what comparing runs

A line of JSON in, as the argument; one out.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from omni_adapter.audio.codec import SnacCodec
from omni_adapter.bench.machine import memory_kinds, peak_bytes, resident_bytes
from omni_adapter.bench.modes import MODES, REFERENCES, load_mode
from omni_adapter.bench.presets import make_question, question_for
from omni_adapter.bench.reference import ReferenceShape, ReferenceTalker, random_reference
from omni_adapter.bench.running import speak
from omni_adapter.modules.audio_encoder import AudioEncoder


@dataclass(frozen=True)
class Probe:
    """What the process shall do.

    Attributes:
        mode: name of a mode, or of a type of the published implementation.
        source: folder or Hub id of a talker; with the published implementation a folder with all parts.
        device: where to compute.
        threads: processor threads.
        seconds: length of the question.
        steps: of the reply.
        stride: frames per chunk of sound.
        preset: of a talker with random weights.
        shape: sizes of the published network.
    """

    mode: str
    source: str
    device: str
    threads: int
    seconds: float
    steps: int
    stride: int
    preset: str | None = None
    shape: dict[str, Any] | None = None


@dataclass(frozen=True)
class Footprint:
    """What it took.

    Attributes:
        libraries_bytes: resident memory before anything was loaded.
        load_s: seconds until the talker was ready.
        loaded_bytes: resident memory then.
        loaded_kinds: the same by kind: the process's own, and pages of mapped files.
        warm_up_s: seconds of ``talker.warm_up()``; zero for the published implementation, which has none.
        first_reply_s: seconds of the first reply.
        second_reply_s: of the next one.
        resident_bytes: resident memory after them.
        resident_kinds: the same by kind.
        peak_bytes: most resident memory of all the time.
        device_peak_bytes: most memory of the accelerator; None without one.
    """

    libraries_bytes: int | None
    load_s: float
    loaded_bytes: int | None
    loaded_kinds: dict[str, int]
    warm_up_s: float
    first_reply_s: float
    second_reply_s: float
    resident_bytes: int | None
    resident_kinds: dict[str, int]
    peak_bytes: int | None
    device_peak_bytes: int | None


def run_probe(probe: Probe) -> Footprint:
    """Load, reply twice, and look at the memory on the way."""
    torch.set_num_threads(probe.threads)
    device = torch.device(probe.device)
    libraries = resident_bytes()
    started_s = time.perf_counter()
    subject = _reference(probe, device) if probe.mode in REFERENCES else _ours(probe, device)
    load_s = time.perf_counter() - started_s
    loaded, kinds = resident_bytes(), memory_kinds()
    warm_up_s = _seconds(subject.warm_up)
    replies = [_seconds(subject.reply) for _ in range(2)]
    on_device = None
    if device.type != "cpu":
        on_device = int(torch.get_device_module(device).max_memory_allocated())
    return Footprint(
        libraries_bytes=libraries,
        load_s=load_s,
        loaded_bytes=loaded,
        loaded_kinds=kinds,
        warm_up_s=warm_up_s,
        first_reply_s=replies[0],
        second_reply_s=replies[1],
        resident_bytes=resident_bytes(),
        resident_kinds=memory_kinds(),
        peak_bytes=peak_bytes(),
        device_peak_bytes=on_device,
    )


class _Subject(NamedTuple):
    """What is loaded, as two things to do."""

    warm_up: Callable[[], object]
    reply: Callable[[], object]


def _ours(probe: Probe, device: torch.device) -> _Subject:
    mode = next(mode for mode in MODES if mode.name == probe.mode)
    talker = load_mode(probe.source, mode, device=device, preset=probe.preset)
    question = question_for(talker, probe.seconds)
    return _Subject(talker.warm_up, lambda: speak(talker, [question], steps=probe.steps, stride=probe.stride))


def _reference(probe: Probe, device: torch.device) -> _Subject:
    assert probe.shape is not None
    folder = Path(probe.source)
    encoder = AudioEncoder.from_pretrained(folder / "encoder").to(device)
    codec = SnacCodec.from_pretrained(folder / "codec").to(device)
    shape = ReferenceShape(**probe.shape)
    model = random_reference(shape, dtype=REFERENCES[probe.mode], device=device)
    reference = ReferenceTalker(model, encoder=encoder, codec=codec, stride=probe.stride, post=False)
    question = make_question(probe.seconds, encoder.log_mel().sampling_rate)
    return _Subject(lambda: None, lambda: reference.first_audio(torch.from_numpy(question)))


def _seconds(action: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    action()
    return time.perf_counter() - started_s


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(run_probe(Probe(**json.loads(sys.argv[1]))))) + "\n")
