"""Mutants of Saltern: each breaks one rule of its engine's side or of its core, and the harness has to notice.

The first sentence of each says what goes wrong. A mutant patches what decides the rule, and nothing else.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from saltern.core.blocks import Block
from saltern.core.cache import Cache
from saltern.core.disk import Disk
from saltern.core.effects import ForgetRecords, WipePages
from saltern.core.keys import digest
from saltern.core.messages import Acquire, Acquired, Discard, Loading, Lookup, Release, Reserve
from saltern.vllm import connector as connector_module
from saltern.vllm import copier as copier_module
from saltern.vllm import planner as planner_module
from saltern.vllm import session as session_module
from saltern.vllm.connector import PooledBlocks, SalternConnector
from saltern.vllm.copies import Copies, Piece, Reports
from saltern.vllm.geometry import NULL_BLOCK, Geometry, Pages
from saltern.vllm.planner import Operation, Planner
from saltern.vllm.questions import Question, Questions
from saltern.vllm.session import Session
from saltern.vllm.track import Phase, Track

from .findings import EngineDied, Finding, NotDrained, StrayWrite, Stuck, WrongKV
from .saltern_disk import Overwritten
from .saltern_lives import OutOfService
from .saltern_world import Crossed, FreedTooEarly, Greedy, NotWiped, Resurrected, Tainted

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


def never_frees_what_is_overdue(patch: Patch) -> None:
    """Blocks stay held for a reservation that the server does not answer."""

    take = Questions.take_overdue

    def take_none(self: Questions) -> list[Question]:
        take(self)
        return []

    patch.setattr(Questions, "take_overdue", take_none)


def holds_without_bound(patch: Patch) -> None:
    """As many blocks are held as there are to store."""
    patch.setattr(planner_module, "HELD_SHARE_MAX", 1.0)


def delays_the_free(patch: Patch) -> None:
    """`request_finished_all_groups` asks vLLM to keep the blocks until `finished_sending` names the request."""
    transfer_results = SalternConnector.get_transfer_results

    def finish_late(self: SalternConnector, request: Request, block_ids: tuple[list[int], ...]) -> tuple[bool, None]:
        assert self._planner is not None, "no planner"
        self._planner.remove(request.request_id)
        return True, None

    def name_finished(self: SalternConnector, finished_req_ids: set[str]) -> Any:
        results = transfer_results(self, finished_req_ids)
        results.finished_sending.update(finished_req_ids)
        return results

    patch.setattr(SalternConnector, "request_finished_all_groups", finish_late)
    patch.setattr(SalternConnector, "get_transfer_results", name_finished)


def lets_the_engine_sleep(patch: Patch) -> None:
    """An idle engine stops stepping although something is held."""
    patch.setattr(SalternConnector, "has_pending_push_work", lambda self: False)


def promises_blocks_for_ever(patch: Patch) -> None:
    """vLLM is told not to preempt, since blocks would come free, although no copy is under way."""
    patch.setattr(SalternConnector, "has_pending_block_frees", lambda self: True)


def names_operations_by_request(patch: Patch) -> None:
    """Reports name the request: of two stores of one request, the one that ends ends the other."""
    take = Planner._take_reserved

    def take_under_the_last_name(self: Planner, question: Question | None, reply: Any) -> None:
        known = dict(self._operation_by_id)
        take(self, question, reply)
        for op_id in self._operation_by_id.keys() - known.keys():
            operation = self._operation_by_id.pop(op_id)
            names = [name for name, other in known.items() if other.is_store and other.track is operation.track]
            name = names[-1] if names else op_id
            self._copies.stores[-1] = operation.copy = dataclasses.replace(operation.copy, op_id=name)
            self._operation_by_id[name] = operation

    patch.setattr(Planner, "_take_reserved", take_under_the_last_name)


def forgets_reports_between_steps(patch: Patch) -> None:
    """Ranks are counted for each step anew."""
    report = Planner.report

    def report_one_step(self: Planner, reports: Reports) -> None:
        for op_id in {*reports.done, *reports.failed} & self._operation_by_id.keys():
            operation = self._operation_by_id[op_id]
            operation.done = operation.failed = 0
        report(self, reports)

    patch.setattr(Planner, "report", report_one_step)


def aborts_at_the_first_failure(patch: Patch) -> None:
    """A write is aborted as soon as one rank has failed it, while others still write."""
    report = Planner.report

    def report_failures_early(self: Planner, reports: Reports) -> None:
        for op_id in reports.failed:
            operation = self._operation_by_id.get(op_id)
            if operation is not None and operation.is_store:
                operation.failed = self._ranks - operation.done
        report(self, reports)

    patch.setattr(Planner, "report", report_failures_early)


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

    def linked_prefix(self: Cache, session: Any, ask: Lookup | Acquire) -> list[Block]:
        blocks: list[Block] = []
        for key in ask.keys:
            block = self._linked(ask.tenant, ask.user, key)
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


def keeps_bad_blocks(patch: Patch) -> None:
    """The server is not told of a block that could not be loaded."""
    send = Session.send
    patch.setattr(Session, "send", lambda self, message: isinstance(message, Discard) or send(self, message))


def overlooks_what_vllm_says_failed(patch: Patch) -> None:
    """Only failures that Saltern's own workers report count."""
    patch.setattr(Planner, "spoil", lambda self, block_ids, request_ids: None)


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
    send = Session.send

    def send_the_rest(self: Session, message: Any) -> bool:
        if isinstance(message, Reserve) and message.start:
            message = msgspec.structs.replace(message, keys=message.keys[message.start :], start=0)
        return send(self, message)

    patch.setattr(Session, "send", send_the_rest)


