"""A reference connector: a dict of blocks in memory, keyed by salt and prefix, that obeys every rule we know.

It shows that the harness lets a right connector pass, and the methods that decide something are small, so that a
mutant overrides one of them and is caught (see `mutants.py`).

A load copies one half of its blocks in the step that plans it and the rest `reference.load_steps` later. A store copies
in the step that fills the block, holding nothing; or `reference.store_steps` later, holding the block in vLLM's pool
until every rank has copied it.
"""

from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

Bytes = NDArray[np.int16]  # one block of one rank: [layers, heads, tokens, elements]
Key = tuple[str | None, tuple[int, ...]]  # salt, and all tokens up to the end of the block

GARBAGE = np.int16(0x7B7B)


class Entry(msgspec.Struct):
    """A block: the bytes of each rank, readable once all ranks have copied theirs."""

    shard_by_rank: dict[int, Bytes] = {}
    ready: bool = False


class Memory:
    """What outlives an engine: the blocks of all users."""

    def __init__(self) -> None:
        self.entry_by_key: dict[Key, Entry] = {}


MEMORIES: dict[str, Memory] = {}
"""All memories by name, since a connector is made by vLLM from settings that are plain values."""


class Load(msgspec.Struct, frozen=True):
    """Blocks to copy into the engine: `keys[i]` goes to engine block `block_ids[i]`."""

    request_id: str
    keys: tuple[Key, ...]
    block_ids: tuple[int, ...]


class Store(msgspec.Struct, frozen=True):
    """One engine block to copy out."""

    op_id: int
    key: Key
    block_id: int


class Plan(KVConnectorMetadata):
    """What the scheduler's connector asks of the workers' in one step."""

    def __init__(self, loads: list[Load], stores: list[Store]) -> None:
        self.loads = loads
        self.stores = stores


class Report(KVConnectorWorkerMetadata):
    """How many ranks have done which store operations in one step."""

    def __init__(self, ranks_by_op: dict[int, int]) -> None:
        self.ranks_by_op = ranks_by_op

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "Report":
        assert isinstance(other, Report), "a report of another connector"
        for op_id, ranks in other.ranks_by_op.items():
            self.ranks_by_op[op_id] = self.ranks_by_op.get(op_id, 0) + ranks
        return self


