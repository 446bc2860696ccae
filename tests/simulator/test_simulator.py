"""The simulator's own test: honest seeds pass, reach what they should, and each invariant catches a planted bug."""

from collections import Counter
from collections.abc import Callable, Container, Iterator
from itertools import count
from typing import Any

import pytest
from msgspec.structs import replace

from saltern.core import shares as shares_module
from saltern.core.blocks import Block, BlockState
from saltern.core.cache import Cache
from saltern.core.census import Census
from saltern.core.disk import Disk, RecordState, StoredBlock
from saltern.core.effects import (
    Close,
    Effect,
    Erased,
    Event,
    ForgetRecords,
    OpId,
    ReadRecord,
    Received,
    RecordName,
    Send,
    StoredRecord,
    Tick,
    WipePages,
    WriteRecord,
)
from saltern.core.extents import Extent, PagePool
from saltern.core.keys import Key, UserId
from saltern.core.leases import ConnectionId, Lease, Session, SessionState
from saltern.core.loads import Load, Loads, Waiting
from saltern.core.messages import (
    Acquire,
    Acquired,
    Discard,
    Lookup,
    Refusal,
    Reply,
    Reserve,
    Reserved,
    SchedulerHello,
    WorkerHello,
)
from saltern.core.order import EvictionOrder, Stamp
from saltern.core.shares import Shares
from saltern.core.snapshot import Snapshot
from saltern.core.tenants import Limits, Tenant, User
from tests.simulator.claims import Invariant, ViolationError
from tests.simulator.disk import DiskTier, Platter, Record
from tests.simulator.engine import Ask, Copy, Engine, Operation
from tests.simulator.holdings import Holdings
from tests.simulator.invariants import Checker, State
from tests.simulator.isolation import steal_a_block, withhold_the_guarantee
from tests.simulator.records import Records
from tests.simulator.server import Server
from tests.simulator.simulation import Simulation

SEEDS = 40
SEEDS_TO_CATCH = 1000
"""Enough for the rarest of the bugs below, several times over."""

Plant = Callable[[pytest.MonkeyPatch], None]

PLANTED: list[tuple[Invariant, Plant]] = []


def test_honest_seeds_hold_all_invariants() -> None:
    for seed in range(SEEDS):
        Simulation(seed).run()


def test_one_seed_is_one_run() -> None:
    runs = [Simulation(3) for _ in range(2)]
    for simulation in runs:
        simulation.run()
    assert runs[0].events == runs[1].events > 100
    assert runs[0].world.steps == runs[1].world.steps
    assert runs[0].world.random.random() == runs[1].world.random.random()


