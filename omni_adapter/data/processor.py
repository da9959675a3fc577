"""Turn messages and recordings into prompts, under the base LM's own chat template.

Messages in, samples out: text ids, marks and features, laid out on the grid; or what stands before and after
a recording that is still being spoken. Knows nothing of models.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor

from omni_adapter.audio.clips import Frames, Recording, encoder_mark
from omni_adapter.audio.features import LogMel
from omni_adapter.audio.waveform import AudioSource, read_waveform
from omni_adapter.config import OmniConfig
from omni_adapter.data.collator import Sample
from omni_adapter.data.layout import (
    Answer,
    AudioSegment,
    AudioSpan,
    GridRules,
    TextSegment,
    get_task,
    lay_out,
)
from omni_adapter.errors import PromptError

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""What stands in for a chat template where the base has none."""

SLAM_SYSTEM: Mapping[str, str] = {
    "asr": "Transcribe the provided audio into accurate text. ",
    "tts": "Generate a natural and expressive spoken version of the given text. ",
    "speech_to_speech": "Conduct a spoken conversation with the user. ",
}
"""What checkpoints of SLAM-Omni were told in training, by task; the others are told the last."""

Message = Mapping[str, Any]

_TASK_OF = {
    (True, True): "speech_to_speech",
    (True, False): "speech_to_text",
    (False, True): "text_to_speech",
    (False, False): "text_to_text",
}
"""Task by whether the prompt has a recording and whether the reply is spoken."""


class BeingSpoken:
    """Stands in a message for a recording that is not over yet; see :meth:`OmniProcessor.open`."""


BEING_SPOKEN: Final = BeingSpoken()


class OpenPrompt(NamedTuple):
    """A prompt around a recording of unknown length.

    Attributes:
        head: what stands before the recording, int64 [K + 1, H].
        step: each step of the recording, [K + 1, 1].
        tail: what stands after it, [K + 1, T].
        spans: where the recordings of earlier turns go, all in the head.
        recordings: what is heard there.
    """

    head: Tensor
    step: Tensor
    tail: Tensor
    spans: tuple[AudioSpan, ...]
    recordings: tuple[Recording, ...]

    def close(self, num_steps: int) -> tuple[Tensor, tuple[AudioSpan, ...]]:
        """Return grid [K + 1, S] and spans of the prompt once its recording takes ``num_steps`` steps."""
        grid = torch.cat((self.head, self.step.expand(-1, num_steps), self.tail), dim=1)
        return grid, (*self.spans, AudioSpan(self.head.shape[1], num_steps))


