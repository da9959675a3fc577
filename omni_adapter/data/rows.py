"""Rows of training data: one schema for every task, checked, and turned into samples.

Plain mappings in, rows and samples out; what cannot serve its task goes out as a counted reject with a stable
reason code. Knows nothing of files, data sets or models.

========== ================================= ======================================================
column     value                             meaning
========== ================================= ======================================================
id         str or int                        names the row in reports; made up if missing
task       key of ``TASKS``                  what to learn; usually set for a whole source
audio_in   recording                         the question as speech
frames_in  ``{"values", "width",             what the audio encoder made of ``audio_in``, kept by
           "encoder"}``                      ``prepare``; used in its place
text_in    str                               the question as text; the transcript of ``audio_in``
                                             where there is one
audio_out  recording                         the answer as speech
codes_out  [K, T] ints                       the answer as codes of the codec: K lists, one a code
                                             row, not delayed
text_out   str                               the answer as text; the transcript of ``audio_out``
                                             where there is one
turns      list of ``{"role", "content"}``,  earlier turns, as chat templates take them
           or the same as JSON
system     str                               system prompt
speaker    str                               name of the voice
language   str                               language of the row
========== ================================= ======================================================

A recording is a path, a file's bytes, ``{"bytes", "path"}`` or ``{"array", "sampling_rate"}`` as ``datasets``
gives them, or a pair of samples and rate. ``content`` is a string, or a list of parts
``{"type": "text", "text"}`` and ``{"type": "audio", "audio"}``. A row without a question of its own takes the
last user turn of ``turns`` as its question; one without an answer the assistant turn that ends ``turns``.

One row of question and answer, spoken and written, serves every task: ``asr`` learns what ``audio_in`` says,
that is ``text_in``; ``tts`` learns to read ``text_out`` aloud.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omni_adapter.audio.clips import Frames
from omni_adapter.audio.codec import Codec
from omni_adapter.audio.waveform import AudioSource, read_waveform
from omni_adapter.data.collator import Sample
from omni_adapter.data.layout import TASKS, Answer, Task, get_task
from omni_adapter.data.processor import OmniProcessor
from omni_adapter.errors import AudioError, CodeGridError, DataError, PromptError, RowError

COLUMNS = (
    "id", "task", "audio_in", "frames_in", "text_in", "audio_out", "codes_out", "text_out", "turns", "system",
    "speaker", "language",
)  # fmt: skip
"""Every column of the schema; others are ignored."""

REASONS: Mapping[str, str] = {
    "bad_codes": "codes_out is not [K, T] of ids that the codec knows",
    "bad_frames": "frames_in is not what prepare writes",
    "bad_json": "the line is no JSON object",
    "bad_prompt": "the base's chat template refuses the turns",
    "bad_transcript": "the text that lies beside a recording cannot be read",
    "bad_turns": "turns is not a list of messages with a role and a content",
    "no_audio_in": "the task hears, but the row has no recording of the question",
    "no_audio_out": "the task speaks, but the row has neither codes_out nor audio_out",
    "no_task": "neither the row nor its source names a task",
    "no_text_in": "the task reads, but the row has no question",
    "no_text_out": "the task needs a text to learn or to read aloud, but the row has none",
    "not_taught": "the base is to teach, and cannot teach this task",
    "not_spoken": "the synthesizer could not speak the text",
    "outside_root": "a path leaves the folder of the data",
    "too_long": "the sample has more steps than the run allows",
    "unknown_task": "the row names a task that does not exist",
    "wrong_type": "a column holds a value of the wrong type",
}
"""Reason codes of rejects; those of recordings are ``audio_in_`` or ``audio_out_`` and ``AudioError``'s."""

TAUGHT_TASKS = frozenset({"speech_to_text", "speech_to_speech"})
"""Tasks whose text the base itself can teach: it would answer the same question in text."""

Message = dict[str, Any]
_ROLES = ("system", "user", "assistant", "tool")


