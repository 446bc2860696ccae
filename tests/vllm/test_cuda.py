"""Tests of the copier for CUDA, on a device: bit for bit what the one for CPUs does, in order, and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from saltern.core.extents import Run
from saltern.vllm.copier import Bytes, CpuCopier, Shard
from saltern.vllm.copies import Copy, Piece
from saltern.vllm.layout import Layout
from tests.vllm.arena import INCARNATION, FakeLifeline, await_finished, make_layout, moves

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

PAGE_BYTES = 4096  # of the arena
BLOCKS = 64
SLOTS = 4
SHAPES = {
    "LBHNC": ([(4, 2048)], True),
    "BLHNC": ([(4, 2048)], False),
    "several-tensors": ([(3, 1024), (2, 512), (1, 48)], False),
    "odd-sizes": ([(2, 1000), (1, 24)], True),
}


def noise(size: int, seed: int) -> Bytes:
    """Return random bytes."""
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


@contextmanager
def device_copier(kv: Bytes, layout: Layout, lifeline: FakeLifeline) -> Iterator[tuple[Any, torch.Tensor]]:
    """Yield a copier and the device's buffer, with the arena mapped as a lifeline does it."""
    from saltern.vllm.cuda import CudaCopier

    end: Any = lifeline
    there = torch.from_numpy(kv.copy()).cuda()
    copier = CudaCopier(there, layout, end)
    assert lifeline.on_map is not None and lifeline.on_unmap is not None
    lifeline.on_map(lifeline.arena)
    yield copier, there
    copier.close()
    lifeline.on_unmap(lifeline.arena)
    lifeline.close()


def make_lifeline(seed: int) -> FakeLifeline:
    """Return an attached lifeline with an arena of noise."""
    lifeline = FakeLifeline(pages=256, page_bytes=PAGE_BYTES)
    lifeline.fill(np.random.default_rng(seed))
    return lifeline


