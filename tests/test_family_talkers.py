"""Every causal-LM family of transformers as a whole talker: it hears, speaks, streams, saves and loads.

A check is one function of a talker; a new one is a new entry of ``CHECKS``. ``POPULAR`` families run always,
all of them with ``-m all_families``.
"""

import gc
import string

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from examples.untrained_talker import CHAT_TEMPLATE, make_snac, make_whisper
from omni_adapter import OmniAdapter, Reply, SnacCodec
from omni_adapter.data.collator import collate
from omni_adapter.data.layout import Answer
from omni_adapter.model import ADDED_GROUPS
from omni_adapter.vocab import NO_TEXT
from tests.families import ALL_FAMILIES, POPULAR, build_fresh
from tests.test_family_grid import INFERENCE_ONLY, NOT_BUILT, REFUSED

SHORT = {"max_new_tokens": 12}
QUESTIONS = ("How are you?", "Yes", "Tell me more.")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, few enough for the tiny families."""
    alphabet = sorted(set(string.ascii_letters + string.digits + " .,?!:'\n"))
    vocabulary = {token: index for index, token in enumerate(["<|pad|>", "<|start|>", "<|end|>", *alphabet])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, merges=[])),
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|start|>"],
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="module")
def hearing_and_voice():
    """One encoder and one codec for all families."""
    torch.manual_seed(0)
    return make_whisper().eval(), SnacCodec.from_model(make_snac().eval())


@pytest.fixture(scope="module")
def hum():
    """A third of a second of sound."""
    return np.sin(np.arange(5000) * 0.2).astype(np.float32) * 0.3, 16_000


def wrap(family: str, tokenizer, hearing_and_voice) -> OmniAdapter:
    encoder, codec = hearing_and_voice
    talker = OmniAdapter.wrap(
        build_fresh(family),
        tokenizer=tokenizer,
        encoder=encoder,
        codec=codec,
        tts_layers=1,
        tts={"init": "scaled"},
        text_end_ids=[2],
        audio_adapter={"stack": 2},
        encoder_block_seconds=0.1,
    )
    # Untrained heads may end speech at once; at logit zero the end is hardly ever the most likely id.
    vocabulary = talker.config.vocabulary
    talker.model.code_heads.proj.weight.data[vocabulary.end :: vocabulary.size] = 0
    return talker


def asked(hum, text: str = "") -> list[dict]:
    return [{"role": "user", "content": [{"type": "audio", "audio": hum}, {"type": "text", "text": text}]}]


def check_text_path_is_the_base_bit_for_bit(talker, hum, folder) -> None:
    sample = talker.processor([{"role": "user", "content": "How are you?"}], task="text_to_text")
    with torch.no_grad():
        expected = talker.model.backbone.lm(input_ids=sample.layout.grid[None, -1]).logits
        assert torch.equal(talker.model(sample.layout.grid[None]).text_logits, expected)


def check_spoken_text_is_the_written_text(talker, hum, folder) -> None:
    spoken, written = talker.chat(hum, **SHORT), talker.chat(hum, speak=False, **SHORT)
    assert spoken.text == written.text
    assert len(spoken.audio)
    assert not len(written.audio)


def check_many_at_once_equal_each_alone(talker, hum, folder) -> None:
    conversations = [[{"role": "user", "content": text}] for text in QUESTIONS]
    for conversation, reply in zip(conversations, talker.chat_many(conversations, **SHORT), strict=True):
        alone = talker.chat(messages=conversation, **SHORT)
        assert reply.text == alone.text
        np.testing.assert_array_equal(reply.audio, alone.audio)


def check_coming_and_going_between_steps_equals_alone(talker, hum, folder) -> None:
    server = talker.serve(max_conversations=2, max_steps=200, lead_s=None)
    handles = []
    for text in QUESTIONS:
        handles.append(server.submit(text=text, **SHORT))
        for _ in range(5):
            server.turn()
    for text, handle in zip(QUESTIONS, handles, strict=True):
        reply, alone = handle.reply(), talker.chat(text=text, **SHORT)
        assert reply.text == alone.text
        np.testing.assert_array_equal(reply.audio, alone.audio)
    assert server.most_together == (2 if talker.model.backbone.rows_can_join else 1)


def check_streamed_equals_whole(talker, hum, folder) -> None:
    chunks = list(talker.stream(hum, stride=1, **SHORT))
    reply = talker.chat(hum, stride=100, **SHORT)
    np.testing.assert_array_equal(np.concatenate([chunk.audio for chunk in chunks]), reply.audio)
    assert "".join(chunk.text for chunk in chunks) == reply.text


def check_heard_while_spoken_equals_whole(talker, hum, folder) -> None:
    samples, rate = hum
    with talker.session(**SHORT) as session:
        for start in range(0, len(samples), 900):
            session.append_audio(samples[start : start + 900], sampling_rate=rate)
        spoken = Reply.collect(session.reply())
    whole = talker.chat(hum, **SHORT)
    assert spoken.text == whole.text
    np.testing.assert_array_equal(spoken.audio, whole.audio)


def check_gradient_reaches_everything_that_was_added(talker, hum, folder) -> None:
    if talker.model.backbone.lm.config.model_type in INFERENCE_ONLY:
        return
    answer = Answer((5, 6, 7), torch.randint(0, 64, (7, 3)))
    sample = talker.processor(asked(hum), task="speech_to_speech", answer=answer)
    batch = collate([sample], rules=talker.processor.rules, side="right")
    output = talker.model(batch.grid, places=batch.places, clips=batch.clips)
    (output.code_logits.square().mean() + output.text_logits.square().mean()).backward()
    groups = talker.model.groups()
    for group in ADDED_GROUPS:
        for name, parameter in groups[group].items():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name
            assert bool(parameter.grad.any()), name
    talker.model.zero_grad(set_to_none=True)


def check_a_saved_talker_says_the_same(talker, hum, folder) -> None:
    talker.save_pretrained(folder, include=("base", "encoder", "codec"))
    again = OmniAdapter.from_pretrained(folder, tokenizer=talker.tokenizer)
    first, second = talker.chat(hum, **SHORT), again.chat(hum, **SHORT)
    assert first.text == second.text
    np.testing.assert_array_equal(first.audio, second.audio)


def check_left_padded_prompts_carry_no_text_in_the_padding(talker, hum, folder) -> None:
    samples = [talker.processor(asked(hum, text), task="speech_to_speech") for text in ("", "Hello there")]
    batch = collate(samples, rules=talker.processor.rules)
    padding = batch.attention_mask == 0
    assert padding.any()
    assert (batch.grid[:, -1][padding] == NO_TEXT).all()


CHECKS = (
    check_text_path_is_the_base_bit_for_bit,
    check_spoken_text_is_the_written_text,
    check_many_at_once_equal_each_alone,
    check_coming_and_going_between_steps_equals_alone,
    check_streamed_equals_whole,
    check_heard_while_spoken_equals_whole,
    check_gradient_reaches_everything_that_was_added,
    check_a_saved_talker_says_the_same,
    check_left_padded_prompts_carry_no_text_in_the_padding,
)


def run_all_checks(family, tokenizer, hearing_and_voice, hum, folder) -> None:
    talker = wrap(family, tokenizer, hearing_and_voice)
    before = {name: value.clone() for name, value in talker.model.backbone.lm.state_dict().items()}
    for check in CHECKS:
        check(talker, hum, folder)
    after = talker.model.backbone.lm.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", POPULAR)
def test_popular_family(family, tokenizer, hearing_and_voice, hum, tmp_path):
    run_all_checks(family, tokenizer, hearing_and_voice, hum, tmp_path)


@pytest.mark.all_families
@pytest.mark.parametrize(
    "family", [name for name in ALL_FAMILIES if name not in {*POPULAR, *NOT_BUILT, *REFUSED}]
)
def test_family(family, tokenizer, hearing_and_voice, hum, tmp_path):
    try:
        run_all_checks(family, tokenizer, hearing_and_voice, hum, tmp_path)
    finally:
        gc.collect()
