"""``omni-adapter data check``: what it finds in a source, how it says so, and what that costs in memory."""

import json
import random
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from omni_adapter import cli
from omni_adapter.config import SNAC_24KHZ
from omni_adapter.data import check as check_module
from omni_adapter.data import counting
from omni_adapter.data.check import CheckSettings, Report, check_source
from omni_adapter.data.counting import Bars, Digests, Names, Spread
from omni_adapter.data.sources import SourceSpec
from omni_adapter.errors import DataError
from omni_adapter.estimate import estimate, plan

RATE = 8000
GRID = [[1] * 25] * 7  # two seconds


def tone(seconds: float, pitch: float = 220.0, *, level: float = 0.5) -> np.ndarray:
    return level * np.sin(np.arange(round(seconds * RATE)) * 2 * np.pi * pitch / RATE)


def write(path: Path, samples: np.ndarray) -> None:
    soundfile.write(path, samples, RATE)


@pytest.fixture
def source(tmp_path) -> Path:
    """Ten rows, most of them with something wrong."""
    write(tmp_path / "a.wav", np.concatenate([tone(1), np.zeros(RATE)]))
    write(tmp_path / "again.flac", soundfile.read(tmp_path / "a.wav", dtype="int16")[0])
    write(tmp_path / "b.wav", tone(2, 330))
    write(tmp_path / "long.flac", tone(31, 110))
    write(tmp_path / "silent.wav", np.zeros(RATE))
    words, spoken = "ten letters and some more", {"codes_out": GRID, "text_out": "yes"}
    unknown = [[4096]] * 7
    rows = [
        {"id": "1", "audio_in": "a.wav", "text_in": words, "language": "en", **spoken},
        {"id": "2", "audio_in": "b.wav", "text_in": "ü" * 20, "codes_out": [[0, 4095]] * 7, "text_out": "no"},
        {"id": "3", "audio_in": "again.flac", "text_in": words.upper() + "!", "language": "en"},
        {"id": "4", "audio_in": "long.flac", "text_in": "many words " * 28, "language": "fr"},
        {"id": "5", "audio_in": "b.wav", "text_in": "six rows", "codes_out": GRID[:6], "text_out": "a"},
        {"id": "6", "audio_in": "b.wav", "text_in": "no such code", "codes_out": unknown, "text_out": "b"},
        {"id": "7", "audio_in": "silent.wav", "text_in": "nothing"},
        {"id": "1", "audio_in": "b.wav", "text_in": "far too fast " * 20},
        {"audio_in": "b.wav", "text_in": "lists of two lengths", "codes_out": [[1, 2], [1]], "text_out": "c"},
    ]  # fmt: skip
    lines = [json.dumps(row) for row in rows]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*lines, "{no json"]) + "\n")
    return path


def test_everything_that_a_source_holds(source):
    report = check_source(SourceSpec(str(source)))
    assert (report.rows, report.looked_at, report.lost_rows) == (10, 10, 0)
    assert report.hours["questions"] == pytest.approx((2 + 2 + 2 + 31 + 2 + 2 + 2) / 3600)
    frames = 25 + 2 + 25 + 1
    assert report.hours["answers"] == pytest.approx(frames * 2048 / 24000 / 3600)
    assert report.seconds["questions"]["median"] == pytest.approx(2, rel=0.05)
    assert report.histograms["seconds of questions"] == {
        "edges": [0, 1, 2, 5, 10, 15, 20, 30, 60],
        "counts": [0, 0, 6, 0, 0, 0, 0, 1],
    }
    assert report.over_30_s == {"questions": 1, "answers": 0}
    assert report.quiet_share["questions"] == pytest.approx(2 / 43, abs=0.003)
    assert report.codes == {
        "rows": 4, "low": 0, "high": 4096, "unknown_ids": 7, "rows_that_make_no_grid": 2,
    }  # fmt: skip
    speed = report.rates["questions"]
    assert speed["outliers"] == 1
    assert speed["examples"] == ["1: 130.0"]
    assert report.languages == {"(none)": 5, "en": 2, "fr": 1}
    assert report.duplicates["id"] == {"rows": 1, "examples": [[0, 7]]}
    assert report.duplicates["audio_in"] == {"rows": 4, "examples": [[0, 2], [1, 4]]}
    assert report.duplicates["text_in"] == {"rows": 1, "examples": [[0, 2]]}
    assert report.duplicates["codes_out"]["rows"] == 0
    counts = {reason: reject["rows"] for reason, reject in report.rejects.items()}
    assert counts == {
        "bad_codes": 3,
        "audio_in_silent": 1,
        "bad_json": 1,
        "no_text_out": 4,
    }
    assert report.tasks["asr"] == {
        "rows": 7, "rejected": {"bad_codes": 1, "audio_in_silent": 1, "bad_json": 1},
    }  # fmt: skip
    assert report.tasks["speech_to_speech"]["rows"] == 2


