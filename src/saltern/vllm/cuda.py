"""The copier for CUDA: moves engine blocks between device memory and the arena on streams of its own.

The arena is registered with CUDA (pinned) when it is mapped, so that one large asynchronous copy a slot
goes straight into it. A slot's pages lie scattered on the device; they are gathered into a staging buffer
there first, one kernel a tensor, instead of one small copy a layer.

    store   KV pages ────copy──────► staging (device) ──copy──► arena (pinned)     on the store stream
    load    KV pages ◄────copy────── staging (device) ◄──copy── arena (pinned)     on the load stream

Streams are ordered by events: a copy begins behind whatever the engine's stream had launched when the step
began, and its end is an event that is asked, not waited for. Only the worker's own thread comes here.
"""

import logging
from collections import deque
from typing import NamedTuple

import torch

from saltern.client.lifeline import Arena, Lifeline, Mapping
from saltern.vllm.copier import ATTACH_SECONDS_MAX, Finished, Shard, check_bounds, extent_slices
from saltern.vllm.copies import Copy
from saltern.vllm.geometry import NULL_BLOCK
from saltern.vllm.layout import Layout

logger = logging.getLogger(__name__)

STAGING_SLOTS = 16
"""Slots in flight per direction: 16 of 2 MB keep a PCIe 5 link busy for a millisecond."""


_HOST_REGISTER_PORTABLE = 1  # pinned for every device of the process


class _Running(NamedTuple):
    copy: Copy
    is_store: bool
    began: torch.cuda.Event
    event: torch.cuda.Event
    mapping: Mapping


class _Lane:
    """One direction: a stream, and a ring of staging buffers that it alone uses, in its own order."""

    def __init__(self, device: torch.device, slot_bytes_max: int) -> None:
        self.stream = torch.cuda.Stream(device)
        self._ring = torch.empty((STAGING_SLOTS, slot_bytes_max), dtype=torch.uint8, device=device)
        self._next = 0

    def staging(self, slot_bytes: int) -> torch.Tensor:
        """Return the next buffer; what used it before is ahead of us in the stream."""
        self._next = (self._next + 1) % STAGING_SLOTS
        return self._ring[self._next, :slot_bytes]


class CudaCopier:
    """Copies with streams. `kv` is the worker's whole KV buffer on the device, one byte an element."""

    def __init__(self, kv: torch.Tensor, layout: Layout, lifeline: Lifeline) -> None:
        self._lifeline = lifeline
        self._layout = layout
        self._device = kv.device
        slot_bytes_max = max(group.slot_bytes for group in layout.groups)
        self._loads = _Lane(kv.device, slot_bytes_max)
        self._stores = _Lane(kv.device, slot_bytes_max)
        self._running: deque[_Running] = deque()
        self._failed: list[Finished] = []
        self._is_pinned = False
        self._pages = [  # by group and tensor
            [
                torch.as_strided(
                    kv,
                    (tensor.layers, layout.blocks, tensor.page_bytes),
                    (tensor.layer_stride, tensor.block_stride, 1),
                    tensor.offset,
                )
                for tensor in group.tensors
            ]
            for group in layout.groups
        ]
        lifeline.on_map, lifeline.on_unmap = self._register, self._unregister

    def submit(self, copy: Copy, shard: Shard, *, is_store: bool) -> None:
        """Launch a copy behind all that the engine has launched so far."""
        mapping = self._lifeline.hold(copy.incarnation, ATTACH_SECONDS_MAX)
        if mapping is None:
            self._failed.append(Finished(copy, is_store, is_failed=True, is_untouched=True))
            return
        lane = self._stores if is_store else self._loads
        began, event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        try:
            lane.stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(lane.stream):
                began.record(lane.stream)
                self._launch(copy, shard, mapping, lane, is_store=is_store)
                event.record(lane.stream)
        except Exception:  # a copy that fails for whatever reason must still be reported
            logger.exception("a copy failed")
            try:
                lane.stream.synchronize()  # part of it may have been launched
            finally:
                mapping.release()
                self._failed.append(Finished(copy, is_store, is_failed=True))
            return
        self._running.append(_Running(copy, is_store, began, event, mapping))

    def finished(self) -> list[Finished]:
        """Return the copies that ended since the last call."""
        ended, self._failed = self._failed, []
        still_running: deque[_Running] = deque()
        for running in self._running:
            if running.event.query():
                running.mapping.release()
                seconds = running.began.elapsed_time(running.event) / 1000
                ended.append(Finished(running.copy, running.is_store, is_failed=False, seconds=seconds))
            else:
                still_running.append(running)
        self._running = still_running
        return ended

    def close(self) -> None:
        """Wait for the copies under way."""
        for lane in (self._loads, self._stores):
            lane.stream.synchronize()
        self.finished()

    def _launch(self, copy: Copy, shard: Shard, mapping: Mapping, lane: _Lane, *, is_store: bool) -> None:
        check_bounds(copy, shard, self._layout, mapping)
        arena = torch.frombuffer(mapping.buffer, dtype=torch.uint8)
        for piece in copy.pieces:
            group, pages = self._layout.groups[piece.group], self._pages[piece.group]
            for slot, engine_block in enumerate(piece.engine_blocks, start=piece.first_slot):
                if engine_block == NULL_BLOCK:
                    continue
                position = shard.position(group, slot)
                parts = extent_slices(piece.extent, position, group.slot_bytes, mapping.page_bytes)
                staging = lane.staging(group.slot_bytes)
                if is_store:
                    _gather(pages, engine_block, staging)
                done = 0
                for part in parts:
                    size = part.stop - part.start
                    there, here = arena[part], staging[done : done + size]
                    if is_store:
                        there.copy_(here, non_blocking=True)
                    else:
                        here.copy_(there, non_blocking=True)
                    done += size
                if not is_store:
                    _scatter(staging, pages, engine_block)

    def _register(self, arena: Arena) -> None:
        """Pin the arena. Copies to memory that isn't are correct, but slow and not asynchronous."""
        with torch.cuda.device(self._device):  # this thread's own would be the first, whatever this rank's is
            view = torch.frombuffer(arena.buffer, dtype=torch.uint8)
            error = int(torch.cuda.cudart().cudaHostRegister(view.data_ptr(), view.numel(), _HOST_REGISTER_PORTABLE))
        self._is_pinned = error == 0
        if not self._is_pinned:
            logger.warning("CUDA can't pin the arena (error %d, see `ulimit -l`): copies will be slow", error)

    def _unregister(self, arena: Arena) -> None:
        if self._is_pinned:
            self._is_pinned = False
            with torch.cuda.device(self._device):
                view = torch.frombuffer(arena.buffer, dtype=torch.uint8)
                torch.cuda.cudart().cudaHostUnregister(view.data_ptr())


def _gather(tensors: list[torch.Tensor], engine_block: int, staging: torch.Tensor) -> None:
    done = 0
    for pages in tensors:
        block = pages[:, engine_block]
        staging[done : done + block.numel()].view(block.shape).copy_(block)
        done += block.numel()


def _scatter(staging: torch.Tensor, tensors: list[torch.Tensor], engine_block: int) -> None:
    done = 0
    for pages in tensors:
        block = pages[:, engine_block]
        block.copy_(staging[done : done + block.numel()].view(block.shape))
        done += block.numel()
