import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from omni_adapter.data.collator import transcripts_of
from omni_adapter.data.layout import TASKS
from omni_adapter.data.rows import (
    COLUMNS,
    NEEDS,
    REASONS,
    Rejects,
    check_columns,
    parse_row,
    resolve_inside,
    to_sample,
)
from omni_adapter.errors import DataError, RowError

CODES = [[1, 2, 3]] * 7
WHOLE = {
    "id": "q1",
    "audio_in": b"a recording",
    "text_in": "How are you?",
    "codes_out": CODES,
    "text_out": "I am fine.",
}


def test_what_each_task_needs():
    """The table of the documentation, in full."""
    assert NEEDS == {
        "asr": (("audio_in", "frames_in", "turns"), ("text_in",)),
        "tts": (("text_out",), ("codes_out", "audio_out")),
        "speech_to_text": (("audio_in", "frames_in", "turns"), ("text_out", "turns")),
        "speech_to_speech": (
            ("audio_in", "frames_in", "turns"),
            ("text_out", "turns"),
            ("codes_out", "audio_out"),
        ),
        "text_to_speech": (("text_in", "turns"), ("text_out", "turns"), ("codes_out", "audio_out")),
        "text_to_text": (("text_in", "turns"), ("text_out", "turns")),
    }


@pytest.mark.parametrize("task", TASKS)
def test_one_row_serves_every_task(task):
    row = parse_row(WHOLE, task=task)
    assert (row.id, row.task) == ("q1", task)
    assert row.answer_text == ("How are you?" if task == "asr" else "I am fine.")
    assert torch.equal(row.codes_out, torch.tensor(CODES))


@pytest.mark.parametrize(
    ("task", "missing", "reason"),
    [
        ("asr", ("audio_in",), "no_audio_in"),
        ("asr", ("text_in",), "no_text_in"),
        ("tts", ("codes_out",), "no_audio_out"),
        ("tts", ("text_out",), "no_text_out"),
        ("speech_to_text", ("text_out",), "no_text_out"),
        ("speech_to_speech", ("audio_in",), "no_audio_in"),
        ("speech_to_speech", ("codes_out",), "no_audio_out"),
        ("text_to_speech", ("text_in",), "no_text_in"),
        ("text_to_text", ("text_in",), "no_text_in"),
        ("text_to_text", ("text_out",), "no_text_out"),
    ],
)
def test_a_row_that_cannot_serve_is_named(task, missing, reason):
    with pytest.raises(RowError, match=f"q1: {task} needs") as caught:
        parse_row({**WHOLE, **dict.fromkeys(missing)}, task=task)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("change", "reason", "message"),
    [
        ({"task": None}, "no_task", "names no task"),
        ({"task": "sing"}, "unknown_task", "no task is called 'sing'"),
        ({"text_in": 3}, "wrong_type", "text_in must be a string, got int"),
        ({"audio_in": 3.5}, "wrong_type", "audio_in must be a path"),
        ({"codes_out": [[1, 2], [3]]}, "bad_codes", "K lists of one length"),
        ({"codes_out": [1, 2]}, "bad_codes", r"shape \[K, T\], got int64 of shape \[2\]"),
        ({"codes_out": [[0.5]]}, "bad_codes", "got float64"),
        ({"codes_out": []}, "bad_codes", r"shape \[0\]"),
        ({"turns": "[" * 100_000}, "bad_turns", "no JSON"),
        ({"turns": {"role": "user"}}, "bad_turns", "must be a list"),
        ({"turns": [{"role": "pirate", "content": ""}]}, "bad_turns", "needs a role"),
        ({"turns": [{"role": "user", "content": [{"type": "smell"}]}]}, "bad_turns", "must be text or audio"),
    ],
)
def test_wrong_values_are_named(change, reason, message):
    with pytest.raises(RowError, match=message) as caught:
        parse_row({"task": "text_to_text", **WHOLE, **change})
    assert caught.value.reason == reason
    assert reason in REASONS


def test_the_sources_task_wins_over_the_rows():
    assert parse_row({**WHOLE, "task": "asr"}, task="tts").task == "tts"


def test_a_conversation_is_split_into_turns_question_and_answer():
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": [{"type": "text", "text": "three"}]},
        {"role": "assistant", "content": "four"},
    ]
    row = parse_row({"turns": json.dumps(turns)}, task="text_to_text", name="chat")
    assert (row.id, row.text_in, row.text_out, len(row.turns)) == ("chat", "three", "four", 2)
    assert [message["content"] for message in row.messages()] == ["one", "two", "three"]


