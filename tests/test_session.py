"""A conversation that is heard while it is spoken gives the replies of the whole recording."""

import numpy as np
import pytest
import torch
from soundfile import read

from omni_adapter import OmniAdapter
from omni_adapter.audio.clips import Frames
from omni_adapter.errors import AudioError, ConfigError, ContextOverflowError, PromptError
from omni_adapter.generation.streaming import Reply
from tests.talkers import fresh_talker

OPTIONS = {"max_new_tokens": 16}


@pytest.fixture(scope="module")
def blocks_talker() -> OmniAdapter:
    return fresh_talker(encoder_block_seconds=0.4)


def samples_of(path):
    return read(path, dtype="float32")


def say(session, path, *, seed=0):
    """Speak a recording into a session, in pieces of all sizes."""
    samples, rate = samples_of(path)
    generator = np.random.default_rng(seed)
    while len(samples):
        size = int(generator.choice([0, 1, 700, 3000, 12000]))
        session.append_audio(samples[:size], sampling_rate=rate)
        samples = samples[size:]


def assert_same(chunks, expected) -> Reply:
    chunks, expected = list(chunks), list(expected)
    reply, wanted = Reply.collect(chunks), Reply.collect(expected)
    assert reply.text == wanted.text
    assert reply.finish_reason == wanted.finish_reason
    assert [len(chunk.audio) for chunk in chunks] == [len(chunk.audio) for chunk in expected]
    assert np.array_equal(reply.audio, wanted.audio)
    return reply


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("spoken", [True, False])
def test_a_session_answers_as_the_whole_recording_does(talker, question, spoken, seed):
    with talker.session(speak=spoken, **OPTIONS) as session:
        say(session, question, seed=seed)
        assert session.heard_s == pytest.approx(len(samples_of(question)[0]) / samples_of(question)[1])
        assert_same(session.reply(), talker.stream(question, speak=spoken, **OPTIONS))


@pytest.mark.parametrize("seed", [0, 1])
def test_likewise_in_blocks(blocks_talker, question, seed):
    with blocks_talker.session(system="Be kind.", **OPTIONS) as session:
        say(session, question, seed=seed)
        assert_same(session.reply(), blocks_talker.stream(question, system="Be kind.", **OPTIONS))


def test_likewise_with_draws_and_penalties(blocks_talker, question):
    from omni_adapter import SamplingSettings

    sampling = SamplingSettings(do_sample=True, temperature=1.0, top_k=20, repetition_penalty=1.3)
    options = {**OPTIONS, "text_sampling": sampling, "code_sampling": sampling, "seed": 3}
    with blocks_talker.session(**options) as session:
        say(session, question)
        assert_same(session.reply(), blocks_talker.stream(question, **options))


@pytest.mark.parametrize("name", ["talker", "blocks_talker"])
def test_several_turns(request, name, question, speak):
    talker = request.getfixturevalue(name)
    other = speak("How are you?")
    messages = [{"role": "system", "content": "Be brief."}]
    with talker.session(messages=messages, **OPTIONS) as session:
        for path, text in ((question, ""), (other, " Please."), (None, "Tell me a story."), (question, "")):
            parts = [{"type": "audio", "audio": path}] if path else []
            parts += [{"type": "text", "text": text}] if text else []
            messages = [*messages, {"role": "user", "content": parts}]
            if path:
                say(session, path)
            if text:
                session.append_text(text)
            expected = talker.stream(messages=messages, **OPTIONS)
            reply = assert_same(session.reply(), expected)
            messages = [*messages, {"role": "assistant", "content": reply.text}]
        assert [message["role"] for message in session.messages] == [m["role"] for m in messages]
        kept = session.messages[1]["content"][0]["audio"]
        assert isinstance(kept, Frames)  # recordings are kept as they were heard, and not encoded again


def test_text_before_the_recording(talker, question):
    parts = [
        {"type": "text", "text": "Listen: "},
        {"type": "audio", "audio": question},
        {"type": "text", "text": " Well?"},
    ]
    with talker.session(**OPTIONS) as session:
        session.append_text("Listen: ")
        say(session, question)
        session.append_text(" Well?")
        messages = [{"role": "user", "content": parts}]
        assert_same(session.reply(), talker.stream(messages=messages, **OPTIONS))


def test_turns_from_before(talker, question):
    before = [
        {"role": "user", "content": [{"type": "audio", "audio": question}]},
        {"role": "assistant", "content": "Paris."},
    ]
    now = [*before, {"role": "user", "content": [{"type": "audio", "audio": question}]}]
    with talker.session(messages=before, **OPTIONS) as session:
        say(session, question)
        assert_same(session.reply(), talker.stream(messages=now, **OPTIONS))


