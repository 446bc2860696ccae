"""The cache's behaviour, a claim each. What no single claim shows, the simulator looks for."""

from math import inf, nan
from typing import Any, NoReturn, cast

import pytest

from saltern.core.blocks import Block
from saltern.core.describe import USERS_SHOWN
from saltern.core.effects import Disconnected, Gone, Received, Send
from saltern.core.extents import extent_pages
from saltern.core.keys import Key, UserId
from saltern.core.messages import (
    DEFAULT_TENANT,
    Abort,
    Acquire,
    Acquired,
    Attached,
    Commit,
    Discard,
    GetStats,
    LookedUp,
    Lookup,
    Refusal,
    Refused,
    Release,
    Request,
    Reserve,
    Reserved,
    SchedulerHello,
    SessionEnded,
    Stats,
    Welcome,
    WorkerHello,
)
from saltern.core.order import Stamp
from saltern.core.tenants import Limits
from tests.core.rig import ALICE, BOB, CAROL, PAGE_BYTES, Rig, keys, states

# Storing and finding


def test_what_was_stored_is_found_where_it_was_written() -> None:
    rig = Rig()
    engine = rig.engine()
    stored = rig.store(engine, ALICE, "abc")
    found = rig.acquire(engine, ALICE, "abcd")
    assert (found.ready, found.extents) == (3, tuple(grant.extent for grant in stored.grants))
    assert found.lease


def test_another_user_with_the_same_keys_finds_nothing() -> None:
    rig = Rig()
    engine = rig.engine()
    rig.store(engine, ALICE, "abc")
    assert rig.lookup(engine, BOB, "abc") == 0
    assert rig.acquire(engine, BOB, "abc").extents == ()


def test_another_user_stores_its_own_copy() -> None:
    rig = Rig()
    engine = rig.engine()
    alices, bobs = rig.store(engine, ALICE, "ab"), rig.store(engine, BOB, "ab")
    assert {grant.extent for grant in alices.grants}.isdisjoint(grant.extent for grant in bobs.grants)


def test_discarding_ones_own_leaves_anothers_of_the_same_key() -> None:
    rig = Rig()
    engine = rig.engine()
    rig.store(engine, ALICE, "ab")
    rig.store(engine, BOB, "ab")
    rig.say(engine, Discard(ALICE, keys("a")[0]))
    assert (rig.lookup(engine, ALICE, "ab"), rig.lookup(engine, BOB, "ab")) == (0, 2)


def test_another_engine_finds_what_the_first_stored() -> None:
    rig = Rig()
    rig.store(rig.engine("first"), ALICE, "ab")
    assert rig.lookup(rig.engine("second"), ALICE, "ab") == 2


def test_what_was_stored_outlives_its_engine() -> None:
    rig = Rig()
    worker = rig.worker(b"w")
    engine = rig.scheduler("engine", [b"w"])
    rig.store(engine, ALICE, "ab")
    rig.hang_up(engine)
    rig.hang_up(worker)
    assert rig.lookup(rig.engine(), ALICE, "ab") == 2


def test_only_the_part_that_the_engine_lacks_is_pinned() -> None:
    rig = Rig()
    engine = rig.engine()
    stored = rig.store(engine, ALICE, "abc")
    found = rig.acquire(engine, ALICE, "abc", start=2)
    assert (found.ready, found.extents) == (3, (stored.grants[2].extent,))
    assert rig.acquire(engine, ALICE, "abc", start=3).lease == 0
    assert rig.acquire(engine, ALICE, "abc", start=9).lease == 0


def test_only_what_is_missing_is_granted() -> None:
    rig = Rig()
    engine = rig.engine()
    rig.store(engine, ALICE, "ab")
    again = rig.reserve(engine, ALICE, "abcd")
    assert [grant.index for grant in again.grants] == [2, 3]
    assert (again.upto, again.refusal) == (4, None)


def test_nothing_missing_makes_no_lease() -> None:
    rig = Rig()
    engine = rig.engine()
    rig.store(engine, ALICE, "ab")
    assert rig.reserve(engine, ALICE, "ab").lease == 0


def test_what_is_being_written_is_not_served() -> None:
    rig = Rig()
    engine = rig.engine()
    rig.store(engine, ALICE, "a")
    writing = rig.reserve(engine, ALICE, "abc")
    assert rig.lookup(engine, ALICE, "abc") == 1
    assert rig.acquire(engine, ALICE, "abc").ready == 1
    rig.say(engine, Commit(writing.lease))
    assert rig.lookup(engine, ALICE, "abc") == 3


def test_what_another_engine_is_writing_is_not_granted_twice() -> None:
    rig = Rig()
    first, second = rig.engine("first"), rig.engine("second")
    rig.reserve(first, ALICE, "ab")
    other = rig.reserve(second, ALICE, "abc")
    assert [grant.index for grant in other.grants] == [2]


def test_a_block_under_an_unfinished_parent_is_found_once_the_parent_is_ready() -> None:
    rig = Rig()
    first, second = rig.engine("first"), rig.engine("second")
    parent = rig.reserve(first, ALICE, "a")
    rig.store(second, ALICE, "ab")
    assert rig.lookup(second, ALICE, "ab") == 0
    rig.say(first, Commit(parent.lease))
    assert rig.lookup(second, ALICE, "ab") == 2


# Making room


def test_a_prefix_outlives_its_continuation() -> None:
    rig = Rig(pages=4)
    engine = rig.engine()
    rig.store(engine, ALICE, "abcd")
    rig.store(engine, BOB, "x")
    assert rig.lookup(engine, ALICE, "abcd") == 3
    rig.store(engine, BOB, "xy")
    assert rig.lookup(engine, ALICE, "abcd") == 2


def test_the_least_recently_used_goes_first() -> None:
    rig = Rig(pages=3)
    engine = rig.engine()
    for prompt in ("a", "b", "c"):
        rig.store(engine, ALICE, prompt)
    rig.touch(engine, ALICE, "a")
    rig.store(engine, ALICE, "d")
    assert [rig.lookup(engine, ALICE, prompt) for prompt in "abcd"] == [1, 0, 1, 1]


def test_a_lookup_is_no_use() -> None:
    rig = Rig(pages=2)
    engine = rig.engine()
    rig.store(engine, ALICE, "a")
    rig.store(engine, ALICE, "b")
    rig.lookup(engine, ALICE, "a")
    rig.store(engine, ALICE, "c")
    assert rig.lookup(engine, ALICE, "a") == 0


