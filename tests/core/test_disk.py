"""The disk tier in the core: what is written, read, let go and erased, by events and effects alone."""

from collections import deque
from collections.abc import Callable, Mapping

import pytest

from saltern.core.cache import NO_TENANTS
from saltern.core.disk import (
    DISK_PAGE_BYTES,
    OFFERED_MAX,
    READS_IN_FLIGHT_MAX,
    SKIPPED_MAX,
    WRITES_IN_FLIGHT_MAX,
    record_pages,
)
from saltern.core.effects import (
    Effect,
    Erased,
    Event,
    ForgetRecords,
    Loss,
    ReadRecord,
    RecordLost,
    RecordName,
    RecordNotWritten,
    RecordRead,
    RecordsForgotten,
    RecordWritten,
    StoredRecord,
    TenantSet,
    Tick,
    WipePages,
    WriteRecord,
)
from saltern.core.extents import Run, extent_pages
from saltern.core.keys import UserId
from saltern.core.leases import ConnectionId
from saltern.core.loads import WAITING_MAX
from saltern.core.messages import (
    DEFAULT_TENANT,
    Abort,
    Acquire,
    Acquired,
    Commit,
    Discard,
    Loading,
    LookedUp,
    Lookup,
    Refusal,
    Release,
)
from saltern.core.tenants import NO_LIMITS, Limits
from tests.core.rig import ALICE, BOB, CAROL, PAGE_BYTES, Rig, keys

Work = WriteRecord | ReadRecord | ForgetRecords


class DiskRig(Rig):
    """A rig whose disk does what it is asked when it is told to: `work` is what it has still to do."""

    def __init__(
        self,
        *,
        pages: int = 8,
        disk_pages: int = 8,
        limits: Limits = NO_LIMITS,
        disk_limits: Limits = NO_LIMITS,
        tenants: Mapping[str, Limits] = NO_TENANTS,
        disk_tenants: Mapping[str, Limits] = NO_TENANTS,
        in_flight_max_bytes: int | None = None,
    ) -> None:
        super().__init__(
            pages=pages,
            limits=limits,
            tenants=tenants,
            in_flight_max_bytes=in_flight_max_bytes,
            disk_pages=disk_pages,
            disk_tenants={DEFAULT_TENANT: disk_limits, **disk_tenants},
        )
        self.work: deque[Work] = deque()
        self.index: dict[RecordName, WriteRecord] = {}
        self.answered: list[Effect] = []

    def handle(self, event: Event) -> list[Effect]:
        effects = super().handle(event)
        self.work += [effect for effect in effects if isinstance(effect, Work)]
        return effects

    def do(self, *, wrong: Callable[[Work], Event | None] = lambda work: None) -> list[Effect]:
        """Do all that the disk has to do and what comes of it, each as it should be unless `wrong` says otherwise."""
        came: list[Effect] = []
        while self.work:
            work = self.work.popleft()
            came += self.handle(wrong(work) or self._done(work))
        self.effects = came
        return came

    def _done(self, work: Work) -> Event:
        match work:
            case WriteRecord(op, name):
                self.index[name] = work
                return RecordWritten(op)
            case ReadRecord(op, name, slot=slot):
                assert self.index[name].slot == slot, "a record is read from where it was written"
                return RecordRead(op, 0.5)
            case ForgetRecords(op, names):
                for name in names:
                    self.index.pop(name, None)
                return RecordsForgotten(op)

    @property
    def on_disk(self) -> int:
        """Return how many pages of the slab are in use."""
        return self.cache.disk.pool.pages - self.cache.disk.pool.free_pages

    def evict(self, engine: ConnectionId) -> None:
        """Fill the RAM with somebody else's blocks, none of which stays on the disk."""
        user, prompt = UserId(b"filler".ljust(16, b".")), "f" * self.cache.pool.pages
        self.store(engine, user, prompt)
        self.do(wrong=_full)
        assert self.touch(engine, user, prompt) == len(prompt)
        self.do(wrong=_full)

    def ask(
        self, engine: ConnectionId, user: UserId, prompt: str, start: int = 0, *, block_seconds: float = 0.0
    ) -> int:
        """Send an Acquire, and return its number."""
        number = next(self._requests)
        self.say(engine, Acquire(number, user, keys(prompt), start, block_seconds=block_seconds))
        return number


def wiped(rig: Rig) -> int:
    """Return how many pages the last event has had wiped."""
    return sum(extent_pages(effect.extent) for effect in rig.effects if isinstance(effect, WipePages))


def _full(work: Work) -> Event | None:
    return RecordNotWritten(work.op) if isinstance(work, WriteRecord) else None


@pytest.fixture
def rig() -> DiskRig:
    return DiskRig()


def test_what_is_committed_is_written_in_order(rig: DiskRig) -> None:
    engine = rig.engine()
    rig.store(engine, ALICE, "abc")
    written = [work.name.key for work in rig.work if isinstance(work, WriteRecord)]
    assert written == list(keys("abc"))
    rig.do()
    assert (rig.on_disk, len(rig.index)) == (3, 3)


