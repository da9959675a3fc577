"""Conversations that come and go at any moment say what they say alone, and leave nothing behind."""

import gc
import random
import threading
import weakref

import numpy as np
import pytest
import torch

from omni_adapter import ConfigError, SamplingSettings
from omni_adapter.audio.codec import CodecStream
from omni_adapter.errors import BusyError, ContextOverflowError, PromptError
from omni_adapter.generation.generator import Decoder

SHORT = {"max_new_tokens": 16}
ROOM = 160
SAMPLED = {
    "text_sampling": SamplingSettings(do_sample=True, temperature=0.8, top_k=20),
    "code_sampling": SamplingSettings(do_sample=True, top_k=30),
}
ASKED = [
    {"text": "Yes"},
    {"text": "Tell me a story about the sea.", "seed": 5},
    {"text": "How are you?", "speak": False},
    {"text": "Once there was a boat.", "task": "tts"},
    {"text": "How are you?", "max_new_tokens": 9, "seed": 1},
    {"text": "Good morning!", "batch_parallel": False, "stride": 2},
]


def answer(talker, asked: dict, **settings):
    """The reply of a conversation that is alone."""
    options = {**SHORT, **settings, **asked}
    text, task = options.pop("text"), options.pop("task", None)
    if task:
        [reply] = talker.chat_many([[{"role": "user", "content": text}]], task=task, **options)
        return reply
    return talker.chat(text=text, **options)


def assert_same(reply, expected) -> None:
    assert (reply.text, reply.steps, reply.finish_reason) == (
        expected.text,
        expected.steps,
        expected.finish_reason,
    )
    np.testing.assert_array_equal(reply.audio, expected.audio)


def play(server, script: list[tuple[int, dict]], **settings) -> list:
    """Hand conversations over after so many turns each, and take turns until all are over."""
    handles, turn = [], 0
    script = sorted(script, key=lambda entry: entry[0])
    while len(handles) < len(script) or server.num_running or server.num_waiting:
        while len(handles) < len(script) and script[len(handles)][0] <= turn:
            handles.append(server.submit(**{**SHORT, **settings, **script[len(handles)][1]}))
        server.turn()
        turn += 1
    return handles


@pytest.mark.parametrize("lead_s", [0.5, None], ids=["first sound first", "in step"])
@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_each_says_what_it_says_alone(talker, lead_s, settings):
    chance = random.Random(repr(settings))
    script = [(chance.randrange(30), asked) for asked in (*ASKED, *ASKED[:2])]
    server = talker.serve(max_conversations=3, max_steps=ROOM, lead_s=lead_s)
    handles = play(server, script, **settings)
    for handle, (_, asked) in zip(handles, sorted(script, key=lambda entry: entry[0]), strict=True):
        assert_same(handle.reply(), answer(talker, asked, **settings))
    assert 2 <= server.most_together <= 3


@pytest.mark.parametrize(
    ("lead_s", "reads"), [(None, [3, 1]), (0.5, [1, 1, 1, 1])], ids=["in step", "in turn"]
)
def test_prompts_that_wait_are_read_together_where_all_go_in_step(talker, monkeypatch, lead_s, reads):
    sizes, prefill = [], Decoder.prefill

    def count(decoder, batch, **options):
        sizes.append(len(batch.grid))
        return prefill(decoder, batch, **options)

    asked = [{"text": text} for text in ("Good morning!", "How are you?", "word " * 30, "Tell me a story")]
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "prefill", count)
        server = talker.serve(max_steps=ROOM, lead_s=lead_s)
        handles = [server.submit(**one, **SHORT, **SAMPLED, seed=seed) for seed, one in enumerate(asked)]
        replies = [handle.reply() for handle in handles]
    assert sizes == reads
    for seed, (reply, one) in enumerate(zip(replies, asked, strict=True)):
        assert_same(reply, answer(talker, one, **SAMPLED, seed=seed))


