"""Mutants of Saltern: each breaks one rule of its engine's side or of its core, and the harness has to notice.

The first sentence of each says what goes wrong. A mutant patches what decides the rule, and nothing else.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
from vllm.v1.request import Request

from saltern.core.blocks import Block
from saltern.core.cache import Cache
from saltern.core.messages import Acquired, Release, Reserve
from saltern.vllm import planner as planner_module
from saltern.vllm import session as session_module
from saltern.vllm.connector import PooledBlocks, SalternConnector
from saltern.vllm.copies import Copies, Piece, Reports
from saltern.vllm.planner import Operation, Phase, Planner, Question, Track
from saltern.vllm.session import Session

from .findings import EngineDied, Finding, NotDrained, StrayWrite, Stuck, WrongKV
from .saltern_lives import OutOfService
from .saltern_world import Crossed

Patch = pytest.MonkeyPatch


def holds_no_blocks(patch: Patch) -> None:
    """Engine blocks are stored without being held: they are reused before they are copied."""
    patch.setattr(PooledBlocks, "hold", lambda self, block_ids: None)
    patch.setattr(PooledBlocks, "free", lambda self, block_ids: None)


def never_frees_what_was_refused(patch: Patch) -> None:
    """Blocks that the server did not grant stay held."""
    take = Planner._take_reserved

    def take_without_freeing(self: Planner, question: Question | None, reply: Any) -> None:
        if question is not None and not reply.grants:
            return
        take(self, question, reply)

    patch.setattr(Planner, "_take_reserved", take_without_freeing)


def delays_the_free(patch: Patch) -> None:
    """`request_finished` asks vLLM to keep the blocks until `finished_sending` names the request."""
    transfer_results = SalternConnector.get_transfer_results

    def finish_late(self: SalternConnector, request: Request, block_ids: list[int]) -> tuple[bool, None]:
        assert self._planner is not None, "no planner"
        self._planner.remove(request.request_id)
        return True, None

    def name_finished(self: SalternConnector, finished_req_ids: set[str]) -> Any:
        results = transfer_results(self, finished_req_ids)
        results.finished_sending.update(finished_req_ids)
        return results

    patch.setattr(SalternConnector, "request_finished", finish_late)
    patch.setattr(SalternConnector, "get_transfer_results", name_finished)


def lets_the_engine_sleep(patch: Patch) -> None:
    """An idle engine stops stepping although something is held."""
    patch.setattr(SalternConnector, "has_pending_push_work", lambda self: False)


def promises_blocks_for_ever(patch: Patch) -> None:
    """vLLM is told not to preempt, since blocks would come free, although no copy is under way."""
    patch.setattr(SalternConnector, "has_pending_block_frees", lambda self: True)


def commits_after_the_first_rank(patch: Patch) -> None:
    """A write is published when one rank has reported."""
    report = Planner.report

    def report_early(self: Planner, reports: Reports) -> None:
        for op_id in reports.done:
            operation = self._operation_by_id.get(op_id)
            if operation is not None and operation.is_store:
                self._finish(operation)
        report(self, reports)

    patch.setattr(Planner, "report", report_early)


def commits_what_failed(patch: Patch) -> None:
    """A write that one rank could not make is published all the same."""
    finish = Planner._finish

    def finish_well(self: Planner, operation: Operation) -> None:
        if operation.is_store:
            operation.failed, operation.is_spoiled = 0, False
        finish(self, operation)

    patch.setattr(Planner, "_finish", finish_well)


def publishes_aborted_writes(patch: Patch) -> None:
    """The server publishes the blocks of a write that was aborted."""
    patch.setattr(Cache, "_abort", Cache._commit)


def reads_unfinished_writes(patch: Patch) -> None:
    """The server hands out blocks that are still being written."""

    def linked_prefix(self: Cache, session: Any, user_id: Any, keys: Sequence[Any]) -> list[Block]:
        blocks: list[Block] = []
        for key in keys:
            block = self._linked(user_id, key)
            if block is None or block.length != session.block_bytes:
                break
            blocks.append(block)
        return blocks

    patch.setattr(Cache, "_ready_prefix", linked_prefix)


def keeps_the_children_of_a_lost_parent(patch: Patch) -> None:
    """What continues a block stays when the block goes."""

    def alone(self: Block) -> Any:
        yield self

    patch.setattr(Block, "with_descendants", alone)


def asks_again_after_a_failed_load(patch: Patch) -> None:
    """A request whose load failed is matched again, and the block that failed stays to be found."""
    finish = Planner._finish

    def finish_in_peace(self: Planner, operation: Operation) -> None:
        if not operation.is_store:
            operation.failed, operation.is_spoiled = 0, False
        finish(self, operation)

    patch.setattr(Planner, "_finish", finish_in_peace)


def overlooks_what_vllm_says_failed(patch: Patch) -> None:
    """Only failures that Saltern's own workers report count."""
    patch.setattr(Planner, "spoil", lambda self, block_ids: None)


