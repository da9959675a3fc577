"""Write the tiny talker's world to a folder: its texts, spoken questions, spoken answers and the rows of all.

    python examples/tiny_talker/build_world.py --out build/tiny/world [--renditions 2] [--jobs 2]

======================== ===============================================================================
OUT/train.jsonl          records of ``world.py``, as text; ``heldout.jsonl`` likewise
OUT/voice/*.wav          the answer voice, reading out sentences of training: for the codec
OUT/answers/*.wav        each distinct answer, read out by the answer voice, 24 kHz
OUT/speech/*/*.wav       questions, 16 kHz: each of training ``renditions`` times, in different seen voices;
                         each held-out one by a seen and by an unseen voice
OUT/rows_train.jsonl     what the encoder learns from; ``rows_taught.jsonl``, with more recordings of some
                         kinds, what the talker learns from; ``rows_heldout_seen.jsonl`` and
                         ``rows_heldout_unseen.jsonl`` for the judgement
======================== ===============================================================================

Stopped, the same command goes on where it was: files that exist are kept, and each is the same in every
run. ``rows_train.jsonl`` is written last. Only the last question of a record is spoken; its earlier turns
stay text.
"""

import argparse
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import soundfile
import voices
import world

from omni_adapter.config import SNAC_24KHZ

ANSWER_RATE = SNAC_24KHZ.sampling_rate
"""Sampling rate of answers, the codec's, Hz."""

ANSWER_MULTIPLE = SNAC_24KHZ.samples_per_frame
"""Each word of an answer takes whole frames of codes."""

VOICE_SENTENCES = 2000
"""Sentences for the codec."""

RENDITIONS = 2
"""Recordings of each question of training."""

MORE_RENDITIONS: Mapping[str, int] = {
    "day": 10, "month": 8, "counting": 8, "plus": 5, "spelling": 5, "minus": 3, "two turns sum": 3, "work": 3,
}  # fmt: skip
"""The same for kinds whose words are told apart by little, or that are rare."""

WRITTEN = 14_000
"""Texts that the talker goes on reading while it learns to answer aloud."""

TIMES_ALONE = 2
"""How often each voice says each word by itself."""

CHUNK = 16
"""Recordings that a process takes at a time."""


class Clip(NamedTuple):
    """A recording to make.

    Attributes:
        path: where it goes.
        text: what is said.
        key: decides all that is random about it; None for the clean answer voice.
        voice: who speaks.
    """

    path: Path
    text: str
    key: tuple[object, ...] | None = None
    voice: voices.Voice = voices.ANSWER


def make_clip(clip: Clip) -> tuple[float, bool]:
    """Write a recording unless it exists; return its seconds and whether it was made."""
    if clip.path.exists():
        return soundfile.info(clip.path).duration, False
    if clip.key is None:
        rate = ANSWER_RATE
        samples = voices.read_out(clip.text, clip.voice, sampling_rate=rate, multiple=ANSWER_MULTIPLE)
    else:
        rng = voices.generator(world.SEED, *clip.key)
        samples, rate = voices.ask(clip.text, voices.draw_manner(clip.voice, rng), rng), voices.QUESTION_RATE
    _replace(clip.path, lambda path: soundfile.write(path, samples, rate, format="WAV", subtype="PCM_16"))
    return len(samples) / rate, True


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    write(partial)
    os.replace(partial, path)