def test_what_ram_evicts_comes_back_from_the_disk(rig: DiskRig) -> None:
    engine = rig.engine()
    rig.store(engine, ALICE, "abc")
    rig.do()
    rig.evict(engine)
    assert rig.lookup(engine, ALICE, "abcd") == 3, "what is on the disk is worth asking for"
    number = rig.ask(engine, ALICE, "abcd")
    assert [rig.sent(Loading, engine), rig.sent(Acquired, engine)] == [[Loading(number, blocks=3, seconds=0.0)], []]
    rig.do()
    (answer,) = rig.sent(Acquired, engine)
    assert (answer.request, answer.ready, len(answer.extents)) == (number, 3, 3)
    rig.say(engine, Release(answer.lease))
    assert rig.touch(engine, ALICE, "abcd") == 3
    assert not rig.work, "what has come from the disk is there already"


def test_nobody_else_gets_it(rig: DiskRig) -> None:
    engine = rig.engine()
    rig.store(engine, ALICE, "abc")
    rig.do()
    rig.evict(engine)
    assert rig.acquire(engine, BOB, "abc").ready == 0


def test_two_who_ask_for_the_same_wait_for_one_load(rig: DiskRig) -> None:
    engine, other = rig.engine(), rig.engine("other")
    rig.store(engine, ALICE, "abc")
    rig.do()
    rig.evict(engine)
    first = rig.ask(engine, ALICE, "abc")
    second = rig.ask(other, ALICE, "ab")
    assert len([work for work in rig.work if isinstance(work, ReadRecord)]) == 3
    rig.do()
    assert [(answer.request, answer.ready) for answer in rig.sent(Acquired)] == [(first, 3)]
    rig.handle(Tick())
    assert [(answer.request, answer.ready) for answer in rig.sent(Acquired)] == [(second, 2)]


def test_a_later_request_waits_for_its_own_part_and_the_part_before(rig: DiskRig) -> None:
    engine, other = rig.engine(), rig.engine("other")
    rig.store(engine, ALICE, "abcd")
    rig.do()
    rig.evict(engine)
    rig.ask(engine, ALICE, "ab")
    second = rig.ask(other, ALICE, "abcd")
    reads = [work for work in rig.work if isinstance(work, ReadRecord)]
    rig.work.clear()
    for work in reversed(reads):  # the later load ends first
        rig.handle(RecordRead(work.op, 0.5))
    rig.handle(Tick())
    assert [(answer.request, answer.ready) for answer in rig.sent(Acquired, other)] == [(second, 4)]


@pytest.mark.parametrize("loss", Loss)
def test_a_lost_record_makes_the_answer_shorter_and_is_forgotten(rig: DiskRig, loss: Loss) -> None:
    engine = rig.engine()
    rig.store(engine, ALICE, "abc")
    rig.do()
    rig.evict(engine)
    rig.ask(engine, ALICE, "abc")
    bad = keys("abc")[1]
    rig.do(wrong=lambda w: RecordLost(w.op, loss) if isinstance(w, ReadRecord) and w.name.key == bad else None)
    assert [answer.ready for answer in rig.sent(Acquired, engine)] == [1]
    assert [log.detail for log in rig.logged if log.event == "lost"] == [loss.value]
    assert bad not in {name.key for name in rig.index}
    stats = rig.cache.snapshot()
    assert stats.disk is not None and (stats.disk.lost, stats.disk.loaded) == (1, 2)


def test_a_wait_ends_with_its_session(rig: DiskRig) -> None:
    engine, other = rig.engine(), rig.engine("other")
    rig.store(engine, ALICE, "abc")
    rig.do()
    rig.evict(engine)
    rig.ask(engine, ALICE, "abc")
    rig.hang_up(engine)
    rig.do()
    assert not rig.sent(Acquired)
    assert rig.touch(other, ALICE, "abc") == 3


def test_the_engine_computes_what_it_computes_faster(rig: DiskRig) -> None:
    engine = rig.engine()
    rig.store(engine, ALICE, "abcd")
    rig.do()
    rig.evict(engine)
    rig.ask(engine, ALICE, "a")
    rig.do()  # half a second for a page
    (answer,) = rig.sent(Acquired, engine)
    rig.say(engine, Release(answer.lease))
    rig.say(engine, Lookup(0, ALICE, keys("abcd"), block_seconds=0.01))
    assert [answer.ready for answer in rig.sent(LookedUp)] == [1]
    rig.ask(engine, ALICE, "abcd", block_seconds=0.01)
    assert [answer.ready for answer in rig.sent(Acquired)] == [1]
    rig.ask(engine, ALICE, "abcd", block_seconds=10.0)
    assert [loading.blocks for loading in rig.sent(Loading)] == [3]


def test_what_is_in_ram_does_not_make_the_disk_worth_waiting_for(rig: DiskRig) -> None:
    engine = rig.engine()
    rig.store(engine, ALICE, "abcd")
    rig.do()
    rig.evict(engine)
    rig.ask(engine, ALICE, "abc")
    rig.do()  # half a second for a page, eight at a time
    rig.ask(engine, ALICE, "abcd", block_seconds=0.1)
    assert [answer.ready for answer in rig.sent(Acquired)] == [3], "one block takes longer to come than to compute"


