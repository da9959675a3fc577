"""The trained talker that comes with the package says the same when its weights are narrowed."""

import pytest

from omni_adapter import OmniAdapter
from omni_adapter.hub import CONFIG_FILE
from omni_adapter.hub.files import TINY_TALKER

QUESTIONS = (
    "What is two plus three?",
    "What day comes after Monday?",
    "What is the capital of France?",
    "What is the opposite of hot?",
    "What color is the sky?",
    "How are you?",
)

pytestmark = pytest.mark.skipif(
    not (TINY_TALKER / CONFIG_FILE).is_file(), reason=f"{TINY_TALKER.name} is not in this checkout"
)


def answers(precision: str | None) -> list[str]:
    talker = OmniAdapter.from_pretrained(TINY_TALKER, precision=precision)
    return [talker.chat(text=question, speak=False, max_new_tokens=40).text for question in QUESTIONS]


@pytest.fixture(scope="module")
def plain() -> list[str]:
    return answers(None)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_written_answers_are_kept(plain, precision):
    assert all(plain), "it answers everything"
    assert answers(precision) == plain


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_spoken_questions_get_the_same_answers(speak, precision):
    ours = OmniAdapter.from_pretrained(TINY_TALKER, precision=precision)
    whole = OmniAdapter.from_pretrained(TINY_TALKER)
    same = 0
    for question in QUESTIONS:
        path = speak(question)
        expected = whole.chat(path, max_new_tokens=60)
        reply = ours.chat(path, max_new_tokens=60)
        same += reply.text == expected.text
        assert len(reply.audio) > 0
    assert same >= len(QUESTIONS) - 1, "one of them may tip over"