def test_seeds_reach_every_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulator that never fills its arena or ends a session would hold any invariant."""
    reached: Counter[str] = Counter()
    send, handle, restore, lose_patience = Server._send, Cache.handle, Disk.restore, Engine._lose_patience

    def counting_send(self: Server, link: object, message: Reply) -> None:
        reached[type(message).__name__] += 1
        match message:
            case Reserved(refusal=refusal):
                reached[f"{refusal}"] += 1
            case Acquired(lease=lease):
                reached["hit"] += bool(lease)
            case _:
                pass
        send(self, link, message)  # type: ignore[arg-type]

    def counting_handle(self: Cache, event: Event, now: float) -> list[Effect]:
        before, disk_before = totals(self), disk_totals(self)
        reading = {record.name.user for record, _ in self.disk.reads.values()}
        effects = handle(self, event, now)
        reached.update(of_states(event, effects))
        reached.update(type(event).__name__ for _ in effects[:1])
        reached.update(type(effect).__name__ for effect in effects)
        answers = sum(isinstance(effect, Send) and isinstance(effect.message, Acquired) for effect in effects)
        reached["answered later"] += isinstance(event, Tick) and answers
        reached["wiped later"] += bool(self._to_wipe)
        reached["erased while it is read"] += isinstance(event, Erased) and event.user in reading
        after = totals(self)
        for name, old, new in zip(TOTALS, before, after, strict=True):
            reached[name] += max(new - old, 0)
        for name, old, new in zip(DISK_TOTALS, disk_before, disk_totals(self), strict=True):
            reached[f"disk {name}"] += new - old
        for session in self.sessions:
            for lease in session.lease_by_id.values():
                for block in lease.blocks:
                    reached["doomed and leased"] += block.state is BlockState.DOOMED
                    reached["in several runs"] += len(block.extent) > 1
        return effects

    def counting_restore(self: Disk, records: list[StoredRecord], published: Container[Key]) -> None:
        restore(self, records, published)
        reached["restored"] += len(records)
        reached["restored in vain"] += len(self._to_forget)

    def counting_patience(self: Engine, ask: Ask) -> None:
        reached["out of patience"] += ask.number in self.awaited
        lose_patience(self, ask)

    monkeypatch.setattr(Server, "_send", counting_send)
    monkeypatch.setattr(Cache, "handle", counting_handle)
    monkeypatch.setattr(Disk, "restore", counting_restore)
    monkeypatch.setattr(Engine, "_lose_patience", counting_patience)
    for seed in range(200):
        Simulation(seed).run()
    expected = {"Welcome", "Attached", "Refused", "SessionEnded", "LookedUp", "Acquired", "Reserved", "Stats", "hit"}
    expected |= {"Loading", "RecordWritten", "RecordNotWritten", "RecordRead", "RecordLost", "RecordsForgotten"}
    expected |= {"Erased", "WipePages", "erased while it is read", "restored", "restored in vain", "out of patience"}
    expected |= {*TOTALS, *(f"disk {name}" for name in DISK_TOTALS), "doomed and leased", "in several runs"}
    expected |= {"state found", "state granted alone", "state granted with its blocks", "state refused"}
    expected |= {"states that can't be meant", "answered later", "wiped later"}
    expected |= {f"{refusal}" for refusal in Refusal}
    # Nothing is published here: `tests/core/test_public.py` has lives with publications.
    expected -= {f"{Refusal.NOT_PUBLISHED}"}
    assert {name for name in expected if not reached[name]} == set()


TOTALS = ("evicted", "aborted", "discarded", "stored", "stored_after_evicting", "expired", "shortened")


def totals(cache: Cache) -> list[int]:
    """Count what was decided for all tenants together."""
    return [sum(getattr(tenant.tally, name) for tenant in cache.tenant_by_name.values()) for name in TOTALS]


DISK_TOTALS = ("stored", "skipped", "evicted", "expired", "loaded", "lost")


def disk_totals(cache: Cache) -> list[int]:
    """Count what was decided on the disk."""
    return [getattr(cache.disk.tally, name) for name in DISK_TOTALS]


def of_states(event: Event, effects: list[Effect]) -> Iterator[str]:
    """Name what an event and its answers show of states."""
    for effect in effects:
        match event, effect:
            case Received(message=Acquire(states=states)), Send(message=Acquired(lease=lease)) if states and lease:
                yield "state found"
            case Received(message=Reserve(ends_in_state=True, keys=keys)), Send(message=Reserved() as answer):
                indexes = [grant.index for grant in answer.grants]
                if len(keys) - 1 in indexes:
                    yield "state granted alone" if len(indexes) == 1 else "state granted with its blocks"
                elif answer.refusal is not None and answer.upto == len(keys) - 1:
                    yield "state refused"
            case Received(message=Lookup(states=states, keys=())), Close() if states:
                yield "states that can't be meant"
            case _:
                pass


def planted(invariant: Invariant) -> Callable[[Plant], Plant]:
    """Keep a bug that `invariant` has to catch."""

    def keep(plant: Plant) -> Plant:
        PLANTED.append((invariant, plant))
        return plant

    return keep


# Bytes and pages


@planted(Invariant.TILES)
def a_block_is_freed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    free = PagePool.free

    def free_twice(self: PagePool, extent: Extent) -> None:
        free(self, extent)
        if len(extent) > 1:
            free(self, extent[:1])

    monkeypatch.setattr(PagePool, "free", free_twice)


@planted(Invariant.TILES)
def an_extent_keeps_its_pages_in_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = PagePool.allocate

    def allocate_and_keep(self: PagePool, pages: int) -> Extent | None:
        extent = allocate(self, pages)
        if extent is not None and pages == 3:
            self._insert(extent[0].start, extent[0].count)
        return extent

    monkeypatch.setattr(PagePool, "allocate", allocate_and_keep)


@planted(Invariant.TILES)
def a_doomed_block_that_is_read_gives_its_pages_away(monkeypatch: pytest.MonkeyPatch) -> None:
    doom = Cache._doom

    def doom_and_free(self: Cache, root: Block) -> int:
        pinned = [block for block in root.with_descendants() if block.pins]
        doomed = doom(self, root)
        for block in pinned:
            self.pool.free(block.extent)
        return doomed

    monkeypatch.setattr(Cache, "_doom", doom_and_free)


@planted(Invariant.TILES)
def an_extent_is_a_page_short(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = PagePool.allocate

    def allocate_less(self: PagePool, pages: int) -> Extent | None:
        return allocate(self, max(1, pages - 1))

    monkeypatch.setattr(PagePool, "allocate", allocate_less)


@planted(Invariant.BYTES)
def a_user_is_served_what_another_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def ready_prefix(self: Cache, session: Session, ask: Lookup | Acquire) -> list[Block]:
        blocks = []
        for key in ask.keys:
            owners = [owner for tenant in self.tenant_by_name.values() for owner in tenant.user_by_id.values()]
            found = [owner.block_by_key[key] for owner in owners if key in owner.block_by_key]
            if not found or found[0].state is not BlockState.READY or session.state is not SessionState.OPEN:
                break
            blocks.append(found[0])
        return blocks

    monkeypatch.setattr(Cache, "_ready_prefix", ready_prefix)


@planted(Invariant.BYTES)
def extents_are_answered_from_the_first_block_on(monkeypatch: pytest.MonkeyPatch) -> None:
    acquire = Cache._acquire

    def acquire_from_0(self: Cache, session: Session, ask: Acquire, *found: Any) -> Acquired:
        answer = acquire(self, session, ask, *found)
        prefix = self._ready_prefix(session, ask)
        extents = tuple(block.extent for block in prefix[: len(answer.extents)])
        return Acquired(answer.request, answer.lease, answer.acquired_at, answer.ready, extents)

    monkeypatch.setattr(Cache, "_acquire", acquire_from_0)


@planted(Invariant.BYTES)
def a_worker_reads_the_runs_of_an_extent_in_the_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    init = Copy.__init__

    def init_swapped(self: Copy, *arguments: object) -> None:
        init(self, *arguments)  # type: ignore[arg-type]
        if not self.operation.is_write:
            self._cells = [cells[::-1] for cells in self._cells]

    monkeypatch.setattr(Copy, "__init__", init_swapped)


@planted(Invariant.UNFINISHED)
def a_lookup_finds_blocks_that_are_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def ready_prefix(self: Cache, session: Session, ask: Lookup | Acquire) -> list[Block]:
        blocks = []
        for key in ask.keys:
            block = self._linked(ask.tenant, ask.user, key)
            if block is None or session.state is not SessionState.OPEN:
                break
            blocks.append(block)
        return blocks

    monkeypatch.setattr(Cache, "_ready_prefix", ready_prefix)


@planted(Invariant.UNFINISHED)
def an_engine_commits_before_every_rank_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "is_complete", lambda self, operation: True)


@planted(Invariant.UNFINISHED)
def an_engine_commits_although_a_rank_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    reported = Engine.reported

    def always_fine(self: Engine, operation: Operation, rank: int, *, ok: bool) -> None:
        reported(self, operation, rank, ok=ok or operation.is_write)

    monkeypatch.setattr(Engine, "reported", always_fine)


@planted(Invariant.UNFINISHED)
def a_lost_session_publishes_what_it_was_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    drop = Cache._drop_if_unreachable

    def drop_and_publish(self: Cache, session: Session) -> None:
        if session.control is None and not session.lifelines:
            for lease in session.lease_by_id.values():
                if lease.is_write:
                    self._commit(session, lease)
            session.lease_by_id = {i: lease for i, lease in session.lease_by_id.items() if not lease.is_write}
        drop(self, session)

    monkeypatch.setattr(Cache, "_drop_if_unreachable", drop_and_publish)


@planted(Invariant.DISCARDED)
def a_bad_block_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache, "_discard", lambda self, session, ask: None)


@planted(Invariant.QUIET)
def leases_fall_with_the_first_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    end_session = Cache._end_session

    def end_and_drop(self: Cache, session: Session, reason: str) -> None:
        end_session(self, session, reason)
        for lease in session.lease_by_id.values():
            if lease.is_write:
                self._abort(session, lease)
            else:
                self._release(lease)
        session.lease_by_id.clear()

    monkeypatch.setattr(Cache, "_end_session", end_and_drop)


@planted(Invariant.QUIET)
def leases_fall_with_the_socket_of_a_process_that_still_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    disconnect = Cache._disconnect

    def disconnect_and_forget(self: Cache, connection: ConnectionId) -> None:
        disconnect(self, connection)
        self._forget_lifeline(connection)

    monkeypatch.setattr(Cache, "_disconnect", disconnect_and_forget)


# Limits and order


@planted(Invariant.LIMITS)
def the_limits_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares_module, "exceeds", lambda pages, limit_pages: False)


@planted(Invariant.LIMITS)
def a_limit_is_rounded_up_to_whole_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits = Tenant.set_limits

    def set_rounded_up(self: Tenant[Block], limits: Limits) -> None:
        set_limits(self, limits)
        if self.user_limit_pages is not None:
            self.user_limit_pages += 1

    monkeypatch.setattr(Tenant, "set_limits", set_rounded_up)


@planted(Invariant.CHARGES)
def an_evicted_block_is_still_charged_to_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    free_if_unheld = Cache._free_if_unheld

    def free_and_charge(self: Cache, block: Block) -> None:
        block.user.used_pages += not block.pins
        free_if_unheld(self, block)

    monkeypatch.setattr(Cache, "_free_if_unheld", free_and_charge)


@planted(Invariant.FORGOTTEN)
def a_user_without_blocks_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tenant, "forget_if_empty", lambda self, user: None)


@planted(Invariant.FORGOTTEN)
def a_user_without_blocks_stays_in_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(self: Tenant[Block], user: User[Block]) -> None:
        if not user.used_pages:
            self.user_by_id.pop(user.id, None)

    monkeypatch.setattr(Tenant, "forget_if_empty", forget)


@planted(Invariant.ORDER)
def the_shallowest_block_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def shallowest(self: Block) -> Stamp | None:
        if self.state is not BlockState.READY or self.pins or self.children is not None:
            return None
        return (self.touched_at, self.depth, self.serial)

    monkeypatch.setattr(Block, "stamp", property(shallowest))


@planted(Invariant.ORDER)
def a_parent_that_lost_its_last_child_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    doom = Cache._doom

    def doom_silently(self: Cache, root: Block) -> int:
        offer, self.shares.offer = self.shares.offer, lambda block: None  # type: ignore[method-assign]
        try:
            return doom(self, root)
        finally:
            self.shares.offer = offer  # type: ignore[method-assign]

    monkeypatch.setattr(Cache, "_doom", doom_silently)


@planted(Invariant.ORDER)
def the_top_of_the_heap_is_not_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(self: EvictionOrder[Block]) -> Block | None:
        while self._heap:
            stamp, _, item = self._heap[0]
            if self._stamp_by_id.get(id(item)) == stamp and item.stamp is not None:
                return item
            self._heap.pop(0)
            self._heap.sort()
            if self._stamp_by_id.get(id(item)) == stamp:
                del self._stamp_by_id[id(item)]
        return None

    monkeypatch.setattr(EvictionOrder, "first", first)


@planted(Invariant.ORDER)
def a_user_whose_oldest_was_unpinned_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    def offer_block_only(self: Shares[Block], block: Block) -> None:
        if block.stamp is not None:
            block.user.order.offer(block)
            if block.user.order.first() is not block:
                block.user.tenant.order.offer(block.user)

    monkeypatch.setattr(Shares, "offer", offer_block_only)


@planted(Invariant.RECENCY)
def a_block_is_stamped_at_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = Cache._commit

    def commit_and_touch(self: Cache, session: Session, lease: Lease) -> None:
        for block in lease.blocks:
            block.touched_at = self._now
        commit(self, session, lease)

    monkeypatch.setattr(Cache, "_commit", commit_and_touch)


@planted(Invariant.RECENCY)
def only_the_pinned_part_of_a_prefix_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    acquire = Cache._acquire

    def acquire_and_touch_less(self: Cache, session: Session, ask: Acquire, *found: Any) -> Acquired:
        prefix = self._ready_prefix(session, ask)[: ask.start]
        times = [block.touched_at for block in prefix]
        answer = acquire(self, session, ask, *found)
        for block, time in zip(prefix, times, strict=True):
            block.touched_at = time
        return answer

    monkeypatch.setattr(Cache, "_acquire", acquire_and_touch_less)


@planted(Invariant.RECENCY)
def the_time_of_a_server_before_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    reserve = Cache._reserve

    def reserve_in_the_future(self: Cache, session: Session, ask: Reserve) -> Reserved:
        now, self._now = self._now, max(self._now, ask.acquired_at)
        try:
            return reserve(self, session, ask)
        finally:
            self._now = now

    monkeypatch.setattr(Cache, "_reserve", reserve_in_the_future)


@planted(Invariant.VICTIMS)
def a_pinned_block_is_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    make_room = Cache._make_room

    def make_room_anyhow(
        self: Cache, tenant: Tenant[Block], user: UserId, pages: int, stamp: Stamp, parent: Block | None
    ) -> Refusal | int:
        made = make_room(self, tenant, user, pages, stamp, parent)
        if made is Refusal.ALL_PINNED:
            for owner in list(tenant.user_by_id.values()):
                for block in list(owner.block_by_key.values()):
                    if block.state is BlockState.READY and block.children is None:
                        self._doom(block)
                        return made
        return made

    monkeypatch.setattr(Cache, "_make_room", make_room_anyhow)


@planted(Invariant.VICTIMS)
def a_release_takes_the_block_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    release = Cache._release

    def release_and_doom(self: Cache, lease: Lease) -> None:
        release(self, lease)
        if lease.blocks[-1].state is BlockState.READY:
            self._doom(lease.blocks[-1])

    monkeypatch.setattr(Cache, "_release", release_and_doom)


@planted(Invariant.VICTIMS)
def an_abort_takes_the_whole_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    abort = Cache._abort

    def abort_from_the_root(self: Cache, session: Session, lease: Lease) -> None:
        root = lease.blocks[0]
        while root.parent is not None:
            root = root.parent
        if root.state is BlockState.READY:
            self._doom(root)
        abort(self, session, lease)

    monkeypatch.setattr(Cache, "_abort", abort_from_the_root)


@planted(Invariant.VICTIMS)
def a_discard_takes_the_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    discard = Cache._discard

    def discard_from_the_parent(self: Cache, session: Session, ask: Discard) -> None:
        block = self._linked(ask.tenant, ask.user, ask.key)
        if block is not None and block.parent is not None:
            ask = replace(ask, key=block.parent.key)
        discard(self, session, ask)

    monkeypatch.setattr(Cache, "_discard", discard_from_the_parent)


@planted(Invariant.NEEDED)
def one_block_more_is_evicted_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    make_room = Cache._make_room

    def make_more_room(
        self: Cache, tenant: Tenant[Block], user: UserId, pages: int, stamp: Stamp, parent: Block | None
    ) -> Refusal | int:
        made = make_room(self, tenant, user, pages, stamp, parent)
        if made == 0 and (victim := tenant.first_victim()) is not None and (victim.stamp or stamp) < stamp:
            self._doom(victim)
        return made

    monkeypatch.setattr(Cache, "_make_room", make_more_room)


@planted(Invariant.NEEDED)
def a_refusal_keeps_what_it_evicted_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    def free_and_count(self: Cache, victim: Block, parent: Block | None) -> None:
        self._free(victim)

    monkeypatch.setattr(Cache, "_relink", free_and_count)


@planted(Invariant.REFUSALS)
def a_full_cache_refuses_instead_of_evicting(monkeypatch: pytest.MonkeyPatch) -> None:
    make_room = Cache._make_room

    def make_no_room(
        self: Cache, tenant: Tenant[Block], user: UserId, pages: int, stamp: Stamp, parent: Block | None
    ) -> Refusal | int:
        return (
            make_room(self, tenant, user, pages, stamp, parent) if self.pool.free_pages >= pages else Refusal.ALL_PINNED
        )

    monkeypatch.setattr(Cache, "_make_room", make_no_room)


@planted(Invariant.REFUSALS)
def a_user_at_its_limit_is_refused_although_it_has_old_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    make_room = Cache._make_room

    def make_little_room(
        self: Cache, tenant: Tenant[Block], user: UserId, pages: int, stamp: Stamp, parent: Block | None
    ) -> Refusal | int:
        made = make_room(self, tenant, user, pages, stamp, parent)
        return made if isinstance(made, Refusal) or not made else Refusal.NEXT_VICTIM

    monkeypatch.setattr(Cache, "_make_room", make_little_room)


# Shares


@planted(Invariant.PAYER)
def the_largest_tenant_pays_whatever_its_guarantee(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tenant, "pressure", lambda self, more=0: (self.used_pages + more) / self.limits.weight)


@planted(Invariant.PAYER)
def a_weight_is_of_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tenant, "pressure", lambda self, more=0: self.used_pages + more - self.guarantee_pages)


@planted(Invariant.PAYER)
def a_tenant_that_has_grown_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    note_growth = Shares.note_growth

    def note_the_first(self: Shares[Block], tenant: Tenant[Block]) -> None:
        if id(tenant) not in self._by_surplus._stamp_by_id:
            note_growth(self, tenant)

    monkeypatch.setattr(Shares, "note_growth", note_the_first)


@planted(Invariant.GUARANTEES)
def a_block_is_stolen_from_a_tenant_at_its_guarantee(monkeypatch: pytest.MonkeyPatch) -> None:
    steal_a_block(monkeypatch)


@planted(Invariant.PROMISED)
def a_tenant_within_its_guarantee_waits_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    payer = Shares.payer

    def payer_above(self: Shares[Block], asker: Tenant[Block], pages: int) -> Tenant[Block] | None:
        return payer(self, asker, pages) if asker.pressure(pages) > 0 else None

    monkeypatch.setattr(Shares, "payer", payer_above)
    monkeypatch.setattr(Holdings, "check_payers", lambda self: None)
    monkeypatch.setattr(State, "check_conserved", lambda self, ask, pages: None)


@planted(Invariant.CONSERVED)
def a_newcomer_is_refused_although_others_have_more(monkeypatch: pytest.MonkeyPatch) -> None:
    payer = Shares.payer

    def payer_within(self: Shares[Block], asker: Tenant[Block], pages: int) -> Tenant[Block] | None:
        return asker if asker.pressure(pages) > 0 else payer(self, asker, pages)

    monkeypatch.setattr(Shares, "payer", payer_within)
    monkeypatch.setattr(Holdings, "check_payers", lambda self: None)


@planted(Invariant.IN_FLIGHT)
def a_tenant_pins_as_much_as_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shares, "may_hold", lambda self, tenant: None)


@planted(Invariant.IN_FLIGHT)
def what_is_kept_for_a_tenants_pins_is_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    def may_hold(self: Shares[Block], tenant: Tenant[Block]) -> int | None:
        pinned = sum(other.held_pages for other in self.tenant_by_name.values())
        return None if self.held_pages_max is None else max(self.held_pages_max - pinned, 0)

    monkeypatch.setattr(Shares, "may_hold", may_hold)


@planted(Invariant.EXPIRED)
def what_has_expired_is_found_until_it_is_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    ready_prefix = Cache._ready_prefix

    def ready_prefix_for_ever(self: Cache, session: Session, ask: Lookup | Acquire) -> list[Block]:
        now, self._now = self._now, 0.0
        try:
            return ready_prefix(self, session, ask)
        finally:
            self._now = now

    monkeypatch.setattr(Cache, "_ready_prefix", ready_prefix_for_ever)


@planted(Invariant.DUE)
def nothing_falls_due_by_expiry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shares, "note_due", lambda self, tenant: None)


@planted(Invariant.DUE)
def a_lowered_limit_is_met_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tenant, "is_over_limit", property(lambda self: False))


@planted(Invariant.VICTIMS)
def a_tick_takes_more_than_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    tick = Cache._tick

    def tick_on(self: Cache) -> None:
        tick(self)
        victim = self.default_tenant.first_victim()
        if victim is not None:
            self._doom(victim)

    monkeypatch.setattr(Cache, "_tick", tick_on)


@planted(Invariant.FORGOTTEN)
def a_tenant_without_settings_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shares, "forget_if_empty", lambda self, tenant: None)


@planted(Invariant.HITS)
def a_block_is_stolen_and_nobody_minds_the_guarantee(monkeypatch: pytest.MonkeyPatch) -> None:
    steal_a_block(monkeypatch, always=True)
    monkeypatch.setattr(Checker, "_check_needed", lambda self, ask, state, gone, now: None)
    monkeypatch.setattr(Checker, "_check_guarantees", lambda self, ask, state, gone: None)


@planted(Invariant.HITS)
def a_guarantee_is_withheld_and_nobody_minds_the_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    withhold_the_guarantee(monkeypatch, Refusal.ALL_PINNED)
    room_refused = State.room_refused

    def room_refused_or_withheld(
        self: State, ask: Acquire | Reserve, pages: int, newcomer: tuple[float, int]
    ) -> Refusal | None:
        within = self.used(ask.tenant) + pages <= self.guarantee(ask.tenant)
        return Refusal.ALL_PINNED if within and self.free_pages < pages else room_refused(self, ask, pages, newcomer)

    monkeypatch.setattr(State, "room_refused", room_refused_or_withheld)
    monkeypatch.setattr(State, "check_promised", lambda self, ask, answer, pages: None)
    monkeypatch.setattr(State, "check_conserved", lambda self, ask, pages: None)


# Blocks and leases


@planted(Invariant.PINS)
def a_release_forgets_to_unpin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache, "_release", lambda self, lease: None)


@planted(Invariant.PINS)
def a_lease_pins_only_its_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    acquire = Cache._acquire

    def acquire_and_unpin(self: Cache, session: Session, ask: Acquire, *found: Any) -> Acquired:
        answer = acquire(self, session, ask, *found)
        if answer.lease:
            for block in session.lease_by_id[answer.lease].blocks[:-1]:
                block.pins -= 1
        return answer

    monkeypatch.setattr(Cache, "_acquire", acquire_and_unpin)


@planted(Invariant.REACHABLE)
def an_abort_leaves_the_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Block, "with_descendants", lambda self: iter([self]))


@planted(Invariant.TILES)
def a_late_commit_revives_a_doomed_block(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = Cache._commit

    def commit_all(self: Cache, session: Session, lease: Lease) -> None:
        for block in lease.blocks:
            block.state = BlockState.WRITING
        commit(self, session, lease)

    monkeypatch.setattr(Cache, "_commit", commit_all)


@planted(Invariant.REACHABLE)
def a_block_hangs_on_a_parent_that_was_just_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    make_room = Cache._make_room
    reserve = Cache._reserve
    last: list[Block] = []

    def make_room_from_the_prefix(
        self: Cache, tenant: Tenant[Block], user: UserId, pages: int, stamp: Stamp, parent: Block | None
    ) -> Refusal | int:
        made = make_room(self, tenant, user, pages, stamp, parent)
        if made is Refusal.NEXT_VICTIM and last and last[0].stamp is not None:
            self._doom(last[0])
            return make_room_from_the_prefix(self, tenant, user, pages, stamp, parent)
        return made

    def reserve_and_remember(self: Cache, session: Session, ask: Reserve) -> Reserved:
        last[:] = [block for key in ask.keys if (block := self._linked(ask.tenant, ask.user, key)) is not None][-1:]
        return reserve(self, session, ask)

    monkeypatch.setattr(Cache, "_make_room", make_room_from_the_prefix)
    monkeypatch.setattr(Cache, "_reserve", reserve_and_remember)


# States


@planted(Invariant.STATES)
def a_prefix_ends_without_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(self: Cache, session: Session, ask: Lookup | Acquire) -> tuple[list[Block], Block | None]:
        return self._ready_prefix(session, ask), None

    monkeypatch.setattr(Cache, "_find", find)


@planted(Invariant.STATES)
def a_state_is_found_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(self: Cache, session: Session, ask: Lookup | Acquire) -> tuple[list[Block], Block | None]:
        prefix = self._ready_prefix(session, ask)
        while ask.states and prefix:
            if (state := self._linked(ask.tenant, ask.user, ask.states[len(prefix) - 1])) is not None:
                return prefix, state
            prefix.pop()
        return prefix, None

    monkeypatch.setattr(Cache, "_find", find)


@planted(Invariant.STATES)
def the_state_of_another_user_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(self: Cache, session: Session, ask: Lookup | Acquire) -> tuple[list[Block], Block | None]:
        prefix = self._ready_prefix(session, ask)
        while ask.states and prefix:
            for user in self.tenant_by_name[ask.tenant].user_by_id.values():
                state = user.block_by_key.get(ask.states[len(prefix) - 1])
                if state is not None and state.state is BlockState.READY:
                    return prefix, state
            prefix.pop()
        return prefix, None

    monkeypatch.setattr(Cache, "_find", find)


@planted(Invariant.LONGEST)
def the_first_state_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    find = Cache._find

    def find_first(self: Cache, session: Session, ask: Lookup | Acquire) -> tuple[list[Block], Block | None]:
        for end in range(1, len(ask.states) + 1):
            prefix, state = find(self, session, replace(ask, keys=ask.keys[:end], states=ask.states[:end]))
            if state is not None:
                return prefix, state
        return find(self, session, ask)

    monkeypatch.setattr(Cache, "_find", find_first)


@planted(Invariant.BYTES)
def the_state_before_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    find = Cache._find

    def find_before(self: Cache, session: Session, ask: Lookup | Acquire) -> tuple[list[Block], Block | None]:
        prefix, state = find(self, session, ask)
        for key in reversed(ask.states[: max(len(prefix) - 1, 0)]):
            before = self._linked(ask.tenant, ask.user, key)
            if before is not None and before.state is BlockState.READY:
                return prefix, before
        return prefix, state

    monkeypatch.setattr(Cache, "_find", find_before)


@planted(Invariant.QUIET)
def a_state_is_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    acquire = Cache._acquire

    def acquire_blocks_only(self: Cache, session: Session, ask: Acquire, *found: Any) -> Acquired:
        answer = acquire(self, session, ask, *found)
        if answer.lease and ask.states:
            state = session.lease_by_id[answer.lease].blocks.pop()
            state.pins -= 1
            if not state.pins:
                self._unpinned(state)
        return answer

    monkeypatch.setattr(Cache, "_acquire", acquire_blocks_only)


@planted(Invariant.RECENCY)
def a_state_that_was_used_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    acquire = Cache._acquire

    def acquire_and_touch_blocks(self: Cache, session: Session, ask: Acquire, *found: Any) -> Acquired:
        _, state = self._find(session, ask)
        touched_at = state.touched_at if state is not None else 0.0
        answer = acquire(self, session, ask, *found)
        if state is not None:
            state.touched_at = touched_at
        return answer

    monkeypatch.setattr(Cache, "_acquire", acquire_and_touch_blocks)


@planted(Invariant.REACHABLE)
def a_state_outlives_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    with_descendants = Block.with_descendants

    def with_blocks(self: Block) -> list[Block]:
        return [block for block in with_descendants(self) if block.length == self.length]

    monkeypatch.setattr(Block, "with_descendants", with_blocks)


@planted(Invariant.SIZES)
def a_state_gets_the_room_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    reserve = Cache._reserve

    def reserve_blocks(self: Cache, session: Session, ask: Reserve) -> Reserved:
        return reserve(self, session, replace(ask, ends_in_state=False))

    monkeypatch.setattr(Cache, "_reserve", reserve_blocks)


@planted(Invariant.ANSWERS)
def states_that_cannot_be_meant_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    find = Cache._find

    def find_something(self: Cache, session: Session, ask: Lookup | Acquire) -> tuple[list[Block], Block | None]:
        is_meant = session.state_bytes and len(ask.states) == len(ask.keys)
        return find(self, session, ask if is_meant else replace(ask, states=()))

    monkeypatch.setattr(Cache, "_find", find_something)


# The disk


@planted(Invariant.TILES)
def half_of_what_is_forgotten_comes_free(monkeypatch: pytest.MonkeyPatch) -> None:
    end_forgetting = Disk.end_forgetting

    def end_half(self: Disk, op: OpId) -> None:
        for record in self.forgetting[op][1::2]:
            self._leaving_pages -= record.pages
        self.forgetting[op] = self.forgetting[op][::2]
        end_forgetting(self, op)

    monkeypatch.setattr(Disk, "end_forgetting", end_half)


@planted(Invariant.CHARGES)
def a_record_that_leaves_is_still_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave_and_charge(self: Disk, record: StoredBlock) -> None:
        leave(self, record)
        record.user.used_pages += 1

    leave = Disk._leave
    monkeypatch.setattr(Disk, "_leave", leave_and_charge)


@planted(Invariant.LIMITS)
def a_free_page_of_the_disk_is_everybodys(monkeypatch: pytest.MonkeyPatch) -> None:
    make_room = Disk._make_room

    def make_room_if_full(self: Disk, block: Block, pages: int) -> Refusal | None:
        return None if self.pool.free_pages >= pages else make_room(self, block, pages)

    monkeypatch.setattr(Disk, "_make_room", make_room_if_full)


@planted(Invariant.ORDER)
def the_beginning_of_a_prefix_leaves_the_disk_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def shallowest(self: StoredBlock) -> Stamp | None:
        if self.state is not RecordState.STORED or self.reads:
            return None
        return (self.touched_at, self.depth, self.serial)

    monkeypatch.setattr(StoredBlock, "stamp", property(shallowest))


@planted(Invariant.GUARANTEES)
def a_record_is_stolen_from_a_tenant_at_its_guarantee(monkeypatch: pytest.MonkeyPatch) -> None:
    make_room = Disk._make_room

    def make_room_and_steal(self: Disk, block: Block, pages: int) -> Refusal | None:
        made = make_room(self, block, pages)
        for other in list(self.shares.tenant_by_name.values()):
            victim = other.first_victim()
            if other.name != block.user.tenant.name and victim and other.used_pages <= other.guarantee_pages:
                self.let_go(victim)
                break
        return made

    monkeypatch.setattr(Disk, "_make_room", make_room_and_steal)


@planted(Invariant.VICTIMS)
def a_record_that_is_read_is_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    make_room = Disk._make_room

    def make_room_anyhow(self: Disk, block: Block, pages: int) -> Refusal | None:
        for record, _ in self.reads.values():
            self.let_go(record)
        return make_room(self, block, pages)

    monkeypatch.setattr(Disk, "_make_room", make_room_anyhow)


@planted(Invariant.DUE)
def nothing_on_the_disk_falls_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Disk, "due_at", property(lambda self: None))


@planted(Invariant.PINS)
def a_block_that_is_written_to_the_disk_is_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pin = Cache._pin

    def pin_unless_ready(self: Cache, blocks: list[Block]) -> None:
        if len(blocks) != 1 or blocks[0].state is not BlockState.READY:
            pin(self, blocks)

    monkeypatch.setattr(Cache, "_pin", pin_unless_ready)


@planted(Invariant.BYTES)
def a_load_gets_the_bytes_of_another_record(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Platter.record

    def record_of_another(self: Platter, name: RecordName, row: object) -> Record | None:
        named = record(self, name, row)  # type: ignore[arg-type]
        if named is not None and named.cells:
            named.cells = [(cell[0], Key(bytes(32)), *cell[2:]) for cell in named.cells if cell is not None]
        return named

    monkeypatch.setattr(Platter, "record", record_of_another)


@planted(Invariant.DISCARDED)
def a_bad_block_stays_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def discard_in_ram(self: Cache, session: Session, ask: Discard) -> None:
        block = self._found(ask.tenant, ask.user, ask.key)
        if block is not None:
            self._doom(block)

    monkeypatch.setattr(Cache, "_discard", discard_in_ram)


@planted(Invariant.LOADS)
def what_the_engine_has_itself_is_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    coming = Cache._coming

    def coming_from_0(
        self: Cache, session: Session, ask: Lookup | Acquire, found: list[Block]
    ) -> list[Block | StoredBlock]:
        return coming(self, session, replace(ask, start=0) if isinstance(ask, Acquire) else ask, found)

    monkeypatch.setattr(Cache, "_coming", coming_from_0)


@planted(Invariant.LOADS)
def nothing_is_ever_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache, "_fetch", lambda self, session, ask, found: False)


@planted(Invariant.BOUNDED)
def one_more_is_written_at_a_time_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    start_write = Disk.start_write

    def start_one_more(self: Disk, may_pin: Callable[[Block], bool]) -> tuple[WriteRecord, Block] | None:
        self.writes_in_flight_max += 1
        try:
            return start_write(self, may_pin)
        finally:
            self.writes_in_flight_max -= 1

    monkeypatch.setattr(Disk, "start_write", start_one_more)


@planted(Invariant.BOUNDED)
def one_more_is_read_at_a_time_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    start_reads = Disk.start_reads

    def start_one_more(self: Disk) -> tuple[list[ReadRecord], list[Block]]:
        self.reads_in_flight_max += 1
        try:
            return start_reads(self)
        finally:
            self.reads_in_flight_max -= 1

    monkeypatch.setattr(Disk, "start_reads", start_one_more)


@planted(Invariant.WORK)
def operations_are_counted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    next_op = Disk._next_op

    def next_small_op(self: Disk) -> OpId:
        if self.last_op > 10 and not (self.writes or self.reads or self.forgetting):
            self.last_op = 0
        return next_op(self)

    monkeypatch.setattr(Disk, "_next_op", next_small_op)


@planted(Invariant.SLOTS)
def a_slot_is_given_away_before_it_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    start_forgetting = Disk.start_forgetting

    def start_and_free(self: Disk) -> list[ForgetRecords]:
        work = start_forgetting(self)
        for forget in work:
            self.end_forgetting(forget.op)
            self.forgetting[forget.op] = []
        return work

    monkeypatch.setattr(Disk, "start_forgetting", start_and_free)


@planted(Invariant.SLOTS)
def a_block_is_written_anew_before_the_index_forgot_it(monkeypatch: pytest.MonkeyPatch) -> None:
    start_write = Disk.start_write

    def start_anyhow(self: Disk, may_pin: Callable[[Block], bool]) -> tuple[WriteRecord, Block] | None:
        self._going.clear()
        return start_write(self, may_pin)

    monkeypatch.setattr(Disk, "start_write", start_anyhow)


@planted(Invariant.RECORDS)
def what_could_not_be_written_is_taken_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    end_write = Disk.end_write
    monkeypatch.setattr(Disk, "end_write", lambda self, op, *, is_written: end_write(self, op, is_written=True))


@planted(Invariant.RECORDS)
def a_row_is_committed_before_its_record_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    write = Platter.write

    def write_less(self: Platter, pieces: list[tuple[int, int]], record: Record) -> None:
        write(self, pieces[:1], record)

    monkeypatch.setattr(Platter, "write", write_less)


@planted(Invariant.RESTORED)
def a_restart_misses_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    restore = Disk.restore
    monkeypatch.setattr(Disk, "restore", lambda self, records, published: restore(self, list(records)[1:], published))


@planted(Invariant.DRAINED)
def what_was_forgotten_once_is_never_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    end_forgetting = Disk.end_forgetting

    def end_and_remember(self: Disk, op: OpId) -> None:
        names = {record.name for record in self.forgetting[op]}
        end_forgetting(self, op)
        self._going |= names

    monkeypatch.setattr(Disk, "end_forgetting", end_and_remember)


@planted(Invariant.WAITS)
def who_waits_for_the_disk_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_next(self: Cache) -> int:
        for load in self.loads.leave(self.loads.take()):
            self._release(Lease(load.blocks, is_write=True))
        return 1

    monkeypatch.setattr(Cache, "_answer_next", forget_next)


@planted(Invariant.ANSWERS)
def who_waits_for_the_disk_is_answered_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    send = Cache._send

    def send_twice(self: Cache, connection: ConnectionId, message: Reply) -> None:
        send(self, connection, message)
        if isinstance(message, Acquired) and self.loads.answerable:
            send(self, connection, message)

    monkeypatch.setattr(Cache, "_send", send_twice)


@planted(Invariant.PIECES)
def all_who_wait_for_a_load_are_answered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_next = Cache._answer_next

    def answer_all(self: Cache) -> int:
        while len(self.loads.answerable) > 1:
            answer_next(self)
        return answer_next(self)

    monkeypatch.setattr(Cache, "_answer_next", answer_all)


@planted(Invariant.PINS)
def a_load_is_kept_for_the_first_who_waits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    leave = Loads.leave

    def leave_for_all(self: Loads, waiting: Waiting) -> list[Load]:
        left = leave(self, waiting)
        return [load for load in waiting.loads if load in left or len(load.waiting) == 1]

    monkeypatch.setattr(Loads, "leave", leave_for_all)


@planted(Invariant.ANSWERS)
def who_waits_for_the_disk_is_answered_at_once_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = Cache._fetch

    def fetch_and_go_on(self: Cache, session: Session, ask: Acquire, found: list[Block]) -> bool:
        fetch(self, session, ask, found)
        return False

    monkeypatch.setattr(Cache, "_fetch", fetch_and_go_on)


# Erasure


@planted(Invariant.ERASED)
def what_was_begun_before_is_stored_after_an_erasure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache, "_is_of_erased", lambda self, ask: False)


@planted(Invariant.ERASED)
def what_is_under_way_is_done_with_the_next_key(monkeypatch: pytest.MonkeyPatch) -> None:
    allow = DiskTier.allow
    monkeypatch.setattr(DiskTier, "allow", lambda self, tenant, user, after: allow(self, tenant, user, 0))


@planted(Invariant.ERASED)
def the_index_keeps_what_is_erased(monkeypatch: pytest.MonkeyPatch) -> None:
    def remember_only(self: Platter, tenant: str, user: UserId | None, *, at: float, for_good: bool) -> None:
        self.erased[tenant, user] = (at, for_good)

    monkeypatch.setattr(Platter, "erase", remember_only)


@planted(Invariant.ERASED)
def what_is_being_written_comes_to_be_after_an_erasure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write lease outlives the user: it is for one of that name who is there when it ends."""
    erase = Cache._erase

    def erase_ready(self: Cache, tenant: str, user_id: UserId | None, *, for_good: bool) -> None:
        written = [
            block
            for session in self.sessions
            for lease in session.lease_by_id.values()
            if lease.is_write
            for block in lease.blocks
            if block.user.tenant.name == tenant and user_id in (None, block.user.id)
        ]
        if not written:
            erase(self, tenant, user_id, for_good=for_good)
        else:
            self._erased_at[tenant, user_id] = self._now

    monkeypatch.setattr(Cache, "_erase", erase_ready)
    monkeypatch.setattr(Records, "check_named", lambda self, tier, erasures: None)


