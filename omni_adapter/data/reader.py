"""Decode recordings of strangers in a process of its own, so that a hostile file costs one file.

Recording in, waveform [N] out, or an AudioError. The process has a limit on memory and on time for each file;
when it dies, a new one takes over. Knows nothing of rows or codes.
"""

import logging
import multiprocessing
import resource
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from omni_adapter.audio.waveform import AudioSource, read_waveform
from omni_adapter.errors import AudioError

logger = logging.getLogger(__name__)

DEFAULT_MEMORY_BYTES = 1 << 30
DEFAULT_TIMEOUT_S = 60.0


class Reader:
    """Reads recordings, one at a time. A context manager: the process ends with it.

    Args:
        max_seconds: longest recording that is read.
        memory_bytes: memory that decoding may take on top of what the program itself has.
        timeout_s: time that one file may take.
    """

    def __init__(
        self,
        *,
        max_seconds: float,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self._limits = (max_seconds, memory_bytes, timeout_s)
        self._process: Any = None
        self._connection: Connection | None = None

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def read(self, source: AudioSource, *, sampling_rate: int) -> Tensor:
        """Return the waveform [N] of a recording, as ``read_waveform`` does.

        Raises:
            AudioError: as ``read_waveform``; with reason ``decoder_crash`` or ``decoder_timeout`` if the
                process died or had to be ended.
        """
        connection = self._start()
        try:
            connection.send((source, sampling_rate))
            if not connection.poll(self._limits[2]):
                self.close()
                raise AudioError(
                    f"decoding took more than {self._limits[2]:g} s and was stopped", reason="decoder_timeout"
                )
            answer = connection.recv()
        except (EOFError, ConnectionError) as error:
            self.close()
            raise AudioError(
                "the process that decodes died of this file, or ran out of the memory it may use",
                reason="decoder_crash",
            ) from error
        if isinstance(answer, tuple):
            message, reason = answer
            raise AudioError(message, reason=reason)
        return torch.from_numpy(answer)

    def _start(self) -> Connection:
        if self._connection is None:
            context = multiprocessing.get_context("fork")
            self._connection, other = context.Pipe()
            self._process = context.Process(
                target=_serve, args=(other, self._connection, *self._limits), daemon=True
            )
            self._process.start()
            other.close()
        return self._connection


def _serve(
    connection: Connection, other: Connection, max_seconds: float, memory: int, timeout_s: float
) -> None:
    """Read what is asked for until the other side is gone."""
    other.close()  # else the end of the program would not be seen here
    torch.set_num_threads(1)
    with open("/proc/self/statm", encoding="ascii") as sizes:
        used = int(sizes.read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, hard))
    while True:
        try:
            source, sampling_rate = connection.recv()
        except EOFError:
            return
        spent = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(spent.ru_utime + spent.ru_stime + timeout_s) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        try:
            answer: Any = read_waveform(source, sampling_rate=sampling_rate, max_seconds=max_seconds).numpy()
        except AudioError as error:
            answer = (str(error), error.reason)
        except MemoryError:
            answer = ("the recording takes more memory than decoding may use", "too_large")
        connection.send(answer)
