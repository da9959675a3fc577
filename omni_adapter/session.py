"""A conversation that is heard while it is spoken.

Pieces of sound in as they come, chunks of the reply out once the question is over. What can be done before
that is done before: features, encoded blocks, and the LM's reading of the prompt up to there. Turns are kept.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from omni_adapter.audio.clips import Clips, Frames, Recording
from omni_adapter.audio.waveform import Samples, WaveformStream, read_waveform
from omni_adapter.data.layout import AudioSpan, Task, get_task
from omni_adapter.data.processor import BEING_SPOKEN, Message, OmniProcessor, OpenPrompt, task_of
from omni_adapter.errors import ConfigError, ContextOverflowError, PromptError
from omni_adapter.generation.generator import Decoder, GenerationSettings
from omni_adapter.generation.state import DecodingState
from omni_adapter.generation.streaming import Chunk, Rendering, stream_chunks
from omni_adapter.hearing import Blocks, Hearing
from omni_adapter.model import OmniModel

HearingMode = Literal["exact", "blocks"]

_ROOM_S = 60.0  # of speech that memory is taken for beforehand; longer questions are read again with more


@dataclass(frozen=True)
class SessionSettings:
    """How a conversation is held.

    Attributes:
        speak: answer in speech and text; otherwise in text only.
        tools: handed on to the chat template.
        hearing: ``exact`` hears as the talker was trained to: in blocks, as they are spoken, if it has
            ``encoder_block_seconds``, else each window once it is over. ``blocks`` hears in blocks in any
            case, which is an approximation for talkers that were trained otherwise.
        blocks: how, where the talker has no blocks of its own.
        generation: how replies are decoded.
    """

    speak: bool = True
    tools: Sequence[Mapping[str, Any]] | None = None
    hearing: HearingMode = "exact"
    blocks: Blocks = field(default_factory=Blocks)
    generation: GenerationSettings = field(default_factory=GenerationSettings)

    def __post_init__(self) -> None:
        if self.hearing not in ("exact", "blocks"):
            raise ConfigError(f"hearing must be exact or blocks, got {self.hearing!r}")


class Session:
    """A conversation with one talker, made with ``talker.session()``. Not to be shared between threads.

    Sound is taken in the caller's thread: :meth:`append_audio` returns when all that it can do was done. That
    is next to nothing for most pieces. One that completes a block costs one pass of the encoder over the
    block, and what it looks ahead, and one of the LM over its steps; without blocks, one that completes a
    window costs as much for the window.

    Args:
        model: the model.
        processor: lays prompts out.
        decoder: makes the loop for a task and settings.
        rendering: makes what turns ids of a task and settings into text and sound.
        settings: how to hear and answer.
        messages: what was said before, with any system prompt.

    Attributes:
        messages: all turns that are over, as transformers writes them; recordings as encoder frames.

    Raises:
        ConfigError: if the talker cannot hear so.
        PromptError: if the messages do not fit the base's chat template.
    """

    def __init__(
        self,
        model: OmniModel,
        *,
        processor: OmniProcessor,
        decoder: Callable[[Task, GenerationSettings], Decoder],
        rendering: Callable[[Task, GenerationSettings], Rendering],
        settings: SessionSettings,
        messages: Sequence[Message] = (),
    ) -> None:
        self._model, self._processor, self._settings = model, processor, settings
        self._make_decoder, self._make_rendering = decoder, rendering
        self.messages: list[Message] = []
        self._turn: _Turn | None = None
        self._answer: _Answer | None = None
        self._is_closed = False
        self._new_hearing()  # a talker that cannot hear so is refused at once
        self.messages = [self._encoded(message) for message in messages]
        self.prepare()

    # --- the question ---

    def prepare(self) -> None:
        """Let the LM read what is known of the next prompt: template, system prompt and former turns.

        A new session has done so. After a reply it happens with the first sound or text of the next question,
        or here, when there is time.

        Raises:
            PromptError: if a reply is being streamed.
        """
        self._check_listening()
        if self._turn is None:
            self._turn = _Turn()
        self._read_head(self._turn)

    def append_audio(self, samples: Samples | Tensor | bytes, *, sampling_rate: int) -> None:
        """Hear the next piece of the question.

        Args:
            samples: floats in -1..1, or integers in the range of their type, [n] or [n, channels]; or bytes
                of 16-bit little-endian mono PCM. Any number, also none.
            sampling_rate: of the samples, Hz; the same for the whole question.

        Raises:
            AudioError: if the piece cannot be used; the session is then as it was before. After any other
                error, but that of the context, the question is forgotten.
            ContextOverflowError: if the question no longer fits into the base's positions; end it.
            PromptError: if a reply is being streamed, or text came after the recording already.
        """
        self._check_listening()
        turn = self._turn or _Turn()
        if turn.after:
            raise PromptError(
                "a turn holds one recording, with text before and after it; sound came, then text, then "
                "sound; end the turn with reply() first"
            )
        if turn.waveform is None:
            stream = WaveformStream(sampling_rate=self._processor.log_mel.sampling_rate)
        else:
            stream = turn.waveform
        waveform = stream.append(samples, sampling_rate=sampling_rate)
        self._turn, turn.waveform = turn, stream
        try:
            self._read_head(turn)
            turn.hearing = turn.hearing or self._new_hearing()
            self._heard(turn, turn.hearing.append(waveform))
        except ContextOverflowError:
            raise
        except BaseException:  # stopped halfway, by Ctrl-C or for want of memory
            self._turn = None
            raise

    def append_text(self, text: str) -> None:
        """Add text to the question, before or after its recording.

        Raises:
            PromptError: if a reply is being streamed.
        """
        self._check_listening()
        turn = self._turn = self._turn or _Turn()
        if turn.waveform is None:
            turn.before.append(text)
            turn.reader = None  # the head is another one now
        else:
            turn.after.append(text)

    @property
    def heard_s(self) -> float:
        """Length of the question's recording so far, seconds."""
        return self._turn.waveform.duration_s if self._turn and self._turn.waveform else 0.0

    # --- the reply ---

    def reply(self) -> Iterator[Chunk]:
        """End the question and answer it: the chunks that ``talker.stream`` gives for the whole recording.

        What is left of the question is heard and read before this returns; steps run as chunks are asked for.
        A reply that was taken to its end becomes a turn of ``messages``, as does the question. One whose
        iterator is closed early is cancelled.

        Raises:
            AudioError: if there was no sound in the recording; the question is forgotten.
            PromptError: if there is no question, or a reply is being streamed already.
            ContextOverflowError: if prompt and reply do not fit into the base's positions; the question is
                forgotten.
        """
        started_s = time.perf_counter()
        self._check_listening()
        turn = self._turn
        if turn is None or not (turn.waveform or any(turn.before)):
            raise PromptError("no question; append_audio or append_text first")
        self._turn = None
        reader, question = self._close_recording(turn) if turn.waveform else self._close_text(turn)
        state = reader.close()
        chunks = stream_chunks(
            reader.decoder.steps(state),
            rendering=self._make_rendering(reader.decoder.task, self._settings.generation),
            num_conversations=1,
            started_s=started_s,
        )
        self._answer = answer = _Answer(question)
        return self._stream(answer, (chunk for _, chunk in chunks))

    def cancel(self, *, keep: bool = False) -> None:
        """Stop the reply, or drop the question that is being asked; as if the turn had never begun.

        Args:
            keep: of a reply that is stopped, keep the question and what was written so far as turns, as when
                a user interrupts.
        """
        if keep and self._answer is not None:
            self._keep(self._answer)
        self._turn = self._answer = None

    def close(self) -> None:
        """Free all memory of the conversation; the session cannot be used afterwards."""
        self.cancel()
        self.messages, self._is_closed = [], True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- inside ---

    def _check_listening(self) -> None:
        if self._is_closed:
            raise PromptError("this session is closed; open another one with talker.session()")
        if self._answer is not None:
            raise PromptError("a reply is being streamed; take all of its chunks, or cancel() it first")

    def _stream(self, answer: "_Answer", chunks: Iterator[Chunk]) -> Generator[Chunk, None, None]:
        """Hand chunks on and keep the turn; stop when it was cancelled."""
        try:
            while self._answer is answer and (chunk := next(chunks, None)) is not None:
                answer.text += chunk.text
                if chunk.finish_reason:
                    self._keep(answer)
                    self._answer = None
                yield chunk
        finally:
            if self._answer is answer:
                self._answer = None

    def _keep(self, answer: "_Answer") -> None:
        self.messages += [answer.question, {"role": "assistant", "content": answer.text}]

    def _decoder(self, task: str) -> Decoder:
        return self._make_decoder(get_task(task), self._settings.generation)

    def _new_hearing(self) -> Hearing:
        settings = self._settings
        roughly = settings.hearing == "blocks" and self._processor.config.encoder_block_seconds is None
        return Hearing(self._model, self._processor.log_mel, blocks=settings.blocks if roughly else None)

    def _encoded(self, message: Message) -> Message:
        """A turn with its recordings encoded once and for all."""
        content = message.get("content")
        if not isinstance(content, Sequence) or isinstance(content, str):
            return message
        parts = [
            {**part, "audio": self._encode(part["audio"])}
            if isinstance(part, Mapping) and part.get("type") == "audio" and "audio" in part
            else part
            for part in content
        ]
        return {**message, "content": parts}

    def _encode(self, source: Any) -> Frames:
        if isinstance(source, Frames):
            return source
        hearing = Hearing(self._model, self._processor.log_mel)
        hearing.finish(read_waveform(source, sampling_rate=self._processor.log_mel.sampling_rate))
        return Frames(hearing.frames, self._processor.encoder_mark)

    def _question(self, turn: "_Turn", recording: Any) -> Message:
        """The turn as a message."""
        parts: list[dict[str, Any]] = [{"type": "text", "text": text} for text in turn.before]
        if recording is not None:
            parts.append({"type": "audio", "audio": recording})
        return {"role": "user", "content": [*parts, *({"type": "text", "text": text} for text in turn.after)]}

    def _read_head(self, turn: "_Turn") -> None:
        """Read what stands before the recording, unless that was done."""
        if turn.reader is not None:
            return
        prompt, task = self._open_prompt(turn)
        turn.step = prompt.step
        reader = PromptReader(self._decoder(task), room=self._processor.num_steps(self._room))
        reader.add(_piece(prompt.head, prompt.spans, self._hear(prompt.recordings)))
        reader.read()
        turn.reader = reader

    @property
    def _room(self) -> int:
        """Samples of a recording that memory is taken for beforehand."""
        return round(_ROOM_S * self._processor.log_mel.sampling_rate)

    def _open_prompt(self, turn: "_Turn") -> tuple[OpenPrompt, str]:
        """What stands around the turn's recording, and the task."""
        messages = [*self.messages, self._question(turn, BEING_SPOKEN)]
        task = task_of(messages, speak=self._settings.speak)
        return self._processor.open(messages, task=task, tools=self._settings.tools), task

    @torch.no_grad()
    def _hear(self, recordings: Sequence[Recording]) -> list[Tensor]:
        """Embeddings of recordings of former turns, [A, D] each."""
        return self._model.hear(Clips.of(recordings).to(self._model.device)) if recordings else []

    def _heard(self, turn: "_Turn", embeddings: Tensor, *, read: bool = True) -> None:
        """Read more of the recording.

        A short piece is read with what follows it, since a pass over both takes no longer than over one: if
        the question ends here, the reply begins a pass sooner.
        """
        count = len(embeddings)
        if not count:
            return
        assert turn.reader is not None
        assert turn.step is not None
        piece = _piece(turn.step.expand(-1, count), [AudioSpan(0, count)], [embeddings])
        is_short = count <= self._model.backbone.cheap_columns
        if read and is_short:
            turn.reader.read()
        turn.reader.add(piece)
        if read and not is_short:
            turn.reader.read()

    def _close_recording(self, turn: "_Turn") -> tuple["PromptReader", Message]:
        """Hear the rest of the recording and lay out what follows it."""
        assert turn.waveform is not None
        assert turn.hearing is not None
        assert turn.reader is not None
        self._heard(turn, turn.hearing.finish(turn.waveform.finish()), read=False)
        prompt, _ = self._open_prompt(turn)
        turn.reader.add(_piece(prompt.tail, (), ()))
        frames = Frames(turn.hearing.frames, self._processor.encoder_mark)
        return turn.reader, self._question(turn, frames)

    def _close_text(self, turn: "_Turn") -> tuple["PromptReader", Message]:
        """Lay out a turn without a recording."""
        question = self._question(turn, None)
        messages = [*self.messages, question]
        task = task_of(messages, speak=self._settings.speak)
        sample = self._processor(messages, task=task, tools=self._settings.tools)
        reader = PromptReader(self._decoder(task), room=0)
        reader.add(_piece(sample.layout.grid, sample.layout.spans, self._hear(sample.recordings)))
        return reader, question