def counts_drafted_tokens(patch: Patch) -> None:
    """Tokens that were drafted count as known, before the model has agreed."""
    build = SalternConnector.build_connector_meta
    drafted: dict[str, list[int]] = {}

    def build_with_drafts(self: SalternConnector, scheduler_output: Any) -> Any:
        drafted.update(scheduler_output.scheduled_spec_decode_tokens)
        scheduler_output.scheduled_spec_decode_tokens = {}
        metadata = build(self, scheduler_output)
        scheduler_output.scheduled_spec_decode_tokens = dict(drafted)
        drafted.clear()
        return metadata

    patch.setattr(SalternConnector, "build_connector_meta", build_with_drafts)
    _expect_tokens(patch, lambda request: drafted.get(request.request_id, []))


def counts_placeholders(patch: Patch) -> None:
    """Tokens that steps in flight are still to choose, or to reject, count as known and computed."""
    _expect_tokens(patch, lambda request: [0] * request.num_output_placeholders, num_output_placeholders=0)


def _expect_tokens(patch: Patch, more_of: Callable[[Request], list[int]], **seen: object) -> None:
    """Have the planner see more tokens of each request than are known."""

    def expect(request: Any, *args: Any, **rest: Any) -> Track:
        names = {
            "all_token_ids": property(lambda self: [*request.all_token_ids, *more_of(request)]),
            "num_tokens": property(lambda self: request.num_tokens + len(more_of(request))),
            "__getattr__": lambda self, name: getattr(request, name),
        }
        return Track(type("Expected", (), names | seen)(), *args, **rest)

    patch.setattr(planner_module, "Track", expect)


def caches_sessions(patch: Patch) -> None:
    """Prompts that still grow are cached like others."""
    _cache_although(patch, "resumable", False)


def counts_tokens_not_computed(patch: Patch) -> None:
    """Tokens that the next steps are to compute count as computed."""
    plan = Planner.plan

    def plan_ahead(self: Planner, scheduled: Any, block_ids_of: Any) -> Copies:
        return plan(self, {request_id: tokens + 8 for request_id, tokens in scheduled.items()}, block_ids_of)

    patch.setattr(Planner, "plan", plan_ahead)