def test_a_hit_counts_for_the_part_that_the_engine_has_itself() -> None:
    rig = Rig(pages=3)
    engine = rig.engine()
    rig.store(engine, ALICE, "ab")
    rig.store(engine, BOB, "x")
    assert rig.acquire(engine, ALICE, "ab", start=2).ready == 2
    rig.store(engine, CAROL, "y")
    assert (rig.lookup(engine, ALICE, "ab"), rig.lookup(engine, BOB, "x")) == (2, 0)


def test_a_user_at_its_limit_pays_with_its_own_oldest() -> None:
    rig = Rig(limits=Limits(user_limit_bytes=3 * PAGE_BYTES))
    engine = rig.engine()
    rig.store(engine, BOB, "x")
    for prompt in ("a", "b", "c", "d"):
        rig.store(engine, ALICE, prompt)
    assert [rig.lookup(engine, ALICE, prompt) for prompt in "abcd"] == [0, 1, 1, 1]
    assert rig.lookup(engine, BOB, "x") == 1
    assert rig.cache.snapshot().tenants[0].counts.stored_after_evicting == 1


def test_a_limit_counts_whole_pages() -> None:
    rig = Rig(limits=Limits(user_limit_bytes=3 * PAGE_BYTES - 1))
    engine = rig.engine(block_bytes=PAGE_BYTES + 1)  # two pages
    rig.store(engine, ALICE, "a")
    rig.store(engine, ALICE, "b")
    assert rig.used_pages == 2
    assert (rig.lookup(engine, ALICE, "a"), rig.lookup(engine, ALICE, "b")) == (0, 1)


def test_a_tenant_at_its_limit_pays_with_its_oldest_of_all_users() -> None:
    rig = Rig(limits=Limits(limit_bytes=2 * PAGE_BYTES))
    engine = rig.engine()
    rig.store(engine, ALICE, "a")
    rig.store(engine, BOB, "b")
    rig.store(engine, BOB, "c")
    assert (rig.lookup(engine, ALICE, "a"), rig.lookup(engine, BOB, "b"), rig.lookup(engine, BOB, "c")) == (0, 1, 1)


def test_one_block_may_need_the_room_of_several() -> None:
    rig = Rig(pages=4)
    small, large = rig.engine("small"), rig.engine("large", block_bytes=3 * PAGE_BYTES)
    rig.store(small, ALICE, "abcd")
    assert rig.store(large, BOB, "x").refusal is None
    assert rig.lookup(small, ALICE, "abcd") == 1
    assert rig.cache.snapshot().tenants[0].counts.evicted == 3


def test_several_block_sizes_share_one_arena() -> None:
    rig = Rig(pages=7)
    small, large = rig.engine("small"), rig.engine("large", block_bytes=2 * PAGE_BYTES)
    for prompt in ("a", "b", "c"):
        rig.store(small, ALICE, prompt)
    rig.store(large, BOB, "xy")
    assert rig.used_pages == 7, "blocks of one page and of two leave nothing between them"
    rig.touch(small, ALICE, "b")
    rig.store(large, BOB, "z")
    assert [rig.lookup(small, ALICE, prompt) for prompt in "abc"] == [0, 1, 0]
    (extent,) = rig.acquire(large, BOB, "z").extents
    assert (extent_pages(extent), len(extent)) == (2, 2), "the two pages lie apart, and do as well"


def test_a_block_of_another_size_is_not_ours() -> None:
    rig = Rig()
    small, large = rig.engine("small"), rig.engine("large", block_bytes=2 * PAGE_BYTES)
    rig.store(small, ALICE, "a")
    assert rig.lookup(large, ALICE, "a") == 0
    assert rig.reserve(large, ALICE, "ab").refusal is Refusal.NO_PARENT


# Refusals


def test_a_block_larger_than_a_limit_is_refused() -> None:
    rig = Rig(limits=Limits(user_limit_bytes=PAGE_BYTES))
    answer = rig.reserve(rig.engine(block_bytes=2 * PAGE_BYTES), ALICE, "a")
    assert (answer.refusal, answer.lease, answer.upto) == (Refusal.OVER_LIMIT, 0, 0)


def test_a_limit_of_nothing_stores_nothing() -> None:
    rig = Rig(limits=Limits(limit_bytes=0))
    assert rig.reserve(rig.engine(), ALICE, "a").refusal is Refusal.OVER_LIMIT
    assert not rig.cache.default_tenant.user_by_id


def test_a_block_larger_than_the_arena_is_refused() -> None:
    rig = Rig(pages=1)
    assert rig.reserve(rig.engine(block_bytes=2 * PAGE_BYTES), ALICE, "a").refusal is Refusal.NO_ROOM


def test_nothing_pinned_is_evicted() -> None:
    rig = Rig(pages=2)
    engine = rig.engine()
    rig.store(engine, ALICE, "ab")
    held = rig.acquire(engine, ALICE, "ab")
    assert rig.reserve(engine, BOB, "x").refusal is Refusal.ALL_PINNED
    rig.say(engine, Release(held.lease))
    assert rig.reserve(engine, BOB, "x").refusal is None


def test_a_refusal_evicts_nothing() -> None:
    rig = Rig(pages=3)
    engine, large = rig.engine(), rig.engine("large", block_bytes=3 * PAGE_BYTES)
    rig.store(engine, ALICE, "ab")
    rig.store(engine, BOB, "x")
    held = rig.acquire(engine, BOB, "x")
    assert rig.reserve(large, BOB, "y").refusal is Refusal.ALL_PINNED
    assert (rig.lookup(engine, ALICE, "ab"), rig.used_pages) == (2, 3)
    assert rig.cache.snapshot().tenants[0].counts.evicted == 0
    rig.say(engine, Release(held.lease))
    assert rig.reserve(large, BOB, "y").refusal is None
    assert (rig.lookup(engine, ALICE, "ab"), rig.used_pages) == (0, 3)


def test_what_is_being_written_is_not_evicted() -> None:
    rig = Rig(pages=2)
    engine = rig.engine()
    rig.reserve(engine, ALICE, "ab")
    assert rig.reserve(engine, BOB, "x").refusal is Refusal.ALL_PINNED


