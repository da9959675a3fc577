import json
import logging
import shutil
from collections import Counter
from functools import partial
from itertools import islice, pairwise

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_adapter.config import parse
from omni_adapter.data.dataset import (
    Batching,
    BatchLoader,
    LengthHistogram,
    Mixture,
    sample_lengths,
    shuffled,
)
from omni_adapter.data.rows import Rejects, to_sample
from omni_adapter.data.sources import SourceSpec, open_source
from omni_adapter.errors import ConfigError, DataError, RowError

CODES = [[5] * 4] * 7


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """What datasets converts goes to a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def text_rows(count: int, word: str = "word") -> list[dict]:
    return [
        {"id": f"{word}{i}", "text_in": f"{word} {'a ' * (i % 9)}", "text_out": f"{i}"} for i in range(count)
    ]


def write_lines(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def chats(tmp_path) -> SourceSpec:
    return SourceSpec(write_lines(tmp_path / "chats.jsonl", text_rows(20)), task="text_to_text")


def ids(mixture: Mixture, count: int, start: int = 0) -> list[str]:
    return [mixture.read(position).id for position in range(start, start + count)]


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**64))
def test_shuffling_is_a_permutation(length, key):
    assert sorted(shuffled(i, length=length, key=key) for i in range(length)) == list(range(length))


def test_shuffling_mixes():
    """No index stays near its place more often than chance has it, and keys differ."""
    length = 5000
    order = [shuffled(i, length=length, key=3) for i in range(length)]
    mean_distance = sum(abs(i - j) for i, j in enumerate(order)) / length
    assert mean_distance == pytest.approx(length / 3, rel=0.05)
    assert sum(i == j for i, j in enumerate(order)) < 10
    assert order != [shuffled(i, length=length, key=4) for i in range(length)]
    ascending = sum(a < b for a, b in pairwise(order)) / length
    assert ascending == pytest.approx(0.5, abs=0.03)


def test_the_order_is_a_function_of_seed_and_position(chats):
    first = ids(Mixture([chats], seed=1), 60)
    mixture = Mixture([chats], seed=1)
    assert [mixture.read(position).id for position in reversed(range(60))] == first[::-1]
    assert ids(Mixture([chats], seed=2), 60) != first
    epochs = [first[start : start + 20] for start in (0, 20, 40)]
    assert all(len(set(epoch)) == 20 for epoch in epochs), "each pass sees every row once"
    assert epochs[0] != epochs[1]
    assert first == ids(Mixture([chats], seed=1), 60)


def test_the_order_stays_what_it_was(chats):
    """A golden value: resuming with another version of this library must see the same rows."""
    assert ids(Mixture([chats], seed=7), 8) == GOLDEN


GOLDEN = ["word6", "word9", "word13", "word5", "word16", "word12", "word1", "word0"]


def test_sources_are_mixed_by_weight(tmp_path):
    specs = [
        SourceSpec(
            write_lines(tmp_path / f"{name}.jsonl", text_rows(count, name)),
            task="text_to_text",
            weight=weight,
        )
        for name, count, weight in (("a", 7, 3.0), ("b", 50, 1.0), ("c", 5, 0.0001))
    ]
    mixture = Mixture(specs, seed=0)
    seen = Counter(name[0] for name in ids(mixture, 1000))
    assert seen == {"a": 749, "b": 250, "c": 1}
    assert seen == Counter(name[0] for name in ids(mixture, 1000, start=1000))
    early = Counter(name[0] for name in ids(mixture, 100))
    assert 60 <= early["a"] <= 90, "shares hold within a block too"
    from_b = [name for name in ids(mixture, 1000) if name[0] == "b"]
    assert len(set(from_b[:50])) == 50, "a source is gone through before it repeats"
    assert mixture.epoch_length == 5000


def test_limit_and_order(chats, tmp_path):
    spec = SourceSpec(chats.path, task="text_to_text", limit=3, shuffle=False)
    assert ids(Mixture([spec]), 5) == ["word0", "word1", "word2", "word0", "word1"]


def test_settings_name_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'audio_out'"):
        parse(SourceSpec, {"path": "x", "columns": {"speech": "audio_outt"}}, source="run.yaml")
    with pytest.raises(ConfigError, match="did you mean 'weight'"):
        parse(SourceSpec, {"path": "x", "wight": 2}, source="run.yaml")
    with pytest.raises(ConfigError, match="weight must be above 0"):
        parse(SourceSpec, {"path": "x", "weight": 0}, source="run.yaml")
    with pytest.raises(ConfigError, match="needs max_steps"):
        parse(Batching, {"mode": "pack"}, source="run.yaml")


def test_a_missing_column_is_refused_with_the_list_found(chats):
    with pytest.raises(
        DataError, match=r"needs audio_in or frames_in or turns; found the columns id, text_in, text_out"
    ):
        open_source(SourceSpec(chats.path, task="asr"))
    with pytest.raises(DataError, match=r"has no column sound; found the columns id, text_in, text_out"):
        open_source(SourceSpec(chats.path, task="asr", columns={"sound": "audio_in"}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "holds no row"),
        ("broken.jsonl", b"{]\nnull\n", "holds no row"),
        ("notes.txt", b"hello", "holds no parquet, JSON lines or audio; found .txt"),
        ("cut.parquet", b"PAR1 and nothing else", "its end is missing"),
    ],
)
def test_files_that_are_no_data_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_source(SourceSpec(str(tmp_path / name)))


def test_a_path_that_is_not_there_is_not_asked_of_the_hub(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        open_source(SourceSpec(str(tmp_path / "nowhere")))


def test_all_kinds_of_files_hold_the_same_rows(tmp_path):
    rows = text_rows(10)
    pq.write_table(pa.Table.from_pylist(rows[:4]), tmp_path / "part-0.parquet")
    pq.write_table(pa.Table.from_pylist(rows[4:]), tmp_path / "part-1.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    paths = [
        write_lines(tmp_path / "lines.jsonl", rows),
        f"{tmp_path}/part-*.parquet",
        str(tmp_path / "saved"),
    ]
    for path in paths:
        mixture = Mixture([SourceSpec(path, task="text_to_text", shuffle=False)])
        assert ids(mixture, 10) == [row["id"] for row in rows], path
        streamed = SourceSpec(path, task="text_to_text", shuffle=False, streaming=True)
        if "saved" not in path:
            assert ids(Mixture([streamed]), 25) == [rows[i % 10]["id"] for i in range(25)], path


def test_streams_give_a_position_the_same_row_whoever_asks(tmp_path):
    path = write_lines(tmp_path / "lines.jsonl", text_rows(30))
    spec = SourceSpec(path, task="text_to_text", streaming=True)
    whole = ids(Mixture([spec], seed=3), 70)
    assert sorted(set(whole[:30])) == sorted(row["id"] for row in text_rows(30))
    assert whole[:30] != whole[30:60]
    alone = Mixture([spec], seed=3)
    assert [alone.read(position).id for position in range(1, 70, 2)] == whole[1::2]
    assert alone.read(4).id == whole[4]
    assert alone.read(40, attempt=2).id == whole[38]


def test_an_audio_folder_is_read_undecoded(tmp_path, speak):
    folder = tmp_path / "sounds"
    folder.mkdir()
    for name, text in (("a", "Yes, of course."), ("b", "I am fine.")):
        shutil.copy(speak(text), folder / f"{name}.wav")
    lines = [{"file_name": f"{name}.wav", "text": text} for name, text in (("a", "Yes."), ("b", "Fine."))]
    write_lines(folder / "metadata.jsonl", lines)
    with pytest.raises(DataError, match="found the columns audio, id, text"):
        open_source(SourceSpec(str(folder), task="asr"))
    spec = SourceSpec(
        str(folder), task="asr", columns={"audio": "audio_in", "text": "text_in"}, shuffle=False
    )
    row = Mixture([spec]).read(0)
    assert (row.id, row.audio_in, row.answer_text) == ("a.wav", folder / "a.wav", "Yes.")
    (folder / "metadata.jsonl").unlink()
    assert len(open_source(SourceSpec(str(folder)))) == 2
    (folder / "metadata.csv").write_text("file_name,text\n../../a.wav,Yes.\nb.wav,Fine.\n")
    mixture = Mixture([spec])
    assert mixture.read(1).answer_text == "Fine."
    with pytest.raises(RowError, match="leaves the folder"):
        mixture.read(0)


def test_recordings_inside_parquet_are_read(tmp_path, speak, talker):
    wav = speak("I am fine.").read_bytes()
    table = datasets.Dataset.from_list([{"audio": {"bytes": wav, "path": "a.wav"}, "text_in": "I am fine."}])
    table = table.cast_column("audio", datasets.Audio(decode=False))
    table.to_parquet(tmp_path / "a.parquet")
    spec = SourceSpec(str(tmp_path / "a.parquet"), task="asr", columns={"audio": "audio_in"})
    row = Mixture([spec]).read(0)
    assert row.audio_in == wav
    assert to_sample(row, talker.processor).recordings


def test_damaged_row_groups_are_left_out_and_counted(tmp_path, caplog):
    path = tmp_path / "rows.parquet"
    rows = text_rows(40)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10, compression="zstd")
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    for index in range(start, start + column.total_compressed_size):
        data[index] ^= 0xFF
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        mixture = Mixture([SourceSpec(str(path), task="text_to_text", shuffle=False)])
    assert mixture.lost_rows == 10
    assert "10 rows are lost in damaged row groups" in caplog.text
    assert ids(mixture, 30) == [row["id"] for row in (*rows[:20], *rows[30:])]


def test_broken_lines_are_rejected_by_name(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text_in": "a", "text_out": "b"}\n\n{"text_in": \n[1]\n')
    source = open_source(SourceSpec(str(path), task="text_to_text"))
    assert len(source) == 3
    for index in (1, 2):
        with pytest.raises(RowError, match=f"row {index}: no JSON") as caught:
            source[index]
        assert caught.value.reason == "bad_json"


def test_fingerprints_change_with_the_data(chats, tmp_path):
    before = Mixture([chats]).fingerprint()
    assert before == json.loads(json.dumps(before)) == Mixture([chats]).fingerprint()
    assert before != Mixture([chats], seed=1).fingerprint()
    write_lines(tmp_path / "chats.jsonl", text_rows(20, "ward"))
    assert Mixture([chats]).fingerprint() != before


def make_loader(spec: SourceSpec | list[SourceSpec], talker, *, seed: int = 5, **settings) -> BatchLoader:
    options = {
        name: settings.pop(name) for name in ("rank", "world", "workers", "rejects") if name in settings
    }
    specs = [spec] if isinstance(spec, SourceSpec) else spec
    return BatchLoader(
        Mixture(specs, seed=seed),
        partial(to_sample, processor=talker.processor, codec=talker.codec),
        rules=talker.processor.rules,
        batching=Batching(**settings),
        **options,
    )


def flat(batch) -> list[tuple[str, list[int]]]:
    """Samples of an unpacked batch: id and text row without padding."""
    lengths = batch.attention_mask.sum(dim=1).tolist()
    return [(name, batch.grid[i, -1, : lengths[i]].tolist()) for i, name in enumerate(batch.ids)]


def same(one, other) -> bool:
    tensors = all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("grid", "labels", "attention_mask", "position_ids")
    )
    clips = one.clips is None or torch.equal(one.clips.features, other.clips.features)
    return tensors and clips and (one.ids, one.places) == (other.ids, other.places)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_see_what_one_rank_sees(world, chats, talker):
    alone = make_loader(chats, talker, batch_size=2 * world)
    ranks = [make_loader(chats, talker, batch_size=2, rank=rank, world=world) for rank in range(world)]
    for whole, *parts in islice(zip(alone, *ranks, strict=False), 12):
        assert flat(whole) == [sample for part in parts for sample in flat(part)]


@pytest.mark.parametrize("mode", ["bucket", "pack"])
def test_ranks_share_each_window(mode, chats, talker):
    settings = {"mode": mode, "max_steps": 128}
    alone = make_loader(chats, talker, batch_size=2, window=20, **settings)
    ranks = [
        make_loader(chats, talker, batch_size=2, window=10, rank=rank, world=2, **settings) for rank in (0, 1)
    ]

    def window(loader) -> Counter:
        seen: Counter = Counter()
        for batch in loader:
            seen.update(batch.ids)
            if loader.state.window == 1:
                return seen
        raise AssertionError

    assert window(alone) == window(ranks[0]) + window(ranks[1])


@pytest.fixture
def spoken(tmp_path, speak, chats) -> list[SourceSpec]:
    """Recordings in and out, and text, with a few rows that cannot serve."""
    texts = ("Yes, of course.", "I am fine, thank you.", "What is the capital of France?")
    rows = []
    for number, text in enumerate(texts):
        shutil.copy(speak(text), tmp_path / f"{number}.wav")
        rows.append({"audio_in": f"{number}.wav", "text_out": text, "audio_out": f"{number}.wav"})
    rows.append({"audio_in": "missing.wav", "text_out": "None", "audio_out": "0.wav"})
    path = write_lines(tmp_path / "spoken.jsonl", rows)
    return [chats, SourceSpec(path, task="speech_to_speech")]


@pytest.mark.parametrize("mode", ["pad", "pack"])
def test_workers_change_nothing(mode, spoken, talker):
    """Batches, counts and the global random state are the same for 0 and 2 workers."""
    states, batches, reports = [], [], []
    for workers in (0, 2):
        torch.manual_seed(0)
        rejects = Rejects(limit=0.5)
        settings = {"mode": mode, "batch_size": 2, "window": 6 if mode == "pack" else None, "max_steps": 512}
        loader = make_loader(spoken, talker, workers=workers, rejects=rejects, **settings)
        batches.append(list(islice(loader, 5)))
        reports.append((rejects.report(), rejects.taken, loader.state_dict()))
        states.append(torch.rand(1).item())
    assert states[0] == states[1] == first_draw()
    assert all(same(one, other) for one, other in zip(*batches, strict=True))
    assert reports[0] == reports[1]
    assert "audio_in_not_found" in reports[0][0]


def first_draw() -> float:
    return torch.rand(1, generator=torch.Generator().manual_seed(0)).item()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "settings", [{"mode": "pad"}, {"mode": "bucket", "window": 6}, {"mode": "pack", "window": 6}]
)
def test_resumed_is_uninterrupted(settings, workers, chats, talker):
    settings = {"batch_size": 2, "max_steps": 100, **settings}
    whole = list(islice(make_loader(chats, talker, **settings), 9))
    for stop in (1, 2, 3, 4, 7):
        loader = make_loader(chats, talker, workers=workers, **settings)
        first = list(islice(loader, stop))
        state = json.loads(json.dumps(loader.state_dict()))
        assert state["samples"] == sum(len(batch.ids) for batch in first)
        resumed = make_loader(chats, talker, workers=workers, **settings)
        resumed.load_state_dict(state)
        rest = list(islice(resumed, 9 - stop))
        assert all(same(one, other) for one, other in zip(whole, first + rest, strict=True))
        assert resumed.rejects.taken >= resumed.state.samples


def test_a_resume_that_would_see_other_rows_is_refused(chats, talker):
    state = make_loader(chats, talker, batch_size=2).state_dict()
    with pytest.raises(DataError, match="left with world 1, now it is 2"):
        make_loader(chats, talker, batch_size=2, world=2).load_state_dict(state)
    with pytest.raises(DataError, match="left with window_size 2, now it is 4"):
        make_loader(chats, talker, batch_size=4).load_state_dict(state)


def test_rejects_are_replaced_and_stop_the_run(tmp_path, talker):
    rows = [row if i % 3 else {**row, "text_out": None} for i, row in enumerate(text_rows(30))]
    spec = SourceSpec(write_lines(tmp_path / "some.jsonl", rows), task="text_to_text")
    loader = make_loader(spec, talker, batch_size=4, rejects=Rejects(limit=0.6))
    batches = list(islice(loader, 15))
    assert all(len(batch.ids) == 4 for batch in batches)
    good = {row["id"] for row in rows if row["text_out"]}
    assert {name for batch in batches for name in batch.ids} == good
    assert loader.rejects.counts["no_text_out"] >= 20
    with pytest.raises(DataError, match=r"rows were rejected.*\n.*no_text_out") as caught:
        list(islice(make_loader(spec, talker, batch_size=4, rejects=Rejects(grace=50)), 50))
    assert "text_to_text needs text_out or turns" in str(caught.value)


def test_a_source_without_one_good_row_stops_at_once(tmp_path, talker):
    rows = [{"text_in": "a", "text_out": " "}] * 5
    spec = SourceSpec(write_lines(tmp_path / "none.jsonl", rows), task="text_to_text")
    with pytest.raises(DataError, match="rows in a row were rejected"):
        next(iter(make_loader(spec, talker, batch_size=1)))


def test_bucketing_and_packing_save_padding(chats, talker):
    def share(**settings) -> float:
        loader = make_loader(chats, talker, batch_size=4, max_steps=160, **settings)
        masks = torch.cat([batch.attention_mask.flatten() for batch in islice(loader, 10)])
        return 1 - float(masks.float().mean())

    plain, bucketed, packed = share(), share(mode="bucket", window=40), share(mode="pack", window=40)
    assert bucketed < plain
    assert packed < plain


def test_lengths_are_counted(chats, talker):
    lengths, rejects = sample_lengths(
        Mixture([chats]), partial(to_sample, processor=talker.processor), count=20
    )
    assert len(lengths) == rejects.taken == 20
    histogram = LengthHistogram.of(lengths, bars=4)
    assert sum(histogram.counts) == 20
    assert histogram.edges[0] == min(lengths) < max(lengths) < histogram.edges[-1]
    assert len(str(histogram).splitlines()) == len(histogram.counts)
    assert LengthHistogram.of([3, 3, 9], bars=3) == ((3, 6, 9, 12), (2, 0, 1))