@planted(Invariant.WIPED)
def what_is_erased_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    free = Cache._free

    def free_as_it_is(self: Cache, block: Block) -> None:
        free(self, block)
        self._effects[:] = [effect for effect in self._effects if not isinstance(effect, WipePages)]

    monkeypatch.setattr(Cache, "_free", free_as_it_is)


@planted(Invariant.PIECES)
def what_an_erased_user_had_is_wiped_as_a_lease_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    unpinned = Cache._unpinned

    def wipe_at_once(self: Cache, block: Block) -> None:
        unpinned(self, block)
        while self._to_wipe:
            self._erase_some()

    monkeypatch.setattr(Cache, "_unpinned", wipe_at_once)


@planted(Invariant.PIECES)
def all_that_erased_users_had_is_wiped_by_one_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache, "_has_wiped_enough", False)


@planted(Invariant.CHARGES)
def what_waits_to_be_wiped_may_be_pinned_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    unpinned = Cache._unpinned

    def unpin_and_count(self: Cache, block: Block) -> None:
        unpinned(self, block)
        if block in self._to_wipe:
            self.shares.count_held(block.user, pages=-block.pages, blocks=-1)

    monkeypatch.setattr(Cache, "_unpinned", unpin_and_count)


# Counts


@planted(Invariant.STATS)
def blocks_of_who_is_erased_are_still_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    erase = Tenant.erase

    def erase_and_count(self: Tenant[Any], user_id: UserId) -> User[Any] | None:
        user = erase(self, user_id)
        self.blocks += len(user.block_by_key) if user is not None else 0
        return user

    monkeypatch.setattr(Tenant, "erase", erase_and_count)