def test_a_reservation_does_not_evict_itself() -> None:
    rig = Rig(pages=2)
    answer = rig.reserve(rig.engine(), ALICE, "abc")
    assert (len(answer.grants), answer.upto, answer.refusal) == (2, 2, Refusal.ALL_PINNED)


def test_a_continuation_does_not_evict_its_own_prefix() -> None:
    rig = Rig(pages=2)
    engine = rig.engine()
    rig.store(engine, ALICE, "ab")
    assert rig.reserve(engine, ALICE, "abc").refusal is Refusal.NEXT_VICTIM
    assert rig.lookup(engine, ALICE, "ab") == 2


def test_what_would_go_first_is_refused() -> None:
    rig = Rig(pages=2)
    engine = rig.engine()
    asked_at = rig.acquire(engine, ALICE, "a").acquired_at
    rig.store(engine, BOB, "x")
    rig.store(engine, BOB, "y")
    assert rig.reserve(engine, ALICE, "a", at=asked_at).refusal is Refusal.NEXT_VICTIM
    assert rig.lookup(engine, BOB, "x") == 1


def test_a_block_needs_its_parent() -> None:
    rig = Rig()
    answer = rig.reserve(rig.engine(), ALICE, "abc", start=1)
    assert (answer.refusal, answer.upto, answer.lease) == (Refusal.NO_PARENT, 0, 0)


def test_a_parent_that_was_evicted_since_is_missed() -> None:
    rig = Rig(pages=2)
    engine = rig.engine()
    rig.store(engine, ALICE, "a")
    rig.store(engine, BOB, "x")
    rig.store(engine, BOB, "xy")
    assert rig.reserve(engine, ALICE, "ab", start=1).refusal is Refusal.NO_PARENT


def test_refusals_are_counted_by_reason() -> None:
    rig = Rig(pages=1)
    engine = rig.engine()
    rig.reserve(engine, ALICE, "ab")
    rig.reserve(engine, ALICE, "xy", start=1)
    counts = rig.cache.snapshot().tenants[0].counts
    assert (counts.refused_all_pinned, counts.refused_no_parent, counts.refused_next_victim) == (1, 1, 0)


@pytest.mark.parametrize("at", [nan, inf, 1e9])
def test_no_time_but_the_past_is_believed(at: float) -> None:
    rig = Rig(pages=1)
    engine = rig.engine()
    rig.store(engine, ALICE, "a", at=at)
    rig.store(engine, BOB, "b")
    assert rig.lookup(engine, BOB, "b") == 1


def test_a_clock_that_goes_back_does_no_harm() -> None:
    rig = Rig()
    engine = rig.engine()
    rig.now = 100.0
    rig.store(engine, ALICE, "a")
    rig.now = 10.0
    assert rig.acquire(engine, ALICE, "a").acquired_at == 102.0


# Doom


def test_an_abort_takes_the_children() -> None:
    rig = Rig()
    first, second = rig.engine("first"), rig.engine("second")
    parent = rig.reserve(first, ALICE, "a")
    rig.store(second, ALICE, "abc")
    rig.say(first, Abort(parent.lease))
    assert rig.used_pages == 0
    assert not rig.cache.default_tenant.user_by_id


def test_an_abort_leaves_the_parent() -> None:
    rig = Rig()
    engine = rig.engine()
    rig.store(engine, ALICE, "a")
    rig.say(engine, Abort(rig.reserve(engine, ALICE, "ab").lease))
    assert (rig.lookup(engine, ALICE, "ab"), rig.used_pages) == (1, 1)


def test_a_late_commit_does_not_revive_a_doomed_block() -> None:
    rig = Rig()
    first, second = rig.engine("first"), rig.engine("second")
    parent = rig.reserve(first, ALICE, "a")
    child = rig.reserve(second, ALICE, "ab")
    rig.say(first, Abort(parent.lease))
    assert rig.used_pages == 1, "the child's writer still writes"
    rig.say(second, Commit(child.lease))
    assert (rig.lookup(second, ALICE, "ab"), rig.used_pages) == (0, 0)


def test_a_discarded_block_and_its_continuation_are_not_found() -> None:
    rig = Rig()
    engine = rig.engine()
    rig.store(engine, ALICE, "abc")
    rig.say(engine, Discard(ALICE, keys("abc")[1]))
    assert (rig.lookup(engine, ALICE, "abc"), rig.used_pages) == (1, 1)
    assert rig.cache.snapshot().tenants[0].counts.discarded == 2


def test_a_discarded_block_keeps_its_pages_for_its_readers() -> None:
    rig = Rig(pages=1)
    engine = rig.engine()
    rig.store(engine, ALICE, "a")
    held = rig.acquire(engine, ALICE, "a")
    rig.say(engine, Discard(ALICE, keys("a")[0]))
    assert rig.reserve(engine, ALICE, "a").refusal is Refusal.ALL_PINNED
    rig.say(engine, Release(held.lease))
    assert rig.reserve(engine, ALICE, "a").refusal is None


def test_a_key_may_be_stored_again_while_its_doomed_block_is_read() -> None:
    rig = Rig()
    engine = rig.engine()
    rig.store(engine, ALICE, "a")
    held = rig.acquire(engine, ALICE, "a")
    rig.say(engine, Discard(ALICE, keys("a")[0]))
    again = rig.store(engine, ALICE, "a")
    assert again.grants[0].extent != held.extents[0]
    rig.say(engine, Release(held.lease))
    assert (rig.lookup(engine, ALICE, "a"), rig.used_pages) == (1, 1)


def test_discarding_what_is_not_there_is_nothing() -> None:
    rig = Rig()
    engine = rig.engine()
    rig.say(engine, Discard(ALICE, keys("a")[0]))
    assert rig.effects == []


def test_users_without_blocks_are_forgotten() -> None:
    rig = Rig(pages=2)
    engine = rig.engine()
    for number in range(1_000):
        rig.store(engine, UserId(number.to_bytes(16, "little")), "ab")
    assert len(rig.cache.default_tenant.user_by_id) == 1
    rig.lookup(engine, BOB, "ab")
    rig.acquire(engine, BOB, "ab")
    assert BOB not in rig.cache.default_tenant.user_by_id


# Sessions


