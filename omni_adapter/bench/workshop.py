"""What all sections of a comparison work with: the talker in each mode, and the published implementation.

A name or a size in; loaded talkers and contestants out, each made when it is first asked for.
"""

import dataclasses
import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_adapter.audio.codec import SnacCodec
from omni_adapter.bench.modes import (
    MODES,
    REFERENCES,
    Mode,
    StepWeights,
    load_mode,
    tts_layers,
    why_not,
)
from omni_adapter.bench.presets import (
    PRESETS,
    REFERENCE_CONTEXT_STEPS,
    SHAPES,
    make_question,
    question_for,
    random_talker,
)
from omni_adapter.bench.reference import (
    ReferenceModel,
    ReferenceState,
    ReferenceTalker,
    random_reference,
    shape_of,
)
from omni_adapter.bench.running import running
from omni_adapter.bench.timing import Contestant, stopwatch
from omni_adapter.errors import ConfigError
from omni_adapter.hub import CONFIG_FILE, PARTS
from omni_adapter.talker import OmniAdapter

logger = logging.getLogger(__name__)

SECTIONS = (
    "startup",
    "memory",
    "steps",
    "first_audio",
    "reply",
    "codec",
    "length",
    "many",
    "error",
    "size",
)
"""What can be compared, in that order; the last one, talkers of many sizes, only if it is asked for."""