def waits_without_bound(patch: Patch) -> None:
    """A request waits for the server's answer for ever."""
    init = Planner.__init__

    def init_patiently(self: Planner, **parts: Any) -> None:
        init(self, **{**parts, "patience_seconds": math.inf})

    patch.setattr(Planner, "__init__", init_patiently)


def waits_for_each_question(patch: Patch) -> None:
    """Each question of a step may wait as long as all of them together."""
    wait = Planner._wait_for

    def wait_anew(self: Planner, track: Track) -> None:
        self._asking_seconds = None
        wait(self, track)

    patch.setattr(Planner, "_wait_for", wait_anew)


def asks_anew_every_time(patch: Patch) -> None:
    """Each time that vLLM asks, so is the server, and the answer to the last question is forgotten."""
    match = Planner.match

    def match_from_the_start(self: Planner, request_id: str, local_tokens: int) -> int | None:
        track = self._track_by_id.get(request_id)
        if track is not None and track.phase is Phase.ANSWERED:
            track.acquired, track.phase = None, Phase.IDLE
        return match(self, request_id, local_tokens)

    patch.setattr(Planner, "match", match_from_the_start)


def keeps_what_was_not_wanted(patch: Patch) -> None:
    """What was pinned for a request stays pinned when the request ends before it is admitted."""
    remove = Planner.remove

    def remove_in_peace(self: Planner, request_id: str) -> None:
        track = self._track_by_id.get(request_id)
        if track is not None:
            track.acquired = None
        remove(self, request_id)

    patch.setattr(Planner, "remove", remove_in_peace)


def releases_on_the_second_admission(patch: Patch) -> None:
    """What became a load is released when vLLM admits its request a second time."""
    load = Planner._load

    def load_and_keep(self: Planner, track: Track, tables: Any, loaded_tokens: int) -> None:
        acquired = track.acquired
        load(self, track, tables, loaded_tokens)
        track.acquired = acquired

    patch.setattr(Planner, "_load", load_and_keep)


def releases_before_the_copy_is_done(patch: Patch) -> None:
    """A read lease is given back when the load begins."""
    load = Planner._load

    def load_and_release(self: Planner, track: Track, tables: Any, loaded_tokens: int) -> None:
        load(self, track, tables, loaded_tokens)
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
    patch.setattr(planner_module, "Piece", lambda extent, first_slot, *rest: Piece(extent, 0, *rest))


def copies_one_group_only(patch: Patch) -> None:
    """Of several groups of layers the first alone is stored and loaded."""
    pages = Geometry.pages

    def pages_of_one(self: Geometry, tables: Any, index: int) -> Pages:
        first, *rest = pages(self, tables, index)
        return (first, *(tuple(NULL_BLOCK for _ in blocks) for blocks in rest))

    patch.setattr(Geometry, "pages", pages_of_one)
    patch.setattr(Geometry, "is_whole", lambda self, pages, index: True)


def confuses_groups(patch: Patch) -> None:
    """A load fills each group's blocks with what the group before it keeps."""
    load = Planner._load

    def load_turned(self: Planner, track: Track, tables: Sequence[Any], loaded_tokens: int) -> None:
        load(self, track, (*tables[1:], tables[0]), loaded_tokens)

    patch.setattr(Planner, "_load", load_turned)


def stores_what_a_window_forgot(patch: Patch) -> None:
    """Blocks are stored although vLLM has given up some of what the next block needs of them."""
    patch.setattr(Geometry, "is_whole", lambda self, pages, index: True)


def copies_the_null_block(patch: Patch) -> None:
    """The block that stands where a window keeps nothing is taken for one that holds something."""
    patch.setattr(copier_module, "NULL_BLOCK", -1)


def loads_without_the_state(patch: Patch) -> None:
    """A prefix is loaded, and the state that it ends in isn't."""
    load = Planner._load

    def load_without(self: Planner, track: Track, *args: Any) -> None:
        geometry, self._geometry = self._geometry, _Stateless(self._geometry.block_tokens, self._geometry.groups)
        load(self, track, *args)
        self._geometry = geometry

    patch.setattr(Planner, "_load", load_without)


