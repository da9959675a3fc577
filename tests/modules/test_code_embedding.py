import pytest
import torch

from omni_adapter.errors import ConfigError
from omni_adapter.modules.code_embedding import CodeEmbedding
from omni_adapter.vocab import CodeVocabulary

VOCABULARY = CodeVocabulary(16)


def embedding(fusion: str = "add") -> CodeEmbedding:
    torch.manual_seed(0)
    return CodeEmbedding(num_codebooks=3, vocabulary=VOCABULARY, width=8, rms=0.5, fusion=fusion).double()


def random_codes() -> torch.Tensor:
    return torch.randint(0, VOCABULARY.num_ids, (2, 3, 5), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fusion", ["add", "mean"])
def test_equals_slow_loop(fusion):
    table, codes = embedding(fusion), random_codes()
    expected = torch.zeros(2, 5, 8, dtype=torch.float64)
    for sample in range(2):
        for row in range(3):
            for step in range(5):
                code = int(codes[sample, row, step])
                if fusion == "mean" or code != VOCABULARY.pad:
                    expected[sample, step] += table.weight[row * VOCABULARY.size + code]
    torch.testing.assert_close(table(codes), expected)


def test_pad_is_exactly_zero_and_never_learns():
    table = embedding()
    codes = torch.full((1, 3, 4), VOCABULARY.pad)
    assert torch.equal(table(codes), torch.zeros(1, 4, 8, dtype=torch.float64))
    codes[:, :, 0] = 3
    table(codes).sum().backward()
    learned = table.weight.grad.abs().sum(-1).nonzero()[:, 0].tolist()
    assert learned == [3, VOCABULARY.size + 3, 2 * VOCABULARY.size + 3]


def test_text_comes_through_add_bit_for_bit():
    table, text = embedding(), torch.randn(1, 4, 8, dtype=torch.float64)
    pads = torch.full((1, 3, 4), VOCABULARY.pad)
    assert torch.equal(table.fuse(text, table(pads)), text)


def test_mean_weighs_every_stream_alike():
    table = embedding("mean")
    text, heard = torch.ones(1, 1, 8).double(), torch.full((1, 1, 8), 2.0).double()
    fused = table.fuse(text, table.spread(heard))
    torch.testing.assert_close(fused, torch.full_like(fused, (1 + 3 * 2) / 4))


def test_steps_start_at_the_scale_of_the_text_table():
    torch.manual_seed(0)
    table = CodeEmbedding(num_codebooks=7, vocabulary=CodeVocabulary(512), width=64, rms=0.02, fusion="add")
    codes = torch.randint(0, 512, (1, 7, 2000))
    assert float(table(codes).square().mean().sqrt()) == pytest.approx(0.02, rel=0.05)


def test_unknown_fusion_is_refused():
    with pytest.raises(ConfigError, match="fusion must be 'add' or 'mean', got 'sum'"):
        embedding("sum")
