"""The machine that was measured on: what it is, and what the process holds of its memory."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What computes: processor, cores, load (of the last minute, processes), threads, versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "accelerator": None
        if device.type == "cpu"
        else torch.get_device_module(device).get_device_name(device),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def resident_bytes() -> int | None:
    """Memory that the process holds now."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int | None:
    """Most memory that the process ever held.

    Linux's ``ru_maxrss`` counts the parent's memory too where the process was started by a larger one, so the
    process's own high-water mark is asked first.
    """
    marks = _status_bytes()
    if "VmHWM" in marks:
        return marks["VmHWM"]
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_kinds() -> dict[str, int]:
    """Resident memory now by kind: ``anonymous`` is the process's own, ``file`` pages of mapped files."""
    marks = _status_bytes()
    names = {"anonymous": "RssAnon", "file": "RssFile", "shared": "RssShmem"}
    return {kind: marks[name] for kind, name in names.items() if name in marks}


def available_bytes() -> int | None:
    """Memory that the machine can still give; None where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return _kibibytes(lines).get("MemAvailable")


def _status_bytes() -> dict[str, int]:
    try:
        return _kibibytes(Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    except OSError:
        return {}


def _kibibytes(lines: list[str]) -> dict[str, int]:
    """Lines such as ``VmHWM:  12 kB``, in bytes."""
    found = {}
    for line in lines:
        name, _, value = line.partition(":")
        number, _, unit = value.strip().partition(" ")
        if unit == "kB":
            found[name] = int(number) * 1024
    return found
