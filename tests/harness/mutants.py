"""Mutants of the reference connector: each breaks one rule, and the harness has to notice.

The first sentence of each says what goes wrong. A mutant overrides what decides the rule and nothing else.
"""

from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from .findings import EngineDied, Finding, NotDrained, StrayWrite, Stuck, WrongKV
from .reference import Bytes, Key, Load, Plan, ReferenceConnector


class SkipsALayer(ReferenceConnector):
    """A load leaves the last layer as it was."""

    def copy_in(self, block_id: int, shard: Bytes) -> None:
        for layer, view in enumerate(self._views[: max(1, len(self._views) - 1)]):
            view[block_id] = shard[layer]


class ReversesBlocks(ReferenceConnector):
    """A load puts the first block where the last belongs."""

    def pairs(self, load: Load) -> list[tuple[Key, int]]:
        return list(zip(load.keys, reversed(load.block_ids), strict=True))


class DropsTheSalt(ReferenceConnector):
    """All users share their blocks."""

    def key(self, request: Request, end: int) -> Key:
        return None, super().key(request, end)[1]


class UsesTheNeighboursSalt(ReferenceConnector):
    """The salt of a batch's first request is used for all of it."""

    def key(self, request: Request, end: int) -> Key:
        return next(iter(self._request_by_id.values())).cache_salt, super().key(request, end)[1]


class ForgetsThePrefix(ReferenceConnector):
    """A block is known by its own tokens, whatever came before them."""

    def key(self, request: Request, end: int) -> Key:
        salt, tokens = super().key(request, end)
        return salt, tokens[-self._block_tokens :]


class CopiesLateWithoutHolding(ReferenceConnector):
    """A block is copied one step after it was filled, and nobody keeps it from being reused meanwhile."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._store_steps = 1

    def hold(self, op_id: int, block_id: int) -> None:
        return


class NeverLetsGo(ReferenceConnector):
    """A held block is not freed after its copy."""

    def release(self, op_id: int) -> None:
        self._held_by_op.pop(op_id, None)


class FreesTwice(ReferenceConnector):
    """A block is freed that was never held."""

    def hold(self, op_id: int, block_id: int) -> None:
        self._held_by_op[op_id] = block_id


class ReadsWhileWriting(ReferenceConnector):
    """A block can be read as soon as it is reserved; what was not copied yet reads as zeros."""

    def readable(self, key: Key) -> bool:
        return key in self._memory.entry_by_key

    def shard(self, key: Key) -> Bytes:
        shard_by_rank = self._memory.entry_by_key[key].shard_by_rank
        return shard_by_rank.get(self._rank, np.stack([np.zeros_like(view[0]) for view in self._views]))


class ReadsTheWrongRank(ReferenceConnector):
    """Every rank loads the shard of rank 0."""

    def shard(self, key: Key) -> Bytes:
        return self._memory.entry_by_key[key].shard_by_rank[0]


class StoresUnfilledBlocks(ReferenceConnector):
    """A block that is begun counts as full."""

    def full_blocks(self, request: Request, scheduled_tokens: int) -> int:
        known_tokens: int = min(request.num_computed_tokens + scheduled_tokens, request.num_tokens)
        return -(-known_tokens // self._block_tokens)


class HidesFailures(ReferenceConnector):
    """A failed load is reported finished and nothing else."""

    def report_bad(self, block_id: int) -> None:
        return


class InsistsAfterFailure(ReferenceConnector):
    """A request whose load failed is promised the same blocks again, and they fail again."""

    def matches(self, request: Request) -> bool:
        return not request.skip_reading_prefix_cache

    def _finish(self, load: Load) -> None:
        super()._finish(load)
        if self._fail_every:
            for block_id in load.block_ids:
                self.report_bad(block_id)


class FinishesEarly(ReferenceConnector):
    """A load is reported finished when it begins."""

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        super().start_load_kv(forward_context, **kwargs)
        plan = self._get_connector_metadata()
        assert isinstance(plan, Plan), "a plan of another connector"
        self._loaded = {load.request_id for load in plan.loads}


class ForgetsAbortedLoads(ReferenceConnector):
    """A load is not reported if its request was aborted meanwhile."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        self._aborted = getattr(self, "_aborted", set()) | finished_req_ids
        sending, recving = super().get_finished(finished_req_ids)
        return sending, (recving or set()) - self._aborted