@dataclass(frozen=True)
class CompareSettings:
    """How to compare.

    Attributes:
        sections: names out of ``SECTIONS``.
        seconds: length of the question.
        rounds: turns of each mode.
        steps: decoding steps that are timed in each turn.
        stride: frames per chunk of sound.
        reply_steps: steps of a reply that is spoken in full.
        conversation_steps: steps of each reply where many are spoken at once.
        length_steps: steps of the long reply.
        conversations: how many at once.
        error_steps: steps over which logits are compared.
        sizes: keys of ``SHAPES``, for the curve over sizes.
        context_steps: length of the published implementation's cache.
        bandwidth_bytes: memory that is read to measure its speed.
        bandwidth_rounds: how often, at each measurement.
    """

    sections: tuple[str, ...] = SECTIONS[:-1]
    seconds: float = 3.0
    rounds: int = 5
    steps: int = 8
    stride: int = 4
    reply_steps: int = 36
    conversation_steps: int = 108
    length_steps: int = 512
    conversations: tuple[int, ...] = (1, 2, 4, 8)
    error_steps: int = 64
    sizes: tuple[str, ...] = ("0.1b", "0.4b", "0.5b", "1b", "1.5b")
    context_steps: int = REFERENCE_CONTEXT_STEPS
    bandwidth_bytes: int = 1 << 30
    bandwidth_rounds: int = 2

    def __post_init__(self) -> None:
        for kind, given, known in (
            ("section", self.sections, SECTIONS),
            ("size", self.sizes, tuple(SHAPES)),
        ):
            unknown = sorted(set(given) - set(known))
            if unknown:
                raise ConfigError(f"no {kind} is called {', '.join(unknown)}; known are {', '.join(known)}")
        for name in (
            "rounds",
            "steps",
            "stride",
            "seconds",
            "reply_steps",
            "conversation_steps",
            "length_steps",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.conversations or min(self.conversations) < 1:
            raise ConfigError(f"conversations must be positive numbers, got {self.conversations}")


SMALL = CompareSettings(
    seconds=1.0,
    rounds=2,
    steps=2,
    reply_steps=24,
    conversation_steps=24,
    length_steps=40,
    conversations=(1, 2),
    error_steps=8,
    sizes=("tiny",),
    context_steps=128,
    bandwidth_bytes=1 << 22,
)
"""For a talker that is small enough for tests."""


def settings_for(shape: str | None, **given: Any) -> CompareSettings:
    """Settings for a size, with those that are not None replaced."""
    base = SMALL if shape == "tiny" else CompareSettings()
    return dataclasses.replace(base, **{key: value for key, value in given.items() if value is not None})


_TTS = {"init": "scaled"}  # blocks that do something, so that errors of their weights show


class Workshop:
    """Holds what was loaded, so that sections share it.

    Args:
        name: folder or Hub id of a talker; or a key of ``SHAPES``, whose weights are random.
        settings: how to compare.
        device: where to compute.
        folder: where a talker with random weights is saved, and found again.
        say: called with a line whenever something begins.
    """

    def __init__(
        self,
        name: str,
        *,
        settings: CompareSettings,
        device: torch.device,
        folder: Path,
        say: Callable[[str], None],
    ) -> None:
        self.name, self.settings, self.device, self.say = name, settings, device, say
        self.is_random = name in SHAPES
        self.source = str(folder / f"talker-{name}") if self.is_random else name
        self.failures: dict[str, str] = {}
        self._talkers: dict[str, OmniAdapter] = {}
        self._references: dict[str, ReferenceModel] = {}
        self._weights: StepWeights | None = None

    def prepare(self) -> None:
        """Save the talker with random weights, in bfloat16 as most are published, unless it is there."""
        if not self.is_random or (Path(self.source) / CONFIG_FILE).is_file():
            return
        self.say(f"making a talker of {self.name} with random weights")
        talker = random_talker(SHAPES[self.name], dtype="bfloat16", tts=_TTS)
        talker.save_pretrained(self.source, include=PARTS)

    @property
    def variants(self) -> tuple[int | None, ...]:
        """Numbers of TTS blocks to compare with: none, as in the published weights, and all that it has."""
        return (0, PRESETS[SHAPES[self.name]].tts_layers) if self.is_random else (None,)

    def modes(self) -> list[Mode]:
        """Modes that can be had here; why others cannot is kept in ``failures``."""
        found = []
        for mode in MODES:
            reason = self.failures.get(mode.name) or why_not(mode)
            if reason is None:
                reason = self._try(mode)
            if reason is None:
                found.append(mode)
            else:
                self.failures[mode.name] = " ".join(reason.split())
        return found

    def _try(self, mode: Mode) -> str | None:
        """Load a mode; return what is wrong if it cannot be loaded."""
        try:
            self.talker(mode.name)
        except Exception as error:  # whatever a mode breaks on, the others are still worth their figures
            if mode.precision is None:
                raise
            logger.debug("mode %s", mode.name, exc_info=True)
            return f"{type(error).__name__}: {error}"
        return None

    def talker(self, name: str) -> OmniAdapter:
        """The talker in the mode of that name."""
        if name not in self._talkers:
            self.say(f"loading {name}")
            mode = next(mode for mode in MODES if mode.name == name)
            self._talkers[name] = load_mode(
                self.source, mode, device=self.device, preset=SHAPES.get(self.name)
            )
        return self._talkers[name]

    def references(self) -> list[str]:
        """Types of the published implementation; none if it has no network of this talker's kind."""
        plain = self.talker("plain")
        try:
            shape_of(plain, context_steps=self.settings.context_steps, post_layers=0)
            if not isinstance(plain.codec, SnacCodec):
                raise ConfigError(f"the published code decodes with SNAC, not {type(plain.codec).__name__}")
        except ConfigError as error:
            self.failures["reference"] = str(error)
            return []
        return list(REFERENCES)

    def reference(self, name: str, *, variant: int | None = 0) -> ReferenceTalker:
        """The published implementation, with ``variant`` further blocks."""
        plain = self.talker("plain")
        layers = plain.config.tts.layers
        if name not in self._references:
            self.say(f"making {name}")
            shape = shape_of(plain, context_steps=self.settings.context_steps, post_layers=layers)
            self._references[name] = random_reference(shape, dtype=REFERENCES[name], device=self.device)
        codec = plain.codec
        assert isinstance(codec, SnacCodec)
        return ReferenceTalker(
            self._references[name],
            encoder=plain.model.audio_encoder,
            codec=codec,
            stride=self.settings.stride,
            post=bool(layers if variant is None else variant),
        )

    @property
    def weights(self) -> StepWeights:
        """Weights that steps read, of the talker before anything is packed."""
        if self._weights is None:
            self._weights = StepWeights.of(self.talker("plain"))
        return self._weights

    @property
    def known_weights(self) -> StepWeights | None:
        """The same if they were counted already."""
        return self._weights

    def pack_reports(self) -> dict[str, str]:
        """What packing says it did, by mode."""
        return {
            name: str(report)
            for name, talker in self._talkers.items()
            if (report := getattr(talker, "pack_report", None)) is not None
        }

    def release(self) -> None:
        """Forget all that was loaded."""
        self._talkers.clear()
        self._references.clear()
        gc.collect()

    def question(self) -> tuple[Tensor, int]:
        """The recording, and its rate."""
        rate = self.talker("plain").processor.log_mel.sampling_rate
        return torch.from_numpy(make_question(self.settings.seconds, rate)), rate

    def messages(self) -> list[dict[str, Any]]:
        """A conversation that asks it."""
        return question_for(self.talker("plain"), self.settings.seconds)

    @contextmanager
    def varied(self, mode: str, variant: int | None) -> Iterator[OmniAdapter]:
        """A talker that does with ``variant`` TTS blocks for a while; one with a name keeps its own."""
        with tts_layers(self.talker(mode), variant if self.is_random else None) as talker:
            yield talker

    def running(
        self, mode: str, *, variant: int | None = 0, text_runs: bool = True, count: int = 1, steps: int
    ) -> Contestant:
        """A contestant that times decoding steps of a mode; arguments as for :func:`running.running`."""
        contestant = running(
            self.talker(mode), self.messages(), text_runs=text_runs, count=count, steps=steps
        )

        def varied() -> float:
            with self.varied(mode, variant):
                return contestant()

        return varied

    def running_reference(self, name: str, *, variant: int | None = 0) -> "RunningReference":
        """The same for the published implementation."""
        return RunningReference(self.reference(name, variant=variant), self.question()[0])


class RunningReference:
    """Times one step of the published implementation after the other; begins again where its cache ends."""

    def __init__(self, reference: ReferenceTalker, waveform: Tensor) -> None:
        self.reference = reference
        self._frames = reference.encode(waveform)
        self._state: ReferenceState | None = None

    def __call__(self) -> float:
        """Seconds of the next step."""
        limit = self.reference.model.shape.context_steps
        if self._state is None or self._state.position >= limit:
            self._state = self.reference.read(self._frames)
        with stopwatch(self.reference.device) as watch:
            self.reference.step(self._state)
        return watch.seconds

    def go_to(self, step: int) -> None:
        """Stand at an answer's step ``step``; what the cache holds does not change what a step costs."""
        if self._state is None:
            self._state = self.reference.read(self._frames)
        self._state.position = len(self._frames) + 3 + step
