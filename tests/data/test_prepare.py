import hashlib
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch

from omni_adapter import SnacCodec
from omni_adapter.audio.waveform import read_waveform
from omni_adapter.config import parse
from omni_adapter.data import encode
from omni_adapter.data.dataset import Mixture
from omni_adapter.data.prepare import Preparation, PrepareSettings
from omni_adapter.data.reader import Reader
from omni_adapter.data.rows import to_sample
from omni_adapter.data.sources import SourceSpec, open_source
from omni_adapter.data.synthesis import CommandSynthesizer, PipelineSynthesizer, make_synthesizer
from omni_adapter.errors import AudioError, ConfigError, DataError, RowError
from omni_adapter.training.lessons import open_mixture
from omni_adapter.training.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("one", "two", "three", "four", "five")


@pytest.fixture(scope="module")
def codec(parts):
    return SnacCodec.from_model(parts.snac)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory, speak) -> Path:
    """Twenty tiny recordings, one of them silent."""
    folder = tmp_path_factory.mktemp("sounds")
    lines = []
    for number in range(20):
        name = f"{number:02d}.wav"
        shutil.copy(speak(WORDS[number % len(WORDS)]), folder / name)
        lines.append({"file_name": name, "text": WORDS[number % len(WORDS)]})
    soundfile.write(folder / "13.wav", np.zeros(4000), 16000)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


COLUMNS = {"audio": "audio_out", "text": "text_out"}
SETTINGS = PrepareSettings(shard_rows=6)


def start(sounds: Path, out: Path, codec, **changes) -> Preparation:
    spec = SourceSpec(str(sounds), task="tts", columns=COLUMNS)
    return Preparation(spec, out, codec=codec, **{"settings": SETTINGS, **changes})


def do_all(work: Preparation):
    work.run(work.pending())
    return work.finish()


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file by its path."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def finished(sounds, codec, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "codes"
    totals = do_all(start(sounds, out, codec))
    assert (totals.rows, totals.rejected, totals.reasons) == (19, 1, {"audio_out_silent": 1})
    return out


def test_prepared_rows_are_the_recordings(finished, sounds, codec, talker):
    mixture = Mixture([SourceSpec(str(finished), task="tts", shuffle=False)])
    assert mixture.epoch_length == 19
    for position, number in ((0, 0), (13, 14), (18, 19)):
        row = mixture.read(position)
        waveform = read_waveform(sounds / f"{number:02d}.wav", sampling_rate=codec.spec.sampling_rate)
        assert (row.id, row.text_out) == (f"{number:02d}.wav", WORDS[number % len(WORDS)])
        assert torch.equal(row.codes_out, codec.encode(waveform))
        assert to_sample(row, talker.processor).layout.grid.shape[1] > row.codes_out.shape[1]


def test_prepared_rows_without_a_task_serve_those_that_their_columns_can(sounds, codec, tmp_path):
    out = tmp_path / "codes"
    spec = SourceSpec(str(sounds), columns=COLUMNS)
    do_all(Preparation(spec, out, codec=codec, settings=SETTINGS))
    assert set(open_source(SourceSpec(str(out))).columns) == {
        "id", "codes_out", "text_out", "seconds_in", "seconds_out", "tags",
    }  # fmt: skip
    settings = parse(TrainSettings, {"data": {"sources": [str(out)]}}, source="test")
    assert [spec.task for spec in open_mixture(settings).specs] == ["tts"]
    stream = open_source(SourceSpec(str(out), streaming=True))
    assert "task" not in stream.columns
    assert len(stream.read(0, 0)["codes_out"]) == codec.spec.num_codebooks


def test_prepared_folders_that_do_not_say_what_they_hold(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "codes")
    (out / "prepared.json").write_text('{"rows": 19}')
    with pytest.raises(DataError, match="does not say which columns are filled; prepare the data again"):
        open_source(SourceSpec(str(out)))