def test_a_session_waits_for_all_its_lifelines() -> None:
    rig = Rig()
    rig.worker(b"w1", rank=1, world_size=2)
    engine = rig.scheduler("engine", [b"w0", b"w1"])
    assert rig.sent(Attached) == []
    assert rig.acquire(engine, ALICE, "a").lease == 0
    assert rig.reserve(engine, ALICE, "a").refusal is Refusal.NO_SESSION
    rig.worker(b"w0", rank=0, world_size=2)
    assert len(rig.sent(Attached)) == 3
    assert rig.reserve(engine, ALICE, "a").refusal is None


def test_a_scheduler_may_come_first_or_last() -> None:
    for order in ("sw", "ws"):
        rig = Rig()
        for role in order:
            if role == "s":
                rig.scheduler("engine", [b"w"])
            else:
                rig.worker(b"w")
        assert len(rig.sent(Attached)) == 2


def test_workers_get_the_arena_and_schedulers_the_secret() -> None:
    rig = Rig(secret=b"secret")
    rig.worker(b"w")
    assert [effect.with_arena for effect in rig.effects if isinstance(effect, Send)] == [True]
    assert rig.sent(Welcome) == [Welcome(arena_bytes=80, page_bytes=PAGE_BYTES)]
    rig.scheduler("engine", [b"other"])
    assert [effect.with_arena for effect in rig.effects if isinstance(effect, Send)] == [False]
    assert rig.sent(Welcome)[0].naming_secret == b"secret"


def test_workers_out_of_order_make_no_session() -> None:
    rig = Rig()
    rig.worker(b"w0", rank=1, world_size=2)
    rig.worker(b"w1", rank=0, world_size=2)
    engine = rig.scheduler("engine", [b"w0", b"w1"])
    assert "1 of 2, 0 of 2" in rig.sent(SessionEnded, engine)[0].reason


def test_workers_of_a_larger_engine_make_no_session() -> None:
    """Or else blocks would be published that lack the shards of the ranks that nobody named."""
    rig = Rig()
    rig.worker(b"w0", rank=0, world_size=2)
    engine = rig.scheduler("engine", [b"w0"])
    assert "of 2" in rig.sent(SessionEnded, engine)[0].reason
    assert rig.reserve(engine, ALICE, "a").refusal is Refusal.NO_SESSION


def test_a_second_engine_of_the_same_name_is_refused_while_the_first_lives() -> None:
    rig = Rig()
    first = rig.engine("engine")
    rig.worker(b"other")
    second = rig.scheduler("engine", [b"other"])
    assert "engine" in rig.sent(Refused, second)[0].reason
    assert [close.connection for close in rig.closed] == [second]
    rig.hang_up(second)
    assert rig.reserve(first, ALICE, "a").lease
    rig.hang_up(first)
    third = rig.scheduler("engine", [b"other"])
    assert len(rig.sent(Attached, third)) == 1


@pytest.mark.parametrize("lost", ["worker", "scheduler"])
def test_a_lost_connection_ends_the_session_for_all(lost: str) -> None:
    rig = Rig()
    workers = [rig.worker(b"w%d" % rank, rank=rank, world_size=2) for rank in range(2)]
    engine = rig.scheduler("engine", [b"w0", b"w1"])
    gone = workers[1] if lost == "worker" else engine
    rig.hang_up(gone)
    for member in {workers[0], workers[1], engine} - {gone}:
        assert len(rig.sent(SessionEnded, member)) == 1


def test_an_ended_session_gives_no_lease() -> None:
    rig = Rig()
    workers = [rig.worker(b"w%d" % rank, rank=rank, world_size=2) for rank in range(2)]
    engine = rig.scheduler("engine", [b"w0", b"w1"])
    rig.store(engine, ALICE, "a")
    rig.hang_up(workers[0])
    assert rig.lookup(engine, ALICE, "a") == 0
    assert rig.acquire(engine, ALICE, "a").lease == 0
    assert rig.reserve(engine, ALICE, "ab").refusal is Refusal.NO_SESSION


def test_an_ended_session_may_still_finish_what_runs() -> None:
    rig = Rig()
    workers = [rig.worker(b"w%d" % rank, rank=rank, world_size=2) for rank in range(2)]
    engine = rig.scheduler("engine", [b"w0", b"w1"])
    writing = rig.reserve(engine, ALICE, "ab")
    rig.hang_up(workers[1])
    rig.say(engine, Commit(writing.lease))
    assert rig.lookup(rig.engine("other"), ALICE, "ab") == 2


def test_leases_fall_with_the_last_connection_and_not_before() -> None:
    rig = Rig(pages=2)
    workers = [rig.worker(b"w%d" % rank, rank=rank, world_size=2) for rank in range(2)]
    engine = rig.scheduler("engine", [b"w0", b"w1"])
    rig.store(engine, ALICE, "a")
    rig.acquire(engine, ALICE, "a")
    rig.reserve(engine, ALICE, "ab")
    other = rig.engine("other")
    for lost in (engine, workers[0]):
        rig.hang_up(lost)
        assert rig.reserve(other, BOB, "x").refusal is Refusal.ALL_PINNED
    rig.hang_up(workers[1])
    assert rig.used_pages == 1, "what was being written is gone, what was read is not"
    assert rig.reserve(other, BOB, "xy").refusal is None


def test_leases_of_a_device_that_still_writes_do_not_fall_with_its_socket() -> None:
    rig = Rig(pages=1)
    worker = rig.worker(b"w", outlives_socket=True)
    engine = rig.scheduler("engine", [b"w"])
    rig.reserve(engine, ALICE, "a")
    rig.hang_up(engine)
    rig.handle(Disconnected(worker))
    other = rig.engine("other")
    assert rig.reserve(other, BOB, "x").refusal is Refusal.ALL_PINNED
    rig.handle(Gone(worker))
    assert rig.reserve(other, BOB, "x").refusal is None


def test_a_worker_that_says_hello_anew_has_drained() -> None:
    """Or else an engine that lives for weeks would keep pinned what one lost connection left behind."""
    rig = Rig(pages=1)
    worker = rig.worker(b"w", outlives_socket=True)
    engine = rig.scheduler("engine", [b"w"])
    rig.reserve(engine, ALICE, "a")
    rig.hang_up(engine)
    rig.handle(Disconnected(worker))
    assert rig.used_pages == 1
    rig.worker(b"w", outlives_socket=True)
    assert (rig.used_pages, rig.cache.sessions) == (0, [])
    assert rig.handle(Gone(worker)) == [], "long afterwards"


