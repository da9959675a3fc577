import torch

from omni_adapter.modules.code_heads import CodeHeads


def test_each_row_has_its_own_head():
    heads = CodeHeads(width=6, num_codebooks=3, vocabulary_size=10)
    hidden = torch.randn(2, 4, 6)
    logits = heads(hidden)
    assert logits.shape == (2, 3, 4, 10)
    for row in range(3):
        weight = heads.proj.weight[row * 10 : (row + 1) * 10]
        torch.testing.assert_close(logits[:, row], hidden @ weight.T)