def test_spoken_questions_join_written_ones(talker, question):
    server = talker.serve(max_steps=ROOM, lead_s=None)
    spoken, written = server.submit(question, **SHORT), server.submit(text="Yes", **SHORT)
    assert_same(written.reply(), talker.chat(text="Yes", **SHORT))
    assert_same(spoken.reply(), talker.chat(question, **SHORT))
    assert server.most_together == 2


@pytest.mark.parametrize("reason", ["padding", "cache"])
def test_bases_whose_rows_cannot_join_take_turns(talker, monkeypatch, reason):
    expected = [answer(talker, asked) for asked in ASKED[:3]]
    backbone = talker.model.backbone
    monkeypatch.setattr(type(backbone), "rows_can_join", False)
    if reason == "cache":
        monkeypatch.setattr(backbone, "new_cache", lambda rows, capacity: None)
    server = talker.serve(max_steps=ROOM)
    handles = play(server, [(2 * index, asked) for index, asked in enumerate(ASKED[:3])])
    for handle, reply in zip(handles, expected, strict=True):
        assert_same(handle.reply(), reply)
    assert server.most_together == 1
    assert server.num_running == server.nbytes == 0


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_coming_cancelling_and_going(talker, seed):
    """A walk over all that can happen: whoever is not cancelled says what it says alone."""
    chance = random.Random(seed)
    expected = [answer(talker, asked) for asked in ASKED]
    server = talker.serve(
        max_conversations=2, max_waiting=2, max_steps=ROOM, lead_s=chance.choice([None, 0.1])
    )
    alive, cancelled, sizes, peak = [], [], set(), 0
    for _ in range(110):
        action = chance.choice(["submit", "cancel", "turn", "turn", "turn", "turn"])
        if action == "submit":
            which = chance.randrange(len(ASKED))
            if server.num_waiting + server.num_running < 4:
                alive.append((which, server.submit(**{**SHORT, **ASKED[which]})))
            else:
                with pytest.raises(BusyError, match=r"conversations are being answered and \d wait"):
                    server.submit(**{**SHORT, **ASKED[which]})
        elif action == "cancel" and alive:
            which, handle = alive.pop(chance.randrange(len(alive)))
            if not handle.over:
                handle.cancel()
                cancelled.append(handle)
            else:
                assert_same(handle.reply(), expected[which])
        else:
            server.turn()
            peak = max(peak, server.num_running)
    for which, handle in alive:
        assert_same(handle.reply(), expected[which])
    for handle in cancelled:
        assert all(chunk.finish_reason is None for chunk in handle)
        with pytest.raises(BusyError, match="the conversation was cancelled"):
            handle.reply()
    assert server.num_running == server.num_waiting == 0
    assert peak == 2
    for lane in server._lanes.values():
        [group] = lane.groups
        assert group.state.names == group.state.rows == []
        assert group.state.length == 0
        sizes.add(group.state.cache.backbone.nbytes)
    assert sizes == {talker.model.backbone.cache_nbytes(4, ROOM)}


def tensors() -> tuple[int, int]:
    """How many tensors there are, and their bytes."""
    gc.collect()
    found = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    return len(found), sum(one.nbytes for one in found)


def test_nothing_grows_over_many_conversations(talker):
    server = talker.serve(max_conversations=2, max_steps=ROOM, lead_s=None)
    counts = []
    for round_ in range(4):
        handles = [server.submit(text=f"Tell me number {index}", max_new_tokens=8) for index in range(5)]
        if round_ % 2:
            handles.pop().cancel()
        assert all(handle.reply().steps == 8 for handle in handles)
        server.turn()
        del handles
        counts.append((*tensors(), server.nbytes))
    assert counts[1] == counts[2] == counts[3]


def test_what_is_over_holds_nothing(talker):
    server = talker.serve(max_steps=ROOM)
    over, gone = server.submit(text="Yes", **SHORT), server.submit(text="How are you?", **SHORT)
    for _ in range(4):
        server.turn()
    voices = [weakref.ref(handle.listener) for handle in (over,)]
    gone.cancel()
    over.reply()
    server.turn()
    gc.collect()
    assert over.request is over.listener is gone.request is gone.listener is None
    assert [voice() for voice in voices] == [None]


