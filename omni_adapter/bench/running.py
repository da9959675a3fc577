"""Replies of a talker while they run: single steps, and whole spoken replies.

A talker and a question in; contestants and times out. Uses the loop and the stream that users use.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from omni_adapter.bench.timing import Contestant, stopwatch
from omni_adapter.data.layout import get_task
from omni_adapter.errors import OmniError
from omni_adapter.generation.generator import Decoder, GenerationSettings, Step
from omni_adapter.talker import OmniAdapter
from omni_adapter.vocab import NO_TEXT

Messages = Sequence[Mapping[str, Any]]

_TASK = "speech_to_speech"
_SPARE_STEPS = 32  # beyond those that are timed: warming up, the start, delays
_TRIES = 8


def running(
    talker: OmniAdapter, messages: Messages, *, text_runs: bool = True, count: int = 1, steps: int
) -> Contestant:
    """Return a contestant that times one decoding step after the other, with the choice of its ids.

    Args:
        talker: decodes.
        messages: the question.
        text_runs: whether the text goes on for ever or has ended.
        count: conversations at once, all with the same question.
        steps: how many will be asked for; memory is taken for replies of that length.
    """
    ends = (NO_TEXT,) if text_runs else range(talker.model.backbone.vocab_size)
    decoder = Decoder(
        talker.model,
        rules=talker.processor.rules,
        task=get_task(_TASK),
        text_end_ids=ends,
        settings=GenerationSettings(max_new_tokens=steps + _SPARE_STEPS),
    )
    replies = _Steps(decoder, talker, messages, count)
    return replies.time


class _Steps:
    """Steps of replies, one reply after the other."""

    def __init__(self, decoder: Decoder, talker: OmniAdapter, messages: Messages, count: int) -> None:
        self._decoder, self._device = decoder, talker.model.device
        self._samples = [talker.processor(messages, task=_TASK)] * count
        self._steps: Iterator[Step] | None = None

    def time(self) -> float:
        """Seconds of the next step of all conversations together."""
        for _ in range(_TRIES):
            steps = self._steps or self._begin()
            with stopwatch(self._device) as watch:
                step = next(steps, None)
            if step is not None and len(step.conversations) == len(self._samples):
                return watch.seconds
            steps.close()  # type: ignore[attr-defined]
            self._steps = None
        raise OmniError("replies end before a step can be timed: the talker says next to nothing")

    def _begin(self) -> Iterator[Step]:
        self._steps = self._decoder.run(self._samples)
        next(self._steps)
        next(self._steps, None)  # drops the rows of texts that have ended
        return self._steps


@dataclass(frozen=True)
class Spoken:
    """Times of replies that were spoken at once.

    Attributes:
        first_audio_s: until the first sound of the first of them.
        real_time_factor: seconds of work per second of all their sound; below 1 keeps up.
        steady_real_time_factor: likewise, after each has begun to speak; None if nothing followed.
    """

    first_audio_s: float
    real_time_factor: float
    steady_real_time_factor: float | None


def speak(talker: OmniAdapter, conversations: Sequence[Messages], *, steps: int, stride: int) -> Spoken:
    """Let a talker answer, with sound.

    Args:
        talker: answers.
        conversations: as for ``stream_many``.
        steps: of each reply, at most.
        stride: frames per chunk of sound.

    Raises:
        OmniError: if nothing is said.
    """
    begun: dict[int, float] = {}
    samples = later = 0
    elapsed_s, rate = 0.0, talker.sampling_rate
    with closing(talker.stream_many(conversations, max_new_tokens=steps, stride=stride)) as chunks:  # type: ignore[type-var]
        for index, chunk in chunks:
            elapsed_s = chunk.elapsed_s
            if len(chunk.audio):
                samples += len(chunk.audio)
                later += len(chunk.audio) if index in begun else 0
                begun.setdefault(index, elapsed_s)
    if not samples:
        raise OmniError(f"nothing was said in {steps} steps")
    steady = (elapsed_s - max(begun.values())) * rate / later if later else None
    return Spoken(min(begun.values()), elapsed_s * rate / samples, steady)


def speak_served(talker: OmniAdapter, conversations: Sequence[Messages], *, steps: int, stride: int) -> float:
    """Answer several conversations at once through a server; return seconds of work per second of sound.

    Arguments as for :func:`speak`.

    Raises:
        OmniError: if nothing is said.
    """
    longest = max(talker.processor(messages, task=_TASK).layout.grid.shape[1] for messages in conversations)
    server = talker.serve(
        max_conversations=len(conversations),
        max_steps=longest + steps + _SPARE_STEPS,
        lead_s=None,
        exact_sound=False,
    )
    with stopwatch(talker.model.device) as watch, server:
        handles = [
            server.submit(messages=messages, max_new_tokens=steps, stride=stride)
            for messages in conversations
        ]
        said_s = sum(handle.reply().duration_s for handle in handles)
    if not said_s:
        raise OmniError(f"nothing was said in {steps} steps")
    return watch.seconds / said_s


def first_audio(talker: OmniAdapter, messages: Messages, *, steps: int, stride: int) -> None:
    """Answer until the first sound is there.

    Raises:
        OmniError: if none comes.
    """
    with closing(talker.stream_many([messages], max_new_tokens=steps, stride=stride)) as chunks:  # type: ignore[type-var]
        if not any(len(chunk.audio) for _, chunk in chunks):
            raise OmniError(f"nothing was said in {steps} steps")