@planted(Invariant.STATS)
def who_has_shrunk_stands_among_the_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Tenant.rank

    def rank_growth(self: Tenant[Any], user: User[Any], before: int, after: int) -> None:
        if not 0 < after < before:
            rank(self, user, before, after)

    monkeypatch.setattr(Tenant, "rank", rank_growth)


@planted(Invariant.STATS)
def a_user_of_both_tiers_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    users = Census.users
    monkeypatch.setattr(
        Census, "users", lambda self, tenant: users(self, tenant) and sum(self._tiers_by_user[tenant].values())
    )


@planted(Invariant.STATS)
def a_lease_that_falls_is_still_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    drop = Cache._drop_if_unreachable

    def drop_and_count(self: Cache, session: Session) -> None:
        before = {tenant: tenant.leased_to_write for tenant in self.tenant_by_name.values()}
        drop(self, session)
        for tenant, written in before.items():
            tenant.leased_to_write = written

    monkeypatch.setattr(Cache, "_drop_if_unreachable", drop_and_count)


# Sessions and answers


@planted(Invariant.SESSIONS)
def an_ended_session_still_gives_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    def ready_prefix(self: Cache, session: Session, ask: Lookup | Acquire) -> list[Block]:
        blocks = []
        for key in ask.keys:
            block = self._linked(ask.tenant, ask.user, key)
            if block is None or block.state is not BlockState.READY:
                break
            blocks.append(block)
        return blocks

    monkeypatch.setattr(Cache, "_ready_prefix", ready_prefix)