def test_a_worker_may_be_back_before_its_loss_is_noticed() -> None:
    rig = Rig()
    workers = [rig.worker(b"w%d" % rank, rank=rank, world_size=2) for rank in range(2)]
    engine = rig.scheduler("engine", [b"w0", b"w1"])
    rig.worker(b"w0", rank=0, world_size=2)
    assert {send.connection for send in rig.effects if isinstance(send, Send)} >= {engine, workers[1]}
    rig.hang_up(workers[0])
    rig.hang_up(workers[1])
    rig.hang_up(engine)
    rig.worker(b"w1", rank=1, world_size=2)
    second = rig.scheduler("engine", [b"w0", b"w1"])
    assert len(rig.sent(Attached, second)) == 1


def test_a_new_incarnation_waits_until_its_workers_come_back() -> None:
    rig = Rig()
    worker = rig.worker(b"w")
    first = rig.scheduler("engine", [b"w"])
    rig.hang_up(first)
    second = rig.scheduler("engine", [b"w"])
    assert rig.sent(Attached) == []
    rig.hang_up(worker)
    rig.worker(b"w")
    assert len(rig.sent(Attached, second)) == 1


def test_a_lost_lifeline_of_a_waiting_session_is_waited_for_again() -> None:
    rig = Rig()
    worker = rig.worker(b"w0", rank=0, world_size=2)
    engine = rig.scheduler("engine", [b"w0", b"w1"])
    rig.hang_up(worker)
    rig.worker(b"w1", rank=1, world_size=2)
    assert rig.sent(Attached) == []
    rig.worker(b"w0", rank=0, world_size=2)
    assert len(rig.sent(Attached, engine)) == 1


def test_nothing_is_left_of_engines_that_are_gone() -> None:
    rig = Rig()
    for number in range(50):
        worker = rig.worker(b"w")
        engine = rig.scheduler("engine", [b"w"])
        rig.reserve(engine, ALICE, f"{number}")
        for connection in (worker, engine) if number % 2 else (engine, worker):
            rig.hang_up(connection)
    cache = rig.cache
    assert not (cache.sessions or cache.session_by_control or cache.lifeline_by_connection or cache.lifeline_by_name)
    assert rig.used_pages == 0


def test_events_of_unknown_connections_are_nothing() -> None:
    rig = Rig()
    assert rig.handle(Disconnected(9)) == []
    assert rig.handle(Gone(9)) == []


# Violations


def violations() -> list[Request]:
    return [
        Release(1),
        Commit(99),
        Abort(99),
        SchedulerHello("engine", bytes(16), (bytes(16),), PAGE_BYTES),
        WorkerHello("engine", bytes(16), 0, 1, False),
    ]


@pytest.mark.parametrize("violation", violations(), ids=lambda message: type(message).__name__)
def test_a_violation_closes_only_that_connection(violation: Request) -> None:
    rig = Rig()
    engine, other = rig.engine("engine"), rig.engine("other")
    writing = rig.reserve(engine, ALICE, "a")
    assert writing.lease == 1
    rig.say(engine, violation)
    assert [close.connection for close in rig.closed] == [engine]
    assert rig.sent(SessionEnded) == []
    assert rig.store(other, BOB, "x").refusal is None


@pytest.mark.parametrize(
    "message", [Lookup(1, ALICE, ()), Acquire(1, ALICE, (), 0), Reserve(1, ALICE, (), 0, 0.0), Release(1), Commit(1)]
)
def test_nothing_is_served_before_a_hello(message: Request) -> None:
    rig = Rig()
    connection = rig.connect()
    rig.say(connection, message)
    assert [close.connection for close in rig.closed] == [connection]
    assert "without a session" in rig.closed[0].reason


def test_a_lease_is_given_back_once() -> None:
    rig = Rig()
    engine = rig.engine()
    rig.store(engine, ALICE, "a")
    held = rig.acquire(engine, ALICE, "a")
    rig.say(engine, Release(held.lease))
    rig.say(engine, Release(held.lease))
    assert f"no read lease {held.lease}" in rig.closed[0].reason


def test_another_sessions_lease_cannot_be_given_back() -> None:
    rig = Rig()
    first, second = rig.engine("first"), rig.engine("second")
    writing = rig.reserve(first, ALICE, "a")
    rig.say(second, Commit(writing.lease))
    assert [close.connection for close in rig.closed] == [second]
    assert rig.lookup(first, ALICE, "a") == 0


def test_two_workers_of_one_name_make_no_engine() -> None:
    rig = Rig()
    rig.scheduler("engine", [b"w", b"w"])
    assert "same name" in rig.closed[0].reason


def test_a_worker_asks_for_nothing() -> None:
    rig = Rig()
    worker = rig.worker(b"w")
    rig.say(worker, Lookup(1, ALICE, ()))
    assert [close.connection for close in rig.closed] == [worker]


# States

STATE_BYTES = 2 * PAGE_BYTES + 1  # three pages


def test_a_prefix_is_found_up_to_its_last_state() -> None:
    rig = Rig(pages=20)
    engine = rig.engine(state_bytes=STATE_BYTES)
    rig.store(engine, ALICE, "ab", in_state=True)
    rig.store(engine, ALICE, "abcd")
    rig.store(engine, ALICE, "abcde", in_state=True)
    assert rig.lookup(engine, ALICE, "abcd", in_state=True) == 2
    assert rig.lookup(engine, ALICE, "abcdef", in_state=True) == 5
    assert rig.lookup(engine, ALICE, "a", in_state=True) == 0
    assert rig.lookup(engine, ALICE, "abcdef") == 5, "the KV alone is there for whoever needs no state"


def test_a_prefix_without_a_state_is_no_prefix() -> None:
    rig = Rig()
    engine = rig.engine(state_bytes=STATE_BYTES)
    rig.store(engine, ALICE, "abc")
    found = rig.acquire(engine, ALICE, "abc", in_state=True)
    assert (found.ready, found.extents, found.lease) == (0, (), 0)


