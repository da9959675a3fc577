"""Judge speech by an independent ear: pocketsphinx with its stock English acoustic model and a word list.

Samples and a vocabulary in, words out, and word errors against what should have been said. Knows nothing of
talkers or questions. Every word of the vocabulary is as likely as any other at every place: there is no
grammar, and nothing tells which answer is expected.

    python examples/tiny_talker/judge.py reply.wav      # write down a recording with the world's words
    python examples/tiny_talker/judge.py --tune         # errors on the answer voice under other settings

``DECODING`` was chosen once, on answers of training that the answer voice (flite slt) spoke as whole
sentences, and is the same for whatever is judged; ``--tune`` compares settings on that voice as it reads now,
word by word.
"""

import argparse
import math
import multiprocessing
import random
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jiwer
import numpy as np
import pocketsphinx
import soxr
from numpy.typing import NDArray

SAMPLING_RATE = 16_000
"""What the acoustic model hears, Hz."""

DECODING: Mapping[str, Any] = {
    "lw": 6.5,
    "fwdflatlw": 8.5,
    "bestpathlw": 9.5,
    "wip": 0.65,
    "warp_type": "inverse_linear",
    "warp_params": "1.25",
    "frate": 110,
}
"""Settings of pocketsphinx. The first four are its defaults: with equally likely words the language weights
of its three passes act as the price of a word, and other prices were no better. The warp of the frequencies
and the rate of the frames fit the stock model, of lower and slower voices, to the answer voice: they took its
word error rate from 15.8 % to 10.6 % (120 answers of training, as many of each kind)."""

SILENCE_S = 0.25
"""Silence put before and after what is heard, in which the decoder settles, seconds."""

_RESAMPLES = 2000
_CONFIDENCE = 0.95


class Clip(NamedTuple):
    """A recording: float samples [N] in -1..1 and their rate, Hz."""

    samples: NDArray[np.float32]
    sampling_rate: int


class Interval(NamedTuple):
    """A share with the interval that holds it with 95 % confidence."""

    value: float
    low: float
    high: float


class WordErrors(NamedTuple):
    """Errors of each utterance: substitutions, deletions and insertions; and the words that were expected."""

    errors: tuple[int, ...]
    words: tuple[int, ...]

    @property
    def rate(self) -> float:
        """Word error rate: all errors over all words that were expected."""
        return sum(self.errors) / max(1, sum(self.words))

    def interval(self) -> Interval:
        """Return the rate with its interval, by drawing utterances anew."""
        rates = _drawn_rates(self)
        return Interval(self.rate, *np.quantile(rates, _TAILS).tolist())

    def above(self, other: "WordErrors") -> Interval:
        """Return by how much the rate lies above another one of the same utterances, in the same order."""
        if len(self.errors) != len(other.errors):
            raise ValueError(f"{len(self.errors)} utterances cannot be compared to {len(other.errors)}")
        differences = _drawn_rates(self) - _drawn_rates(other)
        return Interval(self.rate - other.rate, *np.quantile(differences, _TAILS).tolist())