class _Stateless(Geometry):
    """A geometry that knows of no states, but for the places of their groups."""

    has_states = False


def goes_back_where_nothing_can(patch: Patch) -> None:
    """A whole prompt is loaded, and its last token computed anew, behind a state or a window that is beyond it."""
    patch.setattr(Geometry, "keeps_all", True)


def names_bad_blocks_in_groups(patch: Patch) -> None:
    """Bad blocks are named to vLLM also where it knows what to do with failed requests only."""
    patch.setattr(SalternConnector, "_names_bad_blocks", True)


def keeps_its_namespace_after_a_reset(patch: Patch) -> None:
    """New weights find the KV of old ones."""
    first = property(lambda self: digest(b"saltern.epoch", [self._facts_digest, b""]))
    patch.setattr(SalternConnector, "_namespace", first)


def goes_on_with_old_requests_after_a_reset(patch: Patch) -> None:
    """Requests that came before the weights changed are cached under the old weights' names."""
    reset = Planner.reset

    def reset_for_new_ones(self: Planner, namespace: bytes) -> None:
        tracks = dict(self._track_by_id)
        self._track_by_id.clear()
        reset(self, namespace)
        self._track_by_id.update(tracks)

    patch.setattr(Planner, "reset", reset_for_new_ones)


def wipes_the_server_at_a_reset(patch: Patch) -> None:
    """A reset takes the blocks of everybody who uses the server."""
    reset = Planner.reset

    def reset_all(self: Planner, namespace: bytes) -> None:
        for track in self._track_by_id.values():
            if track.keys and track.incarnation == self._session.incarnation:
                self._session.send(Discard(track.user, track.keys[0]))
        reset(self, namespace)

    patch.setattr(Planner, "reset", reset_all)


def caches_for_prompt_logprobs(patch: Patch) -> None:
    """Requests that want to know the probability of each prompt token are cached like others."""
    _cache_although(patch, "skip_reading_prefix_cache", False)


def keeps_asking_a_frozen_server(patch: Patch) -> None:
    """A server that does not answer is asked on and on."""
    patch.setattr(Questions, "responds", True)


def waits_for_the_disk_for_ever(patch: Patch) -> None:
    """A request waits for what the disk brings however long it takes."""
    take = Planner._take_loading

    def take_patiently(self: Planner, question: Question | None, reply: Loading) -> None:
        take(self, question, reply)
        if question is not None and question.track.phase is Phase.COMING:
            question.track.waits_until = math.inf

    patch.setattr(Planner, "_take_loading", take_patiently)


def waits_longer_than_computing_takes(patch: Patch) -> None:
    """A request waits for what the disk brings as long as its patience lasts, although it would compute it sooner."""
    take = Planner._take_loading

    def take_patiently(self: Planner, question: Question | None, reply: Loading) -> None:
        take(self, question, reply)
        if question is not None and question.track.phase is Phase.COMING:
            question.track.waits_until = question.since + self._load_patience_seconds

    patch.setattr(Planner, "_take_loading", take_patiently)


def keeps_what_the_disk_brings_late(patch: Patch) -> None:
    """What comes from the disk for a request that waits no longer stays pinned."""
    take = Planner._take_acquired

    def take_in_time(self: Planner, question: Question | None, reply: Acquired) -> None:
        if question is not None:
            take(self, question, reply)

    patch.setattr(Planner, "_take_acquired", take_in_time)


def forgets_when_a_request_came(patch: Patch) -> None:
    """A reservation says that its request came just now."""
    reserve = Planner._reserve

    def reserve_as_new(self: Planner, track: Track, *args: Any, **rest: Any) -> None:
        track.began_at = self._clock()
        reserve(self, track, *args, **rest)

    patch.setattr(Planner, "_reserve", reserve_as_new)