def needed_columns(task: str) -> tuple[tuple[str, ...], ...]:
    """Return what a row needs for a task: of each inner tuple, one column at least.

    Raises:
        PromptError: if there is no such task.
    """
    spec = get_task(task)
    needs: list[tuple[str, ...]] = []
    if spec.hears:
        needs.append(("audio_in", "frames_in", "turns"))
    elif not spec.text_given:
        needs.append(("text_in", "turns"))
    needs.append(_text_columns(spec))
    if spec.speaks:
        needs.append(("codes_out", "audio_out"))
    return tuple(needs)


def _text_columns(spec: Task) -> tuple[str, ...]:
    """Where the text that is learned or read aloud stands."""
    if spec.mark == "asr":
        return ("text_in",)
    return ("text_out",) if spec.text_given else ("text_out", "turns")


NEEDS: Mapping[str, tuple[tuple[str, ...], ...]] = {task: needed_columns(task) for task in TASKS}
"""``needed_columns`` of every task."""


def check_columns(columns: Iterable[str], *, task: str, source: str) -> None:
    """Refuse a source that lacks a column which its task needs.

    Raises:
        DataError: naming what is missing and the columns that were found.
    """
    found = sorted(columns)
    missing = [" or ".join(names) for names in needed_columns(task) if not set(names) & set(found)]
    if missing:
        raise DataError(
            f"{source}: the task {task!r} needs {', '.join(missing)}; found the columns {', '.join(found)}; "
            "name yours with columns: {theirs: ours}"
        )


@dataclass(frozen=True, eq=False)
class Row:
    """One row, checked. Attributes are the columns of the schema, see the top of this module.

    Attributes:
        turns: earlier messages, the question and the answer excluded.
        codes_out: int64, [K, T].
    """

    id: str
    task: str
    audio_in: AudioSource | None = None
    frames_in: Frames | None = None
    text_in: str | None = None
    audio_out: AudioSource | None = None
    codes_out: Tensor | None = None
    text_out: str | None = None
    turns: tuple[Message, ...] = ()
    system: str | None = None
    speaker: str | None = None
    language: str | None = None

    @property
    def answer_text(self) -> str:
        """The text that the row's task learns or reads aloud."""
        for column in _text_columns(get_task(self.task)):
            if column != "turns" and (text := getattr(self, column)) is not None:
                return str(text)
        return ""

    def messages(self) -> list[Message]:
        """Return the prompt as messages, the question last."""
        spec = get_task(self.task)
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        if spec.hears:
            question: Any = [{"type": "audio", "audio": self.frames_in or self.audio_in}]
        else:
            question = self.answer_text if spec.text_given else self.text_in
        return [*system, *self.turns, {"role": "user", "content": question}]


def parse_row(
    values: Mapping[str, Any], *, task: str | None = None, name: str = "row", root: Path | None = None
) -> Row:
    """Check one row.

    Args:
        values: column names and values; None counts as missing.
        task: the source's task; it wins over the row's own.
        name: id of a row that has none.
        root: folder that paths are relative to and must stay inside; None takes paths as they are.

    Raises:
        RowError: if the row cannot serve its task; ``reason`` is a key of ``REASONS``.
    """
    row = read_row(values, task=task, name=name, root=root)
    if not row.task:
        raise RowError(
            f"{row.id} names no task, nor does its source; tasks are {', '.join(TASKS)}", reason="no_task"
        )
    if row.task not in TASKS:
        raise RowError(f"{row.id}: no task is called {row.task!r}", reason="unknown_task")
    check_needs(row)
    return row


def check_needs(row: Row) -> None:
    """Check that a row has what its task needs.

    Raises:
        RowError: naming the first thing that it lacks.
    """
    for names in NEEDS[row.task]:
        if all(getattr(row, column) is None for column in names if column != "turns"):
            reason = f"no_{names[0].replace('codes_out', 'audio_out')}"
            raise RowError(f"{row.id}: {row.task} needs {' or '.join(names)}", reason=reason)


