"""The loss of what recordings say: equal to a sum over all alignments, and a shorter way to the words."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from omni_adapter.training.alignment import BLANK_COSINE, SHARPNESS, transcript_loss

WIDTH = 6
CPU = torch.device("cpu")


@pytest.fixture
def table() -> Tensor:
    return torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(0)) + 0.5


def collapse(path: tuple[int, ...]) -> tuple[int, ...]:
    """Leave repetitions and blanks (0) out."""
    return tuple(sign for sign, _ in itertools.groupby(path) if sign)


def slow_loss(heard: Tensor, ids: tuple[int, ...], known: list[int], table: Tensor) -> Tensor:
    """Minus the logarithm of the chances of all paths that collapse to the transcript."""
    words = table[known] - table[known].mean(dim=0)
    cosines = F.cosine_similarity((heard - table[known].mean(dim=0))[:, None], words[None], dim=-1)
    blank = torch.full((len(heard), 1), BLANK_COSINE)
    chances = (SHARPNESS * torch.cat((blank, cosines), dim=1)).softmax(dim=1)
    wanted = tuple(1 + known.index(one) for one in ids)
    paths = itertools.product(range(len(known) + 1), repeat=len(heard))
    total = sum(
        torch.stack([chances[step, sign] for step, sign in enumerate(path)]).prod()
        for path in paths
        if collapse(path) == wanted
    )
    return -torch.as_tensor(total).log()


def test_it_is_the_sum_over_all_alignments(table):
    heard = [torch.randn(steps, WIDTH) for steps in (4, 3, 5)]
    said = [(7, 2), (2, 5), (5, 5, 7)]
    loss = transcript_loss(heard, said, lambda ids: table[ids], device=CPU)
    slow = sum(slow_loss(steps, ids, [2, 5, 7], table) for steps, ids in zip(heard, said, strict=True))
    torch.testing.assert_close(loss, slow, atol=1e-4, rtol=1e-4)


def test_what_is_unknown_or_too_long_adds_nothing(table):
    heard = [torch.randn(steps, WIDTH, requires_grad=True) for steps in (3, 2, 4)]
    asked: list[list[int]] = []

    def embed(ids: Tensor) -> Tensor:
        asked.append(ids[0].tolist())
        return table[ids]

    alone = transcript_loss(heard[:1], [(1, 4)], embed, device=CPU)
    mixed = transcript_loss(heard, [(1, 4), (4, 1, 4), None], embed, device=CPU)
    torch.testing.assert_close(alone, mixed)
    mixed.backward()
    assert heard[0].grad.abs().sum() > 0
    assert not heard[1].grad.any()
    assert heard[2].grad is None
    assert transcript_loss([], [], embed, device=CPU) == 0
    assert transcript_loss(heard[:1], [None], embed, device=CPU) == 0
    assert asked == [[1, 4], [1, 4], [0], [0]]  # once a batch, whatever it holds


def test_an_adapter_finds_the_words_without_being_told_where_they_are():
    """Each word sounds like one pattern for some steps, with noise before and after it."""
    chance = torch.Generator().manual_seed(1)
    table, sounds = (torch.randn(10, width, generator=chance) for width in (16, 24))
    torch.manual_seed(0)
    adapter = torch.nn.Sequential(torch.nn.Linear(24, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.01)

    def record(ids: list[int]) -> Tensor:
        pieces = [0.3 * torch.randn(1, 24, generator=chance)]
        for one in ids:
            pieces += [sounds[one].expand(2, 24), 0.3 * torch.randn(1, 24, generator=chance)]
        return torch.cat(pieces)

    def draw() -> list[int]:
        return torch.randint(10, (3,), generator=chance).tolist()

    for _ in range(250):
        said = [draw() for _ in range(8)]
        heard = [adapter(record(ids)) for ids in said]
        optimizer.zero_grad()
        transcript_loss(heard, said, lambda ids: table[ids], device=CPU).backward()
        optimizer.step()
    shared = table.mean(dim=0)
    for ids in [draw() for _ in range(10)]:
        cosines = F.cosine_similarity((adapter(record(ids)) - shared)[:, None], table - shared, dim=-1)
        path = F.pad(cosines, (1, 0), value=BLANK_COSINE).argmax(dim=1)
        assert collapse(tuple(path.tolist())) == tuple(1 + one for one in ids)