_TAILS = ((1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2)


def _drawn_rates(errors: WordErrors) -> NDArray[np.float64]:
    """Error rates of utterances drawn with replacement; the same draws for the same number of utterances."""
    count = len(errors.errors)
    drawn = np.random.default_rng(0).integers(count, size=(_RESAMPLES, count))
    wrong, words = (np.asarray(values)[drawn].sum(axis=1) for values in errors)
    rates: NDArray[np.float64] = wrong / np.maximum(1, words)
    return rates


def count_word_errors(expected: Sequence[str], heard: Sequence[str]) -> WordErrors:
    """Count the word errors of each utterance.

    Args:
        expected: what should have been said; may be empty, then every word heard is an error.
        heard: what was understood.
    """
    errors, words = [], []
    for reference, transcript in zip(expected, heard, strict=True):
        words.append(len(reference.split()))
        if not reference.split():
            errors.append(len(transcript.split()))
            continue
        found = jiwer.process_words(reference, transcript)
        errors.append(found.substitutions + found.deletions + found.insertions)
    return WordErrors(tuple(errors), tuple(words))


def word_error_rate(expected: Sequence[str], heard: Sequence[str]) -> float:
    """Return all word errors over all words that were expected."""
    return count_word_errors(expected, heard).rate


def share(right: Iterable[bool]) -> Interval:
    """Return the share of right ones with its interval (Wilson 1927)."""
    outcomes = list(right)
    count, value = len(outcomes), sum(outcomes) / max(1, len(outcomes))
    if not count:
        return Interval(0.0, 0.0, 1.0)
    z = 1.959964  # the normal distribution holds 95 % within so many standard deviations
    middle = (value + z * z / (2 * count)) / (1 + z * z / count)
    reach = z * math.sqrt(value * (1 - value) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return Interval(value, max(0.0, min(value, middle - reach)), min(1.0, max(value, middle + reach)))


class Recogniser:
    """Writes down what it hears, in the words of a vocabulary.

    Args:
        words: the whole vocabulary, in lower case.
        **decoding: settings of pocketsphinx in place of ``DECODING``'s.

    Raises:
        ValueError: if the stock dictionary has no pronunciation of a word, or there are no words.
    """

    def __init__(self, words: Iterable[str], **decoding: Any) -> None:
        self.words = tuple(sorted(set(words)))
        if not self.words:
            raise ValueError("no words; pass the vocabulary that may be heard")
        with tempfile.TemporaryDirectory() as folder:
            dictionary, loop = Path(folder) / "words.dict", Path(folder) / "loop.lm"
            dictionary.write_text(_dictionary(self.words), encoding="utf-8")
            loop.write_text(_word_loop(self.words), encoding="utf-8")
            settings = {**DECODING, **decoding}
            config = pocketsphinx.Config(
                hmm=str(_model_folder() / "en-us"),
                dict=str(dictionary),
                lm=str(loop),
                logfn="/dev/null",
                **settings,
            )
            self._decoder = pocketsphinx.Decoder(config)

    def transcribe(self, samples: NDArray[np.float32], sampling_rate: int) -> str:
        """Return the words heard in samples [N]; nothing for silence."""
        return self.transcribe_pcm(to_pcm(Clip(samples, sampling_rate)))

    def transcribe_pcm(self, pcm: bytes) -> str:
        """Return the words heard in 16-bit samples at ``SAMPLING_RATE``; nothing for silence."""
        if not any(pcm):
            return ""
        self._decoder.start_utt()
        self._decoder.process_raw(pcm, full_utt=True)
        self._decoder.end_utt()
        best = self._decoder.hyp()
        return best.hypstr if best is not None else ""


def to_pcm(clip: Clip) -> bytes:
    """Return a clip as the recogniser hears it: 16-bit samples at ``SAMPLING_RATE``, silence around them."""
    samples = np.nan_to_num(np.asarray(clip.samples, dtype=np.float32))
    if len(samples) and clip.sampling_rate != SAMPLING_RATE:
        samples = soxr.resample(samples, clip.sampling_rate, SAMPLING_RATE)
    padded = np.pad(samples, round(SILENCE_S * SAMPLING_RATE))
    pcm: bytes = (padded.clip(-1, 1) * np.iinfo(np.int16).max).astype("<i2").tobytes()
    return pcm


def transcribe_many(words: Sequence[str], clips: Iterable[Clip], *, jobs: int = 1) -> list[str]:
    """Write down many clips, in ``jobs`` processes where the system can fork."""
    heard = [to_pcm(clip) for clip in clips]
    if jobs < 2 or "fork" not in multiprocessing.get_all_start_methods():
        recogniser = Recogniser(words)
        return [recogniser.transcribe_pcm(pcm) for pcm in heard]
    _dictionary(tuple(words))  # complain here about words, not in a process
    with ProcessPoolExecutor(
        jobs, multiprocessing.get_context("fork"), initializer=_start_process, initargs=(tuple(words),)
    ) as pool:
        return list(pool.map(_transcribe_here, heard, chunksize=4))


_here: list[Recogniser] = []  # the recogniser of a process of the pool


def _start_process(words: tuple[str, ...]) -> None:
    _here.append(Recogniser(words))


def _transcribe_here(pcm: bytes) -> str:
    return _here[0].transcribe_pcm(pcm)


def _model_folder() -> Path:
    return Path(pocketsphinx.get_model_path()) / "en-us"


@cache
def _pronunciations() -> Mapping[str, tuple[str, ...]]:
    """The stock dictionary: words -> their pronunciations."""
    found: dict[str, list[str]] = {}
    path = _model_folder() / "cmudict-en-us.dict"
    for line in path.read_text(encoding="utf-8").splitlines():
        word, _, phones = line.partition(" ")
        found.setdefault(word.partition("(")[0], []).append(phones.strip())
    return {word: tuple(entries) for word, entries in found.items()}


def _dictionary(words: Sequence[str]) -> str:
    """Entries of the stock dictionary for the words; letters are spoken as their names."""
    known = _pronunciations()
    missing = [word for word in words if word not in known]
    if missing:
        raise ValueError(
            f"pocketsphinx has no pronunciation of {', '.join(missing)}; "
            "take other words, or add their pronunciations to its dictionary"
        )
    lines = [
        f"{word}({number + 1}) {phones}" if number else f"{word} {phones}"
        for word in words
        for number, phones in enumerate(known[word])
    ]
    return "\n".join(lines) + "\n"


def _word_loop(words: Sequence[str]) -> str:
    """A language model (ARPA) in which every word, and the end, are equally likely at every place."""
    chance = f"{-math.log10(len(words) + 1):.6f}"
    entries = ["-99 <s>", f"{chance} </s>", *(f"{chance} {word}" for word in words)]
    return "\n".join(["\\data\\", f"ngram 1={len(entries)}", "", "\\1-grams:", *entries, "", "\\end\\", ""])


def tune(count: int) -> None:
    """Print the word error rate on ``count`` answers of training in the answer voice, setting by setting."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import voices
    import world

    by_kind: dict[str, set[str]] = {}
    for record in world.records("train"):
        by_kind.setdefault(record.kind, set()).add(record.answer)
    rng = random.Random(world.SEED)
    shuffled = [rng.sample(sorted(answers), len(answers)) for _, answers in sorted(by_kind.items())]
    texts = [answers[i] for i in range(max(map(len, shuffled))) for answers in shuffled if i < len(answers)]
    texts = texts[:count]
    rate = voices.ANSWER.sampling_rate
    read = (voices.read_out(text, voices.ANSWER, sampling_rate=rate, multiple=1) for text in texts)
    heard = [to_pcm(Clip(samples, rate)) for samples in read]
    for changes in TRIED:
        recogniser = Recogniser(world.vocabulary(), **changes)
        errors = count_word_errors(texts, [recogniser.transcribe_pcm(pcm) for pcm in heard])
        print(f"{errors.rate:7.2%}  {dict(changes)}", flush=True)


def _prices(price: float) -> dict[str, float]:
    return {"lw": price, "fwdflatlw": price, "bestpathlw": price}


TRIED: tuple[Mapping[str, Any], ...] = (
    {},
    *({"warp_params": warp} for warp in ("1.0", "1.12", "1.18", "1.32")),
    *({"frate": rate} for rate in (100, 120)),
    *(_prices(price) for price in (5.0, 7.0, 10.0, 12.0)),
    *({"wip": price} for price in (0.01, 10.0)),
)
"""Changes to ``DECODING`` that ``--tune`` compares."""


def main() -> None:
    """Read the command line; write down recordings, or compare settings."""
    parser = argparse.ArgumentParser(description="Write down recordings with the words of the tiny world.")
    parser.add_argument("recordings", nargs="*", type=Path, help="wav or flac files")
    parser.add_argument("--tune", action="store_true", help="compare settings on the answer voice")
    parser.add_argument("--count", type=int, default=120, help="answers to compare them on")
    arguments = parser.parse_args()
    if arguments.tune:
        tune(arguments.count)
        return
    import soundfile

    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import world

    recogniser = Recogniser(world.vocabulary())
    for path in arguments.recordings:
        samples, sampling_rate = soundfile.read(path, dtype="float32", always_2d=True)
        print(f"{path}: {recogniser.transcribe(samples.mean(axis=1), sampling_rate)}")


if __name__ == "__main__":
    main()
