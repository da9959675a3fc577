"""Places in chunks of memory: apart, zeros at first, reused, given back."""

import gc
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch

from omni_adapter import arena
from omni_adapter.arena import Place


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(arena, "_CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(arena, "_PAGE_BYTES", 1 << 12)
    monkeypatch.setattr(Place, "_chunks", arena.weakref.WeakSet())


def test_places_do_not_overlap_whatever_comes_and_goes():
    rng = random.Random(0)
    held: dict[int, Place] = {}
    for number in range(1, 200):
        if held and rng.random() < 0.45:
            del held[rng.choice(list(held))]
        place = Place(rng.choice([1, 63, 64, 65, 700, 3000, 9000]))
        assert not place.memory.any(), "zeros at first, also where something lay"
        assert place.memory.data_ptr() % 64 == 0
        place.memory.fill_(number)
        held[number] = place
    assert all(bool((place.memory == number).all()) for number, place in held.items())


def test_threads_get_places_of_their_own(monkeypatch):
    monkeypatch.setattr(arena, "_CHUNK_BYTES", 1 << 20)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def come_and_go(seed: int) -> list[Place]:
        rng, held = random.Random(seed), []
        for _ in range(3000):
            if held and rng.random() < 0.5:
                held.pop(rng.randrange(len(held)))
            else:
                held.append(Place(rng.choice([64, 640, 4096])))
        return held

    try:
        with ThreadPoolExecutor(6) as pool:
            held = [place for places in list(pool.map(come_and_go, range(6))) for place in places]
    finally:
        sys.setswitchinterval(interval_s)
    spans = sorted((at := place.memory.data_ptr(), at + place.memory.nbytes) for place in held)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_the_room_of_what_is_dropped_is_used_again():
    places = [Place(1024) for _ in range(4)]
    addresses = {place.memory.data_ptr() for place in places}
    del places[1:3]
    assert len(Place._chunks) == 1
    again = Place(2048)
    assert again.memory.data_ptr() in addresses
    assert len(Place._chunks) == 1


def test_a_chunk_in_which_nothing_is_left_goes_back():
    place = Place(100)
    assert len(Place._chunks) == 1
    del place
    gc.collect()
    assert not Place._chunks


def test_what_is_larger_than_a_chunk_gets_its_own():
    large, small = Place(10_000), Place(64)
    assert large.memory.shape == (10_000,)
    assert small.memory.dtype == torch.uint8


def test_where_no_large_pages_are_known_plain_memory_is_given(monkeypatch):
    monkeypatch.delattr(arena.mmap, "MADV_HUGEPAGE", raising=False)
    assert not Place(100).memory.any()
