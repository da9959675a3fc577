"""Folders of recordings in the layouts in which corpora are published, and one's own."""

import json
import shutil
from pathlib import Path

import pytest

from omni_adapter.data.dataset import Mixture
from omni_adapter.data.rows import to_sample
from omni_adapter.data.sources import SourceSpec, open_source
from omni_adapter.errors import DataError, RowError
from tests.data.sources.miniatures import tone


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lj_speech(top: Path) -> str:
    for number in range(2):
        write(top / "wavs" / f"LJ001-{number:04d}.wav", tone(number, rate=22_050, format="WAV"))
    write(
        top / "metadata.csv",
        'LJ001-0000|In 1910, he said "no|In nineteen ten, he said "no\nLJ001-0001|Two|two\n',
    )
    return 'In nineteen ten, he said "no'


def pairs(top: Path) -> str:
    for name in ("b", "a/c"):
        write(top / f"{name}.wav", tone(3, rate=16_000, format="WAV"))
        write(top / f"{name}.txt", f" said in {name}\n")
    return "said in a/c"


def table_with_header(top: Path) -> str:
    write(top / "one.wav", tone(3, rate=16_000, format="WAV"))
    write(top / "metadata.csv", "file_name,text,speaker\none.wav,hello,me\n")
    return "hello"


def lines(top: Path) -> str:
    write(top / "one.wav", tone(3, rate=16_000, format="WAV"))
    write(top / "metadata.jsonl", json.dumps({"file_name": "one.wav", "text": "hello"}) + "\n")
    return "hello"


def libritts_archive(top: Path) -> str:
    name = top / "84" / "121123" / "84_121123_000007_000001"
    write(name.with_suffix(".wav"), tone(3, rate=24_000, format="WAV"))
    write(Path(f"{name}.original.txt"), "He is 24.")
    write(Path(f"{name}.normalized.txt"), "He is twenty four.")
    return "He is twenty four."


def librispeech_archive(top: Path) -> str:
    folder = top / "84" / "121123"
    write(folder / "84-121123-0000.flac", tone(3, rate=16_000))
    write(folder / "84-121123-0001.flac", tone(4, rate=16_000))
    write(folder / "84-121123.trans.txt", "84-121123-0000 GO DO YOU HEAR\n84-121123-0001 BUT IN LESS\n")
    return "go do you hear"


def vctk_archive(top: Path) -> str:
    for microphone in ("mic1", "mic2"):
        write(top / "wav48_silence_trimmed" / "p225" / f"p225_001_{microphone}.flac", tone(3, rate=48_000))
    write(top / "txt" / "p225" / "p225_001.txt", "Please call Stella.\n")
    return "Please call Stella."


@pytest.mark.parametrize(
    ("recipe", "make", "count"),
    [
        ("ljspeech", lj_speech, 2),
        ("audio-text", lj_speech, 2),
        ("audio-text", pairs, 2),
        ("audio-text", table_with_header, 1),
        ("audio-text", lines, 1),
        ("libritts:train.clean.100", libritts_archive, 1),
        ("librispeech", librispeech_archive, 2),
        ("vctk", vctk_archive, 1),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_layout_is_recordings_with_texts(recipe, make, count, tmp_path, talker):
    text = make(tmp_path)
    mixture = Mixture(
        [SourceSpec(str(tmp_path), task=task, recipe=recipe, shuffle=False) for task in ("asr", "tts")]
    )
    assert len(mixture.sources[0]) == count
    assert mixture.sources[0] is mixture.sources[1], "one folder is opened once"
    seen = set()
    for position in range(4):
        row = mixture.read(position)
        assert row.answer_text == text if count == 1 else row.answer_text
        assert to_sample(row, talker.processor, codec=talker.codec).id == row.id
        seen.add(row.task)
    assert text in {row.answer_text for row in (mixture.read(position) for position in range(8))}
    assert seen == {"asr", "tts"}


def test_folders_without_a_recipe_have_texts_too(tmp_path):
    text = pairs(tmp_path)
    columns = {"audio": "audio_in", "text": "text_in"}
    source = open_source(SourceSpec(str(tmp_path), task="asr", columns=columns))
    assert source.columns == ("id", "audio", "text")
    assert source[0] == {"id": "a/c.wav", "audio": "a/c.wav", "text": text}
    (tmp_path / "b.txt").unlink()
    assert "text" not in open_source(SourceSpec(str(tmp_path)))[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe\x00", "cannot be read"), (b"x" * (1 << 21), "is longer than")],
)
def test_texts_that_cannot_be_read_cost_one_row(content, message, tmp_path):
    pairs(tmp_path)
    (tmp_path / "b.txt").write_bytes(content)
    source = open_source(SourceSpec(str(tmp_path), recipe="audio-text"))
    with pytest.raises(RowError, match=message) as caught:
        source[1]
    assert caught.value.reason == "bad_transcript"
    assert source[0]["text_in"] == "said in a/c"
    assert list(source.values("text_in")) == ["said in a/c", None]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"file_name,text\n" + b'"' + b"x" * 200_000 + b'",b\n'])
def test_tables_that_cannot_be_read_are_named(content, tmp_path):
    pairs(tmp_path)
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"metadata\.csv cannot be read"):
        open_source(SourceSpec(str(tmp_path), recipe="audio-text"))


def test_a_folder_without_texts_is_no_speech_to_learn_from(tmp_path):
    pairs(tmp_path)
    (tmp_path / "b.txt").unlink()
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(DataError, match="lacks normalized_text or text or transcription"):
        open_source(SourceSpec(str(tmp_path), recipe="audio-text"))