def test_a_state_lies_behind_its_prefix() -> None:
    rig = Rig(pages=20)
    engine = rig.engine(state_bytes=STATE_BYTES)
    stored = rig.store(engine, ALICE, "abc", in_state=True)
    extents = tuple(grant.extent for grant in stored.grants)
    assert [grant.index for grant in stored.grants] == [0, 1, 2, 3]
    assert [extent_pages(extent) for extent in extents] == [1, 1, 1, 3]
    assert rig.acquire(engine, ALICE, "abcd", in_state=True).extents == extents
    assert rig.acquire(engine, ALICE, "abcd", start=2, in_state=True).extents == extents[2:]


def test_an_engine_that_has_the_whole_prefix_gets_no_state() -> None:
    rig = Rig()
    engine = rig.engine(state_bytes=STATE_BYTES)
    rig.store(engine, ALICE, "ab", in_state=True)
    for start in (2, 9):
        found = rig.acquire(engine, ALICE, "abc", start=start, in_state=True)
        assert (found.ready, found.extents, found.lease) == (2, (), 0)


def test_a_state_can_be_stored_later_than_its_block() -> None:
    rig = Rig()
    engine = rig.engine(state_bytes=STATE_BYTES)
    rig.store(engine, ALICE, "ab")
    late = rig.reserve(engine, ALICE, "ab", start=2, in_state=True)
    assert ([grant.index for grant in late.grants], late.upto, late.refusal) == ([2], 3, None)
    assert rig.lookup(engine, ALICE, "ab", in_state=True) == 0, "it is still being written"
    rig.say(engine, Commit(late.lease))
    assert rig.lookup(engine, ALICE, "ab", in_state=True) == 2
    assert rig.reserve(engine, ALICE, "ab", in_state=True).lease == 0, "it is there"


def test_a_state_needs_its_block() -> None:
    rig = Rig()
    engine = rig.engine(state_bytes=STATE_BYTES)
    answer = rig.reserve(engine, ALICE, "ab", start=2, in_state=True)
    assert (answer.refusal, answer.upto, answer.lease) == (Refusal.NO_PARENT, 0, 0)


def test_a_state_counts_once_its_prefix_is_ready() -> None:
    rig = Rig()
    first, second = rig.engine("first", state_bytes=STATE_BYTES), rig.engine("second", state_bytes=STATE_BYTES)
    parent = rig.reserve(first, ALICE, "a")
    rig.store(second, ALICE, "a", in_state=True)
    assert rig.lookup(second, ALICE, "a", in_state=True) == 0
    rig.say(first, Commit(parent.lease))
    assert rig.lookup(second, ALICE, "a", in_state=True) == 1


def test_a_state_dies_with_its_block() -> None:
    rig = Rig()
    engine = rig.engine(state_bytes=STATE_BYTES)
    rig.store(engine, ALICE, "ab", in_state=True)
    rig.say(engine, Discard(ALICE, keys("ab")[1]))
    assert rig.used_pages == 1
    rig.store(engine, ALICE, "ab")
    assert rig.lookup(engine, ALICE, "ab", in_state=True) == 0


def test_a_discarded_state_takes_nothing_with_it() -> None:
    rig = Rig()
    engine = rig.engine(state_bytes=STATE_BYTES)
    rig.store(engine, ALICE, "a", in_state=True)
    rig.store(engine, ALICE, "ab", in_state=True)
    rig.say(engine, Discard(ALICE, states("ab")[1]))
    assert (rig.lookup(engine, ALICE, "ab", in_state=True), rig.lookup(engine, ALICE, "ab")) == (1, 2)


def test_a_state_that_is_being_read_is_not_evicted() -> None:
    rig = Rig(pages=4)
    engine = rig.engine(state_bytes=STATE_BYTES)
    rig.store(engine, ALICE, "a", in_state=True)
    held = rig.acquire(engine, ALICE, "a", in_state=True)
    assert rig.reserve(engine, BOB, "x").refusal is Refusal.ALL_PINNED
    rig.say(engine, Release(held.lease))
    assert rig.reserve(engine, BOB, "x").refusal is None
    assert (rig.lookup(engine, ALICE, "a", in_state=True), rig.lookup(engine, ALICE, "a")) == (0, 1)


def test_the_state_that_was_used_stays_and_the_older_one_goes() -> None:
    rig = Rig(pages=6)
    engine = rig.engine(state_bytes=PAGE_BYTES)
    rig.store(engine, ALICE, "a", in_state=True)
    rig.store(engine, ALICE, "ab", in_state=True)
    rig.store(engine, BOB, "xy")
    rig.acquire(engine, ALICE, "ab", start=2, in_state=True)
    rig.store(engine, CAROL, "z")
    assert rig.lookup(engine, ALICE, "a", in_state=True) == 0
    rig.store(engine, CAROL, "zw")
    assert rig.lookup(engine, ALICE, "ab", in_state=True) == 2
    assert rig.lookup(engine, BOB, "xy") == 1


def test_a_state_is_charged_to_its_user() -> None:
    rig = Rig(pages=20, limits=Limits(user_limit_bytes=5 * PAGE_BYTES))
    engine = rig.engine(state_bytes=STATE_BYTES)
    rig.store(engine, ALICE, "ab", in_state=True)
    assert rig.cache.default_tenant.user_by_id[ALICE].used_pages == 5
    rig.store(engine, ALICE, "abc")
    assert rig.cache.default_tenant.user_by_id[ALICE].used_pages == 3, "the old state went for the new block"
    large = rig.engine("large", state_bytes=6 * PAGE_BYTES)
    assert rig.reserve(large, ALICE, "a", in_state=True).refusal is Refusal.OVER_LIMIT


def test_a_state_of_another_size_is_not_ours() -> None:
    rig = Rig()
    engine, other = rig.engine(state_bytes=STATE_BYTES), rig.engine("other", state_bytes=PAGE_BYTES)
    rig.store(engine, ALICE, "a", in_state=True)
    assert rig.lookup(other, ALICE, "a", in_state=True) == 0
    assert rig.reserve(other, ALICE, "a", in_state=True).refusal is Refusal.NO_PARENT


def test_another_users_state_is_not_found() -> None:
    rig = Rig(pages=20)
    engine = rig.engine(state_bytes=STATE_BYTES)
    rig.store(engine, ALICE, "a", in_state=True)
    rig.store(engine, BOB, "a")
    assert rig.lookup(engine, BOB, "a", in_state=True) == 0


