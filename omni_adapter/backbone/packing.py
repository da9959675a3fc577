"""Several samples in one row, so that none sees another.

Steps with a mask of which step sees which, bool [B, 1, S, S], in; the same steps as this LM keeps them apart
out. Which way an LM takes is found by running it. Knows nothing of what samples are or how rows are filled.
"""

from typing import Literal

import torch

from omni_adapter.backbone.inspection import class_name
from omni_adapter.backbone.probes import PROBE_STEPS, Tolerated, is_close, probe, sample
from omni_adapter.backbone.runner import Runner, Steps
from omni_adapter.errors import BackboneError

Packing = Literal["positions", "mask"]
"""What keeps samples in one row apart: positions that start anew, or a mask of which step sees which."""

_WAYS: tuple[Packing, ...] = ("positions", "mask")  # the cheaper one first


def keep_apart(steps: Steps, runner: Runner, *, packing: Packing | None) -> Steps:
    """Return packed steps as the LM takes them.

    Args:
        steps: packed ones, mask bool [B, 1, S, S], positions that start anew with each sample.
        runner: the LM.
        packing: what ``find_packing`` says of it.

    Raises:
        BackboneError: if it does not keep samples apart, or not over so many steps.
    """
    name, length = class_name(runner.lm), steps.embeddings.shape[1]
    if packing is None:
        raise BackboneError(
            f"{name} cannot keep samples in one row apart; train it without packing, or load "
            'it with attn_implementation="sdpa"'
        )
    window = getattr(runner.lm.config.get_text_config(), "sliding_window", None)
    if packing == "mask" and isinstance(window, int) and length > window:
        raise BackboneError(
            f"packed rows of {name} must be no longer than its attention window of {window} "
            f"steps, got {length}; train it without packing"
        )
    return _apart(steps, packing)


def _apart(steps: Steps, packing: Packing) -> Steps:
    """Packed steps with positions alone, or with a mask to add to attention scores as well."""
    if packing == "positions" or steps.attention_mask is None:
        return Steps(steps.embeddings, position_ids=steps.position_ids)
    dtype = steps.embeddings.dtype
    scores = torch.zeros_like(steps.attention_mask, dtype=dtype)
    scores = scores.masked_fill(~steps.attention_mask.bool(), torch.finfo(dtype).min)
    return Steps(steps.embeddings, scores, steps.position_ids)


@probe
def find_packing(runner: Runner) -> Packing | None:
    """Compare two samples in one row with the same samples alone; two rows, as some kernels know only one."""
    half = PROBE_STEPS // 2
    row = sample(runner).repeat(2, 1, 1)
    alone = torch.cat([runner.run(Steps(part)).hidden for part in (row[:, :half], row[:, half:])], dim=1)
    steps = torch.arange(PROBE_STEPS, device=row.device)
    visible = (steps[:, None] >= steps) & (steps[:, None] // half == steps // half)
    packed = Steps(row, visible.expand(2, 1, -1, -1), (steps % half).expand(2, -1))
    for way in _WAYS:
        with Tolerated():
            if is_close(runner.run(_apart(packed, way)).hidden, alone, runner=runner):
                return way
    return None
