from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.untrained_talker import make_parts, make_tokenizer
from omni_adapter import OmniAdapter
from omni_adapter.config import TtsConfig
from omni_adapter.data.collator import PADDING, collate, segment_mask
from omni_adapter.data.packing import bucket, collate_packed, pack
from omni_adapter.data.rows import parse_row, to_sample
from omni_adapter.errors import BackboneError, DataError
from omni_adapter.modules.tts_blocks import TtsBlocks
from omni_adapter.vocab import IGNORE_INDEX
from tests.families import build_fresh

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@given(LENGTHS)
def test_packing_loses_nothing_and_fits(lengths):
    rows = pack(lengths, max_steps=40)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    fills = [sum(lengths[index] for index in row) for row in rows]
    assert max(fills) <= 40
    assert sum(fill <= 20 for fill in fills) <= 1, "no two rows would fit into one"


def test_packing_takes_the_longest_first():
    assert pack([5, 9, 1, 4], max_steps=10) == [[1, 2], [0, 3]]
    with pytest.raises(DataError, match="a sample of 11 steps does not fit into rows of 10"):
        pack([11], max_steps=10)


@given(LENGTHS, st.integers(1, 7), st.integers(0, 5))
def test_bucketing_loses_nothing_and_groups_by_length(lengths, size, seed):
    groups = bucket(lengths, batch_size=size, generator=torch.Generator().manual_seed(seed))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    spans = sorted((min(lengths[i] for i in group), max(lengths[i] for i in group)) for group in groups)
    assert all(one[1] <= other[0] for one, other in pairwise(spans))


def test_a_step_sees_its_own_sample_only():
    expected = """
        1.....
        11....
        ..1...
        ..11..
        ..111.
        .....1
    """.split()
    visible = segment_mask(torch.tensor([[0, 0, 1, 1, 1, PADDING]]))
    assert ["".join(".1"[int(seen)] for seen in row) for row in visible[0, 0]] == expected


def make_talker(family: str) -> OmniAdapter:
    parts = make_parts()
    tokenizer = make_tokenizer()
    lm = build_fresh(family, vocab_size=len(tokenizer), max_position_embeddings=1024, n_positions=1024)
    talker = OmniAdapter.wrap(
        lm, tokenizer=tokenizer, encoder=parts.whisper, codec=_codec(parts), tts_layers=2
    )
    torch.manual_seed(0)
    # Blocks that start as the identity would hide what they do.
    width = talker.config.hidden_width
    talker.model.tts_blocks = TtsBlocks(width=width, config=TtsConfig(layers=2, init="scaled")).eval()
    return talker


def _codec(parts):
    from omni_adapter import SnacCodec

    return SnacCodec.from_model(parts.snac)


@pytest.fixture(scope="module")
def rows(speak) -> list:
    codes = torch.randint(64, (7, 9), generator=torch.Generator().manual_seed(0)).tolist()
    hello, question = speak("Hello."), speak("What is the capital of France?")
    return [
        parse_row(
            {"id": "a", "audio_in": hello, "text_out": "I am fine.", "codes_out": codes},
            task="speech_to_speech",
        ),
        parse_row({"id": "b", "text_in": "How are you today?", "text_out": "Fine."}, task="text_to_text"),
        parse_row({"id": "c", "audio_in": question, "text_in": "What is the capital?"}, task="asr"),
        parse_row({"id": "d", "text_out": "Yes, of course.", "codes_out": codes}, task="tts"),
        parse_row(
            {"id": "e", "text_in": "Tell me", "text_out": "Once", "codes_out": codes}, task="text_to_speech"
        ),
    ]


def run(talker, batch) -> tuple[torch.Tensor, torch.Tensor]:
    output = talker.model(
        batch.grid,
        places=batch.places,
        clips=batch.clips,
        attention_mask=batch.model_mask,
        position_ids=batch.position_ids,
    )
    return output.text_logits, output.code_logits


def loss(talker, batch) -> torch.Tensor:
    """Sum of all cross-entropies of a batch, the plain way."""
    text, codes = run(talker, batch)
    labels = batch.labels[..., 1:]
    sums = [
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), row.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        for logits, row in (
            (text, labels[:, -1]),
            *zip(codes.unbind(1), labels[:, :-1].unbind(1), strict=True),
        )
    ]
    return torch.stack(sums).sum()


