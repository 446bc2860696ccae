"""An arena and a worker's KV cache for tests of the copiers, and what a copy of them should come to, byte by byte."""

import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from saltern.client.lifeline import Arena, Mapping
from saltern.core.extents import Extent
from saltern.vllm.copier import Bytes, Finished, Shard
from saltern.vllm.copies import Copy
from saltern.vllm.layout import GroupPages, LayerPages, Layout

INCARNATION = b"i" * 16
WAIT_SECONDS_MAX = 60.0  # for a loaded machine; nothing here takes as much as one


class FakeLifeline:
    """An attached lifeline: the real mapping of a real memfd, and nobody at the other end."""

    on_map: Callable[[Arena], None] | None = None
    on_unmap: Callable[[Arena], None] | None = None

    def __init__(self, *, pages: int, page_bytes: int) -> None:
        fd = os.memfd_create("arena")
        os.ftruncate(fd, pages * page_bytes)
        self.arena = Arena(fd, arena_bytes=pages * page_bytes, page_bytes=page_bytes)
        os.close(fd)
        self.is_attached = True
        self.gate = threading.Event()  # holding the arena waits for it where `gated` says so
        self.gated: Callable[[], bool] = lambda: False

    def hold(self, incarnation: bytes, timeout: float = 0.0) -> Mapping | None:
        """Return a use of the arena, as the real one does."""
        if self.gated():
            assert self.gate.wait(WAIT_SECONDS_MAX)
        if incarnation != INCARNATION or not self.is_attached:
            return None
        self.arena.uses += 1
        lifeline: Any = self
        return Mapping(lifeline, self.arena)

    def _release(self, arena: Arena) -> None:
        arena.uses -= 1

    @property
    def bytes(self) -> Bytes:
        """Return a copy of all that the arena holds."""
        return np.frombuffer(self.arena.buffer, dtype=np.uint8).copy()

    def fill(self, random: np.random.Generator) -> None:
        """Fill the arena with noise."""
        np.frombuffer(self.arena.buffer, dtype=np.uint8)[:] = random.integers(0, 256, len(self.arena.buffer))

    def close(self) -> None:
        """Unmap; nobody may still use the arena, or look at it."""
        assert not self.arena.uses, "a use of the arena was not released"
        assert self.arena.unmap(), "a view of the arena outlived its use"


def make_layout(
    shapes: Iterable[tuple[int, int]], *, blocks: int, slots: int, layers_first: bool, offset: int = 0
) -> tuple[Layout, int]:
    """Return a layout of one group with tensors of (layers, page bytes) each, and the bytes of the buffer they lie in.

    With `layers_first` a layer's pages are contiguous (LBHNC), else a block's are (BLHNC), those of all tensors.
    """
    shapes = list(shapes)
    slot_bytes = sum(layers * page_bytes for layers, page_bytes in shapes)
    tensors, position = [], offset
    for layers, page_bytes in shapes:
        tensors.append(
            LayerPages(
                offset=position,
                layers=layers,
                layer_stride=page_bytes * blocks if layers_first else page_bytes,
                block_stride=page_bytes if layers_first else slot_bytes,
                page_bytes=page_bytes,
            )
        )
        position += layers * page_bytes * (blocks if layers_first else 1)
    group = GroupPages(offset=0, slots=slots, tensors=tuple(tensors))
    return Layout(groups=(group,), blocks=blocks), offset + slot_bytes * blocks


def kv_places(group: GroupPages, engine_block: int) -> list[int]:
    """Return where the bytes of an engine block lie in the worker's buffer, in the order of a slot."""
    return [
        tensor.offset + layer * tensor.layer_stride + engine_block * tensor.block_stride + byte
        for tensor in group.tensors
        for layer in range(tensor.layers)
        for byte in range(tensor.page_bytes)
    ]


def arena_places(extent: Extent, page_bytes: int) -> list[int]:
    """Return where the bytes of an extent lie in the arena, in logical order."""
    return [byte for run in extent for byte in range(run.start * page_bytes, (run.start + run.count) * page_bytes)]


def moves(copy: Copy, shard: Shard, layout: Layout, page_bytes: int) -> tuple[list[int], list[int]]:
    """Return which bytes of the KV buffer belong to which of the arena."""
    here: list[int] = []
    there: list[int] = []
    for piece in copy.pieces:
        places = arena_places(piece.extent, page_bytes)
        group = layout.groups[piece.group]
        base = shard.state_offset if group.is_state else shard.block_offset
        for slot, engine_block in enumerate(piece.engine_blocks, start=piece.first_slot):
            if engine_block:  # block 0 is vLLM's null block
                start = base + group.offset + slot * group.slot_bytes
                here += kv_places(group, engine_block)
                there += places[start : start + group.slot_bytes]
    return here, there


def await_finished(copier: Any, copies: int) -> list[Finished]:
    """Return the copies that ended, once there are so many."""
    ended: list[Finished] = []
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while len(ended) < copies:
        ended += copier.finished()
        assert time.monotonic() < deadline, f"{len(ended)} of {copies} copies have ended"
        time.sleep(0.0005)
    return ended
