"""A save may be killed at any call, a file may change in any byte: a whole checkpoint is always found."""

import os
import random
import resource
import shutil
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from omni_adapter.errors import CheckpointError
from omni_adapter.training import checkpoint
from omni_adapter.training.checkpoint import (
    MANIFEST_FILE,
    find_checkpoint,
    find_damage,
    list_checkpoints,
    random_state,
    read_json,
    read_tensors,
    save_checkpoint,
    set_random_state,
    step_of,
    write_json,
    write_tensors,
)

CALLS = ("open", "rename", "replace", "fsync", "unlink", "rmdir", "mkdir", "close")
"""What a save does to the disk; a kill before each of them is tried."""


def save(root: Path, step: int, *, keep: int = 2, elements: int = 8) -> Path:
    def write(folder: Path) -> None:
        write_tensors(folder / "model.safetensors", {"weight": torch.full((elements,), float(step))})
        write_json(folder / "state.json", {"step": step, "loss": 0.1 + step})

    return save_checkpoint(root, step=step, write=write, keep=keep)


def loaded_step(folder: Path) -> int:
    """Load a checkpoint whole, and check that all of it belongs to one step."""
    step = read_json(folder / "state.json")["step"]
    assert read_json(folder / "state.json")["loss"] == 0.1 + step
    assert read_tensors(folder / "model.safetensors")["weight"].eq(step).all()
    assert step_of(folder) == step
    return step


def kill_at(call: int) -> None:
    """From now on, die like with ``kill -9`` right before the ``call``-th call that changes the disk."""
    count = 0

    def wrap(function):
        def counted(*args, **kwargs):
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))
    checkpoint.save_file = wrap(checkpoint.save_file)
    checkpoint.json.dumps = wrap(checkpoint.json.dumps)
    checkpoint.Path.write_text = wrap(checkpoint.Path.write_text)


def die_while(action, call: int) -> bool:
    """Run ``action`` in a child that is killed at one call; whether it was killed before the end."""
    child = os.fork()
    if child == 0:
        kill_at(call)
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_newest_whole_checkpoint_loads_after_a_kill_at_every_call(tmp_path):
    torch.set_num_threads(1)
    template = tmp_path / "template"
    save(template, 1), save(template, 2)
    call, killed = 0, True
    while killed:
        call += 1
        root = tmp_path / f"at-{call}"
        shutil.copytree(template, root)
        killed = die_while(lambda root=root: save(root, 3), call)
        found = find_checkpoint(root)
        assert found is not None
        assert loaded_step(found) in (2, 3)
        save(root, 4)
        assert loaded_step(find_checkpoint(root)) == 4
        whole = [path for path in root.iterdir() if find_damage(path) is None]
        assert sorted(root.iterdir()) == sorted(whole), "a leftover was not removed"
        assert len(whole) == 2
        shutil.rmtree(root)
    assert call > 25, "the sweep did not reach the calls of a save"


def test_two_are_kept_and_the_same_step_may_come_again(tmp_path):
    for step in (1, 2, 2, 3):
        save(tmp_path, step, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002.1", "step-00000003"]
    save(tmp_path, 10, keep=3)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [2, 3, 10]


def test_every_flipped_byte_is_noticed(tmp_path):
    folder = save(tmp_path, 1, elements=1)
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        for index in range(len(original)):
            path.write_bytes(original[:index] + bytes([original[index] ^ 1]) + original[index + 1 :])
            assert find_damage(folder) is not None, f"byte {index} of {path.name}"
        path.write_bytes(original)
    assert find_damage(folder) is None


@pytest.mark.parametrize("damage", ["truncated", "missing", "added", "no manifest", "listed outside"])
def test_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage, caplog):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    match damage:
        case "truncated":
            os.truncate(newer / "model.safetensors", 40)
        case "missing":
            (newer / "state.json").unlink()
        case "added":
            (newer / "stray.json").write_text("{}")
        case "no manifest":
            (newer / MANIFEST_FILE).unlink()
        case "listed outside":
            write_json(newer / MANIFEST_FILE, {"version": 1, "files": {"../step-00000001/state.json": {}}})
    assert find_checkpoint(tmp_path) == older
    assert "step-00000002 is passed over" in caplog.text


