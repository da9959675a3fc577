import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_adapter.audio.delay import delay_codes
from omni_adapter.errors import ConfigError
from omni_adapter.generation.sampling import (
    CodeAutomaton,
    FreeRows,
    SamplingSettings,
    most_likely,
    penalise,
    sample,
)
from omni_adapter.vocab import CodeVocabulary

VOCABULARY = CodeVocabulary(8)


def run(delays: tuple[int, ...], max_steps: list[int], seed: int, sampling: SamplingSettings) -> torch.Tensor:
    """Ids [B, K, S] that come out when logits are random."""
    generator = torch.Generator().manual_seed(seed)
    automaton = CodeAutomaton(
        VOCABULARY, delays=delays, max_steps=torch.tensor(max_steps), device=torch.device("cpu")
    )
    steps = []
    while not automaton.finished.all():
        shape = (len(max_steps), len(delays))
        logits = automaton.mask(torch.randn(*shape, VOCABULARY.size, generator=generator) * 3)
        uniform = torch.rand(shape, generator=generator).flatten()
        drawn = sample(logits.flatten(0, 1), sampling, uniform=uniform).view(shape)
        steps.append(automaton.advance(drawn))
    return torch.stack(steps, dim=-1)


@settings(max_examples=150, deadline=None)
@given(
    delays=st.lists(st.integers(0, 5), min_size=1, max_size=7).map(tuple),
    extra=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    seed=st.integers(0, 10_000),
    greedy=st.booleans(),
)
def test_only_delayed_grids_can_come_out(delays, extra, seed, greedy):
    least = CodeAutomaton.least_steps(delays)
    grid = run(delays, [least + more for more in extra], seed, SamplingSettings(do_sample=not greedy))
    lead = delays.index(min(delays))
    for ids, more in zip(grid, extra, strict=True):
        frames = int((ids[lead] == VOCABULARY.end).nonzero()[0]) - min(delays)
        assert frames <= more
        codes = torch.stack([ids[row, delay : delay + frames] for row, delay in enumerate(delays)])
        assert ((codes >= 0) & (codes < VOCABULARY.codebook_size)).all()
        expected = delay_codes(codes[None], delays=delays, fill=VOCABULARY.pad, end=VOCABULARY.end)[0]
        assert torch.equal(ids[:, : expected.shape[1]], expected)
        assert (ids[:, expected.shape[1] :] == VOCABULARY.pad).all()


def test_speech_is_ended_in_time_and_said_to_be_cut():
    delays = (1, 2, 3)
    automaton = CodeAutomaton(
        VOCABULARY, delays=delays, max_steps=torch.tensor([6, 9]), device=torch.device("cpu")
    )
    for _ in range(6):
        automaton.advance(torch.zeros(2, 3, dtype=torch.long))
    assert automaton.finished.tolist() == [True, False]
    assert automaton.cut.tolist() == [True, False]
    assert automaton.frames.tolist() == [2, -1]


def test_greedy_takes_the_most_likely():
    logits = torch.tensor([[0.1, 0.9, 0.3], [2.0, 1.0, 0.0]])
    assert sample(logits, SamplingSettings()).tolist() == [1, 0]
    assert sample(logits, SamplingSettings(do_sample=True, temperature=0)).tolist() == [1, 0]


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    uniform = torch.linspace(0, 1, 10_001)[:-1]
    ids = sample(probabilities.log().expand(10_000, -1), SamplingSettings(do_sample=True), uniform=uniform)
    shares = torch.bincount(ids, minlength=3) / 10_000
    torch.testing.assert_close(shares, probabilities, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (SamplingSettings(do_sample=True, top_k=2), {0, 1}),
        (SamplingSettings(do_sample=True, top_p=0.5), {0}),
        (SamplingSettings(do_sample=True, top_p=0.51), {0, 1}),
        (SamplingSettings(do_sample=True, top_k=1), {0}),
        (SamplingSettings(do_sample=True, temperature=1e-4), {0}),
        (SamplingSettings(do_sample=True), {0, 1, 2}),
    ],
)
def test_truncation(sampling, possible):
    logits = torch.tensor([0.5, 0.3, 0.2, 0.0]).log().expand(1000, -1)
    uniform = torch.linspace(0, 1, 1001)[:-1]
    assert set(sample(logits, sampling, uniform=uniform).tolist()) == possible


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True), st.floats(0.01, 1), st.integers(0, 6))
def test_masked_ids_are_never_drawn(seed, uniform, top_p, top_k):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 6, generator=generator) * 10
    masked = torch.rand(6, generator=generator) < 0.6
    masked[seed % 6] = False
    logits[0, masked] = -torch.inf
    sampling = SamplingSettings(do_sample=True, top_p=top_p, top_k=top_k)
    drawn = sample(logits, sampling, uniform=torch.tensor([uniform]))
    assert not masked[int(drawn)]