def read_row(
    values: Mapping[str, Any], *, task: str | None = None, name: str = "row", root: Path | None = None
) -> Row:
    """Check the types of one row, whatever its task; arguments as for :func:`parse_row`.

    Raises:
        RowError: if a column has a value of the wrong type.
    """
    given = {column: values[column] for column in COLUMNS if values.get(column) is not None}
    name = str(given.get("id", name))
    texts = {
        column: _text(given, column, name)
        for column in ("text_in", "text_out", "system", "speaker", "language")
    }
    turns = _turns(given.get("turns"), name, root)
    audio_in, audio_out = (
        _audio(given.get(column), column, name, root) for column in ("audio_in", "audio_out")
    )
    codes = _codes(given.get("codes_out"), name)
    if texts["text_out"] is None and turns and turns[-1]["role"] == "assistant":
        texts["text_out"], _ = _take(turns.pop())
    frames = _frames(given.get("frames_in"), name)
    asked = texts["text_in"] is not None or audio_in is not None or frames is not None
    if not asked and turns and turns[-1]["role"] == "user":
        texts["text_in"], audio_in = _take(turns.pop())
    own_task = _text(given, "task", name)
    return Row(
        id=name, task=task or own_task or "", audio_in=audio_in, frames_in=frames, audio_out=audio_out,
        codes_out=codes, turns=tuple(turns), **texts,
    )  # fmt: skip


def to_sample(
    row: Row,
    processor: OmniProcessor,
    *,
    codec: Codec | None = None,
    max_steps: int | None = None,
    taught: bool = False,
) -> Sample:
    """Lay a row out with its answer.

    Args:
        row: what :func:`parse_row` returned.
        processor: the talker's.
        codec: encodes ``audio_out`` of rows without codes.
        max_steps: longest sample that is taken.
        taught: the base teaches answers to speech by what it makes of the question in text, ``text_in``.

    Raises:
        RowError: if the row cannot be laid out.
        DataError: if the row's answer is a recording and ``codec`` is None.
    """
    codes = _answer_codes(row, codec) if get_task(row.task).speaks else None
    answer = Answer(processor.text_ids(row.answer_text)[:-1], codes)
    try:
        sample = processor(row.messages(), task=row.task, answer=answer)
        teacher = _teacher(row, processor, answer) if taught else None
    except AudioError as error:
        raise RowError(f"{row.id}: {error}", reason=f"audio_in_{error.reason}") from error
    except CodeGridError as error:
        raise RowError(f"{row.id}: {error}", reason="bad_codes") from error
    except PromptError as error:
        raise RowError(f"{row.id}: {error}", reason="bad_prompt") from error
    steps = sample.layout.grid.shape[1]
    if max_steps is not None and steps > max_steps:
        raise RowError(f"{row.id} takes {steps} steps, the run allows {max_steps}", reason="too_long")
    transcript = None
    if sample.recordings and row.text_in is not None:
        transcript = processor.text_ids(row.text_in)[:-1]
    return sample._replace(id=row.id, teacher=teacher, transcript=transcript)


def _teacher(row: Row, processor: OmniProcessor, answer: Answer) -> Sample | None:
    """The row's question in text, with the same answer; None for tasks that learn no text."""
    if not get_task(row.task).text_loss:
        return None
    if row.task not in TAUGHT_TASKS:
        raise RowError(f"{row.id}: the base cannot teach {row.task}", reason="not_taught")
    if row.text_in is None:
        raise RowError(f"{row.id}: the base can only teach rows that have text_in", reason="no_text_in")
    written = replace(row, task="text_to_text")
    teacher = processor(written.messages(), task="text_to_text", answer=Answer(answer.text_ids))
    if teacher.recordings:
        raise RowError(f"{row.id}: the base cannot teach turns with recordings", reason="bad_turns")
    return teacher


