"""Mutants of the planner: each breaks one rule, and the tests have to notice."""

from collections.abc import Sequence
from typing import Any

import pytest

from saltern.core.extents import Extent
from saltern.core.keys import UserKey, unsigned_user_key
from saltern.core.messages import Commit, Release
from saltern.vllm import names, planner
from saltern.vllm.copies import Piece, Reports
from saltern.vllm.names import Names
from saltern.vllm.planner import Operation, Planner
from saltern.vllm.track import Track


def drops_the_salt(patch: pytest.MonkeyPatch) -> None:
    """All users share their blocks."""

    def one_key_for_all(secret: bytes, salt: str) -> UserKey:
        return unsigned_user_key(secret, "")

    patch.setattr(names, "unsigned_user_key", one_key_for_all)


def swaps_the_neighbours_salts(patch: pytest.MonkeyPatch) -> None:
    """A request gets the salt of the one that came before it."""
    add = Planner.add

    def add_with_the_last_ones(self: Planner, request: Any, salt: str, extras: bytes = b"") -> None:
        neighbour = list(self._track_by_id.values())[-1:]
        add(self, request, neighbour[0].salt if neighbour else salt, extras)

    patch.setattr(Planner, "add", add_with_the_last_ones)


def does_not_hold(patch: pytest.MonkeyPatch) -> None:
    """Blocks are copied later, and nobody keeps them from being reused until then."""
    init = Planner.__init__

    class Unheld:
        def __init__(self, total: int) -> None:
            self.total = total

        def hold(self, block_ids: Sequence[int]) -> None:
            pass

        def free(self, block_ids: Sequence[int]) -> None:
            pass

    def init_without_holding(self: Planner, **options: Any) -> None:
        init(self, **{**options, "blocks": Unheld(options["blocks"].total)})

    patch.setattr(Planner, "__init__", init_without_holding)


def commits_after_the_first_rank(patch: pytest.MonkeyPatch) -> None:
    """A block is published although a rank is still writing."""
    report = Planner.report

    def report_early(self: Planner, reports: Reports) -> None:
        for op_id in reports.done:
            operation = self._operation_by_id.get(op_id)
            if operation is not None and operation.is_store and operation.copy.incarnation == self._session.incarnation:
                self._session.send(Commit(operation.lease))
        report(self, reports)

    patch.setattr(Planner, "report", report_early)


def releases_on_the_second_admission(patch: pytest.MonkeyPatch) -> None:
    """The end of a load's wait is taken for a hit that wasn't wanted."""
    admit = Planner.admit

    def admit_and_release(self: Planner, request_id: str, tables: Any, loaded_tokens: int) -> None:
        admit(self, request_id, tables, loaded_tokens)
        for operation in self._operation_by_id.values():
            if operation.track.request.request_id == request_id and not operation.is_store:
                self._session.send(Release(operation.lease))

    patch.setattr(Planner, "admit", admit_and_release)


def forgets_late_answers(patch: pytest.MonkeyPatch) -> None:
    """What an answer pins that nobody waits for any more stays pinned."""
    take = Planner._take_acquired

    def take_in_time(self: Planner, question: Any, reply: Any) -> None:
        if question is not None and not question.is_dropped:
            take(self, question, reply)

    patch.setattr(Planner, "_take_acquired", take_in_time)


def asks_again_after_a_failed_load(patch: pytest.MonkeyPatch) -> None:
    """A bad block is matched, loaded and failed for ever."""
    finish = Planner._finish

    def finish_in_peace(self: Planner, operation: Operation) -> None:
        if not operation.is_store:
            operation.failed, operation.is_spoiled = 0, False
        finish(self, operation)

    patch.setattr(Planner, "_finish", finish_in_peace)


def commits_what_failed(patch: pytest.MonkeyPatch) -> None:
    """A block is published that a rank could not write."""
    finish = Planner._finish

    def finish_well(self: Planner, operation: Operation) -> None:
        if operation.is_store:
            operation.failed, operation.is_spoiled = 0, False
        finish(self, operation)

    patch.setattr(Planner, "_finish", finish_well)


def loads_from_the_first_slot(patch: pytest.MonkeyPatch) -> None:
    """A local hit that ends inside a block of the cache is loaded from that block's beginning."""

    def piece(extent: Extent, first_slot: int, engine_blocks: tuple[int, ...], group: int) -> Piece:
        return Piece(extent, 0, engine_blocks, group)

    patch.setattr(planner, "Piece", piece)


def takes_speculation_for_truth(patch: pytest.MonkeyPatch) -> None:
    """A block counts as full one token too early."""
    plan = Planner.plan

    def plan_ahead(self: Planner, scheduled: Any, block_ids_of: Any) -> Any:
        return plan(self, {request_id: tokens + 1 for request_id, tokens in scheduled.items()}, block_ids_of)

    patch.setattr(Planner, "plan", plan_ahead)


def keeps_the_keys_of_a_lost_session(patch: pytest.MonkeyPatch) -> None:
    """A new session is spoken to in the names of the last."""
    prepare = Names.prepare

    def prepare_once(self: Names, track: Track, tokens: int) -> bool:
        if track.incarnation:
            track.incarnation = self._session.incarnation
        return prepare(self, track, tokens)

    patch.setattr(Names, "prepare", prepare_once)
