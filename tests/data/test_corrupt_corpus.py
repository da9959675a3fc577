"""What strangers send, D1 to D11: for each file the one reason that reader, check and prepare give for it.

The corpus lies in one folder, made here. What D6 (kills) and D7 (disks and networks) ask for is shown by
``tests/data/test_prepare.py``; archives by ``tests/data/sources/test_roots.py``.
"""

import faulthandler
import io
import json
import multiprocessing
import os
import resource
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from omni_adapter import SnacCodec
from omni_adapter.audio.waveform import read_waveform
from omni_adapter.config import SNAC_24KHZ
from omni_adapter.data import reader as reader_module
from omni_adapter.data.check import CheckSettings, check_source, fault_for, look
from omni_adapter.data.prepare import Preparation, PrepareSettings
from omni_adapter.data.reader import Reader
from omni_adapter.data.sources import SourceSpec, open_source
from omni_adapter.errors import AudioError, DataError
from tests.data import test_prepare
from tests.data.sources import test_roots

RATE = 16_000
READ = "read"
LONGEST_S = 300.0
SIX_HOURS_S = 6 * 3600


def tone(seconds: float = 0.5, *, rate: int = RATE, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(np.arange(round(seconds * rate)) * 2 * np.pi * 220 / rate)).astype(np.float32)


