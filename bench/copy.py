"""Copies between an engine's paged KV and the arena of a real server, against memmove.

What runs is what runs in an engine: Reserve, copy, Commit and Acquire, copy, Release over the socket, with the
connector's own copier and lifeline. Only the model is missing. In each round follow

    store      ours, then memmove of the same segments (a page of one layer each) in the same order
    retrieve   the same, the other way
    contiguous one memmove of as many bytes, from the KV to the arena

and the ratios are those within a round.
"""

import ctypes
import mmap
import random
import time
from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np

from bench.population import prompt_keys, user_id
from bench.report import Cell, Report, Table, Target, spread
from bench.rounds import median, seconds_of
from bench.serving import Peer, Server, wait_until_populated
from saltern.core.extents import Extent
from saltern.core.keys import Key
from saltern.core.messages import Acquire, Acquired, Commit, Discard, Release, Reserve, Reserved
from saltern.vllm.copier import CpuCopier, Shard
from saltern.vllm.copies import Copy, Piece
from saltern.vllm.layout import GroupPages, LayerPages, Layout

BLOCK_TOKENS = 128
PROMPT_BLOCKS = 32  # 4,096 tokens: one operation
MEBIBYTE = 1024 * 1024
PAGE_BYTES = 64 * 1024


class Shape(NamedTuple):
    """A model's KV. `page_bytes` is what one layer keeps for one engine block."""

    name: str
    layers: int
    page_bytes: int
    engine_block_tokens: int

    @property
    def slots(self) -> int:
        """Return how many engine blocks make one block of ours."""
        return BLOCK_TOKENS // self.engine_block_tokens

    @property
    def slot_bytes(self) -> int:
        """Return what an engine block has in all layers."""
        return self.layers * self.page_bytes

    @property
    def block_bytes(self) -> int:
        """Return what one block of ours holds."""
        return self.slots * self.slot_bytes


SHAPES = (
    # 3 KV heads of 64, K and V, bfloat16: 768 bytes a token and layer.
    Shape("SmolLM2-135M, engine block 128", layers=30, page_bytes=98_304, engine_block_tokens=128),
    Shape("SmolLM2-135M, engine block 16", layers=30, page_bytes=12_288, engine_block_tokens=16),
    # 8 KV heads of 128, K and V, bfloat16: 4,096 bytes a token and layer.
    Shape("Llama-8B, engine block 16", layers=32, page_bytes=65_536, engine_block_tokens=16),
)


class Size(NamedTuple):
    """How much is measured: `total_bytes` once in each direction in each round, after one that doesn't count."""

    total_bytes: int
    rounds: int


FULL = Size(total_bytes=1024 * MEBIBYTE, rounds=5)
SMOKE = Size(total_bytes=40 * MEBIBYTE, rounds=1)


class Round(NamedTuple):
    """Seconds that each took in one round; those of memmove without the cost of calling it."""

    store: float
    store_memmove: float
    retrieve: float
    retrieve_memmove: float
    contiguous: float


def run(size: Size) -> Report:
    """Measure every shape against a server of its own."""
    rows: list[tuple[Cell, ...]] = []
    targets = []
    for shape in SHAPES:
        bench = _Bench(shape, size.total_bytes)
        try:
            rounds = [bench.round() for _ in range(1 + size.rounds)][1:]
        finally:
            bench.close()
        for what, ours, memmove in (
            ("store", [r.store for r in rounds], [r.store_memmove for r in rounds]),
            ("retrieve", [r.retrieve for r in rounds], [r.retrieve_memmove for r in rounds]),
        ):
            contiguous = [r.contiguous for r in rounds]
            ratios = [theirs / mine for mine, theirs in zip(ours, memmove, strict=True)]
            rows.append(
                (
                    f"{shape.name}: {what}",
                    shape.page_bytes // 1024,
                    *(bench.total_bytes / median(seconds) / 1e9 for seconds in (ours, memmove, contiguous)),
                    median(ratios),
                    spread(ratios),
                    median([theirs / mine for mine, theirs in zip(ours, contiguous, strict=True)]),
                )
            )
            targets.append(
                Target(f"{shape.name}: {what} against memmove", 100 * median(ratios), 80, "%", at_least=True)
            )
    columns = (
        "GB = 10⁹ bytes", "page KiB", "ours GB/s", "memmove GB/s", "contiguous GB/s", "ours / memmove", "rounds",
        "ours / contiguous",
    )  # fmt: skip
    title = f"{size.total_bytes // MEBIBYTE:,} MiB stored and retrieved in operations of {PROMPT_BLOCKS} blocks"
    return Report("copy", (Table(title, columns, tuple(rows)),), tuple(targets))