def test_a_state_of_another_block_is_not_ours() -> None:
    rig = Rig(pages=20)
    engine = rig.engine(state_bytes=STATE_BYTES)
    rig.store(engine, ALICE, "ab", in_state=True)
    rig.say(engine, Lookup(1, ALICE, keys("a"), states("ab")[1:]))
    assert rig.sent(LookedUp, engine) == [LookedUp(1, ready=0)]


def test_a_block_is_no_state_and_a_state_no_block() -> None:
    rig = Rig(pages=20)
    engine = rig.engine(state_bytes=STATE_BYTES)
    rig.store(engine, ALICE, "ab", in_state=True)
    a, b = keys("ab")
    (_, ab) = states("ab")
    rig.say(engine, Acquire(1, ALICE, (a,), 0, (b,)))
    assert rig.sent(Acquired, engine)[0].ready == 0
    rig.say(engine, Acquire(1, ALICE, (a, b, ab), 0))
    assert rig.sent(Acquired, engine)[0].ready == 2
    for chain, ends_in_state in (((a, b), True), ((a, b, ab), False), ((a, b, ab, a), False), ((a, b, ab, ab), True)):
        rig.say(engine, Reserve(1, ALICE, chain, 0, rig.now, ends_in_state))
        assert rig.sent(Reserved, engine)[0].refusal is Refusal.NO_PARENT


def test_what_continues_a_state_goes_before_it() -> None:
    """No engine continues a state; one that does, where a state is as long as a block, has a block like any other."""
    rig = Rig(pages=4)
    engine = rig.engine(state_bytes=PAGE_BYTES)
    rig.store(engine, ALICE, "a", in_state=True)
    (a,), (after_a,) = keys("a"), states("a")
    below = keys("x") + states("x")
    rig.say(engine, Reserve(1, ALICE, (a, after_a, *below), 0, rig.now, True))
    rig.say(engine, Commit(rig.sent(Reserved, engine)[0].lease))
    found = rig.acquire(engine, ALICE, "a", in_state=True)
    rig.say(engine, Release(found.lease))
    for user, left in ((BOB, (a, after_a, below[0])), (CAROL, (a, after_a))):
        rig.store(engine, user, "y")
        assert tuple(rig.cache.default_tenant.user_by_id[ALICE].block_by_key) == left
    rig.say(engine, Discard(ALICE, a))
    assert ALICE not in rig.cache.default_tenant.user_by_id