def as_file(samples: np.ndarray, rate: int = RATE, *, kind: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def patched(data: bytes, start: int, new: bytes) -> bytes:
    return data[:start] + new + data[start + len(new) :]


WAV = as_file(tone())
FLAC = as_file(soundfile.read(io.BytesIO(WAV), dtype="int16")[0], kind="FLAC")  # the same samples


def with_value(value: float) -> bytes:
    samples = tone()
    samples[100] = value
    return as_file(samples, subtype="FLOAT")


def claims(flac: bytes, frames: int) -> bytes:
    """A FLAC whose header counts other frames: the low 36 bits of bytes 18..25."""
    packed = int.from_bytes(flac[18:26], "big") & ~((1 << 36) - 1) | frames
    return patched(flac, 18, packed.to_bytes(8, "big"))


@cache
def six_hours() -> bytes:
    return as_file(np.zeros(SIX_HOURS_S * 1000, np.int16), 1000, kind="FLAC")


def adpcm_noise() -> bytes:
    data = as_file(tone(), subtype="IMA_ADPCM")
    noise = np.random.default_rng(0).integers(0, 256, len(data) - 200, dtype=np.uint8).tobytes()
    return patched(data, 200, noise)


# Failure of the catalogue, name, how the file is made, and what becomes of a row that hears it.
FILES: list[tuple[str, str, Callable[[], bytes], str]] = [
    ("D1", "zero.wav", lambda: b"", "audio_in_empty"),
    ("D1", "text.wav", lambda: b"no sound at all " * 99, "audio_in_unreadable"),
    ("D1", "random.wav", lambda: np.random.default_rng(1).bytes(4096), "audio_in_unreadable"),
    ("D1", "torn_header.wav", lambda: WAV[:20], "audio_in_empty"),
    ("D1", "header.wav", lambda: WAV[:44], "audio_in_empty"),
    ("D1", "half.wav", lambda: WAV[: len(WAV) // 2], "audio_in_truncated"),
    ("D1", "half.flac", lambda: FLAC[: len(FLAC) // 2], "audio_in_truncated"),
    ("D1", "lost_sync.flac", lambda: patched(FLAC, len(FLAC) // 2, bytes(500)), "audio_in_truncated"),
    ("D1", "no_rate.wav", lambda: patched(WAV, 24, bytes(4)), "audio_in_unreadable"),
    ("D1", "channels.wav", lambda: patched(WAV, 22, b"\xff\xff"), "audio_in_unreadable"),
    ("D1", "4_gb.wav", lambda: patched(WAV, 40, struct.pack("<I", 0x7FFF0000)), "audio_in_truncated"),
    ("D2", "silent.wav", lambda: as_file(0 * tone()), "audio_in_silent"),
    ("D2", "clipped.wav", lambda: as_file(np.clip(tone(level=3.0), -1, 1)), READ),
    ("D2", "dc.wav", lambda: as_file(tone(level=0.1) + 0.2), READ),
    ("D2", "nan.wav", lambda: with_value(np.nan), "audio_in_not_finite"),
    ("D2", "infinity.wav", lambda: with_value(np.inf), "audio_in_not_finite"),
    ("D2", "loud.wav", lambda: with_value(5e5), "audio_in_out_of_range"),
    ("D3", "8_bit.wav", lambda: as_file(tone(), subtype="PCM_U8"), READ),
    ("D3", "24_bit.wav", lambda: as_file(tone(rate=48_000), 48_000, subtype="PCM_24"), READ),
    ("D3", "float.wav", lambda: as_file(tone(rate=44_100), 44_100, subtype="DOUBLE"), READ),
    ("D3", "inverted.wav", lambda: as_file(np.stack([tone(), -tone()], axis=1)), READ),
    ("D3", "vorbis.ogg", lambda: as_file(tone(), kind="OGG"), READ),
    ("D3", "layer_3.mp3", lambda: as_file(tone(), kind="MP3", subtype="MPEG_LAYER_III"), READ),
    ("D4", "bomb.flac", lambda: claims(FLAC, (1 << 36) - 1), "audio_in_too_long"),
    ("D4", "six_hours.flac", six_hours, "audio_in_too_long"),
    ("D4", "six_hours_unsaid.flac", lambda: claims(six_hours(), 0), "audio_in_too_long"),
    ("D5", "adpcm.wav", adpcm_noise, "audio_in_unsupported"),
]

# Rows that are no file of the corpus: what they hold, and what becomes of them.
ROWS: list[tuple[str, str, dict, str]] = [
    ("D8", "null", {"audio_in": None, "text_in": "x"}, "no_audio_in"),
    ("D8", "number", {"audio_in": 5, "text_in": "x"}, "wrong_type"),
    ("D8", "list", {"audio_in": "good.wav", "text_in": ["x"]}, "wrong_type"),
    ("D10", "up", {"audio_in": "../outside.wav", "text_in": "x"}, "outside_root"),
    ("D10", "absolute", {"audio_in": "/etc/passwd", "text_in": "x"}, "outside_root"),
    ("D10", "link", {"audio_in": "link.wav", "text_in": "x"}, "outside_root"),
    ("D10", "loop", {"audio_in": "loop.wav", "text_in": "x"}, "outside_root"),
    ("D10", "drive", {"audio_in": "C:\\x.wav", "text_in": "x"}, "outside_root"),
    ("D10", "nul", {"audio_in": "a\0b.wav", "text_in": "x"}, "outside_root"),
    ("D10", "long", {"audio_in": "x" * 5000, "text_in": "x"}, "audio_in_not_found"),
    ("D10", "nowhere", {"audio_in": "nowhere.wav", "text_in": "x"}, "audio_in_not_found"),
]
EXPECTED = {name: reason for _, name, _, reason in (*FILES, *ROWS)}
TAGGED = {"clipped.wav": "audio_in:clipped", "dc.wav": "audio_in:dc"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> SourceSpec:
    """One file of everything above, and a list of rows that name them."""
    folder = tmp_path_factory.mktemp("strangers") / "data"
    folder.mkdir()
    for _, name, make, _ in FILES:
        (folder / name).write_bytes(make())
    (folder / "good.wav").write_bytes(WAV)
    (folder.parent / "outside.wav").write_bytes(WAV)
    (folder / "link.wav").symlink_to(folder.parent / "outside.wav")
    (folder / "loop.wav").symlink_to(folder / "loop.wav")
    rows = [{"id": name, "audio_in": name, "text_in": "x"} for _, name, _, _ in FILES]
    rows += [{"id": name, **values} for _, name, values, _ in ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceSpec(str(folder / "rows.jsonl"), task="asr")


def test_every_row_gets_its_reason(corpus):
    source, found = open_source(corpus), {}
    with Reader(max_seconds=LONGEST_S) as reader:
        for index, name in enumerate(EXPECTED):
            seen = look(source, corpus, index, reader=reader, codec=SNAC_24KHZ)
            fault = fault_for(seen, "asr")
            found[name] = READ if fault is None else fault.reason
    assert found == EXPECTED


def test_check_counts_them_and_refuses_the_source(corpus):
    report = check_source(corpus)
    counts = {reason: reject["rows"] for reason, reject in report.rejects.items()}
    reasons = [reason for reason in EXPECTED.values() if reason != READ]
    assert counts == {reason: reasons.count(reason) for reason in reasons}
    assert report.tasks == {"asr": {"rows": len(EXPECTED) - len(reasons), "rejected": counts}}
    assert all(1 <= len(reject["examples"]) <= 3 for reject in report.rejects.values())
    assert report.tags.keys() >= set(TAGGED.values())
    (problem,) = report.problems
    assert problem.startswith(f"training refuses the task asr: {len(reasons)} of {len(EXPECTED)} rows")


def test_prepare_gives_the_same_reasons(corpus, parts, tmp_path):
    codec = SnacCodec.from_model(parts.snac)
    settings = PrepareSettings(max_bad=1.0, max_seconds=LONGEST_S)
    work = Preparation(corpus, tmp_path / "out", codec=codec, settings=settings)
    work.run(work.pending())
    work.finish()
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    rejected = {name: reason for name, reason in EXPECTED.items() if reason != READ}
    assert {record["id"]: record["reason"] for record in records} == rejected
    kept = open_source(SourceSpec(str(tmp_path / "out")))
    odd = {row["id"]: row["tags"] for row in kept if row["id"] in TAGGED}
    assert odd == {name: [tag] for name, tag in TAGGED.items()}
    strict = Preparation(corpus, tmp_path / "strict", codec=codec)  # D9: at most 5 %
    strict.run(strict.pending())
    with pytest.raises(DataError, match="rows were rejected"):
        strict.finish()
    assert not (tmp_path / "strict" / "prepared.json").exists()


def read_in_little_memory(folder: Path, answer) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)
    reasons = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _, name, _, _ in (row for row in FILES if row[0] in ("D1", "D4")):
        try:
            read_waveform(folder / name, sampling_rate=RATE, max_seconds=LONGEST_S)
            reasons.append(READ)
        except AudioError as error:
            reasons.append(f"audio_in_{error.reason}")
    answer.send((reasons, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory by /proc")
def test_no_header_and_no_length_costs_memory(corpus):
    """D4: bombs and six hours, said or unsaid, in 100 MiB; the result of 300 s at 16 kHz takes 19 of them."""
    receive, send = multiprocessing.Pipe(duplex=False)
    work = (Path(corpus.path).parent, send)
    child = multiprocessing.get_context("fork").Process(target=read_in_little_memory, args=work)
    child.start()
    assert receive.poll(60)
    reasons, grown_kib = receive.recv()
    child.join()
    assert reasons == [reason for failure, _, _, reason in FILES if failure in ("D1", "D4")]
    assert grown_kib < 60 << 10


def test_a_decoder_that_aborts_costs_one_file(corpus, monkeypatch):
    """D5, as check meets it; the other ways to die are in ``test_prepare``."""

    def hostile(source, *, sampling_rate, max_seconds):
        if Path(source).name == "adpcm.wav":
            faulthandler.disable()
            os.abort()
        return read_waveform(source, sampling_rate=sampling_rate, max_seconds=max_seconds)

    monkeypatch.setattr(reader_module, "read_waveform", hostile)
    report = check_source(corpus)
    assert report.rejects["audio_in_decoder_crash"]["rows"] == 1
    assert report.rejects["audio_in_empty"]["rows"] == 3


def test_damaged_tables_are_counted(tmp_path):
    """D8: one row group of three is damaged; a column is missing."""
    path = tmp_path / "rows.parquet"
    rows = [
        {"id": str(number), "text_in": f"question {number} " * 20, "text_out": "x"} for number in range(30)
    ]
    pq.write_table(
        pa.Table.from_pylist(rows), path, row_group_size=10, write_page_checksum=True, compression="none",
        use_dictionary=False,
    )  # fmt: skip
    start = pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    data = path.read_bytes()
    path.write_bytes(patched(data, start + 5, bytes(byte ^ 255 for byte in data[start + 5 : start + 60])))
    report = check_source(SourceSpec(str(path), task="text_to_text"))
    assert (report.lost_rows, report.looked_at, report.problems) == (10, 20, [])
    assert report.notes == ["10 rows lie in damaged parts of files and are left out"]
    with pytest.raises(
        DataError, match="needs audio_in or frames_in or turns; found the columns id, text_in"
    ):
        check_source(SourceSpec(str(path), task="asr"))


@pytest.mark.parametrize(("bad", "problems"), [(1, 0), (2, 1), (20, 1)])
def test_too_many_bad_rows_are_a_problem(bad, problems, tmp_path):
    """D9: at most 5 % of rows, as in training; nothing but bad rows is no success."""
    good = json.dumps({"text_in": "a", "text_out": "b"}) + "\n"
    (tmp_path / "a.jsonl").write_text(good * (20 - bad) + '{"text_in": "no answer", "text_out": 5}\n' * bad)
    report = check_source(SourceSpec(str(tmp_path / "a.jsonl"), task="text_to_text"))
    assert report.tasks["text_to_text"]["rows"] == 20 - bad
    assert len(report.problems) == problems
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no row"):
        check_source(SourceSpec(str(tmp_path / "empty.jsonl")))


def test_doubles_and_leaks_are_problems(corpus, tmp_path):
    """D11: ids, recordings under other names and in other formats, texts in other spelling."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, data in (("a.wav", WAV), ("b.wav", as_file(tone(0.7))), ("c.flac", FLAC)):
        (folder / name).write_bytes(data)
    train = [("1", "a.wav", "One word."), ("2", "b.wav", "Another, two."), ("1", "c.flac", "Third")]
    test = [("1", "c.flac", "Nothing like it"), ("9", "b.wav", "ONE WORD")]
    specs = []
    for name, rows in (("train", train), ("test", test)):
        lines = [json.dumps(dict(zip(("id", "audio_in", "text_in"), row, strict=True))) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        specs.append(SourceSpec(str(folder / f"{name}.jsonl"), task="asr"))
    report = check_source(specs[0], against=specs[1])
    assert report.duplicates["id"] == {"rows": 1, "examples": [[0, 2]]}
    assert report.duplicates["audio_in"] == {"rows": 1, "examples": [[0, 2]]}
    assert report.leaks["audio_in"] == {"rows": 3, "examples": [[0, 0], [1, 1]]}
    assert report.leaks["text_in"] == {"rows": 1, "examples": [[0, 1]]}
    ids, leak = report.problems
    assert "duplicate ids: 1 rows" in ids
    assert "(3 rows by audio_in, 1 rows by text_in)" in leak
    clean = check_source(specs[1], settings=CheckSettings(limit=1), against=specs[0])
    assert clean.leaks["text_in"]["rows"] == 0
    with pytest.raises(DataError, match="is the source itself"):
        check_source(specs[0], against=specs[0])


def test_the_walk_is_complete():
    """Every failure of the catalogue is shown, here or where it is named."""
    here = {failure for failure, *_ in (*FILES, *ROWS)} | {"D9", "D11"}
    kills = (
        test_prepare.test_a_kill_at_any_call_costs_nothing,
        test_prepare.test_kills_in_a_row_lead_to_the_same,
    )
    disks = (
        test_prepare.test_a_full_disk_is_said_and_finished_shards_stay,
        test_prepare.test_what_a_network_loses_is_read_again,
    )
    elsewhere = {"D6": kills, "D7": disks}
    assert test_roots.test_archives_are_unpacked_by_nobody_or_into_the_cache
    assert here | elsewhere.keys() == {f"D{number}" for number in range(1, 12)}
