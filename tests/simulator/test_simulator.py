"""The simulator's own test: honest seeds pass, reach what they should, and each invariant catches a planted bug."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count

import pytest

from saltern.core import cache as cache_module
from saltern.core.blocks import Block, BlockState
from saltern.core.cache import Cache
from saltern.core.effects import Event
from saltern.core.extents import Extent, PagePool
from saltern.core.keys import Key, UserId
from saltern.core.leases import ConnectionId, Lease, Session, SessionState
from saltern.core.messages import (
    Acquire,
    Acquired,
    Lookup,
    Refusal,
    Reply,
    Reserve,
    Reserved,
    SchedulerHello,
    WorkerHello,
)
from saltern.core.order import EvictionOrder, Stamp
from saltern.core.snapshot import Snapshot
from saltern.core.tenants import Tenant, User
from tests.simulator.claims import Invariant, ViolationError
from tests.simulator.engine import Copy, Engine, Operation
from tests.simulator.server import Server
from tests.simulator.simulation import Simulation

SEEDS = 40
SEEDS_TO_CATCH = 300
"""Enough for the rarest of the bugs below, several times over."""

Plant = Callable[[pytest.MonkeyPatch], None]

PLANTED: list[tuple[Invariant, Plant]] = []


def test_honest_seeds_hold_all_invariants() -> None:
    for seed in range(SEEDS):
        Simulation(seed).run()


def test_one_seed_is_one_run() -> None:
    runs = [Simulation(7) for _ in range(2)]
    for simulation in runs:
        simulation.run()
    assert runs[0].events == runs[1].events > 100
    assert runs[0].world.steps == runs[1].world.steps
    assert runs[0].world.random.random() == runs[1].world.random.random()


def test_seeds_reach_every_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulator that never fills its arena or ends a session would hold any invariant."""
    reached: Counter[str] = Counter()
    send, handle = Server._send, Cache.handle

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

    def counting_handle(self: Cache, event: Event, now: float) -> list[object]:
        tally = self.tenant.tally
        before = (tally.evicted, tally.aborted, tally.discarded, tally.stored, tally.stored_after_evicting)
        effects = handle(self, event, now)
        after = (tally.evicted, tally.aborted, tally.discarded, tally.stored, tally.stored_after_evicting)
        for name, old, new in zip(("evicted", "aborted", "discarded", "stored", "own"), before, after, strict=True):
            reached[name] += new - old
        for session in self.sessions:
            for lease in session.lease_by_id.values():
                for block in lease.blocks:
                    reached["doomed and leased"] += block.state is BlockState.DOOMED
                    reached["in several runs"] += len(block.extent) > 1
        return list(effects)

    monkeypatch.setattr(Server, "_send", counting_send)
    monkeypatch.setattr(Cache, "handle", counting_handle)
    for seed in range(100):
        Simulation(seed).run()
    expected = {"Welcome", "Attached", "Refused", "SessionEnded", "LookedUp", "Acquired", "Reserved", "Stats", "hit"}
    expected |= {"evicted", "aborted", "discarded", "stored", "own", "doomed and leased", "in several runs"}
    expected |= {f"{refusal}" for refusal in Refusal}
    assert {name for name in expected if not reached[name]} == set()


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
    def ready_prefix(self: Cache, session: Session, user: UserId, keys: Sequence[Key]) -> list[Block]:
        blocks = []
        for key in keys:
            found = [owner.block_by_key[key] for owner in self.tenant.user_by_id.values() if key in owner.block_by_key]
            if not found or found[0].state is not BlockState.READY or session.state is not SessionState.OPEN:
                break
            blocks.append(found[0])
        return blocks

    monkeypatch.setattr(Cache, "_ready_prefix", ready_prefix)


@planted(Invariant.BYTES)
def extents_are_answered_from_the_first_block_on(monkeypatch: pytest.MonkeyPatch) -> None:
    acquire = Cache._acquire

    def acquire_from_0(self: Cache, session: Session, ask: Acquire) -> Acquired:
        answer = acquire(self, session, ask)
        prefix = self._ready_prefix(session, ask.user, ask.keys)
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
    def ready_prefix(self: Cache, session: Session, user: UserId, keys: Sequence[Key]) -> list[Block]:
        blocks = []
        for key in keys:
            block = self._linked(user, key)
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
    monkeypatch.setattr(Cache, "_discard", lambda self, session, user, key: None)


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
    monkeypatch.setattr(cache_module, "_exceeds", lambda pages, limit_pages: False)


@planted(Invariant.LIMITS)
def a_limit_is_rounded_up_to_whole_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    init = Tenant.__init__

    def init_rounded_up(self: Tenant, name: str, limits: object, *, page_bytes: int) -> None:
        init(self, name, limits, page_bytes=page_bytes)  # type: ignore[arg-type]
        if self.user_limit_pages is not None:
            self.user_limit_pages += 1

    monkeypatch.setattr(Tenant, "__init__", init_rounded_up)


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
    def forget(self: Tenant, user: User) -> None:
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
def a_parent_is_evicted_before_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    def childless_or_not(self: Block) -> Stamp | None:
        if self.state is not BlockState.READY or self.pins:
            return None
        return (self.touched_at, -self.depth, self.serial)

    monkeypatch.setattr(Block, "stamp", property(childless_or_not))