class Shape(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler's connector at start."""

    def __init__(self, block_bytes: int) -> None:
        self.block_bytes = block_bytes


class ReferenceConnector(KVConnectorBase_V1):
    """Both roles, as vLLM wants it: every method below belongs to one of them, in the order of its sections."""

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        setting = self._kv_transfer_config.get_from_extra_config
        self._memory = MEMORIES[setting("reference.memory", "")]
        self._load_steps: int = setting("reference.load_steps", 0)
        self._store_steps: int = setting("reference.store_steps", 0)
        self._fail_every: int = setting("reference.fail_every", 0)
        self._ranks: int = vllm_config.parallel_config.world_size
        self._rank = vllm_config.parallel_config.rank
        self._block_tokens: int = vllm_config.cache_config.block_size
        # Scheduler
        self._request_by_id: dict[str, Request] = {}
        self._failed: set[str] = set()
        self._matched: dict[str, tuple[Key, ...]] = {}
        self._new_loads: list[Load] = []
        self._load_by_request: dict[str, Load] = {}
        self._stored_blocks: dict[str, int] = {}
        self._waiting_stores: list[tuple[int, Store]] = []
        self._store_by_op: dict[int, Store] = {}
        self._ranks_by_op: dict[int, int] = {}
        self._held_by_op: dict[int, int] = {}
        self._ops = 0
        self._step = 0
        # Worker
        self._loading: list[tuple[int, Load]] = []
        self._loaded: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._loads = 0
        self._done: dict[int, int] = {}

    # What a mutant may get wrong

    def key(self, request: Request, end: int) -> Key:
        return request.cache_salt, tuple(request.all_token_ids[:end])

    def matches(self, request: Request) -> bool:
        return not bool(request.skip_reading_prefix_cache or request.request_id in self._failed)

    def readable(self, key: Key) -> bool:
        entry = self._memory.entry_by_key.get(key)
        return entry is not None and entry.ready

    def hold(self, op_id: int, block_id: int) -> None:
        self._pool.touch([self._pool.blocks[block_id]])
        self._held_by_op[op_id] = block_id

    def release(self, op_id: int) -> None:
        block_id = self._held_by_op.pop(op_id, None)
        if block_id is not None:
            self._pool.free_blocks([self._pool.blocks[block_id]])

    def is_complete(self, ranks: int) -> bool:
        return ranks == self._ranks

    def full_blocks(self, request: Request, scheduled_tokens: int) -> int:
        """Return how many blocks this step fills, of tokens that are known."""
        known_tokens: int = min(request.num_computed_tokens + scheduled_tokens, request.num_tokens)
        return known_tokens // self._block_tokens

    def shard(self, key: Key) -> Bytes:
        return self._memory.entry_by_key[key].shard_by_rank[self._rank]

    def copy_in(self, block_id: int, shard: Bytes) -> None:
        for layer, view in enumerate(self._views):
            view[block_id] = shard[layer]

    def pairs(self, load: Load) -> list[tuple[Key, int]]:
        return list(zip(load.keys, load.block_ids, strict=True))

    def report_bad(self, block_id: int) -> None:
        self._bad_blocks.add(block_id)

    # Scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        self._pool = gpu_block_pool

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        assert len(metadata) == self._ranks, "a rank is missing from the handshake"

    def on_new_request(self, request: Request) -> None:
        self._request_by_id[request.request_id] = request

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        keys = self._match(request, num_computed_tokens) if self.matches(request) else ()
        self._matched[request.request_id] = keys
        return len(keys) * self._block_tokens, bool(keys)

    def _match(self, request: Request, start: int) -> tuple[Key, ...]:
        keys = []
        for end in range(start + self._block_tokens, request.num_tokens + 1, self._block_tokens):
            key = self.key(request, end)
            if not self.readable(key):
                break
            keys.append(key)
        return tuple(keys)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        keys = self._matched.pop(request.request_id, ())
        if not num_external_tokens:
            return
        (block_ids,) = blocks.get_block_ids()
        load = Load(request.request_id, keys, tuple(block_ids[-len(keys) :]))
        self._new_loads.append(load)
        self._load_by_request[request.request_id] = load

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Plan:
        self._step += 1
        for request_id in scheduler_output.preempted_req_ids or ():
            self._stored_blocks.pop(request_id, None)
        state = scheduler_output.kv_connector_block_state
        assert state is not None, "no block state"
        for request_id, count in scheduler_output.num_scheduled_tokens.items():
            block_ids = state.get_block_ids(request_id)
            assert block_ids is not None, "no block table of a scheduled request"
            self._plan_stores(self._request_by_id[request_id], count, block_ids[0])
        stores = [store for due, store in self._waiting_stores if due <= self._step]
        self._waiting_stores = [(due, store) for due, store in self._waiting_stores if due > self._step]
        loads, self._new_loads = self._new_loads, []
        return Plan(loads, stores)

    def _plan_stores(self, request: Request, scheduled_tokens: int, block_ids: list[int]) -> None:
        stored = self._stored_blocks.get(request.request_id, 0)
        full = self.full_blocks(request, scheduled_tokens)
        for index in range(stored, full):
            key = self.key(request, (index + 1) * self._block_tokens)
            if key in self._memory.entry_by_key:
                continue
            self._ops += 1
            store = Store(self._ops, key, block_ids[index])
            self._memory.entry_by_key[key] = Entry()
            self._store_by_op[store.op_id] = store
            if self._store_steps:
                self.hold(store.op_id, store.block_id)
            self._waiting_stores.append((self._step + self._store_steps, store))
        self._stored_blocks[request.request_id] = max(stored, full)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        report = connector_output.kv_connector_worker_meta
        for op_id, ranks in (report.ranks_by_op if isinstance(report, Report) else {}).items():
            self._ranks_by_op[op_id] = self._ranks_by_op.get(op_id, 0) + ranks
            if self.is_complete(self._ranks_by_op[op_id]):
                self._memory.entry_by_key[self._store_by_op.pop(op_id).key].ready = True
                del self._ranks_by_op[op_id]
                self.release(op_id)
        for load in self._load_by_request.values():
            is_known = load.request_id in self._request_by_id  # not aborted while it loaded
            if is_known and connector_output.invalid_block_ids.intersection(load.block_ids):
                self._failed.add(load.request_id)
        for request_id in connector_output.finished_recving or ():
            self._load_by_request.pop(request_id)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        del self._request_by_id[request.request_id]
        self._matched.pop(request.request_id, None)
        self._stored_blocks.pop(request.request_id, None)
        self._failed.discard(request.request_id)
        return False, None

    def has_pending_push_work(self) -> bool:
        return bool(self._store_by_op)

    def has_pending_block_frees(self) -> bool:
        return bool(self._held_by_op)

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._views = [view.view(torch.int16).numpy() for view in kv_caches.values()]

    def get_handshake_metadata(self) -> Shape:
        return Shape(block_bytes=sum(view[0].nbytes for view in self._views))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        plan = self._get_connector_metadata()
        assert isinstance(plan, Plan), "a plan of another connector"
        self._step += 1
        for load in plan.loads:
            self._copy(load, slice(None, None, 2))
            # Later ranks are slower, so that a load is finished in one and under way in another.
            self._loading.append((self._step + self._load_steps * (1 + self._rank), load))
        for due, load in self._loading:
            if due <= self._step:
                self._finish(load)
        self._loading = [(due, load) for due, load in self._loading if due > self._step]

    def _copy(self, load: Load, part: slice) -> None:
        for key, block_id in self.pairs(load)[part]:
            self.copy_in(block_id, self.shard(key))

    def _finish(self, load: Load) -> None:
        self._copy(load, slice(1, None, 2))
        self._loads += 1
        if self._fail_every and self._loads % self._fail_every == 0:
            block_id = load.block_ids[self._loads % len(load.block_ids)]
            for view in self._views:
                view[block_id] = GARBAGE
            self.report_bad(block_id)
        self._loaded.add(load.request_id)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        plan = self._get_connector_metadata()
        assert isinstance(plan, Plan), "a plan of another connector"
        for store in plan.stores:
            entry = self._memory.entry_by_key[store.key]
            entry.shard_by_rank[self._rank] = np.stack([view[store.block_id] for view in self._views])
            self._done[store.op_id] = 1

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        loaded, self._loaded = self._loaded, set()
        return None, loaded

    def get_block_ids_with_load_errors(self) -> set[int]:
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def build_connector_worker_meta(self) -> Report | None:
        done, self._done = self._done, {}
        return Report(done) if done else None

    # The end

    def leftovers(self) -> Iterable[str]:
        """Return what is still remembered although no request is left."""
        for name in (
            "_request_by_id",
            "_failed",
            "_matched",
            "_new_loads",
            "_load_by_request",
            "_stored_blocks",
            "_waiting_stores",
            "_store_by_op",
            "_ranks_by_op",
            "_held_by_op",
            "_loading",
            "_loaded",
            "_done",
        ):
            if getattr(self, name):
                yield f"{self.role.name.lower()} connector remembers {name}: {getattr(self, name)}"