def test_a_long_queue_of_one_tenant_makes_the_disk_no_slower_for_another() -> None:
    rig = DiskRig(pages=40, disk_pages=40)
    engine = rig.engine()
    long = "abcdefghijklmno"
    rig.store(engine, ALICE, long, tenant="acme")
    rig.store(engine, BOB, "xy", tenant="globex")
    rig.do()
    for limits in (Limits(limit_bytes=0), NO_LIMITS):  # out of memory with it
        for name in ("acme", "globex"):
            rig.handle(TenantSet(name, limits))
        rig.handle(Tick())
    rig.say(engine, Acquire(100, ALICE, keys("a"), 0, tenant="acme"))
    rig.do()  # half a second for a page
    rig.say(engine, Acquire(101, ALICE, keys(long), 0, tenant="acme"))
    asked = {name: rig.cache.disk.reading_seconds(name, 2) for name in ("acme", "globex")}
    assert asked == {"acme": 16 * 0.5, "globex": 4 * 0.5}
    rig.say(engine, Acquire(102, BOB, keys("xy"), 0, tenant="globex", block_seconds=1.5))
    assert [loading.blocks for loading in rig.sent(Loading)] == [2]


def test_nothing_is_brought_that_the_engine_has_itself(rig: DiskRig) -> None:
    engine = rig.engine()
    rig.store(engine, ALICE, "abc")
    rig.do()
    rig.evict(engine)
    rig.ask(engine, ALICE, "abc", start=3)
    assert not rig.sent(Loading) and [answer.ready for answer in rig.sent(Acquired)] == [0]


def test_a_block_that_is_written_stays_where_it_is() -> None:
    rig = DiskRig(pages=2)
    engine = rig.engine()
    rig.store(engine, ALICE, "ab")
    assert rig.reserve(engine, BOB, "xy").refusal is Refusal.ALL_PINNED
    rig.do()
    assert len(rig.reserve(engine, BOB, "xy").grants) == 2


def test_only_so_many_are_written_at_a_time_and_each_tenant_in_its_turn() -> None:
    rig = DiskRig(pages=40, disk_pages=40)
    engine = rig.engine()
    rig.store(engine, ALICE, "abcdefghijklmnopqrst")
    rig.store(engine, BOB, "xy", tenant="other")
    assert len(rig.work) == WRITES_IN_FLIGHT_MAX
    order: list[str] = []
    while rig.work:
        work = rig.work.popleft()
        assert isinstance(work, WriteRecord)
        order.append(work.name.tenant)
        rig.handle(RecordWritten(work.op))
    assert order.index("other") == WRITES_IN_FLIGHT_MAX + 1, "behind those in flight and one of the first tenant's"


def test_what_can_not_wait_to_be_written_is_skipped_and_offered_again_when_it_is_used() -> None:
    rig = DiskRig(pages=OFFERED_MAX + 40, disk_pages=OFFERED_MAX + 40)
    engine = rig.engine()
    prompt = "".join(chr(256 + number) for number in range(OFFERED_MAX + 20))
    rig.store(engine, ALICE, prompt)
    rig.do()
    stats = rig.cache.snapshot().disk
    assert stats is not None and stats.skipped == 20
    rig.touch(engine, ALICE, prompt)
    rig.do()
    assert rig.on_disk == len(prompt)


def test_a_full_disk_evicts_the_oldest_and_reuses_pages_only_once_they_are_forgotten() -> None:
    rig = DiskRig(pages=8, disk_pages=2)
    engine = rig.engine()
    rig.store(engine, ALICE, "ab")
    rig.do()
    rig.store(engine, BOB, "x")
    forget = rig.work.popleft()
    assert isinstance(forget, ForgetRecords) and [name.key for name in forget.names] == [keys("ab")[1]]
    assert not rig.work and rig.on_disk == 2, "nothing is written where the index still names something else"
    rig.index.clear()
    rig.handle(RecordsForgotten(forget.op))
    (write,) = rig.work
    assert isinstance(write, WriteRecord) and write.name.user == BOB


def test_limits_hold_on_the_disk_by_themselves() -> None:
    rig = DiskRig(disk_limits=Limits(limit_bytes=3 * DISK_PAGE_BYTES, user_limit_bytes=2 * DISK_PAGE_BYTES))
    engine = rig.engine()
    rig.store(engine, ALICE, "abc")
    rig.do()
    assert rig.on_disk == 2, "the third would be the first to go again"
    rig.store(engine, BOB, "xy")
    rig.do()
    assert rig.on_disk == 3
    (tenant,) = rig.cache.snapshot().tenants
    assert (tenant.used_bytes, tenant.disk_used_bytes) == (5 * PAGE_BYTES, 3 * DISK_PAGE_BYTES)