@planted(Invariant.SESSIONS)
def a_session_opens_without_its_last_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    open_session, open_lifeline = Cache._open_session, Cache._open_lifeline

    def open_early(self: Cache, connection: ConnectionId, hello: SchedulerHello) -> None:
        first = hello.workers[:1]
        open_session(self, connection, replace(hello, workers=first))

    def open_alone(self: Cache, connection: ConnectionId, hello: WorkerHello) -> None:
        open_lifeline(self, connection, WorkerHello(hello.engine, hello.name, hello.rank, 1, hello.outlives_socket))

    monkeypatch.setattr(Cache, "_open_session", open_early)
    monkeypatch.setattr(Cache, "_open_lifeline", open_alone)


@planted(Invariant.SESSIONS)
def a_session_opens_with_a_lifeline_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    disconnect = Cache._disconnect

    def disconnect_and_keep(self: Cache, connection: ConnectionId) -> None:
        lifelines = dict(self.lifeline_by_name)
        disconnect(self, connection)
        for name, lifeline in lifelines.items():
            if lifeline.session is None:
                self.lifeline_by_name.setdefault(name, lifeline)

    monkeypatch.setattr(Cache, "_disconnect", disconnect_and_keep)


@planted(Invariant.UNIQUE)
def two_engines_go_by_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    open_session = Cache._open_session
    names = count()

    def open_anyhow(self: Cache, connection: ConnectionId, hello: SchedulerHello) -> None:
        open_session(self, connection, replace(hello, engine=f"{next(names)}"))

    monkeypatch.setattr(Cache, "_open_session", open_anyhow)