@pytest.mark.parametrize(
    "recording",
    [
        {"bytes": b"x", "path": "a.wav"},
        {"bytes": None, "path": "a.wav"},
        {"array": [0.0, 0.5], "sampling_rate": 8000},
        ([0.0, 0.5], 8000),
    ],
)
def test_recordings_come_as_datasets_gives_them(recording, tmp_path):
    row = parse_row({**WHOLE, "audio_in": recording}, task="asr", root=tmp_path)
    if isinstance(row.audio_in, tuple):
        np.testing.assert_array_equal(row.audio_in[0], np.float32([0.0, 0.5]))
    else:
        assert row.audio_in in (b"x", tmp_path / "a.wav")


@pytest.mark.parametrize(
    "name", ["../x.wav", "/etc/passwd", "a/../../x", "C:\\x", "C:/x", "a\0b", "link/x.wav"]
)
def test_paths_stay_inside(name, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path)
    with pytest.raises(RowError, match="path") as caught:
        resolve_inside(name, tmp_path / "data")
    assert caught.value.reason == "outside_root"
    with pytest.raises(RowError, match="path"):
        parse_row({**WHOLE, "audio_in": name}, task="asr", root=tmp_path / "data")


def test_missing_columns_are_refused_with_the_list_found():
    with pytest.raises(
        DataError,
        match=r"calls: the task 'asr' needs audio_in or frames_in or turns; found the columns sound, text_in",
    ):
        check_columns(["sound", "text_in"], task="asr", source="calls")
    for task, needs in NEEDS.items():
        check_columns([names[0] for names in needs], task=task, source="calls")


def test_rejects_are_counted_and_stop_a_run():
    rejects = Rejects(limit=0.05, grace=10)
    rejects.take(95)
    for number in range(5):
        rejects.reject(RowError(f"row {number} is silent", reason="audio_in_silent"))
    rejects.check()
    with pytest.raises(
        DataError, match=r"6 of 101 rows were rejected \(5.9%, at most 5.0% may be\)"
    ) as caught:
        rejects.reject(RowError("row 5 has no text", reason="no_text_out"))
    text = str(caught.value)
    assert "audio_in_silent: 5" in text
    assert "row 2 is silent" in text
    assert "row 3 is silent" not in text
    assert "no_text_out: 1" in text
    again = Rejects()
    again.load_state_dict(json.loads(json.dumps(rejects.state_dict())))
    assert again.report() == rejects.report()
    assert again.share == rejects.share


def test_nothing_but_rejects_is_no_success():
    rejects = Rejects(limit=1.0)
    rejects.reject(RowError("bad", reason="bad_json"))
    with pytest.raises(DataError, match="1 of 1 rows"):
        rejects.check()


@pytest.mark.parametrize("task", TASKS)
def test_samples_hold_the_rows_answer(task, talker, question):
    row = parse_row({**WHOLE, "audio_in": question, "system": "Be kind."}, task=task)
    sample = to_sample(row, talker.processor)
    layout, spec = sample.layout, TASKS[task]
    assert sample.id == "q1"
    assert len(sample.recordings) == spec.hears
    learned = layout.labels[-1][layout.labels[-1] >= 0]
    answer = talker.processor.text_ids(row.answer_text)
    assert learned.tolist() == (list(answer) if spec.text_loss else [])
    fed = layout.grid[-1, layout.prompt_length :][: len(answer)]
    assert fed.tolist() == list(answer)
    if spec.speaks:
        start = layout.prompt_length + talker.config.delays[0]
        assert layout.grid[0, start : start + 3].tolist() == CODES[0]
    assert talker.tokenizer.decode(layout.grid[-1].clamp(min=0)).count("Be kind.") == 1


@pytest.mark.parametrize("task", ["speech_to_text", "speech_to_speech", "tts"])
def test_the_base_reads_the_question_that_is_heard(task, talker, question):
    row = parse_row({**WHOLE, "audio_in": question}, task=task)
    sample = to_sample(row, talker.processor, taught=True)
    if task == "tts":
        assert sample.teacher is None
        return
    read = sample.teacher.layout
    assert WHOLE["text_in"] in talker.tokenizer.decode(read.grid[-1])
    assert not read.spans
    learned, taught = (layout.labels[-1][layout.labels[-1] >= 0] for layout in (sample.layout, read))
    assert learned.tolist() == taught.tolist()


def test_rows_that_the_base_cannot_teach_are_named(talker, question):
    silent = parse_row({**WHOLE, "audio_in": question, "text_in": None}, task="speech_to_text")
    with pytest.raises(RowError, match="can only teach rows that have text_in") as caught:
        to_sample(silent, talker.processor, taught=True)
    assert caught.value.reason == "no_text_in"
    written = parse_row({**WHOLE, "audio_in": question}, task="asr")
    with pytest.raises(RowError, match="the base cannot teach asr") as caught:
        to_sample(written, talker.processor, taught=True)
    assert caught.value.reason == "not_taught"