def stores_what_began_before_an_erasure(patch: Patch) -> None:
    """The server does not ask when a request came."""
    patch.setattr(Cache, "_is_of_erased", lambda self, ask: False)


def forgets_erasures_at_a_restart(patch: Patch) -> None:
    """A server that starts does not know whom the one before has erased."""
    restore = Cache.restore
    patch.setattr(Cache, "restore", lambda self, records, erased, now: restore(self, records, (), now))


def keeps_the_records_of_the_erased(patch: Patch) -> None:
    """Who is erased is forgotten in RAM only."""
    patch.setattr(Disk, "erase", lambda self, tenant, user: None)


def leaves_what_was_erased_in_the_arena(patch: Patch) -> None:
    """Pages of an erased user are given to others as they are."""
    free = Cache._free

    def free_only(self: Cache, block: Block) -> None:
        free(self, block)
        self._effects[:] = [effect for effect in self._effects if not isinstance(effect, WipePages)]

    patch.setattr(Cache, "_free", free_only)


def publishes_what_was_lost(patch: Patch) -> None:
    """A block whose record could not be read is handed out like one that could."""
    end = Cache._end_loading
    patch.setattr(Cache, "_end_loading", lambda self, block, is_there: end(self, block, is_there=True))


def writes_what_nobody_holds(patch: Patch) -> None:
    """Blocks may be evicted while they are written to the disk."""

    def work(self: Cache) -> None:
        reads, needless = self.disk.start_reads()
        self._effects += reads
        for block in needless:
            self._end_loading(block, is_there=False)
        while (write := self.disk.start_write(self._may_pin)) is not None:
            self._effects.append(write[0])
        self._effects += self.disk.start_forgetting()

    patch.setattr(Cache, "_work", work)
    patch.setattr(Cache, "_end_write", lambda self, op, is_written: self.disk.end_write(op, is_written=is_written))


def frees_what_the_disk_reads_into(patch: Patch) -> None:
    """A block that is let go gives its pages back at once, although the disk has not done reading into them."""
    free = Cache._free_if_unheld

    def free_loading(self: Cache, block: Block) -> None:
        if any(block is read_into for _, read_into in self.disk.reads.values()):
            self.pool.free(block.extent)
        free(self, block)

    patch.setattr(Cache, "_free_if_unheld", free_loading)


def gives_slots_away_at_once(patch: Patch) -> None:
    """The pages of a record are given to another before the index has forgotten it."""
    start, end = Disk.start_forgetting, Disk.end_forgetting

    def start_and_end(self: Disk) -> list[ForgetRecords]:
        work = start(self)
        for each in work:
            end(self, each.op)
        return work

    patch.setattr(Disk, "start_forgetting", start_and_end)
    patch.setattr(Disk, "end_forgetting", lambda self, op: None)


def never_forgets_a_record(patch: Patch) -> None:
    """What is let go stays in the index."""
    patch.setattr(Disk, "start_forgetting", lambda self: [])


def keeps_the_record_of_a_bad_block(patch: Patch) -> None:
    """What could not be loaded is let go in RAM, and comes back from the disk."""
    discard = Cache._discard

    def discard_in_ram(self: Cache, session: Any, ask: Discard) -> None:
        with pytest.MonkeyPatch.context() as meanwhile:
            meanwhile.setattr(self.disk, "discard", lambda tenant, user, key: None)
            meanwhile.setattr(self.disk, "let_go", lambda record: None)
            discard(self, session, ask)

    patch.setattr(Cache, "_discard", discard_in_ram)


def _cache_although(patch: Patch, attribute: str, value: object) -> None:
    """Have the connector see another value of an attribute of each request."""
    salt_of = connector_module._salt_of

    class Seen:
        def __init__(self, request: Request) -> None:
            self._request = request
            setattr(self, attribute, value)
            self.sampling_params = SamplingParams()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._request, name)

    patch.setattr(connector_module, "_salt_of", lambda request, **rest: salt_of(Seen(request), **rest))


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
        self._names.prepare(track, request.num_tokens)

    patch.setattr(Planner, "add", add)


