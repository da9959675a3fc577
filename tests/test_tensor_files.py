import json
import struct
import time
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from omni_adapter.errors import CheckpointError
from omni_adapter.tensor_files import MAX_TENSORS, read_safetensors, read_torch_file

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}
GOOD = save(STATE)


def test_round_trip(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(STATE, path)
    read = read_safetensors(path, expected={"a": (2, 3), "b": (4,)})
    assert read.keys() == STATE.keys()
    assert all(torch.equal(read[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        ({"a": (2, 3)}, "unknown: b"),
        ({"a": (2, 3), "b": (4,), "c": (1,)}, "missing: c"),
        ({"a": (3, 2), "b": (4,)}, r"wrongly shaped: a \[2, 3\] instead of \[3, 2\]"),
    ],
)
def test_names_and_shapes_are_checked(expected, text, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD)
    with pytest.raises(CheckpointError, match=text):
        read_safetensors(path, expected=expected)


def with_header(header):
    data = json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "not a readable safetensors file"),
        (b"x" * 100, "header of"),
        (struct.pack("<Q", 9 << 20) + b" " * (9 << 20), "header of 9437184 bytes"),
        (GOOD[:-1], "not a readable safetensors file"),
        (
            with_header({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
            "not a readable",
        ),
        (save({"a": torch.tensor([float("nan")])}), "NaN or infinity in: a"),
    ],
)
def test_malformed_files_are_refused_at_once(data, text, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=text):
        read_safetensors(path)
    assert time.perf_counter() - start < 1


def test_too_many_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({str(index): torch.zeros(0) for index in range(MAX_TENSORS + 1)}))
    with pytest.raises(CheckpointError, match="10001 tensors, at most 10000"):
        read_safetensors(path)


@settings(deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_changed_byte_is_harmless(tmp_path_factory, place, change):
    path = tmp_path_factory.mktemp("flip") / "x.safetensors"
    path.write_bytes(GOOD[:place] + bytes([GOOD[place] ^ change]) + GOOD[place + 1 :])
    try:
        read = read_safetensors(path, expected={"a": (2, 3), "b": (4,)})
    except CheckpointError:
        return
    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == {"a": (2, 3), "b": (4,)}


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(zipped, tmp_path):
    path = tmp_path / "x.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_torch_file(path)["a"], STATE["a"])


def test_a_zip_bomb_is_not_inflated(tmp_path):
    stored, bomb = tmp_path / "stored.pt", tmp_path / "bomb.pt"
    torch.save(torch.zeros(1000), stored)
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match="compressed"):
        read_torch_file(bomb)


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\x03\x04" + bytes(50)])
def test_no_torch_file(data, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="weights_only=True"):
        read_torch_file(path)
    with pytest.raises(CheckpointError, match="weights_only=True"):
        read_torch_file(tmp_path / "missing.pt")
