"""Read tensors from files that strangers wrote, and nothing but tensors.

A path in, a dict of tensors out. What a file claims is checked against what is expected before anything is
allocated. Knows nothing of models: the caller says which names and shapes it expects.
"""

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from omni_adapter.errors import CheckpointError

MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 10_000
_MAX_NAMES_IN_MESSAGE = 8


def read_safetensors(
    path: Path, *, expected: Mapping[str, Sequence[int]] | None = None, prefixes: Sequence[str] = ("",)
) -> dict[str, Tensor]:
    """Read a ``.safetensors`` file.

    Args:
        path: the file.
        expected: shape of every tensor that must be there, by name; None takes what is there.
        prefixes: only tensors whose names begin with one of these are looked at.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        CheckpointError: if the file is malformed or too large, or not as expected.
    """
    try:
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: header of {header_bytes} bytes, at most {MAX_HEADER_BYTES} are read"
            )
        with safe_open(path, framework="pt", device="cpu") as tensors:
            names = [name for name in tensors.keys() if name.startswith(tuple(prefixes))]
            if len(names) > MAX_TENSORS:
                raise CheckpointError(f"{path}: {len(names)} tensors, at most {MAX_TENSORS} are read")
            if expected is not None:
                shapes = {name: tensors.get_slice(name).get_shape() for name in names}
                check_shapes(shapes, expected=expected, source=str(path))
            state = {name: tensors.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    check_finite(state, source=str(path))
    return state


def num_elements(path: Path) -> int:
    """Return how many numbers a ``.safetensors`` file holds; only its header is read.

    Raises:
        CheckpointError: if the file is malformed.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def read_torch_file(path: Path, *, mapped: bool = False) -> Any:
    """Read a file that ``torch.save`` wrote, tensors and plain containers only; code in it is never run.

    Args:
        path: the file.
        mapped: leave the tensors in the file until they are used, where its form allows; it must not change
            while they live.

    Raises:
        CheckpointError: if the file is malformed or compressed, or holds anything else.
    """
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                # torch stores without compression; a file that inflates is not one of its own.
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise CheckpointError(f"{path} is compressed, which torch.save never does; not read")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_zip)
    except CheckpointError:
        raise
    except Exception as error:  # torch's unpickler raises whatever a broken file leads it into
        raise CheckpointError(
            f"{path} cannot be read with weights_only=True, as files of others must be: {error}"
        ) from error


def check_shapes(
    shapes: Mapping[str, Sequence[int]], *, expected: Mapping[str, Sequence[int]], source: str
) -> None:
    """Compare names and shapes of a file with those of a model.

    Raises:
        CheckpointError: naming the missing, unknown and wrongly shaped tensors.
    """
    wrong = [
        f"{name} {list(shapes[name])} instead of {list(expected[name])}"
        for name in expected
        if name in shapes and list(shapes[name]) != list(expected[name])
    ]
    problems = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unknown": sorted(shapes.keys() - expected.keys()),
        "wrongly shaped": wrong,
    }
    found = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
    if found:
        raise CheckpointError(f"{source} does not fit its config: {found}")


def check_finite(state: Mapping[str, Tensor], *, source: str) -> None:
    """Refuse weights with NaN or infinity.

    Raises:
        CheckpointError: naming the tensors.
    """
    broken = [
        name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    if broken:
        raise CheckpointError(f"{source} holds NaN or infinity in: {_some(broken)}; download the file again")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES_IN_MESSAGE])
    more = len(names) - _MAX_NAMES_IN_MESSAGE
    return f"{shown} and {more} more" if more > 0 else shown
