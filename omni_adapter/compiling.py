"""C sources of the package, compiled for this machine by the compiler that it has.

A source file in; a loaded library out, or None, which is logged, where no compiler is found or none
succeeds, or where the variable ``OMNI_ADAPTER_NATIVE`` is 0. What was compiled is kept in the user's cache
folder under the fingerprint of everything that it depends on, so that it takes a second once. Threads are
those of torch: its own runtime is linked, no other is started. Knows nothing of what the sources compute.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

logger = logging.getLogger(__name__)

_COMPILERS = ("cc", "gcc", "clang")
_ALWAYS = ("-std=gnu11", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_TRIED = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
"""Flags that not every compiler knows, the most wanted first."""

_ALL_FOUND = ("-Wl,-z,defs",) if sys.platform == "linux" else ()
"""Fails where the thread runtime is none of the compiler's, so that other flags are tried."""

_FORBIDDEN = "OMNI_ADAPTER_NATIVE"
_SECONDS = 120  # a compiler that takes longer is taken for broken

Signature = tuple[Any, tuple[Any, ...]]
"""What a compiled call returns, None for nothing, and what it takes."""

_Calls = TypeVar("_Calls")

_failures: dict[Path, str] = {}
"""Why a source was not compiled."""


@cache
def compiled(source: Path) -> ctypes.CDLL | None:
    """Return the library made from a C source, None where it cannot be made."""
    try:
        return ctypes.CDLL(str(_built(source)))
    except (_NotCompiledError, OSError, subprocess.SubprocessError) as error:
        _failures[source] = str(error)
        logger.info("%s is not used, steps go on without: %s", source.name, error)
        return None


def checked(
    source: Path, make: Callable[[ctypes.CDLL], _Calls], is_right: Callable[[_Calls], bool]
) -> _Calls | None:
    """Return the calls of a C source.

    Args:
        source: what to compile.
        make: wraps its library.
        is_right: whether the calls give the right numbers on this machine.

    Returns:
        None where the source cannot be compiled, or gives wrong numbers, which is logged.
    """
    library = compiled(source)
    if library is None:
        return None
    calls = make(library)
    if not is_right(calls):
        logger.info("%s gives wrong numbers here and is not used, steps go on without", source.name)
        return None
    return calls


def declared(library: ctypes.CDLL, signatures: Mapping[str, Signature]) -> ctypes.CDLL:
    """Return a library that was told what its calls return and take."""
    for name, (result, arguments) in signatures.items():
        call = getattr(library, name)
        call.restype, call.argtypes = result, arguments
    return library


def why_not(source: Path) -> str:
    """Return why a C source cannot be used here, empty if it can."""
    return _failures[source] if compiled(source) is None else ""


def find_compiler() -> str | None:
    """Return the C compiler of this machine: what the variable ``CC`` names, or the usual ones."""
    named = os.environ.get("CC")
    found = (shutil.which(name) for name in ((named,) if named else _COMPILERS))
    return next((path for path in found if path), None)


def cache_folder() -> Path:
    """Return the folder in which libraries are kept."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "omni_adapter" / "native"


class _NotCompiledError(Exception):
    """Nothing can be compiled here, or not this."""


def _built(source: Path) -> Path:
    """The library's file, compiled if it is not there yet."""
    if os.environ.get(_FORBIDDEN) == "0":
        raise _NotCompiledError(f"{_FORBIDDEN}=0 forbids it")
    compiler = find_compiler()
    if compiler is None:
        raise _NotCompiledError(f"no C compiler here: none of {', '.join(_COMPILERS)}, nor what CC names")
    name = f"{source.stem}-{_fingerprint(source, compiler)}.so"
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / name).exists():
            return folder / name
        scratch = tempfile.mkdtemp(dir=folder)
    except (OSError, RuntimeError):  # nowhere to keep it, or no home: it is compiled each time
        folder = Path(tempfile.mkdtemp())
        scratch = tempfile.mkdtemp(dir=folder)
    try:
        made = _compile(source, compiler, Path(scratch))
        os.replace(made, folder / name)  # whole or not at all, whoever else compiles it now
        return folder / name
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fingerprint(source: Path, compiler: str) -> str:
    """Of everything that a library depends on."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, timeout=_SECONDS, check=True
    ).stdout
    parts = (
        source.read_bytes(),
        compiler.encode(),
        version,
        _processor().encode(),
        repr((_ALWAYS, _TRIED, _ALL_FOUND, torch.__version__, torch.__file__)).encode(),
    )
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _processor() -> str:
    """What tells apart processors that run different instructions; a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = ("model name", "flags", "features", "cpu part")
    return "\n".join(sorted({line for line in lines if line.lower().startswith(told)}))


def _compile(source: Path, compiler: str, folder: Path) -> Path:
    """Compile with the first flags that work."""
    unit, library, said = folder / "unit.o", folder / "library.so", ""
    for flags in _TRIED:
        runtime = _thread_runtime() if "-fopenmp" in flags else ()
        commands: tuple[Sequence[str], ...] = (
            (compiler, *_ALWAYS, *flags, "-c", str(source), "-o", str(unit)),
            (compiler, "-shared", str(unit), "-o", str(library), *runtime, "-lm", *_ALL_FOUND),
        )
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
            said = done.stderr.strip()
            if done.returncode:
                break
        else:
            return library
    raise _NotCompiledError(f"{compiler} did not compile it: {_first_error(said)}")


def _first_error(said: str) -> str:
    """The line in which a compiler tells what is wrong."""
    lines = said.splitlines() or ["it said nothing"]
    return next((line for line in lines if "error" in line.lower() or "undefined" in line), lines[0])


def _thread_runtime() -> tuple[str, ...]:
    """What links the thread runtime that torch brought along, or the compiler's own if it brought none."""
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return (str(own[0]),) if own else ("-fopenmp",)