class OmniProcessor:
    """Lays prompts out for one talker.

    Args:
        tokenizer: the base LM's own.
        log_mel: features of recordings.
        config: ids, delays and shapes of the talker.
    """

    def __init__(self, tokenizer: Any, log_mel: LogMel, *, config: OmniConfig) -> None:
        self.tokenizer = tokenizer
        self.log_mel = log_mel
        self.config = config
        self.rules = GridRules.of(config)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, tokenizer: Any, config: OmniConfig) -> Self:
        """Load what ``save_pretrained`` wrote; the tokenizer is the base's."""
        return cls(tokenizer, LogMel.from_pretrained(folder), config=config)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the settings of the features; the tokenizer stays with the base."""
        self.log_mel.save_pretrained(folder)

    def __call__(
        self,
        messages: Sequence[Message],
        *,
        task: str,
        tools: Sequence[Mapping[str, Any]] | None = None,
        answer: Answer | None = None,
    ) -> Sample:
        """Lay one conversation out.

        Args:
            messages: turns as transformers writes them, ``{"role": …, "content": …}``; content is a string or
                a list of ``{"type": "text", "text": …}`` and ``{"type": "audio", "audio": source}``, where a
                source is anything that :func:`omni_adapter.audio.waveform.read_waveform` reads.
            task: asr, tts, speech_to_text, speech_to_speech, text_to_speech or text_to_text.
            tools: handed on to the chat template.
            answer: what to learn or feed; None for a prompt to decode from.

        Raises:
            PromptError: if the messages do not fit the task or the chat template.
            AudioError: if a recording cannot be used.
        """
        segments, sounds = self._segments(messages, task=task, tools=tools)
        if any(isinstance(sound, BeingSpoken) for sound in sounds):
            raise PromptError("a recording of this prompt is still being spoken; lay it out with open()")
        layout = lay_out(segments, task=task, rules=self.rules, answer=answer)
        return Sample(layout, self._recordings(sounds))

    def open(
        self, messages: Sequence[Message], *, task: str, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> OpenPrompt:
        """Lay out a conversation whose last recording is still being spoken.

        Args:
            messages: as for ``__call__``; the source of the last recording is ``BEING_SPOKEN``.
            task: likewise; one that hears.
            tools: handed on to the chat template.

        Raises:
            PromptError: if the messages do not fit the task or the chat template, or another recording is
                being spoken.
        """
        segments, sounds = self._segments(messages, task=task, tools=tools)
        if [isinstance(sound, BeingSpoken) for sound in sounds] != [False] * (len(sounds) - 1) + [True]:
            raise PromptError("an open prompt needs one recording that is being spoken, the last of all")
        layout = lay_out(segments, task=task, rules=self.rules)
        *spans, (start, length) = layout.spans
        assert length == 1
        grid, end = layout.grid, start + length
        recordings = self._recordings(sounds[:-1])
        return OpenPrompt(grid[:, :start], grid[:, start:end], grid[:, end:], tuple(spans), recordings)

    def _segments(
        self, messages: Sequence[Message], *, task: str, tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[list[TextSegment | AudioSegment], list[Tensor | Frames | BeingSpoken]]:
        """The prompt's segments under the conventions of a task, and what is heard."""
        spec = get_task(task)
        if spec.text_given and not self.rules.text_marks:
            # The text is the answer. Shown in the prompt too, it would teach a voice that looks ahead, which
            # no spoken answer can.
            messages = [*_without_last_user(messages), {"role": "user", "content": ""}]
        if self.config.prompt_format == "slam_omni":
            messages = _with_system(messages, SLAM_SYSTEM.get(task, SLAM_SYSTEM["speech_to_speech"]))
        segments, sounds = self.apply_chat_template(messages, tools=tools)
        if spec.hears and not sounds:
            raise PromptError(
                f'the task {task!r} hears, but no message has a part {{"type": "audio", "audio": …}}'
            )
        return segments, sounds

    def _recordings(self, sounds: Sequence[Tensor | Frames | BeingSpoken]) -> tuple[Recording, ...]:
        return tuple(self._features(sound) for sound in sounds if not isinstance(sound, BeingSpoken))

    def apply_chat_template(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[list[TextSegment | AudioSegment], list[Tensor | Frames | BeingSpoken]]:
        """Render messages with the base's chat template, up to where the assistant answers.

        Returns:
            The prompt's segments in order, and the waveforms [N] of its recordings, mono at the encoder's
            rate; frames that were encoded before stay as they are. A recording that is being spoken takes
            one step.

        Raises:
            PromptError: if the template refuses the messages or drops a recording.
        """
        if not messages:
            raise PromptError("no messages; pass at least one user turn")
        placeholder = _placeholder(messages)
        sources: list[AudioSource | Frames | BeingSpoken] = []
        flat = [_flatten(message, sources, placeholder) for message in messages]
        texts = self._render(flat, tools=tools)
        kept = sum(text.count(placeholder) for text in texts)
        if kept != len(sources) or (len(texts) > 1 and placeholder in texts[0]):
            raise PromptError(
                f"the base's chat template kept {kept} of {len(sources)} recordings; it may "
                "drop or repeat the content of some roles; put recordings into user turns"
            )
        sounds = [self._read(source) for source in sources]
        steps = iter([self._steps_of(sound) for sound in sounds])
        segments: list[TextSegment | AudioSegment] = []
        for text in texts:
            for index, piece in enumerate(text.split(placeholder)):
                if index:
                    segments.append(AudioSegment(next(steps)))
                ids = tuple(self.tokenizer(piece, add_special_tokens=False)["input_ids"])
                if ids:
                    segments.append(TextSegment(ids))
        return segments, sounds

    def num_steps(self, num_samples: int) -> int:
        """Return how many LM steps a recording of ``num_samples`` at the encoder's rate takes."""
        config = self.config
        windows = self.log_mel.num_frames(num_samples, padding=config.encoder_padding)
        frames = sum(-(-window // config.encoder_stride) for window in windows)
        return -(-frames // config.audio_adapter.stack)

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Return the ids of an answer's text, followed by the id that ends it."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return (*ids, self.rules.text_end_id)

    @property
    def encoder_mark(self) -> str:
        """What tells frames of this talker's encoder from those of any other, see :class:`Frames`."""
        config = self.config
        return encoder_mark(
            config.encoder.fingerprint,
            padding=config.encoder_padding,
            block_seconds=config.encoder_block_seconds,
        )

    @property
    def block_frames(self) -> int | None:
        """Feature frames that are heard as one block, None where a window is heard at once."""
        seconds = self.config.encoder_block_seconds
        return None if seconds is None else round(seconds * self.log_mel.frame_rate_hz)

    def _read(self, source: AudioSource | Frames | BeingSpoken) -> Tensor | Frames | BeingSpoken:
        if isinstance(source, BeingSpoken):
            return source
        if not isinstance(source, Frames):
            return read_waveform(source, sampling_rate=self.log_mel.sampling_rate)
        own = self.encoder_mark
        if source.encoder != own:
            raise PromptError(
                f"the recording was encoded by the encoder {source.encoder}, this talker has {own}; "
                "prepare the data again, or leave frames_in out"
            )
        return source

    def _steps_of(self, sound: Tensor | Frames | BeingSpoken) -> int:
        if isinstance(sound, BeingSpoken):
            return 1
        if isinstance(sound, Frames):
            return -(-sound.values.shape[0] // self.config.audio_adapter.stack)
        return self.num_steps(sound.shape[-1])

    def _features(self, sound: Tensor | Frames) -> Recording:
        if isinstance(sound, Frames):
            return sound
        return self.log_mel.windows(
            sound, padding=self.config.encoder_padding, block_frames=self.block_frames
        )

    def _render(
        self, messages: list[dict[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None
    ) -> list[str]:
        """The prompt as text, special tokens included, in the pieces that stand apart on the grid."""
        if self.config.prompt_format == "slam_omni":
            return _slam_texts(messages)
        if self.rules.text_marks:
            return ["".join(message["content"] for message in messages)]
        return [render_chat(self.tokenizer, messages, tools=tools, add_generation_prompt=True)]


def task_of(messages: Sequence[Message], *, speak: bool) -> str:
    """Return the task of answering ``messages``, by whether there is a recording in them.

    Args:
        messages: as for :class:`OmniProcessor`.
        speak: answer in speech and text; otherwise in text only.
    """
    hears = any(
        part.get("type") == "audio"
        for message in messages
        if not isinstance(message.get("content"), str)
        for part in message.get("content") or ()
        if isinstance(part, Mapping)
    )
    return _TASK_OF[hears, speak]


def render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool,
) -> str:
    """Render text messages with the tokenizer's chat template, or ``PLAIN_TEMPLATE`` where it has none.

    Raises:
        PromptError: if the template refuses the messages.
    """
    template = tokenizer.chat_template
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) if tools else None,
            chat_template=template or PLAIN_TEMPLATE,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    except TemplateError as error:
        raise PromptError(
            f"the base's chat template refuses these messages: {error}; "
            "if it knows no system role, put those words at the start of the first user turn"
        ) from error
    return str(text) if template else _first_token(tokenizer) + str(text)


def find_text_end_ids(tokenizer: Any, eos_token_ids: Iterable[int]) -> tuple[int, ...]:
    """Return the ids that end an assistant's turn, the one that the chat template writes first.

    Args:
        tokenizer: the base LM's own.
        eos_token_ids: ids that the base's generation config stops at.

    Raises:
        PromptError: if neither template, tokenizer nor generation config names one.
    """
    found: list[int] = []
    if tokenizer.chat_template:
        mark = "answer"
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
        rest = render_chat(tokenizer, turns, add_generation_prompt=False).rpartition(mark)[2]
        ids = tokenizer(rest, add_special_tokens=False)["input_ids"]
        found += [token for token in ids[:1] if token in tokenizer.all_special_ids]
    found += [token for token in (tokenizer.eos_token_id, *eos_token_ids) if token is not None]
    if not found:
        raise PromptError(
            "the base has no end-of-turn id: its chat template, tokenizer and generation config name none; "
            "pass text_end_ids="
        )
    return tuple(dict.fromkeys(found))


def tokenizer_fingerprint(tokenizer: Any) -> dict[str, Any]:
    """Return the facts by which a tokenizer is recognised: size, digests of its vocabulary and template."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return {
        "tokenizer_size": len(tokenizer),
        "tokenizer_sha256": _digest(vocabulary),
        "chat_template_sha256": _digest(json.dumps(tokenizer.chat_template, ensure_ascii=False)),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _first_token(tokenizer: Any) -> str:
    """The token that the tokenizer itself puts before every text, if it does."""
    first = tokenizer("")["input_ids"][:1]
    return str(tokenizer.bos_token) if first == [tokenizer.bos_token_id] and first != [None] else ""


def _without_last_user(messages: Sequence[Message]) -> list[Message]:
    """Earlier turns: the text of the last user turn is what is to be read out, so it becomes the answer."""
    return list(messages[:-1]) if messages and messages[-1]["role"] == "user" else list(messages)


def _with_system(messages: Sequence[Message], text: str) -> list[Message]:
    """The messages after a system prompt, unless they have one."""
    has_system = any(message["role"] == "system" for message in messages)
    return [*messages] if has_system else [{"role": "system", "content": text}, *messages]


def _slam_texts(messages: Sequence[Message]) -> list[str]:
    """What SLAM-Omni is told, earlier turns included, and the last user's turn."""
    *before, question = messages
    told = "".join(f"<SYSTEM>: {turn['content']}\n " for turn in before if turn["role"] == "system")
    names = {"user": "<USER>: ", "assistant": "<ASSISTANT>: "}
    history = " ".join(
        names[turn["role"]] + turn["content"].strip() for turn in before if turn["role"] in names
    )
    return [told + (f"{history}\n " if history else ""), question["content"]]


def _placeholder(messages: Sequence[Message]) -> str:
    """A word that stands for a recording while text is rendered, and occurs in no message."""
    said, word = repr(messages), "<|recording|>"
    while word in said:
        word = f"<|{_digest(word)}|>"
    return word


def _flatten(
    message: Message, sources: list[AudioSource | Frames | BeingSpoken], placeholder: str
) -> dict[str, Any]:
    """One message with plain text as its content; its recordings are appended to ``sources``."""
    if "role" not in message or ("content" not in message and "tool_calls" not in message):
        raise PromptError(f"a message needs 'role' and 'content', got {sorted(message)}")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return dict(message)
    if not isinstance(content, Sequence):
        raise PromptError(f"content must be a string or a list of parts, got {type(content).__name__}")
    pieces = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            pieces.append(str(part["text"]))
        elif kind == "audio" and "audio" in part:
            pieces.append(placeholder)
            sources.append(part["audio"])
        else:
            raise PromptError(
                'a part of a message must be {"type": "text", "text": …} or {"type": "audio", "audio": …}, '
                f"got {part!r}"
            )
    return {**message, "content": "".join(pieces)}
