"""Many conversations at once: they come, share the passes of the model, and go, between any two steps.

Requests in from any thread; for each a handle, whose chunks are those that it would have alone. One thread at
a time touches the model: the batcher's own inside ``with``, else whoever iterates over a handle.

    submit ──> waiting ──admit──> starting ──first sound──> together ──> over
                (queue)           (alone)                   (one batch)

A newcomer's prompt is read, and its first steps are taken, in a batch of its own while the others live on
the sound that they have in hand; then it joins them. Where the base computes padded rows exactly and its
memory can be fixed, all that run are rows of one batch; elsewhere each keeps a batch of its own, one step in
turn. Knows nothing of how prompts are laid out.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any, Self

import torch

from omni_adapter.audio.codec import CodecStream
from omni_adapter.data.collator import Sample, collate
from omni_adapter.errors import BusyError, ConfigError, ContextOverflowError
from omni_adapter.generation.generator import Decoder, FinishReason, Step
from omni_adapter.generation.sampling import SamplingSettings
from omni_adapter.generation.schedule import Playback, Schedule, Turn
from omni_adapter.generation.state import DecodingState
from omni_adapter.generation.streaming import Chunk, Listener, Rendering, Reply

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """A conversation to be answered.

    Attributes:
        sample: its prompt.
        decoder: of its task and settings.
        rendering: turns its ids into text and sound.
        given: ids of its text, where that is known.
    """

    sample: Sample
    decoder: Decoder
    rendering: Rendering
    given: tuple[int, ...] | None = None

    @property
    def sampling(self) -> tuple[SamplingSettings, SamplingSettings]:
        """What conversations of one batch must share."""
        settings = self.decoder.settings
        return settings.text_sampling, settings.code_sampling

    def can_be_read_with(self, other: "Request") -> bool:
        """Whether both prompts can be read in one batch, of which not much is padding."""
        mine, theirs = self.decoder, other.decoder
        shorter, longer = sorted(one.sample.layout.grid.shape[1] for one in (self, other))
        return (
            mine.joins
            and mine.task == theirs.task
            and replace(mine.settings, seed=theirs.settings.seed) == theirs.settings
            and longer <= 2 * shorter
        )


class Handle:
    """One conversation's reply: iterate over it for its chunks, or ``cancel`` it. Safe in any thread."""

    def __init__(self, batcher: "Batcher", name: int, request: Request, *, now_s: float) -> None:
        self.name = name
        self.request: Request | None = request
        self.submitted_s = now_s
        self.playback = Playback()
        self.cancelled = False
        self.over = False
        self.listener: Listener | None = None
        self._batcher = batcher
        self._chunks: SimpleQueue[Chunk | BaseException | None] = SimpleQueue()

    def cancel(self) -> None:
        """Stop the reply; what was not handed over yet is lost. Without effect on one that is over."""
        self.cancelled = True
        self._batcher._cancel(self)

    def __iter__(self) -> Iterator[Chunk]:
        """Yield chunks as they come, until the reply has ended or was cancelled.

        Raises:
            OmniError: if the conversation could not be answered, or the batcher was closed before its end.
        """
        while (chunk := self._batcher._await(self._chunks)) is not None:
            if isinstance(chunk, BaseException):
                self._chunks.put(chunk)
                raise chunk
            yield chunk
        self._chunks.put(None)

    def reply(self) -> Reply:
        """Wait for the end and return the whole reply.

        Raises:
            BusyError: if the conversation was cancelled.
        """
        chunks = list(self)
        if not chunks or chunks[-1].finish_reason is None:
            raise BusyError("the conversation was cancelled, so there is no whole reply")
        return Reply.collect(chunks)

    def _hand_over(self, chunk: Chunk, *, now_s: float) -> None:
        self.playback.hand_over(len(chunk.audio) / chunk.sampling_rate, now_s=now_s)
        self._chunks.put(chunk)
        if chunk.finish_reason:
            self._end(None)

    def _end(self, last: BaseException | None) -> None:
        """Let iteration end, and let go of everything that the conversation held."""
        if not self.over:
            self.over, self.request, self.listener = True, None, None
            self._chunks.put(last)


@dataclass(eq=False)
class _Group:
    """Conversations that take their steps together.

    Attributes:
        decoder: takes them.
        state: of all of them.
        tick: steps taken.
    """

    decoder: Decoder
    state: DecodingState
    tick: int = 0


@dataclass
class _Lane:
    """All groups whose conversations share how they sample.

    Attributes:
        room: conversations to make memory for at once; more are made as more come.
        joins: whether conversations can share a group.
        together: conversations that are heard; a single group where rows join.
        starting: newcomers before their first sound, in the order in which they came.
    """

    room: int
    joins: bool
    together: list[_Group] = field(default_factory=list)
    starting: list[_Group] = field(default_factory=list)

    @property
    def groups(self) -> list[_Group]:
        """All groups."""
        return [*self.together, *self.starting]

    def drop_empty(self) -> None:
        """Let go of groups without conversations, but for the one that others can join."""
        self.starting = [group for group in self.starting if group.state.names]
        self.together = [group for group in self.together if group.state.names or self.joins]