@planted(Invariant.ANSWERS)
def an_empty_lookup_is_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = Cache._serve

    def serve_hits(self: Cache, session: Session, connection: ConnectionId, message: Lookup) -> None:
        if type(message) is not Lookup or self._ready_prefix(session, message):
            serve(self, session, connection, message)

    monkeypatch.setattr(Cache, "_serve", serve_hits)


@planted(Invariant.ANSWERS)
def an_answer_names_another_request(monkeypatch: pytest.MonkeyPatch) -> None:
    reserve = Cache._reserve

    def reserve_misnamed(self: Cache, session: Session, ask: Reserve) -> Reserved:
        answer = reserve(self, session, ask)
        return Reserved(answer.request + 1, answer.lease, answer.grants, answer.upto, answer.refusal)

    monkeypatch.setattr(Cache, "_reserve", reserve_misnamed)


@planted(Invariant.WAITS)
def a_session_does_not_notice_its_last_lifeline(monkeypatch: pytest.MonkeyPatch) -> None:
    attach = Cache._attach

    def attach_unless_waiting(self: Cache, session: Session) -> None:
        if self._serving_hello:  # type: ignore[attr-defined]
            attach(self, session)

    open_session = Cache._open_session

    def open_session_only(self: Cache, connection: ConnectionId, hello: SchedulerHello) -> None:
        self._serving_hello = True  # type: ignore[attr-defined]
        open_session(self, connection, hello)
        self._serving_hello = False  # type: ignore[attr-defined]

    monkeypatch.setattr(Cache, "_serving_hello", False, raising=False)
    monkeypatch.setattr(Cache, "_attach", attach_unless_waiting)
    monkeypatch.setattr(Cache, "_open_session", open_session_only)


