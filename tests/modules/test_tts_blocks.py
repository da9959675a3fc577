import pytest
import torch

from omni_adapter.config import TtsConfig
from omni_adapter.errors import ConfigError, ContextOverflowError
from omni_adapter.modules.tts_blocks import TtsBlocks, TtsCache

WIDTH = 32


def blocks(**settings) -> TtsBlocks:
    torch.manual_seed(0)
    config = TtsConfig(**{"layers": 2, "heads": 4, "kv_heads": 2, "init": "scaled", **settings})
    return TtsBlocks(width=WIDTH, config=config).double()


def states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("parts", [[9], [5, 4], [1] * 9, [3, 1, 5]])
def test_cached_equals_whole(parts):
    tts, hidden, cache = blocks(), states(2, 9), TtsCache()
    pieces = [tts(piece, cache=cache) for piece in hidden.split(parts, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), tts(hidden), rtol=0, atol=1e-12)
    assert cache.length == 9


def test_cache_grows_beyond_its_first_capacity():
    tts, hidden, cache = blocks(layers=1), states(1, 600), TtsCache()
    pieces = [tts(piece, cache=cache) for piece in hidden.split([1] * 10 + [290, 300], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), tts(hidden), rtol=0, atol=1e-12)


def test_later_steps_do_not_reach_earlier_ones():
    tts, hidden = blocks(), states(1, 8)
    changed = hidden.clone()
    changed[:, 5:] += 1
    assert torch.equal(tts(hidden)[:, :5], tts(changed)[:, :5])