def test_no_checkpoint_at_all_is_none(tmp_path):
    (tmp_path / "step-final").mkdir()
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path / "nowhere") is None


def test_full_disk_fails_loudly_and_leaves_the_old_one(tmp_path):
    """A file may grow to 64 KiB: the weights do not fit, as on a full disk."""
    save(tmp_path, 1)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        try:
            save(tmp_path, 2, elements=1 << 16)
        except CheckpointError as error:
            os._exit(0 if "no checkpoint was written" in str(error) else 2)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert loaded_step(find_checkpoint(tmp_path)) == 1


def test_more_than_is_free_is_refused_before_writing(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(CheckpointError, match="bytes are to be written"):
        save_checkpoint(tmp_path, step=1, write=lambda folder: pytest.fail("written"), num_bytes=free * 2)


class Threads:
    """Ranks that are threads of one process."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size, timeout=20)
        self.values = [None] * world_size
        self.local = threading.local()

    @property
    def rank(self) -> int:
        return self.local.rank

    def gather(self, value):
        self.values[self.rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values

    def run(self, action) -> list:
        results = [None] * self.world_size

        def body(rank: int) -> None:
            self.local.rank = rank
            try:
                results[rank] = action(rank)
            except CheckpointError as error:
                results[rank] = error

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def test_every_rank_writes_its_share_into_one_checkpoint(tmp_path):
    ranks = Threads(3)

    def action(rank):
        def write(folder):
            write_json(folder / f"rank-{rank}.json", {"rank": rank})

        return save_checkpoint(tmp_path, step=5, write=write, ranks=ranks)

    folders = ranks.run(action)
    assert folders == [tmp_path / "step-00000005"] * 3
    assert find_damage(folders[0]) is None
    assert sorted(path.name for path in folders[0].glob("rank-*")) == [
        f"rank-{rank}.json" for rank in range(3)
    ]


def test_a_rank_that_cannot_write_fails_all(tmp_path):
    ranks = Threads(2)

    def write_or_fail(rank):
        def write(folder):
            if rank == 1:
                raise OSError(28, "No space left on device")
            write_json(folder / "state.json", {})

        return save_checkpoint(tmp_path, step=5, write=write, ranks=ranks)

    errors = ranks.run(write_or_fail)
    assert all("rank 1: OSError: [Errno 28] No space left" in str(error) for error in errors)
    assert list(tmp_path.iterdir()) == []


def test_random_state_comes_back_through_files(tmp_path):
    device = torch.device("cpu")
    random.gauss(0, 1), np.random.normal(), torch.randn(3)
    values, tensors = random_state(device)
    write_json(tmp_path / "rank.json", values)
    write_tensors(tmp_path / "rank.safetensors", tensors)
    drawn = random.gauss(0, 1), random.random(), np.random.normal(), torch.randn(3).tolist()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    set_random_state(read_json(tmp_path / "rank.json"), read_tensors(tmp_path / "rank.safetensors"), device)
    assert drawn == (random.gauss(0, 1), random.random(), np.random.normal(), torch.randn(3).tolist())


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.slow
def test_random_kills_of_big_saves(tmp_path):
    """Half-written big files: the kill comes at a random time instead of between calls."""
    import time

    rng = random.Random(0)
    save(tmp_path, 1, elements=1 << 22)
    step = 1
    for _ in range(15):
        child = os.fork()
        if child == 0:
            save(tmp_path, step + 1, elements=1 << 22)
            os._exit(0)
        time.sleep(rng.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = loaded_step(find_checkpoint(tmp_path))
        assert found in (step, step + 1)
        step = found
