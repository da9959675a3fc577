"""Lay prompts and answers out on the grid that the model reads: K code rows above one text row.

Segments in, grid out: ids and audio lengths -> [K + 1, S]. Knows nothing of tokenizers, waveforms or models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from omni_adapter.audio.delay import delay_codes
from omni_adapter.config import CodeRule, OmniConfig, PromptFormat
from omni_adapter.errors import CodeGridError, PromptError
from omni_adapter.vocab import IGNORE_INDEX, NO_TEXT, CodeVocabulary, TextMarks


@dataclass(frozen=True)
class Task:
    """What goes in, what comes out and what is learned from it (paper, figure 4).

    Attributes:
        hears: the user's turn is speech.
        speaks: the answer has codes.
        mark: mark in the code rows at the last step of the prompt.
        text_loss: the answer's text is learned.
        code_loss: the answer's codes are learned.
        text_given: the answer's text is known beforehand; decoding feeds it instead of sampling.
    """

    hears: bool
    speaks: bool
    mark: str
    text_loss: bool
    code_loss: bool
    text_given: bool = False


TASKS: Mapping[str, Task] = {
    "asr": Task(hears=True, speaks=False, mark="asr", text_loss=True, code_loss=False),
    "tts": Task(hears=False, speaks=True, mark="answer", text_loss=False, code_loss=True, text_given=True),
    "speech_to_text": Task(hears=True, speaks=False, mark="pad", text_loss=True, code_loss=False),
    "speech_to_speech": Task(hears=True, speaks=True, mark="answer", text_loss=True, code_loss=True),
    "text_to_speech": Task(hears=False, speaks=True, mark="answer", text_loss=True, code_loss=True),
    "text_to_text": Task(hears=False, speaks=False, mark="pad", text_loss=True, code_loss=False),
}


def get_task(name: str) -> Task:
    """Return the task called ``name``.

    Raises:
        PromptError: if there is none.
    """
    if name not in TASKS:
        raise PromptError(f"no task is called {name!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[name]


class TextSegment(NamedTuple):
    """A piece of the prompt in text ids."""

    ids: tuple[int, ...]


class AudioSegment(NamedTuple):
    """A place in the prompt for a recording that takes ``num_steps`` steps."""

    num_steps: int


class AudioSpan(NamedTuple):
    """Where a recording's embeddings go: ``length`` steps from ``start``."""

    start: int
    length: int


class Answer(NamedTuple):
    """What the model is to answer: text ids without the end, and codes [K, T]."""

    text_ids: tuple[int, ...] = ()
    codes: Tensor | None = None


class Layout(NamedTuple):
    """One sample on the grid.

    Attributes:
        grid: ids, int64 [K + 1, S]; the last row is text, NO_TEXT where a step carries none.
        labels: [K + 1, S], equal to ``grid`` where it is learned and IGNORE_INDEX elsewhere; not shifted.
        spans: where recordings go, in order.
        prompt_length: steps before the answer.
    """

    grid: Tensor
    labels: Tensor
    spans: tuple[AudioSpan, ...]
    prompt_length: int


@dataclass(frozen=True)
class GridRules:
    """All ids and delays that a layout needs.

    Attributes:
        vocabulary: ids of the code rows.
        delays: steps by which each code row lags behind the text, length K.
        text_end_id: id that ends the answer's text.
        text_marks: ids of text marks where the checkpoint was trained with the original's layouts, else None.
        code_rule: what the code rows may write, see :class:`OmniConfig`.
        prompt_format: how prompts are laid out, see :class:`OmniConfig`.
        recording_marks: open and close each recording of a chat by a step of its own.
    """

    vocabulary: CodeVocabulary
    delays: tuple[int, ...]
    text_end_id: int
    text_marks: TextMarks | None = None
    code_rule: CodeRule = "delayed"
    prompt_format: PromptFormat = "chat"
    recording_marks: bool = True

    @classmethod
    def of(cls, config: OmniConfig) -> "GridRules":
        """Return the rules of a saved talker."""
        return cls(
            config.vocabulary,
            config.delays,
            config.text_end_ids[0],
            config.text_marks,
            config.code_rule,
            config.prompt_format,
            config.recording_marks,
        )

    @property
    def num_codebooks(self) -> int:
        """Code rows K."""
        return len(self.delays)

    @property
    def no_text(self) -> int:
        """What the text row holds at steps without text."""
        return self.text_marks.pad if self.text_marks else NO_TEXT

    @property
    def silent_mark(self) -> int:
        """What the code rows hold at the prompt's last step where another row of the batch speaks for it."""
        return self.vocabulary.answer if self.prompt_format == "slam_omni" else self.vocabulary.pad


