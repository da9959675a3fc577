"""The talker that comes with the package: small, whole, and it answers what it was not taught."""

import shutil
import sys
from pathlib import Path

import pytest

from omni_adapter import TINY_TALKER, OmniAdapter

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tiny_talker"
sys.path.append(str(FOLDER))

import ship  # noqa: E402
import voices  # noqa: E402
import world  # noqa: E402

needs_voices = pytest.mark.skipif(
    not (shutil.which("flite") and shutil.which("espeak-ng")), reason="flite or espeak-ng is not installed"
)


@pytest.fixture(scope="module")
def talker() -> OmniAdapter:
    return OmniAdapter.from_pretrained(TINY_TALKER)


def held_out(count: int) -> list[world.Record]:
    """Questions of one turn, one of each pair, evenly from all of them."""
    seen, chosen = set(), []
    for record in world.records("heldout"):
        if not record.turns and record.pair not in seen:
            seen.add(record.pair)
            chosen.append(record)
    return chosen[:: len(chosen) // count][:count]


def test_it_is_small_and_holds_nothing_but_weights_and_settings() -> None:
    files = [path for path in TINY_TALKER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= ship.LARGEST_BYTES
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}


def test_it_answers_written_questions(talker: OmniAdapter) -> None:
    questions = held_out(40)
    conversations = [[{"role": "user", "content": record.question}] for record in questions]
    replies = talker.chat_many(conversations, speak=False, max_new_tokens=40)
    right = sum(reply.text == record.answer for reply, record in zip(replies, questions, strict=True))
    assert right >= 38


@needs_voices
def test_it_answers_spoken_questions_aloud(talker: OmniAdapter) -> None:
    judge = pytest.importorskip("judge", reason="pocketsphinx or jiwer is not installed")
    ears = judge.Recogniser(world.vocabulary())
    questions = held_out(10)
    heard, said = [], []
    for number, record in enumerate(questions):
        samples, rate = voices.speak(record.question, voices.SEEN[number % len(voices.SEEN)])
        reply = talker.chat((samples, rate))
        assert reply.finish_reason == "end"
        heard.append(reply.text == record.answer)
        said.append(ears.transcribe(reply.audio, reply.sampling_rate))
    assert sum(heard) >= 8
    assert judge.word_error_rate([record.answer for record in questions], said) <= 0.3
