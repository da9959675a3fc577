import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_adapter.errors import ContextOverflowError
from omni_adapter.step_buffer import StepBuffer


def new_steps(rows: int, steps: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 2, steps, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("capacity", [20, None])
@pytest.mark.parametrize("parts", [[20], [1] * 20, [7, 1, 12]])
def test_steps_come_back_as_they_were_written(capacity, parts):
    buffer, steps = StepBuffer(rows=2, capacity=capacity), new_steps(2, 20)
    for part in steps.split(parts, dim=2):
        filled = buffer.append(part)
    assert torch.equal(filled, steps)
    assert torch.equal(buffer.filled, steps)
    assert (buffer.rows, buffer.steps) == (2, 20)


def test_memory_is_taken_once_and_steps_are_views_of_it():
    buffer = StepBuffer(rows=2, capacity=20)
    assert buffer.nbytes == 0
    places = set()
    for step in new_steps(2, 20).split(1, dim=2):
        filled = buffer.append(step)
        places.add(filled.untyped_storage().data_ptr())
        assert buffer.nbytes == 2 * 2 * 20 * 3 * 4
    assert len(places) == 1


def test_a_step_too_many_is_refused():
    buffer = StepBuffer(capacity=4)
    buffer.append(new_steps(1, 3))
    with pytest.raises(ContextOverflowError, match="made for 4 steps would have to hold 5"):
        buffer.append(new_steps(1, 2))
    other = StepBuffer(capacity=6)
    other.append(new_steps(1, 6))
    with pytest.raises(ContextOverflowError, match="made for 4 steps would have to hold 6"):
        buffer.join(other)
    assert torch.equal(buffer.filled, new_steps(1, 3))


def test_trimmed_steps_make_room_for_others():
    buffer, steps = StepBuffer(capacity=5), new_steps(1, 40)
    for index, step in enumerate(steps.split(1, dim=2)):
        filled = buffer.append(step)
        assert torch.equal(filled, steps[:, :, max(0, index - 3) : index + 1])
        buffer.trim(max(0, buffer.steps - 3))
    assert buffer.nbytes == steps[:, :, :5].nbytes


def test_selected_rows_share_no_memory():
    buffer, steps = StepBuffer(capacity=6), new_steps(3, 5)
    buffer.append(steps)
    chosen = buffer.selected(torch.tensor([2, 0, 0]))
    buffer.append(new_steps(3, 1, seed=1))
    chosen.append(new_steps(3, 1, seed=2))
    assert torch.equal(chosen.filled[:, :, :5], steps[[2, 0, 0]])
    assert torch.equal(buffer.filled[:, :, :5], steps)
    assert chosen.capacity == 6


def test_rows_join_into_room_that_others_left():
    buffer, other = StepBuffer(rows=3, capacity=9), StepBuffer(capacity=4)
    first, second = new_steps(3, 6), new_steps(1, 4, seed=1)
    buffer.append(first)
    place = buffer.filled.untyped_storage().data_ptr()
    buffer._storage[:, :, 6:] = torch.nan  # what is not filled must never be read
    buffer.keep_rows([0, 2])
    buffer._storage[2] = torch.nan
    other.append(second)
    buffer.join(other)
    padded = torch.nn.functional.pad(second, (0, 0, 2, 0))
    assert torch.equal(buffer.filled, torch.cat([first[[0, 2]], padded]))
    assert buffer.filled.untyped_storage().data_ptr() == place


def test_rows_with_more_steps_push_those_held_back():
    buffer, other = StepBuffer(rows=2, capacity=9), StepBuffer(capacity=8)
    first, second = new_steps(1, 3), new_steps(1, 8, seed=1)
    buffer.append(first)
    buffer._storage[:, :, 3:] = torch.nan
    other.append(second)
    buffer.join(other)
    assert torch.equal(buffer.filled, torch.cat([torch.nn.functional.pad(first, (0, 0, 5, 0)), second]))


def test_without_rows_the_steps_stay_for_others_to_end_at():
    buffer, other = StepBuffer(rows=2, capacity=9), StepBuffer(capacity=2)
    buffer.append(new_steps(2, 5))
    buffer.keep_rows([])
    assert (buffer.rows, buffer.steps) == (0, 5)
    other.append(new_steps(1, 2, seed=1))
    buffer.join(other)
    assert torch.equal(buffer.filled, torch.nn.functional.pad(new_steps(1, 2, seed=1), (0, 0, 3, 0)))


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 4)),
        st.tuples(st.just("join"), st.integers(1, 6), st.integers(1, 2)),
        st.tuples(st.just("keep"), st.sets(st.integers(0, 3))),
        st.tuples(st.just("trim"), st.integers(0, 3)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 3), max_size=3)),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(actions=ACTIONS, rows=st.integers(0, 4), capacity=st.sampled_from([None, 12]))
def test_any_life_of_a_buffer_equals_copies(actions, rows, capacity):
    """Whatever comes and goes, the buffer holds what plain copies of all steps would."""
    buffer, copies = StepBuffer(rows=rows, capacity=capacity), torch.zeros(0, 2, 0, 3)
    for seed, (name, *values) in enumerate(actions):
        if name == "append" and len(copies):
            new = new_steps(len(copies), values[0], seed=seed)
            if capacity and copies.shape[2] + values[0] > capacity:
                continue
            buffer.append(new)
            copies = torch.cat([copies, new], dim=2)
        elif name == "join":
            other, steps = StepBuffer(capacity=values[0]), new_steps(values[1], values[0], seed=seed)
            other.append(steps)
            buffer.join(other)
            end = max(copies.shape[2], values[0])
            copies = torch.cat(
                [torch.nn.functional.pad(part, (0, 0, end - part.shape[2], 0)) for part in (copies, steps)]
            )
        elif name == "trim":
            count = min(values[0], buffer.steps)
            buffer.trim(count)
            copies = copies[:, :, count:]
        elif name == "keep":
            kept = sorted(row for row in values[0] if row < len(copies))
            buffer.keep_rows(kept)
            copies = copies[kept]
        elif name == "select" and len(copies):
            chosen = torch.tensor([row % len(copies) for row in values[0]], dtype=torch.long)
            buffer, copies = buffer.selected(chosen), copies[chosen]
        if buffer.filled is not None:
            assert torch.equal(buffer.filled, copies)
        assert buffer.rows == len(copies)
        if buffer._storage is not None and len(copies) < buffer._storage.shape[0]:
            buffer._storage[len(copies) :] = torch.nan
