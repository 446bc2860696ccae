"""The copier: moves engine blocks between a worker's KV cache and the arena, with the CPU.

One assignment moves all layers of an engine block and lets go of the interpreter's lock meanwhile, at the speed of
memmove over the same segments.

- A short store is done at once, between two steps, by all threads that compute the model: these go through each layer
  together, so that a thread of ours that takes a core from one of them has all others wait for it.
- A long one would make everybody's step longer: it has a thread of its own, since nobody waits for it.
- A load has two, since somebody waits for it, and one gets half of what the memory gives.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from saltern.client.lifeline import Lifeline, Mapping
from saltern.core.extents import Extent, extent_pages
from saltern.vllm.copies import Copy, Piece
from saltern.vllm.geometry import NULL_BLOCK
from saltern.vllm.layout import GroupPages, Layout

logger = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]
Assign = Callable[[Bytes, Bytes], None]
"""Sets the first to the second, of the same shape."""

AT_ONCE_BYTES_MAX = 32 * 1024 * 1024
"""For each thread that computes the model: a longer store doesn't hold a step up. This takes some 10 ms."""

ATTACH_SECONDS_MAX = 0.1
"""How long a copy waits for its session: vLLM may tell a worker of a lease before the server's word is read."""


class Finished(NamedTuple):
    """A copy that ended, and how."""

    copy: Copy
    is_store: bool
    is_failed: bool
    is_untouched: bool = False  # it failed for want of a mapped arena: that says nothing of the blocks in it
    seconds: float = 0.0  # from its begin, what it waited for before not counted


class Shard(NamedTuple):
    """Where a rank's share begins in a block, and in a state. Ranks with equal KV share one, and one of them writes."""

    block_offset: int
    state_offset: int
    is_writer: bool

    def position(self, group: GroupPages, slot: int) -> int:
        """Return where in its block a slot of a group begins, in bytes."""
        base = self.state_offset if group.is_state else self.block_offset
        return base + group.offset + slot * group.slot_bytes


class CpuCopier:
    """Copies with threads. `kv` is the worker's whole KV buffer, one byte an element."""

    def __init__(self, kv: Bytes, layout: Layout, lifeline: Lifeline) -> None:
        self._lifeline = lifeline
        self._layout = layout
        self._finished: SimpleQueue[Finished] = SimpleQueue()
        self._loader = ThreadPoolExecutor(1, "saltern-load", initializer=_use_all_cores)
        self._helper = ThreadPoolExecutor(1, "saltern-load-help", initializer=_use_all_cores)
        self._storer = ThreadPoolExecutor(1, "saltern-store", initializer=_use_all_cores)
        self._pages = [  # by group and tensor
            [
                np.lib.stride_tricks.as_strided(
                    kv[tensor.offset :],
                    shape=(layout.blocks, tensor.layers, tensor.page_bytes),
                    strides=(tensor.block_stride, tensor.layer_stride, 1),
                )
                for tensor in group.tensors
            ]
            for group in layout.groups
        ]

    def submit(self, copy: Copy, shard: Shard, *, is_store: bool) -> None:
        """Begin a copy; a short store has ended when this returns. For the thread that has the model computed."""
        if not is_store:
            self._loader.submit(self._run, copy, shard, is_store=False)
        elif sum(map(self._layout.piece_bytes, copy.pieces)) <= AT_ONCE_BYTES_MAX * torch.get_num_threads():
            self._run(copy, shard, is_store=True, assign=_assign_with_all_threads)
        else:
            self._storer.submit(self._run, copy, shard, is_store=True)

    def finished(self) -> list[Finished]:
        """Return the copies that ended since the last call."""
        ended = []
        while not self._finished.empty():  # this is the only reader
            ended.append(self._finished.get())
        return ended

    def close(self) -> None:
        """Wait for the copies under way and drop those not begun."""
        for pool in (self._loader, self._helper, self._storer):  # a load waits for its helper
            pool.shutdown(cancel_futures=True)

    def _run(self, copy: Copy, shard: Shard, *, is_store: bool, assign: Assign = np.copyto) -> None:
        is_failed, is_untouched = True, False
        began = time.monotonic()
        try:
            mapping = self._lifeline.hold(copy.incarnation, ATTACH_SECONDS_MAX)
            is_untouched = mapping is None
            if mapping is not None:
                try:
                    self._move(copy, shard, mapping, assign, is_store=is_store)
                    is_failed = False
                finally:
                    mapping.release()
        except Exception:  # a copy that fails for whatever reason must still be reported
            logger.exception("a copy failed")
        seconds = time.monotonic() - began
        self._finished.put(Finished(copy, is_store, is_failed, is_untouched=is_untouched, seconds=seconds))

    def _move(self, copy: Copy, shard: Shard, mapping: Mapping, assign: Assign, *, is_store: bool) -> None:
        check_bounds(copy, shard, self._layout, mapping)
        pieces = iter(copy.pieces)
        is_shared = not is_store and len(copy.pieces) > 1
        # Both threads take the next piece when they are done with one: they seldom get equal shares of the cores.
        helped = self._helper.submit(self._move_pieces, pieces, shard, mapping, is_store) if is_shared else None
        try:
            self._move_pieces(pieces, shard, mapping, is_store, assign)
        finally:
            if helped is not None:
                helped.result()  # the arena stays mapped until both are done

    def _move_pieces(
        self, pieces: Iterator[Piece], shard: Shard, mapping: Mapping, is_store: bool, assign: Assign = np.copyto
    ) -> None:
        arena = np.frombuffer(mapping.buffer, dtype=np.uint8)  # a view of each thread's own, gone when it returns
        for piece in pieces:
            for slot, engine_block in enumerate(piece.engine_blocks, start=piece.first_slot):
                if engine_block == NULL_BLOCK:
                    continue
                position = shard.position(self._layout.groups[piece.group], slot)
                for pages in self._pages[piece.group]:
                    block = pages[engine_block]
                    _move_slot(arena, piece.extent, position, mapping.page_bytes, block, assign, is_store=is_store)
                    position += block.size