def test_the_command_shows_it_and_refuses_what_training_would(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["data", "check", "rows.jsonl", "--task", "asr", "--json"])
    assert result.exit_code == cli.EXIT_REFUSED
    shown = json.loads(result.stdout)
    assert shown["estimate"] is None
    assert shown["problems"] == [
        "training refuses the task asr: 3 of 10 rows (30.0%) cannot serve it, at most 5.0% may",
        "recipes/prepare.py refuses duplicate ids: 1 rows have one that a row before them has",
    ]
    result = CliRunner().invoke(cli.app, ["data", "check", "rows.jsonl", "--task", "asr"])
    text = " ".join(result.stdout.split())
    for words in (
        "rows 10, looked at 10, lost 0",
        "questions over 30 s 1",
        "broken grids 2 rows",
        "the same id 1 rows (rows 0 and 7)",
        "languages (none) 5, en 2, fr 1",
        "30-59",
        "audio_in_silent: 1 (a recording cannot be used) 7: audio_in: the recording is silent",
        "training refuses the task asr: 3 of 10 rows",
    ):
        assert words in text or words.replace("the recording", str(tmp_path / "silent.wav")) in text
    good = "{path: good.jsonl, columns: {q: text_in, a: text_out}}"
    (tmp_path / "good.jsonl").write_text('{"q": "a?", "a": "b"}\n' * 3)
    result = CliRunner().invoke(cli.app, ["data", "check", good, "--limit", "2"])
    assert (result.exit_code, result.stdout.count("Nothing that training would refuse")) == (0, 1)
    assert "figures are of 2 of 3 rows" in result.stdout
    for words, message in (
        (["nowhere.parquet/x"], "nowhere.parquet/x"),
        (["good.jsonl"], "serves none of the tasks"),
        ([good, "--measure"], "name it with --model"),
        ([good, "--against", "good.jsonl"], "is the source itself"),
        (["voice-assistant-400k"], "did you mean 'voiceassistant-400k'"),
    ):
        result = CliRunner().invoke(cli.app, ["data", "check", *words])
        assert (result.exit_code, message in " ".join(result.stderr.split())) == (cli.EXIT_REFUSED, True)


def test_splits_of_a_data_set_are_compared(monkeypatch):
    rows = {"train": ["One.", "two"], "test": ["three", "ONE"]}
    tables = {
        split: datasets.Dataset.from_list([{"text_in": text, "text_out": "x"} for text in texts])
        for split, texts in rows.items()
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda path, *, split, **keywords: tables[split])
    report = check_source(SourceSpec("someone/data"), against=SourceSpec("someone/data", split="test"))
    assert report.leaks["text_in"] == {"rows": 1, "examples": [[0, 1]]}
    assert report.problems == [
        "it leaks into someone/data (1 rows by text_in, 2 rows by text_out): a model that learned the one "
        "cannot be tested on the other; take those rows out"
    ]