def test_nobody_is_evicted_below_its_guarantee() -> None:
    greedy, acme = Limits(weight=100.0), Limits(guarantee_bytes=3 * DISK_PAGE_BYTES)
    rig = DiskRig(pages=40, disk_pages=6, disk_limits=greedy, disk_tenants={"acme": acme})
    engine = rig.engine()
    rig.store(engine, ALICE, "abcdef", tenant="acme")
    rig.do()
    rig.store(engine, BOB, "".join(chr(256 + number) for number in range(20)))
    rig.do()
    stats = {tenant.tenant: tenant.disk_blocks for tenant in rig.cache.snapshot().tenants}
    assert stats == {"acme": 3, DEFAULT_TENANT: 3}


def test_a_lowered_limit_is_evicted_down_to() -> None:
    rig = DiskRig()
    engine = rig.engine()
    rig.store(engine, ALICE, "abcd")
    rig.do()
    rig.handle(TenantSet(DEFAULT_TENANT, NO_LIMITS, Limits(limit_bytes=DISK_PAGE_BYTES)))
    assert rig.cache.due_at is not None
    rig.handle(Tick())
    rig.do()
    assert rig.on_disk == 1 and rig.cache.due_at is None


def test_what_expires_in_ram_expires_on_the_disk() -> None:
    rig = DiskRig(limits=Limits(ttl_seconds=30.0), disk_limits=Limits(ttl_seconds=30.0))
    engine = rig.engine()
    rig.store(engine, ALICE, "ab")
    rig.do()
    rig.now += 40.0
    assert rig.lookup(engine, ALICE, "ab") == 0
    rig.handle(Tick())
    rig.do()
    assert (rig.on_disk, rig.used_pages) == (0, 0)


def test_a_write_that_failed_leaves_nothing_and_is_tried_again() -> None:
    rig = DiskRig()
    engine = rig.engine()
    rig.store(engine, ALICE, "a")
    rig.do(wrong=lambda work: RecordNotWritten(work.op))
    assert (rig.on_disk, rig.cache.snapshot().tenants[0].disk_blocks) == (0, 0)
    rig.touch(engine, ALICE, "a")
    rig.do()
    assert rig.on_disk == 1


def test_what_was_skipped_is_tried_again_though_what_continues_it_is_there(rig: DiskRig) -> None:
    engine, first = rig.engine(), keys("abc")[0]
    rig.store(engine, ALICE, "abc")
    rig.do(wrong=lambda work: _full(work) if isinstance(work, WriteRecord) and work.name.key == first else None)
    assert {name.key for name in rig.index} == set(keys("abc")[1:])
    rig.touch(engine, ALICE, "abc")
    rig.do()
    assert {name.key for name in rig.index} == set(keys("abc"))


def test_a_bad_block_is_bad_on_the_disk_as_well(rig: DiskRig) -> None:
    engine = rig.engine()
    rig.store(engine, ALICE, "abc")
    rig.do()
    rig.say(engine, Discard(ALICE, keys("abc")[1]))
    rig.do()
    assert {name.key for name in rig.index} == {keys("abc")[0]}


def test_a_load_has_room_only_by_the_rules_and_no_longer_than_them() -> None:
    rig = DiskRig(pages=4, limits=Limits(user_limit_bytes=2 * PAGE_BYTES))
    engine = rig.engine()
    rig.store(engine, ALICE, "ab")
    rig.do()
    rig.store(engine, ALICE, "xy")
    rig.do()
    rig.ask(engine, ALICE, "ab")
    rig.do()
    (answer,) = rig.sent(Acquired, engine)
    assert answer.ready == 2
    assert rig.cache.tenant_by_name[DEFAULT_TENANT].user_by_id[ALICE].used_pages == 2


def test_only_so_many_are_looked_at_in_one_event_for_one_that_can_be_written() -> None:
    rig = DiskRig(pages=300, disk_pages=300, disk_limits=Limits(limit_bytes=DISK_PAGE_BYTES))
    engine = rig.engine()
    prompt = "".join(chr(256 + number) for number in range(3 * SKIPPED_MAX))
    rig.store(engine, ALICE, prompt)
    skipped = [_skipped(rig)]
    while rig.cache.due_at is not None:
        assert rig.cache.due_at <= rig.now
        rig.handle(Tick())
        skipped.append(_skipped(rig))
    assert skipped == [SKIPPED_MAX, 2 * SKIPPED_MAX, 3 * SKIPPED_MAX - 1], "the first is being written"


def _skipped(rig: DiskRig) -> int:
    stats = rig.cache.snapshot().disk
    assert stats is not None
    return stats.skipped


def test_those_who_wait_of_one_tenant_leave_room_for_those_of_another() -> None:
    rig = DiskRig(pages=8, disk_pages=8)
    engine = rig.engine()
    for tenant in ("acme", "globex"):
        rig.store(engine, ALICE, "a", tenant=tenant)
    rig.do()
    for limits in (Limits(limit_bytes=0), NO_LIMITS):  # out of memory with it
        for name in ("acme", "globex"):
            rig.handle(TenantSet(name, limits))
        rig.handle(Tick())
    for _ in range(WAITING_MAX):
        rig.say(engine, Acquire(next(rig._requests), ALICE, keys("a"), 0, tenant="acme"))
        assert rig.sent(Loading)
    rig.say(engine, Acquire(next(rig._requests), ALICE, keys("a"), 0, tenant="acme"))
    assert [answer.ready for answer in rig.sent(Acquired)] == [0]
    rig.say(engine, Acquire(next(rig._requests), ALICE, keys("a"), 0, tenant="globex"))
    assert rig.sent(Loading)