def hides_failed_loads(patch: Patch) -> None:
    """A worker reports a failed load as over, and names no bad blocks."""
    patch.setattr(SalternConnector, "get_block_ids_with_load_errors", lambda self: set())


def stays_in_an_ended_session(patch: Patch) -> None:
    """The scheduler overhears that its session has ended, and goes on asking in it."""
    patch.setattr(session_module, "SessionEnded", _Unheard)


class _Unheard(msgspec.Struct):
    """A message that never comes."""

    reason: str


def forgets_late_answers(patch: Patch) -> None:
    """An answer that nobody waits for any more is not given back."""
    take = Planner._take_acquired

    def take_in_time(self: Planner, question: Question | None, reply: Acquired) -> None:
        if question is None or question.is_dropped:
            return
        if question.track.phase is Phase.ASKED and question.track.awaited == reply.request:
            take(self, question, reply)

    patch.setattr(Planner, "_take_acquired", take_in_time)


def reserves_without_parents(patch: Patch) -> None:
    """A reservation names only what is missing, not what it continues."""
    ask = Planner._ask

    def ask_for_the_rest(self: Planner, track: Track, message: Any, *, held: tuple[int, ...] = ()) -> bool:
        if isinstance(message, Reserve) and message.start:
            message = Reserve(
                message.request, message.user, message.keys[message.start :], start=0, acquired_at=message.acquired_at
            )
        return ask(self, track, message, held=held)

    patch.setattr(Planner, "_ask", ask_for_the_rest)


def counts_tokens_not_computed(patch: Patch) -> None:
    """A token that was speculated, and not confirmed, counts as computed."""
    plan = Planner.plan

    def plan_ahead(self: Planner, scheduled: Any, block_ids_of: Any) -> Copies:
        return plan(self, {request_id: tokens + 1 for request_id, tokens in scheduled.items()}, block_ids_of)

    patch.setattr(Planner, "plan", plan_ahead)


def waits_without_bound(patch: Patch) -> None:
    """A request waits for the server's answer for ever."""
    init = Planner.__init__

    def init_patiently(self: Planner, **parts: Any) -> None:
        init(self, **{**parts, "patience_seconds": math.inf})

    patch.setattr(Planner, "__init__", init_patiently)


def releases_on_the_second_admission(patch: Patch) -> None:
    """What became a load is released when vLLM admits its request a second time."""
    load = Planner._load

    def load_and_keep(self: Planner, track: Track, block_ids: Sequence[int], loaded_tokens: int) -> None:
        acquired = track.acquired
        load(self, track, block_ids, loaded_tokens)
        track.acquired = acquired

    patch.setattr(Planner, "_load", load_and_keep)


def releases_before_the_copy_is_done(patch: Patch) -> None:
    """A read lease is given back when the load begins."""
    load = Planner._load

    def load_and_release(self: Planner, track: Track, block_ids: Sequence[int], loaded_tokens: int) -> None:
        load(self, track, block_ids, loaded_tokens)
        operation = list(self._operation_by_id.values())[-1]
        self._session.send(Release(operation.lease))
        operation.lease = 0

    send = Session.send
    patch.setattr(Planner, "_load", load_and_release)
    patch.setattr(Session, "send", lambda self, message: message == Release(0) or send(self, message))


