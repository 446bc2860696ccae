"""The arena of a simulation: a model of what every byte holds, and of who is touching it.

A cell stands for one byte and holds (user, key, offset within the block), so a byte tells whose it is, and
a torn, stale or misplaced write is seen as such. Rank r of W workers holds `[r, r + 1) · length / W` of a block.
"""

from saltern.core.extents import Extent
from saltern.core.keys import Key, UserId
from tests.simulator.claims import Invariant, violated

Cell = tuple[UserId, Key, int]


class Arena:
    """The bytes of one server's life; workers may map it longer than that."""

    def __init__(self, *, pages: int, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._cells: list[Cell | None] = [None] * (pages * page_bytes)
        self._readers = [0] * len(self._cells)
        self._writers = [0] * len(self._cells)
        self._touched: set[int] = set()
        self._length_by_key: dict[Key, int] = {}

    def cells(self, extent: Extent, length: int) -> list[int]:
        """Return where the bytes of a block lie, in logical order."""
        size = self._page_bytes
        return [cell for run in extent for cell in range(run.start * size, (run.start + run.count) * size)][:length]

    def begin(self, cells: list[int], *, is_write: bool) -> None:
        """A worker begins to touch cells."""
        for cell in cells:
            if self._writers[cell] or (is_write and self._readers[cell]):
                violated(Invariant.QUIET, f"cell {cell}, holding {self._cells[cell]}, is touched by two at once")
            count_by_cell = self._writers if is_write else self._readers
            count_by_cell[cell] += 1
            self._touched.add(cell)

    def end(self, cells: list[int], *, is_write: bool) -> None:
        """A worker has stopped touching cells, or is dead."""
        count_by_cell = self._writers if is_write else self._readers
        for cell in cells:
            count_by_cell[cell] -= 1
            if not self._writers[cell] and not self._readers[cell]:
                self._touched.remove(cell)

    def touched_pages(self) -> set[int]:
        """Return the pages that somebody is touching."""
        return {cell // self._page_bytes for cell in self._touched}

    def write(self, cells: list[int], user: UserId, key: Key, offset: int) -> None:
        """Write a piece of a block from `offset` on."""
        for position, cell in enumerate(cells):
            self._cells[cell] = (user, key, offset + position)

    def check_read(self, cells: list[int], user: UserId, key: Key, offset: int) -> None:
        """Check a piece of a block as a worker copies it."""
        for position, cell in enumerate(cells):
            if self._cells[cell] != (user, key, offset + position):
                violated(Invariant.BYTES, f"byte {offset + position} of {key.hex()[:8]} is {self._cells[cell]}")

    def check_quiet(self, extent: Extent) -> None:
        """Check that nobody touches what is being granted, the slack of the last page included."""
        for cell in self.cells(extent, len(self._cells)):
            if self._writers[cell] or self._readers[cell]:
                violated(Invariant.QUIET, f"cell {cell}, holding {self._cells[cell]}, is granted while in use")

    def register(self, key: Key, length: int) -> None:
        """Know how long a block is, so that its content can be checked as it is served."""
        self._length_by_key[key] = length

    def check_content(self, user: UserId, key: Key, extent: Extent) -> None:
        """Check all bytes of a block as it is served."""
        cells = self.cells(extent, self._length_by_key.get(key, 0))
        held = [self._cells[cell] for cell in cells]
        if not held or held != [(user, key, offset) for offset in range(len(held))]:
            foreign = next((cell for cell in held if cell is not None and cell[:2] != (user, key)), None)
            wrong = Invariant.BYTES if foreign is not None else Invariant.UNFINISHED
            violated(wrong, f"{key.hex()[:8]} of {user.hex()} was served from {extent}, which holds {held}")
