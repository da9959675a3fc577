"""The engine on Ray: real workers on a real local cluster, killed for real, and a single process's files."""

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from omni_adapter import SnacCodec
from omni_adapter.config import parse
from omni_adapter.data.prepare import Preparation, PrepareSettings
from omni_adapter.data.prepare_ray import Pool, run_on_ray
from omni_adapter.data.sources import SourceSpec
from omni_adapter.errors import ConfigError, DataError, MissingDependencyError

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("one", "two", "three", "four", "five")
ROWS = 22

pytestmark = pytest.mark.timeout(600)  # some seconds on an idle machine; Ray is slow to start on a busy one


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two machines, as it were: two nodes of one core each, and a head without any."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_worker_register_timeout_seconds": "300",
        }.items():
            patch.setenv(name, value)
        ray = pytest.importorskip("ray", reason="Ray is in the extra ray")
        from ray.cluster_utils import Cluster

        # Workers get what this file defines as it is, wherever they run.
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        cluster = Cluster()
        try:
            start_node(cluster, num_cpus=0, include_dashboard=False)
            for _ in range(2):
                start_node(cluster, num_cpus=1)
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def start_node(cluster, **arguments):
    """A node of a local cluster. Ray gives it half a minute, which a busy machine may not have."""
    for attempt in range(4):
        try:
            return cluster.add_node(object_store_memory=80 << 20, **arguments)
        except Exception:  # Ray has no class for it
            if attempt == 3:
                raise


@pytest.fixture(scope="module")
def world(tmp_path_factory, parts, speak) -> Path:
    """A codec and recordings, one of them silent, and what a single process makes of them."""
    folder = tmp_path_factory.mktemp("world")
    SnacCodec.from_model(parts.snac).save_pretrained(folder / "codec")
    lines = []
    for number in range(ROWS):
        name = f"sounds/{number:02d}.wav"
        (folder / "sounds").mkdir(exist_ok=True)
        shutil.copy(speak(WORDS[number % len(WORDS)]), folder / name)
        lines.append({"audio_out": name, "text_out": WORDS[number % len(WORDS)]})
    soundfile.write(folder / "sounds/13.wav", np.zeros(4000), 16000)
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    work = open_work(torch.device("cpu"), world=folder, out=folder / "local")
    work.run(work.pending())
    totals = work.finish()
    assert (totals.rows, totals.rejected) == (ROWS - 1, 1)
    return folder


def open_work(device: torch.device, *, world: Path, out: Path, before_encode=None) -> Preparation:
    """The preparation of all rows, three a shard."""
    codec = SnacCodec.from_pretrained(world / "codec").to(device)
    if before_encode is not None:
        plain, calls = codec.encode, iter(range(1, 1000))

        def encode(waveform):
            before_encode(next(calls))
            return plain(waveform)

        codec.encode = encode
    spec = SourceSpec(str(world / "rows.jsonl"), task="tts")
    return Preparation(spec, out, codec=codec, settings=PrepareSettings(shard_rows=3, max_bad=0.2))


def wait_to_be_killed(call: int, *, flags: Path, at: int = 5, on: str = "") -> None:
    """The first process, on a certain node, that gets so far says who it is and goes no further."""
    import ray

    if call != at or on not in ray.get_runtime_context().get_node_id():
        return
    try:
        (flags / "taken").touch(exist_ok=False)
    except FileExistsError:
        return
    (flags / "pid.partial").write_text(str(os.getpid()))
    os.replace(flags / "pid.partial", flags / "pid")
    time.sleep(500)


def die(call: int) -> None:
    """Nobody gets beyond the second recording, and most shards hold three."""
    if call > 2:
        os.kill(os.getpid(), signal.SIGKILL)


def kill_when_ready(flags: Path, killed: list[int]) -> None:
    while not (flags / "pid").exists():
        time.sleep(0.02)
    killed.append(int((flags / "pid").read_text()))
    os.kill(killed[0], signal.SIGKILL)


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file by its path."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def prepare(world: Path, out: Path, *, before_encode=None, workers=2, progress=None) -> Preparation:
    work = open_work(torch.device("cpu"), world=world, out=out)
    opened = functools.partial(open_work, world=world, out=out, before_encode=before_encode)
    run_on_ray(work, work.pending(), open_work=opened, pool=Pool(workers=workers), progress=progress)
    return work