def test_a_server_with_a_thread_of_its_own(talker):
    expected = [answer(talker, asked) for asked in ASKED[:4]]
    replies: dict[int, object] = {}
    with talker.serve(max_conversations=3, max_steps=ROOM) as server:

        def ask(index: int) -> None:
            replies[index] = server.submit(**{**SHORT, **ASKED[index]}).reply()

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        left = server.submit(text="Yes", max_new_tokens=100)
    for index, reply in enumerate(expected):
        assert_same(replies[index], reply)
    with pytest.raises(BusyError, match="closed before this reply was over"):
        left.reply()
    with pytest.raises(BusyError, match="the batcher is closed"):
        server.submit(text="Yes")


def test_sound_comes_while_the_reply_goes_on(talker):
    server = talker.serve(max_steps=ROOM)
    chunks = list(server.submit(text="Yes", max_new_tokens=30))
    alone = list(talker.stream(text="Yes", max_new_tokens=30))
    assert [(chunk.step, chunk.text, len(chunk.audio)) for chunk in chunks] == [
        (chunk.step, chunk.text, len(chunk.audio)) for chunk in alone
    ]
    assert [chunk.elapsed_s for chunk in chunks] == sorted(chunk.elapsed_s for chunk in chunks)


def test_the_error_of_one_is_not_that_of_others(talker, monkeypatch):
    server = talker.serve(max_steps=ROOM, lead_s=None)
    good, bad = server.submit(text="Yes", **SHORT), server.submit(text="How are you?", **SHORT)
    columns, prefill = bad.request.sample.layout.grid.shape[1], Decoder.prefill
    assert columns > good.request.sample.layout.grid.shape[1]

    def fail_on_bad(decoder, batch, **options):
        return 1 / 0 if batch.grid.shape[-1] == columns else prefill(decoder, batch, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "prefill", fail_on_bad)
        assert_same(good.reply(), talker.chat(text="Yes", **SHORT))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            list(bad)
    broken = server.submit(text="Yes", **SHORT)
    server.turn()
    [lane] = server._lanes.values()
    monkeypatch.setattr(lane.together[0].decoder, "advance", lambda state: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        broken.reply()
    assert_same(server.submit(text="Yes", **SHORT).reply(), talker.chat(text="Yes", **SHORT))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.serve(max_conversations=0), ConfigError, "max_conversations must be at least 1, got 0"),
        (lambda t: t.serve(max_waiting=-1), ConfigError, "max_waiting must be at least 0, got -1"),
        (lambda t: t.serve(lead_s=-1), ConfigError, "lead_s must be at least 0 seconds"),
        (lambda t: t.serve().submit(), PromptError, "no question; pass a recording, text= or messages="),
        (
            lambda t: t.serve(max_steps=50).submit(text="Yes", max_new_tokens=60),
            ContextOverflowError,
            r"prompt and reply take up to \d+ steps, this batcher has room for 50",
        ),
    ],
)
def test_wrong_use_is_refused(talker, call, error, message):
    with pytest.raises(error, match=message):
        call(talker)


def test_sound_of_all_in_one_call_is_the_same_within_rounding(talker, monkeypatch):
    """Chunks begin where those of the others do; ids are the same, samples within rounding."""
    counts = []
    together = CodecStream.push_together
    monkeypatch.setattr(
        CodecStream,
        "push_together",
        lambda streams, codes: [counts.append(len(streams)), *together(streams, codes)][1:],
    )
    server = talker.serve(max_conversations=3, max_steps=ROOM, lead_s=None, exact_sound=False)
    asked = [{"text": text, "max_new_tokens": 30} for text in ("Yes", "How are you?", "Tell me a story")]
    handles = play(server, [(3 * index, one) for index, one in enumerate(asked)])
    for handle, one in zip(handles, asked, strict=True):
        reply, alone = handle.reply(), answer(talker, one)
        assert (reply.text, reply.steps) == (alone.text, alone.steps)
        np.testing.assert_allclose(reply.audio, alone.audio, rtol=0, atol=2e-6)
    assert max(counts) == 3
