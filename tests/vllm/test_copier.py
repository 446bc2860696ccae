"""Tests of the copier for CPUs: any layout, any extent, byte by byte, and nothing else touched."""

import os
import resource
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saltern.core.extents import Extent, Run
from saltern.vllm import copier as copier_module
from saltern.vllm.copier import CpuCopier, Shard, extent_slices
from saltern.vllm.copies import Copy, Piece
from saltern.vllm.layout import GroupPages, Layout
from tests.vllm.arena import INCARNATION, FakeLifeline, arena_places, await_finished, make_layout, moves

PAGES = 64


@st.composite
def extents(draw: st.DrawFn, *, pages: int, of: list[int]) -> Extent:
    """Cut an extent of some runs out of the free pages `of`."""
    runs: list[Run] = []
    while pages:
        start = draw(st.sampled_from(of))
        count = draw(st.integers(1, pages))
        taken = [page for page in range(start, start + count) if page in of]
        count = next((index for index, page in enumerate(taken) if page != start + index), len(taken))
        for page in range(start, start + count):
            of.remove(page)
        runs.append(Run(start=start, count=count))
        pages -= count
    return tuple(runs)


@st.composite
def layouts(draw: st.DrawFn, *, blocks: int, slots: int) -> tuple[Layout, int]:
    """Return a layout of one group or of two, and the bytes of the buffer that holds them one after the other."""
    groups: list[GroupPages] = []
    size = 0
    for _ in range(draw(st.integers(1, 2))):
        shapes = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 40)), min_size=1, max_size=3))
        layout, size = make_layout(
            shapes,
            blocks=blocks,
            slots=slots,
            layers_first=draw(st.booleans()),
            offset=size + draw(st.sampled_from([0, 8, 13])),
        )
        groups.append(replace(layout.groups[0], offset=groups[-1].end if groups else 0))
    return Layout(groups=tuple(groups), blocks=blocks), size