@planted(Invariant.ORDER)
def a_parent_that_lost_its_last_child_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    doom = Cache._doom

    def doom_silently(self: Cache, root: Block) -> int:
        offer, self._offer = self._offer, lambda block: None  # type: ignore[method-assign]
        try:
            return doom(self, root)
        finally:
            self._offer = offer  # type: ignore[method-assign]

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
    def offer_block_only(self: Cache, block: Block) -> None:
        if block.stamp is not None:
            block.user.order.offer(block)
            if block.user.order.first() is not block:
                self.tenant.order.offer(block.user)

    monkeypatch.setattr(Cache, "_offer", offer_block_only)


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

    def acquire_and_touch_less(self: Cache, session: Session, ask: Acquire) -> Acquired:
        prefix = self._ready_prefix(session, ask.user, ask.keys)[: ask.start]
        times = [block.touched_at for block in prefix]
        answer = acquire(self, session, ask)
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

    def make_room_anyhow(self: Cache, user: UserId, pages: int, stamp: Stamp) -> Refusal | int:
        made = make_room(self, user, pages, stamp)
        if made is Refusal.ALL_PINNED:
            for owner in list(self.tenant.user_by_id.values()):
                for block in list(owner.block_by_key.values()):
                    if block.state is BlockState.READY and block.children is None:
                        self._doom(block)
                        self.tenant.tally.evicted += 1
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

    def discard_from_the_parent(self: Cache, session: Session, user: UserId, key: Key) -> None:
        block = self._linked(user, key)
        discard(self, session, user, key if block is None or block.parent is None else block.parent.key)

    monkeypatch.setattr(Cache, "_discard", discard_from_the_parent)


@planted(Invariant.NEEDED)
def one_block_more_is_evicted_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    make_room = Cache._make_room

    def make_more_room(self: Cache, user: UserId, pages: int, stamp: Stamp) -> Refusal | int:
        made = make_room(self, user, pages, stamp)
        if made == 0 and (victim := self.tenant.first_victim()) is not None and (victim.stamp or stamp) < stamp:
            self._doom(victim)
            self.tenant.tally.evicted += 1
        return made

    monkeypatch.setattr(Cache, "_make_room", make_more_room)


@planted(Invariant.NEEDED)
def a_refusal_keeps_what_it_evicted_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    def free_and_count(self: Cache, victim: Block, parent: Block | None) -> None:
        self._free_if_unheld(victim)
        self.tenant.tally.evicted += 1

    monkeypatch.setattr(Cache, "_relink", free_and_count)


@planted(Invariant.REFUSALS)
def a_full_cache_refuses_instead_of_evicting(monkeypatch: pytest.MonkeyPatch) -> None:
    make_room = Cache._make_room

    def make_no_room(self: Cache, user: UserId, pages: int, stamp: Stamp) -> Refusal | int:
        return make_room(self, user, pages, stamp) if self.pool.free_pages >= pages else Refusal.ALL_PINNED

    monkeypatch.setattr(Cache, "_make_room", make_no_room)


@planted(Invariant.REFUSALS)
def a_user_at_its_limit_is_refused_although_it_has_old_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    make_room = Cache._make_room

    def make_little_room(self: Cache, user: UserId, pages: int, stamp: Stamp) -> Refusal | int:
        made = make_room(self, user, pages, stamp)
        return made if isinstance(made, Refusal) or not made else Refusal.NEXT_VICTIM

    monkeypatch.setattr(Cache, "_make_room", make_little_room)


# Blocks and leases


@planted(Invariant.PINS)
def a_release_forgets_to_unpin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache, "_release", lambda self, lease: None)


@planted(Invariant.PINS)
def a_lease_pins_only_its_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    acquire = Cache._acquire

    def acquire_and_unpin(self: Cache, session: Session, ask: Acquire) -> Acquired:
        answer = acquire(self, session, ask)
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

    def make_room_from_the_prefix(self: Cache, user: UserId, pages: int, stamp: Stamp) -> Refusal | int:
        made = make_room(self, user, pages, stamp)
        if made is Refusal.NEXT_VICTIM and last and last[0].stamp is not None:
            self._doom(last[0])
            self.tenant.tally.evicted += 1
            return make_room_from_the_prefix(self, user, pages, stamp)
        return made

    def reserve_and_remember(self: Cache, session: Session, ask: Reserve) -> Reserved:
        last[:] = [block for key in ask.keys if (block := self._linked(ask.user, key)) is not None][-1:]
        return reserve(self, session, ask)

    monkeypatch.setattr(Cache, "_make_room", make_room_from_the_prefix)
    monkeypatch.setattr(Cache, "_reserve", reserve_and_remember)


# Sessions and answers


@planted(Invariant.SESSIONS)
def an_ended_session_still_gives_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    def ready_prefix(self: Cache, session: Session, user: UserId, keys: Sequence[Key]) -> list[Block]:
        blocks = []
        for key in keys:
            block = self._linked(user, key)
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
        open_session(self, connection, SchedulerHello(hello.engine, hello.incarnation, first, hello.block_bytes))

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
        other = SchedulerHello(f"{next(names)}", hello.incarnation, hello.workers, hello.block_bytes)
        open_session(self, connection, other)

    monkeypatch.setattr(Cache, "_open_session", open_anyhow)


@planted(Invariant.ANSWERS)
def an_empty_lookup_is_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = Cache._serve

    def serve_hits(self: Cache, session: Session, connection: ConnectionId, message: Lookup) -> None:
        if type(message) is not Lookup or self._ready_prefix(session, message.user, message.keys):
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
        self.tenant.used_pages += 1
        try:
            return snapshot(self)
        finally:
            self.tenant.used_pages -= 1

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