def test_the_prompt_is_read_while_it_is_spoken(blocks_talker, question, monkeypatch):
    read_columns: list[int] = []
    forward = blocks_talker.model.backbone.forward

    def watched(embeddings, **arguments):
        read_columns.append(embeddings.shape[1])
        return forward(embeddings, **arguments)

    monkeypatch.setattr(blocks_talker.model.backbone, "forward", watched)
    with blocks_talker.session(**OPTIONS) as session:
        assert len(read_columns) == 1  # the head, when the session opens
        say(session, question)
        before = sum(read_columns)
        assert len(read_columns) > 1
        read_columns.clear()
        session.reply()
        prompt = before + sum(read_columns)
        assert prompt - before <= 2 * 20 + 8  # the last blocks and what follows the recording
        # That, and the column where the rows part, unless all are few enough to be read twice.
        cheap = blocks_talker.model.backbone.cheap_columns
        assert len(read_columns) == (1 if sum(read_columns) <= cheap else 2)
        whole = blocks_talker.processor(
            [{"role": "user", "content": [{"type": "audio", "audio": question}]}], task="speech_to_speech"
        )
        assert prompt == whole.layout.grid.shape[1]


def test_a_base_that_takes_prompts_in_one_piece(talker, question, monkeypatch):
    monkeypatch.setattr(type(talker.model.backbone), "reads_in_pieces", property(lambda _: False))
    with talker.session(hearing="blocks", block_seconds=29.0, **OPTIONS) as session:
        say(session, question)
        assert_same(session.reply(), talker.stream(question, **OPTIONS))


def test_more_than_there_was_room_for(blocks_talker, question, monkeypatch):
    monkeypatch.setattr("omni_adapter.session._ROOM_S", 0.5)
    with blocks_talker.session(**OPTIONS) as session:
        say(session, question)
        assert_same(session.reply(), blocks_talker.stream(question, **OPTIONS))


def test_blocks_on_demand_are_an_approximation(talker, question):
    with talker.session(hearing="blocks", block_seconds=0.2, lookahead_seconds=0, **OPTIONS) as session:
        say(session, question)
        rough = Reply.collect(session.reply())
    assert rough.steps == OPTIONS["max_new_tokens"]
    assert rough.text != talker.chat(question, **OPTIONS).text  # a random encoder hears nothing alike


# --- no trace ---


def test_a_cancelled_question_leaves_no_trace(blocks_talker, question, speak):
    with blocks_talker.session(**OPTIONS) as session:
        say(session, speak("How are you?"))
        session.append_text("Never mind.")
        session.cancel()
        assert session.heard_s == 0
        say(session, question)
        assert_same(session.reply(), blocks_talker.stream(question, **OPTIONS))


@pytest.mark.parametrize("by", ["cancel", "close"])
@pytest.mark.parametrize("chunks_before", [0, 2])
def test_a_cancelled_reply_leaves_no_trace(blocks_talker, question, speak, by, chunks_before):
    with blocks_talker.session(**OPTIONS) as session:
        say(session, speak("How are you?"))
        chunks = session.reply()
        for _ in range(chunks_before):
            next(chunks)
        if by == "close" and chunks_before:
            chunks.close()
        else:
            session.cancel()
            assert list(chunks) == []
        assert session.messages == []
        say(session, question)
        assert_same(session.reply(), blocks_talker.stream(question, **OPTIONS))


def test_an_interrupted_reply_may_be_kept(blocks_talker, question):
    with blocks_talker.session(**OPTIONS) as session:
        say(session, question)
        chunks = session.reply()
        said = next(chunks).text + next(chunks).text
        session.cancel(keep=True)
        assert session.messages[-1] == {"role": "assistant", "content": said}
        say(session, question)
        assert Reply.collect(session.reply()).steps == OPTIONS["max_new_tokens"]
        assert len(session.messages) == 4


def test_two_sessions_at_once_do_not_meet(blocks_talker, question, speak):
    other = speak("How are you?")
    first, second = blocks_talker.session(**OPTIONS), blocks_talker.session(**OPTIONS)
    samples = {path: samples_of(path) for path in (question, other)}
    for start in range(0, 60_000, 4000):
        for session, path in ((first, question), (second, other)):
            sound, rate = samples[path]
            session.append_audio(sound[start : start + 4000], sampling_rate=rate)
    pairs = list(zip(first.reply(), second.reply(), strict=False))
    expected = zip(
        blocks_talker.stream(question, **OPTIONS), blocks_talker.stream(other, **OPTIONS), strict=False
    )
    for ours, theirs in zip(pairs, expected, strict=True):
        for chunk, wanted in zip(ours, theirs, strict=True):
            assert chunk.text == wanted.text
            assert np.array_equal(chunk.audio, wanted.audio)


