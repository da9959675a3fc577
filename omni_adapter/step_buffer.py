"""Keys or values of the steps seen so far, written in place.

Steps in, [B, H, S, W]; a view of all steps so far out, [B, H, steps, W]. With a capacity the memory is taken
once and known beforehand; without one it grows. Rows come and go without being moved where that can be
avoided. Knows nothing of models, masks or positions.

    storage [R, H, C, W]:   columns   0 ... start ... end ... C
                            rows      0 ... B ........... R      columns from start to end are the steps
"""

from collections.abc import Sequence

from torch import Tensor

from omni_adapter.errors import ContextOverflowError

_FIRST_CAPACITY = 256  # steps, for a buffer that grows


class StepBuffer:
    """Keys or values of some steps, in memory made once.

    Args:
        rows: rows R to take memory for; more are taken if more come.
        capacity: steps C to take memory for; None to grow with the steps.
    """

    def __init__(self, *, rows: int = 0, capacity: int | None = None) -> None:
        self.room = rows
        self.capacity = capacity
        self.start = self.end = 0
        self._storage: Tensor | None = None
        self._used: Tensor | None = None  # rows of the storage that are somebody's

    @property
    def steps(self) -> int:
        """Steps held, padding included."""
        return self.end - self.start

    @property
    def rows(self) -> int:
        """Rows B held."""
        return 0 if self._used is None else self._used.shape[0]

    @property
    def filled(self) -> Tensor | None:
        """All steps held, a view [B, H, steps, W]; None before the first."""
        return None if self._used is None else self._used.narrow(2, self.start, self.steps)

    @property
    def nbytes(self) -> int:
        """Bytes held, rows and steps that are not filled yet included."""
        return 0 if self._storage is None else self._storage.nbytes

    def append(self, new: Tensor) -> Tensor:
        """Write steps [B, H, S, W] behind those held; return a view of all, [B, H, steps, W].

        Raises:
            ContextOverflowError: if they go beyond the capacity.
        """
        count = new.shape[2]
        if self._used is None or self._used.shape[0] != new.shape[0]:
            self._open(new)
        assert self._storage is not None
        if self.end + count > self._storage.shape[2]:
            self._make_room(self.steps + count)
        used, end = self._used, self.end + count
        assert used is not None
        used.narrow(2, self.end, count).copy_(new)
        self.end = end
        return used.narrow(2, self.start, end - self.start)

    def trim(self, steps: int) -> None:
        """Forget the first ``steps`` steps."""
        assert 0 <= steps <= self.steps
        self.start += steps

    def crop(self, steps: int) -> None:
        """Forget the last ``steps`` steps."""
        assert 0 <= steps <= self.steps
        self.end -= steps

    def clear(self) -> None:
        """Forget all rows and steps; the memory stays."""
        self.start = self.end = 0
        self._used = None if self._storage is None else self._storage[:0]

    def keep_rows(self, indices: Sequence[int]) -> None:
        """Keep the rows ``indices``, which ascend, in place; the others are forgotten.

        Without any row the number of steps stays, so that rows that join later end where others do.
        """
        filled = self.filled
        if filled is None:
            return
        assert self._storage is not None
        for to, origin in enumerate(indices):
            if to != origin:
                filled[to].copy_(filled[origin])
        self._used = self._storage[: len(indices)]

    def selected(self, indices: Tensor) -> "StepBuffer":
        """Return the rows ``indices`` [n], in that order, in memory of their own."""
        chosen = StepBuffer(rows=len(indices), capacity=self.capacity)
        filled = self.filled
        if filled is not None:
            chosen.append(filled.index_select(0, indices.to(filled.device)))
        return chosen

    def join(self, other: "StepBuffer") -> None:
        """Take the rows of ``other`` behind the own ones, so that all end at the same step.

        Those with fewer steps get zeros in front, for the caller to mask.

        Raises:
            ContextOverflowError: if the steps of ``other`` go beyond the capacity.
        """
        theirs = other.filled
        if theirs is None or not other.rows:
            return
        if self._used is None:
            self._open(theirs[:0])
        steps, rows = max(self.steps, other.steps), self.rows + other.rows
        self._make_room(steps, rows=rows)
        self._extend(steps)
        assert self._storage is not None
        place = self._storage[self.rows : rows]
        begin = self.end - other.steps
        place[:, :, self.start : begin] = 0
        place[:, :, begin : self.end] = theirs
        self._used = self._storage[:rows]

    def _open(self, new: Tensor) -> None:
        """Take the first steps of rows whose number is only known now."""
        assert not self.steps, f"{self.rows} rows are held, got {new.shape[0]}"
        storage = self._storage
        if storage is None or storage.shape[0] < new.shape[0]:
            capacity = max(_FIRST_CAPACITY, 2 * new.shape[2]) if self.capacity is None else self.capacity
            rows = max(self.room, new.shape[0])
            storage = self._storage = new.new_empty(rows, new.shape[1], capacity, new.shape[3])
        self.start = self.end = 0
        self._used = storage[: new.shape[0]]

    def _make_room(self, steps: int, *, rows: int = 0) -> None:
        """See that there is room for so many steps in all, from ``start`` on, and so many rows."""
        old, used = self._storage, self._used
        assert old is not None
        assert used is not None
        if self.start + steps <= old.shape[2] and rows <= old.shape[0]:
            return
        if self.capacity is not None and steps > self.capacity:
            raise ContextOverflowError(
                f"a cache made for {self.capacity} steps would have to hold {steps}; make it with a larger "
                "capacity"
            )
        filled = used.narrow(2, self.start, self.steps)
        capacity = old.shape[2] if steps <= old.shape[2] else 2 * steps
        if capacity > old.shape[2] or rows > old.shape[0]:
            self._storage = old.new_empty(max(rows, old.shape[0]), old.shape[1], capacity, old.shape[3])
        else:
            filled = filled.clone()  # source and place may overlap
        assert self._storage is not None
        self._used = self._storage[: used.shape[0]]
        self._used[:, :, : self.steps] = filled
        self.start, self.end = 0, self.steps

    def _extend(self, steps: int) -> None:
        """Put zeros before the steps held, until there are ``steps``."""
        used, missing = self._used, steps - self.steps
        assert used is not None
        if missing > self.start:
            used[:, :, missing : missing + self.steps] = used.narrow(2, self.start, self.steps).clone()
            self.start, self.end = missing, steps
        self.start -= missing
        used[:, :, self.start : self.start + missing] = 0
