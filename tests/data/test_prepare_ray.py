"""The engine on Ray: real workers on a real local cluster, killed for real, and the files of a single process."""

import functools
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from omni_adapter import SnacCodec
from omni_adapter.data.prepare import Preparation, PrepareSettings
from omni_adapter.data.prepare_ray import Pool, run_on_ray
from omni_adapter.data.sources import SourceSpec
from omni_adapter.errors import ConfigError, DataError

WORDS = ("one", "two", "three", "four", "five")
ROWS = 22


@pytest.fixture(scope="module")
def ray(tmp_path_factory):
    """Ray with a cluster of two machines, as it were: two nodes of one core each, and a head without any."""
    ray = pytest.importorskip("ray", reason="Ray is in the extra ray")
    from ray.cluster_utils import Cluster

    # Workers get what this file defines as it is, wherever they run.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        }.items():
            patch.setenv(name, value)
        small = {"object_store_memory": 80 << 20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield ray
        finally:
            ray.shutdown()
            cluster.shutdown()


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


def wait_to_be_killed(call: int, *, flags: Path) -> None:
    """The first process that gets to its fifth recording says who it is and goes no further."""
    if call != 5:
        return
    try:
        (flags / "taken").touch(exist_ok=False)
    except FileExistsError:
        return
    (flags / "pid.partial").write_text(str(os.getpid()))
    os.replace(flags / "pid.partial", flags / "pid")
    time.sleep(120)


def die(call: int) -> None:
    """Nobody gets beyond the third recording."""
    if call > 3:
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


def prepare(world: Path, out: Path, *, before_encode=None, progress=None) -> Preparation:
    work = open_work(torch.device("cpu"), world=world, out=out)
    opened = functools.partial(open_work, world=world, out=out, before_encode=before_encode)
    run_on_ray(work, work.pending(), open_work=opened, pool=Pool(workers=2), progress=progress)
    return work


def test_a_killed_worker_costs_nothing(ray, world, tmp_path):
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
