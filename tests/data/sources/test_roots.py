"""Nothing that a data set names leads out of its folder: tables, lines, links, texts, archives, the Hub."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omni_adapter.data.dataset import Mixture
from omni_adapter.data.rows import parse_row
from omni_adapter.data.sources import SourceSpec, open_source
from omni_adapter.errors import DataError, RowError
from tests.data.sources.miniatures import tone

AUDIO = datasets.Features({"audio": datasets.Audio(), "text": datasets.Value("string")})


@pytest.fixture
def world(tmp_path) -> Path:
    """A folder of data beside a secret."""
    (tmp_path / "secret.wav").write_bytes(tone(1, rate=16_000, format="WAV"))
    (tmp_path / "secret.txt").write_text("a secret")
    data = tmp_path / "data"
    data.mkdir()
    (data / "good.wav").write_bytes(tone(2, rate=16_000, format="WAV"))
    (data / "link.wav").symlink_to(tmp_path / "secret.wav")
    (data / "up").symlink_to(tmp_path)
    return data


def ways_out(world: Path) -> list[str]:
    return [
        "../secret.wav",
        str(world.parent / "secret.wav"),
        "link.wav",
        "up/secret.wav",
        "./x/../../secret.wav",
    ]


def outcomes(spec: SourceSpec) -> list[str]:
    """What becomes of each row: "read", or the reason why not."""
    source = open_source(spec)
    found = []
    for index in range(len(source)):
        try:
            row = parse_row(source[index], task="asr", root=source.root)
            assert row.audio_in is not None
            found.append("read")
        except RowError as error:
            found.append(error.reason)
    return found


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lines(world):
    names = ["good.wav", *ways_out(world)]
    path = write_lines(world / "rows.jsonl", [{"audio": name, "text": "x"} for name in names])
    spec = SourceSpec(str(path), recipe="audio-text")
    assert outcomes(spec) == ["read"] + ["outside_root"] * 5
    nested = [{"audio": {"path": name}, "text": "x"} for name in names]
    path = write_lines(world / "rows.jsonl", nested)
    assert outcomes(spec) == ["read"] + ["outside_root"] * 5


@pytest.mark.parametrize("separator", [",", "|"])
def test_tables(world, separator):
    names = ways_out(world)
    if separator == ",":
        lines = ["file_name,text", "good.wav,x", *(f"{name},x" for name in names)]
        expected = ["read"] + ["outside_root"] * 5
    else:
        (world / "wavs").mkdir()
        (world / "wavs" / "good.wav").write_bytes(tone(2, rate=16_000, format="WAV"))
        outside = world.parent / "secret"
        lines = ["good|x|x", "../../secret|x|x", f"../..{outside}|x|x", "../link|x|x", "../up/secret|x|x"]
        expected = ["read"] + ["outside_root"] * 4
    (world / "metadata.csv").write_text("\n".join(lines) + "\n")
    assert outcomes(SourceSpec(str(world), recipe="audio-text")) == expected


def test_recordings_and_texts_that_are_links(world):
    (world / "up").unlink()
    (world / "link.txt").write_text("x")
    (world / "good.txt").symlink_to(world.parent / "secret.txt")
    spec = SourceSpec(str(world), recipe="audio-text")
    assert outcomes(spec) == ["outside_root", "outside_root"]
    (world / "good.txt").unlink()
    (world / "good.txt").write_text("x")
    assert outcomes(spec) == ["read", "outside_root"]


@pytest.mark.parametrize("streaming", [False, True])
def test_recordings_that_parquet_names(world, streaming):
    names = ["good.wav", *ways_out(world)]
    rows = [{"audio": {"bytes": None, "path": name}, "text": "x"} for name in names]
    rows.append({"audio": {"bytes": tone(2, rate=16_000), "path": "../secret.wav"}, "text": "x"})
    pq.write_table(pa.Table.from_pylist(rows, schema=AUDIO.arrow_schema), world / "rows.parquet")
    path = str(world / "rows.parquet")
    spec = SourceSpec(path, recipe="audio-text", task="asr", streaming=streaming, shuffle=False)
    mixture, found = Mixture([spec]), []
    for position in range(len(rows)):
        try:
            mixture.read(position)
            found.append("read")
        except RowError as error:
            found.append(error.reason)
    assert found == ["read"] + ["outside_root"] * 5 + ["read"]


def test_a_saved_data_set(world):
    rows = [{"audio": {"bytes": None, "path": str(world.parent / "secret.wav")}, "text": "x"}]
    table = pa.Table.from_pylist(rows, schema=AUDIO.arrow_schema)
    good = [{"audio": {"bytes": b"", "path": None}, "text": "x"}]
    inside = pa.Table.from_pylist(good, schema=AUDIO.arrow_schema)
    datasets.Dataset(inside).save_to_disk(world / "saved")
    (arrow,) = (world / "saved").glob("*.arrow")
    with pa.OSFile(str(arrow), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    assert outcomes(SourceSpec(str(world / "saved"), recipe="audio-text")) == ["outside_root"]


def test_earlier_turns(world):
    part = {"type": "audio", "audio": "../secret.wav"}
    rows = [{"turns": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "x"}]}]
    source = open_source(SourceSpec(str(write_lines(world / "rows.jsonl", rows))))
    with pytest.raises(RowError, match="leaves the folder") as caught:
        parse_row(source[0], task="speech_to_text", root=source.root)
    assert caught.value.reason == "outside_root"


def test_recordings_that_the_hub_names(world, monkeypatch, tmp_path):
    """Only what was fetched from there is read: neither files of this machine nor of the working folder."""
    fetched = tmp_path / "hub" / "datasets--a--b" / "snapshots" / "1" / "a.wav"
    fetched.parent.mkdir(parents=True)
    fetched.write_bytes(tone(2, rate=16_000, format="WAV"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(world)
    names = [str(fetched), str(world / "good.wav"), "good.wav", "../secret.wav", "hf://datasets/a/b/a.wav"]
    rows = [{"audio": {"bytes": None, "path": name}, "text": "x"} for name in names]
    table = datasets.Dataset(pa.Table.from_pylist(rows, schema=AUDIO.arrow_schema))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **keywords: table)
    source = open_source(SourceSpec("someone/data", columns={"audio": "audio_in", "text": "text_in"}))
    assert Path(source[0]["audio"]) == fetched
    for index in range(1, len(names)):
        with pytest.raises(RowError, match="leaves the Hub's caches") as caught:
            source[index]
        assert caught.value.reason == "outside_root"
    texts = datasets.Dataset.from_list([{"audio": str(world / "good.wav"), "text": "x"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **keywords: texts)
    source = open_source(SourceSpec("someone/data", columns={"audio": "audio_in", "text": "text_in"}))
    with pytest.raises(RowError, match="leaves the folder"):
        parse_row({"audio_in": source[0]["audio"], "text_in": "x"}, task="asr", root=source.root)


MEMBERS = ("../escaped.jsonl", "../../escaped.jsonl", "inside.jsonl")
LINE = json.dumps({"text_in": "a", "text_out": "b"}).encode() + b"\n"


def make_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in (*MEMBERS, str(path.parent.parent / "escaped.jsonl")):
            archive.writestr(name, LINE)


def make_tar(path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name in (*MEMBERS, str(path.parent.parent / "escaped.jsonl")):
            member = tarfile.TarInfo(name)
            member.size = len(LINE)
            archive.addfile(member, io.BytesIO(LINE))
        link = tarfile.TarInfo("link.jsonl")
        link.type, link.linkname = tarfile.SYMTYPE, str(path.parent.parent / "secret.txt")
        archive.addfile(link)


@pytest.mark.parametrize(("name", "make"), [("rows.zip", make_zip), ("rows.tar.gz", make_tar)])
def test_archives_are_unpacked_by_nobody_or_into_the_cache(name, make, world, tmp_path):
    """A local archive is refused; those of the Hub stay in their folder, whatever members are called."""
    for path in (world / "link.wav", world / "up", world / "good.wav"):
        path.unlink()
    make(world / name)
    with pytest.raises(DataError, match="holds no parquet, JSON lines or audio"):
        open_source(SourceSpec(str(world)))
    cache = tmp_path / "cache"
    settings = datasets.DownloadConfig(cache_dir=str(cache))
    folder = Path(datasets.DownloadManager(download_config=settings).extract(str(world / name)))
    assert folder.is_relative_to(cache)
    assert (folder / "inside.jsonl").read_bytes() == LINE
    everything = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in everything if "escaped" in path.name and not path.is_relative_to(folder)] == []
    assert [path for path in folder.rglob("*") if not path.resolve().is_relative_to(folder.resolve())] == []
