"""Look through a source before anything is trained on it: what it holds, and what is wrong with it.

Source settings in, a ``Report`` out, as data or as a table. Rows are looked at one by one and forgotten:
counts, distributions in bars and digests of a bounded number are all that is kept, so that memory does not
grow with the source. Recordings are decoded as ``prepare`` decodes them, within limits. Knows nothing of
models; how many steps a row takes in one is asked of a function that is passed in.
"""

import itertools
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from omni_adapter.audio.waveform import AudioSource
from omni_adapter.config import SNAC_24KHZ, CodecSpec, Positive
from omni_adapter.data.counting import Bars, Digests, Names, Spread
from omni_adapter.data.dataset import LengthHistogram
from omni_adapter.data.encode import tags
from omni_adapter.data.layout import TASKS
from omni_adapter.data.reader import Reader
from omni_adapter.data.rows import REASONS, Row, check_columns, check_needs, read_row
from omni_adapter.data.sources import Source, SourceSpec, Stream, open_source, rename, usual_tasks
from omni_adapter.errors import AudioError, DataError, RowError

RATE = 16_000
"""Hz at which recordings are measured and compared."""

SECONDS_EDGES = (0, 1, 2, 5, 10, 15, 20, 30, 60, 120, 300, 600, 1800, 3600)
"""Bars of the histograms of seconds; what is longer is counted in the last one."""

TEXT_EDGES = (0, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 100_000)
"""Bars of the histogram of characters, likewise."""

LONG_S = 30.0
"""Recordings longer than this take more than one window of the audio encoder."""

_EXAMPLES = 3
_QUIET = 0.01  # of the loudest 20 ms: -40 dB
_FRAME_S = 0.02
_OUTLIER = 3.0  # times faster or slower than the median
_STEPS_ROWS = 200  # whose steps are counted, for each task

CountSteps = Callable[[Row], int]
"""Steps that a row takes in a model; a RowError if it cannot be laid out there."""


@pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class CheckSettings:
    """How a source is looked at.

    Args:
        limit: rows to look at, spread evenly over the source (the first ones of a stream); None for all.
        tasks: what the rows are for, where neither they nor the source say; empty for all that their columns
            allow.
        max_rejected: share of rows that training puts up with losing, 0..1.
        max_seconds: longest recording that is decoded.
        codec: geometry that codes must have.
    """

    limit: Positive | None = None
    tasks: tuple[str, ...] = ()
    max_rejected: float = 0.05
    max_seconds: float = 300.0
    codec: CodecSpec = SNAC_24KHZ


# --- one row ---


