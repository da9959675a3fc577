import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_adapter.audio.delay import UndelayState, delay_codes, undelay_chunk, undelay_codes
from omni_adapter.errors import CodeGridError

END, FILL = 50, 51


@st.composite
def grids(draw, max_batch=3):
    """Any grid with any delays: monotonic or not, all zero included."""
    rows = draw(st.integers(1, 8))
    shape = (draw(st.integers(1, max_batch)), rows, draw(st.integers(0, 12)))
    delays = draw(st.lists(st.integers(0, 9), min_size=rows, max_size=rows))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return torch.randint(0, END, shape, generator=generator), tuple(delays)


def chunks_of(delayed, sizes):
    """Split by cycling through ``sizes`` until nothing is left."""
    start, turn = 0, 0
    while start < delayed.shape[-1]:
        size = sizes[turn % len(sizes)]
        yield delayed[..., start : start + size]
        start, turn = start + size, turn + 1


def test_paper_pattern():
    codes = torch.arange(6).view(1, 3, 2)  # three rows, two frames
    delayed = delay_codes(codes, delays=(1, 2, 3), fill=FILL, end=END)
    assert delayed[0].tolist() == [
        [FILL, 0, 1, END, FILL, FILL],
        [FILL, FILL, 2, 3, END, FILL],
        [FILL, FILL, FILL, 4, 5, END],
    ]


@settings(deadline=None, max_examples=100)
@given(grids())
def test_every_id_is_where_the_definition_says(grid):
    codes, delays = grid
    delayed = delay_codes(codes, delays=delays, fill=FILL, end=END)
    num_frames = codes.shape[-1]
    assert delayed.shape[-1] == num_frames + max(delays) + 1
    for row, delay in enumerate(delays):
        for step in range(delayed.shape[-1]):
            frame = step - delay
            for item in range(len(codes)):
                inside = 0 <= frame < num_frames
                expected = codes[item, row, frame] if inside else (END if frame == num_frames else FILL)
                assert delayed[item, row, step] == expected


@settings(deadline=None, max_examples=100)
@given(grids())
def test_undelay_is_the_inverse(grid):
    codes, delays = grid
    delayed = delay_codes(codes, delays=delays, fill=FILL, end=END)
    assert torch.equal(undelay_codes(delayed, delays=delays), codes)


@settings(deadline=None, max_examples=100)
@given(grids(), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_streaming_equals_whole(grid, sizes):
    codes, delays = grid
    delayed = delay_codes(codes, delays=delays, fill=FILL, end=END)
    state = UndelayState()
    parts = [undelay_chunk(c, state, delays=delays, end=END) for c in chunks_of(delayed, sizes)]
    assert torch.equal(torch.cat(parts, dim=-1), codes)
    assert state.lengths.tolist() == [codes.shape[-1]] * len(codes)
    assert state.ended.all()


def test_a_frame_comes_out_at_the_step_of_its_last_row():
    codes = torch.arange(12).view(1, 3, 4)
    delayed = delay_codes(codes, delays=(1, 2, 3), fill=FILL, end=END)
    state = UndelayState()
    counts = [undelay_chunk(c, state, delays=(1, 2, 3)).shape[-1] for c in delayed.split(1, dim=-1)]
    assert counts == [0, 0, 0, 1, 1, 1, 1, 1]  # without an end id, the frame of end ids comes out as well


def test_conversations_of_different_length():
    delays, long, short = (1, 2), torch.arange(10).view(1, 2, 5), torch.arange(4).view(1, 2, 2)
    delayed = torch.full((2, 2, 8), FILL)
    for item, codes in enumerate((long, short)):
        alone = delay_codes(codes, delays=delays, fill=FILL, end=END)
        delayed[item, :, : alone.shape[-1]] = alone[0]
    state = UndelayState()
    frames = torch.cat(
        [undelay_chunk(c, state, delays=delays, end=END) for c in delayed.split(1, dim=-1)], dim=-1
    )
    assert state.lengths.tolist() == [5, 2]
    assert torch.equal(frames[0], long[0])
    assert torch.equal(frames[1, :, :2], short[0])


def test_errors_say_what_was_expected():
    codes = torch.zeros(1, 3, 2, dtype=torch.long)
    with pytest.raises(CodeGridError, match="3 rows, got 2 delays"):
        delay_codes(codes, delays=(1, 2), fill=FILL, end=END)
    with pytest.raises(CodeGridError, match=">= 0"):
        delay_codes(codes, delays=(0, 1, -1), fill=FILL, end=END)
    with pytest.raises(CodeGridError, match=r"\[B, K, T\], got \[3, 2\]"):
        delay_codes(codes[0], delays=(0, 1, 2), fill=FILL, end=END)
    with pytest.raises(CodeGridError, match="at least 6 steps, got 2"):
        undelay_codes(codes, delays=(0, 1, 5))
    state = UndelayState()
    undelay_chunk(codes, state, delays=(0, 1, 2))
    with pytest.raises(CodeGridError, match=r"expected \(1, 3\), got \(2, 3\)"):
        undelay_chunk(codes.expand(2, 3, 2), state, delays=(0, 1, 2))