def test_a_killed_worker_costs_nothing(cluster, world, tmp_path):
    """Two workers; one is killed in the middle of a shard, which the next one makes."""
    flags, killed, done = tmp_path, [], []
    threading.Thread(target=kill_when_ready, args=(flags, killed), daemon=True).start()
    hostage = functools.partial(wait_to_be_killed, flags=flags)
    work = prepare(
        world, tmp_path / "out", before_encode=hostage, progress=lambda rows, seconds: done.append(rows)
    )
    totals = work.finish()
    assert killed
    assert not Path(f"/proc/{killed[0]}").exists()
    assert (totals.rows, totals.rejected) == (ROWS - 1, 1)
    assert sorted(done) == [1, 3, 3, 3, 3, 3, 3, 3], "each shard is counted once"
    assert tree(tmp_path / "out") == tree(world / "local")


@pytest.mark.slow
def test_a_lost_machine_costs_nothing(cluster, world, tmp_path):
    """The whole node of a worker dies; what it was at is made on the one that is left."""
    lost = start_node(cluster, num_cpus=1)

    def lose_machine() -> None:
        while not (tmp_path / "pid").exists():
            time.sleep(0.02)
        cluster.remove_node(lost, allow_graceful=False)

    threading.Thread(target=lose_machine, daemon=True).start()
    hostage = functools.partial(wait_to_be_killed, flags=tmp_path, at=2, on=lost.node_id)
    prepare(world, tmp_path / "out", before_encode=hostage, workers=3).finish()
    assert (tmp_path / "pid").exists()
    assert tree(tmp_path / "out") == tree(world / "local")


@pytest.mark.slow
def test_a_shard_that_kills_its_workers_ends_the_run(cluster, world, tmp_path):
    """Not tried for ever; what is done stays, and a run that can do it goes on."""
    with pytest.raises(DataError, match=r"4 workers died over shard \d.*fewer workers on a machine"):
        prepare(world, tmp_path / "out", before_encode=die)
    work = prepare(world, tmp_path / "out")
    work.finish()
    assert tree(tmp_path / "out") == tree(world / "local")


@pytest.mark.slow
def test_too_many_bad_rows_end_the_run(cluster, world, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"audio_out": "nowhere.wav", "text_out": "a"}\n' * 120)
    shutil.copytree(world / "codec", tmp_path / "codec")
    with pytest.raises(DataError, match=r"\d+ of \d+ rows were rejected"):
        prepare(tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_a_worker_that_cannot_start_says_why(cluster, world, tmp_path):
    work = open_work(torch.device("cpu"), world=world, out=tmp_path / "out")
    elsewhere = functools.partial(open_work, world=tmp_path / "elsewhere", out=tmp_path / "out")
    with pytest.raises(DataError, match="elsewhere/codec"):
        run_on_ray(work, work.pending(), open_work=elsewhere, pool=Pool(workers=1))


def test_a_cluster_without_room_is_said(cluster, world, tmp_path):
    work = open_work(torch.device("cpu"), world=world, out=tmp_path / "out")
    with pytest.raises(
        DataError, match=r"the cluster has \d CPU cores and 0 accelerators, a worker needs 1 and 1"
    ):
        run_on_ray(work, work.pending(), open_work=open_work, pool=Pool(gpus=1.0))


def test_without_ray_the_extra_is_named(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    work = open_work(torch.device("cpu"), world=world, out=tmp_path / "out")
    with pytest.raises(
        MissingDependencyError, match=r"needs Ray Data; run: pip install 'omni-adapter\[ray\]'"
    ):
        run_on_ray(work, work.pending(), open_work=open_work)


@pytest.mark.parametrize(
    ("values", "message"), [({"workers": 0}, "workers"), ({"gpus": -1.0}, "gpus must be 0 or more, got -1.0")]
)
def test_impossible_workers_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        parse(Pool, values, source="command line")


def command(world: Path, out: Path, *words: str) -> list[str]:
    return [
        sys.executable, "recipes/prepare.py", str(world / "rows.jsonl"), "--out", str(out), "--task", "tts",
        "--codec", str(world / "codec"), "--shard-rows", "3", "--max-bad", "0.2", *words,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--engine", "spark"), "--engine must be local or ray, got 'spark'"),
        (("--workers", "2"), "belong to --engine ray"),
    ],
)
def test_mistakes_on_the_command_line(world, tmp_path, words, message):
    run = subprocess.run(
        command(world, tmp_path / "out", *words), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert message in run.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command(cluster, world, tmp_path):
    """Both engines by their command, with paths that start here."""
    for engine in (("--engine", "local"), ("--engine", "ray", "--workers", "2")):
        run = subprocess.run(
            command(world, Path(os.path.relpath(tmp_path / engine[1], ROOT)), *engine),
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert f"{ROWS - 1} rows in" in run.stdout
    assert tree(tmp_path / "ray") == tree(tmp_path / "local") == tree(world / "local")