def test_code_counts_that_are_no_multiple_of_the_code_rows(tmp_path):
    write(tmp_path / "a.wav", tone(1))
    codes = ("# 1 2 3 4 5 6 7 # 7 6 5 4 3 2 1", "# 1 2 3 4 5 6 7 # 7 6 5 4", "# 1 2 3 # 4 5 6")
    rows = [
        {"split_name": "identity", "index": str(number), "round": "1", "question_audio": "a.wav"}
        | {"question": "Who?", "answer": "Me.", "answer_snac": text}
        for number, text in enumerate(codes)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check_source(SourceSpec(str(tmp_path / "rows.jsonl"), recipe="voiceassistant-400k"))
    assert report.codes["rows_that_make_no_grid"] == 2
    assert report.tasks["speech_to_speech"] == {"rows": 1, "rejected": {"bad_codes": 2}}
    assert report.tasks["asr"] == {"rows": 2, "rejected": {"bad_codes": 1}}


@pytest.mark.parametrize("limit", [None, 4, 50])
def test_streams_end(limit, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text_in": "{n}", "text_out": "b"}}\n' for n in range(9)))
    spec = SourceSpec(str(tmp_path / "a.jsonl"), streaming=True)
    report = check_source(spec, settings=CheckSettings(limit=limit))
    assert (report.rows, report.looked_at) == (None, min(limit or 9, 9))
    assert report.duplicates["text_in"]["rows"] == 0


class Endless:
    """A source of any size whose rows take no room."""

    columns, root, lost_rows = ("id", "text_in", "text_out", "language"), None, 0

    def __init__(self, length: int) -> None:
        self.name, self._length = "endless", length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        if index % 50 == 0:
            return {"id": f"r{index}", "text_in": index}
        return {
            "id": f"r{index}",
            "text_in": f"question {index}",
            "text_out": "b" * (index % 90),
            "language": f"l{index}",
        }


def peak_of(length: int, monkeypatch) -> int:
    monkeypatch.setattr(check_module, "open_source", lambda spec: Endless(length))
    tracemalloc.start()
    report = check_source(SourceSpec("endless", task="text_to_text"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.looked_at == length
    assert report.rejects["wrong_type"]["rows"] == length // 50
    return peak


def test_memory_does_not_grow_with_the_source(monkeypatch):
    monkeypatch.setattr(counting, "_KEPT_DIGESTS", 128)
    peak_of(50, monkeypatch)
    small, large = peak_of(400, monkeypatch), peak_of(4000, monkeypatch)
    assert large < 2 * small  # ten times the rows; the digests that are kept are half or all of the limit


def test_doubles_are_exact_while_all_fit_and_fair_beyond():
    texts = [str(number).encode() for number in range(3000)]
    rows = texts + texts[:1000]
    random.Random(0).shuffle(rows)
    exact, bounded, other = Digests(), Digests(512), Digests(256)
    for index, row in enumerate(rows):
        exact.add(row, index)
        bounded.add(row, index)
    for index, row in enumerate(texts[2000:]):
        other.add(row, index)
    assert (exact.bits, exact.doubles) == (0, 1000)
    first, second = exact.examples()[0]
    assert rows[first] == rows[second]
    assert bounded.bits >= 3
    assert bounded.doubles == pytest.approx(1000, rel=0.25)
    assert exact.shared(exact)[0] == 4000
    assert bounded.shared(other)[0] == pytest.approx(1000, rel=0.35)
    mine, theirs = bounded.shared(other)[1][0]
    assert rows[mine] == texts[2000 + theirs]


def test_distributions_are_kept_to_five_percent():
    numbers, spread, bars, names = (
        np.random.default_rng(0).lognormal(2, 1, 5000),
        Spread(),
        Bars((0, 5, 10)),
        Names(),
    )
    for number in numbers:
        spread.add(float(number))
        bars.add(float(number))
        names.add(str(number))
    assert spread.facts()["median"] == pytest.approx(np.median(numbers), rel=0.05)
    assert spread.facts()["p95"] == pytest.approx(np.quantile(numbers, 0.95), rel=0.05)
    assert spread.facts()["mean"] == pytest.approx(numbers.mean())
    assert spread.outside(2, 30) == pytest.approx(((numbers < 2) | (numbers > 30)).sum(), rel=0.05)
    assert bars.histogram().counts == ((numbers < 5).sum(), (numbers >= 5).sum())
    assert len(names) <= counting._KEPT_NAMES + 1
    assert names.total() == 5000
    assert Spread().facts()["median"] == 0


@pytest.fixture
def lessons(tmp_path) -> Path:
    """Enough rows that serve stage 1."""
    write(tmp_path / "a.wav", tone(1))
    row = {"audio_in": "a.wav", "text_in": "a tone", "text_out": "a", "codes_out": [[1] * 12] * 7}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(10)))
    return tmp_path / "rows.jsonl"


def invoke(*words: object) -> dict:
    result = CliRunner().invoke(cli.app, ["data", "check", *map(str, words), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_a_stage_is_estimated_without_loading_a_weight(lessons, talker, talker_folder, monkeypatch):
    monkeypatch.setattr("omni_adapter.talker.OmniAdapter.from_pretrained", None)
    shown = invoke(lessons, "--model", talker_folder, "--batch-size", 4, "--limit", 5)
    found = shown["estimate"]
    assert shown["tasks"].keys() == {"asr", "tts"}
    assert (found["samples"], found["steps_of_a_pass"], found["steps_of_the_stage"]) == (20, 5, 20_000)
    assert found["trains"] == ["audio_adapter", "code_embedding", "code_heads", "tts_blocks"]
    added = sum(value.numel() for _, value in talker.model.added_parameters())
    assert found["parameters"] == added
    frozen = sum(value.numel() for value in talker.model.parameters()) - added
    assert found["memory_bytes"] == 16 * added + 4 * frozen
    assert (found["seconds_per_step"], found["hours_of_a_pass"]) == (None, None)
    assert any("pass --measure" in line for line in found["basis"])
    assert shown["steps"]["asr"]["mean"] > talker.processor.num_steps(16_000)
    shown.pop("estimate")
    nothing = Report(**{**shown, "steps": {}})
    with pytest.raises(DataError, match="no row of"):
        estimate(plan(str(talker_folder)), nothing, stage="align", batch_size=1)


def test_a_base_is_estimated_with_the_usual_encoder_and_codec(talker_folder):
    planned = plan(str(talker_folder / "base"))
    assert not planned.is_talker
    assert planned.processor.rules.num_codebooks == SNAC_24KHZ.num_codebooks
    assert planned.processor.rules.text_end_id == planned.processor.tokenizer.eos_token_id
    assert planned.groups["audio_encoder"] == pytest.approx(88e6, rel=0.01)  # openai/whisper-small


@pytest.mark.slow
def test_hours_are_those_of_steps_that_were_tried(lessons, talker_folder):
    found = invoke(lessons, "--model", talker_folder, "--batch-size", 2, "--measure")["estimate"]
    assert found["seconds_per_step"] > 0
    assert found["peak_bytes"] > 1 << 20
    assert found["hours_of_a_pass"] == pytest.approx(found["seconds_per_step"] * 10 / 3600)
    assert found["hours_of_the_stage"] == pytest.approx(found["seconds_per_step"] * 20_000 / 3600)