@dataclass
class _Turn:
    """A question that is being asked.

    Attributes:
        before: text before the recording.
        after: text after it.
        waveform: the recording, None before its first sample.
        hearing: what is heard of it.
        reader: what the LM has read; None before the head.
        step: a step of the recording on the grid, [K + 1, 1].
    """

    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    waveform: WaveformStream | None = None
    hearing: Hearing | None = None
    reader: "PromptReader | None" = None
    step: Tensor | None = None


@dataclass
class _Answer:
    """A reply that is being streamed: what it answers, and what was written so far."""

    question: Message
    text: str = ""


class _Piece(NamedTuple):
    """Columns of a prompt, and what is heard in them."""

    grid: Tensor  # [K + 1, s]
    spans: tuple[AudioSpan, ...]
    heard: tuple[Tensor, ...]  # [A, D] each


def _piece(grid: Tensor, spans: Sequence[AudioSpan], heard: Sequence[Tensor]) -> _Piece:
    return _Piece(grid, tuple(spans), tuple(heard))


class PromptReader:
    """Lets a decoder read one prompt piece by piece.

    Args:
        decoder: reads it.
        room: columns that memory is taken for, beyond those of the first piece.
    """

    def __init__(self, decoder: Decoder, *, room: int) -> None:
        self.decoder = decoder
        self._room = room
        self._pieces: list[_Piece] = []
        self._num_read = 0
        self._state: DecodingState | None = None
        self._reserved = 0  # columns of the prompt that the state has room for

    def add(self, piece: _Piece) -> None:
        """Put a piece behind those before; it is read with the next ``read`` or ``close``."""
        if piece.grid.shape[1]:
            self._pieces.append(piece)

    def read(self) -> None:
        """Read all pieces so far; LMs that take prompts in one piece only wait for the end.

        Raises:
            ContextOverflowError: if the prompt leaves no room for a reply.
        """
        if self.decoder.model.backbone.reads_in_pieces and len(self._pieces) > self._num_read:
            state = self._opened()
            grid, places, heard = self._unread()
            self.decoder.read(state, grid, places=places, heard=heard)
            self._num_read = len(self._pieces)

    def close(self) -> DecodingState:
        """Read what is left, and return the state before the first step of the reply.

        Raises:
            ContextOverflowError: if the prompt leaves no room for a reply.
        """
        state = self._opened()
        grid, places, heard = self._unread()
        self.decoder.close(state, grid, places=places, heard=heard)
        self._pieces, self._state = [], None
        return state

    def _opened(self) -> DecodingState:
        """The state, with room for all pieces so far: a new one, which has read nothing, if it has none."""
        columns = sum(piece.grid.shape[1] for piece in self._pieces)
        if self._state is None or columns > self._reserved:
            self._reserved = self._reserve(columns)
            self._state, self._num_read = self.decoder.open(prompt_steps=self._reserved), 0
        return self._state

    def _reserve(self, columns: int) -> int:
        """Columns of a prompt to take memory for that has ``columns`` already."""
        room = self._room if self._state is None else columns  # doubled where it did not suffice
        limit = self.decoder.model.backbone.max_positions
        if limit is not None:
            room = max(0, min(room, limit - self.decoder.least_steps - columns))
        return columns + room

    def _unread(self) -> tuple[Tensor, list[tuple[int, int, int]], list[Tensor]]:
        """The pieces that were not read, as one: grid [1, K + 1, s], places and embeddings."""
        device = self.decoder.model.device
        places: list[tuple[int, int, int]] = []
        heard: list[Tensor] = []
        start = 0
        for piece in self._pieces[self._num_read :]:
            places += [(0, start + span.start, span.length) for span in piece.spans]
            heard += piece.heard
            start += piece.grid.shape[1]
        grid = torch.cat([piece.grid for piece in self._pieces[self._num_read :]], dim=1)
        return grid[None].to(device), places, heard