def extents_for(block_bytes: int, blocks: int, *, runs: int) -> list[tuple[Run, ...]]:
    """Return extents of some runs each, none of them next to another, in no order."""
    pages = -(-block_bytes // PAGE_BYTES)
    counts = [len(part) for part in np.array_split(range(pages), min(runs, pages))]
    starts = iter(np.random.default_rng(5).permutation(range(0, 256 - counts[0], counts[0] + 1)).tolist())
    extents = []
    for _ in range(blocks):
        extents.append(tuple([Run(start=next(starts), count=count) for count in counts]))
    return extents


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_copies_bit_for_bit_what_the_cpu_does(shape: str, rank: int, runs: int) -> None:
    tensors, layers_first = SHAPES[shape]
    layout, size = make_layout(tensors, blocks=BLOCKS, slots=SLOTS, layers_first=layers_first)
    shard = Shard(rank * layout.block_bytes, state_offset=0, is_writer=True)
    extents = extents_for(2 * layout.block_bytes, blocks=6, runs=runs)  # more slots than staging buffers
    order = np.random.default_rng(7).permutation(range(1, BLOCKS)).tolist()
    store = Copy(
        1, INCARNATION, "r", tuple(Piece(e, 0, tuple(order[4 * i : 4 * i + 4])) for i, e in enumerate(extents))
    )
    load = Copy(  # parts of blocks: slots 1 and 2, and 3 alone
        2,
        INCARNATION,
        "r",
        (
            *(Piece(e, 1, tuple(order[30 + 2 * i : 32 + 2 * i])) for i, e in enumerate(extents)),
            Piece(extents[0], 3, (order[50],)),
        ),
    )
    kv = noise(size, 1)

    host, expected = make_lifeline(2), kv.copy()
    end: Any = host
    reference = CpuCopier(expected, layout, end)
    with device_copier(kv, layout, make_lifeline(2)) as (copier, there):
        for copy, is_store in ((store, True), (load, False)):
            for side in (reference, copier):
                side.submit(copy, shard, is_store=is_store)
                (ended,) = await_finished(side, 1)
                assert ended[:3] == (copy, is_store, False)
            assert (copier._lifeline.bytes == host.bytes).all(), "the arenas differ"
            assert (there.cpu().numpy() == expected).all(), "the KV caches differ"
    here, there_places = moves(load, shard, layout, PAGE_BYTES)
    assert (expected[here] == host.bytes[there_places]).all(), "both copiers are wrong"
    reference.close()
    host.close()


def one_tensor() -> tuple[Layout, int, Shard]:
    layout, size = make_layout([(4, 2048)], blocks=BLOCKS, slots=SLOTS, layers_first=True)
    return layout, size, Shard(block_offset=0, state_offset=0, is_writer=True)


def test_the_arena_is_pinned_while_it_is_mapped() -> None:
    layout, size, _ = one_tensor()
    lifeline = make_lifeline(2)
    with device_copier(noise(size, 1), layout, lifeline):
        view = torch.frombuffer(lifeline.arena.buffer, dtype=torch.uint8)
        assert view.is_pinned()
        del view


def test_a_store_comes_after_what_the_engine_launched_and_before_what_it_launches_next() -> None:
    """Only the first half is the copier's promise: the second is kept by holding the blocks until it has ended."""
    layout, size, shard = one_tensor()
    lifeline = make_lifeline(2)
    extent = (Run(start=0, count=-(-layout.block_bytes // PAGE_BYTES)),)
    store = Copy(1, INCARNATION, "r", (Piece(extent, 0, (1, 2, 3, 4)),))
    with device_copier(noise(size, 1), layout, lifeline) as (copier, there):
        busy = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):  # some ten milliseconds of work, then the KV
            busy = busy @ busy / 4096
        there.fill_(42)
        copier.submit(store, shard, is_store=True)
        await_finished(copier, 1)
        assert (lifeline.bytes[: layout.block_bytes] == 42).all()


def test_a_load_is_there_for_what_is_launched_after_its_report() -> None:
    layout, size, shard = one_tensor()
    lifeline = make_lifeline(2)
    extent = (Run(start=0, count=-(-layout.block_bytes // PAGE_BYTES)),)
    load = Copy(1, INCARNATION, "r", (Piece(extent, 0, (4, 3, 2, 1)),))
    expected = noise(size, 1)
    here, places = moves(load, shard, layout, PAGE_BYTES)
    expected[here] = lifeline.bytes[places]
    with device_copier(noise(size, 1), layout, lifeline) as (copier, there):
        for _ in range(20):
            there.copy_(torch.from_numpy(noise(size, 1)))
            copier.submit(load, shard, is_store=False)
            await_finished(copier, 1)
            doubled = there.to(torch.int32) * 2  # on the engine's stream, without waiting
            assert (doubled.cpu().numpy() == expected.astype(np.int32) * 2).all()


def test_many_copies_in_flight_end_each_with_its_own_bytes() -> None:
    layout, size, shard = one_tensor()
    lifeline = make_lifeline(2)
    kv = noise(size, 1)
    extents = extents_for(layout.groups[0].slot_bytes, blocks=BLOCKS, runs=1)
    with device_copier(kv, layout, lifeline) as (copier, there):
        stores = [Copy(i, INCARNATION, f"r{i}", (Piece(extents[i], 0, (i,)),)) for i in range(1, BLOCKS)]
        for store in stores:
            copier.submit(store, shard, is_store=True)
        ended = await_finished(copier, BLOCKS - 1)
        assert sorted(finished.copy.op_id for finished in ended) == list(range(1, BLOCKS))
        assert not any(finished.is_failed for finished in ended)
        assert not lifeline.arena.uses
        for store in stores:  # everything back, one block further, round the null block
            piece = Piece(store.pieces[0].extent, 0, (store.op_id % (BLOCKS - 1) + 1,))
            copier.submit(Copy(store.op_id, INCARNATION, "r", (piece,)), shard, is_store=False)
        await_finished(copier, BLOCKS - 1)
        expected = kv.reshape(4, BLOCKS, 2048).copy()
        expected[:, 1:] = np.roll(expected[:, 1:], 1, axis=1)
        assert (there.cpu().numpy() == expected.reshape(-1)).all()


class TestFailures:
    """A copy that can't be made is reported as failed, leaves every byte as it was, and the next one works."""

    @pytest.mark.parametrize("is_store", [True, False])
    @pytest.mark.parametrize(
        "bad",
        [
            pytest.param(Piece((Run(start=8, count=1),), 0, (3, 4)), id="extent-short"),
            pytest.param(Piece((Run(start=255, count=9),), 0, (3, 4)), id="past-the-arena"),
            pytest.param(Piece((Run(start=8, count=9),), 0, (2, BLOCKS)), id="no-such-engine-block"),
            pytest.param(Piece((Run(start=8, count=9),), 0, (-1, 2)), id="negative-engine-block"),
        ],
    )
    def test_what_lies_outside(self, bad: Piece, is_store: bool) -> None:
        layout, size, shard = one_tensor()
        lifeline, kv = make_lifeline(2), noise(size, 1)
        good = Piece((Run(start=0, count=8),), 0, (1, 2))
        with device_copier(kv, layout, lifeline) as (copier, there):
            before = lifeline.bytes
            copier.submit(Copy(1, INCARNATION, "r", (good, bad)), shard, is_store=is_store)
            (ended,) = await_finished(copier, 1)
            assert ended.is_failed
            assert not lifeline.arena.uses
            assert (there.cpu().numpy() == kv).all()
            assert (lifeline.bytes == before).all()
            copier.submit(Copy(2, INCARNATION, "r", (good,)), shard, is_store=is_store)
            (ended,) = await_finished(copier, 1)
            assert not ended.is_failed

    @pytest.mark.parametrize("is_store", [True, False])
    def test_another_session(self, is_store: bool) -> None:
        layout, size, shard = one_tensor()
        lifeline, kv = make_lifeline(2), noise(size, 1)
        with device_copier(kv, layout, lifeline) as (copier, there):
            before = lifeline.bytes
            copy = Copy(1, b"o" * 16, "r", (Piece((Run(start=0, count=8),), 0, (1, 2)),))
            copier.submit(copy, shard, is_store=is_store)
            (ended,) = await_finished(copier, 1)
            assert ended[:3] == (copy, is_store, True)
            assert (there.cpu().numpy() == kv).all()
            assert (lifeline.bytes == before).all()