def test_a_disk_that_hangs_leaves_half_of_the_memory_to_what_is_stored() -> None:
    rig = DiskRig(pages=8, disk_pages=8)
    engine = rig.engine()
    rig.store(engine, ALICE, "abcdef")
    rig.do()
    rig.evict(engine)
    rig.ask(engine, ALICE, "abcdef")
    assert [loading.blocks for loading in rig.sent(Loading)] == [4]
    assert len(rig.store(engine, BOB, "bcde").grants) == 4
    rig.do()
    rig.handle(Tick())
    assert rig.cache.loads.pages == 0


def test_only_so_many_are_read_at_a_time() -> None:
    rig = DiskRig(pages=40, disk_pages=40)
    engine = rig.engine()
    prompt = "abcdefghijklmno"
    rig.store(engine, ALICE, prompt)
    rig.do()
    rig.evict(engine)
    rig.ask(engine, ALICE, prompt)
    assert len(rig.work) == READS_IN_FLIGHT_MAX
    rig.do()
    assert [answer.ready for answer in rig.sent(Acquired)] == [15]


def test_engines_that_disagree_about_a_length_stop_nobody(rig: DiskRig) -> None:
    engine, other = rig.engine(), rig.engine("other", block_bytes=2 * PAGE_BYTES)
    rig.store(engine, ALICE, "a")
    rig.do()
    rig.evict(engine)
    rig.store(other, ALICE, "a")
    rig.do()
    assert rig.touch(other, ALICE, "a") == 1
    assert [work.length for work in rig.index.values()] == [PAGE_BYTES], "the record that was first stays"


def test_a_user_of_both_tiers_counts_once_and_one_of_the_disk_alone_is_shown_as_well(rig: DiskRig) -> None:
    engine = rig.engine()
    rig.store(engine, ALICE, "abc")
    rig.do()
    rig.evict(engine)  # by somebody in memory alone
    rig.store(engine, BOB, "x")
    rig.do()
    (tenant,) = rig.cache.snapshot().tenants
    assert (tenant.users_total, tenant.blocks, tenant.disk_blocks) == (3, 8, 4)
    assert [(user.blocks, user.disk_blocks) for user in tenant.users] == [(7, 0), (1, 1), (0, 3)]
    rig.handle(Erased(DEFAULT_TENANT, ALICE))
    rig.handle(Erased(DEFAULT_TENANT, BOB))
    (tenant,) = rig.cache.snapshot().tenants
    assert (tenant.users_total, tenant.blocks, tenant.disk_blocks) == (1, 7, 0)