def test_repetition_penalty():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    seen = torch.tensor([[True, True, False]])
    assert penalise(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0]]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"temperature": -1}, "temperature must be >= 0, got -1"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
        ({"top_k": -1}, "top_k must be >= 0, 0 for all, got -1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be > 0"),
    ],
)
def test_wrong_settings_are_refused(settings_, message):
    with pytest.raises(ConfigError, match=message):
        SamplingSettings(**settings_)


def test_free_rows_write_what_they_will_until_the_last_one_ends():
    vocabulary = CodeVocabulary(8)
    rows = FreeRows(vocabulary, delays=(1, 2, 3), max_steps=torch.tensor([9, 9]), device=torch.device("cpu"))
    logits = torch.randn(2, 3, vocabulary.size)
    assert torch.equal(rows.mask(logits), logits)
    end, pad = vocabulary.end, vocabulary.pad
    early = torch.tensor([[end, pad, 3], [5, end, vocabulary.input]])
    assert torch.equal(rows.advance(early), early)
    assert rows.finished.tolist() == [False, False]
    assert rows.advance(torch.tensor([[1, 2, end], [1, 2, 3]])).tolist() == [[1, 2, end], [1, 2, 3]]
    assert rows.finished.tolist() == [True, False]
    assert rows.advance(torch.tensor([[1, 2, 3], [4, 5, end]])).tolist() == [[pad] * 3, [4, 5, end]]
    assert rows.finished.tolist() == [True, True]
    assert rows.cut.tolist() == [False, False]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0, 1, 5, 700]),
    st.sampled_from([0.3, 0.9, 0.9999, 1.0]),
    st.floats(0.2, 3),
)
def test_shortcuts_draw_what_a_sorted_vocabulary_does(seed, top_k, top_p, temperature):
    """Candidates are looked for in part of a vocabulary; the ids that may come are those of all of it."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 600, generator=generator) * 3
    logits[:, ::7] = -torch.inf
    sampling = SamplingSettings(do_sample=True, top_k=top_k, top_p=top_p, temperature=temperature)
    order = logits.sort(dim=-1, descending=True).indices
    for row in range(2):
        expected = (logits[row, order[row]] / temperature).softmax(-1)
        if top_k:
            expected[top_k:] = 0
            expected /= expected.sum()
        expected[expected.cumsum(-1) - expected >= top_p] = 0
        expected = torch.zeros(600).index_put((order[row],), expected / expected.sum())
        uniform = (torch.arange(4000) + 0.5) / 4000
        drawn = sample(logits[row].expand(4000, -1), sampling, uniform=uniform)
        shares = torch.bincount(drawn, minlength=600) / 4000
        torch.testing.assert_close(shares, expected, rtol=0, atol=1e-3)


def test_of_equally_likely_ids_the_lower_come_first():
    sampling = SamplingSettings(do_sample=True, top_k=3)
    logits = torch.tensor([[0.0, 5.0, 5.0, 5.0, 1.0]]).expand(3, -1)
    assert sample(logits, sampling, uniform=torch.tensor([0.1, 0.5, 0.9])).tolist() == [1, 2, 3]


@pytest.mark.parametrize("size", [5, 512 * 32, 512 * 32 + 1, 512 * 40 - 3])
@pytest.mark.parametrize("values", [2, 1000])
def test_the_most_likely_id_is_the_first_of_the_largest(size, values):
    generator = torch.Generator().manual_seed(size)
    logits = torch.randint(values, (6, size), generator=generator).float()
    logits[1] = -torch.inf
    logits[2, -1] = logits[3, 0] = values
    logits[4, :-1] = -torch.inf
    assert torch.equal(most_likely(logits), logits.argmax(dim=-1))