def test_quarantine_says_which_file_and_why(finished, sounds):
    (record,) = map(json.loads, (finished / "quarantine.jsonl").read_text().splitlines())
    assert record.pop("message").endswith("check the microphone or the file")
    assert record == {
        "index": 13,
        "id": "13.wav",
        "path": "13.wav",
        "sha256": hashlib.sha256((sounds / "13.wav").read_bytes()).hexdigest(),
        "reason": "audio_out_silent",
    }


def test_processes_share_the_shards(finished, sounds, codec, tmp_path):
    works = [start(sounds, tmp_path / "codes", codec) for _ in range(2)]
    pending = works[0].pending()
    assert pending == [0, 1, 2, 3]
    for rank in (1, 0):
        with pytest.raises(DataError, match="shards are not done"):
            works[0].finish()
        works[rank].run(pending[rank::2])
    works[0].finish()
    assert tree(tmp_path / "codes") == tree(finished)


def test_an_unfinished_folder_is_not_trained_on(sounds, codec, tmp_path):
    work = start(sounds, tmp_path / "codes", codec)
    work.run([0, 1])
    with pytest.raises(DataError, match="is not finished"):
        open_source(SourceSpec(str(tmp_path / "codes")))


def run_until_killed(sounds: Path, out: Path, codec, point: int) -> bool:
    """Prepare in a child that kills itself at the ``point``-th call that changes or makes something."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return True
        assert os.WEXITSTATUS(status) == 0
        return False
    calls = 0

    def deadly(function, *, half=None):
        def call(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == point:
                if half is not None:
                    half(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return call

    def cut(descriptor: int) -> None:
        """What was written so far reaches the disk in half."""
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)

    try:
        os.fsync = deadly(
            os.fsync, half=lambda fd: cut(fd) if not os.path.isdir(f"/proc/self/fd/{fd}") else None
        )
        os.replace = deadly(os.replace)
        os.close = deadly(os.close)
        Path.mkdir = deadly(Path.mkdir)
        codec.encode = deadly(codec.encode)
        do_all(start(sounds, out, codec))
    except BaseException:
        os._exit(1)
    os._exit(0)


def sweep(finished: Path, sounds: Path, codec, folder: Path, step: int) -> int:
    expected, point = tree(finished), 1
    while True:
        out = folder / str(point)
        killed = run_until_killed(sounds, out, codec, point)
        if not killed:
            assert tree(out) == expected
            return point
        do_all(start(sounds, out, codec))
        assert tree(out) == expected, f"killed at call {point}"
        shutil.rmtree(out)
        point += step


def test_a_kill_costs_nothing(finished, sounds, codec, tmp_path):
    assert sweep(finished, sounds, codec, tmp_path, step=9) > 40


@pytest.mark.slow
def test_a_kill_at_any_call_costs_nothing(finished, sounds, codec, tmp_path):
    assert sweep(finished, sounds, codec, tmp_path, step=1) > 40


def test_kills_in_a_row_lead_to_the_same(finished, sounds, codec, tmp_path):
    """The run is killed again and again, each time a little later in its life."""
    point = 3
    while run_until_killed(sounds, tmp_path / "codes", codec, point):
        point += 4
    assert tree(tmp_path / "codes") == tree(finished)


def test_finished_shards_are_not_made_again(finished, sounds, codec, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "codes")
    monkeypatch.setattr(codec, "encode", None)
    work = start(sounds, tmp_path / "codes", codec)
    assert work.pending() == []
    work.finish()
    (tmp_path / "codes" / "shard-00002.parquet").write_bytes(b"PAR1")
    assert start(sounds, tmp_path / "codes", codec).pending() == [2]


def test_a_folder_of_something_else_is_refused(finished, sounds, codec, tmp_path):
    shutil.copytree(finished, tmp_path / "codes")
    with pytest.raises(
        DataError, match=r"begun with something else \(settings: .*'shard_rows': 6.*name another"
    ):
        start(sounds, tmp_path / "codes", codec, settings=PrepareSettings(shard_rows=7))
    start(sounds, tmp_path / "codes", codec, settings=PrepareSettings(shard_rows=6, max_bad=0.5))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "novel.txt").write_text("Once")
    with pytest.raises(DataError, match="holds other files"):
        start(sounds, tmp_path / "mine", codec)


def bad_files(folder: Path, good: Path) -> dict[str, str]:
    """Files that strangers send, and the reason each must be given."""
    data = good.read_bytes()
    flac = folder / "whole.flac"
    samples, rate = soundfile.read(good)
    soundfile.write(flac, samples, rate)
    bomb = bytearray(flac.read_bytes())
    flac.unlink()
    # STREAMINFO: the low 36 bits of bytes 18..25 count the samples
    packed = int.from_bytes(bomb[18:26], "big") | ((1 << 36) - 1)
    bomb[18:26] = packed.to_bytes(8, "big")
    no_rate = bytearray(data)
    no_rate[24:28] = struct.pack("<I", 0)
    nan = np.full(4000, 0.1, np.float32)
    nan[100] = np.nan
    soundfile.write(folder / "nan.wav", nan, 16000, subtype="FLOAT")
    contents = {
        "empty.wav": (b"", "audio_out_empty"),
        "text.wav": (b"this is no sound at all " * 50, "audio_out_unreadable"),
        "header.wav": (data[:44], "audio_out_empty"),
        "half.wav": (data[: len(data) // 2], "audio_out_truncated"),
        "rate.wav": (bytes(no_rate), None),
        "bomb.flac": (bytes(bomb), None),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    return {**{name: reason for name, (_, reason) in contents.items()}, "nan.wav": "audio_out_not_finite"}


def test_bad_files_cost_a_record_each(codec, speak, tmp_path):
    folder = tmp_path / "sounds"
    folder.mkdir()
    reasons = bad_files(folder, speak("one"))
    reasons |= {
        "missing.wav": "audio_out_not_found",
        "../outside.wav": "outside_root",
        "C:\\x.wav": "outside_root",
    }
    (tmp_path / "outside.wav").write_bytes(b"secret")
    (folder / "link.wav").symlink_to(tmp_path / "outside.wav")
    reasons["link.wav"] = "outside_root"
    shutil.copy(speak("two"), folder / "good.wav")
    names = [*reasons, "good.wav"]
    path = folder / "list.jsonl"
    lines = [json.dumps({"id": name, "audio_out": name, "text_out": "x"}) for name in names]
    path.write_text("\n".join([*lines, '{"text_out": "no sound"}', "{broken", '{"audio_out": 5}']) + "\n")
    work = Preparation(
        SourceSpec(str(path), task="tts"),
        tmp_path / "out",
        codec=codec,
        settings=PrepareSettings(max_bad=1.0),
    )
    totals = do_all(work)
    assert totals.rows == 1
    records = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    found = {record["id"]: record["reason"] for record in records}
    count = len(names)
    reasons |= {f"list.jsonl#{count}": "no_audio_out", f"list.jsonl#{count + 1}": "bad_json"}
    reasons[f"list.jsonl#{count + 2}"] = "wrong_type"
    assert found.keys() == reasons.keys()
    assert {name: found[name] for name, reason in reasons.items() if reason} == {
        name: reason for name, reason in reasons.items() if reason
    }
    assert found["rate.wav"].startswith("audio_out_")
    assert found["bomb.flac"] in ("audio_out_truncated", "audio_out_too_long", "audio_out_unreadable")
    digests = {record["id"]: record["sha256"] for record in records}
    assert digests["text.wav"] == hashlib.sha256((folder / "text.wav").read_bytes()).hexdigest()
    assert digests["link.wav"] is None, "nothing outside of the folder is read"


def test_too_many_bad_files_stop_the_run(sounds, codec, tmp_path):
    folder = tmp_path / "sounds"
    shutil.copytree(sounds, folder)
    for number in range(0, 20, 3):
        (folder / f"{number:02d}.wav").write_bytes(b"")
    work = start(folder, tmp_path / "out", codec)
    work.run(work.pending())
    with pytest.raises(DataError, match=r"8 of 20 rows were rejected \(40.0%, at most 5.0%"):
        work.finish()
    with pytest.raises(DataError, match="is not finished"):
        open_source(SourceSpec(str(tmp_path / "out")))
    (tmp_path / "wrong.jsonl").write_text('{"audio_out": "nowhere.wav", "text_out": "a"}\n' * 300)
    wrong = Preparation(SourceSpec(str(tmp_path / "wrong.jsonl"), task="tts"), tmp_path / "none", codec=codec)
    with pytest.raises(DataError, match="100 of 100 rows"):
        wrong.run(wrong.pending())


def test_duplicate_ids_are_refused(codec, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"name": name, "audio_out": "a.wav"}) + "\n" for name in "abcab"))
    spec = SourceSpec(str(path), columns={"name": "id"})
    with pytest.raises(DataError, match="2 duplicate ids: 'a' in rows 0 and 3, 'b' in rows 1 and 4"):
        Preparation(spec, tmp_path / "out", codec=codec)
    assert not (tmp_path / "out").exists()


def test_a_missing_column_is_refused_at_the_start(sounds, codec, tmp_path):
    with pytest.raises(DataError, match="found the columns audio, id, text"):
        Preparation(SourceSpec(str(sounds), task="tts"), tmp_path / "out", codec=codec)


def test_a_full_disk_is_said_and_finished_shards_stay(finished, sounds, codec, tmp_path):
    """Files may grow to 4 KiB: the plan fits, a shard does not."""
    out = tmp_path / "codes"
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            do_all(start(sounds, out, codec))
        except DataError as error:
            os._exit(3 if "the disk is full" in str(error) else 4)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) == 3
    assert [file.name for file in out.iterdir() if file.is_file()] == ["plan.json"]
    do_all(start(sounds, out, codec))
    assert tree(out) == tree(finished)


def test_what_a_network_loses_is_read_again(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    failures = iter([ConnectionResetError("reset"), TimeoutError("late")])

    def read() -> str:
        for failure in failures:
            raise failure
        return "row"

    assert encode._retried(read) == "row"

    def never() -> str:
        raise ConnectionResetError("reset")

    with pytest.raises(ConnectionResetError):
        encode._retried(never)


def test_a_decoder_that_dies_costs_one_file(speak, monkeypatch):
    """Crash, endless loop and memory; the next file is read by a new process."""
    import omni_adapter.data.reader as reader_module

    def hostile(source, *, sampling_rate, max_seconds):
        if source == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if source == "loop":
            time.sleep(60)
        if source == "memory":
            np.ones(1 << 33)
        return read_waveform(source, sampling_rate=sampling_rate, max_seconds=max_seconds)

    monkeypatch.setattr(reader_module, "read_waveform", hostile)
    expected = read_waveform(speak("one"), sampling_rate=16000)
    with Reader(max_seconds=60, timeout_s=1.0) as reader:
        for source, reason in (
            ("crash", "decoder_crash"),
            ("loop", "decoder_timeout"),
            ("memory", "too_large"),
        ):
            with pytest.raises(AudioError) as caught:
                reader.read(source, sampling_rate=16000)
            assert caught.value.reason == reason
            assert torch.equal(reader.read(speak("one"), sampling_rate=16000), expected)


def test_long_recordings_are_not_decoded(tmp_path):
    soundfile.write(tmp_path / "long.flac", np.zeros(16000 * 400, np.int16), 16000)
    with Reader(max_seconds=300) as reader, pytest.raises(AudioError) as caught:
        reader.read(tmp_path / "long.flac", sampling_rate=16000)
    assert caught.value.reason == "too_long"


def test_questions_are_kept_as_they_sound(codec, speak, tmp_path, talker):
    question, answer = speak("two"), speak("three")
    row = {
        "audio_in": str(question),
        "audio_out": str(answer),
        "text_in": "two?",
        "text_out": "three",
        "speaker": "ann",
    }
    for name in ("audio_in", "audio_out"):
        shutil.copy(row[name], tmp_path / f"{name}.wav")
        row[name] = f"{name}.wav"
    row["turns"] = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "one"}]
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    spec = SourceSpec(str(tmp_path / "a.jsonl"))
    totals = do_all(Preparation(spec, tmp_path / "out", codec=codec))
    assert totals.seconds["seconds_in"] > 0.2
    for task in ("speech_to_speech", "asr"):
        made = Mixture([SourceSpec(str(tmp_path / "out"), task=task)]).read(0)
        heard = read_waveform(made.audio_in, sampling_rate=16000)
        torch.testing.assert_close(heard, read_waveform(question, sampling_rate=16000), atol=1e-4, rtol=0)
        assert made.turns == ({"role": "user", "content": "Count."}, {"role": "assistant", "content": "one"})
        assert made.speaker == "ann"
        to_sample(made, talker.processor)


def test_odd_recordings_are_tagged(codec, tmp_path):
    loud = np.clip(np.sin(np.arange(24000) / 20) * 3, -1, 1)
    for name, samples in (("loud", loud), ("offset", np.sin(np.arange(24000) / 20) * 0.1 + 0.2)):
        soundfile.write(tmp_path / f"{name}.wav", samples, 24000)
    spec = SourceSpec(str(tmp_path), columns={"audio": "audio_out"})
    do_all(Preparation(spec, tmp_path / "out", codec=codec))
    source = open_source(SourceSpec(str(tmp_path / "out")))
    assert [row["tags"] for row in source] == [["audio_out:clipped"], ["audio_out:dc"]]


@pytest.mark.parametrize("voice", ["espeak-ng", "flite:slt"])
def test_texts_are_spoken(voice, codec, tmp_path):
    lines = [
        {"text_in": "Where is the sea?", "text_out": "-w There."},
        {"text_in": "Hello.", "text_out": "$(ls)"},
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="needs a synthesizer"):
        Preparation(
            SourceSpec(str(tmp_path / "texts.jsonl")),
            tmp_path / "out",
            codec=codec,
            settings=PrepareSettings(speak=("audio_in",)),
        )
    work = Preparation(
        SourceSpec(str(tmp_path / "texts.jsonl")),
        tmp_path / "out",
        codec=codec,
        settings=PrepareSettings(speak=("audio_in", "audio_out")),
        synthesizer=make_synthesizer(voice),
    )
    do_all(work)
    row = Mixture([SourceSpec(str(tmp_path / "out"), task="speech_to_speech", shuffle=False)]).read(0)
    speech = make_synthesizer(voice).speak("-w There.")
    assert torch.equal(row.codes_out, codec.encode(read_waveform(speech.audio, sampling_rate=24000)))


def test_synthesizers_that_fail_are_named(tmp_path):
    with pytest.raises(DataError, match="no synthesizer is called 'choir'; use espeak-ng"):
        make_synthesizer("choir")
    with pytest.raises(DataError, match="no-such-program is not installed"):
        CommandSynthesizer(("no-such-program",))
    with pytest.raises(RowError, match="could not speak 'hello'") as caught:
        make_synthesizer("flite:nobody").speak("hello") and CommandSynthesizer(("false",)).speak("hello")
    assert caught.value.reason == "not_spoken"
    with pytest.raises(RowError, match=r"took more than 0.1 s"):
        CommandSynthesizer(("sleep", "5"), timeout_s=0.1).speak("hello")


def test_a_pipeline_of_transformers_speaks(codec, tmp_path):
    """A real text-to-speech pipeline, its model tiny and random."""
    from transformers import VitsConfig, VitsModel, VitsTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz' "
    (tmp_path / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(letters)}))
    tokenizer = VitsTokenizer(str(tmp_path / "vocab.json"), pad_token="a", phonemize=False, is_uroman=False)
    config = VitsConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, flow_size=16,
        spectrogram_bins=9, upsample_initial_channel=32, upsample_rates=[4, 4], upsample_kernel_sizes=[8, 8],
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]], prior_encoder_num_flows=1,
        posterior_encoder_num_wavenet_layers=1, prior_encoder_num_wavenet_layers=1,
        duration_predictor_num_flows=1, wavenet_dilation_rate=1, depth_separable_num_layers=1,
    )  # fmt: skip
    torch.manual_seed(0)
    VitsModel(config).save_pretrained(tmp_path / "vits")
    tokenizer.save_pretrained(tmp_path / "vits")
    synthesizer = make_synthesizer(f"transformers:{tmp_path / 'vits'}")
    speech = synthesizer.speak("hello there")
    assert isinstance(synthesizer, PipelineSynthesizer)
    assert synthesizer.name.endswith("vits")
    assert speech.sampling_rate == config.sampling_rate
    assert speech.audio.shape == (speech.audio.size,)
    assert speech.audio.size > 100
    assert speech.audio.dtype == np.float32


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"max_bad must lie in 0\.\.1"):
        parse(PrepareSettings, {"max_bad": 5}, source="command line")


def recipe(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [*launch, str(ROOT / "recipes" / "prepare.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)


def recipe_arguments(sounds: Path, out: Path, codec_folder: Path) -> list[str]:
    return [
        str(sounds), "--out", str(out), "--task", "tts", "--column", "audio=audio_out",
        "--column", "text=text_out", "--codec", str(codec_folder), "--shard-rows", "6",
    ]  # fmt: skip


def test_the_recipe_makes_the_same(finished, sounds, codec, tmp_path):
    codec.save_pretrained(tmp_path / "codec")
    done = recipe(*recipe_arguments(sounds, tmp_path / "out", tmp_path / "codec"))
    assert done.returncode == 0, done.stderr
    assert "19 rows in" in done.stdout
    assert "1 rows in quarantine" in done.stdout
    assert tree(tmp_path / "out") == tree(finished)


@pytest.mark.slow
def test_the_recipe_fails_in_one_line(codec, tmp_path):
    codec.save_pretrained(tmp_path / "codec")
    failed = recipe(*recipe_arguments(tmp_path / "nowhere", tmp_path / "out", tmp_path / "codec"))
    assert failed.returncode == 1
    assert failed.stderr.strip().endswith("does not exist")


@pytest.mark.slow
def test_the_recipe_shares_the_work(finished, sounds, codec, tmp_path):
    codec.save_pretrained(tmp_path / "codec")
    done = recipe(*recipe_arguments(sounds, tmp_path / "out", tmp_path / "codec"), processes=2)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == tree(finished)


def test_questions_can_be_encoded_once(codec, speak, talker, tmp_path):
    """Kept frames lead to what the encoder leads to, also beside recordings; those of others are refused."""
    from omni_adapter.data.collator import collate
    from recipes.prepare import Encoder

    talker.model.audio_encoder.save_pretrained(tmp_path / "encoder")
    rows = []
    for word in ("one", "two"):
        shutil.copy(speak(word), tmp_path / f"{word}.wav")
        rows.append({"id": word, "audio_in": f"{word}.wav", "text_in": word})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    device = torch.device("cpu")

    def samples(name: str, padding: str) -> list:
        listener = Encoder(str(tmp_path / "encoder"), padding=padding, device=device)
        spec = SourceSpec(str(tmp_path / "a.jsonl"), task="asr")
        do_all(Preparation(spec, tmp_path / name, codec=codec, listener=listener))
        mixture = Mixture([SourceSpec(str(tmp_path / name), task="asr", shuffle=False)])
        kept = [mixture.read(position) for position in range(2)]
        return [to_sample(row, talker.processor) for row in (kept[0], replace(kept[1], frames_in=None))] + [
            to_sample(replace(kept[0], frames_in=None), talker.processor)
        ]

    kept, second, first = samples("out", talker.config.encoder_padding)
    assert torch.equal(kept.layout.grid, first.layout.grid)

    def logits(batch: list) -> torch.Tensor:
        made = collate(batch, rules=talker.processor.rules, side="right")
        with torch.no_grad():
            return talker.model(made.grid, places=made.places, clips=made.clips).text_logits

    for others in ([], [second]):
        torch.testing.assert_close(logits([kept, *others]), logits([first, *others]), rtol=1e-2, atol=1e-2)
    assert collate([kept], rules=talker.processor.rules).clips.to("cpu").windows == (0,)
    with pytest.raises(RowError, match=r"was encoded by the encoder .*prepare the data again") as caught:
        samples("other", "window" if talker.config.encoder_padding == "true_length" else "true_length")
    assert caught.value.reason == "bad_prompt"
