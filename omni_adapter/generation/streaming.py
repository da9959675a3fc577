"""Turn steps into what a listener gets: text as it is written, sound as soon as it can no longer change.

Steps in, chunks out. Knows nothing of models or prompts.
"""

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omni_adapter.audio.codec import Codec, CodecStream
from omni_adapter.audio.delay import UndelayState, undelay_chunk
from omni_adapter.data.layout import GridRules
from omni_adapter.generation.generator import FinishReason, Step

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Chunk:
    """The next piece of a reply.

    Attributes:
        text: text that was added, may be empty.
        audio: samples that were added, float32 [n] in -1..1, may be empty.
        sampling_rate: of ``audio``, Hz.
        step: answer step that brought it, from 0.
        elapsed_s: seconds since the question was handed over.
        finish_reason: why the reply ended, on its last chunk: ``end``, ``length`` (``max_new_tokens``) or
            ``context`` (the base's positions); else None.
    """

    text: str
    audio: NDArray[np.float32]
    sampling_rate: int
    step: int
    elapsed_s: float
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Reply:
    """A whole reply: its stream, collected.

    Attributes:
        text: what was written.
        audio: what was said, float32 [N] in -1..1; empty for tasks that do not speak.
        sampling_rate: of ``audio``, Hz.
        finish_reason: why it ended, see :class:`Chunk`.
        steps: answer steps.
        first_text_s: seconds until the first text, None if there was none.
        first_audio_s: seconds until the first sound, None if there was none.
        elapsed_s: seconds until the end.
    """

    text: str
    audio: NDArray[np.float32]
    sampling_rate: int
    finish_reason: FinishReason
    steps: int
    first_text_s: float | None
    first_audio_s: float | None
    elapsed_s: float

    @property
    def duration_s(self) -> float:
        """Length of the sound, seconds."""
        return len(self.audio) / self.sampling_rate

    @property
    def real_time_factor(self) -> float | None:
        """Seconds of work per second of sound; below 1 keeps up with speech. None without sound."""
        return self.elapsed_s / self.duration_s if self.duration_s else None

    @classmethod
    def collect(cls, chunks: Iterable[Chunk]) -> Self:
        """Join the chunks of one reply."""
        seen = list(chunks)
        last = seen[-1]
        assert last.finish_reason is not None
        return cls(
            text="".join(chunk.text for chunk in seen),
            audio=np.concatenate([chunk.audio for chunk in seen]),
            sampling_rate=last.sampling_rate,
            finish_reason=last.finish_reason,
            steps=last.step + 1,
            first_text_s=next((chunk.elapsed_s for chunk in seen if chunk.text), None),
            first_audio_s=next((chunk.elapsed_s for chunk in seen if len(chunk.audio)), None),
            elapsed_s=last.elapsed_s,
        )


