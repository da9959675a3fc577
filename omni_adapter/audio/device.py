"""Microphone and loudspeaker, through the optional package sounddevice.

Sound in, waveform [N] out, and back. Knows nothing of models or codecs.
"""

import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from omni_adapter.errors import AudioError, MissingDependencyError

_BLOCK_S = 0.03
_NOISE_S = 0.3  # of the recording's start; taken for the room's own noise
_PATIENCE_S = 0.5  # without a block; then it is asked whether the microphone is still there
_PAUSE_S = 1.0  # of quiet after speech; ends a recording
_SPEECH_OVER_NOISE = 3.0  # times the room's noise
_LEAST_SPEECH_RMS = 0.005


class Loudspeaker:
    """Plays chunks in the background while later ones are being made.

    Args:
        sampling_rate: samples a second, Hz.

    Raises:
        MissingDependencyError: if sounddevice is not installed.
        AudioError: if there is no loudspeaker.
    """

    def __init__(self, *, sampling_rate: int) -> None:
        sounddevice = _sounddevice("playing sound")
        with _device_errors("loudspeaker"):
            self._stream = sounddevice.OutputStream(samplerate=sampling_rate, channels=1, dtype="float32")
            self._stream.start()
        self._chunks: queue.SimpleQueue[NDArray[np.float32] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._play, name="loudspeaker", daemon=True)
        self._thread.start()

    def play(self, samples: NDArray[np.float32]) -> None:
        """Play ``samples`` [n] after those given before; returns at once."""
        self._chunks.put(samples)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until everything has been played; after an error or Ctrl-C, be silent at once."""
        if error is None:
            self._chunks.put(None)
            self._thread.join()
            self._stream.stop()
        else:
            self._stream.abort()
        self._stream.close()

    def _play(self) -> None:
        while (samples := self._chunks.get()) is not None:
            self._stream.write(np.ascontiguousarray(samples, dtype=np.float32)[:, None])


def record_until_pause(
    *, sampling_rate: int, max_seconds: float, on_ready: Callable[[], None] = lambda: None
) -> Iterator[NDArray[np.float32]]:
    """Record from the microphone until the speaker pauses or presses Enter.

    Sound goes on being recorded while the caller works on what came before.

    Args:
        sampling_rate: samples a second, Hz.
        max_seconds: longest recording.
        on_ready: called when the microphone is open.

    Yields:
        Blocks of samples as they are spoken, float32 [n] in -1..1.

    Raises:
        MissingDependencyError: if sounddevice is not installed.
        AudioError: if there is no microphone, or it is taken away.
    """
    sounddevice = _sounddevice("listening")
    recorded: queue.SimpleQueue[NDArray[np.float32]] = queue.SimpleQueue()

    def keep(block: NDArray[np.float32], *_: object) -> None:
        recorded.put(block[:, 0].copy())

    with _device_errors("microphone"):
        stream = sounddevice.InputStream(
            samplerate=sampling_rate,
            channels=1,
            dtype="float32",
            blocksize=round(_BLOCK_S * sampling_rate),
            callback=keep,
        )
    with stream:
        on_ready()
        blocks = _blocks(recorded, stream, stop=_enter_pressed())
        yield from until_pause(blocks, max_blocks=round(max_seconds / _BLOCK_S))


def until_pause(blocks: Iterator[NDArray[np.float32]], *, max_blocks: int) -> Iterator[NDArray[np.float32]]:
    """Pass blocks of sound on until speech has been followed by a pause.

    The first blocks tell how loud the room is; speech is what is clearly louder.
    """
    noise: list[float] = []
    has_spoken, quiet_blocks = False, 0
    for index, block in enumerate(blocks):
        yield block
        level = float(np.sqrt(np.mean(np.square(block, dtype=np.float64))))
        if len(noise) * _BLOCK_S < _NOISE_S:
            noise.append(level)
        is_speech = level > max(_LEAST_SPEECH_RMS, _SPEECH_OVER_NOISE * float(np.median(noise)))
        has_spoken = has_spoken or is_speech
        quiet_blocks = 0 if is_speech else quiet_blocks + 1
        if (has_spoken and quiet_blocks * _BLOCK_S >= _PAUSE_S) or index + 1 >= max_blocks:
            return


def _blocks(
    recorded: "queue.SimpleQueue[NDArray[np.float32]]", stream: Any, *, stop: threading.Event
) -> Iterator[NDArray[np.float32]]:
    """Blocks [n] of the microphone until ``stop`` is set."""
    while not stop.is_set():
        try:
            yield recorded.get(timeout=_PATIENCE_S)
        except queue.Empty:
            if not stream.active:
                raise AudioError(
                    "the microphone gives no sound any more; is it still connected?", reason="no_device"
                ) from None


def _enter_pressed() -> threading.Event:
    """An event that is set when a line comes from the keyboard; never, where there is no keyboard."""
    pressed = threading.Event()

    def wait() -> None:
        if sys.stdin.readline():
            pressed.set()

    if sys.stdin is not None and sys.stdin.isatty():
        threading.Thread(target=wait, name="keyboard", daemon=True).start()
    return pressed


def _sounddevice(purpose: str) -> Any:
    try:
        import sounddevice
    except ImportError as error:
        raise MissingDependencyError("sounddevice", extra="mic", purpose=purpose) from error
    except OSError as error:  # the package is there, the system's PortAudio is not
        raise AudioError(
            f"{purpose} needs the PortAudio library of the system ({error}); "
            "on Debian and Ubuntu run: apt-get install libportaudio2",
            reason="no_device",
        ) from error
    return sounddevice


@contextmanager
def _device_errors(device: str) -> Iterator[None]:
    """Turn PortAudio's errors into one that says what is missing."""
    sounddevice = _sounddevice(f"the {device}")
    try:
        yield
    except (sounddevice.PortAudioError, ValueError) as error:
        raise AudioError(
            f"no {device} can be opened: {error}; connect one, or use files instead", reason="no_device"
        ) from error
