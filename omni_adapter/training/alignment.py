"""What recordings say, as a loss on the embeddings that the LM is fed for them.

Embeddings of recordings and ids of transcripts in, one number out: connectionist temporal classification
(CTC, Graves et al. 2006) whose scores are cosines to the LM's own word embeddings. Each step of a recording
learns to be a word or none, in order; where the words lie need not be known. It tells the audio adapter
directly what stage 1 otherwise finds out through the whole LM. Knows nothing of encoders, prompts or rows.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

SHARPNESS = 20.0
"""By how much a cosine is multiplied to become a logit."""

BLANK_COSINE = 0.5
"""A step is no word if its embedding is less similar than this to every word."""


def transcript_loss(
    heard: Sequence[Tensor],
    transcripts: Sequence[Sequence[int] | None],
    embed: Callable[[Tensor], Tensor],
    *,
    device: torch.device,
) -> Tensor:
    """Return the negative log-likelihood of transcripts, summed over recordings, a scalar.

    The ids of all transcripts of a batch are what each of them is told from, so that the cost does not depend
    on the size of the vocabulary. A transcript that is longer than its recording has steps adds nothing.

    Args:
        heard: embeddings of each recording, [A, D].
        transcripts: ids of what each recording says; None or nothing where that is unknown.
        embed: embeddings [1, n, D] of ids [1, n]; called once, whatever the batch holds, as processes that
            share sharded weights must call each module equally often.
        device: of the embeddings.
    """
    known = [(steps, ids) for steps, ids in zip(heard, transcripts, strict=True) if ids]
    ids, places = torch.unique(
        torch.tensor([one for _, ids in known for one in ids] or [0], device=device), return_inverse=True
    )
    with torch.no_grad():
        words = embed(ids[None])[0].float()  # [n, D]
    if not known:
        return words.new_zeros(())
    shared = words.mean(dim=0) if len(words) > 1 else torch.zeros_like(words[0])
    with torch.autocast(device.type, enabled=False):
        steps = pad_sequence([steps.float() for steps, _ in known])  # [A, B, D]
        cosines = F.normalize(steps - shared, dim=-1) @ F.normalize(words - shared, dim=-1).T  # [A, B, n]
        scores = SHARPNESS * F.pad(cosines, (1, 0), value=BLANK_COSINE)
        return F.ctc_loss(
            scores.log_softmax(dim=-1),
            places + 1,
            torch.tensor([len(steps) for steps, _ in known]),
            torch.tensor([len(ids) for _, ids in known]),
            reduction="sum",
            zero_infinity=True,
        )