@pytest.mark.parametrize(
    ("state_bytes", "message", "reason"),
    [
        (0, Lookup(1, ALICE, keys("a"), states("a")), "model has no states"),
        (0, Acquire(1, ALICE, keys("a"), 0, states("a")), "model has no states"),
        (0, Reserve(1, ALICE, keys("ab"), 0, 0.0, True), "model has no states"),
        (STATE_BYTES, Lookup(1, ALICE, keys("ab"), states("a")), "1 states were asked for with 2 blocks"),
        (STATE_BYTES, Acquire(1, ALICE, keys("a"), 0, states("ab")), "2 states were asked for with 1 blocks"),
        (STATE_BYTES, Acquire(1, ALICE, (), 0, states("a")), "1 states were asked for with 0 blocks"),
        (STATE_BYTES, Reserve(1, ALICE, states("a"), 0, 0.0, True), "a state at the end of no block"),
        (STATE_BYTES, Reserve(1, ALICE, (), 0, 0.0, True), "a state at the end of no block"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_states_that_cannot_be_meant_close_the_connection(state_bytes: int, message: Request, reason: str) -> None:
    rig = Rig()
    engine = rig.engine(state_bytes=state_bytes)
    rig.store(engine, ALICE, "a")
    rig.say(engine, message)
    assert [close.connection for close in rig.closed] == [engine]
    assert reason in rig.closed[0].reason
    assert (rig.used_pages, rig.cache.snapshot().tenants[0].counts.acquires) == (1, 0)


def test_a_snapshot_counts_states_as_blocks_and_hits_without_them() -> None:
    rig = Rig()
    engine = rig.engine(state_bytes=STATE_BYTES)
    rig.store(engine, ALICE, "ab", in_state=True)
    rig.acquire(engine, ALICE, "abc", in_state=True)
    arena, (tenant,) = rig.cache.snapshot().arena, rig.cache.snapshot().tenants
    assert (arena.blocks, arena.pinned_blocks, arena.used_bytes) == (3, 3, 5 * PAGE_BYTES)
    assert (tenant.counts.stored, tenant.counts.hit_blocks, tenant.counts.missed_blocks) == (3, 2, 1)


# What is told


def test_empty_requests_are_answered() -> None:
    rig = Rig()
    engine = rig.engine()
    assert rig.lookup(engine, ALICE, "") == 0
    assert rig.acquire(engine, ALICE, "").ready == 0
    assert rig.reserve(engine, ALICE, "").upto == 0


def test_a_key_that_is_asked_for_twice_is_written_once() -> None:
    rig = Rig()
    engine = rig.engine()
    (key,) = keys("a")
    rig.say(engine, Reserve(1, ALICE, (key, key), 0, 0.0))
    rig.hang_up(engine)
    assert rig.used_pages == 1


def test_a_snapshot_counts_what_is_there_and_what_was_decided() -> None:
    rig = Rig(limits=Limits(limit_bytes=75, user_limit_bytes=60))
    engine = rig.engine()
    rig.store(engine, ALICE, "ab")
    rig.acquire(engine, ALICE, "abc")
    rig.reserve(engine, BOB, "x")
    operator = rig.connect()
    rig.say(operator, GetStats())
    (stats,) = rig.sent(Stats, operator)
    arena, (tenant,), (session,) = stats.snapshot.arena, stats.snapshot.tenants, stats.snapshot.sessions
    assert (arena.total_bytes, arena.used_bytes, arena.page_bytes) == (80, 30, 10)
    assert (arena.blocks, arena.pinned_blocks, arena.writing_blocks) == (3, 2, 1)
    assert (tenant.used_bytes, tenant.limit_bytes, tenant.user_limit_bytes, tenant.users_total) == (30, 75, 60, 2)
    assert [(user.user, user.blocks, user.used_bytes) for user in tenant.users] == [
        (ALICE.hex(), 2, 20),
        (BOB.hex(), 1, 10),
    ]
    assert (tenant.counts.acquires, tenant.counts.hit_blocks, tenant.counts.missed_blocks) == (1, 2, 1)
    assert (tenant.counts.stored, tenant.counts.evicted) == (2, 0)
    assert (session.engine, session.state, session.read_leases, session.write_leases) == ("engine", "open", 1, 1)


def test_a_snapshot_shows_the_largest_users() -> None:
    rig = Rig(pages=USERS_SHOWN + 20)
    engine = rig.engine()
    for number in range(USERS_SHOWN + 5):
        rig.store(engine, UserId(number.to_bytes(16, "little")), "a" if number else "abc")
    (tenant,) = rig.cache.snapshot().tenants
    assert (len(tenant.users), tenant.users_total) == (USERS_SHOWN, USERS_SHOWN + 5)
    assert tenant.users[0].used_bytes == 3 * PAGE_BYTES


class Unlistable(dict[Any, Any]):
    """A dictionary that nobody goes through from one end to the other."""

    def _listed(self) -> NoReturn:
        pytest.fail("the cost is linear in what there is")

    __iter__ = keys = values = items = _listed


def test_a_snapshot_looks_at_none_but_the_users_that_it_shows() -> None:
    rig = Rig(pages=40)
    engine = rig.engine()
    for user in (ALICE, BOB, CAROL):
        rig.store(engine, user, "ab")
        rig.acquire(engine, user, "ab")
    rig.reserve(engine, ALICE, "xyz")
    tenant, (session,) = rig.cache.default_tenant, rig.cache.sessions
    tenant.user_by_id = Unlistable(tenant.user_by_id)
    session.lease_by_id = Unlistable(session.lease_by_id)
    for known in rig.cache.default_tenant.largest_users():
        known.block_by_key = Unlistable(known.block_by_key)
    snapshot = rig.cache.snapshot()
    (stats,) = snapshot.tenants
    assert (stats.blocks, stats.users_total, len(stats.users)) == (9, 3, 3)
    assert (snapshot.arena.pinned_blocks, snapshot.arena.writing_blocks) == (6, 3)
    assert (snapshot.sessions[0].read_leases, snapshot.sessions[0].write_leases) == (3, 1)
    of_all = rig.cache.erasable(DEFAULT_TENANT, None)
    assert (of_all.users, of_all.ram_bytes, of_all.leased_bytes) == (3, 9 * PAGE_BYTES, 9 * PAGE_BYTES)
    of_alice = rig.cache.erasable(DEFAULT_TENANT, ALICE)
    assert (of_alice.users, of_alice.ram_bytes, of_alice.leased_bytes) == (1, 5 * PAGE_BYTES, 5 * PAGE_BYTES)


def test_all_tenants_share_the_room_for_users_in_a_snapshot() -> None:
    rig = Rig(pages=USERS_SHOWN + 20)
    engine = rig.engine()
    for number in range(USERS_SHOWN // 2 + 5):
        for tenant in ("acme", DEFAULT_TENANT):
            rig.store(engine, UserId(number.to_bytes(16, "little")), "a", tenant=tenant)
    assert [len(tenant.users) for tenant in rig.cache.snapshot().tenants] == [USERS_SHOWN // 2] * 2


def test_decisions_are_told_for_the_log() -> None:
    rig = Rig()
    engine = rig.engine()
    rig.reserve(engine, ALICE, "ab", start=1)
    assert [(log.event, log.engine, log.blocks, log.detail) for log in rig.logged] == [
        ("refused", "engine", 2, "no-parent")
    ]


def test_a_block_shows_what_it_is() -> None:
    rig = Rig()
    engine = rig.engine()
    rig.reserve(engine, ALICE, "a")
    (block,) = rig.cache.default_tenant.user_by_id[ALICE].block_by_key.values()
    assert repr(block) == f"<Block {block.key.hex()[:8]} depth=0 writing pins=1>"


# Many blocks and users


def test_finding_the_victim_is_not_a_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a hundred thousand blocks of ten thousand users, an eviction looks at a handful of stamps."""
    users, depth = 10_000, 10
    rig = Rig(pages=users * depth)
    engine = rig.engine()
    for number in range(users):
        rig.store(engine, UserId(number.to_bytes(16, "little")), "abcdefghij")
    for number in range(0, users, 3):
        rig.touch(engine, UserId(number.to_bytes(16, "little")), "abcdefghij")
    looks = 0
    stamp = vars(Block)["stamp"].fget

    def counted(self: Block) -> Stamp | None:
        nonlocal looks
        looks += 1
        return cast(Stamp | None, stamp(self))

    monkeypatch.setattr(Block, "stamp", property(counted))
    stored = 200
    for number in range(stored):
        assert rig.store(engine, UserId((users + number).to_bytes(16, "little")), "abcdefghij").refusal is None
    evicted = rig.cache.snapshot().tenants[0].counts.evicted
    assert evicted == stored * depth
    assert looks / evicted < 20


def test_a_hit_touches_no_heap() -> None:
    """Hits are far more frequent than evictions, so a touch must leave the order alone."""
    rig = Rig(pages=100)
    engine = rig.engine()
    rig.store(engine, ALICE, "abc")
    order = rig.cache.default_tenant.user_by_id[ALICE].order
    pushes = order._pushes
    for _ in range(100):
        held = rig.acquire(engine, ALICE, "abc")
        assert order._pushes == pushes
        rig.say(engine, Release(held.lease))
        pushes = order._pushes
    assert len(order._heap) <= 2


def test_handling_is_a_function_of_the_events() -> None:
    def run() -> list[object]:
        rig = Rig(pages=3)
        engine = rig.engine()
        told: list[object] = []
        for prompt in ("ab", "c", "de", "ab"):
            rig.store(engine, ALICE, prompt)
            told += rig.effects
            told += rig.handle(Received(engine, Lookup(1, ALICE, keys(prompt))))
        return [*told, rig.cache.snapshot()]

    assert run() == run()


def test_keys_are_only_compared() -> None:
    """The cache neither makes nor reads a key: any bytes will do, in any order, and nothing breaks."""
    rig = Rig(pages=4)
    engine = rig.engine()
    one, other = Key(bytes(32)), Key(b"\xff" * 32)
    for chain in ((one, other), (other, one), (one, one), (other, other, one)):
        rig.say(engine, Reserve(1, ALICE, chain, 0, 0.0))
        assert rig.closed == []