def test_what_is_heard_is_known_where_the_row_says_it(talker, question):
    """The last recording's words, whatever is asked; nothing for text or where the row is silent."""
    expected = tuple(talker.tokenizer(WHOLE["text_in"], add_special_tokens=False)["input_ids"])
    spoken = {"role": "user", "content": [{"type": "audio", "audio": question}]}
    turns = [spoken, {"role": "assistant", "content": "I am fine."}]
    for task, row in (
        ("asr", {"audio_in": question}),
        ("speech_to_text", {"audio_in": question, "turns": turns}),
    ):
        sample = to_sample(parse_row({**WHOLE, **row}, task=task), talker.processor)
        assert sample.transcript == expected
        missing = (None,) * (len(sample.recordings) - 1)
        assert transcripts_of([sample, sample]) == 2 * (*missing, expected)
    silent = {**WHOLE, "audio_in": question, "text_in": None}
    assert to_sample(parse_row(silent, task="speech_to_text"), talker.processor).transcript is None
    written = to_sample(parse_row(WHOLE, task="text_to_speech"), talker.processor)
    assert written.transcript is None
    assert transcripts_of([written]) == ()


def test_earlier_turns_are_part_of_the_prompt(talker):
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "I am fine."}]
    row = parse_row({**WHOLE, "turns": turns}, task="text_to_speech")
    layout = to_sample(row, talker.processor).layout
    prompt = talker.tokenizer.decode(layout.grid[-1, : layout.prompt_length])
    assert prompt == talker.tokenizer.apply_chat_template(
        [*turns, {"role": "user", "content": "How are you?"}], add_generation_prompt=True, tokenize=False
    )


def test_recorded_answers_are_encoded_on_the_fly(talker, speak):
    answer = speak("I am fine, thank you.")
    row = parse_row({**WHOLE, "codes_out": None, "audio_out": answer}, task="tts")
    with pytest.raises(DataError, match="no codec is at hand"):
        to_sample(row, talker.processor)
    made = to_sample(row, talker.processor, codec=talker.codec)
    from omni_adapter.audio.waveform import read_waveform

    codes = talker.codec.encode(read_waveform(answer, sampling_rate=talker.codec.spec.sampling_rate))
    given = to_sample(parse_row({**WHOLE, "codes_out": codes.tolist()}, task="tts"), talker.processor)
    assert torch.equal(made.layout.grid, given.layout.grid)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"audio_in": b"noise " * 100}, "audio_in_unreadable"),
        ({"audio_in": (np.zeros(16000, np.float32), 16000)}, "audio_in_silent"),
        ({"codes_out": [[1]] * 6}, "bad_codes"),
        ({"codes_out": [[99]] * 7}, "bad_codes"),
        ({"codes_out": None, "audio_out": b""}, "audio_out_empty"),
    ],
)
def test_samples_that_cannot_be_made_are_named(change, reason, talker, question):
    row = parse_row({**WHOLE, "audio_in": question, **change}, task="speech_to_speech")
    with pytest.raises(RowError, match="q1") as caught:
        to_sample(row, talker.processor, codec=talker.codec)
    assert caught.value.reason == reason


def test_long_samples_are_rejected(talker):
    row = parse_row(WHOLE, task="text_to_text")
    steps = to_sample(row, talker.processor).layout.grid.shape[1]
    to_sample(row, talker.processor, max_steps=steps)
    with pytest.raises(RowError, match=f"takes {steps} steps, the run allows {steps - 1}"):
        to_sample(row, talker.processor, max_steps=steps - 1)


def test_every_column_is_an_attribute_or_documented():
    import omni_adapter.data.rows as module

    row = parse_row(WHOLE, task="asr")
    for column in COLUMNS:
        assert hasattr(row, column)
        assert f"\n{column} " in module.__doc__
    assert replace(row, task="tts").answer_text == "I am fine."


@pytest.mark.parametrize(
    "frames",
    [
        {"values": b"\0" * 7, "width": 4, "encoder": "x"},
        {"values": b"\0" * 8, "width": 3, "encoder": "x"},
        {"values": b"", "width": 4, "encoder": "x"},
        {"values": b"\xff" * 8, "width": 4, "encoder": "x"},
        {"values": None, "width": 4, "encoder": "x"},
        {"width": 4},
        "frames",
    ],
)
def test_frames_of_strangers_are_checked(frames):
    with pytest.raises(RowError, match="frames_in") as caught:
        parse_row({**WHOLE, "frames_in": frames}, task="asr")
    assert caught.value.reason == "bad_frames"