def loads_synchronously(patch: Patch) -> None:
    """A hit is promised for the very step that asks."""
    ask = SalternConnector.get_num_new_matched_tokens

    def promise(self: SalternConnector, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return ask(self, request, num_computed_tokens)[0], False

    patch.setattr(SalternConnector, "get_num_new_matched_tokens", promise)


def loads_from_the_first_slot(patch: Patch) -> None:
    """A load that begins inside a block of ours takes the block's first slots."""
    patch.setattr(planner_module, "Piece", lambda extent, first_slot, engine_blocks: Piece(extent, 0, engine_blocks))


def keeps_its_namespace_after_a_reset(patch: Patch) -> None:
    """New weights find the KV of old ones."""
    namespace = SalternConnector._namespace
    patch.setattr(SalternConnector, "_namespace", lambda self, *, epoch: namespace(self, epoch=b""))


def goes_on_with_old_requests_after_a_reset(patch: Patch) -> None:
    """Requests that came before the weights changed are cached under the old weights' names."""
    reset = Planner.reset

    def reset_for_new_ones(self: Planner, namespace: bytes) -> None:
        tracks = dict(self._track_by_id)
        self._track_by_id.clear()
        reset(self, namespace)
        self._track_by_id.update(tracks)

    patch.setattr(Planner, "reset", reset_for_new_ones)


def believes_what_clients_send(patch: Patch) -> None:
    """A request's `kv_transfer_params` are taken for what they should be."""
    arrive = SalternConnector.on_new_request

    def arrive_by_the_book(self: SalternConnector, request: Request) -> None:
        if request.kv_transfer_params is not None:
            request.kv_transfer_params["tenant"].lower()
        arrive(self, request)

    patch.setattr(SalternConnector, "on_new_request", arrive_by_the_book)


def trusts_token_ids(patch: Patch) -> None:
    """Token ids that are none end the engine."""

    def add(self: Planner, request: Any, salt: str, extras: bytes = b"") -> None:
        track = self._track_by_id[request.request_id] = Track(request, salt, extras)
        self._prepare(track, request.num_tokens)

    patch.setattr(Planner, "add", add)


MUTANTS: dict[Callable[[Patch], None], tuple[type[Finding], ...]] = {
    holds_no_blocks: (WrongKV,),
    never_frees_what_was_refused: (NotDrained, Stuck, OutOfService),
    delays_the_free: (EngineDied, StrayWrite),
    lets_the_engine_sleep: (NotDrained, Stuck),
    promises_blocks_for_ever: (Stuck,),
    commits_after_the_first_rank: (WrongKV,),
    commits_what_failed: (WrongKV,),
    publishes_aborted_writes: (WrongKV,),
    reads_unfinished_writes: (WrongKV,),
    keeps_the_children_of_a_lost_parent: (NotDrained, EngineDied),
    asks_again_after_a_failed_load: (Stuck,),
    overlooks_what_vllm_says_failed: (Stuck,),
    hides_failed_loads: (WrongKV,),
    stays_in_an_ended_session: (OutOfService,),
    forgets_late_answers: (NotDrained,),
    reserves_without_parents: (Crossed,),
    counts_tokens_not_computed: (WrongKV,),
    waits_without_bound: (Stuck,),
    releases_on_the_second_admission: (EngineDied,),
    releases_before_the_copy_is_done: (WrongKV,),
    loads_synchronously: (WrongKV, StrayWrite, EngineDied),
    loads_from_the_first_slot: (WrongKV,),
    keeps_its_namespace_after_a_reset: (WrongKV,),
    goes_on_with_old_requests_after_a_reset: (WrongKV, Crossed),
}
"""Each mutant with the findings it may be caught by: any other would be a fault of the mutant, not of its rule."""

HOSTILE: tuple[Callable[[Patch], None], ...] = (believes_what_clients_send, trusts_token_ids)
"""Mutants that only hostile requests bring down."""