class _Prompt(NamedTuple):
    """A user's only prompt, and the engine blocks that hold each of its blocks."""

    number: int
    keys: tuple[Key, ...]
    engine_blocks: list[tuple[int, ...]]


class _Bench:
    """An engine's KV whose blocks are in use in random order, and a server with room for all of it."""

    def __init__(self, shape: Shape, total_bytes: int) -> None:
        self.shape = shape
        blocks = total_bytes // shape.block_bytes
        self.total_bytes = blocks * shape.block_bytes
        engine_blocks = list(range(1, 1 + blocks * shape.slots))  # block 0 is vLLM's null block
        random.Random(1).shuffle(engine_blocks)
        self._engine_blocks = [
            tuple(engine_blocks[block * shape.slots : (block + 1) * shape.slots]) for block in range(blocks)
        ]
        # vLLM's buffer is of plain pages; numpy would ask for huge ones.
        kv_bytes = self.total_bytes + shape.slot_bytes
        self._memory = mmap.mmap(-1, kv_bytes)
        self.kv = np.frombuffer(self._memory, dtype=np.uint8)
        self.kv.view(np.uint64)[...] = np.arange(kv_bytes // 8, dtype=np.uint64)  # no two pages are alike
        self.kv.reshape(shape.layers, -1, shape.page_bytes)[:, 0] = 0  # but for the null block, which is not stored
        self._layer_stride = shape.page_bytes * (1 + len(engine_blocks))
        tensor = LayerPages(
            offset=0,
            layers=shape.layers,
            layer_stride=self._layer_stride,
            block_stride=shape.page_bytes,
            page_bytes=shape.page_bytes,
        )
        group = GroupPages(offset=0, slots=shape.slots, tensors=(tensor,))
        layout = Layout(groups=(group,), blocks=1 + len(engine_blocks))
        self._server = Server(arena_bytes=self.total_bytes, page_bytes=PAGE_BYTES).__enter__()
        self.peer = Peer(self._server.socket, block_bytes=shape.block_bytes)
        self._copier = CpuCopier(self.kv, layout, self.peer.lifeline)
        self._shard = Shard(block_offset=0, state_offset=0, is_writer=True)
        self._op_ids = count(1)
        wait_until_populated(self.peer.arenas)

    def close(self) -> None:
        """End the copier, the connections and the server, in this order."""
        self._copier.close()
        self.peer.close()
        self._server.__exit__(None, None, None)

    def round(self) -> Round:
        """Store everything, retrieve it, and do the same with memmove; then empty the cache for the next round."""
        began = time.perf_counter()
        extents = self._store()
        store = time.perf_counter() - began
        store_memmove = self._memmove(extents, is_store=True)
        sample = slice(None, None, 4099)  # a byte of every page, at all places in it
        stored = self.kv[sample].copy()
        self.kv[:] = 0
        began = time.perf_counter()
        self._retrieve()
        retrieve = time.perf_counter() - began
        assert np.array_equal(self.kv[sample], stored), "what was retrieved is not what was stored"
        retrieve_memmove = self._memmove(extents, is_store=False)
        for prompt in self._prompts():
            self.peer.tell(Discard(user_id(prompt.number), prompt.keys[0]))
        arena, kv = self._arena_address(), self.kv.ctypes.data
        contiguous = seconds_of(lambda: ctypes.memmove(arena, kv, self.total_bytes))
        return Round(store, store_memmove, retrieve, retrieve_memmove, contiguous)

    def _prompts(self) -> Iterator[_Prompt]:
        for number, first in enumerate(range(0, len(self._engine_blocks), PROMPT_BLOCKS)):
            engine_blocks = self._engine_blocks[first : first + PROMPT_BLOCKS]
            yield _Prompt(number, prompt_keys(number, len(engine_blocks)), engine_blocks)

    def _store(self) -> list[Extent]:
        """Store every prompt and return where the blocks went, in their order."""
        extents: list[Extent] = []
        lease_by_op: dict[int, int] = {}
        for prompt in self._prompts():
            user = user_id(prompt.number)
            reserved = self.peer.ask(Reserve(1, user, prompt.keys, start=0, acquired_at=float("inf")))
            assert isinstance(reserved, Reserved) and len(reserved.grants) == len(prompt.keys), f"refused: {reserved}"
            granted = [grant.extent for grant in reserved.grants]
            lease_by_op[self._submit(prompt, granted, is_store=True)] = reserved.lease
            extents += granted
        for op_id in self._ended(len(lease_by_op)):
            self.peer.tell(Commit(lease_by_op[op_id]))
        return extents

    def _retrieve(self) -> None:
        lease_by_op: dict[int, int] = {}
        for prompt in self._prompts():
            acquired = self.peer.ask(Acquire(1, user_id(prompt.number), prompt.keys, start=0))
            assert isinstance(acquired, Acquired) and acquired.ready == len(prompt.keys), f"not found: {acquired}"
            lease_by_op[self._submit(prompt, acquired.extents, is_store=False)] = acquired.lease
        for op_id in self._ended(len(lease_by_op)):
            self.peer.tell(Release(lease_by_op[op_id]))

    def _submit(self, prompt: _Prompt, extents: Sequence[Extent], *, is_store: bool) -> int:
        pieces = tuple(
            Piece(extent=extent, first_slot=0, engine_blocks=blocks)
            for extent, blocks in zip(extents, prompt.engine_blocks, strict=True)
        )
        copy = Copy(next(self._op_ids), self.peer.session.incarnation, str(prompt.number), pieces)
        self._copier.submit(copy, self._shard, is_store=is_store)
        return copy.op_id

    def _ended(self, operations: int) -> Iterator[int]:
        """Yield operations as they end, looked for as often as an engine without other work does."""
        while operations:
            time.sleep(0.001)
            for finished in self._copier.finished():
                assert not finished.is_failed, "a copy failed"
                operations -= 1
                yield finished.copy.op_id

    def _memmove(self, extents: Sequence[Extent], *, is_store: bool) -> float:
        """Return how long memmove takes for the same segments, less what as many calls for no bytes take."""
        size, memmove = self.shape.page_bytes, ctypes.memmove
        pairs = self._segments(extents)
        if not is_store:
            pairs = [(kv, arena) for arena, kv in pairs]

        def move(count: int) -> None:
            for to, of in pairs:
                memmove(to, of, count)

        return seconds_of(lambda: move(size)) - seconds_of(lambda: move(0))

    def _segments(self, extents: Sequence[Extent]) -> list[tuple[int, int]]:
        """Return the addresses of each page of a layer, in the arena and in the KV."""
        arena, kv, shape = self._arena_address(), self.kv.ctypes.data, self.shape
        pairs: list[tuple[int, int]] = []
        for extent, engine_blocks in zip(extents, self._engine_blocks, strict=True):
            (run,) = extent  # the arena is cut into blocks of one size, so none is in pieces
            place = arena + run.start * PAGE_BYTES
            for engine_block in engine_blocks:
                for layer in range(shape.layers):
                    pairs.append((place, kv + layer * self._layer_stride + engine_block * shape.page_bytes))
                    place += shape.page_bytes
        return pairs

    def _arena_address(self) -> int:
        mapping = self.peer.lifeline.hold(self.peer.session.incarnation, 1.0)
        assert mapping is not None, "the session ended"
        address = np.frombuffer(mapping.buffer, dtype=np.uint8).ctypes.data
        mapping.release()
        return address
