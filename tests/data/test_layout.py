"""Grids are written out as tables here: what one reads in the paper's figures 2 and 4."""

from dataclasses import replace

import pytest
import torch

from omni_adapter.data.layout import TASKS, Answer, AudioSegment, GridRules, TextSegment, lay_out
from omni_adapter.errors import CodeGridError, PromptError
from omni_adapter.vocab import IGNORE_INDEX, NO_TEXT, CodeVocabulary, TextMarks

VOCABULARY = CodeVocabulary(90)
RULES = GridRules(VOCABULARY, delays=(1, 2, 3), text_end_id=9)
MARKED = GridRules(
    VOCABULARY,
    delays=(1, 2, 3),
    text_end_id=800,
    text_marks=TextMarks(end=800, pad=801, input=802, answer=803, asr=804),
)
SLAM = replace(MARKED, prompt_format="slam_omni")
SIGNS = {
    VOCABULARY.end: "E", VOCABULARY.pad: ".", VOCABULARY.input: "I", VOCABULARY.answer: "A",
    VOCABULARY.asr: "R", NO_TEXT: "-", IGNORE_INDEX: "_", 800: "e", 801: "p", 802: "i", 803: "a", 804: "r",
}  # fmt: skip


def table(grid: torch.Tensor) -> list[str]:
    return [" ".join(SIGNS.get(int(value), str(int(value))) for value in row) for row in grid]


def codes(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


SPOKEN = Answer((1, 2), codes([10, 11], [20, 21], [30, 31]))
HEARD = [TextSegment((5,)), AudioSegment(2), TextSegment((6, 7))]
READ = [TextSegment((5, 6, 7))]


def test_speech_to_speech():
    layout = lay_out(HEARD, task="speech_to_speech", rules=RULES, answer=SPOKEN)
    assert table(layout.grid) == [
        ". I . . E . A . 10 11 E . .",
        ". I . . E . A . . 20 21 E .",
        ". I . . E . A . . . 30 31 E",
        "5 - - - - 6 7 1 2 9 - - -",
    ]
    assert table(layout.labels) == [
        "_ _ _ _ _ _ _ _ 10 11 E _ _",
        "_ _ _ _ _ _ _ _ _ 20 21 E _",
        "_ _ _ _ _ _ _ _ _ _ 30 31 E",
        "_ _ _ _ _ _ _ 1 2 9 _ _ _",
    ]
    assert layout.spans == ((2, 2),)
    assert layout.prompt_length == 7


@pytest.mark.parametrize(
    ("task", "segments", "mark"),
    [("asr", HEARD, "R"), ("speech_to_text", HEARD, "."), ("text_to_text", READ, ".")],
)
def test_text_answers_carry_no_codes(task, segments, mark):
    layout = lay_out(segments, task=task, rules=RULES, answer=Answer((1, 2)))
    start = layout.prompt_length
    for row in table(layout.grid)[:3]:
        assert row.split()[start - 1] == mark
        assert set(row.split()[start:]) == {"."}
    assert table(layout.grid)[3].split()[start:] == ["1", "2", "9"]
    assert table(layout.labels)[3].split()[start:] == ["1", "2", "9"]
    assert (layout.labels[:3] == IGNORE_INDEX).all()


def test_tts_learns_codes_only():
    layout = lay_out(READ, task="tts", rules=RULES, answer=SPOKEN)
    assert (layout.labels[-1] == IGNORE_INDEX).all()
    assert table(layout.labels)[0].endswith("10 11 E _ _")


def test_text_longer_than_speech():
    layout = lay_out(
        READ, task="text_to_speech", rules=RULES, answer=Answer((1, 2, 3, 4, 5, 6, 7), SPOKEN.codes)
    )
    assert table(layout.grid)[0] == ". . A . 10 11 E . . . ."
    assert table(layout.grid)[3] == "5 6 7 1 2 3 4 5 6 7 9"


def test_silent_answer_ends_every_row():
    empty = Answer((1,), torch.empty(3, 0, dtype=torch.long))
    assert table(lay_out(READ, task="tts", rules=RULES, answer=empty).grid)[:3] == [
        ". . A . E . .",
        ". . A . . E .",
        ". . A . . . E",
    ]


def test_delays_are_free():
    rules = GridRules(VOCABULARY, delays=(4, 0, 4), text_end_id=9)
    assert table(lay_out(READ, task="tts", rules=rules, answer=SPOKEN).grid)[:3] == [
        ". . A . . . . 10 11 E",
        ". . A 20 21 E . . . .",
        ". . A . . . . 30 31 E",
    ]


def test_prompt_that_ends_with_a_recording_gets_a_step_for_its_mark():
    layout = lay_out([AudioSegment(1)], task="asr", rules=RULES)
    assert table(layout.grid)[0] == "I . E R"
    assert table(layout.grid)[3] == "- - - -"


@pytest.mark.parametrize(
    ("task", "segments", "code_row", "text_row"),
    [
        ("speech_to_speech", [AudioSegment(2)], "I . . E A", "i p p e a"),
        ("speech_to_text", [AudioSegment(2)], "I . . E .", "i p p e a"),
        ("asr", [AudioSegment(2)], "I . . E .", "i p p e r"),
        ("text_to_speech", [TextSegment((5, 6))], ". . . . A", "i 5 6 e a"),
        ("text_to_text", [TextSegment((5, 6))], ". . . . .", "i 5 6 e a"),
    ],
)
def test_original_layouts(task, segments, code_row, text_row):
    layout = lay_out(segments, task=task, rules=MARKED)
    assert table(layout.grid) == [code_row] * 3 + [text_row]


def test_original_layout_feeds_text_pads_after_the_end():
    layout = lay_out([TextSegment((5,))], task="text_to_speech", rules=MARKED, answer=SPOKEN)
    assert table(layout.grid)[3] == "i 5 e a 1 2 e p p p"


def test_every_task_is_laid_out():
    assert set(TASKS) == {
        "asr", "tts", "speech_to_text", "speech_to_speech", "text_to_speech", "text_to_text"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer((1,)), r"needs codes of shape \[3, T\], got none"),
        (Answer((1,), torch.zeros(2, 4)), r"\[3, T\], got shape \(2, 4\)"),
        (Answer((1,), codes([90], [0], [0])), r"codes must lie in 0..89, got 0..90"),
        (Answer((1,), codes([-1], [0], [0])), r"got -1..0"),
    ],
)
def test_wrong_codes_are_refused(answer, message):
    with pytest.raises(CodeGridError, match=message):
        lay_out(READ, task="tts", rules=RULES, answer=answer)