def _answer_codes(row: Row, codec: Codec | None) -> Tensor:
    """Codes [K, T] of the row's spoken answer."""
    if row.codes_out is not None:
        return row.codes_out
    if codec is None:
        raise DataError(
            f"{row.id} has audio_out but no codes_out, and no codec is at hand to encode it; "
            "encode the data once with recipes/prepare.py"
        )
    assert row.audio_out is not None
    try:
        waveform = read_waveform(row.audio_out, sampling_rate=codec.spec.sampling_rate)
    except AudioError as error:
        raise RowError(f"{row.id}: {error}", reason=f"audio_out_{error.reason}") from error
    with torch.no_grad():
        return codec.encode(waveform)


@dataclass
class Rejects:
    """Counts rows that were taken and rows that were not, and stops a run that loses too many.

    Args:
        limit: largest share of rejects, 0..1.
        grace: rows to see before the share can stop the run; the final check has no grace.

    Attributes:
        taken: rows that served.
        counts: rejects by reason.
        examples: the first few rejects of each reason, in words.
    """

    limit: float = 0.05
    grace: int = 100
    taken: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    _EXAMPLES = 3

    @property
    def total(self) -> int:
        """Rejects of all reasons."""
        return self.counts.total()

    @property
    def share(self) -> float:
        """Rejects as a share of all rows seen."""
        return self.total / max(1, self.total + self.taken)

    def take(self, count: int = 1) -> None:
        """Count rows that served."""
        self.taken += count

    def reject(self, error: RowError, *, count: int = 1) -> None:
        """Count rows that did not serve.

        Raises:
            DataError: if by now too large a share was rejected.
        """
        self.counts[error.reason] += count
        examples = self.examples.setdefault(error.reason, [])
        if len(examples) < self._EXAMPLES:
            examples.append(str(error))
        if self.total + self.taken >= self.grace:
            self.check()

    def check(self) -> None:
        """Stop if too large a share was rejected, or if every row was.

        Raises:
            DataError: with counts and examples.
        """
        if self.share > self.limit or (self.total and not self.taken):
            raise DataError(
                f"{self.total} of {self.total + self.taken} rows were rejected ({self.share:.1%}, at most "
                f"{self.limit:.1%} may be):\n{self.report()}"
            )

    def report(self) -> str:
        """Return counts and examples, one reason a paragraph."""
        lines = []
        for reason, count in self.counts.most_common():
            lines.append(f"  {reason}: {count} ({REASONS.get(reason, 'a recording cannot be used')})")
            lines += [f"    {example}" for example in self.examples.get(reason, ())]
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts as plain JSON."""
        return {"taken": self.taken, "counts": dict(self.counts), "examples": self.examples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        self.taken, self.counts = int(state["taken"]), Counter(state["counts"])
        self.examples = {reason: list(texts) for reason, texts in state["examples"].items()}


def resolve_inside(name: str, root: Path) -> Path:
    """Return the file called ``name`` under ``root``, links followed.

    Raises:
        RowError: if it lies outside of ``root``, or the name is not one that every system reads alike.
    """
    if "\0" in name or "\\" in name or name[1:2] == ":":
        raise RowError(f"the path {name!r} is not relative with forward slashes", reason="outside_root")
    top = root.resolve()
    try:
        path = (top / PurePosixPath(name)).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise RowError(f"the path {name!r} cannot be followed: {error}", reason="outside_root") from error
    if not path.is_relative_to(top):
        raise RowError(f"the path {name!r} leaves the folder of the data", reason="outside_root")
    return path


def _text(given: Mapping[str, Any], column: str, name: str) -> str | None:
    value = given.get(column)
    if value is None:
        return None
    if not isinstance(value, str):
        raise RowError(f"{name}: {column} must be a string, got {type(value).__name__}", reason="wrong_type")
    return value if value.strip() else None


def _audio(value: Any, column: str, name: str, root: Path | None) -> AudioSource | None:
    """A recording in a form that ``read_waveform`` takes."""
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            value = value["bytes"]
        elif value.get("array") is not None:
            value = (value["array"], value.get("sampling_rate"))
        else:
            value = value.get("path")
    if isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[1], int):
        return np.asarray(value[0], dtype=np.float32), value[1]
    if value is None or isinstance(value, bytes | Path):
        return value
    if isinstance(value, str):
        return Path(value) if root is None else resolve_inside(value, root)
    raise RowError(
        f"{name}: {column} must be a path, bytes, a mapping with them, or samples with their rate, "
        f"got {type(value).__name__}",
        reason="wrong_type",
    )


def _codes(value: Any, name: str) -> Tensor | None:
    """Codes as int64 [K, T]; which K is right, the layout knows."""
    if value is None:
        return None
    try:
        rows = [np.asarray(row) for row in value]
        codes = np.stack(rows) if rows else np.empty(0)
    except (TypeError, ValueError) as error:
        raise RowError(
            f"{name}: codes_out must be K lists of one length: {error}", reason="bad_codes"
        ) from error
    if codes.ndim != 2 or not codes.size or not np.issubdtype(codes.dtype, np.integer):
        came = f"{codes.dtype} of shape {list(codes.shape)}"
        raise RowError(f"{name}: codes_out must be ints of shape [K, T], got {came}", reason="bad_codes")
    return torch.from_numpy(codes.astype(np.int64))


def _frames(value: Any, name: str) -> Frames | None:
    """Frames of the encoder, stored as the bytes of float16 values [A', E]."""
    if value is None:
        return None
    try:
        values = np.frombuffer(value["values"], dtype="<f2").reshape(-1, value["width"])
        frames = Frames(torch.from_numpy(values.astype(np.float32)), str(value["encoder"]))
    except (TypeError, KeyError, ValueError) as error:
        raise RowError(
            f"{name}: frames_in must be as prepare writes it: {error}", reason="bad_frames"
        ) from error
    if not frames.values.numel() or not bool(frames.values.isfinite().all()):
        raise RowError(f"{name}: frames_in is empty or not finite", reason="bad_frames")
    return frames


def _turns(value: Any, name: str, root: Path | None) -> list[Message]:
    if value is None:
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"{name}: turns is no JSON: {error}", reason="bad_turns") from error
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise RowError(f"{name}: turns must be a list, got {type(value).__name__}", reason="bad_turns")
    return [_turn(turn, name, root) for turn in value]