class TestErase:
    """A user is forgotten at once, in all tiers, and what was begun before is never stored."""

    def test_ram_and_disk_are_empty_and_wiped(self, rig: DiskRig) -> None:
        engine = rig.engine()
        rig.store(engine, ALICE, "abc")
        rig.store(engine, BOB, "xy")
        rig.do()
        assert rig.cache.erasable(DEFAULT_TENANT, ALICE).ram_bytes == 3 * PAGE_BYTES
        rig.handle(Erased(DEFAULT_TENANT, ALICE))
        assert rig.lookup(engine, ALICE, "abc") == 0
        rig.handle(Tick())
        wiped = {run.start for effect in rig.effects if isinstance(effect, WipePages) for run in effect.extent}
        rig.do()
        assert len(wiped) == 3 and rig.cache.due_at is None
        assert {name.user for name in rig.index} == {BOB}
        assert rig.touch(engine, BOB, "xy") == 2
        assert (rig.used_pages, rig.on_disk) == (2, 2)

    def test_a_refusal_that_puts_records_back_brings_no_erased_user_back(self) -> None:
        rig = DiskRig(pages=2000, disk_pages=4)
        engine, large = rig.engine(), rig.engine("large", block_bytes=2 * DISK_PAGE_BYTES)
        rig.store(engine, ALICE, "a")
        rig.do()
        answer = rig.reserve(large, BOB, "x")
        rig.store(engine, BOB, "pqr")
        rig.do()
        rig.handle(Erased(DEFAULT_TENANT, ALICE))
        rig.say(large, Commit(answer.lease))  # takes the record of alice's, then sees that all others are younger
        (tenant,) = rig.cache.disk.shares.tenant_by_name.values()
        assert (list(tenant.user_by_id), rig.on_disk) == ([BOB], 4)
        rig.handle(Tick())
        rig.do()
        rig.store(engine, ALICE, "n")
        rig.do()
        assert ALICE in {name.user for name in rig.index}, "who begins anew is stored again"

    def test_what_is_read_falls_with_its_lease(self, rig: DiskRig) -> None:
        engine = rig.engine()
        rig.store(engine, ALICE, "ab")
        lease = rig.acquire(engine, ALICE, "ab").lease
        assert rig.cache.erasable(DEFAULT_TENANT, ALICE).leased_bytes == 2 * PAGE_BYTES
        rig.handle(Erased(DEFAULT_TENANT, ALICE))
        rig.handle(Tick())
        assert rig.used_pages == 2
        rig.do()
        rig.say(engine, Release(lease))
        assert (rig.used_pages, rig.cache.due_at) == (2, rig.now)
        rig.handle(Tick())
        assert (rig.used_pages, wiped(rig)) == (0, 2)

    def test_what_a_lease_held_is_wiped_some_at_a_time_and_nobodys_before(self) -> None:
        tenants = {"acme": Limits(guarantee_bytes=4 * PAGE_BYTES)}
        rig = DiskRig(pages=10, disk_pages=0, tenants=tenants, in_flight_max_bytes=6 * PAGE_BYTES)
        rig.cache.erased_bytes_max = 2 * PAGE_BYTES
        engine = rig.engine()
        rig.store(engine, ALICE, "abcd")
        lease = rig.acquire(engine, ALICE, "abcd").lease
        rig.handle(Erased(DEFAULT_TENANT, ALICE))
        rig.handle(Tick())
        rig.say(engine, Release(lease))
        assert (rig.used_pages, wiped(rig)) == (4, 0), "a lease may hold any number"
        default = rig.cache.default_tenant
        assert (default.used_pages, default.held_pages) == (4, 4), "charged, and counted among what can't go"
        assert rig.reserve(engine, BOB, "x").refusal is Refusal.IN_FLIGHT
        assert len(rig.reserve(engine, CAROL, "kl", tenant="acme").grants) == 2, "what is kept for it"
        for left in (2, 0):
            rig.handle(Tick())
            assert (default.used_pages, default.held_pages, wiped(rig)) == (left, left, 2)
        assert ALICE not in default.user_by_id

    def test_what_expires_of_an_erased_user_is_wiped_some_at_a_time(self) -> None:
        rig = DiskRig(disk_pages=0, limits=Limits(ttl_seconds=5.0))
        rig.cache.erased_bytes_max = 2 * PAGE_BYTES
        rig.store(rig.engine(), ALICE, "abcdef")
        rig.now += 10.0
        rig.handle(Erased(DEFAULT_TENANT, ALICE))
        for _ in range(3):
            rig.handle(Tick())
            assert wiped(rig) == 2
        assert rig.used_pages == 0

    def test_what_is_aborted_of_an_erased_user_is_wiped_some_at_a_time(self) -> None:
        """Somebody else may have continued it, with any number of blocks that nobody holds."""
        rig = DiskRig(disk_pages=0)
        rig.cache.erased_bytes_max = 2 * PAGE_BYTES
        engine, other = rig.engine(), rig.engine("other")
        lease = rig.reserve(engine, ALICE, "a").lease
        rig.store(other, ALICE, "abcdef")
        rig.handle(Erased(DEFAULT_TENANT, ALICE))
        rig.say(engine, Abort(lease))
        assert wiped(rig) == 0
        for _ in range(3):
            rig.handle(Tick())
            assert wiped(rig) == 2
        assert rig.used_pages == 0

    def test_what_was_being_stored_is_not(self, rig: DiskRig) -> None:
        engine = rig.engine()
        answer = rig.reserve(engine, ALICE, "ab")
        rig.handle(Erased(DEFAULT_TENANT, ALICE))
        rig.say(engine, Commit(answer.lease))
        rig.handle(Tick())
        assert rig.lookup(engine, ALICE, "ab") == 0 and rig.used_pages == 0

    def test_what_began_before_is_refused_and_what_begins_later_is_not(self, rig: DiskRig) -> None:
        engine = rig.engine()
        began = rig.now
        rig.handle(Erased(DEFAULT_TENANT, ALICE))
        assert rig.reserve(engine, ALICE, "ab", began_at=began).refusal is Refusal.ERASED
        assert rig.reserve(engine, ALICE, "ab", began_at=0.0).refusal is Refusal.ERASED
        rig.store(engine, ALICE, "ab")
        assert rig.touch(engine, ALICE, "ab") == 2

    def test_for_good_is_for_good(self, rig: DiskRig) -> None:
        engine = rig.engine()
        rig.store(engine, ALICE, "ab")
        rig.handle(Erased(DEFAULT_TENANT, ALICE, for_good=True))
        assert rig.reserve(engine, ALICE, "ab").refusal is Refusal.ERASED

    def test_for_good_stays_for_good_when_erased_again(self, rig: DiskRig) -> None:
        engine = rig.engine()
        rig.handle(Erased(DEFAULT_TENANT, ALICE, for_good=True))
        rig.handle(Erased(DEFAULT_TENANT, ALICE))
        assert rig.reserve(engine, ALICE, "ab").refusal is Refusal.ERASED

    def test_a_whole_tenant(self, rig: DiskRig) -> None:
        engine = rig.engine()
        rig.store(engine, ALICE, "ab", tenant="acme")
        rig.store(engine, BOB, "ab", tenant="acme")
        rig.store(engine, BOB, "ab")
        rig.do()
        began = rig.now
        rig.handle(Erased("acme", None))
        rig.handle(Tick())
        rig.do()
        assert (rig.used_pages, rig.on_disk) == (2, 2)
        assert "acme" not in rig.cache.tenant_by_name
        assert rig.reserve(engine, ALICE, "x", tenant="acme", began_at=began).refusal is Refusal.ERASED

    def test_a_tenant_begins_anew_while_its_erased_users_are_still_remembered(self, rig: DiskRig) -> None:
        engine = rig.engine()
        rig.store(engine, ALICE, "a", tenant="acme")
        (write,) = rig.work
        rig.work.clear()
        rig.handle(Erased("acme", ALICE))
        rig.handle(RecordNotWritten(write.op))  # nothing of the tenant is on the disk any more
        rig.store(engine, BOB, "x", tenant="acme")
        rig.handle(Tick())
        assert list(rig.cache.disk.shares.tenant_by_name["acme"].user_by_id) == [BOB]
        rig.do()
        assert rig.on_disk == 1

    def test_what_is_being_written_is_forgotten_once_it_is(self, rig: DiskRig) -> None:
        engine = rig.engine()
        rig.store(engine, ALICE, "abc")
        rig.handle(Erased(DEFAULT_TENANT, ALICE))
        rig.handle(Tick())
        assert rig.used_pages == 3, "the disk still reads them"
        rig.do()
        rig.handle(Tick())
        assert (rig.used_pages, rig.on_disk, rig.index) == (0, 0, {})

    def test_what_is_being_read_is_not_there_when_it_comes(self, rig: DiskRig) -> None:
        engine = rig.engine()
        rig.store(engine, ALICE, "abc")
        rig.do()
        rig.evict(engine)
        rig.ask(engine, ALICE, "abc")
        rig.handle(Erased(DEFAULT_TENANT, ALICE))
        rig.do()
        assert [answer.ready for answer in rig.sent(Acquired)] == [0]
        assert rig.on_disk == 0
        assert ALICE not in rig.cache.tenant_by_name[DEFAULT_TENANT].user_by_id

    def test_a_user_begins_anew_while_the_old_blocks_still_go(self, rig: DiskRig) -> None:
        engine = rig.engine()
        rig.store(engine, ALICE, "abc")
        rig.do()
        rig.handle(Erased(DEFAULT_TENANT, ALICE))
        rig.store(engine, ALICE, "xy")
        assert rig.used_pages == 5
        rig.handle(Tick())
        rig.do()
        assert rig.used_pages == 2
        assert rig.touch(engine, ALICE, "xy") == 2
        assert rig.touch(engine, ALICE, "abc") == 0

    def test_what_is_written_anew_is_not_forgotten_with_what_was_erased(self, rig: DiskRig) -> None:
        engine = rig.engine()
        rig.store(engine, ALICE, "ab")
        rig.do()
        rig.handle(Erased(DEFAULT_TENANT, ALICE))
        rig.index.clear()
        rig.store(engine, ALICE, "ab")
        rig.do()
        rig.handle(Tick())
        rig.do()
        assert not rig.index and rig.on_disk == 0, "skipped, as long as the erased records still have the names"
        rig.touch(engine, ALICE, "ab")
        rig.do()
        assert {name.key for name in rig.index} == set(keys("ab")) and rig.on_disk == 2

    def test_a_tenant_that_began_anew_is_not_forgotten_with_what_was_erased(self) -> None:
        rig = DiskRig(pages=2, limits=Limits(weight=100.0))
        engine = rig.engine()
        rig.store(engine, ALICE, "a", tenant="acme")
        rig.do()
        rig.handle(Erased("acme", ALICE))
        rig.store(engine, BOB, "xy")
        rig.do()
        assert "acme" not in rig.cache.tenant_by_name, "the last of it was evicted"
        rig.handle(TenantSet(DEFAULT_TENANT, NO_LIMITS))
        rig.store(engine, ALICE, "b", tenant="acme")
        assert rig.cache.tenant_by_name["acme"].used_pages == 1
        rig.do()
        rig.handle(Tick())
        assert rig.cache.tenant_by_name["acme"].used_pages == 1


