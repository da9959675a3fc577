"""Predict the ids of all code rows in parallel.

Hidden states in, logits out: [B, S, D] -> [B, K, S, V]. Knows nothing of delays, sampling or codecs.
"""

from torch import Tensor, nn


class CodeHeads(nn.Module):
    """K linear heads beside the LM's text head (paper, section 3.2: parallel decoding), as one matrix.

    Args:
        width: width D of the hidden states.
        num_codebooks: rows K.
        vocabulary_size: ids V of one row.
    """

    def __init__(self, *, width: int, num_codebooks: int, vocabulary_size: int) -> None:
        super().__init__()
        self.num_codebooks = num_codebooks
        self.proj = nn.Linear(width, num_codebooks * vocabulary_size, bias=False)
        nn.init.normal_(self.proj.weight, std=width**-0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [B, K, S, V] of hidden states [B, S, D]."""
        logits: Tensor = self.proj(hidden)
        return logits.view(*hidden.shape[:2], self.num_codebooks, -1).transpose(1, 2)
