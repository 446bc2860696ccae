"""Tests of the worker: what it begins for its rank, and that every end is reported once."""

from typing import Any

import pytest

from saltern.core.extents import Run
from saltern.vllm.copier import Finished, Shard
from saltern.vllm.copies import Copies, Copy, Piece, Reports
from saltern.vllm.layout import GroupPages, LayerPages, Layout
from saltern.vllm.worker import Worker

PAGES = LayerPages(offset=0, layers=1, layer_stride=0, block_stride=8, page_bytes=8)
LAYOUT = Layout((GroupPages(offset=0, slots=1, tensors=(PAGES,)),), blocks=16)
SHARDS = (Shard(0, 0, is_writer=True), Shard(8, 0, is_writer=True))


class Log:
    """A copier and a lifeline that note what is asked of them; copies end when a test says so."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.ended: list[Finished] = []

    def start(self) -> None:
        self.calls.append("start")

    def submit(self, copy: Copy, shard: Shard, *, is_store: bool) -> None:
        self.calls.append((copy.op_id, shard, is_store))

    def finished(self) -> list[Finished]:
        ended, self.ended = self.ended, []
        return ended

    def close(self) -> None:
        self.calls.append("close")


def make_worker(rank: int = 0) -> tuple[Worker, Log, Log]:
    """Return an attached worker, its lifeline and its copier."""
    worker, lifeline, copier = Worker(rank=rank, layout=LAYOUT, facts={}), Log(), Log()
    end: Any = lifeline
    worker.attach(end, copier)
    return worker, lifeline, copier


def copy_of(op_id: int, *engine_blocks: int) -> Copy:
    """Return a copy for the request of the same number."""
    extent = (Run(start=0, count=1),)
    return Copy(op_id, b"", f"r{op_id}", tuple(Piece(extent, 0, (block,)) for block in engine_blocks))


def test_each_worker_has_a_name_of_its_own() -> None:
    names = {make_worker()[0].name for _ in range(10)}
    assert len(names) == 10
    assert {len(name) for name in names} == {16}


def test_attaching_begins_to_connect() -> None:
    assert make_worker()[1].calls == ["start"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_begins_its_copies_on_the_ranks_own_shard_loads_first(rank: int) -> None:
    worker, _, copier = make_worker(rank)
    worker.start(Copies(loads=[copy_of(1, 3)], stores=[copy_of(2, 4), copy_of(3, 5)]), SHARDS)
    shard = SHARDS[rank]
    assert copier.calls == [(1, shard, False), (2, shard, True), (3, shard, True)]


def test_what_another_rank_has_as_well_is_stored_by_one_and_loaded_by_each() -> None:
    worker, _, copier = make_worker(rank=1)
    shards = (SHARDS[0], SHARDS[0]._replace(is_writer=False))
    worker.start(Copies(loads=[copy_of(1, 3)], stores=[copy_of(2, 4)]), shards)
    assert copier.calls == [(1, shards[1], False)]
    assert worker.take_reports() == Reports(done={2: 1}), "the store waits for a report of every rank"


def test_every_end_is_reported_once() -> None:
    worker, _, copier = make_worker()
    copier.ended = [
        Finished(copy_of(1, 3), is_store=False, is_failed=False),
        Finished(copy_of(2, 4), is_store=True, is_failed=False),
        Finished(copy_of(3, 5), is_store=True, is_failed=True),
    ]
    assert worker.collect_loaded() == ({"r1"}, set())
    assert worker.take_reports() == Reports(done={1: 1, 2: 1}, failed={3: 1})
    assert worker.take_bad_blocks() == set()
    assert worker.collect_loaded() == (set(), set())
    assert worker.take_reports() is None


def test_a_failed_load_ends_its_request_and_names_all_its_blocks() -> None:
    worker, _, copier = make_worker()
    copier.ended = [Finished(copy_of(1, 3, 4), is_store=False, is_failed=True)]
    assert worker.collect_loaded() == ({"r1"}, {"r1"})
    assert worker.take_bad_blocks() == {3, 4}
    assert worker.take_bad_blocks() == set()
    assert worker.take_reports() == Reports(failed={1: 1})


def test_a_failed_store_ends_no_request_and_spoils_no_block() -> None:
    worker, _, copier = make_worker()
    copier.ended = [Finished(copy_of(1, 3), is_store=True, is_failed=True)]
    assert worker.collect_loaded() == (set(), set())
    assert worker.take_bad_blocks() == set()


def test_what_is_not_taken_is_kept_for_the_next_step() -> None:
    worker, _, copier = make_worker()
    for op_id in (1, 2):
        copier.ended = [Finished(copy_of(op_id, op_id), is_store=False, is_failed=True)]
        worker.collect_loaded()
    assert worker.take_bad_blocks() == {1, 2}
    assert worker.take_reports() == Reports(failed={1: 1, 2: 1})


def test_closing_ends_the_copies_before_the_connection() -> None:
    worker, lifeline, copier = make_worker()
    order: list[str] = []
    for name, end in (("copier", copier), ("lifeline", lifeline)):
        end.close = lambda name=name: order.append(name)  # type: ignore[method-assign, misc]
    worker.close()
    assert order == ["copier", "lifeline"]


def test_a_worker_without_a_kv_cache_closes_and_reports_nothing() -> None:
    worker = Worker(rank=0, layout=LAYOUT, facts={})
    assert worker.collect_loaded() == (set(), set())
    assert worker.take_reports() is None
    worker.close()