def test_a_question_that_stops_halfway_is_forgotten(blocks_talker, question, monkeypatch):
    def stop(frames):
        raise KeyboardInterrupt

    with blocks_talker.session(**OPTIONS) as session:
        samples, rate = samples_of(question)
        session.append_audio(samples[:9000], sampling_rate=rate)
        with monkeypatch.context() as patch:
            patch.setattr(blocks_talker.model.audio_adapter, "forward", stop)
            with pytest.raises(KeyboardInterrupt):
                session.append_audio(samples[9000:30000], sampling_rate=rate)
        assert session.heard_s == 0
        say(session, question)
        assert_same(session.reply(), blocks_talker.stream(question, **OPTIONS))


@pytest.mark.gpu
@pytest.mark.parametrize("block_seconds", [None, 0.4])
def test_on_an_accelerator(question, speak, block_seconds):
    talker = fresh_talker(encoder_block_seconds=block_seconds).to(torch.accelerator.current_accelerator())
    with talker.session(**OPTIONS) as session:
        messages = []
        for path in (question, speak("How are you?")):
            messages = [*messages, {"role": "user", "content": [{"type": "audio", "audio": path}]}]
            say(session, path)
            reply, whole = Reply.collect(session.reply()), talker.chat(messages=messages, **OPTIONS)
            assert reply.text == whole.text
            assert len(reply.audio) == len(whole.audio)
            messages = [*messages, {"role": "assistant", "content": reply.text}]


# --- errors ---


def test_errors_of_order(blocks_talker, question):
    session = blocks_talker.session(**OPTIONS)
    with pytest.raises(PromptError, match="no question; append_audio or append_text first"):
        session.reply()
    say(session, question)
    session.append_text("And?")
    with pytest.raises(PromptError, match="a turn holds one recording"):
        session.append_audio(np.zeros(3), sampling_rate=16000)
    chunks = session.reply()
    for action in (
        lambda: session.append_audio(np.zeros(3), sampling_rate=16000),
        lambda: session.append_text("x"),
        session.reply,
        session.prepare,
    ):
        with pytest.raises(
            PromptError, match=r"a reply is being streamed; take all of its chunks, or cancel"
        ):
            action()
    list(chunks)
    session.prepare()
    session.close()
    with pytest.raises(PromptError, match="this session is closed"):
        session.append_text("x")


def test_errors_of_sound(blocks_talker, question):
    session = blocks_talker.session(**OPTIONS)
    samples, rate = samples_of(question)
    session.append_audio(samples[:5000], sampling_rate=rate)
    with pytest.raises(AudioError, match="NaN or infinity"):
        session.append_audio(np.array([np.nan]), sampling_rate=rate)
    with pytest.raises(AudioError, match=f"it began at {rate} Hz, got 8000 Hz"):
        session.append_audio(samples[5000:], sampling_rate=8000)
    session.append_audio(samples[5000:], sampling_rate=rate)
    assert_same(session.reply(), blocks_talker.stream(question, **OPTIONS))
    session.append_audio(np.zeros(1000), sampling_rate=rate)
    with pytest.raises(AudioError, match="is silent: no sample above") as caught:
        session.reply()
    assert caught.value.reason == "silent"
    with pytest.raises(PromptError, match="no question"):  # it was forgotten
        session.reply()


def test_errors_of_settings(talker):
    with pytest.raises(ConfigError, match="hearing must be exact or blocks, got 'soon'"):
        talker.session(hearing="soon")
    with pytest.raises(ConfigError, match="unknown generation setting 'max_tokens'; did you mean"):
        talker.session(max_tokens=3)
    with pytest.raises(PromptError, match="either messages= or system="):
        talker.session(system="x", messages=[{"role": "user", "content": "y"}])
    with pytest.raises(ConfigError, match="needs the recording's end"):
        fresh_talker(encoder_padding="window").session(hearing="blocks")


def test_a_question_longer_than_the_base_can_take(question):
    talker = fresh_talker(encoder_block_seconds=0.4)
    talker.model.backbone.lm.config.max_position_embeddings = 60
    session = talker.session(max_new_tokens=20)
    with pytest.raises(ContextOverflowError, match="knows 60 positions"):
        say(session, question)
    with pytest.raises(ContextOverflowError, match="knows 60 positions"):
        session.reply()
    samples, rate = samples_of(question)
    session.append_audio(samples[: rate // 2], sampling_rate=rate)
    short = (torch.from_numpy(samples[: rate // 2]), rate)
    assert_same(session.reply(), talker.stream(short, max_new_tokens=20))
