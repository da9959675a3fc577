import gc
import weakref

import pytest
import torch

from omni_adapter.data.collator import collate
from omni_adapter.data.layout import get_task
from omni_adapter.errors import ConfigError, ContextOverflowError, PromptError
from omni_adapter.generation.generator import Decoder, GenerationSettings
from omni_adapter.generation.sampling import CodeAutomaton, SamplingSettings
from omni_adapter.vocab import NO_TEXT

QUESTIONS = ("How are you?", "Tell me a story about the sea.", "Yes")
SAMPLED = {
    "text_sampling": SamplingSettings(do_sample=True, temperature=0.8, top_k=20, repetition_penalty=1.2),
    "code_sampling": SamplingSettings(do_sample=True, top_p=0.9, repetition_penalty=1.1),
}


def decoder(talker, task: str, **settings) -> Decoder:
    settings = GenerationSettings(**{"max_new_tokens": 24, **settings})
    return Decoder(
        talker.model,
        rules=talker.processor.rules,
        task=get_task(task),
        text_end_ids=talker.config.text_end_ids,
        settings=settings,
    )


def sample_of(talker, text: str, task: str):
    return talker.processor([{"role": "user", "content": text}], task=task)


def heard(talker, path, task: str):
    return talker.processor([{"role": "user", "content": [{"type": "audio", "audio": path}]}], task=task)


def ids(steps) -> dict[int, list[list[int]]]:
    """Per conversation, the text id and code ids of each step."""
    found: dict[int, list[list[int]]] = {}
    for step in steps:
        texts, codes = step.text.tolist(), step.codes.tolist()
        for place, index in enumerate(step.conversations):
            found.setdefault(index, []).append([texts[place], *codes[place]])
    return found


@torch.inference_mode()
def slow_batch_parallel(talker, sample, steps: int) -> list[list[int]]:
    """The method without any saving: two rows, no cache, everything from the start at every step."""
    rules, model = talker.processor.rules, talker.model
    batch = collate([sample, sample], rules=rules)
    grid = batch.grid.clone()
    grid[1, :-1, -1] = rules.vocabulary.pad
    limits = torch.tensor([steps])
    automaton = CodeAutomaton(rules.vocabulary, delays=rules.delays, max_steps=limits, device=grid.device)
    out, text_done = [], False
    for _ in range(steps):
        output = model(grid, places=batch.places, clips=batch.clips)
        text = NO_TEXT if text_done else int(output.text_logits[1, -1].argmax())
        text_done = text_done or text in talker.config.text_end_ids
        codes = automaton.advance(automaton.mask(output.code_logits[:1, :, -1]).argmax(-1))[0]
        out.append([text, *codes.tolist()])
        if text_done and bool(automaton.finished):
            break
        column = torch.cat((codes, torch.tensor([text])))
        silent = torch.cat((torch.full_like(codes, rules.vocabulary.pad), torch.tensor([text])))
        grid = torch.cat((grid, torch.stack((column, silent))[..., None]), dim=-1)
    return out


@pytest.mark.parametrize("columns", [0, 1 << 10])
def test_few_columns_may_be_read_for_both_rows(talker, question, columns, monkeypatch):
    monkeypatch.setattr(talker.model.backbone, "cheap_columns", columns)
    sample = heard(talker, question, "speech_to_speech")
    read = []
    forward = talker.model.backbone.forward

    def watched(embeddings, **arguments):
        read.append(tuple(embeddings.shape[:2]))
        return forward(embeddings, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(talker.model.backbone, "forward", watched)
        run = decoder(talker, "speech_to_speech")
        fast = ids(run.run([sample]))[0]
    prompt = sample.layout.grid.shape[1]
    first = [(2, prompt)] if columns else [(1, prompt - 1), (2, 1)]
    assert read[: len(first)] == first
    assert fast == slow_batch_parallel(talker, sample, 24)


def test_batch_parallel_equals_the_slow_loop(talker, question):
    sample = heard(talker, question, "speech_to_speech")
    fast = ids(decoder(talker, "speech_to_speech").run([sample]))[0]
    assert fast == slow_batch_parallel(talker, sample, 24)


@pytest.mark.parametrize("task", ["text_to_speech", "text_to_text", "tts"])
@pytest.mark.parametrize(
    "settings", [{}, {"batch_parallel": False}, SAMPLED], ids=["greedy", "parallel", "sampled"]
)
def test_many_at_once_equal_each_alone(talker, task, settings):
    samples = [sample_of(talker, text, task) for text in QUESTIONS]
    given = [talker.processor.text_ids(text) for text in QUESTIONS] if task == "tts" else None
    together = ids(decoder(talker, task, **settings).run(samples, given=given))
    for index, sample in enumerate(samples):
        alone = decoder(talker, task, **settings).run([sample], given=given and [given[index]])
        assert ids(alone)[0] == together[index]


def test_recordings_of_different_lengths_equal_each_alone(talker, speak):
    paths = [speak(text) for text in ("Hi", "What is the capital of France?")]
    samples = [heard(talker, path, "speech_to_speech") for path in paths]
    together = ids(decoder(talker, "speech_to_speech").run(samples))
    for index, sample in enumerate(samples):
        assert ids(decoder(talker, "speech_to_speech").run([sample]))[0] == together[index]


def test_bases_that_are_not_exact_under_padding_run_apart(talker, monkeypatch):
    samples = [sample_of(talker, text, "text_to_speech") for text in QUESTIONS]
    together = ids(decoder(talker, "text_to_speech").run(samples))
    monkeypatch.setitem(talker.model.backbone.__dict__, "padding_is_exact", False)
    assert ids(decoder(talker, "text_to_speech").run(samples)) == together


def test_what_is_said_is_what_the_lm_would_have_written(talker):
    """Batch-parallel decoding: the text row carries no codes."""
    sample = sample_of(talker, QUESTIONS[0], "text_to_speech")
    spoken = ids(decoder(talker, "text_to_speech").run([sample]))[0]
    prompt = talker.processor.apply_chat_template([{"role": "user", "content": QUESTIONS[0]}])[0][0].ids
    base = talker.model.backbone.lm
    out = base.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0)
    text = [step[0] for step in spoken if step[0] != NO_TEXT]
    assert text == out[0, len(prompt) :].tolist()


