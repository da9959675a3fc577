"""Conversations that join and leave a batch between steps say what they say alone."""

import random

import pytest
import torch

from omni_adapter.data.collator import collate
from omni_adapter.data.layout import get_task
from omni_adapter.generation.generator import Decoder, GenerationSettings
from omni_adapter.generation.sampling import SamplingSettings
from omni_adapter.generation.state import Draws

SAMPLED = {
    "text_sampling": SamplingSettings(do_sample=True, temperature=0.8, top_k=20, repetition_penalty=1.2),
    "code_sampling": SamplingSettings(do_sample=True, top_p=0.9, repetition_penalty=1.1),
}
TEXTS = ("Yes", "How are you?", "Tell me a story about the sea.", "What is the capital of France, please?")
ROOM = 160


def decoder(talker, task: str, **settings) -> Decoder:
    return Decoder(
        talker.model,
        rules=talker.processor.rules,
        task=get_task(task),
        text_end_ids=talker.config.text_end_ids,
        settings=GenerationSettings(**{"max_new_tokens": 20, **settings}),
    )


def opened(talker, run: Decoder, task: str, text: str, seed: int):
    sample = talker.processor([{"role": "user", "content": text}], task=task)
    given = [talker.processor.text_ids(text)] if task == "tts" else None
    return run.prefill(collate([sample], rules=run.rules), given=given, seeds=[seed])


def as_lists(step) -> dict[int, list[int]]:
    return {
        name: [int(step.text[at]), *step.codes[at].tolist()] for at, name in enumerate(step.conversations)
    }


def alone(run: Decoder, state) -> list[list[int]]:
    return [as_lists(step)[0] for step in run.steps(state)]


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("order", range(3))
def test_joined_at_any_step_equals_alone(talker, settings, order):
    """Tasks mixed: spoken and written replies, given texts, one row or two."""
    chance = random.Random(order)
    runs = {
        "text_to_speech": decoder(talker, "text_to_speech", **settings),
        "text_to_text": decoder(talker, "text_to_text", max_new_tokens=9, **settings),
        "tts": decoder(talker, "tts", **settings),
        "joint": decoder(talker, "text_to_speech", batch_parallel=False, max_new_tokens=14, **settings),
    }
    wanted = [(chance.choice(list(runs)), chance.choice(TEXTS), seed) for seed in range(7)]

    def fresh(name: int):
        kind, text, seed = wanted[name]
        return runs[kind], opened(
            talker, runs[kind], "text_to_speech" if kind == "joint" else kind, text, seed
        )

    expected = [alone(*fresh(name)) for name in range(len(wanted))]
    leader = runs["text_to_speech"]
    state = leader.vacant(conversations=4, capacity=ROOM)
    waiting, said = list(range(len(wanted))), {}
    while waiting or state.names:
        while waiting and len(state.names) < 4 and (not state.names or chance.random() < 0.3):
            _, newcomer = fresh(waiting[0])
            newcomer.names = [waiting.pop(0)]
            leader.join(state, newcomer)
        step = leader.choose(state)
        for name, ids in as_lists(step).items():
            said.setdefault(name, []).append(ids)
        leader._drop_finished(state, step)
        assert state.length <= ROOM
        if state.rows:
            leader.advance(state)
    assert [said[name] for name in range(len(wanted))] == expected
    assert state.length == 0
    assert state.cache.tts.length == 0


def test_memory_is_that_of_the_beginning_however_many_come(talker):
    run = decoder(talker, "text_to_speech", max_new_tokens=8)
    state = run.vacant(conversations=2, capacity=ROOM)
    sizes = []
    for name in range(6):
        newcomer = opened(talker, run, "text_to_speech", TEXTS[name % 2], name)
        newcomer.names = [name]
        run.join(state, newcomer)
        for _ in range(3):
            step = run.choose(state)
            run._drop_finished(state, step)
            if state.rows:
                run.advance(state)
        run.keep_rows(
            state, [at for at, row in enumerate(state.rows) if state.names[row.conversation] == name]
        )
        sizes.append(state.nbytes)
    assert len(set(sizes)) == 1
    assert state.cache.backbone.nbytes == run.model.backbone.cache_nbytes(4, ROOM)


def test_dropped_conversations_cannot_be_reached(talker):
    run = decoder(talker, "text_to_speech", **SAMPLED)
    state = run.vacant(conversations=2, capacity=ROOM)
    for name, text in enumerate(TEXTS[:2]):
        newcomer = opened(talker, run, "text_to_speech", text, name)
        newcomer.names = [name]
        run.join(state, newcomer)
    run.keep_rows(state, [])
    assert state.names == state.rows == []
    assert (state.automaton, state.length) == (None, 0)
    for tensor in (state.last, state.text_done, state.seen_text, state.seen_codes, state.code_logits):
        assert tensor.shape[0] == 0
    assert state.cache.backbone.rows == 0


def test_draws_are_the_same_alone_and_among_others():
    device = torch.device("cpu")
    expected = [Draws([seed], width=3, device=device) for seed in (5, 6, 7)]
    numbers = [torch.cat([one.take() for _ in range(150)]) for one in expected]
    draws, taken = Draws([5], width=3, device=device), {5: 0}
    for step in range(140):
        if step in (3, 64, 70):
            other = Draws([{3: 6, 64: 7, 70: 8}[step]], width=3, device=device)
            for _ in range(step % 5):
                other.take()
            taken[other.seeds[0]] = step % 5
            draws.join(other)
        if step == 80:
            draws.keep([0, 2])
        for seed, row in zip(draws.seeds, draws.take(), strict=True):
            if seed < 8:
                assert torch.equal(row, numbers[seed - 5][taken[seed]])
            taken[seed] += 1