@st.composite
def cases(draw: st.DrawFn) -> tuple[Layout, int, int, list[Shard], Copy, Copy]:
    """Return a layout, its buffer's bytes, a page size, the ranks' shards, a store, and a load of its bytes."""
    blocks = draw(st.integers(8, 12))
    slots, ranks = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    layout, size = draw(layouts(blocks=blocks, slots=slots))
    shards = [
        Shard(rank * layout.block_bytes, state_offset=rank * layout.state_bytes, is_writer=True)
        for rank in range(ranks)
    ]
    block_bytes = ranks * layout.block_bytes
    page_bytes = draw(st.sampled_from([-(-block_bytes // pages) for pages in (1, 2, 3, 7)]))
    free, stores, loads = list(range(PAGES)), [], []
    sources = draw(st.permutations(range(1, blocks)))
    targets = draw(st.permutations(range(1, blocks)))
    extent = draw(extents(pages=-(-block_bytes // page_bytes), of=free))
    for group in range(len(layout.groups)):
        first = draw(st.integers(0, slots - 1))
        null = draw(st.integers(0, slots))  # so many of the first slots are needed no more
        stored = [0 if slot < null else sources.pop() for slot in range(slots)]
        stores.append(Piece(extent, 0, tuple(stored), group))
        loads.append(Piece(extent, first, tuple(targets.pop() if stored[i] else 0 for i in range(first, slots)), group))
    store = Copy(1, INCARNATION, "stored", tuple(stores))
    load = Copy(2, INCARNATION, "loaded", tuple(loads))
    return layout, size, page_bytes, shards, store, load


@contextmanager
def lifeline_of(**shape: int) -> Iterator[FakeLifeline]:
    """Yield an attached lifeline whose arena is full of noise; at its end nobody may use it any more."""
    lifeline = FakeLifeline(**shape)
    lifeline.fill(np.random.default_rng(0))
    yield lifeline
    lifeline.close()


@contextmanager
def copier_of(kv: Any, layout: Layout, lifeline: Any) -> Iterator[CpuCopier]:
    """Yield a copier, and close it."""
    copier = CpuCopier(kv, layout, lifeline)
    yield copier
    copier.close()


@contextmanager
def stores_at_once(bytes_max: int) -> Iterator[None]:
    """Let stores of up to so many bytes be done at once, and longer ones on their thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copier_module, "AT_ONCE_BYTES_MAX", bytes_max / torch.get_num_threads())
        yield


@given(case=cases(), is_at_once=st.booleans())
@settings(max_examples=150)
def test_bytes_arrive_where_they_belong_and_nothing_else_is_touched(case: Any, is_at_once: bool) -> None:
    layout, size, page_bytes, shards, store, load = case
    with stores_at_once(size if is_at_once else 0), lifeline_of(pages=PAGES, page_bytes=page_bytes) as lifeline:
        for seed, shard in enumerate(shards):
            kv = np.random.default_rng(seed + 1).integers(0, 256, size, dtype=np.uint8)
            with copier_of(kv, layout, lifeline) as copier:
                expected_kv, expected_arena = kv.copy(), lifeline.bytes
                here, there = moves(store, shard, layout, page_bytes)
                expected_arena[there] = expected_kv[here]
                copier.submit(store, shard, is_store=True)
                (ended,) = await_finished(copier, 1)
                assert ended[:3] == (store, True, False)
                assert (kv == expected_kv).all(), "a store changed the KV cache"
                assert (lifeline.bytes == expected_arena).all()

                here, there = moves(load, shard, layout, page_bytes)
                expected_kv[here] = expected_arena[there]
                copier.submit(load, shard, is_store=False)
                (ended,) = await_finished(copier, 1)
                assert ended[:3] == (load, False, False)
                assert (kv == expected_kv).all()
                assert (lifeline.bytes == expected_arena).all(), "a load changed the arena"


@given(data=st.data())
def test_slices_of_an_extent_are_its_bytes_in_order(data: st.DataObject) -> None:
    page_bytes = data.draw(st.integers(1, 9))
    extent = data.draw(extents(pages=data.draw(st.integers(1, 6)), of=list(range(12))))
    places = arena_places(extent, page_bytes)
    start = data.draw(st.integers(0, len(places) - 1))
    size = data.draw(st.integers(1, len(places) - start))
    sliced = [byte for part in extent_slices(extent, start, size, page_bytes) for byte in range(part.start, part.stop)]
    assert sliced == places[start : start + size]
    with pytest.raises(ValueError, match="past the end"):
        extent_slices(extent, start, len(places) - start + 1, page_bytes)


class AsLateAsCanBe(Executor):
    """Takes one piece at once, and moves it when somebody waits for that: never if nobody does."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails

    def submit(self, fn: Callable[..., Any], /, pieces: Iterator[Piece], *args: Any) -> Future[Any]:  # type: ignore[override]
        executor, taken = self, [next(pieces)]

        class Late(Future[Any]):
            def result(self, timeout: float | None = None) -> Any:
                if executor.fails:
                    raise OSError("the helper failed")
                return fn(iter(taken), *args)

        return Late()


class TestFailures:
    """A copy that can't be made is reported as failed, and leaves every byte as it was."""

    layout, size = make_layout([(2, 8), (1, 16)], blocks=5, slots=2, layers_first=True)  # 32 bytes a slot
    shard = Shard(block_offset=0, state_offset=0, is_writer=True)

    @pytest.mark.parametrize("is_store", [True, False])
    @pytest.mark.parametrize(
        "bad",
        [
            pytest.param(Piece((Run(start=8, count=1),), 0, (3, 4)), id="extent-short"),
            pytest.param(
                Piece((Run(start=8, count=1), Run(start=2, count=1)), 1, (3, 4)), id="extent-short-in-two-runs"
            ),
            pytest.param(Piece((Run(start=15, count=2),), 0, (3, 4)), id="past-the-arena"),
            pytest.param(
                Piece((Run(start=2, count=1), Run(start=16, count=1)), 0, (3, 4)), id="past-the-arena-in-two-runs"
            ),
            pytest.param(Piece((Run(start=1000, count=2),), 0, (3, 4)), id="far-past-the-arena"),
            pytest.param(Piece((Run(start=-3, count=2),), 0, (3, 4)), id="before-the-arena"),
            pytest.param(Piece((Run(start=8, count=2),), 0, (3, 5)), id="no-such-engine-block"),
            pytest.param(Piece((Run(start=8, count=2),), 0, (-1, 3)), id="negative-engine-block"),
            pytest.param(Piece((Run(start=8, count=3),), 1, (3, 4)), id="no-such-slot"),
        ],
    )
    def test_what_lies_outside_fails_the_copy_and_nothing_is_touched(self, bad: Piece, is_store: bool) -> None:
        good = Piece((Run(start=0, count=2),), 0, (1, 2))
        kv = np.random.default_rng(1).integers(0, 256, self.size, dtype=np.uint8)
        with lifeline_of(pages=16, page_bytes=32) as lifeline, copier_of(kv, self.layout, lifeline) as copier:
            kv_before, arena_before = kv.copy(), lifeline.bytes
            copier.submit(Copy(1, INCARNATION, "r", (good, bad)), self.shard, is_store=is_store)
            (ended,) = await_finished(copier, 1)
            assert ended.is_failed
            assert (kv == kv_before).all()
            assert (lifeline.bytes == arena_before).all()
            copier.submit(Copy(2, INCARNATION, "r", (good,)), self.shard, is_store=is_store)
            (ended,) = await_finished(copier, 1)
            assert not ended.is_failed, "a failure ended the copier"

    @pytest.mark.parametrize("is_store", [True, False])
    @pytest.mark.parametrize("lost", ["other incarnation", "not attached"])
    def test_a_copy_of_another_session_fails(self, lost: str, is_store: bool) -> None:
        kv = np.random.default_rng(1).integers(0, 256, self.size, dtype=np.uint8)
        with lifeline_of(pages=16, page_bytes=32) as lifeline, copier_of(kv, self.layout, lifeline) as copier:
            lifeline.is_attached = lost != "not attached"
            kv_before, arena_before = kv.copy(), lifeline.bytes
            incarnation = b"o" * 16 if lost == "other incarnation" else INCARNATION
            copy = Copy(1, incarnation, "r", (Piece((Run(start=0, count=2),), 0, (1, 2)),))
            copier.submit(copy, self.shard, is_store=is_store)
            (ended,) = await_finished(copier, 1)
            assert ended[:3] == (copy, is_store, True)
            assert (kv == kv_before).all()
            assert (lifeline.bytes == arena_before).all()

    def test_a_short_store_has_ended_when_it_was_begun(self) -> None:
        kv = np.random.default_rng(1).integers(0, 256, self.size, dtype=np.uint8)
        copy = Copy(1, INCARNATION, "r", (Piece((Run(start=0, count=2),), 0, (1, 2)),))
        with lifeline_of(pages=16, page_bytes=32) as lifeline, copier_of(kv, self.layout, lifeline) as copier:
            copier.submit(copy, self.shard, is_store=True)
            (ended,) = copier.finished()
            assert ended[:3] == (copy, True, False)
            here, there = moves(copy, self.shard, self.layout, 32)
            assert (kv[here] == lifeline.bytes[there]).all()

    def test_a_load_and_a_step_do_not_wait_for_a_long_store(self) -> None:
        kv = np.zeros(self.size, dtype=np.uint8)
        copy = Copy(1, INCARNATION, "r", (Piece((Run(start=0, count=2),), 0, (1, 2)),))  # of 64 bytes
        with (
            stores_at_once(63),
            lifeline_of(pages=16, page_bytes=32) as lifeline,
            copier_of(kv, self.layout, lifeline) as copier,
        ):
            lifeline.gated = lambda: threading.current_thread().name.startswith("saltern-store")
            copier.submit(copy, self.shard, is_store=True)
            copier.submit(copy, self.shard, is_store=False)
            (ended,) = await_finished(copier, 1)
            assert not ended.is_store
            lifeline.gate.set()
            (ended,) = await_finished(copier, 1)
            assert ended.is_store

    def test_a_load_is_over_only_when_its_slower_thread_is(self) -> None:
        kv = np.zeros(self.size, dtype=np.uint8)
        pieces = (Piece((Run(start=0, count=2),), 0, (1, 2)), Piece((Run(start=2, count=2),), 0, (3, 4)))
        with lifeline_of(pages=16, page_bytes=32) as lifeline, copier_of(kv, self.layout, lifeline) as copier:
            copier._helper = AsLateAsCanBe()  # type: ignore[assignment]
            copier.submit(Copy(1, INCARNATION, "r", pieces), self.shard, is_store=False)
            (ended,) = await_finished(copier, 1)
            assert not ended.is_failed
            here, there = moves(Copy(1, INCARNATION, "r", pieces), self.shard, self.layout, 32)
            assert (kv[here] == lifeline.bytes[there]).all()

    def test_a_load_fails_with_either_thread(self) -> None:
        kv = np.zeros(self.size, dtype=np.uint8)
        piece = Piece((Run(start=0, count=2),), 0, (1, 2))
        with lifeline_of(pages=16, page_bytes=32) as lifeline, copier_of(kv, self.layout, lifeline) as copier:
            copier._helper = AsLateAsCanBe(fails=True)  # type: ignore[assignment]
            copier.submit(Copy(1, INCARNATION, "r", (piece, piece)), self.shard, is_store=False)
            (ended,) = await_finished(copier, 1)
            assert ended.is_failed

    def test_threads_use_all_cores_though_the_engine_is_pinned_to_one(self) -> None:
        kv = np.zeros(self.size, dtype=np.uint8)
        copy = Copy(1, INCARNATION, "r", (Piece((Run(start=0, count=2),), 0, (1, 2)),))
        cores, used, ending = os.sched_getaffinity(0), list[set[int]](), threading.Event()
        other = threading.Thread(target=ending.wait)  # such as those of OpenMP
        other.start()
        os.sched_setaffinity(0, {min(cores)})
        try:
            with (
                stores_at_once(0),
                lifeline_of(pages=16, page_bytes=32) as lifeline,
                copier_of(kv, self.layout, lifeline) as copier,
            ):
                lifeline.gated = lambda: bool(used.append(os.sched_getaffinity(0)))  # type: ignore[func-returns-value]
                for is_store in (True, False):
                    copier.submit(copy, self.shard, is_store=is_store)
                await_finished(copier, 2)
        finally:
            os.sched_setaffinity(0, cores)
            ending.set()
            other.join()
        assert used == [cores, cores]

    def test_the_first_copy_needs_no_file_descriptor(self) -> None:
        kv = np.zeros(self.size, dtype=np.uint8)
        copy = Copy(1, INCARNATION, "r", (Piece((Run(start=0, count=2),), 0, (0, 1)),))
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        with lifeline_of(pages=16, page_bytes=32) as lifeline, copier_of(kv, self.layout, lifeline) as copier:
            free = os.open("/", os.O_RDONLY)  # the lowest there is: with it as the limit, no file can be opened
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
            try:
                for is_store in (True, False):
                    copier.submit(copy, self.shard, is_store=is_store)
                ended = await_finished(copier, 2)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert [finished.is_failed for finished in ended] == [False, False]

    def test_closing_waits_for_the_copy_under_way(self) -> None:
        kv = np.zeros(self.size, dtype=np.uint8)
        copy = Copy(1, INCARNATION, "r", (Piece((Run(start=0, count=2),), 0, (1, 2)),))
        begun = threading.Event()

        def gated() -> bool:
            begun.set()
            return True

        with lifeline_of(pages=16, page_bytes=32) as lifeline:
            lifeline.gated = gated
            copier = CpuCopier(kv, self.layout, lifeline)  # type: ignore[arg-type]
            copier.submit(copy, self.shard, is_store=False)
            assert begun.wait(60)
            closing = threading.Thread(target=copier.close)
            closing.start()
            lifeline.gate.set()
            closing.join(60)
            assert not closing.is_alive()
            assert len(copier.finished()) == 1