@planted(Invariant.WAITS)
def the_members_of_a_lost_session_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def end_silently(self: Cache, session: Session, reason: str) -> None:
        session.state = SessionState.ENDED

    monkeypatch.setattr(Cache, "_end_session", end_silently)


@planted(Invariant.DRAINED)
def a_session_outlives_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    drop = Cache._drop_if_unreachable

    def drop_unless_several(self: Cache, session: Session) -> None:
        if len(session.workers) == 1:
            drop(self, session)

    monkeypatch.setattr(Cache, "_drop_if_unreachable", drop_unless_several)


@planted(Invariant.DRAINED)
def a_worker_that_left_is_remembered_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    disconnect = Cache._disconnect

    def disconnect_and_remember(self: Cache, connection: ConnectionId) -> None:
        lifelines = dict(self.lifeline_by_name)
        disconnect(self, connection)
        for name, lifeline in lifelines.items():
            if lifeline.session is not None and lifeline.session.state is SessionState.ENDED:
                self.lifeline_by_name.setdefault(name, lifeline)

    monkeypatch.setattr(Cache, "_disconnect", disconnect_and_remember)


@planted(Invariant.STATS)
def a_snapshot_counts_a_page_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = Cache.snapshot

    def padded(self: Cache) -> Snapshot:
        self.default_tenant.used_pages += 1
        try:
            return snapshot(self)
        finally:
            self.default_tenant.used_pages -= 1

    monkeypatch.setattr(Cache, "snapshot", padded)


@planted(Invariant.NO_CRASH)
def a_lease_can_be_given_back_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    release = Cache._release

    def release_twice(self: Cache, lease: Lease) -> None:
        release(self, lease)
        release(self, lease)

    monkeypatch.setattr(Cache, "_release", release_twice)


@pytest.mark.parametrize(("invariant", "plant"), PLANTED, ids=[plant.__name__ for _, plant in PLANTED])
def test_an_invariant_catches(invariant: Invariant, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    caught: Counter[Invariant] = Counter()
    for seed in range(SEEDS_TO_CATCH):
        try:
            Simulation(seed).run()
        except ViolationError as violation:
            if violation.invariant is invariant:
                return
            caught[violation.invariant] += 1
    pytest.fail(f"{SEEDS_TO_CATCH} seeds didn't violate {invariant}; they violated {dict(caught)}")


def test_every_invariant_has_a_planted_bug() -> None:
    assert {invariant for invariant, _ in PLANTED} == set(Invariant)