def test_left_padding_equals_alone():
    tts, hidden = blocks(), states(2, 7)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = tts(hidden, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(padded[1, 3:], tts(hidden[1:, 3:])[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(padded[0], tts(hidden[:1])[0], rtol=0, atol=1e-12)
    assert padded.isfinite().all()


def test_rows_of_the_cache_can_be_repeated_and_dropped():
    tts, hidden, cache = blocks(), states(3, 6), TtsCache()
    tts(hidden[:, :5], cache=cache)
    cache.select_rows(torch.tensor([2, 0, 2]))
    after = tts(hidden[[2, 0, 2], 5:], cache=cache)
    torch.testing.assert_close(after, tts(hidden[[2, 0, 2]])[:, 5:], rtol=0, atol=1e-12)


def test_a_cache_of_fixed_size_gives_the_same_bits_and_takes_its_memory_once():
    tts, hidden = blocks(), states(2, 9)
    fixed, growing = TtsCache(capacity=9, rows=2), TtsCache()
    for index, piece in enumerate(hidden.split([4, 1, 1, 2, 1], dim=1)):
        assert torch.equal(tts(piece, cache=fixed), tts(piece, cache=growing))
        assert fixed.nbytes == 2 * 2 * 2 * 2 * 9 * 8 * 8, (
            index
        )  # blocks, k and v, rows, heads, steps, width, bytes
    with pytest.raises(ContextOverflowError, match="made for 9 steps"):
        tts(hidden[:, :1], cache=fixed)


@pytest.mark.parametrize("late", [2, 6])
def test_rows_that_join_later_equal_themselves_alone(late):
    """Fewer or more steps than the batch has by then; a row leaves, and its place is taken."""
    tts, hidden = blocks(), states(3, 10)
    batch, mask = TtsCache(capacity=12, rows=2), torch.ones(2, 3, dtype=torch.long)
    tts(hidden[:2, :3], cache=batch)
    with torch.no_grad():
        for buffer in (*batch.keys, *batch.values):
            buffer._storage[1].fill_(torch.nan)  # the leaving row's place must not be read again
            buffer._storage[:, :, 3:] = torch.nan
    batch.select_rows(torch.tensor([0]))
    newcomer = TtsCache(capacity=late)
    tts(hidden[2:, :late], cache=newcomer)
    batch.join(newcomer)
    columns = max(3, late)
    assert batch.length == columns
    mask = torch.zeros(2, columns, dtype=torch.long)
    for row, steps in enumerate((3, late)):
        mask[row, columns - steps :] = 1
    for step in range(2):
        mask = torch.cat((mask, mask.new_ones(2, 1)), dim=1)
        new = torch.cat((hidden[:1, 3 + step :][:, :1], hidden[2:, late + step :][:, :1]))
        after = tts(new, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1, cache=batch)
        torch.testing.assert_close(after[0], tts(hidden[:1])[0, 3 + step : 4 + step], rtol=0, atol=1e-12)
        torch.testing.assert_close(
            after[1], tts(hidden[2:])[0, late + step : late + step + 1], rtol=0, atol=1e-12
        )


def test_columns_that_no_row_needs_are_forgotten():
    """Once the longest row has left, the columns in front hold only padding; the mask may still have them."""
    tts, hidden = blocks(), states(2, 10)
    batch, late = TtsCache(capacity=10), TtsCache(capacity=2)
    tts(hidden[:1, :6], cache=batch)
    tts(hidden[1:, :2], cache=late)
    batch.join(late)
    batch.select_rows(torch.tensor([1]))
    batch.trim(4)
    assert (batch.length, batch.keys[0].steps) == (2, 2)
    mask, positions = torch.tensor([[0, 0, 0, 0, 1, 1, 1]]), torch.tensor([[2]])
    after = tts(hidden[1:, 2:3], attention_mask=mask, position_ids=positions, cache=batch)
    torch.testing.assert_close(after, tts(hidden[1:])[:, 2:3], rtol=0, atol=1e-12)


def test_identity_init_only_normalises():
    tts, hidden = blocks(init="identity"), states(1, 4)
    torch.testing.assert_close(tts(hidden), tts.norm(hidden))


def test_without_blocks_nothing_changes():
    hidden = states(1, 4)
    assert blocks(layers=0)(hidden) is hidden


def test_scaled_init_depends_on_depth():
    shallow, deep = blocks(layers=1), blocks(layers=4)
    ratio = shallow.blocks[0].down.weight.std() / deep.blocks[0].down.weight.std()
    assert 1.7 < ratio < 2.3


def test_gradient_reaches_every_weight():
    tts = blocks()
    tts(states(1, 4)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in tts.parameters())


def test_checkpointed_gradients_are_the_same():
    plain, checkpointed, hidden = blocks(), blocks(), states(2, 5)
    checkpointed.gradient_checkpointing = True
    for tts in (plain, checkpointed):
        tts(hidden).square().sum().backward()
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize(
    ("width", "settings", "message"),
    [
        (32, {"heads": 5}, "must divide the LM's width 32.*heads=5"),
        (32, {"heads": 4, "kv_heads": 3}, "heads=4, kv_heads=3"),
        (33, {"heads": None, "kv_heads": None}, "even width, the base LM has 33; use tts_layers=0"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(width, settings, message):
    with pytest.raises(ConfigError, match=message):
        TtsBlocks(width=width, config=TtsConfig(**{"layers": 1, **settings}))


def test_paper_size():
    # The TTS adapter of the 0.5B shape has about 115.6 M weights with heads, 89.5 M of them in the blocks.
    with torch.device("meta"):
        config = TtsConfig(layers=6, heads=14, kv_heads=2, intermediate_width=4864)
        tts = TtsBlocks(width=896, config=config)
    assert sum(parameter.numel() for parameter in tts.parameters()) == pytest.approx(89.5e6, rel=2e-3)


def test_biases_of_query_key_and_value():
    biased, plain = blocks(qkv_bias=True), blocks()
    new = dict(biased.named_parameters()).keys() - dict(plain.named_parameters()).keys()
    assert new == {f"blocks.{i}.{part}.bias" for i in range(2) for part in ("query", "key", "value")}
    plain.load_state_dict(biased.state_dict(), strict=False)
    hidden = states(1, 5)
    assert torch.equal(biased(hidden), plain(hidden))  # they begin at zero
    for part in ("query", "key", "value"):
        torch.nn.init.normal_(getattr(biased.blocks[0], part).bias)
    cache = TtsCache()
    steps = torch.cat([biased(step, cache=cache) for step in hidden.split(1, dim=1)], dim=1)
    torch.testing.assert_close(steps, biased(hidden))
    assert not torch.allclose(steps, plain(hidden))


def test_no_blocks_read_no_state_before_the_norm():
    with pytest.raises(ValueError, match='input="before_norm" needs layers, whose own norm'):
        TtsConfig(layers=0, input="before_norm")