class TestRestore:
    """A new server knows what an earlier one has left."""

    def stored(self, prompt: str, user: UserId = ALICE, *, first: int = 0, at: float = 0.0) -> list[StoredRecord]:
        return [
            StoredRecord(
                RecordName(DEFAULT_TENANT, user, key, b"root"),
                slot=(Run(start=first + index, count=1),),
                length=PAGE_BYTES,
                depth=index,
                touched_at=at,
            )
            for index, key in enumerate(keys(prompt))
        ]

    def test_hits_come_back_and_charges_with_them(self, rig: DiskRig) -> None:
        rig.cache.restore(self.stored("abc"), (), rig.now)
        assert rig.on_disk == 3
        assert rig.cache.snapshot().tenants[0].disk_used_bytes == 3 * DISK_PAGE_BYTES
        engine = rig.engine()
        for record in self.stored("abc"):
            rig.index[record.name] = WriteRecord(0, record.name, (), record.slot, record.length, 0, 0.0)
        rig.ask(engine, ALICE, "abc")
        rig.do()
        assert [answer.ready for answer in rig.sent(Acquired)] == [3]

    def test_the_oldest_goes_first_and_the_end_of_a_prefix_before_its_beginning(self) -> None:
        rig = DiskRig(disk_pages=4)
        rig.cache.restore([*self.stored("ab", at=-5.0), *self.stored("xy", BOB, first=2, at=-9.0)], (), rig.now)
        engine = rig.engine()
        rig.store(engine, UserId(bytes(16)), "q")
        (forget,) = rig.work
        assert isinstance(forget, ForgetRecords)
        assert [(name.user, name.key) for name in forget.names] == [(BOB, keys("xy")[1])]

    def test_what_can_not_be_is_forgotten(self) -> None:
        rig = DiskRig(disk_pages=2)
        effects = rig.cache.restore(
            [*self.stored("abc"), *self.stored("x", BOB, first=0)], (), rig.now
        )  # the third is beyond the slab, and two claim its first page
        (forget,) = effects
        assert isinstance(forget, ForgetRecords)
        assert {(name.user, name.key) for name in forget.names} >= {(ALICE, keys("abc")[2])}
        rig.handle(RecordsForgotten(forget.op))
        assert rig.on_disk == rig.cache.snapshot().tenants[0].disk_blocks <= 1

    def test_who_was_erased_stays_so(self, rig: DiskRig) -> None:
        rig.now = 100.0
        rig.cache.restore((), [(DEFAULT_TENANT, ALICE, True), (DEFAULT_TENANT, BOB, False)], rig.now)
        engine = rig.engine()
        assert rig.reserve(engine, ALICE, "a").refusal is Refusal.ERASED
        assert rig.reserve(engine, BOB, "a", began_at=99.0).refusal is Refusal.ERASED
        assert rig.reserve(engine, BOB, "a").refusal is None

    @pytest.mark.parametrize("limits_come_first", [True, False])
    def test_limits_that_were_lowered_meanwhile_hold(self, rig: DiskRig, limits_come_first: bool) -> None:
        lowered = TenantSet(DEFAULT_TENANT, NO_LIMITS, Limits(limit_bytes=DISK_PAGE_BYTES))
        if limits_come_first:
            rig.handle(lowered)
        rig.cache.restore(self.stored("abc"), (), rig.now)
        if not limits_come_first:
            rig.handle(lowered)
        assert rig.cache.due_at is not None
        rig.handle(Tick())
        rig.do()
        assert rig.on_disk == 1

    def test_touches_are_told_once(self, rig: DiskRig) -> None:
        engine = rig.engine()
        rig.store(engine, ALICE, "ab")
        rig.do()
        rig.touch(engine, ALICE, "ab")
        touched = rig.cache.disk.take_touched()
        assert {name.key: at for name, at in touched} == dict.fromkeys(keys("ab"), rig.now - 1)
        assert not rig.cache.disk.take_touched()


