"""Embed a grid of codes and marks, and fuse it with the text of the same steps.

Ids in, embeddings out: [B, K, S] -> [B, S, D]. Knows nothing of codecs, delays or LMs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni_adapter.config import Fusion
from omni_adapter.errors import ConfigError
from omni_adapter.vocab import CodeVocabulary


class CodeEmbedding(nn.Module):
    """One table for the ids of all K code rows; a step's embedding is the sum over its rows.

    With fusion ``add`` the pad id counts as zero and never learns, so that steps without codes keep the LM's
    own text embedding, bit for bit. With ``mean`` it is an id like any other, as in the original.

    Args:
        num_codebooks: rows K.
        vocabulary: ids of one row.
        width: width D of the LM's embeddings.
        rms: root mean square that a step's sum shall start with; the LM's own embedding table's.
        fusion: how codes and text of a step become one embedding.
    """

    def __init__(
        self, *, num_codebooks: int, vocabulary: CodeVocabulary, width: int, rms: float, fusion: Fusion
    ) -> None:
        super().__init__()
        if fusion not in ("add", "mean"):
            raise ConfigError(f"fusion must be 'add' or 'mean', got {fusion!r}")
        self.num_codebooks = num_codebooks
        self.vocabulary = vocabulary
        self.fusion = fusion
        self.weight = nn.Parameter(
            torch.randn(num_codebooks * vocabulary.size, width) * rms / num_codebooks**0.5
        )

    def forward(self, codes: Tensor) -> Tensor:
        """Return the sum over the rows, [B, S, D], of a grid of ids [B, K, S]."""
        batch, rows, steps = codes.shape
        offsets = torch.arange(rows, device=codes.device)[:, None] * self.vocabulary.size
        ids = codes + offsets  # [B, K, S], rows of the joint table
        padding_idx = None
        if self.fusion == "add":
            padding_idx = self.vocabulary.pad
            ids = torch.where(codes == self.vocabulary.pad, padding_idx, ids)
        bags = ids.transpose(1, 2).reshape(batch * steps, rows)
        embeddings = F.embedding_bag(bags, self.weight, mode="sum", padding_idx=padding_idx)  # [B*S, D]
        return embeddings.view(batch, steps, -1)

    def fuse(self, text: Tensor, codes: Tensor) -> Tensor:
        """Return what the LM is fed, [B, S, D].

        Args:
            text: embeddings of the text row, [B, S, D].
            codes: sums over the code rows, [B, S, D].
        """
        if self.fusion == "add":
            return text + codes
        return (text + codes) / (self.num_codebooks + 1)

    def spread(self, heard: Tensor) -> Tensor:
        """Return the sum over the code rows of adapter output [..., D] that stands in all of them.

        The original writes the adapter's output into each of its K audio rows, so under ``mean`` it counts K
        times.
        """
        return heard * self.num_codebooks if self.fusion == "mean" else heard
