"""Extents: where a block lies in the arena, and the pool of pages that they are cut from.

The arena is `pages` fixed pages. A free page belongs to exactly one free run and free runs never touch
(they are joined when freed), so runs held and runs free together tile the arena. An extent is a list of
runs, one where possible: pages never fragment a quota, and a block larger than every free run still fits.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

from msgspec import Struct


class Run(Struct, frozen=True, array_like=True, gc=False):
    """Pages `[start, start + count)` of the arena."""

    start: int
    count: int


Extent = tuple[Run, ...]
"""Where a block lies, in logical order. Never empty."""


def extent_pages(extent: Extent) -> int:
    """Return how many pages an extent covers."""
    return sum(run.count for run in extent)


class PagePool:
    """Free pages as maximal runs: best fit, then the largest runs together, joined again when freed."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.free_pages = 0
        self._count_by_start: dict[int, int] = {}
        self._start_by_end: dict[int, int] = {}
        self._starts_by_count: dict[int, dict[int, None]] = {}
        self._counts: list[int] = []  # the keys of the map above, sorted
        if pages:
            self._insert(0, pages)

    @classmethod
    def around(cls, pages: int, taken: Iterable[Run]) -> "PagePool":
        """Return a pool in which these runs, none of which touches another's pages, are taken already."""
        pool = cls(0)
        pool.pages = pages
        end = 0
        for run in sorted(taken, key=lambda run: run.start):
            assert end <= run.start < run.start + run.count <= pages, "taken runs overlap, or are not in the pool"
            if run.start > end:
                pool._insert(end, run.start - end)
            end = run.start + run.count
        if pages > end:
            pool._insert(end, pages - end)
        return pool

    def allocate(self, pages: int) -> Extent | None:
        """Take `pages` pages, in one run if any free run is long enough; None if too few are free."""
        assert pages > 0, "an extent holds at least one page"
        if pages > self.free_pages:
            return None
        runs: list[Run] = []
        while pages:
            fits = bisect_left(self._counts, pages)
            longest = fits == len(self._counts)
            count = self._counts[-1 if longest else fits]
            start = next(reversed(self._starts_by_count[count]))
            taken = min(count, pages)
            self._remove(start, count)
            if count > taken:
                self._insert(start + taken, count - taken)
            runs.append(Run(start=start, count=taken))
            pages -= taken
        return tuple(runs)

    def free(self, extent: Extent) -> None:
        """Give an extent's pages back."""
        for run in extent:
            start, end = run.start, run.start + run.count
            assert 0 <= start < end <= self.pages, f"freed pages [{start}, {end}) outside the arena"
            before = self._start_by_end.get(start)
            if before is not None:
                self._remove(before, start - before)
                start = before
            after = self._count_by_start.get(end)
            if after is not None:
                self._remove(end, after)
                end += after
            self._insert(start, end - start)

    def free_runs(self) -> Iterator[Run]:
        """Yield the free runs in no particular order."""
        for start, count in self._count_by_start.items():
            yield Run(start=start, count=count)

    def _insert(self, start: int, count: int) -> None:
        self._count_by_start[start] = count
        self._start_by_end[start + count] = start
        starts = self._starts_by_count.get(count)
        if starts is None:
            self._starts_by_count[count] = {start: None}
            insort(self._counts, count)
        else:
            starts[start] = None
        self.free_pages += count

    def _remove(self, start: int, count: int) -> None:
        del self._count_by_start[start]
        del self._start_by_end[start + count]
        starts = self._starts_by_count[count]
        del starts[start]
        if not starts:
            del self._starts_by_count[count]
            del self._counts[bisect_left(self._counts, count)]
        self.free_pages -= count