def check_bounds(copy: Copy, shard: Shard, layout: Layout, mapping: Mapping) -> None:
    """Raise ValueError unless all that a copy names exists: before its first byte moves, so none does in vain."""
    arena_pages = len(mapping.buffer) // mapping.page_bytes
    for piece in copy.pieces:
        if not all(0 <= run.start < run.start + run.count <= arena_pages for run in piece.extent):
            raise ValueError(f"{piece.extent} reaches out of the arena's {arena_pages} pages")
        group = layout.groups[piece.group]
        if piece.first_slot + len(piece.engine_blocks) > group.slots:
            raise ValueError(f"a block has {group.slots} slots, and not all of {piece}")
        end = shard.position(group, piece.first_slot + len(piece.engine_blocks))
        if end > extent_pages(piece.extent) * mapping.page_bytes:
            raise ValueError(f"{piece.extent} ends before byte {end} of the block")
        if not all(0 <= block < layout.blocks for block in piece.engine_blocks):
            raise ValueError(f"the KV cache has {layout.blocks} blocks, and not all of {piece.engine_blocks}")


def _move_slot(
    arena: Bytes, extent: Extent, position: int, page_bytes: int, block: Bytes, assign: Assign, *, is_store: bool
) -> None:
    """Copy the layers of one engine block to or from byte `position` of an extent.

    `block` has the shape [layers, page bytes]. Raises ValueError if the extent doesn't hold so much.
    """
    parts = extent_slices(extent, position, block.size, page_bytes)
    if len(parts) == 1:
        place = arena[parts[0]].reshape(block.shape)
        to, of = (place, block) if is_store else (block, place)
        assign(to, of)
    elif is_store:  # an extent in several runs is rare, and pays with a second copy
        gathered, done = block.reshape(-1), 0
        for part in parts:
            size = part.stop - part.start
            arena[part] = gathered[done : done + size]
            done += size
    else:
        block[...] = np.concatenate([arena[part] for part in parts]).reshape(block.shape)


def extent_slices(extent: Extent, position: int, size: int, page_bytes: int) -> list[slice]:
    """Return where bytes `[position, position + size)` of an extent lie in the arena."""
    slices = []
    for run in extent:
        run_bytes = run.count * page_bytes
        if position < run_bytes:
            start = run.start * page_bytes + position
            taken = min(size, run_bytes - position)
            slices.append(slice(start, start + taken))
            size -= taken
            if not size:
                return slices
        position = max(position - run_bytes, 0)
    raise ValueError("a copy reaches past the end of its extent")


def _assign_with_all_threads(to: Bytes, of: Bytes) -> None:
    torch.from_numpy(to).copy_(torch.from_numpy(of))


def _use_all_cores() -> None:
    """Let this thread run on every core that the process has.

    vLLM pins the thread that starts us to one core, which we would otherwise inherit: all copies would share it, with
    each other and with that thread.
    """
    try:
        threads = os.listdir("/proc/self/task")
    except OSError:  # out of file descriptors: then it is the one core
        return
    cores: set[int] = set()
    for thread in threads:
        with suppress(OSError):  # it has ended meanwhile
            cores |= os.sched_getaffinity(int(thread))
    with suppress(OSError):  # not allowed here: then it is the one core
        os.sched_setaffinity(0, cores)
