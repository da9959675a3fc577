"""The voices of the tiny talker's world: flite and espeak-ng, and what a room does to them.

Text and a voice go in, samples come out; the same for the same seed on every run. Knows nothing of records or
files.

    python examples/tiny_talker/voices.py        # prints the table of voices

The answers are in one voice; questions are in the voices that training hears ("seen") and in voices that only
the judgement uses ("unseen"). Neither program is part of this project; both are installed by the system's
package manager (`apt install flite espeak-ng`).
"""

import hashlib
from collections.abc import Mapping
from functools import cache
from io import BytesIO
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from omni_adapter.data.synthesis import CommandSynthesizer

Samples = npt.NDArray[np.float32]

QUESTION_RATE = 16_000
"""Sampling rate of questions, Hz."""

LICENSES: Mapping[str, str] = {
    "flite": "CMU flite license: free, BSD-like; the voices are part of the program",
    "espeak-ng": "GPL-3.0-or-later; the voices are part of the program",
}
"""As the programs' packages state them, in ``/usr/share/doc/PACKAGE/copyright``; only their sound is used."""


class Voice(NamedTuple):
    """A voice of a program.

    Attributes:
        program: ``flite`` or ``espeak-ng``.
        id: the program's name of the voice.
        sampling_rate: of what the program writes, Hz.
        sex: of the speaker, or that a formant voice imitates.
        roles: what it is used for.
        pitch_hz: flite's mean pitch of this voice; None if the voice has a fixed one, and for espeak-ng.
    """

    program: str
    id: str
    sampling_rate: int
    sex: Literal["female", "male"]
    roles: tuple[Literal["answer", "seen", "unseen"], ...]
    pitch_hz: float | None = None

    @property
    def name(self) -> str:
        """Program and voice."""
        return f"{self.program}:{self.id}"


VOICES = (
    Voice("flite", "slt", 16_000, "female", ("answer", "seen"), 168.0),
    Voice("flite", "awb", 16_000, "male", ("seen",), 129.0),
    Voice("flite", "kal16", 16_000, "male", ("seen",), 95.0),
    Voice("flite", "rms", 16_000, "male", ("unseen",)),
    Voice("espeak-ng", "en-us", 22_050, "male", ("seen",)),
    Voice("espeak-ng", "en-us+m3", 22_050, "male", ("seen",)),
    Voice("espeak-ng", "en-us+f2", 22_050, "female", ("seen",)),
    Voice("espeak-ng", "en-gb", 22_050, "male", ("seen",)),
    Voice("espeak-ng", "en-gb-x-rp+f2", 22_050, "female", ("seen",)),
    Voice("espeak-ng", "en-us+f4", 22_050, "female", ("unseen",)),
)
ANSWER = next(voice for voice in VOICES if "answer" in voice.roles)
SEEN = tuple(voice for voice in VOICES if "seen" in voice.roles)
UNSEEN = tuple(voice for voice in VOICES if "unseen" in voice.roles)

READING_SPEED, READING_MARGIN_S, READING_LEVEL_DB = 1.2, 0.05, -3.0
"""How :func:`read_out` says each word: factor of the speed, silence around it, peak below full scale."""

_ESPEAK_WORDS_PER_MINUTE = 175
_ESPEAK_PITCH, _ESPEAK_PITCH_STEPS = 50, 100.0  # its middle pitch; steps from there to twice the frequency


def speak(text: str, voice: Voice, *, speed: float = 1.0, pitch: float = 1.0) -> tuple[Samples, int]:
    """Speak ``text``.

    Args:
        text: what to say.
        voice: an entry of ``VOICES``.
        speed: factor of the voice's own; 2 is twice as fast.
        pitch: factor of the voice's own frequency; without effect where flite's voice has a fixed one.

    Returns:
        float32 samples [N], and their rate in Hz.

    Raises:
        RowError: if the program failed.
        DataError: if the program is not installed.
    """
    spoken = CommandSynthesizer(_command(voice, speed=speed, pitch=pitch), voice=voice.id).speak(text)
    assert isinstance(spoken.audio, bytes)
    samples, rate = soundfile.read(BytesIO(spoken.audio), dtype="float32")
    return samples, rate


def read_out(text: str, voice: Voice, *, sampling_rate: int, multiple: int) -> Samples:
    """Read ``text`` out word by word, as talking clocks do: a word sounds alike wherever it stands.

    Args:
        text: words, with single spaces between them.
        voice: an entry of ``VOICES``.
        sampling_rate: of the result, Hz.
        multiple: each word takes a multiple of so many samples; silence fills it up.

    Returns:
        float32 samples [N].
    """
    spoken = [_word_alone(word, voice, sampling_rate) for word in text.split()]
    return np.concatenate([np.pad(samples, (0, -len(samples) % multiple)) for samples in spoken])


@cache
def _word_alone(word: str, voice: Voice, sampling_rate: int) -> Samples:
    spoken, rate = speak(word, voice, speed=READING_SPEED)
    samples = trim(resample(spoken, rate, sampling_rate), sampling_rate, margin_s=READING_MARGIN_S)
    return at_level(samples, READING_LEVEL_DB)