def test_text_row_is_dropped_after_its_end_and_speech_row_after_its_own(talker):
    run = decoder(talker, "text_to_speech", max_new_tokens=30)
    sample = sample_of(talker, QUESTIONS[0], "text_to_speech")
    state = run.prefill(collate([sample], rules=talker.processor.rules))
    assert [row.role for row in state.rows] == ["speech", "text"]
    run.choose(state)
    state.text_done = torch.ones_like(state.text_done)
    step = run.choose(state)
    run._drop_finished(state, step)
    assert [row.role for row in state.rows] == ["speech"]
    run.advance(state)
    assert state.code_logits.shape[0] == 1


@pytest.mark.parametrize("max_new_tokens", [8, 9, 20])
def test_speech_ends_in_time(talker, max_new_tokens):
    steps = list(
        decoder(talker, "text_to_speech", max_new_tokens=max_new_tokens).run(
            [sample_of(talker, QUESTIONS[0], "text_to_speech")]
        )
    )
    assert len(steps) <= max_new_tokens
    assert steps[-1].finished == ("length",)
    assert all(step.finished == (None,) for step in steps[:-1])
    codes = torch.stack([step.codes[0] for step in steps], dim=-1)
    ends = codes == talker.processor.rules.vocabulary.end
    assert (ends.sum(dim=-1) == 1).all()


def test_stepping_by_hand_equals_running(talker):
    run, rules = decoder(talker, "text_to_speech"), talker.processor.rules
    sample = sample_of(talker, QUESTIONS[0], "text_to_speech")
    state = run.prefill(collate([sample], rules=rules))
    first = run.choose(state)
    run.advance(state)
    second = run.choose(state)
    expected = ids(run.run([sample]))[0][:2]
    assert [[*step.text.tolist(), *step.codes[0].tolist()] for step in (first, second)] == expected


def test_closing_early_frees_the_caches(talker):
    run = decoder(talker, "text_to_speech")
    steps = run.run([sample_of(talker, QUESTIONS[0], "text_to_speech")])
    for _ in range(3):
        next(steps)
    lane = steps.gi_frame.f_locals["running"][0][1]
    state = weakref.ref(lane.gi_frame.f_locals["state"])
    cache = weakref.ref(lane.gi_frame.f_locals["state"].cache)
    del lane
    steps.close()
    gc.collect()
    assert state() is None
    assert cache() is None


def test_prompts_beyond_the_positions_are_refused(talker):
    text = "word " * 3000
    with pytest.raises(ContextOverflowError, match=r"takes \d+ steps and the base LM knows 2048 positions"):
        list(decoder(talker, "text_to_text").run([sample_of(talker, text, "text_to_text")]))