class Sound(NamedTuple):
    """What was found in one recording.

    Attributes:
        waveform: [N] at ``RATE``.
        seconds: its length.
        quiet_s: seconds that are 40 dB below its loudest moment.
    """

    waveform: Tensor
    seconds: float
    quiet_s: float

    @classmethod
    def of(cls, waveform: Tensor) -> "Sound":
        """Measure a recording."""
        frame = round(_FRAME_S * RATE)
        frames = waveform[: len(waveform) // frame * frame].reshape(-1, frame)
        levels = frames.square().mean(dim=1).sqrt()
        quiet = int((levels < _QUIET * levels.max()).sum()) if len(levels) else 0
        return cls(waveform, len(waveform) / RATE, quiet * _FRAME_S)


@dataclass
class Seen:
    """What was found in one row.

    Attributes:
        index: its number in the source.
        row: the row, None if it could not be read.
        sounds: recordings that could be decoded, by column.
        faults: reason and message of all that is wrong with it whatever its task, by the column at fault, ""
            for the whole row.
        grid_fault: its codes make no grid of the codec's rows.
        has_made_up_id: the source gives it none.
    """

    index: int
    row: Row | None = None
    sounds: dict[str, Sound] = field(default_factory=dict)
    faults: dict[str, RowError] = field(default_factory=dict)
    grid_fault: bool = False
    has_made_up_id: bool = False

    def seconds(self, column: str, codec: CodecSpec) -> float | None:
        """Seconds of ``audio_in`` or ``audio_out``; those of an answer in codes are counted by its frames."""
        if column in self.sounds:
            return self.sounds[column].seconds
        if column == "audio_out" and self.row is not None and self.row.codes_out is not None:
            return self.row.codes_out.shape[1] / codec.frame_rate_hz
        return None


def look(source: Source | Stream, spec: SourceSpec, index: int, *, reader: Reader, codec: CodecSpec) -> Seen:
    """Read one row and its recordings.

    Args:
        source: the rows.
        spec: how they are named.
        index: which one.
        reader: decodes recordings.
        codec: geometry that codes must have.
    """
    seen, name = Seen(index), f"{spec.path}#{index}"
    try:
        values = source.read(index, 0) if isinstance(source, Stream) else source[index]
        row = read_row(rename(values, spec), task=spec.task, name=name, root=source.root)
    except RowError as error:
        seen.faults[""] = error
        seen.grid_fault = error.reason == "bad_codes"
        return seen
    seen.row, seen.has_made_up_id = row, row.id == name
    if row.codes_out is not None and (fault := _codes_fault(row, row.codes_out, codec)):
        seen.faults["codes_out"] = fault
        seen.grid_fault = row.codes_out.shape[0] != codec.num_codebooks
    for column in ("audio_in", "audio_out"):
        recording = getattr(row, column)
        if recording is not None:
            _hear(seen, column, recording, reader)
    for turn in row.turns:
        parts = turn["content"] if not isinstance(turn["content"], str) else ()
        for part in parts:
            if part["type"] == "audio":
                _hear(seen, "audio_in", part["audio"], reader, keep=False)
    return seen


def _hear(seen: Seen, column: str, recording: AudioSource, reader: Reader, *, keep: bool = True) -> None:
    """Decode one recording."""
    assert seen.row is not None
    try:
        waveform = reader.read(recording, sampling_rate=RATE)
    except AudioError as error:
        text = f"{seen.row.id}: {column}: {error}"
        seen.faults[column] = RowError(text, reason=f"{column}_{error.reason}")
        return
    if keep:
        seen.sounds[column] = Sound.of(waveform)


def _codes_fault(row: Row, codes: Tensor, codec: CodecSpec) -> RowError | None:
    low, high = int(codes.min()), int(codes.max())
    if codes.shape[0] == codec.num_codebooks and 0 <= low and high < codec.codebook_size:
        return None
    return RowError(
        f"{row.id}: codes_out must be [{codec.num_codebooks}, T] of 0..{codec.codebook_size - 1}, "
        f"got {list(codes.shape)} of {low}..{high}",
        reason="bad_codes",
    )


def fault_for(seen: Seen, task: str) -> RowError | None:
    """Return what keeps a row from serving a task, None if nothing does."""
    if "" in seen.faults:
        return seen.faults[""]
    assert seen.row is not None
    if task not in TASKS:
        return RowError(f"{seen.row.id}: no task is called {task!r}", reason="unknown_task")
    row = replace(seen.row, task=task)
    try:
        check_needs(row)
    except RowError as error:
        return error
    spec = TASKS[task]
    if spec.hears and row.frames_in is None and "audio_in" in seen.faults:
        return seen.faults["audio_in"]
    answer = "codes_out" if row.codes_out is not None else "audio_out"
    return seen.faults.get(answer) if spec.speaks else None


def normalized(text: str) -> str:
    """Return a text without case, punctuation and space, by which the same words are known again."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(character for character in folded if character.isalnum())


# --- many rows ---


@dataclass(frozen=True)
class Report:
    """What a source holds. ``dataclasses.asdict`` gives plain JSON.

    Attributes:
        source: what it is called.
        columns: its columns, under their own names.
        rows: rows of the source; None for a stream.
        looked_at: rows that were looked at.
        lost_rows: rows in damaged parts of files.
        hours: of questions and answers among the rows that were looked at.
        seconds: distribution of the lengths of questions and answers.
        characters: distribution of the lengths of texts.
        histograms: edges and counts of lengths, by what is counted.
        over_30_s: recordings that are longer than 30 s, by column.
        quiet_share: share of the sound that is 40 dB below its recording's loudest moment, by column.
        tags: recordings that are clipped or off zero, by column and tag.
        codes: lowest and highest id, ids that the codec does not know, rows whose codes do not make a grid of
            the codec's rows (a count that is no multiple of them, or lists of unequal lengths).
        rates: characters and words a second of each column of speech with its text, and outliers.
        duplicates: rows that repeat a row before them, by what is the same, and examples.
        leaks: rows that are in the other source too, by what is the same, and examples.
        languages: rows by language.
        tasks: for each task the rows that serve it, and the others by reason.
        rejects: rows by reason, whatever the task, and examples.
        steps: distribution of the steps of a sample in the model, by task; empty without a model.
        problems: what training or prepare refuses, each with who does.
        notes: how to read the figures.
    """

    source: str
    columns: tuple[str, ...]
    rows: int | None
    looked_at: int
    lost_rows: int
    hours: dict[str, float]
    seconds: dict[str, dict[str, float]]
    characters: dict[str, dict[str, float]]
    histograms: dict[str, dict[str, list[int]]]
    over_30_s: dict[str, int]
    quiet_share: dict[str, float]
    tags: dict[str, int]
    codes: dict[str, int | None]
    rates: dict[str, dict[str, Any]]
    duplicates: dict[str, dict[str, Any]]
    leaks: dict[str, dict[str, Any]]
    languages: dict[str, int]
    tasks: dict[str, dict[str, Any]]
    rejects: dict[str, dict[str, Any]]
    steps: dict[str, dict[str, float]]
    problems: list[str]
    notes: list[str]


SPOKEN: Mapping[str, str] = {"audio_in": "text_in", "audio_out": "text_out"}
"""Columns of speech, and the text of each."""

NAMES: Mapping[str, str] = {"audio_in": "questions", "audio_out": "answers"}
"""What columns of speech are called in a report."""


@dataclass
class _Rates:
    """How fast a column is spoken, and who is fastest and slowest."""

    characters: Spread = field(default_factory=Spread)
    words: Spread = field(default_factory=Spread)
    extremes: list[tuple[float, str]] = field(default_factory=list)

    def add(self, text: str, seconds: float, name: str) -> None:
        rate = len(text) / seconds
        self.characters.add(rate)
        self.words.add(max(1, len(text.split())) / seconds)
        self.extremes = sorted([*self.extremes, (rate, name)])
        if len(self.extremes) > 2 * _EXAMPLES:
            self.extremes = self.extremes[:_EXAMPLES] + self.extremes[-_EXAMPLES:]

    def facts(self) -> dict[str, Any]:
        median = self.characters.quantile(0.5)
        low, high = median / _OUTLIER, median * _OUTLIER
        examples = [f"{name}: {rate:.1f}" for rate, name in self.extremes if not low <= rate <= high]
        return {
            "characters_per_s": self.characters.facts(),
            "words_per_s": self.words.facts(),
            "outliers": self.characters.outside(low, high),
            "examples": examples,
        }


class _Tally:
    """Everything that is kept of the rows so far."""

    def __init__(self, settings: CheckSettings, tasks: Sequence[str], count_steps: CountSteps | None) -> None:
        self.codec, self.tasks, self.count_steps = settings.codec, tuple(tasks), count_steps
        self.rows = 0
        self.seconds = {column: Spread() for column in SPOKEN}
        self.bars = {column: Bars(SECONDS_EDGES) for column in SPOKEN}
        self.quiet_s, self.heard_s = dict.fromkeys(SPOKEN, 0.0), dict.fromkeys(SPOKEN, 0.0)
        self.long: Counter[str] = Counter(dict.fromkeys(SPOKEN, 0))
        self.rates = {column: _Rates() for column in SPOKEN}
        self.characters = {column: Spread() for column in SPOKEN.values()}
        self.text_bars = {column: Bars(TEXT_EDGES) for column in SPOKEN.values()}
        self.tags = Names()
        self.code_rows, self.low, self.high, self.unknown, self.no_grid = 0, math.inf, -math.inf, 0, 0
        self.digests: dict[str, Digests] = {}
        self.languages = Names()
        self.served: Counter[str] = Counter()
        self.missed: dict[str, Counter[str]] = {task: Counter() for task in tasks}
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.steps: dict[str, Spread] = {}

    def add(self, seen: Seen) -> None:
        """Count one row."""
        self.rows += 1
        self.no_grid += seen.grid_fault
        if seen.row is not None:
            self.languages.add(seen.row.language or "(none)")
            self._add_codes(seen.row.codes_out)
            self._add_texts(seen.row)
            for column in SPOKEN:
                self._add_speech(seen, column)
            add_digests(seen, self.digests)
        self._add_tasks(seen)

    def _add_codes(self, codes: Tensor | None) -> None:
        if codes is None:
            return
        self.code_rows += 1
        self.low, self.high = min(self.low, int(codes.min())), max(self.high, int(codes.max()))
        self.unknown += int(((codes < 0) | (codes >= self.codec.codebook_size)).sum())

    def _add_texts(self, row: Row) -> None:
        for column in SPOKEN.values():
            if text := getattr(row, column):
                self.characters[column].add(len(text))
                self.text_bars[column].add(len(text))

    def _add_speech(self, seen: Seen, column: str) -> None:
        assert seen.row is not None
        if column in seen.sounds:
            sound = seen.sounds[column]
            self.heard_s[column] += sound.seconds
            self.quiet_s[column] += sound.quiet_s
            for tag in tags(sound.waveform):
                self.tags.add(f"{column}:{tag}")
        seconds = seen.seconds(column, self.codec)
        if seconds is None or seconds <= 0:
            return
        self.seconds[column].add(seconds)
        self.bars[column].add(seconds)
        self.long[column] += seconds > LONG_S
        if text := getattr(seen.row, SPOKEN[column]):
            self.rates[column].add(text, seconds, seen.row.id)

    def _add_tasks(self, seen: Seen) -> None:
        """Count for which tasks a row serves, and each reason why not once."""
        own = seen.row.task if seen.row is not None else ""
        found: dict[str, str] = {}
        if not self.tasks and not own and seen.row is not None:
            found["no_task"] = f"{seen.row.id} names no task, nor does its source"
        for task in self.tasks or ((own,) if own else ()):
            fault = fault_for(seen, task) or self._lay_out(seen, task)
            if fault is None:
                self.served[task] += 1
            else:
                self.missed.setdefault(task, Counter())[fault.reason] += 1
                found[fault.reason] = str(fault)
        found |= {fault.reason: str(fault) for fault in seen.faults.values()}
        for reason, message in found.items():
            self.reasons[reason] += 1
            examples = self.examples.setdefault(reason, [])
            if len(examples) < _EXAMPLES:
                examples.append(message)

    def _lay_out(self, seen: Seen, task: str) -> RowError | None:
        """Count the steps of a row, for the first ones of each task."""
        spread = self.steps.setdefault(task, Spread())
        if self.count_steps is None or spread.count >= _STEPS_ROWS:
            return None
        try:
            spread.add(self.count_steps(_ready(seen, task, self.codec)))
        except RowError as error:
            return error
        return None


def _ready(seen: Seen, task: str, codec: CodecSpec) -> Row:
    """A row with its recordings decoded, and codes of the right length for an answer that has none yet."""
    assert seen.row is not None
    row = replace(seen.row, task=task)
    if "audio_in" in seen.sounds:
        row = replace(row, audio_in=(seen.sounds["audio_in"].waveform, RATE))
    if row.codes_out is None and "audio_out" in seen.sounds:
        frames = math.ceil(seen.sounds["audio_out"].seconds * codec.frame_rate_hz)
        row = replace(row, codes_out=Tensor([[0] * frames] * codec.num_codebooks).long())
    return row


def add_digests(seen: Seen, digests: dict[str, Digests]) -> None:
    """Take from a row what tells it from others: id, recordings, codes, texts."""
    row = seen.row
    if row is None:
        return
    contents: dict[str, bytes] = {}
    if not seen.has_made_up_id:
        contents["id"] = row.id.encode()
    for column, sound in seen.sounds.items():
        contents[column] = (sound.waveform.numpy() * np.iinfo(np.int16).max).round().astype("<i2").tobytes()
    if row.codes_out is not None:
        contents["codes_out"] = row.codes_out.numpy().tobytes()
    texts = {column: normalized(getattr(row, column) or "") for column in SPOKEN.values()}
    contents |= {column: text.encode() for column, text in texts.items() if text}
    if row.turns:
        contents = {kind: value for kind, value in contents.items() if kind not in texts}
    for kind, content in contents.items():
        digests.setdefault(kind, Digests()).add(content, seen.index)


def check_source(
    spec: SourceSpec,
    *,
    settings: CheckSettings | None = None,
    against: SourceSpec | None = None,
    count_steps: CountSteps | None = None,
) -> Report:
    """Look through a source.

    Args:
        spec: the source.
        settings: how.
        against: another source that must not hold the same, such as the test set.
        count_steps: counts the steps of a row in a model.

    Raises:
        DataError: if a source cannot be opened, is empty, or lacks a column; or if both are the same.
    """
    settings = settings or CheckSettings()
    source = open_source(spec)
    other = None if against is None else open_source(against)
    if against is not None and other is not None and _same(source, spec, other, against):
        raise DataError(
            f"{against.path} ({against.split}) is the source itself; files on this disk have no splits, so "
            "name the other files"
        )
    tasks = _tasks_of(spec, source, settings.tasks)
    tally = _Tally(settings, tasks, count_steps)
    with Reader(max_seconds=settings.max_seconds) as reader:
        for index in _indexes(source, spec, settings):
            seen = look(source, spec, index, reader=reader, codec=settings.codec)
            if isinstance(source, Stream) and source.passes:
                break
            tally.add(seen)
        others: dict[str, Digests] = {}
        if against is not None and other is not None:
            for index in _indexes(other, against, settings):
                seen = look(other, against, index, reader=reader, codec=settings.codec)
                if isinstance(other, Stream) and other.passes:
                    break
                add_digests(seen, others)
    return _report(spec, source, tally, settings, against, others)


def _same(source: Source | Stream, spec: SourceSpec, other: Source | Stream, against: SourceSpec) -> bool:
    places = [replace(each, task=None, columns={}, limit=None, split="") for each in (spec, against)]
    if places[0] != places[1] or isinstance(source, Stream) or isinstance(other, Stream):
        return spec == against
    return source.fingerprint() == other.fingerprint()


def _tasks_of(spec: SourceSpec, source: Source | Stream, wanted: Sequence[str]) -> tuple[str, ...]:
    """Tasks that rows are held against; none where each row names its own."""
    if spec.task is not None:
        return (spec.task,)
    columns = [spec.columns.get(column, column) for column in source.columns]
    if "task" in columns:
        return ()
    usual, found, reasons = usual_tasks(spec), [], []
    for task in wanted or TASKS:
        if usual is not None and task not in usual:
            reasons.append(f"{spec.path} teaches {', '.join(usual)}, not {task}")
            continue
        try:
            check_columns(columns, task=task, source=spec.path)
            found.append(task)
        except DataError as error:
            reasons.append(str(error))
    if not found:
        raise DataError(f"{spec.path} serves none of the tasks: {'; '.join(reasons)}")
    return tuple(found)


def _indexes(source: Source | Stream, spec: SourceSpec, settings: CheckSettings) -> Iterator[int]:
    """Numbers of the rows that are looked at."""
    if isinstance(source, Stream):
        least = [limit for limit in (spec.limit, settings.limit) if limit is not None]
        yield from range(min(least)) if least else itertools.count()  # a stream ends by beginning again
        return
    length = min(len(source), spec.limit or len(source))
    looked = min(length, settings.limit or length)
    yield from (number * length // looked for number in range(looked))


def _report(
    spec: SourceSpec,
    source: Source | Stream,
    tally: _Tally,
    settings: CheckSettings,
    against: SourceSpec | None,
    others: Mapping[str, Digests],
) -> Report:
    duplicates = {
        kind: {"rows": digests.doubles, "examples": [list(pair) for pair in digests.examples()]}
        for kind, digests in sorted(tally.digests.items())
    }
    leaks: dict[str, dict[str, Any]] = {}
    for kind in sorted(tally.digests.keys() & others.keys() - {"id"}):
        rows, pairs = tally.digests[kind].shared(others[kind])
        leaks[kind] = {"rows": rows, "examples": [list(pair) for pair in pairs]}
    histograms = {
        **{f"seconds of {NAMES[column]}": bars.histogram() for column, bars in tally.bars.items()},
        **{f"characters of {column}": bars.histogram() for column, bars in tally.text_bars.items()},
    }
    tasks = {
        task: {"rows": tally.served[task], "rejected": dict(tally.missed.get(task, {}))}
        for task in dict.fromkeys([*tally.tasks, *tally.served, *tally.missed])
    }
    return Report(
        source=spec.path,
        columns=tuple(source.columns),
        rows=None if isinstance(source, Stream) else len(source),
        looked_at=tally.rows,
        lost_rows=source.lost_rows,
        hours={NAMES[column]: spread.total / 3600 for column, spread in tally.seconds.items()},
        seconds={NAMES[column]: spread.facts() for column, spread in tally.seconds.items()},
        characters={column: spread.facts() for column, spread in tally.characters.items()},
        histograms={
            name: {"edges": list(bars.edges), "counts": list(bars.counts)}
            for name, bars in histograms.items()
            if bars is not None
        },
        over_30_s={NAMES[column]: tally.long[column] for column in SPOKEN},
        quiet_share={
            NAMES[column]: tally.quiet_s[column] / tally.heard_s[column]
            for column in SPOKEN
            if tally.heard_s[column]
        },
        tags=dict(tally.tags),
        codes={
            "rows": tally.code_rows,
            "low": int(tally.low) if tally.code_rows else None,
            "high": int(tally.high) if tally.code_rows else None,
            "unknown_ids": tally.unknown,
            "rows_that_make_no_grid": tally.no_grid,
        },
        rates={NAMES[column]: rates.facts() for column, rates in tally.rates.items() if rates.words.count},
        duplicates=duplicates,
        leaks=leaks,
        languages=dict(tally.languages.most_common()),
        tasks=tasks,
        rejects={
            reason: {"rows": count, "examples": tally.examples[reason]}
            for reason, count in tally.reasons.most_common()
        },
        steps={task: spread.facts() for task, spread in tally.steps.items() if spread.count},
        problems=_problems(tally, settings, duplicates, leaks, against),
        notes=_notes(tally, source, others),
    )


def _problems(
    tally: _Tally,
    settings: CheckSettings,
    duplicates: Mapping[str, Mapping[str, Any]],
    leaks: Mapping[str, Mapping[str, Any]],
    against: SourceSpec | None,
) -> list[str]:
    """What would be refused, and by whom."""
    problems = []
    if not tally.rows:
        problems.append("training refuses a source without a row")
    if "no_task" in tally.reasons:
        share = tally.reasons["no_task"] / tally.rows
        if share > settings.max_rejected:
            problems.append(f"training refuses it: {share:.1%} of the rows name no task")
    for task in dict.fromkeys([*tally.tasks, *tally.missed]):
        missed = tally.missed[task].total() if task in tally.missed else 0
        share = missed / max(1, missed + tally.served[task])
        if share > settings.max_rejected or (missed and not tally.served[task]):
            problems.append(
                f"training refuses the task {task}: {missed} of {missed + tally.served[task]} rows "
                f"({share:.1%}) cannot serve it, at most {settings.max_rejected:.1%} may"
            )
    if duplicates.get("id", {}).get("rows"):
        problems.append(
            f"recipes/prepare.py refuses duplicate ids: {duplicates['id']['rows']} rows have one that a row "
            "before them has"
        )
    shared = [f"{leak['rows']} rows by {kind}" for kind, leak in leaks.items() if leak["rows"]]
    if shared and against is not None:
        problems.append(
            f"it leaks into {against.path} ({', '.join(shared)}): a model that learned the one cannot be "
            "tested on the other; take those rows out"
        )
    return problems


def _notes(tally: _Tally, source: Source | Stream, others: Mapping[str, Digests]) -> list[str]:
    notes = []
    if source.lost_rows:
        notes.append(f"{source.lost_rows} rows lie in damaged parts of files and are left out")
    bits = max((digests.bits for digests in (*tally.digests.values(), *others.values())), default=0)
    if bits:
        notes.append(f"duplicates and leaks: scaled up from one row in {1 << bits}, chosen by its content")
    if not isinstance(source, Stream) and tally.rows < len(source):
        notes.append(f"figures are of {tally.rows} of {len(source)} rows, spread evenly")
    return notes


# --- the table ---


def show(report: Report, console: Console) -> None:
    """Print a report for people."""
    table = Table(box=None, show_header=False, title=report.source, title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in _lines(report):
        table.add_row(Text(name), Text(value))
    console.print(table)
    console.print()
    for name, bars in report.histograms.items():
        console.print(Text(f"{name}, and how many have them", style="bold"))
        console.print(Text(str(LengthHistogram(tuple(bars["edges"]), tuple(bars["counts"])))))
        console.print()
    if report.rejects:
        console.print(Text("Rows that are rejected", style="bold"))
        for reason, reject in report.rejects.items():
            what = REASONS.get(reason, "a recording cannot be used")
            console.print(Text(f"  {reason}: {reject['rows']} ({what})"), soft_wrap=True)
            for example in reject["examples"]:
                console.print(Text(f"    {example}", style="dim"), soft_wrap=True)
        console.print()
    for note in report.notes:
        console.print(Text(f"· {note}", style="dim"), soft_wrap=True)
    for problem in report.problems:
        console.print(Text(f"· {problem}", style="red"), soft_wrap=True)
    if not report.problems:
        console.print(Text("Nothing that training would refuse.", style="bold green"))


def _lines(report: Report) -> Iterator[tuple[str, str]]:
    """Names and values of the table."""
    rows = "a stream" if report.rows is None else f"{report.rows:,}"
    yield "rows", f"{rows}, looked at {report.looked_at:,}, lost {report.lost_rows:,}"
    yield "columns", ", ".join(report.columns)
    yield from _lines_of_speech(report)
    codes = report.codes
    if codes["rows"] or codes["rows_that_make_no_grid"]:
        yield "codes", f"{codes['rows']:,} rows, ids {codes['low']}..{codes['high']}"
        yield "unknown codes", f"{codes['unknown_ids']:,} ids that the codec does not know"
        yield "broken grids", f"{codes['rows_that_make_no_grid']:,} rows"
    yield "languages", ", ".join(f"{name} {count:,}" for name, count in report.languages.items())
    for title, found in (("the same", report.duplicates), ("leak by", report.leaks)):
        for kind, what in found.items():
            pairs = "; ".join(f"{first} and {second}" for first, second in what["examples"])
            yield f"{title} {kind}", f"{what['rows']:,} rows{f' (rows {pairs})' if pairs else ''}"
    for task, counts in report.tasks.items():
        rejected = sum(counts["rejected"].values())
        yield f"serves {task}", f"{counts['rows']:,} rows{f', not {rejected:,}' if rejected else ''}"
    for task, steps in report.steps.items():
        span = f"{steps['low']:.0f} to {steps['high']:.0f}, mean {steps['mean']:.0f}"
        yield f"steps, {task}", f"{span}, in {steps['count']:.0f} rows"


def _lines_of_speech(report: Report) -> Iterator[tuple[str, str]]:
    for name, hours in report.hours.items():
        facts = report.seconds[name]
        if facts["count"]:
            span = f"{facts['low']:.1f} to {facts['high']:.1f} s, median {facts['median']:.1f} s"
            yield name, f"{hours:.2f} h in {facts['count']:,} recordings of {span}"
            yield f"{name} over {LONG_S:g} s", f"{report.over_30_s[name]:,}"
    for name, share in report.quiet_share.items():
        yield f"silence in {name}", f"{share:.1%}"
    for name, rate in report.rates.items():
        characters, words = rate["characters_per_s"]["median"], rate["words_per_s"]["median"]
        yield f"speed of {name}", f"{characters:.1f} characters and {words:.1f} words a second (medians)"
        examples = f" ({'; '.join(rate['examples'])})" if rate["examples"] else ""
        yield "outliers", f"{rate['outliers']:,} rows {_OUTLIER:g} times faster or slower{examples}"
    for name, count in report.tags.items():
        yield name, f"{count:,} recordings"
