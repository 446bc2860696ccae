"""The page pool: whatever is taken and given back, runs tile the arena and extents are as few runs as they can be."""

from itertools import pairwise

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from saltern.core.extents import Extent, PagePool, Run, extent_pages


class PoolMachine(RuleBasedStateMachine):
    """Takes and frees extents in any order, beside a plain set of free pages."""

    extents: Bundle[Extent] = Bundle("extents")

    @initialize(pages=st.integers(0, 64))
    def start(self, pages: int) -> None:
        self.pool = PagePool(pages)
        self.free = set(range(pages))
        self.held: list[Extent] = []

    @rule(target=extents, pages=st.integers(1, 20))
    def take(self, pages: int) -> Extent:
        longest = max((run.count for run in self.pool.free_runs()), default=0)
        fitting = [run.count for run in self.pool.free_runs() if run.count >= pages]
        extent = self.pool.allocate(pages)
        if extent is None:
            assert len(self.free) < pages
            return ()
        assert extent_pages(extent) == pages
        assert (len(extent) == 1) == (longest >= pages)
        if fitting:
            gap = next((run for run in self.pool.free_runs() if run.start == extent[0].start + pages), None)
            assert min(fitting) == pages + (gap.count if gap is not None else 0), "not the shortest run that fits"
        for run in extent:
            taken = set(range(run.start, run.start + run.count))
            assert taken <= self.free
            self.free -= taken
        self.held.append(extent)
        return extent

    @rule(extent=consumes(extents))
    def give_back(self, extent: Extent) -> None:
        self.pool.free(extent)
        for run in extent:
            self.free |= set(range(run.start, run.start + run.count))
        if extent:
            self.held.remove(extent)

    @invariant()
    def runs_tile_the_arena(self) -> None:
        runs = sorted((run.start, run.count) for run in self.pool.free_runs())
        assert {page for start, count in runs for page in range(start, start + count)} == self.free
        assert sum(count for _, count in runs) == len(self.free) == self.pool.free_pages
        assert self.pool.free_pages + sum(map(extent_pages, self.held)) == self.pool.pages

    @invariant()
    def free_runs_never_touch(self) -> None:
        runs = sorted((run.start, run.count) for run in self.pool.free_runs())
        for (start, count), (following, _) in pairwise(runs):
            assert start + count < following


TestPool = PoolMachine.TestCase


def test_an_exact_fit_is_reused() -> None:
    pool = PagePool(10)
    extents = [pool.allocate(pages) for pages in (3, 1, 2, 1, 3)]
    for extent in (extents[0], extents[2]):
        assert extent is not None
        pool.free(extent)
    assert pool.allocate(2) == extents[2]
    assert pool.allocate(3) == extents[0]


def test_a_block_longer_than_every_free_run_still_fits() -> None:
    pool = PagePool(9)
    singles = [pool.allocate(1) for _ in range(9)]
    for extent in singles[::2]:
        assert extent is not None
        pool.free(extent)
    extent = pool.allocate(5)
    assert extent is not None
    assert len(extent) == 5
    assert pool.free_pages == 0


def test_too_few_pages_change_nothing() -> None:
    pool = PagePool(4)
    assert pool.allocate(5) is None
    assert list(pool.free_runs()) == [Run(start=0, count=4)]


def test_pages_outside_the_arena_are_not_freed() -> None:
    with pytest.raises(AssertionError, match="outside the arena"):
        PagePool(4).free((Run(start=3, count=2),))