def test_replies_stop_where_positions_end(talker):
    sample = sample_of(talker, "word " * 10, "text_to_speech")
    length = sample.layout.grid.shape[1]
    limit = talker.model.backbone.max_positions
    text = "word" * ((limit - length) // 4)
    while sample.layout.grid.shape[1] < limit - 12:
        text += " word"
        sample = sample_of(talker, text, "text_to_speech")
    steps = list(decoder(talker, "text_to_speech", max_new_tokens=500).run([sample]))
    assert sample.layout.grid.shape[1] + len(steps) <= limit
    assert steps[-1].finished == ("context",)


def test_settings_that_cannot_work_are_refused(talker):
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 8 for speech"):
        decoder(talker, "text_to_speech", max_new_tokens=7)
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1, got 0"):
        GenerationSettings(max_new_tokens=0)
    with pytest.raises(ConfigError, match="stride must be at least 1 frame, got 0"):
        GenerationSettings(stride=0)
    with pytest.raises(PromptError, match="this task takes one text per conversation"):
        list(decoder(talker, "tts").run([sample_of(talker, "a", "tts")]))


def read_in_pieces(run: Decoder, batch, ends: list[int], *, reserve: bool):
    """The state after a prompt that came in pieces, which end at the columns ``ends``."""
    heard = run.model.hear(batch.clips) if batch.clips else []
    state = run.open(prompt_steps=batch.grid.shape[-1] if reserve else None)
    starts = [0, *ends]
    for start, end in zip(starts, [*ends, batch.grid.shape[-1]], strict=True):
        inside, sounds = [], []
        for (row, first, length), embeddings in zip(batch.places, heard, strict=True):
            left, right = max(first, start), min(first + length, end)
            if left < right:
                inside.append((row, left - start, right - left))
                sounds.append(embeddings[left - first : right - first])
        part = run.close if end == batch.grid.shape[-1] else run.read
        part(state, batch.grid[..., start:end], places=inside, heard=sounds)
    return state


@pytest.mark.parametrize("reserve", [True, False], ids=["known", "growing"])
@pytest.mark.parametrize("task", ["speech_to_speech", "speech_to_text"])
def test_prompts_in_pieces_are_prompts_as_a_whole(talker, question, task, reserve):
    """Equal within rounding: a piece is multiplied apart from those before it."""
    run = decoder(talker, task, **SAMPLED)
    batch = collate([heard(talker, question, task)], rules=talker.processor.rules)
    whole, length = run.prefill(batch), batch.grid.shape[-1]
    for ends in ([], [1], [length - 1], [3, 3, 9, length - 2]):
        pieces = read_in_pieces(run, batch, ends, reserve=reserve)
        assert pieces.rows == whole.rows
        assert (pieces.length, pieces.max_steps) == (length, whole.max_steps)
        torch.testing.assert_close(pieces.write_logits, whole.write_logits, rtol=1e-4, atol=1e-5)
        if not ends:
            assert torch.equal(pieces.write_logits, whole.write_logits)
        if task == "speech_to_speech":
            torch.testing.assert_close(pieces.code_logits, whole.code_logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(pieces.seen_text, whole.seen_text)
        assert ids(run.steps(pieces)) == ids(run.run([heard(talker, question, task)]))


def test_prompts_that_are_left_half_read_leave_nothing_behind(talker, question):
    run = decoder(talker, "speech_to_speech")
    batch = collate([heard(talker, question, "speech_to_speech")], rules=talker.processor.rules)
    state = run.open(prompt_steps=batch.grid.shape[-1])
    run.read(state, batch.grid[..., :5])
    cache = weakref.ref(state.cache)
    del state
    gc.collect()
    assert cache() is None


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_feeding_before_looking_changes_nothing(talker, settings):
    """Where the host only queues work, a pass is queued before the ids of its step are read."""
    samples = [sample_of(talker, text, "text_to_speech") for text in QUESTIONS]
    plain, ahead = (decoder(talker, "text_to_speech", **settings) for _ in range(2))
    ahead.runs_ahead = True
    assert ids(ahead.run(samples)) == ids(plain.run(samples))


def test_heads_run_over_the_rows_that_need_them(talker):
    run = decoder(talker, "text_to_speech")
    sample = sample_of(talker, QUESTIONS[0], "text_to_speech")
    head, codes = talker.model.backbone.lm.get_output_embeddings(), talker.model.code_heads
    rows: dict[str, list[int]] = {"text": [], "codes": []}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: rows[name].append(inputs[0].shape[:2].numel())
        )
        for name, module in (("text", head), ("codes", codes))
    ]
    try:
        state = run.prefill(collate([sample, sample], rules=talker.processor.rules))
        assert rows == {"text": [2], "codes": [2]}  # last column alone: of the rows that write, that speak
        run.choose(state)
        state.text_done = torch.ones_like(state.text_done)
        run._drop_finished(state, run.choose(state))
        run.advance(state)
    finally:
        for hook in hooks:
            hook.remove()
    assert rows == {"text": [2], "codes": [2, 2]}


def test_memory_is_made_once(talker):
    run = decoder(talker, "text_to_speech", max_new_tokens=40)
    state = run.prefill(collate([sample_of(talker, QUESTIONS[0], "text_to_speech")], rules=run.rules))
    held = set()
    for step in run.steps(state):
        held.add((state.cache.backbone.nbytes, state.cache.tts.nbytes) if not any(step.finished) else (0, 0))
    assert len(held - {(0, 0)}) == 1
