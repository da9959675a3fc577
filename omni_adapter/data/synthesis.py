"""Speak texts that have no recording: a command of the system, or a text-to-speech pipeline of transformers.

Text in, samples and their rate out. Another voice is one class with ``name`` and ``speak``. Knows nothing of
rows or codes.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from omni_adapter.audio.waveform import Samples
from omni_adapter.errors import DataError, RowError


class Speech(NamedTuple):
    """Spoken text: float32 samples [N] or a wav file's bytes, and the rate of samples."""

    audio: Samples | bytes
    sampling_rate: int | None


class Synthesizer(Protocol):
    """A voice."""

    @property
    def name(self) -> str:
        """What made the speech; two voices that sound different have different names."""

    def speak(self, text: str, *, speaker: str | None = None, language: str | None = None) -> Speech:
        """Return ``text`` as speech; a RowError with reason ``not_spoken`` if that fails."""


class _Program(NamedTuple):
    arguments: tuple[str, ...]
    voice: str


PROGRAMS: Mapping[str, _Program] = {
    "espeak-ng": _Program(("espeak-ng", "-v", "{voice}", "-f", "{text}", "-w", "{wav}"), "en-us"),
    "flite": _Program(("flite", "-voice", "{voice}", "-f", "{text}", "-o", "{wav}"), "slt"),
}
"""Commands that read a text file and write a wav file."""

DEFAULT_TIMEOUT_S = 120.0


class CommandSynthesizer:
    """A program that reads a text file and writes a wav file.

    Args:
        arguments: program and arguments, with ``{text}``, ``{wav}`` and ``{voice}`` where the two files and
            the voice belong. No shell is involved.
        voice: voice of rows that name no speaker.
        use_speakers: whether a row's speaker is a voice of the program; else all rows get the same.
        timeout_s: time that one text may take.

    Raises:
        DataError: if the program is not installed.
    """

    def __init__(
        self,
        arguments: tuple[str, ...],
        *,
        voice: str = "",
        use_speakers: bool = False,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        if shutil.which(arguments[0]) is None:
            raise DataError(f"{arguments[0]} is not installed; install it, or name another synthesizer")
        self._arguments, self._voice, self._timeout_s = arguments, voice, timeout_s
        self._use_speakers = use_speakers

    @property
    def name(self) -> str:
        """Program and voice."""
        return f"{self._arguments[0]}:{self._voice}"

    def speak(self, text: str, *, speaker: str | None = None, language: str | None = None) -> Speech:
        """Return ``text`` as speech."""
        voice = (speaker if self._use_speakers else None) or self._voice
        with tempfile.TemporaryDirectory() as folder:
            written, wav = Path(folder) / "text.txt", Path(folder) / "speech.wav"
            written.write_text(text, encoding="utf-8")
            names = {"{text}": str(written), "{wav}": str(wav), "{voice}": voice}
            arguments = [names.get(argument, argument) for argument in self._arguments]
            try:
                run = subprocess.run(
                    arguments,
                    capture_output=True,
                    timeout=self._timeout_s,
                    stdin=subprocess.DEVNULL,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise RowError(
                    f"{self.name} took more than {self._timeout_s:g} s for {text!r:.80}", reason="not_spoken"
                ) from error
            if run.returncode or not wav.is_file():
                said = run.stderr.decode(errors="replace").strip()[:200]
                raise RowError(f"{self.name} could not speak {text!r:.80}: {said}", reason="not_spoken")
            return Speech(wav.read_bytes(), None)


class PipelineSynthesizer:
    """A text-to-speech pipeline of transformers.

    Args:
        pipeline: what ``transformers.pipeline("text-to-speech", …)`` returns.
        name: id of its model.
        arguments: handed on at each call, such as ``forward_params`` with a speaker's embedding.
    """

    def __init__(self, pipeline: Any, *, name: str, arguments: Mapping[str, Any] | None = None) -> None:
        self._pipeline, self._name, self._arguments = pipeline, name, dict(arguments or {})

    @property
    def name(self) -> str:
        """Id of the model."""
        return self._name

    def speak(self, text: str, *, speaker: str | None = None, language: str | None = None) -> Speech:
        """Return ``text`` as speech."""
        try:
            made = self._pipeline(text, **self._arguments)
        except (
            ValueError,
            RuntimeError,
            IndexError,
        ) as error:  # what models raise for texts they cannot read
            raise RowError(
                f"{self.name} could not speak {text!r:.80}: {error}", reason="not_spoken"
            ) from error
        return Speech(np.asarray(made["audio"], dtype=np.float32).reshape(-1), int(made["sampling_rate"]))


def make_synthesizer(description: str, *, device: Any = None, use_speakers: bool = False) -> Synthesizer:
    """Make the voice that ``description`` names.

    Args:
        description: ``espeak-ng``, ``flite``, either with a voice as in ``flite:awb``; or ``transformers:``
            and the id of a text-to-speech model.
        device: where a model runs.
        use_speakers: take a row's speaker as the voice of a program.

    Raises:
        DataError: if the name is unknown or the program is not installed.
    """
    kind, _, rest = description.partition(":")
    if kind in PROGRAMS:
        program = PROGRAMS[kind]
        return CommandSynthesizer(program.arguments, voice=rest or program.voice, use_speakers=use_speakers)
    if kind == "transformers" and rest:
        from transformers import pipeline

        return PipelineSynthesizer(pipeline("text-to-audio", model=rest, device=device), name=rest)
    known = ", ".join(f"{name}[:voice]" for name in PROGRAMS)
    raise DataError(f"no synthesizer is called {description!r}; use {known} or transformers:MODEL")
