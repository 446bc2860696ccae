"""The arena of a simulation: a model of what every byte holds, and of who is touching it.

A cell stands for `CELL_BYTES` bytes and holds (user, key, offset within the block, when the request began that wrote
it), so it tells whose it is, and a torn, stale or misplaced write is seen as such. Rank r of W workers holds
`[r, r + 1) · length / W` of a block.
"""

from collections.abc import Iterable

from saltern.core.extents import Extent
from saltern.core.keys import Key, UserId
from tests.simulator.claims import Invariant, violated
from tests.simulator.erasures import Erasures

CELL_BYTES = 1024
"""Some cells make a page of the slab, and some a page of the arena."""

Cell = tuple[UserId, Key, int, float]


class Arena:
    """The bytes of one server's life; workers may map it longer than that."""

    def __init__(self, *, pages: int, page_bytes: int, erasures: Erasures) -> None:
        self._page_cells = page_bytes // CELL_BYTES
        self._erasures = erasures
        self._cells: list[Cell | None] = [None] * (pages * self._page_cells)
        self._readers = [0] * len(self._cells)
        self._writers = [0] * len(self._cells)
        self._touched: set[int] = set()
        self._length_by_key: dict[Key, int] = {}

    def cells(self, extent: Extent, length: int | None = None) -> list[int]:
        """Return where the bytes of a block lie, in logical order; without `length` the slack of its last page too."""
        size = self._page_cells
        cells = [cell for run in extent for cell in range(run.start * size, (run.start + run.count) * size)]
        return cells if length is None else cells[: length // CELL_BYTES]

    def begin(self, cells: list[int], *, is_write: bool) -> None:
        """Somebody begins to touch cells: a worker, or the server for its disk."""
        for cell in cells:
            if self._writers[cell] or (is_write and self._readers[cell]):
                violated(Invariant.QUIET, f"cell {cell}, holding {self._cells[cell]}, is touched by two at once")
            count_by_cell = self._writers if is_write else self._readers
            count_by_cell[cell] += 1
            self._touched.add(cell)

    def end(self, cells: list[int], *, is_write: bool) -> None:
        """Whoever touched cells has stopped, or is dead."""
        count_by_cell = self._writers if is_write else self._readers
        for cell in cells:
            count_by_cell[cell] -= 1
            if not self._writers[cell] and not self._readers[cell]:
                self._touched.remove(cell)

    def touched_pages(self) -> set[int]:
        """Return the pages that somebody is touching."""
        return {cell // self._page_cells for cell in self._touched}

    def write(self, cells: list[int], user: UserId, key: Key, offset: int, began_at: float) -> None:
        """Write a piece of a block from `offset` on."""
        for position, cell in enumerate(cells):
            self._cells[cell] = (user, key, offset + position, began_at)

    def fill(self, cells: list[int], content: Iterable[Cell | None]) -> None:
        """Have cells hold what a record held."""
        for cell, held in zip(cells, content, strict=True):
            self._cells[cell] = held

    def held(self, cells: list[int]) -> tuple[Cell | None, ...]:
        """Return what cells hold."""
        return tuple(self._cells[cell] for cell in cells)

    def check_read(self, cells: list[int], user: UserId, key: Key, offset: int) -> None:
        """Check a piece of a block as it is copied."""
        for position, cell in enumerate(cells):
            held = self._cells[cell]
            if held is None or held[:3] != (user, key, offset + position):
                violated(Invariant.BYTES, f"byte {offset + position} of {key.hex()[:8]} is {held}")

    def check_quiet(self, extent: Extent) -> None:
        """Check that nobody touches what is being granted, the slack of the last page included."""
        for cell in self.cells(extent):
            if self._writers[cell] or self._readers[cell]:
                violated(Invariant.QUIET, f"cell {cell}, holding {self._cells[cell]}, is granted while in use")

    def register(self, key: Key, length: int) -> None:
        """Know how long a block is, so that its content can be checked as it is served."""
        self._length_by_key[key] = length

    def check_content(self, user: UserId, key: Key, extent: Extent) -> None:
        """Check all bytes of a block as it is served."""
        held = self.held(self.cells(extent, self._length_by_key.get(key, 0)))
        began_at = held[0][3] if held and held[0] is not None else 0.0
        if not held or list(held) != [(user, key, offset, began_at) for offset in range(len(held))]:
            foreign = next((cell for cell in held if cell is not None and cell[:2] != (user, key)), None)
            wrong = Invariant.BYTES if foreign is not None else Invariant.UNFINISHED
            violated(wrong, f"{key.hex()[:8]} of {user.hex()} was served from {extent}, which holds {held}")
        if self._erasures.reaches(user, began_at):
            violated(Invariant.ERASED, f"{key.hex()[:8]} of {user.hex()}, begun at {began_at}, was served")

    # What is erased

    def wipe(self, extent: Extent) -> None:
        """Overwrite whole pages."""
        self.check_quiet(extent)
        for cell in self.cells(extent):
            self._cells[cell] = None

    def forget_leftovers(self, kept: set[int]) -> None:
        """Forget what is erased and lies outside of pages `kept`: given back before, and nothing is promised of it."""
        for cell in self._erased_cells():
            if cell // self._page_cells not in kept:
                self._cells[cell] = None

    def check_wiped(self, kept: set[int]) -> None:
        """Check that erased bytes lie only in pages `kept`, those of blocks that erased users still have."""
        for cell in self._erased_cells():
            if cell // self._page_cells not in kept:
                violated(Invariant.WIPED, f"cell {cell} holds {self._cells[cell]}, which is erased, for somebody else")

    def _erased_cells(self) -> list[int]:
        if not self._erasures:
            return []
        reaches = self._erasures.reaches
        return [number for number, cell in enumerate(self._cells) if cell is not None and reaches(cell[0], cell[3])]