@dataclass
class TextStream:
    """Decodes text ids one by one, holding back characters whose bytes are not complete.

    Attributes:
        tokenizer: the base's own.
        ids: all ids so far.
        context: first id that decoding looks at; tokenizers write a token by what stands before it.
        shown: ids whose text was given out.
    """

    tokenizer: Any
    ids: list[int] = field(default_factory=list)
    context: int = 0
    shown: int = 0

    def push(self, token: int) -> str:
        """Return the text that ``token`` completes."""
        self.ids.append(token)
        return self._new_text(final=False)

    def finish(self) -> str:
        """Return what was held back."""
        return self._new_text(final=True)

    def _new_text(self, *, final: bool) -> str:
        before = self._decode(self.ids[self.context : self.shown])
        now = self._decode(self.ids[self.context :])
        if (now.endswith(_REPLACEMENT) and not final) or len(now) <= len(before):
            return ""
        self.context, self.shown = self.shown, len(self.ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Voice:
    """Undelays, buffers and decodes the codes of one conversation.

    Args:
        codec: decodes frames.
        rules: delays and ids of the code rows.
        stride: frames per chunk of sound; the first chunk comes as soon as any sound is final.
        seed: seed of the codec's noise.
        lookahead_frames: frames that a sample waits for at most, see :class:`CodecStream`.
    """

    def __init__(
        self,
        codec: Codec,
        *,
        rules: GridRules,
        stride: int,
        seed: int,
        lookahead_frames: int | None = None,
    ) -> None:
        self.rules = rules
        self.stride = stride
        self.stream = CodecStream(codec, seed=seed, lookahead_frames=lookahead_frames)
        self.undelay = UndelayState()
        self.waiting: list[Tensor] = []  # frames [K, m] not yet decoded
        self.held = torch.zeros(rules.num_codebooks, dtype=torch.long)  # last code of each row
        self.started = False
        spec = codec.spec
        lookahead = codec.context_samples[1] if codec.context_samples else 0
        exact = lookahead // spec.samples_per_frame
        waits_for = exact if lookahead_frames is None else min(exact, lookahead_frames)
        self.first_stride = min(stride, waits_for + 1)

    def push(self, codes: Tensor) -> Tensor:
        """Return the sound [n] that one step of delayed ids [K] makes final."""
        frames = self.take(codes)
        return torch.empty(0) if frames is None else self.stream.push(frames).cpu()

    def take(self, codes: Tensor, *, tick: int | None = None) -> Tensor | None:
        """Take one step of delayed ids [K]; return frames [K, m] if a chunk of sound is due, else None.

        Args:
            codes: ids of the code rows.
            tick: step of a batch; chunks after the first are due at every ``stride``-th, so that those of all
                voices come together. None counts this voice's own frames.
        """
        frames = undelay_chunk(
            codes[None, :, None], self.undelay, delays=self.rules.delays, end=self.rules.vocabulary.end
        )
        if frames.shape[-1]:
            self.waiting.append(self._hold(frames[0]) if self.rules.code_rule == "free" else frames[0])
        count = sum(part.shape[-1] for part in self.waiting)
        if self.started and tick is not None:
            is_due = count > 0 and tick % self.stride == 0
        else:
            is_due = count >= (self.stride if self.started else self.first_stride)
        return self._waiting() if is_due else None

    def finish(self) -> Tensor:
        """Return the rest of the sound [n]."""
        frames = self._waiting()
        rest = torch.empty(0) if frames is None else self.stream.push(frames).cpu()
        return torch.cat((rest, self.stream.finish().cpu()))

    def _hold(self, frames: Tensor) -> Tensor:
        """Frames [K, m] with every mark replaced by the code before it, since codecs know codes only."""
        codes = []
        for frame in frames.unbind(dim=-1):
            is_code = frame < self.rules.vocabulary.codebook_size
            self.held = torch.where(is_code, frame, self.held.to(frame.device))
            codes.append(self.held)
        return torch.stack(codes, dim=-1)

    def _waiting(self) -> Tensor | None:
        """The frames [K, m] that wait, which are no longer kept; None if none do."""
        if not self.waiting:
            return None
        self.started = True
        frames = torch.cat(self.waiting, dim=-1)
        self.waiting.clear()
        return frames


@dataclass(frozen=True)
class Rendering:
    """What turns ids into text and sound.

    Attributes:
        tokenizer: the base's own.
        text_end_ids: ids that end a text and are not shown.
        codec: decodes codes.
        speaks: whether there are codes to decode.
        rules: ids and delays of the grid.
        stride: frames per chunk of sound.
        seed: seed of the codec's noise.
        lookahead_frames: frames that a sample waits for at most; None makes the sound exact.
    """

    tokenizer: Any
    text_end_ids: Sequence[int]
    codec: Codec
    speaks: bool
    rules: GridRules
    stride: int
    seed: int
    lookahead_frames: int | None = None

    def listener(self) -> "Listener":
        """Return a fresh listener for one conversation."""
        voice = None
        if self.speaks:
            voice = Voice(
                self.codec,
                rules=self.rules,
                stride=self.stride,
                seed=self.seed,
                lookahead_frames=self.lookahead_frames,
            )
        hidden_ids = frozenset((*self.text_end_ids, self.rules.no_text))
        rate = self.codec.spec.sampling_rate
        return Listener(TextStream(self.tokenizer), voice, hidden_ids, sampling_rate=rate)


class Listener:
    """Text and sound of one conversation."""

    def __init__(
        self, text: TextStream, voice: Voice | None, hidden_ids: frozenset[int], *, sampling_rate: int
    ) -> None:
        self.text, self.voice, self.hidden_ids, self.sampling_rate = text, voice, hidden_ids, sampling_rate
        self.steps = 0

    def take(self, token: int, codes: Tensor, *, last: bool) -> tuple[str, Tensor]:
        """Return new text and new sound of one step."""
        text = self.write(token, last=last)
        audio = self.voice.push(codes) if self.voice else torch.empty(0)
        return text, self.end(audio) if last else audio

    def write(self, token: int, *, last: bool) -> str:
        """Return the new text of one step."""
        self.steps += 1
        text = "" if token in self.hidden_ids else self.text.push(token)
        return text + self.text.finish() if last else text

    def end(self, audio: Tensor) -> Tensor:
        """Return the sound of the last step, with the rest that follows."""
        return torch.cat((audio, self.voice.finish())) if self.voice else audio

    def chunk(
        self, text: str, audio: Tensor, *, elapsed_s: float, reason: FinishReason | None
    ) -> Chunk | None:
        """Return what a step brought, None if it brought nothing."""
        if not (text or len(audio) or reason):
            return None
        samples = audio.float().numpy()
        return Chunk(text, samples, self.sampling_rate, self.steps - 1, elapsed_s, reason)


def stream_chunks(
    steps: Generator[Step, None, None], *, rendering: Rendering, num_conversations: int, started_s: float
) -> Iterator[tuple[int, Chunk]]:
    """Yield (conversation, chunk) as soon as there is text or sound.

    Args:
        steps: from the decoding loop; closed when this is closed.
        rendering: turns ids into text and sound.
        num_conversations: conversations in the batch.
        started_s: ``time.perf_counter()`` when the question was handed over.
    """
    listeners = [rendering.listener() for _ in range(num_conversations)]
    with closing(steps):
        for step in steps:
            tokens, codes = step.text.tolist(), step.codes.cpu()
            for place, (index, reason) in enumerate(zip(step.conversations, step.finished, strict=True)):
                listener = listeners[index]
                text, audio = listener.take(tokens[place], codes[place], last=reason is not None)
                elapsed_s = time.perf_counter() - started_s
                chunk = listener.chunk(text, audio, elapsed_s=elapsed_s, reason=reason)
                if chunk is not None:
                    yield index, chunk
