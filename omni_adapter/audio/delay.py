"""Shift each code row by its delay, and back.

Codes in, codes out: [B, K, T] <-> [B, K, S]. Knows nothing of codecs or models, and no ids but ``fill`` and
``end``, which the caller passes in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_adapter.errors import CodeGridError


@dataclass
class UndelayState:
    """What a streaming undelay remembers between chunks; a fresh one starts a new grid.

    Attributes:
        pending: steps of frames not yet complete, [B, K, at most max(delays)]; None before the first chunk.
        lengths: frames of codes given out so far, [B]; stops counting for a conversation at its end id.
        ended: whether the end id of a conversation has come, [B].
    """

    pending: Tensor | None = None
    lengths: Tensor | None = None
    ended: Tensor | None = None


def delay_codes(codes: Tensor, *, delays: Sequence[int], fill: int, end: int) -> Tensor:
    """Shift row k of a code grid right by ``delays[k]`` steps and close each row with ``end``.

    Frame t of row k lands at step ``t + delays[k]``, ``end`` right after the row's last frame.

    Args:
        codes: int64 codes, [B, K, T].
        delays: steps by which each row lags, length K, all >= 0.
        fill: id written where a row has neither code nor end.
        end: id that follows the last code of each row.

    Returns:
        int64 ids, [B, K, S] with S = T + max(delays) + 1.

    Raises:
        CodeGridError: if ``codes`` is not [B, K, T] or ``delays`` does not have one entry >= 0 per row.
    """
    _check(codes, delays)
    batch, rows, num_frames = codes.shape
    delayed = codes.new_full((batch, rows, num_frames + max(delays) + 1), fill)
    for row, delay in enumerate(delays):
        delayed[:, row, delay : delay + num_frames] = codes[:, row]
        delayed[:, row, delay + num_frames] = end
    return delayed


def undelay_codes(delayed: Tensor, *, delays: Sequence[int]) -> Tensor:
    """Undo :func:`delay_codes`.

    Args:
        delayed: int64 ids of a whole grid, [B, K, S].
        delays: steps by which each row lags, length K, all >= 0.

    Returns:
        int64 codes, [B, K, T] with T = S - max(delays) - 1.

    Raises:
        CodeGridError: if the grid is too short for its delays, or shapes do not fit.
    """
    _check(delayed, delays)
    num_frames = delayed.shape[-1] - max(delays) - 1
    if num_frames < 0:
        raise CodeGridError(
            f"a whole grid with delays {tuple(delays)} has at least {max(delays) + 1} steps, "
            f"got {delayed.shape[-1]}; use undelay_chunk for a part of a grid"
        )
    return _gather(delayed, delays, num_frames)


def undelay_chunk(
    delayed: Tensor, state: UndelayState, *, delays: Sequence[int], end: int | None = None
) -> Tensor:
    """Take the next steps of a delayed grid and give out the frames that became complete.

    Args:
        delayed: int64 ids of the next n >= 0 steps, [B, K, n].
        state: what earlier chunks left behind; changed in place.
        delays: steps by which each row lags, length K, all >= 0.
        end: id that closes each row. A conversation ends at its first frame that holds it; frames after the
            end of every conversation are not given out. A conversation that ends before others has ids that
            are no codes from ``state.lengths`` on. None gives out every frame.

    Returns:
        int64 codes, [B, K, m]: the frames whose every row has now been seen.

    Raises:
        CodeGridError: if the shapes do not fit each other, ``delays`` or earlier chunks.
    """
    _check(delayed, delays)
    if state.pending is None:
        state.pending = delayed[..., :0]
        state.lengths = delayed.new_zeros(delayed.shape[0])
        state.ended = torch.zeros_like(state.lengths, dtype=torch.bool)
    elif state.pending.shape[:2] != delayed.shape[:2]:
        expected, came = tuple(state.pending.shape[:2]), tuple(delayed.shape[:2])
        raise CodeGridError(f"chunks of one stream share [B, K]: expected {expected}, got {came}")
    assert state.lengths is not None
    assert state.ended is not None
    pending = torch.cat([state.pending, delayed], dim=-1)
    num_frames = max(0, pending.shape[-1] - max(delays))
    frames = _gather(pending, delays, num_frames)
    state.pending = pending[..., num_frames:]
    if end is None:
        state.lengths = state.lengths + num_frames
        return frames
    if num_frames == 0:
        return frames
    seen_ends = (frames == end).any(dim=1).cumsum(dim=-1)  # [B, m]
    alive = (seen_ends == 0) & ~state.ended[:, None]
    new_lengths = alive.sum(dim=-1)
    state.lengths = state.lengths + new_lengths
    state.ended = ~alive[:, -1]
    return frames[..., : int(new_lengths.max())]


def _gather(delayed: Tensor, delays: Sequence[int], num_frames: int) -> Tensor:
    """First ``num_frames`` frames of a delayed grid that begins at frame 0, [B, K, num_frames]."""
    rows = [delayed[:, row, delay : delay + num_frames] for row, delay in enumerate(delays)]
    return torch.stack(rows, dim=1)


def _check(codes: Tensor, delays: Sequence[int]) -> None:
    if codes.dim() != 3:
        raise CodeGridError(f"a code grid has the shape [B, K, T], got {list(codes.shape)}")
    if len(delays) != codes.shape[1] or not len(delays):
        raise CodeGridError(
            f"delays need one entry per code row: {codes.shape[1]} rows, got {len(delays)} delays"
        )
    if min(delays) < 0:
        raise CodeGridError(f"delays must be >= 0, got {tuple(delays)}")