def write_rows(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write JSON lines."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    _replace(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def answer_path(text: str) -> str:
    """Where an answer's recording is, relative to the world's folder."""
    return f"answers/{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.wav"


def codec_clips(out: Path, count: int = VOICE_SENTENCES) -> list[Clip]:
    """Recordings for the codec."""
    return [Clip(out / f"voice/{i:05d}.wav", text) for i, text in enumerate(world.sentences()[:count])]


def answer_clips(out: Path) -> list[Clip]:
    """Recordings of the answers, the same text once."""
    texts = dict.fromkeys(record.answer for split in world.SPLITS for record in world.records(split))
    return [Clip(out / answer_path(text), text) for text in texts]


def question_voice(record: world.Record, rendition: int, *, unseen: bool = False) -> voices.Voice:
    """Return who asks a question; its renditions are in different voices while there are enough."""
    choice = voices.UNSEEN if unseen else voices.SEEN
    order = voices.generator(world.SEED, "voice", record.id, unseen).permutation(len(choice)).tolist()
    return choice[int(order[rendition % len(choice)])]


def question_rows(
    out: Path,
    split: world.Split,
    rendition: int,
    *,
    unseen: bool = False,
    kinds: Collection[str] | None = None,
) -> Iterator[tuple[dict[str, object], Clip]]:
    """Yield the rows of a split, or of some kinds in it, with the recording of each question."""
    name = f"train{rendition}" if split == "train" else f"heldout_{'unseen' if unseen else 'seen'}"
    for record in world.records(split):
        if kinds is not None and record.kind not in kinds:
            continue
        voice = question_voice(record, rendition, unseen=unseen)
        audio_in = f"speech/{name}/{record.id}.wav"
        row: dict[str, object] = {
            "id": f"{record.id}-{rendition}" if split == "train" else record.id,
            "kind": record.kind,
            "pair": record.pair,
            "voice": voice.name,
            "audio_in": audio_in,
            "text_in": record.question,
            "audio_out": answer_path(record.answer),
            "text_out": record.answer,
            "turns": [turn._asdict() for turn in record.turns],
        }
        yield row, Clip(out / audio_in, record.question, (name, record.id), voice)


def dictation_rows(out: Path) -> Iterator[tuple[dict[str, object], Clip]]:
    """Yield rows of word lists, and of words alone, spoken by the voices of training in turn."""
    alone = (word for word in world.vocabulary() for _ in range(TIMES_ALONE * len(voices.SEEN)))
    for number, text in enumerate((*world.dictations(), *alone)):
        voice = voices.SEEN[number % len(voices.SEEN)]
        name = f"speech/dictation/{number:05d}.wav"
        row: dict[str, object] = {
            "id": f"dictation-{number}",
            "task": "asr",
            "voice": voice.name,
            "audio_in": name,
            "text_in": text,
        }
        yield row, Clip(out / name, text, ("dictation", number), voice)


def reading_rows(out: Path) -> Iterator[tuple[dict[str, object], Clip]]:
    """Yield rows of word lists that the answer voice reads out."""
    for number, text in enumerate(world.readings()):
        row: dict[str, object] = {
            "id": f"reading-{number}",
            "task": "tts",
            "audio_out": answer_path(text),
            "text_out": text,
        }
        yield row, Clip(out / answer_path(text), text)


def written_rows(count: int = WRITTEN) -> Iterator[dict[str, object]]:
    """Yield what the language model learned from, as often as it did: that keeps its text ability."""
    lessons = world.lessons()
    chances = world.chances([str(lesson["kind"]) for lesson in lessons])
    drawn = random.Random(world.SEED).choices(lessons, chances, k=count)
    for number, record in enumerate(drawn):
        yield {
            "id": f"written-{number}",
            "task": "text_to_text",
            "text_in": record["question"],
            "text_out": record["answer"],
            "turns": record["turns"],
        }


def build(out: Path, *, renditions: int = RENDITIONS, jobs: int = 1) -> None:
    """Write the world.

    Args:
        out: folder.
        renditions: recordings of each question of training, for the talker at least so many.
        jobs: processes.
    """
    for split in world.SPLITS:
        write_rows(out / f"{split}.jsonl", (record.as_row() for record in world.records(split)))
    with ProcessPoolExecutor(max_workers=jobs) as pool:
        _make(pool, "voice", codec_clips(out))
        _make(pool, "answers", answer_clips(out))
        for name, unseen in (("seen", False), ("unseen", True)):
            rows, clips = zip(*question_rows(out, "heldout", 0, unseen=unseen), strict=True)
            _make(pool, f"held-out questions, {name} voices", clips)
            write_rows(out / f"rows_heldout_{name}.jsonl", rows)
        train: list[dict[str, object]] = []
        for rendition in range(renditions):
            rows, clips = zip(*question_rows(out, "train", rendition), strict=True)
            _make(pool, f"questions of training, {rendition + 1} of {renditions}", clips)
            train.extend(rows)
        more = list(_more_questions(out, after=renditions))
        _make(pool, "more questions of training", [clip for _, clip in more])
        rows, clips = zip(*dictation_rows(out), strict=True)
        _make(pool, "dictations", clips)
        write_rows(out / "rows_dictation.jsonl", rows)
        rows, clips = zip(*reading_rows(out), strict=True)
        _make(pool, "readings", {clip.path: clip for clip in clips}.values())
        write_rows(out / "rows_reading.jsonl", rows)
    write_rows(out / "rows_written.jsonl", written_rows())
    write_rows(out / "rows_taught.jsonl", [*train, *(row for row, _ in more)])
    write_rows(out / "rows_train.jsonl", train)


def _more_questions(out: Path, *, after: int) -> Iterator[tuple[dict[str, object], Clip]]:
    """Yield the recordings of ``MORE_RENDITIONS`` that come after the first few of all questions."""
    for rendition in range(after, max(MORE_RENDITIONS.values())):
        kinds = [kind for kind, wanted in MORE_RENDITIONS.items() if rendition < wanted]
        yield from question_rows(out, "train", rendition, kinds=kinds)


def _make(pool: ProcessPoolExecutor, name: str, clips: Iterable[Clip]) -> None:
    start = time.monotonic()
    made = list(pool.map(make_clip, clips, chunksize=CHUNK))
    hours, new = sum(seconds for seconds, _ in made) / 3600, sum(is_new for _, is_new in made)
    print(
        f"{name}: {len(made)} files, {hours:.2f} h of speech; {new} new in {time.monotonic() - start:.0f} s",
        flush=True,
    )


def main() -> None:
    """Read the command line and write the world."""
    parser = argparse.ArgumentParser(description="Write the tiny talker's world.")
    parser.add_argument("--out", type=Path, default=Path("build/tiny/world"), help="folder")
    parser.add_argument(
        "--renditions", type=int, default=RENDITIONS, help="recordings of each question of training"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    arguments = parser.parse_args()
    start = time.monotonic()
    build(arguments.out, renditions=arguments.renditions, jobs=arguments.jobs)
    print(f"{arguments.out}: done in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