@pytest.mark.parametrize(
    ("family", "way"),
    [("llama", "positions"), ("gpt2", "positions"), ("mistral", "positions"), ("opt", "mask")],
)
def test_packed_equals_unpacked(family, way, rows):
    """Rotary and learned positions, sliding windows, and an LM that must be given the mask."""
    talker = make_talker(family)
    assert talker.model.backbone.packing == way
    samples = [to_sample(row, talker.processor) for row in rows]
    rules = talker.processor.rules
    packed = collate_packed([samples[:2], samples[2:]], rules=rules)
    assert packed.ids == ("a", "b", "c", "d", "e")
    text, codes = run(talker, packed)
    starts = {}
    for row, members in enumerate((samples[:2], samples[2:])):
        start = 0
        for sample in members:
            starts[sample.id] = (row, start, start + sample.layout.grid.shape[1])
            start = starts[sample.id][2]
    for sample in samples:
        row, start, stop = starts[sample.id]
        alone_text, alone_codes = run(talker, collate([sample], rules=rules))
        torch.testing.assert_close(text[row, start:stop], alone_text[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(codes[row, :, start:stop], alone_codes[0], rtol=1e-4, atol=1e-4)


def test_packed_gradients_equal_unpacked(rows):
    talker = make_talker("llama")
    samples = [to_sample(row, talker.processor) for row in rows]
    rules = talker.processor.rules
    parameters = [p for name, p in talker.model.named_parameters() if not name.startswith("audio_encoder")]
    packed = loss(talker, collate_packed([samples[:3], samples[3:]], rules=rules))
    alone = torch.stack([loss(talker, collate([sample], rules=rules)) for sample in samples]).sum()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-4)
    for one, other in zip(
        torch.autograd.grad(packed, parameters, allow_unused=True),
        torch.autograd.grad(alone, parameters, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()) + 1e-6)


@pytest.mark.parametrize("family", ["mamba2", "bloom"])
def test_an_lm_that_cannot_be_packed_says_so(family, rows):
    """States and position biases run on from one sample to the next."""
    talker = make_talker(family)
    assert talker.model.backbone.packing is None
    samples = [to_sample(row, talker.processor) for row in rows[:2]]
    with pytest.raises(BackboneError, match="cannot keep samples in one row apart"):
        run(talker, collate_packed([samples], rules=talker.processor.rules))


def test_a_packed_batch_in_full(talker, rows):
    samples = [to_sample(row, talker.processor) for row in rows]
    rules = talker.processor.rules
    lengths = [sample.layout.grid.shape[1] for sample in samples]
    batch = collate_packed([[samples[1], samples[0]], [samples[2]]], rules=rules)
    assert batch.segments is not None
    assert batch.segments[0].tolist()[: lengths[1] + lengths[0]] == [0] * lengths[1] + [1] * lengths[0]
    assert batch.position_ids[0, lengths[1]] == 0
    (span,) = samples[0].layout.spans
    assert batch.places[0] == (0, lengths[1] + span.start, span.length)
    assert batch.clips is not None
    assert batch.clips.windows == (1, 1)
    assert int(batch.attention_mask.sum()) == lengths[0] + lengths[1] + lengths[2]
    assert bool(
        (batch.labels[batch.attention_mask[:, None].expand_as(batch.labels) == 0] == IGNORE_INDEX).all()
    )
    steps = batch.grid.shape[-1]
    assert batch.model_mask.shape == (2, 1, steps, steps)
    moved = batch.to("cpu")
    assert moved.ids == batch.ids == ("b", "a", "c")
    assert torch.equal(moved.segments, batch.segments)


def test_the_mask_is_as_small_as_it_can_be(talker, rows):
    samples = [to_sample(row, talker.processor) for row in rows[:2]]
    rules = talker.processor.rules
    assert collate(samples[:1], rules=rules).model_mask is None
    assert collate(samples, rules=rules).model_mask.dim() == 2