class _Columns:
    """A grid under construction, left to right."""

    def __init__(self, rules: GridRules) -> None:
        self.rules = rules
        self.text: list[int] = []
        self.codes: list[int] = []  # in the prompt all code rows hold the same id
        self.spans: list[AudioSpan] = []

    def add(self, *, text: int, code: int) -> None:
        self.text.append(text)
        self.codes.append(code)

    def add_text(self, ids: Sequence[int]) -> None:
        for token in ids:
            self.add(text=token, code=self.rules.vocabulary.pad)

    def add_audio(self, num_steps: int) -> None:
        self.spans.append(AudioSpan(len(self.text), num_steps))
        for _ in range(num_steps):
            self.add(text=self.rules.no_text, code=self.rules.vocabulary.pad)

    def grid(self) -> Tensor:
        codes = torch.tensor(self.codes).expand(self.rules.num_codebooks, -1)
        return torch.cat((codes, torch.tensor(self.text)[None]))  # [K + 1, P]


def lay_out(
    segments: Sequence[TextSegment | AudioSegment],
    *,
    task: str,
    rules: GridRules,
    answer: Answer | None = None,
) -> Layout:
    """Lay one sample out: the prompt's segments, the task's mark, and the answer if there is one.

    Text token k of the answer stands at step k of the answer, frame f of code row r at step f + delays[r];
    each row holds pad before its first code, the end mark right after its last one, then pad again (paper,
    figure 2).

    Args:
        segments: text and recordings of the prompt, in order.
        task: key of ``TASKS``.
        rules: ids and delays.
        answer: what to learn or to feed; None for a prompt to decode from.

    Raises:
        PromptError: if the task is unknown or the prompt is empty.
        CodeGridError: if the answer's codes have the wrong shape or hold illegal ids.
    """
    spec = get_task(task)
    columns = _Columns(rules)
    if rules.text_marks and rules.prompt_format == "slam_omni":
        _add_slam_prompt(columns, segments, marks=rules.text_marks)
    elif rules.text_marks:
        _add_original_prompt(columns, segments, task=task, marks=rules.text_marks)
    else:
        _add_chat_prompt(columns, segments, mark=rules.vocabulary.mark(spec.mark))
    prompt = columns.grid()
    prompt_length = prompt.shape[1]
    if answer is None:
        return Layout(prompt, torch.full_like(prompt, IGNORE_INDEX), tuple(columns.spans), prompt_length)
    reply, labels = _answer_grid(answer, spec=spec, rules=rules)
    return Layout(
        torch.cat((prompt, reply), dim=1),
        torch.cat((torch.full_like(prompt, IGNORE_INDEX), labels), dim=1),
        tuple(columns.spans),
        prompt_length,
    )


def _add_chat_prompt(columns: _Columns, segments: Sequence[TextSegment | AudioSegment], *, mark: int) -> None:
    """The base's own prompt; recordings stand between marks, the task's mark on the last step."""
    vocabulary = columns.rules.vocabulary
    for segment in segments:
        if isinstance(segment, TextSegment):
            columns.add_text(segment.ids)
        elif columns.rules.recording_marks:
            columns.add(text=NO_TEXT, code=vocabulary.input)
            columns.add_audio(segment.num_steps)
            columns.add(text=NO_TEXT, code=vocabulary.end)
        else:
            columns.add_audio(segment.num_steps)
    if not columns.text:
        raise PromptError("the prompt is empty: no text and no recording")
    if columns.text[-1] == NO_TEXT:
        columns.add(text=NO_TEXT, code=vocabulary.pad)
    columns.codes[-1] = mark