class _Heard:
    """What a step brought to one conversation."""

    def __init__(self, handle: Handle, token: int, codes: torch.Tensor, reason: FinishReason | None) -> None:
        assert handle.listener is not None
        assert handle.request is not None
        self.handle, self.listener, self.request = handle, handle.listener, handle.request
        self.voice = self.listener.voice
        self.token, self.codes, self.reason = token, codes, reason
        self.sound = torch.empty(0)


class Batcher:
    """Answers many conversations at once.

    Inside ``with``, a thread of its own runs the model; without, whoever iterates over a handle does. Memory
    for all is made with the first of them and stays the same, as long as they sample alike; conversations
    that sample otherwise run in a batch of their own.

    Args:
        prepare: makes a request of what ``submit`` is given, in the thread that calls it.
        max_conversations: answered at once.
        max_waiting: that wait for a place; one more is refused.
        max_steps: columns of prompt and reply together, for which memory is made once per conversation.
        schedule: chooses who is served.
        exact_sound: decode each conversation's codes by themselves, so that its sound is bit for bit that of
            a conversation alone; otherwise those of all at once, which is within rounding and quicker.
        clock: seconds.

    Attributes:
        most_together: conversations that took a step together at most so far.

    Raises:
        ConfigError: if a number is below its least.
    """

    def __init__(
        self,
        prepare: Callable[..., Request],
        *,
        max_conversations: int,
        max_waiting: int,
        max_steps: int,
        schedule: Schedule,
        exact_sound: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        for name, value, least in (
            ("max_conversations", max_conversations, 1),
            ("max_waiting", max_waiting, 0),
            ("max_steps", max_steps, 1),
        ):
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        self.prepare = prepare
        self.max_conversations, self.max_waiting, self.max_steps = max_conversations, max_waiting, max_steps
        self.schedule, self.exact_sound, self.clock = schedule, exact_sound, clock
        self.most_together = 0
        self._waiting: deque[Handle] = deque()
        self._running: dict[int, Handle] = {}
        self._lanes: dict[tuple[SamplingSettings, SamplingSettings], _Lane] = {}
        self._next_name = 0
        self._closed = False
        self._worker: threading.Thread | None = None
        self._changed = threading.Condition()  # guards all of the above but what only a turn touches
        self._preparing = threading.Lock()  # held by whoever lays a prompt out
        self._turning = threading.Lock()  # held by whoever runs the model

    # --- in any thread ---

    def submit(self, *args: Any, **options: Any) -> Handle:
        """Hand a conversation over, with the arguments of ``prepare``, and return its handle at once.

        Raises:
            BusyError: if all places are taken and ``max_waiting`` wait already, or the batcher was closed.
            ContextOverflowError: if prompt and longest reply take more than ``max_steps``.
            PromptError: if ``prepare`` refuses it.
        """
        submitted_s = self.clock()
        self._check_room()
        with self._preparing:
            request = self.prepare(*args, **options)
        wanted = request.decoder.columns(request.sample.layout.grid.shape[1])
        if wanted > self.max_steps:
            raise ContextOverflowError(
                f"prompt and reply take up to {wanted} steps, this batcher has room for {self.max_steps}; "
                "use a shorter prompt, a smaller max_new_tokens or a larger max_steps"
            )
        with self._changed:
            self._check_room()
            handle = Handle(self, self._next_name, request, now_s=submitted_s)
            self._next_name += 1
            self._waiting.append(handle)
            self._changed.notify_all()
        return handle

    @property
    def num_waiting(self) -> int:
        """Conversations that wait for a place."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Conversations that are answered."""
        return len(self._running)

    @property
    def nbytes(self) -> int:
        """Bytes of all caches."""
        return sum(group.state.nbytes for lane in self._lanes.values() for group in lane.groups)

    def close(self) -> None:
        """End all conversations and the batcher's thread; replies that are not over raise ``BusyError``."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._worker is not None:
            self._worker.join()
        with self._turning:
            self._abandon(BusyError("the batcher was closed before this reply was over"))

    def _abandon(self, error: BaseException) -> None:
        """End whatever is not over with ``error``, and take nothing more."""
        with self._changed:
            self._closed = True
            for handle in (*self._waiting, *self._running.values()):
                handle._end(error)
            self._waiting.clear()
            self._running.clear()
            self._lanes.clear()

    def __enter__(self) -> Self:
        """Start the thread that runs the model."""
        self._worker = threading.Thread(target=self._work, name="omni-adapter batcher", daemon=True)
        self._worker.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()

    def _check_room(self) -> None:
        if self._closed:
            raise BusyError("the batcher is closed; make a new one")
        free = self.max_conversations - len(self._running)
        if len(self._waiting) >= self.max_waiting + free:
            raise BusyError(
                f"{len(self._running)} conversations are being answered and {len(self._waiting)} wait, which "
                "is all that this batcher takes; try again later, or raise max_conversations or max_waiting"
            )

    def _cancel(self, handle: Handle) -> None:
        """Let go of a conversation that waits at once, of one that runs before the next turn."""
        with self._changed:
            if handle in self._waiting:
                self._waiting.remove(handle)
                handle._end(None)
            self._changed.notify_all()

    def _await(self, chunks: "SimpleQueue[Any]") -> Any:
        """The next of a handle's chunks; runs the model itself where no thread does."""
        while True:
            with suppress(Empty):
                return chunks.get_nowait()
            if self._worker is not None:
                return chunks.get()
            if not self.turn() and chunks.empty():
                raise AssertionError("a conversation that is not over has no turn")

    def _work(self) -> None:
        """Take turns until closed."""
        try:
            while not self._closed:
                if not self.turn():
                    with self._changed:
                        if not self._closed and not self._waiting and not self._running:
                            self._changed.wait()
        except BaseException as error:
            self._abandon(error)  # nobody is to wait for a thread that is gone
            raise

    # --- by one thread at a time ---

    def turn(self) -> bool:
        """Do what comes next: read a prompt, or take a step. Return False if there was nothing to do."""
        with self._turning, torch.inference_mode():
            self._drop_cancelled()
            turn = self._choose()
            if turn == "wait":
                return False
            before_s = self.clock()
            {"admit": self._admit, "start": self._start, "step": self._step}[turn]()
            self.schedule.took(turn, self.clock() - before_s)
            return True

    def _choose(self) -> Turn:
        now_s = self.clock()
        with self._changed:
            free = len(self._running) < self.max_conversations and not self._closed
            waiting_since_s = self._waiting[0].submitted_s if self._waiting and free else None
        leads = [handle.playback.lead_s(now_s) for handle in self._running.values()]
        return self.schedule.choose(
            now_s=now_s,
            waiting_since_s=waiting_since_s,
            num_starting=sum(len(lane.starting) for lane in self._lanes.values()),
            leads_s=[lead for lead in leads if lead is not None],
            num_running=len(self._running),
        )

    def _admit(self) -> None:
        """Read the prompt that waits longest; where all go in step, those that go with it as well."""
        handles = self._call_in()
        if len(handles) > 1 and self._read(handles):
            return
        for handle in handles:
            self._read([handle])

    def _call_in(self) -> list[Handle]:
        """Give places to those whose prompts are read next: none if they were cancelled meanwhile."""
        with self._changed:
            chosen = list(self._waiting)[: self.max_conversations - len(self._running)]
            if self.schedule.lead_s is not None:
                del chosen[1:]
            first = chosen[0].request if chosen else None
            chosen = [
                handle
                for handle in chosen
                if handle is chosen[0]
                or (first and handle.request and first.can_be_read_with(handle.request))
            ]
            for handle in chosen:
                self._waiting.remove(handle)
                self._running[handle.name] = handle
            return chosen

    def _read(self, handles: Sequence[Handle]) -> bool:
        """Read prompts, in one batch. Return False if that failed; a conversation by itself is then over."""
        requests = [handle.request for handle in handles if handle.request is not None]
        first, decoder = requests[0], requests[0].decoder
        try:
            batch = collate([request.sample for request in requests], rules=decoder.rules)
            state = decoder.prefill(
                batch.to(decoder.model.device),
                given=None if first.given is None else [request.given or () for request in requests],
                seeds=[request.decoder.settings.seed for request in requests],
            )
            for handle, request in zip(handles, requests, strict=True):
                handle.listener = request.rendering.listener()
        except Exception as error:
            if len(handles) > 1:  # whichever is at fault fails by itself
                logger.info("%d prompts could not be read together: %s", len(handles), error)
            else:  # whatever it is, it is this conversation's, and others go on
                logger.warning("a conversation could not be answered: %s", error)
                self._forget([handles[0].name], error)
            return False
        state.names = [handle.name for handle in handles]
        lane = self._lane(first)
        lane.starting.append(_Group(decoder, state))
        if not decoder.task.speaks or self.schedule.lead_s is None:
            self._bring_together(lane, lane.starting[-1])
        return True

    def _lane(self, request: Request) -> _Lane:
        """Where a request belongs."""
        if request.sampling not in self._lanes:
            used = {
                key: lane
                for key, lane in self._lanes.items()
                if any(group.state.names for group in lane.groups)
            }
            used[request.sampling] = _Lane(1 if used else self.max_conversations, request.decoder.joins)
            self._lanes = used
        return self._lanes[request.sampling]

    def _start(self) -> None:
        """Take a step of the newcomer that came first; with its first sound it joins the others."""
        lanes = [lane for lane in self._lanes.values() if lane.starting]
        lane = min(lanes, key=lambda lane: lane.starting[0].state.names[0])
        group = lane.starting[0]
        handle = self._running[group.state.names[0]]
        self._run(lane, group)
        if not handle.over and handle.playback.begun_s is not None:
            self._bring_together(lane, group)

    def _step(self) -> None:
        """Take a step of everybody."""
        for lane in self._lanes.values():
            for group in list(lane.starting):
                self._bring_together(lane, group)
            for group in list(lane.together):
                if group.state.names:
                    self._run(lane, group)

    def _bring_together(self, lane: _Lane, group: _Group) -> None:
        """Let a newcomer join those that are heard, where rows can."""
        lane.starting.remove(group)
        if not lane.joins:
            lane.together.append(group)
            return
        if not lane.together:
            vacant = group.decoder.vacant(conversations=lane.room, capacity=self.max_steps)
            lane.together.append(_Group(group.decoder, vacant))
        group.decoder.join(lane.together[0].state, group.state)

    def _run(self, lane: _Lane, group: _Group) -> None:
        """Take a step of a group and hand over what it brings."""
        names = list(group.state.names)
        self.most_together = max(self.most_together, len(names))
        try:
            for step in group.decoder.turn(group.state):
                group.tick += 1
                self._deliver(step, tick=group.tick)
        except Exception as error:  # whatever it is, other groups go on
            logger.exception("a step failed; it ends %d conversations", len(names))
            self._forget(names, error)
            lane.starting = [other for other in lane.starting if other is not group]
            lane.together = [other for other in lane.together if other is not group]
        lane.drop_empty()

    def _deliver(self, step: Step, *, tick: int) -> None:
        """Turn ids into chunks for those who wait for them."""
        tokens = step.text.tolist()
        heard = [
            _Heard(self._running[name], tokens[place], step.codes[place], step.finished[place])
            for place, name in enumerate(step.conversations)
            if not self._running[name].cancelled
        ]
        self._decode([one for one in heard if one.voice], tick=None if self.exact_sound else tick)
        for one in heard:
            self._render(one)
        self._forget(
            [name for name, reason in zip(step.conversations, step.finished, strict=True) if reason], None
        )

    def _decode(self, heard: Sequence["_Heard"], *, tick: int | None) -> None:
        """Decode the sound that is due: each alone if ``tick`` is None, else all at once that are alike."""
        alike: dict[tuple[int, int], list[tuple[_Heard, torch.Tensor]]] = {}
        for one in heard:
            assert one.voice is not None
            frames = one.voice.take(one.codes, tick=tick)
            if frames is not None:
                key = (
                    (id(one.request.rendering.codec), frames.shape[-1])
                    if tick is not None
                    else (one.handle.name, 0)
                )
                alike.setdefault(key, []).append((one, frames))
        for group in alike.values():
            streams = [one.voice.stream for one, _ in group if one.voice]
            sounds = CodecStream.push_together(streams, torch.stack([frames for _, frames in group]))
            for (one, _), sound in zip(group, sounds, strict=True):
                one.sound = sound.cpu()

    def _render(self, one: "_Heard") -> None:
        """Hand over what a step brought to one conversation, if it brought anything."""
        text = one.listener.write(one.token, last=one.reason is not None)
        audio = one.listener.end(one.sound) if one.reason else one.sound
        now_s = self.clock()
        elapsed_s = now_s - one.handle.submitted_s
        chunk = one.listener.chunk(text, audio, elapsed_s=elapsed_s, reason=one.reason)
        if chunk is not None:
            one.handle._hand_over(chunk, now_s=now_s)

    def _forget(self, names: Sequence[int], error: BaseException | None) -> None:
        """Let go of conversations; they end with ``error``, if they have not ended."""
        with self._changed:
            for name in names:
                if (handle := self._running.pop(name, None)) is not None:
                    handle._end(error)

    def _drop_cancelled(self) -> None:
        """Take conversations that were cancelled out of their batches."""
        gone = {name for name, handle in list(self._running.items()) if handle.cancelled}
        if not gone:
            return
        for lane in self._lanes.values():
            for group in lane.groups:
                names, rows = group.state.names, group.state.rows
                if not gone.isdisjoint(names):
                    kept = [at for at, row in enumerate(rows) if names[row.conversation] not in gone]
                    group.decoder.keep_rows(group.state, kept)
            lane.drop_empty()
        self._forget(sorted(gone), None)