def _command(voice: Voice, *, speed: float, pitch: float) -> tuple[str, ...]:
    if voice.program == "espeak-ng":
        steps = min(99, max(0, round(_ESPEAK_PITCH + _ESPEAK_PITCH_STEPS * (pitch - 1))))
        pace = round(_ESPEAK_WORDS_PER_MINUTE * speed)
        options = ("-v", "{voice}", "-s", str(pace), "-p", str(steps), "-f", "{text}", "-w", "{wav}")
    else:
        tone = (
            () if voice.pitch_hz is None else ("--setf", f"int_f0_target_mean={voice.pitch_hz * pitch:.1f}")
        )
        stretch = ("--setf", f"duration_stretch={1 / speed:.4f}")
        options = ("-voice", "{voice}", *stretch, *tone, "-f", "{text}", "-o", "{wav}")
    return (voice.program, *options)


def resample(samples: Samples, rate: int, new_rate: int) -> Samples:
    """Return samples [N] at another rate."""
    if rate == new_rate:
        return samples
    return np.asarray(soxr.resample(samples, rate, new_rate), dtype=np.float32)


def trim(samples: Samples, rate: int, *, margin_s: float, floor: float = 0.01) -> Samples:
    """Cut silence at both ends down to a margin.

    Args:
        samples: float32, [N].
        rate: Hz.
        margin_s: silence that stays; where there is less, zeros are added.
        floor: what is silent, as a share of the peak.
    """
    loud = np.flatnonzero(np.abs(samples) > floor * np.abs(samples).max(initial=0.0))
    if not len(loud):
        return samples[:0]
    margin = round(margin_s * rate)
    start, end = int(loud[0]) - margin, int(loud[-1]) + 1 + margin
    inner = samples[max(0, start) : end]
    return np.pad(inner, (max(0, -start), max(0, end - len(samples)))).astype(np.float32)


def at_level(samples: Samples, level_db: float) -> Samples:
    """Scale samples [N] to a peak of ``level_db`` dB below (negative) full scale."""
    peak = float(np.abs(samples).max(initial=0.0))
    return (samples * (10 ** (level_db / 20) / peak)).astype(np.float32) if peak else samples


def generator(*key: object) -> np.random.Generator:
    """Return a generator of random numbers that depend on ``key`` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def noise(length: int, rng: np.random.Generator, *, color: Literal["white", "pink"]) -> Samples:
    """Return noise [length] of unit power; pink noise has equal power in each octave."""
    white = rng.standard_normal(length)
    if color == "pink" and length > 1:
        spectrum = np.fft.rfft(white)
        spectrum /= np.sqrt(np.maximum(1, np.arange(len(spectrum))))
        white = np.fft.irfft(spectrum, length)
    return np.asarray(white / np.sqrt(np.mean(white**2)), dtype=np.float32)


class Manner(NamedTuple):
    """How one question is spoken, and where.

    Attributes:
        voice: who speaks.
        speed: factor.
        pitch: factor.
        noise: colour of the noise.
        snr_db: power of speech over power of noise.
        level_db: peak below full scale.
        before_s: silence before the first sound.
        after_s: silence after the last sound.
    """

    voice: Voice
    speed: float
    pitch: float
    noise: Literal["white", "pink"]
    snr_db: float
    level_db: float
    before_s: float
    after_s: float


def draw_manner(voice: Voice, rng: np.random.Generator) -> Manner:
    """Draw how a voice speaks."""
    return Manner(
        voice=voice,
        speed=float(rng.uniform(0.85, 1.2)),
        pitch=float(rng.uniform(0.85, 1.2)),
        noise="pink" if rng.random() < 0.5 else "white",
        snr_db=float(rng.uniform(15, 40)),
        level_db=float(rng.uniform(-30, -3)),
        before_s=float(rng.uniform(0.05, 0.3)),
        after_s=float(rng.uniform(0.05, 0.3)),
    )


def ask(text: str, manner: Manner, rng: np.random.Generator) -> Samples:
    """Return a question [N] as a microphone at ``QUESTION_RATE`` hears it: with noise, at some level."""
    spoken, rate = speak(text, manner.voice, speed=manner.speed, pitch=manner.pitch)
    speech = trim(resample(spoken, rate, QUESTION_RATE), QUESTION_RATE, margin_s=0.0)
    power = float(np.mean(speech**2))
    before, after = (round(seconds * QUESTION_RATE) for seconds in (manner.before_s, manner.after_s))
    heard = np.pad(speech, (before, after))
    scale = np.sqrt(power / 10 ** (manner.snr_db / 10))
    return at_level(heard + scale * noise(len(heard), rng, color=manner.noise), manner.level_db)


@cache
def voice_named(name: str) -> Voice:
    """Return the voice with a name such as ``flite:slt``."""
    return next(voice for voice in VOICES if voice.name == name)


def main() -> None:
    """Print the table of voices."""
    print(f"{'voice':<26}{'rate (Hz)':>10}  {'sex':<8}{'roles':<14}license")
    for voice in VOICES:
        roles = ", ".join(voice.roles)
        print(
            f"{voice.name:<26}{voice.sampling_rate:>10}  {voice.sex:<8}{roles:<14}{LICENSES[voice.program]}"
        )


if __name__ == "__main__":
    main()