def test_a_record_has_a_header_and_a_tag() -> None:
    assert [record_pages(length) for length in (1, DISK_PAGE_BYTES - 272, DISK_PAGE_BYTES - 271)] == [1, 1, 2]


def test_who_waits_for_one_load_is_answered_in_turn_and_finds_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saltern.core.cache.LOADING_SHARE", 1)
    rig = DiskRig(pages=3)
    rig.cache.answered_blocks_max = 4
    engine = rig.engine()
    rig.store(engine, ALICE, "abc")
    rig.do()
    rig.evict(engine)
    asked = [rig.ask(engine, ALICE, "abc") for _ in range(4)]
    rig.do()
    (first,) = rig.sent(Acquired)
    rig.say(engine, Release(first.lease))
    assert rig.reserve(engine, BOB, "x").refusal is Refusal.ALL_PINNED, "the others shall find it too"
    assert rig.cache.due_at == rig.now
    rig.handle(Tick())
    second = rig.sent(Acquired)
    for answer in second:
        rig.say(engine, Release(answer.lease))
    assert rig.reserve(engine, BOB, "x").refusal is Refusal.ALL_PINNED
    rig.handle(Tick())
    third = rig.sent(Acquired)
    assert [len(second), len(third)] == [2, 1], "some at a time"
    answers = [first, *second, *third]
    assert [answer.request for answer in answers] == asked, "first come, first served"
    assert [answer.ready for answer in answers] == [3, 3, 3, 3]
    rig.say(engine, Release(third[0].lease))
    assert rig.reserve(engine, BOB, "x").refusal is None


def test_nothing_is_kept_for_a_session_that_is_gone() -> None:
    rig = DiskRig(pages=3)
    engine, other = rig.engine("engine"), rig.engine("other")
    rig.store(engine, ALICE, "abc")
    rig.do()
    rig.evict(engine)
    for asker in (engine, other, other):
        rig.ask(asker, ALICE, "abc")
    rig.do()
    (answer,) = rig.sent(Acquired, engine)
    rig.say(engine, Release(answer.lease))
    rig.hang_up(other)
    rig.handle(Tick())
    assert not rig.sent(Acquired)
    assert rig.reserve(engine, BOB, "x").refusal is None