MUTANTS: dict[Callable[[Patch], None], tuple[type[Finding], ...]] = {
    holds_no_blocks: (WrongKV,),
    never_frees_what_was_refused: (NotDrained, Stuck, OutOfService),
    never_frees_what_is_overdue: (NotDrained, Stuck),
    holds_without_bound: (Greedy,),
    delays_the_free: (EngineDied, StrayWrite),
    lets_the_engine_sleep: (NotDrained, Stuck),
    promises_blocks_for_ever: (Stuck,),
    names_operations_by_request: (WrongKV, NotDrained, StrayWrite, Stuck, FreedTooEarly),
    forgets_reports_between_steps: (NotDrained, Stuck),
    aborts_at_the_first_failure: (FreedTooEarly,),
    commits_after_the_first_rank: (WrongKV, FreedTooEarly),
    commits_what_failed: (WrongKV,),
    publishes_aborted_writes: (WrongKV,),
    reads_unfinished_writes: (WrongKV,),
    keeps_the_children_of_a_lost_parent: (NotDrained, EngineDied, Tainted),
    asks_again_after_a_failed_load: (Stuck, Tainted),
    keeps_bad_blocks: (Tainted,),
    overlooks_what_vllm_says_failed: (Stuck,),
    hides_failed_loads: (WrongKV,),
    stays_in_an_ended_session: (OutOfService,),
    forgets_late_answers: (NotDrained,),
    reserves_without_parents: (Crossed,),
    counts_tokens_not_computed: (WrongKV,),
    counts_drafted_tokens: (Crossed, WrongKV),
    counts_placeholders: (Crossed, WrongKV),
    caches_sessions: (WrongKV, Crossed),
    waits_without_bound: (Stuck, Greedy),
    waits_for_each_question: (Greedy,),
    asks_anew_every_time: (NotDrained,),
    keeps_what_was_not_wanted: (NotDrained,),
    releases_on_the_second_admission: (EngineDied,),
    releases_before_the_copy_is_done: (WrongKV, FreedTooEarly),
    loads_synchronously: (WrongKV, StrayWrite, EngineDied),
    loads_from_the_first_slot: (WrongKV,),
    copies_one_group_only: (WrongKV,),
    confuses_groups: (WrongKV, StrayWrite),
    stores_what_a_window_forgot: (WrongKV,),
    copies_the_null_block: (StrayWrite,),
    loads_without_the_state: (WrongKV,),
    goes_back_where_nothing_can: (WrongKV, EngineDied),
    names_bad_blocks_in_groups: (EngineDied,),
    keeps_its_namespace_after_a_reset: (WrongKV,),
    goes_on_with_old_requests_after_a_reset: (WrongKV, Crossed),
    caches_for_prompt_logprobs: (Crossed,),
    keeps_asking_a_frozen_server: (Greedy,),
    waits_for_the_disk_for_ever: (Greedy,),
    waits_longer_than_computing_takes: (Greedy,),
    keeps_what_the_disk_brings_late: (NotDrained,),
    publishes_what_was_lost: (WrongKV,),
    frees_what_the_disk_reads_into: (FreedTooEarly,),
    writes_what_nobody_holds: (FreedTooEarly,),
    gives_slots_away_at_once: (Overwritten,),
    never_forgets_a_record: (NotDrained,),
    keeps_the_record_of_a_bad_block: (Tainted,),
    keeps_the_records_of_the_erased: (Resurrected,),
    leaves_what_was_erased_in_the_arena: (NotWiped,),
    stores_what_began_before_an_erasure: (Resurrected,),
    forgets_when_a_request_came: (Resurrected,),
    forgets_erasures_at_a_restart: (Resurrected,),
}
"""Each mutant with the findings it may be caught by: any other would be a fault of the mutant, not of its rule."""

HOSTILE: tuple[Callable[[Patch], None], ...] = (believes_what_clients_send, trusts_token_ids)
"""Mutants that only hostile requests bring down."""