def _turn(turn: Any, name: str, root: Path | None) -> Message:
    role = turn.get("role") if isinstance(turn, Mapping) else None
    content = turn.get("content") if isinstance(turn, Mapping) else None
    if role not in _ROLES or not isinstance(content, str | list | tuple):
        raise RowError(
            f"{name}: a turn needs a role ({', '.join(_ROLES)}) and a content, got {turn!r:.200}",
            reason="bad_turns",
        )
    if isinstance(content, str):
        return {"role": role, "content": content}
    return {"role": role, "content": [_part(part, name, root) for part in content]}


def _part(part: Any, name: str, root: Path | None) -> Message:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "audio" and part.get("audio") is not None:
        return {"type": "audio", "audio": _audio(part["audio"], "turns", name, root)}
    raise RowError(f"{name}: a part of a turn must be text or audio, got {part!r:.200}", reason="bad_turns")


def _take(turn: Message) -> tuple[str | None, AudioSource | None]:
    """Text and recording of a turn that becomes the row's own question or answer."""
    content = turn["content"]
    if isinstance(content, str):
        return content if content.strip() else None, None
    text = "".join(part["text"] for part in content if part["type"] == "text")
    recordings = [part["audio"] for part in content if part["type"] == "audio"]
    return text if text.strip() else None, recordings[-1] if recordings else None