def _add_original_prompt(
    columns: _Columns, segments: Sequence[TextSegment | AudioSegment], *, task: str, marks: TextMarks
) -> None:
    """The layouts that Mini-Omni's released checkpoint was trained with: marks in the text row too."""
    spec, vocabulary = get_task(task), columns.rules.vocabulary
    for segment in segments:
        if isinstance(segment, TextSegment):
            columns.add_text((marks.input, *segment.ids, marks.end))
        else:
            columns.add(text=marks.input, code=vocabulary.input)
            columns.add_audio(segment.num_steps)
            columns.add(text=marks.end, code=vocabulary.end)
    columns.add(
        text=marks.asr if task == "asr" else marks.answer,
        code=vocabulary.answer if spec.speaks else vocabulary.pad,
    )


def _add_slam_prompt(
    columns: _Columns, segments: Sequence[TextSegment | AudioSegment], *, marks: TextMarks
) -> None:
    """The layouts of SLAM-Omni in Mini-Omni mode: first what the model is told, then the question.

    The code rows frame a written question as they do a recording, and ask every task's answer by one mark.
    """
    vocabulary = columns.rules.vocabulary
    told, *asked = segments
    if not isinstance(told, TextSegment):
        raise PromptError("the first segment of this layout is text: what the model is told")
    columns.add_text((marks.input, *told.ids, marks.end))
    for segment in asked:
        columns.add(text=marks.input, code=vocabulary.input)
        if isinstance(segment, TextSegment):
            columns.add_text(segment.ids)
        else:
            columns.add_audio(segment.num_steps)
        columns.add(text=marks.end, code=vocabulary.end)
    columns.add(text=marks.answer, code=vocabulary.answer)


def _answer_grid(answer: Answer, *, spec: Task, rules: GridRules) -> tuple[Tensor, Tensor]:
    """Grid and labels of the answer, each [K + 1, S]."""
    text = torch.tensor([*answer.text_ids, rules.text_end_id])
    codes = torch.empty(rules.num_codebooks, 0, dtype=torch.long)
    if spec.speaks:
        codes = _delayed(answer.codes, rules)
    steps = max(text.shape[0], codes.shape[1])
    grid = torch.full((rules.num_codebooks + 1, steps), rules.vocabulary.pad)
    grid[-1] = rules.no_text
    grid[-1, : text.shape[0]] = text
    grid[:-1, : codes.shape[1]] = codes
    labels = grid.clone()
    labels[:-1][grid[:-1] == rules.vocabulary.pad] = IGNORE_INDEX
    labels[-1, text.shape[0] :] = IGNORE_INDEX
    if not spec.text_loss:
        labels[-1] = IGNORE_INDEX
    if not spec.code_loss:
        labels[:-1] = IGNORE_INDEX
    return grid, labels


def _delayed(codes: Tensor | None, rules: GridRules) -> Tensor:
    """The answer's codes [K, T], checked and delayed, [K, S]."""
    rows = rules.num_codebooks
    if codes is None or codes.dim() != 2 or codes.shape[0] != rows:
        came = "none" if codes is None else f"shape {tuple(codes.shape)}"
        raise CodeGridError(f"a spoken answer needs codes of shape [{rows}, T], got {came}")
    size = rules.vocabulary.codebook_size
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size:
        raise CodeGridError(
            f"codes must lie in 0..{size - 1}, got {int(codes.min())}..{int(codes.max())}; "
            "were they made with this codec?"
        )
    vocabulary = rules.vocabulary
    return delay_codes(codes[None].long(), delays=rules.delays, fill=vocabulary.pad, end=vocabulary.end)[0]
