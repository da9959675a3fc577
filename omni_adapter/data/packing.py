"""Join samples of different lengths with little padding: by length, or several in one row.

Lengths in, groups of indices out; samples in, packed batches out. A packed row holds samples one after
another, each with positions from 0 and blind to the others. Knows nothing of models, files or tokenizers.
"""

from collections.abc import Sequence

import torch

from omni_adapter.audio.clips import Clips
from omni_adapter.data.collator import PADDING, Batch, ClipPlace, Sample, teacher_of, transcripts_of
from omni_adapter.data.layout import GridRules
from omni_adapter.errors import DataError
from omni_adapter.vocab import IGNORE_INDEX


def bucket(lengths: Sequence[int], *, batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """Group samples of similar length.

    Args:
        lengths: steps of each sample.
        batch_size: samples a group; the last group may have fewer.
        generator: draws the order of the groups, so that lengths do not rise through a window.

    Returns:
        Indices of each group; every sample is in exactly one.
    """
    by_length = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    groups = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    order = torch.randperm(len(groups), generator=generator).tolist()
    return [groups[index] for index in order]


def pack(lengths: Sequence[int], *, max_steps: int) -> list[list[int]]:
    """Fit samples into rows of at most ``max_steps`` steps: longest first, each into the first row with room.

    Returns:
        Indices of the samples in each row, in order; every sample is in exactly one row.

    Raises:
        DataError: if a sample is longer than a row.
    """
    if lengths and max(lengths) > max_steps:
        raise DataError(f"a sample of {max(lengths)} steps does not fit into rows of {max_steps}")
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fitting = (row for row, left in enumerate(room) if left >= lengths[index])
        row = next(fitting, len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_steps)
        rows[row].append(index)
        room[row] -= lengths[index]
    return [sorted(row) for row in rows]


def collate_packed(rows: Sequence[Sequence[Sample]], *, rules: GridRules) -> Batch:
    """Put each list of samples into one row, padded on the right.

    Args:
        rows: samples of each row, at least one row and one sample a row.
        rules: ids that padding is made of.

    Returns:
        A batch whose ``segments`` tell the samples of a row apart; ``position_ids`` start from 0 in each.
    """
    sizes = [[sample.layout.grid.shape[1] for sample in row] for row in rows]
    longest = max(sum(row) for row in sizes)
    grid = torch.full((len(rows), rules.num_codebooks + 1, longest), rules.vocabulary.pad)
    grid[:, -1] = rules.no_text
    labels = torch.full_like(grid, IGNORE_INDEX)
    segments = torch.full((len(rows), longest), PADDING)
    positions = torch.zeros(len(rows), longest, dtype=torch.long)
    places: list[ClipPlace] = []
    for row, samples in enumerate(rows):
        start = 0
        for segment, sample in enumerate(samples):
            layout, steps = sample.layout, sizes[row][segment]
            inside = slice(start, start + steps)
            grid[row, :, inside] = layout.grid
            labels[row, :, inside] = layout.labels
            segments[row, inside] = segment
            positions[row, inside] = torch.arange(steps)
            places.extend(ClipPlace(row, start + span.start, span.length) for span in layout.spans)
            start += steps
    samples = [sample for row in rows for sample in row]
    recordings = [recording for sample in samples for recording in sample.recordings]
    return Batch(
        grid,
        labels,
        (segments != PADDING).long(),
        positions,
        tuple(places),
        Clips.of(recordings) if recordings else None,
        segments=segments,
        ids=tuple(sample.id for sample in samples),
        teacher=teacher_of(samples, rules=rules),
        transcripts=transcripts_of(samples),
    )
