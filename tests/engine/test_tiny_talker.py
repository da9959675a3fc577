"""The trained talker that comes with the package says the same when its weights are narrowed."""

import shutil
import sys
from functools import cache
from pathlib import Path

import pytest

from omni_adapter import OmniAdapter
from omni_adapter.hub import CONFIG_FILE
from omni_adapter.hub.files import TINY_TALKER

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "tiny_talker"))

import voices
import world

pytestmark = pytest.mark.skipif(
    not (TINY_TALKER / CONFIG_FILE).is_file(), reason=f"{TINY_TALKER.name} is not in this checkout"
)
needs_voices = pytest.mark.skipif(
    not (shutil.which("flite") and shutil.which("espeak-ng")), reason="flite or espeak-ng is not installed"
)

WRITTEN, SPOKEN = 40, 6


def held_out(count: int) -> list[world.Record]:
    """Questions that training never met, evenly from all kinds."""
    chosen = [record for record in world.records("heldout") if not record.turns]
    return chosen[:: len(chosen) // count][:count]


@cache
def load(precision: str | None) -> OmniAdapter:
    return OmniAdapter.from_pretrained(TINY_TALKER, precision=precision)


@cache
def written_answers(precision: str | None) -> list[str]:
    asked = [[{"role": "user", "content": record.question}] for record in held_out(WRITTEN)]
    replies = load(precision).chat_many(asked, speak=False, max_new_tokens=40)
    return [reply.text for reply in replies]


@cache
def spoken_answers(precision: str | None) -> list[tuple[str, bool]]:
    """Text, and whether there was sound."""
    replies = []
    for number, record in enumerate(held_out(SPOKEN)):
        question = voices.speak(record.question, voices.SEEN[number % len(voices.SEEN)])
        replies.append(load(precision).chat(question, max_new_tokens=80))
    return [(reply.text, len(reply.audio) > 0) for reply in replies]


@pytest.mark.parametrize(("precision", "may_differ"), [("fp32", 0), ("bf16", 1), ("int8", 2)])
def test_written_answers_are_kept(precision, may_differ):
    right = [record.answer for record in held_out(WRITTEN)]
    plain, ours = written_answers(None), written_answers(precision)
    assert sum(one != other for one, other in zip(ours, plain, strict=True)) <= may_differ
    correct = [sum(a == b for a, b in zip(answers, right, strict=True)) for answers in (plain, ours)]
    assert correct[1] >= correct[0] - 1, "narrow weights know what the plain ones know"


@needs_voices
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_spoken_questions_get_the_same_answers(precision):
    plain, ours = spoken_answers(None), spoken_answers(precision)
    assert all(has_sound for _, has_sound in ours)
    differing = sum(one != other for one, other in zip(ours, plain, strict=True))
    assert differing <= (precision != "fp32")


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 0.02), ("int8", 0.06)])
def test_logits_of_trained_weights_move_little(precision, bound):
    assert max(load(precision).pack_report.errors.values()) <= bound