def test_unknown_task_and_empty_prompt_are_refused():
    with pytest.raises(PromptError, match="no task is called 'sing'; the tasks are asr, tts"):
        lay_out(READ, task="sing", rules=RULES)
    with pytest.raises(PromptError, match="the prompt is empty"):
        lay_out([], task="asr", rules=RULES)


@pytest.mark.parametrize("task", ["speech_to_speech", "asr", "speech_to_text"])
def test_slam_omni_tells_first_and_asks_for_every_answer_by_one_mark(task):
    told = [TextSegment((5, 6)), AudioSegment(2)]
    layout = lay_out(told, task=task, rules=SLAM)
    assert table(layout.grid) == [*[". . . . I . . E A"] * 3, "i 5 6 e i p p e a"]
    assert layout.spans == ((5, 2),)
    assert SLAM.silent_mark == VOCABULARY.answer


def test_slam_omni_frames_a_written_question_as_it_does_a_recording():
    layout = lay_out([TextSegment((5,)), TextSegment((6, 7))], task="tts", rules=SLAM, answer=SPOKEN)
    assert table(layout.grid) == [
        ". . . I . . E A . 10 11 E . .",
        ". . . I . . E A . . 20 21 E .",
        ". . . I . . E A . . . 30 31 E",
        "i 5 e i 6 7 e a 1 2 e p p p",
    ]
    with pytest.raises(PromptError, match="first segment of this layout is text: what the model is told"):
        lay_out([AudioSegment(2)], task="asr", rules=SLAM)


def test_recordings_without_marks_stand_between_the_words():
    rules = replace(RULES, recording_marks=False)
    layout = lay_out(HEARD, task="speech_to_text", rules=rules)
    assert table(layout.grid) == [*[". . . . ."] * 3, "5 - - 6 7"]
    assert layout.spans == ((1, 2),)