class DelaysTheFree(ReferenceConnector):
    """`request_finished` asks to keep the blocks, and `finished_sending` names the request at once."""

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        super().request_finished(request, block_ids)
        return True, None

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return finished_req_ids, super().get_finished(finished_req_ids)[1]


class LoadsIntoTheWrongBlock(ReferenceConnector):
    """A load writes one block further."""

    def copy_in(self, block_id: int, shard: Bytes) -> None:
        super().copy_in((block_id + 1) % len(self._views[0]), shard)


class ClaimsAPartialBlock(ReferenceConnector):
    """One token more is promised than there is."""

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        tokens, is_async = super().get_num_new_matched_tokens(request, num_computed_tokens)
        assert tokens is not None, "the reference always knows"
        return min(tokens + is_async, request.num_tokens - num_computed_tokens), is_async


class NeverAnswers(ReferenceConnector):
    """It wants to be asked later, for ever."""

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return None, False


class StopsTheEngineEarly(ReferenceConnector):
    """Pending copies do not keep an idle engine stepping."""

    def has_pending_push_work(self) -> bool:
        return False


class NeverAllowsPreemption(ReferenceConnector):
    """It says that blocks are about to be freed when none are."""

    def has_pending_block_frees(self) -> bool:
        return True


class MixesUpReports(ReferenceConnector):
    """A step's report of stores is forgotten when a load finishes in the same step."""

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if connector_output.finished_recving:
            connector_output.kv_connector_worker_meta = None
        super().update_connector_output(connector_output)


class UsesAnOldBlockTable(ReferenceConnector):
    """A resumed request's blocks are looked up in the table it had before."""

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Plan:
        self._tables = getattr(self, "_tables", {})
        return super().build_connector_meta(scheduler_output)

    def _plan_stores(self, request: Request, scheduled_tokens: int, block_ids: list[int]) -> None:
        table = self._tables.setdefault(request.request_id, [])
        table += block_ids[len(table) :]
        super()._plan_stores(request, scheduled_tokens, table)


MUTANTS: dict[type[ReferenceConnector], tuple[type[Finding], ...]] = {
    SkipsALayer: (WrongKV,),
    ReversesBlocks: (WrongKV,),
    DropsTheSalt: (WrongKV,),
    UsesTheNeighboursSalt: (WrongKV,),
    ForgetsThePrefix: (WrongKV,),
    CopiesLateWithoutHolding: (WrongKV,),
    NeverLetsGo: (Stuck, NotDrained),
    FreesTwice: (WrongKV, NotDrained, EngineDied),
    ReadsWhileWriting: (WrongKV,),
    ReadsTheWrongRank: (WrongKV,),
    StoresUnfilledBlocks: (WrongKV,),
    HidesFailures: (WrongKV,),
    InsistsAfterFailure: (Stuck,),
    FinishesEarly: (WrongKV, StrayWrite),
    ForgetsAbortedLoads: (Stuck,),
    DelaysTheFree: (EngineDied, StrayWrite),
    LoadsIntoTheWrongBlock: (StrayWrite, WrongKV),
    ClaimsAPartialBlock: (WrongKV,),
    NeverAnswers: (Stuck,),
    StopsTheEngineEarly: (NotDrained,),
    NeverAllowsPreemption: (Stuck,),
    MixesUpReports: (Stuck,),
    UsesAnOldBlockTable: (WrongKV,),
}
"""Each mutant with the findings it may be caught by: any other would be a fault of the mutant, not of its rule."""
