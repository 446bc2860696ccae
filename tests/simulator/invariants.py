"""What must always hold, and what is checked after every event to see that it does.

The checker keeps books of its own from the messages alone (which keys were granted, published, discarded;
who is attached) and counts everything else from scratch: a field of the cache is never its own witness.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from saltern.core.blocks import Block, BlockState
from saltern.core.cache import LOADING_SHARE, Cache
from saltern.core.disk import StoredBlock
from saltern.core.effects import (
    Close,
    Disconnected,
    Effect,
    Erased,
    Event,
    ForgetRecords,
    Gone,
    OpId,
    ReadRecord,
    Received,
    RecordLost,
    RecordRead,
    RecordWritten,
    Send,
    TenantRemoved,
    TenantSet,
    Tick,
    WipePages,
    WriteRecord,
)
from saltern.core.extents import Extent
from saltern.core.keys import Key, UserId
from saltern.core.leases import SessionState
from saltern.core.loads import Load
from saltern.core.messages import (
    DEFAULT_TENANT,
    Abort,
    Acquire,
    Acquired,
    Attached,
    Commit,
    Discard,
    LeaseId,
    Loading,
    LookedUp,
    Lookup,
    Refusal,
    Refused,
    Reply,
    Reserve,
    Reserved,
    SchedulerHello,
    SessionEnded,
    Stats,
    Welcome,
    WorkerHello,
)
from saltern.core.tenants import NO_LIMITS, Limits
from tests.simulator.arena import Arena
from tests.simulator.claims import Invariant, violated
from tests.simulator.disk import DiskTier
from tests.simulator.erasures import Erasures
from tests.simulator.holdings import Holdings, over, stamp_of
from tests.simulator.isolation import Witness
from tests.simulator.records import Records

Name = tuple[UserId, Key]
"""What a block is called: by its user and its key."""


class Checker:
    """Watches one server from its start. `tier` is its disk, if it has one; `erasures` grows as it is told of some."""

    def __init__(
        self,
        cache: Cache,
        arena: Arena,
        tier: DiskTier | None,
        erasures: Erasures,
        *,
        tenants: Mapping[str, Limits],
        disk_tenants: Mapping[str, Limits],
        in_flight_max_bytes: int | None,
    ) -> None:
        self.settings = dict(tenants)
        self.disk_settings = dict(disk_tenants)
        self._in_flight_max_bytes = in_flight_max_bytes
        self._cache = cache
        self._arena = arena
        self._tier = tier
        self._erasures = erasures
        self._books = Books(arena, erasures)
        self._sessions = Sessions()
        self._answers = Answers()
        self._blocks: dict[int, Seen] = {}
        self.witness = Witness(tenants, cache.page_bytes)
        self._before = self._state()
        self._records = self._stored()

    def check(self, event: Event, effects: list[Effect], now: float) -> None:
        """Compare everything with how it should be after `event`."""
        match event:
            case TenantSet(name, limits, disk_limits):
                self.settings[name], self.disk_settings[name] = limits, disk_limits
            case TenantRemoved(name):
                self.settings.pop(name, None)
                self.disk_settings.pop(name, None)
            case Erased(tenant, user, for_good):
                self._erasures.add(tenant, user, at=now, told_at=now, for_good=for_good)
            case _:
                pass
        self._sessions.check(event, effects)
        late = self._answers.check(event, effects, self._sessions)
        self._books.check(event, effects, late)
        self._check_pieces(event, effects, late)
        self._check_state(event, effects, late, now)

    def check_restored(self, effects: list[Effect], now: float) -> None:
        """Check what a new server has of what the disk held, before anything else happens."""
        assert self._tier is not None, "only a disk has anything to restore"
        records, pages = self._stored(), self._cache.disk.pool.pages
        expected: dict[tuple[str, UserId], int] = {}
        for name, row in self._tier.platter.rows.items():
            owner = (name.tenant, name.user)
            if all(run.start + run.count <= pages for run in row.slot):
                expected[owner] = expected.get(owner, 0) + sum(run.count for run in row.slot)
                self._books.restore(name.user, name.key)
        if records.usage() != expected:
            violated(Invariant.RESTORED, f"{records.usage()} came back of {expected}")
        records.check(records, self._cache.due_at, now)
        records.check_work(effects)
        self._records = records

    def check_wiped(self) -> None:
        """Check, once effects are done, that nothing erased lies where it could be anybody's."""
        self._arena.check_wiped(self._before.erased_pages())

    def check_calm(self) -> None:
        """Check that nothing is held or awaited once everybody is alive and nobody asks for anything."""
        for session in self._cache.sessions:
            if session.state is not SessionState.OPEN:
                violated(Invariant.WAITS, f"the session of {session.engine} is {session.state.value} for ever")
            if session.lease_by_id:
                violated(Invariant.WAITS, f"{session.engine} holds leases {list(session.lease_by_id)} for ever")
            if session.waiting:
                violated(Invariant.WAITS, f"{session.engine} waits for the disk for ever")
        self._answers.check_calm()
        self._check_quiet()

    def check_drained(self) -> None:
        """Check that a server without engines holds nothing but READY blocks, and without those nothing at all."""
        cache = self._cache
        if cache.sessions or cache.session_by_control or cache.lifeline_by_connection or cache.lifeline_by_name:
            violated(Invariant.DRAINED, f"engines are gone, and yet there are sessions {cache.sessions}")
        self._check_quiet()
        for user in self._state().users:
            for block in user.block_by_key.values():
                if block.pins or block.state is not BlockState.READY:
                    violated(Invariant.DRAINED, f"engines are gone, and yet there is {block}")
        for tenant in list(cache.tenant_by_name.values()):
            while (victim := tenant.first_victim()) is not None:
                cache._doom(victim)
        free = list(cache.pool.free_runs())
        if [(run.start, run.count) for run in free] != [(0, cache.pool.pages)]:
            violated(Invariant.DRAINED, f"everything is evicted, and only {free} is free")
        for tenant in cache.tenant_by_name.values():
            if tenant.user_by_id or tenant.used_pages or tenant.held_pages:
                violated(Invariant.DRAINED, f"everything is evicted, and {tenant.user_by_id} remain")
        if set(cache.tenant_by_name) != {DEFAULT_TENANT, *self.settings}:
            violated(Invariant.FORGOTTEN, f"everything is evicted, and {list(cache.tenant_by_name)} are remembered")

    def _check_quiet(self) -> None:
        """Check that nothing is under way, and that another server would have the same of the disk as this one."""
        cache, records = self._cache, self._stored()
        if cache.loads.load_by_block or cache.loads.answerable:
            violated(Invariant.DRAINED, f"all is quiet, and {cache.loads.load_by_block or 'who waits'} remains")
        if cache._erasing or cache._to_wipe or cache.disk._erasing:
            violated(Invariant.DRAINED, "all is quiet, and an erased user remains")
        records.check_quiet(self._tier)
        if self._tier is not None:
            other = Cache(pages=1, page_bytes=1, disk_pages=cache.disk.pool.pages)
            other.restore(self._tier.platter.stored_records(0.0, 0.0), (), 0.0)
            usage = Records(other, {}).usage()
            if usage != records.usage():
                violated(Invariant.RESTORED, f"{usage} would come back of {records.usage()}")

    def _state(self) -> "State":
        return State(self._cache, self.settings, self._in_flight_max_bytes)

    def _stored(self) -> Records:
        return Records(self._cache, self.disk_settings)

    def _check_state(self, event: Event, effects: list[Effect], late: "list[Late]", now: float) -> None:
        cache, state = self._cache, self._state()
        state.check_blocks(now)
        state.check_pages()
        state.check_limits(self._before)
        state.check_held(self._before)
        state.check_touched(self._arena)
        with state.undisturbed():
            state.check_order()
            state.check_payers()
            state.check_due(cache.due_at, now)
        records = self._check_records(event, effects, now)
        self._check_vanished(event, state, now)
        self.witness.check(event, effects, state, now)
        for effect in effects:
            match event, effect:
                case Received(connection, Lookup() | Acquire() as ask), Send(to, LookedUp() | Acquired() as found):
                    if to == connection and found.request == ask.request:
                        self._check_found(connection, ask, found, state, now)
                case Received(connection, Acquire() as ask), Send(_, Loading()):
                    self._check_loading(connection, ask, state, now)
                case Received(connection, Reserve() as ask), Send(_, Reserved() as reserved):
                    is_still = not any(isinstance(other, WriteRecord) for other in effects)  # one pins what it writes
                    self._check_reserved(connection, ask, reserved, state, now, is_still=is_still)
                case _:
                    pass
        for position, answered in enumerate(late):
            is_first = position == 0 and isinstance(event, RecordRead)  # then what may be pinned is known exactly
            self._check_found(
                answered.connection, answered.ask, answered.answer, state, now, is_late=True, is_exact=is_first
            )
        self.witness.count_in_flight(state)
        if isinstance(event, Erased):
            self._arena.forget_leftovers(state.erased_pages())
        self._blocks = state.seen
        self._before = state
        self._records = records

    def _check_pieces(self, event: Event, effects: list[Effect], late: "list[Late]") -> None:
        """Who waited for the disk is answered, and what is erased wiped, a bounded piece at a time."""
        asked = sum(len(answered.ask.keys) for answered in late[:-1])  # the last one may ask for any number
        if asked >= (self._cache.answered_blocks_max if isinstance(event, Tick) else 1):
            violated(Invariant.PIECES, f"{len(late)} requests were answered at once")
        wiped = [run.count for effect in effects if isinstance(effect, WipePages) for run in effect.extent]
        match event:
            case Tick():
                last = [effect for effect in effects if isinstance(effect, WipePages)][-1:]
                pages = sum(wiped) - sum(run.count for effect in last for run in effect.extent)
                if pages and pages * self._cache.page_bytes >= self._cache.erased_bytes_max:
                    violated(Invariant.PIECES, f"{wiped} pages were wiped at once")
            case Received(message=Reserve() | Acquire()):
                pass  # for what is evicted
            case _ if wiped:
                violated(Invariant.PIECES, f"{wiped} pages were wiped at {event}")
            case _:
                pass

    def _check_records(self, event: Event, effects: list[Effect], now: float) -> Records:
        records = self._stored()
        if self._tier is not None:
            records.check(self._records, self._cache.due_at, now)
            records.check_work(effects)
            records.check_vanished(self._records, event, effects, now)
            records.check_named(self._tier, self._erasures)
        return records

    def _check_vanished(self, event: Event, state: "State", now: float) -> None:
        """Blocks go as unpinned leaves, by expiry or erasure, with a parent that was not written, or as bad ones."""
        gone = {
            name: seen
            for name, seen in self._blocks.items()
            if name not in state.seen and not (seen.block.user.is_erased and seen.state is BlockState.WRITING)
        }
        match event:
            case Received(message=Reserve() | Acquire() as ask):
                for seen in gone.values():
                    if self._is_expired(seen.block, now):
                        continue  # whoever reads it may read on
                    if seen.state is not BlockState.READY or seen.pins:
                        violated(Invariant.VICTIMS, f"{seen.block} was evicted with {seen.pins} pins")
                self._check_guarantees(ask, state, [seen.block for seen in gone.values()])
                self._check_needed(ask, state, [seen.block for seen in gone.values()], now)
            case Tick():
                for seen in gone.values():
                    user = seen.block.user
                    is_due = self._before.is_above_limits(user) or self._is_expired(seen.block, now)
                    if not user.is_erased and (seen.pins or not is_due):
                        violated(Invariant.VICTIMS, f"{seen.block} of {user.tenant.name} went at {now} for no reason")
            case Received(message=Abort() | WorkerHello()) | Disconnected() | Gone() | RecordLost() | RecordRead():
                for seen in gone.values():
                    if not any(above.state is BlockState.WRITING for above in self._lineage(seen)):
                        violated(Invariant.VICTIMS, f"{seen.block} fell with a session that wrote nothing above it")
            case Received(message=Discard(user=user_id, key=key)):
                for seen in gone.values():
                    lineage = [(above.block.user.id, above.block.key) for above in self._lineage(seen)]
                    if (user_id, key) not in lineage:
                        violated(Invariant.VICTIMS, f"{seen.block} fell with {key.hex()[:8]}, not its own")
            case _:
                if gone:
                    violated(Invariant.VICTIMS, f"{gone} fell for no reason")

    def _check_needed(self, ask: Acquire | Reserve, state: "State", gone: list[Block], now: float) -> None:
        """Nothing is evicted while there is room for what was granted, or is fetched."""
        cache, before, limits = self._cache, self._before, self.settings.get(ask.tenant, NO_LIMITS)
        if all(self._is_expired(block, now) for block in gone):
            return
        wanted = sum(seen.block.pages for name, seen in state.seen.items() if name not in self._blocks)
        used = before.used(ask.tenant, ask.user) + wanted
        short = over(used * cache.page_bytes, limits.user_limit_bytes)
        short = short or over((before.used(ask.tenant) + wanted) * cache.page_bytes, limits.limit_bytes)
        if not short and before.free_pages >= wanted:
            violated(Invariant.NEEDED, f"{gone} were evicted for {wanted} pages of {before.free_pages} free ones")

    def _is_expired(self, block: Block, now: float) -> bool:
        """Return whether a block, or what it continues, was used too long ago. Nothing that is written has expired."""
        ttl = self.settings.get(block.user.tenant.name, NO_LIMITS).ttl_seconds
        return ttl is not None and block.touched_at + ttl <= now

    def _check_guarantees(self, ask: Acquire | Reserve, state: "State", gone: list[Block]) -> None:
        """Of another tenant nothing goes below its guarantee, but for what the last block takes with it."""
        for name in {block.user.tenant.name for block in gone} - {ask.tenant}:
            last = max((block for block in gone if block.user.tenant.name == name), key=stamp_of)
            if state.used(name) + last.pages <= state.guarantee(name):
                violated(Invariant.GUARANTEES, f"{last} was taken from {name}, which has {state.used(name)} pages left")

    def _lineage(self, seen: "Seen") -> "list[Seen]":
        lineage = [seen]
        while (parent := lineage[-1].parent) is not None:
            lineage.append(self._blocks[id(parent)])
        return lineage

    def _check_found(
        self,
        connection: int,
        ask: Lookup | Acquire,
        answer: LookedUp | Acquired,
        state: "State",
        now: float,
        *,
        is_late: bool = False,
        is_exact: bool = True,
    ) -> None:
        """No prefix that is there is found shorter, and an Acquire makes what it found as recent as itself."""
        ready, found, coming = 0, list[Block](), list[Block | StoredBlock]()
        if self._sessions.is_open(connection):
            ready, found = state.longest(ask, self._sessions.hello(connection), now)
            coming = self._coming(connection, ask, found, state, now)
        if isinstance(answer, LookedUp) and coming:
            if answer.ready == ready + len(coming) or (ask.block_seconds and answer.ready == ready):
                return
            violated(Invariant.LOADS, f"{ask} was answered by {answer}, with {ready} READY and {coming} on their way")
        if isinstance(answer, Acquired) and isinstance(ask, Acquire):
            if self._sessions.is_open(connection):
                self.witness.acquired(ask, answer, ready, state, now)
            if coming and not is_late:
                self._check_not_fetched(connection, ask, found, coming, state, now)
            ready = self._pinnable(connection, ask, ready, found, state, now)
            if not is_exact and answer.ready <= ready:
                ready = answer.ready
        if answer.ready != ready:
            if answer.ready == state.longest(ask, self._sessions.hello(connection))[0]:
                violated(Invariant.EXPIRED, f"{ask} was answered by {answer} at {now}, and {ready} haven't expired")
            violated(Invariant.LONGEST, f"{ask} was answered by {answer}, and {ready} are there")
        if isinstance(answer, Acquired):
            for block in found:
                if block.touched_at < now:
                    violated(Invariant.RECENCY, f"{block} of {block.touched_at} was acquired at {now}")

    def _coming(
        self, connection: int, ask: Lookup | Acquire, found: list[Block], state: "State", now: float
    ) -> "list[Block | StoredBlock]":
        """Return what continues a prefix that was found and is on its way from the disk, or could be."""
        hello = self._sessions.hello(connection)
        coming: list[Block | StoredBlock] = []
        for key in ask.keys[len(found) :] if not hello.state_bytes else ():
            block = state.block(ask.tenant, ask.user, key)
            if block is None:
                record = self._records.find(ask.tenant, ask.user, key, length=hello.block_bytes, now=now)
                if record is None:
                    break
                coming.append(record)
            elif block in state.loading:
                coming.append(block)
            else:
                break
        return coming

    def _check_loading(self, connection: int, ask: Acquire, state: "State", now: float) -> None:
        """Only who asked for more than is READY is told to wait."""
        _, found = state.longest(ask, self._sessions.hello(connection), now)
        coming = self._coming(connection, ask, found, state, now)
        if not coming or coming[0] not in state.loading or len(found) + len(coming) <= ask.start:
            violated(Invariant.LOADS, f"{ask} waits for {coming}, with {len(found)} READY")

    def _check_not_fetched(
        self,
        connection: int,
        ask: Acquire,
        found: list[Block],
        coming: "list[Block | StoredBlock]",
        state: "State",
        now: float,
    ) -> None:
        """What is on the disk is fetched, unless it takes longer than to compute it, or there is no room."""
        if ask.block_seconds or len(found) + len(coming) <= ask.start:
            return
        limits, size = self.settings.get(ask.tenant, NO_LIMITS), self._cache.page_bytes
        pages = -(-self._sessions.hello(connection).block_bytes // size)
        parent = found[-1] if found else None
        never = over(pages * size, limits.limit_bytes) or over(pages * size, limits.user_limit_bytes)
        never = never or pages > state.pages
        held = over(pages + self._before.unpinned_pages(parent), self._before.may_hold(ask.tenant))
        never = never or _loaded_pages(self._cache) >= state.pages // LOADING_SHARE
        if coming[0] in state.loading or not (never or held or state.room_refused(ask, pages, (now, -len(found)))):
            violated(Invariant.LOADS, f"{ask} was answered without {coming}")

    def _pinnable(
        self, connection: int, ask: Acquire, ready: int, found: list[Block], state: "State", now: float
    ) -> int:
        """Return how much of what was found an Acquire may pin, one try a block."""
        pages_max = self._before.may_hold(ask.tenant)
        if pages_max is None or ready <= ask.start:
            return ready
        hello = self._sessions.hello(connection)
        for length in range(ready, 0, -1):
            pinned = found[:length]
            if ask.states:
                key = ask.states[length - 1]
                after = state.ready(ask, key, hello.state_bytes, parent=found[length - 1], now=now)
                if after is None:
                    continue
                pinned = [*pinned, after]
            pages = sum(block.pages for block in pinned if block not in self._before.pinned)
            if pages <= pages_max or length <= ask.start:  # that much the engine has itself
                return length
        return 0

    def _check_reserved(
        self, connection: int, ask: Reserve, answer: Reserved, state: "State", now: float, *, is_still: bool
    ) -> None:
        """A grant has its size, and a refusal its reason: one that shows, if pins are as when it was decided."""
        cache = self._cache
        session = cache.session_by_control[connection]
        hello = self._sessions.hello(connection)
        for grant in answer.grants:
            pages = -(-_length(ask, grant.index, hello) // cache.page_bytes)
            if sum(run.count for run in grant.extent) != pages:
                violated(Invariant.SIZES, f"{grant} of {ask} is not {pages} pages")
        is_erased = self._erasures.refuses(ask.user, ask.began_at)
        if is_erased and answer.refusal not in (Refusal.ERASED, Refusal.NO_SESSION):
            violated(Invariant.ERASED, f"{ask} was answered by {answer}")
        length = _length(ask, answer.upto, hello)
        pages = -(-length // cache.page_bytes)
        user = state.user(ask.tenant, ask.user)
        limits = self.settings.get(ask.tenant, NO_LIMITS)
        at = ask.acquired_at if ask.acquired_at < now else now
        parent = user.block_by_key.get(ask.keys[answer.upto - 1]) if user is not None and answer.upto else None
        justified = True
        match answer.refusal:
            case Refusal.OVER_LIMIT:
                size = pages * cache.page_bytes
                justified = over(size, limits.limit_bytes) or over(size, limits.user_limit_bytes)
            case Refusal.NO_ROOM:
                justified = pages > cache.pool.pages
            case Refusal.ERASED:
                justified = is_erased
            case Refusal.IN_FLIGHT | Refusal.ALL_PINNED | Refusal.NEXT_VICTIM if not is_still:
                pass
            case Refusal.IN_FLIGHT:
                justified = over(pages + state.unpinned_pages(parent), state.may_hold(ask.tenant))
            case Refusal.ALL_PINNED | Refusal.NEXT_VICTIM:
                state.check_promised(ask, answer, pages)
                state.check_conserved(ask, pages)
                justified = answer.refusal is state.room_refused(ask, pages, (at, -answer.upto))
            case Refusal.NO_PARENT:
                linked = user.block_by_key.get(ask.keys[answer.upto]) if user is not None else None
                justified = (linked is None and answer.upto < ask.start) or (
                    linked is not None and (linked.length != length or linked.parent is not parent)
                )
            case Refusal.NO_SESSION:
                justified = session.state is not SessionState.OPEN
            case None:
                justified = answer.upto == len(ask.keys)
        if not justified:
            violated(Invariant.REFUSALS, f"{ask} was answered by {answer}")
        self.witness.reserved(ask, answer, pages, state, now)


def _length(ask: Reserve, index: int, hello: SchedulerHello) -> int:
    """Return how long what is asked for at `index` is."""
    return hello.state_bytes if ask.ends_in_state and index == len(ask.keys) - 1 else hello.block_bytes


def _loads(cache: Cache) -> Iterable[Load]:
    """Return the loads that have not ended, or that somebody still waits for."""
    loading = dict.fromkeys(cache.loads.load_by_block.values())
    for waiting in chain(cache.loads.answerable, *(load.waiting for load in loading)):
        loading |= dict.fromkeys(waiting.loads)
    return loading


def _loaded_pages(cache: Cache) -> int:
    return sum(block.pages for load in _loads(cache) for block in load.blocks)


def _pinned(cache: Cache) -> Iterator[Block]:
    """Yield blocks as often as something pins them: leases, loads that are waited for, the disk, a wipe to come."""
    for session in cache.sessions:
        for lease in session.lease_by_id.values():
            yield from lease.blocks
    for load in _loads(cache):
        yield from load.blocks
    for _, block in cache.disk.writes.values():
        yield block
    yield from cache._to_wipe


class Seen:
    """A linked block as it was after the last event."""

    __slots__ = ("block", "parent", "pins", "state")

    def __init__(self, block: Block, pins: int) -> None:
        self.block = block
        self.parent = block.parent
        self.pins = pins
        self.state = block.state


class State(Holdings[Block]):
    """The cache's blocks, counted from scratch, as they are at one time."""

    def __init__(self, cache: Cache, settings: Mapping[str, Limits], in_flight_max_bytes: int | None) -> None:
        super().__init__(cache.shares, settings, pages=cache.pool.pages, page_bytes=cache.page_bytes)
        self._cache = cache
        self._linked: list[Block] = []
        self._block_by_name: dict[tuple[str, UserId, Key], Block] = {}
        self._pins_by_block: dict[Block, int] = {}  # see `_pinned`
        self._parents: set[Block] = set()
        self.free_pages = cache.pool.free_pages
        self.loading = set(cache.loads.load_by_block)
        if cache.loads.pages != _loaded_pages(cache):
            violated(
                Invariant.CHARGES, f"{cache.loads.pages} pages are said to be loaded, and {_loaded_pages(cache)} are"
            )
        for block in _pinned(cache):
            self._pins_by_block[block] = self._pins_by_block.get(block, 0) + 1
        leases = [lease for session in cache.sessions for lease in session.lease_by_id.values()]
        self._writers = [block.user.tenant for lease in leases if lease.is_write for block in lease.blocks]
        tenants = cache.tenant_by_name.values()
        self.users = [user for tenant in tenants for user in tenant.user_by_id.values()] + cache._erasing
        for user in self.users:
            for key, block in user.block_by_key.items():
                if block.key != key or block.user is not user:
                    violated(Invariant.REACHABLE, f"{block} is linked as {key.hex()[:8]} of {user.id.hex()}")
                self._linked.append(block)
                if not user.is_erased:
                    self._block_by_name[user.tenant.name, user.id, key] = block
                if block.parent is not None:
                    self._parents.add(block.parent)
        self.seen = {id(block): Seen(block, self._pins_by_block.get(block, 0)) for block in self._linked}
        # All blocks that hold pages: linked, or doomed and still pinned.
        self.held = self._linked + [block for block in self._pins_by_block if id(block) not in self.seen]
        self.pinned = {above for block in self._pins_by_block for above in _lineage(block)}
        for block in self.held:
            self.count(block.user, sum(run.count for run in block.extent))
        self.see(self._leaves(self._parents))
        guaranteed = sum(self.guarantee(name) for name in settings)
        self._held_pages_max = None if in_flight_max_bytes is None else in_flight_max_bytes // cache.page_bytes
        if guaranteed and self._held_pages_max is None:
            self._held_pages_max = cache.pool.pages - guaranteed

    # What each has

    def block(self, tenant: str, user: UserId, key: Key) -> Block | None:
        """Return a linked block."""
        return self._block_by_name.get((tenant, user, key))

    def erased_pages(self) -> set[int]:
        """Return the pages of blocks that erased users still have."""
        extents = [block.extent for block in self.held if block.user.is_erased]
        return {page for extent in extents for run in extent for page in range(run.start, run.start + run.count)}

    def pinned_pages(self, tenant: str) -> int:
        """Return how many of a tenant's pages can't be given back now."""
        return sum(block.pages for block in self.pinned if block.user.tenant.name == tenant)

    def unpinned_pages(self, block: Block | None) -> int:
        """Return how many pages would be pinned by a pin of this block."""
        return 0 if block is None else sum(above.pages for above in _lineage(block) if above not in self.pinned)

    def may_hold(self, tenant: str) -> int | None:
        """Return how many pages more a tenant may pin: what is left of its part, and of what is nobody's part."""
        if self._held_pages_max is None:
            return None
        names = {tenant, *self._settings, *(block.user.tenant.name for block in self.pinned)}
        part = {name: self._held_pages_max * self.guarantee(name) // self.pages for name in names}
        pinned = {name: self.pinned_pages(name) for name in names}
        spoken_for = sum(max(part[name], pinned[name]) for name in names)
        return max(part[tenant] - pinned[tenant], 0) + max(self._held_pages_max - spoken_for, 0)

    # What is found

    def longest(
        self, ask: Lookup | Acquire, hello: SchedulerHello, now: float | None = None
    ) -> tuple[int, list[Block]]:
        """Return how long the longest READY prefix of use to the asker is, and its blocks, its state among them.

        Without `now`, as if nothing ever expired.
        """
        blocks: list[Block] = []
        found: tuple[int, list[Block]] = (0, [])
        for index, key in enumerate(ask.keys):
            block = self.ready(ask, key, hello.block_bytes, parent=blocks[-1] if blocks else None, now=now)
            if block is None:
                break
            blocks.append(block)
            if not ask.states:
                found = (len(blocks), blocks)
                continue
            after = self.ready(ask, ask.states[index], hello.state_bytes, parent=block, now=now)
            if after is not None:
                found = (len(blocks), [*blocks, after])
        return found

    def ready(
        self, ask: Lookup | Acquire, key: Key, length: int, *, parent: Block | None, now: float | None
    ) -> Block | None:
        """Return what is READY under a key, and has not expired by `now`. An Acquire has made it young already."""
        block = self._block_by_name.get((ask.tenant, ask.user, key))
        if block is None or block.state is not BlockState.READY:
            return None
        ttl = self.limits(ask.tenant).ttl_seconds
        if now is not None and ttl is not None and block.touched_at + ttl <= now:
            return None
        return block if block.length == length and block.parent is parent else None

    # What goes next

    def evictable(self, *, without: frozenset[Block] = frozenset()) -> list[Block]:
        """Return all blocks that may be evicted, or could be if those `without` were gone."""
        if not without:
            return super().evictable()
        parents = {block.parent for block in self._linked if block.parent is not None and block not in without}
        return [block for block in self._leaves(parents) if block not in without]

    def _leaves(self, parents: set[Block]) -> list[Block]:
        return [
            block
            for block in self._linked
            if block.state is BlockState.READY and block not in self._pins_by_block and block not in parents
        ]

    def room_refused(self, ask: Acquire | Reserve, pages: int, newcomer: tuple[float, int]) -> Refusal | None:
        """Choose victims for `pages` more of a user by the rules, one scan each, and say why that fails, if it does."""
        gone: frozenset[Block] = frozenset()
        limits, size = self.limits(ask.tenant), self.page_bytes
        asker = self.user(ask.tenant, ask.user)
        while True:
            own = sum(block.pages for block in gone if block.user.tenant.name == ask.tenant)
            own_user = sum(block.pages for block in gone if block.user is asker)
            payer: str | None = ask.tenant
            victims = self.evictable(without=gone)
            used_by_user = self.used(ask.tenant, ask.user)
            if used_by_user and over((used_by_user - own_user + pages) * size, limits.user_limit_bytes):
                victims = [block for block in victims if block.user is asker]
            elif over((self.used(ask.tenant) - own + pages) * size, limits.limit_bytes):
                pass
            elif self.free_pages + sum(block.pages for block in gone) < pages:
                payer = self.payer(ask.tenant, pages, without=gone)
            else:
                return None
            victims = [block for block in victims if block.user.tenant.name == payer]
            if not victims:
                return Refusal.ALL_PINNED
            victim = min(victims, key=stamp_of)
            if payer == ask.tenant and stamp_of(victim)[:2] > newcomer:
                return Refusal.NEXT_VICTIM
            gone |= {victim}

    def is_owed(self, ask: Reserve, answer: Reserved, pages: int) -> bool:
        """Return whether `pages` were refused for want of room or pins that the tenant is promised whatever others do.

        Nothing is while more is pinned than there may be, as it was before somebody's guarantee was raised.
        """
        pinned = sum(block.pages for block in self.pinned)
        within = self.used(ask.tenant) + pages <= self.guarantee(ask.tenant)
        if self._held_pages_max is None or pinned > self._held_pages_max or not within:
            return False
        if self.limits(ask.tenant).user_limit_bytes is not None:
            return False
        match answer.refusal:
            case Refusal.ALL_PINNED | Refusal.NO_ROOM | Refusal.OVER_LIMIT | Refusal.NEXT_VICTIM:
                return True
            case Refusal.IN_FLIGHT:
                parent = self.block(ask.tenant, ask.user, ask.keys[answer.upto - 1]) if answer.upto else None
                part = self._held_pages_max * self.guarantee(ask.tenant) // self.pages
                return self.pinned_pages(ask.tenant) + pages + self.unpinned_pages(parent) <= part
            case _:
                return False

    def check_promised(self, ask: Reserve, answer: Reserved, pages: int) -> None:
        """A tenant that stays within its guarantee is not refused for want of room."""
        if self.is_owed(ask, answer, pages):
            violated(Invariant.PROMISED, f"{ask} was refused {pages} pages with {self.used(ask.tenant)} in use")

    def check_conserved(self, ask: Reserve, pages: int) -> None:
        """A page is refused only if none is free and nobody with more surplus has one that may go."""
        limits, size = self.limits(ask.tenant), self.page_bytes
        short = over((self.used(ask.tenant, ask.user) + pages) * size, limits.user_limit_bytes)
        if pages > 1 or short or over((self.used(ask.tenant) + pages) * size, limits.limit_bytes):
            return
        if self.free_pages or self.payer(ask.tenant, pages) not in (None, ask.tenant):
            violated(Invariant.CONSERVED, f"{ask} was refused a page with {self.free_pages} free")

    def check_blocks(self, now: float) -> None:
        """Check pins, links and the time of each block."""
        pinned_children: dict[Block, int] = {}
        for block in self.pinned:
            if block.parent is not None:
                pinned_children[block.parent] = pinned_children.get(block.parent, 0) + 1
        for block in self.held:
            pins = self._pins_by_block.get(block, 0) + pinned_children.get(block, 0)
            if block.pins != pins:
                violated(Invariant.PINS, f"{block} should have {pins}")
            if (block.state is BlockState.DOOMED) != (id(block) not in self.seen):
                violated(Invariant.REACHABLE, f"{block} is {'' if id(block) in self.seen else 'not '}linked")
        for block in self._linked:
            if block.touched_at > now:
                violated(Invariant.RECENCY, f"{block} was touched at {block.touched_at}, and it is {now}")
            if block.state is BlockState.WRITING and not block.pins and not block.user.is_erased:
                violated(Invariant.PINS, f"{block} is written by nobody")
            parent = block.parent
            if parent is None:
                if block.depth:
                    violated(Invariant.REACHABLE, f"{block} has no parent")
            elif id(parent) not in self.seen or parent.depth != block.depth - 1 or parent.user is not block.user:
                violated(Invariant.REACHABLE, f"the parent of {block} is {parent}, which isn't linked")
            elif parent.touched_at < block.touched_at:
                violated(Invariant.RECENCY, f"{block} of {block.touched_at} is younger than {parent.touched_at}")

    def check_pages(self) -> None:
        """Check that what is held and what is free tile the arena, and that the sums are right."""
        for block in self.held:
            if sum(run.count for run in block.extent) != -(-block.length // self.page_bytes):
                violated(Invariant.TILES, f"{block} of {block.length} bytes lies in {block.extent}")
        taken = [(run.start, run.count) for block in self.held for run in block.extent]
        free = [(run.start, run.count) for run in self._cache.pool.free_runs()]
        self.check_tiles(taken, free, self.free_pages)
        self.check_charges({DEFAULT_TENANT, *self._settings})

    def check_held(self, before: "State") -> None:
        """Check that pins are counted, and that no pins came where there may be none."""
        names = {*self._cache.tenant_by_name, *self._settings}
        for tenant in self._cache.tenant_by_name.values():
            if tenant.held_pages != self.pinned_pages(tenant.name):
                violated(Invariant.CHARGES, f"{tenant.held_pages} pages of {tenant.name} are said to be pinned")
            if tenant.leased_to_write != sum(owner is tenant for owner in self._writers):
                violated(Invariant.STATS, f"{tenant.leased_to_write} blocks of {tenant.name} are said to be written")
            if tenant.held_blocks != sum(block.user.tenant is tenant for block in self.pinned):
                violated(Invariant.STATS, f"{tenant.held_blocks} blocks of {tenant.name} are said to be pinned")
            for user in tenant.user_by_id.values():
                if user.held_pages != sum(block.pages for block in self.pinned if block.user is user):
                    violated(Invariant.STATS, f"{user.held_pages} pages of {user.id.hex()} are said to be pinned")
        if self._held_pages_max is None:
            return
        part = {name: self._held_pages_max * self.guarantee(name) // self.pages for name in names}
        spoken_for = sum(max(part[name], self.pinned_pages(name)) for name in names)
        for name in names:
            pinned = self.pinned_pages(name)
            if pinned > max(before.pinned_pages(name), part[name]) and spoken_for > self._held_pages_max:
                violated(Invariant.IN_FLIGHT, f"{name} pins {pinned} pages of {self._held_pages_max}, part {part}")

    def check_touched(self, arena: Arena) -> None:
        """Check that whatever a worker is copying is pinned, even if nobody has asked for its pages yet."""
        touched = arena.touched_pages()
        if touched:
            for block in self._pins_by_block:
                for run in block.extent:
                    touched.difference_update(range(run.start, run.start + run.count))
        if touched:
            violated(Invariant.QUIET, f"pages {touched} are being copied, and no lease holds them")


class Books:
    """What each key was promised to be, by the messages alone."""

    def __init__(self, arena: Arena, erasures: Erasures) -> None:
        self._arena = arena
        self._erasures = erasures
        self._stored: set[Name] = set()  # on the disk
        self._written_by_op: dict[OpId, Name | None] = {}
        self._read_by_op: dict[OpId, tuple[Name, Extent] | None] = {}
        self._extent_by_granted: dict[LeaseId, dict[Name, Extent]] = {}
        self._extent_by_published: dict[Name, Extent] = {}
        self._discarded: set[Name] = set()  # and not granted again

    def restore(self, user: UserId, key: Key) -> None:
        """Know what an earlier server has left on the disk."""
        self._stored.add((user, key))

    def check(self, event: Event, effects: list[Effect], late: "list[Late]") -> None:
        """Follow the books through one event, with the answers in it to what was asked before."""
        refused = isinstance(event, Received) and any(
            isinstance(effect, Close) and effect.connection == event.connection for effect in effects
        )
        match event:
            case Received(message=Commit(lease)) if not refused:
                for name, extent in self._extent_by_granted.pop(lease).items():
                    if name not in self._discarded:
                        self._extent_by_published[name] = extent
            case Received(message=Abort(lease)) if not refused:
                self._extent_by_granted.pop(lease)
            case Received(message=Discard(user=user, key=key)) if not refused:
                self._discarded.add((user, key))
                self._forget((user, key))
            case Received(message=Lookup() | Acquire() | Reserve() as ask):
                for effect in effects:
                    if isinstance(effect, Send) and effect.connection == event.connection:
                        self._check_answer(ask, effect.message)
            case Erased(tenant, user_id):
                for name in self._of_erased(tenant, user_id):
                    self._forget(name)
            case RecordWritten(op) if (written := self._written_by_op.pop(op)) is not None:
                self._stored.add(written)
            case RecordRead(op) if (read := self._read_by_op.pop(op)) is not None:
                self._extent_by_published[read[0]] = read[1]
            case RecordLost(op) if (read := self._read_by_op.pop(op)) is not None:
                self._stored.discard(read[0])
            case _:
                pass
        for answered in late:
            self._check_answer(answered.ask, answered.answer)
        for effect in effects:
            self._note_work(effect)

    def _note_work(self, effect: Effect) -> None:
        match effect:
            case WriteRecord(op, name, extent):
                self._arena.check_content(name.user, name.key, extent)
                self._written_by_op[op] = (name.user, name.key)
            case ReadRecord(op, name, extent):
                read = (name.user, name.key)
                if read in self._discarded or read not in self._stored:
                    violated(Invariant.DISCARDED, f"{effect} brings what is bad, or was never stored")
                self._extent_by_published.pop(read, None)
                self._read_for_nobody(read)
                self._read_by_op[op] = (read, extent)
            case ForgetRecords(names=names):
                self._stored.difference_update((name.user, name.key) for name in names)
            case _:
                pass

    def _forget(self, name: Name) -> None:
        """Expect a block nowhere any more, whatever is under way."""
        self._extent_by_published.pop(name, None)
        self._stored.discard(name)
        for granted in self._extent_by_granted.values():
            granted.pop(name, None)
        self._written_by_op = {op: None if other == name else other for op, other in self._written_by_op.items()}
        self._read_for_nobody(name)

    def _read_for_nobody(self, name: Name) -> None:
        """Expect nothing of a read under way: what it is for was doomed meanwhile."""
        self._read_by_op = {
            op: None if read is not None and read[0] == name else read for op, read in self._read_by_op.items()
        }

    def _of_erased(self, tenant: str, user: UserId | None) -> list[Name]:
        names = {name for granted in self._extent_by_granted.values() for name in granted}
        names |= {*self._extent_by_published, *self._stored}
        names |= {name for name in self._written_by_op.values() if name is not None}
        names |= {read[0] for read in self._read_by_op.values() if read is not None}
        users = self._erasures.users(tenant) if user is None else {user}
        return [name for name in names if name[0] in users]

    def _check_answer(self, ask: Lookup | Acquire | Reserve, answer: Reply) -> None:
        match ask, answer:
            case Lookup(), LookedUp(ready=ready):
                self._check_ends_in_state(ask, ready)
                self._check_served(ask.user, ask.keys[:ready], or_stored=True)
            case Acquire(), Acquired(ready=ready, extents=extents, lease=lease):
                self._check_ends_in_state(ask, ready)
                served = ask.keys[ask.start : ready]
                if served:
                    served += ask.states[ready - 1 : ready]
                if len(extents) != len(served) or bool(lease) != bool(extents):
                    violated(Invariant.BYTES, f"{ask} was answered by {answer}")
                for key, extent in zip(served, extents, strict=True):
                    self._arena.check_content(ask.user, key, extent)
                self._check_served(ask.user, ask.keys[:ready])
                for key, extent in zip(served, extents, strict=True):
                    if self._extent_by_published[ask.user, key] != extent:
                        violated(Invariant.BYTES, f"{key.hex()[:8]} was written to another extent than {extent}")
            case Reserve(), Reserved(lease=lease, grants=grants):
                granted: dict[Name, Extent] = {}
                for grant in grants:
                    name = (ask.user, ask.keys[grant.index])
                    for earlier in self._extent_by_granted.values():
                        earlier.pop(name, None)  # it was doomed meanwhile: its late commit publishes nothing
                    granted[name] = grant.extent
                    self._discarded.discard(name)
                    self._extent_by_published.pop(name, None)
                    self._read_for_nobody(name)
                    self._arena.check_quiet(grant.extent)
                if granted:
                    self._extent_by_granted[lease] = granted
            case _:
                pass

    def _check_ends_in_state(self, ask: Lookup | Acquire, ready: int) -> None:
        if ask.states and ready and (ask.user, ask.states[ready - 1]) not in self._extent_by_published:
            violated(Invariant.STATES, f"{ready} of {ask} were found, and the state after them was not published")

    def _check_served(self, user: UserId, keys: tuple[Key, ...], *, or_stored: bool = False) -> None:
        for key in keys:
            if (user, key) in self._discarded:
                violated(Invariant.DISCARDED, f"{key.hex()[:8]} was found again")
            if or_stored and (user, key) in self._stored:
                continue
            if (user, key) not in self._extent_by_published:
                violated(Invariant.UNFINISHED, f"{key.hex()[:8]} of {user.hex()} was served without a commit")


@dataclass(frozen=True)
class Late:
    """An answer to an Acquire that had to wait for the disk."""

    connection: int
    ask: Acquire
    answer: Acquired


class Answers:
    """Who waits for an answer, by the messages alone."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, int], Acquire] = {}  # by connection and request

    def check(self, event: Event, effects: list[Effect], sessions: "Sessions") -> list[Late]:
        """Check that each request is answered once, by Refused if its connection is closed; return what came late."""
        late: list[Late] = []
        answers: list[tuple[int, Reply]] = []
        for effect in effects:
            match effect:
                case Send(connection, Acquired(request) as answer) if (connection, request) in self._waiting:
                    late.append(Late(connection, self._waiting.pop((connection, request)), answer))
                case Send(connection, Loading(request) as loading):
                    answers.append((connection, loading))
                    if isinstance(event, Received) and isinstance(event.message, Acquire):
                        self._waiting[connection, request] = event.message
                case Send(connection, message):
                    answers.append((connection, message))
                case _:
                    pass
        match event:
            case Received(connection, Lookup() | Acquire() | Reserve() as ask):
                closed = any(isinstance(effect, Close) and effect.connection == connection for effect in effects)
                if closed == sessions.may_ask(connection, ask):
                    violated(Invariant.ANSWERS, f"{ask} was {'' if closed else 'not '}refused")
                _check_one_answer(connection, ask, answers, is_refused=closed)
            case Disconnected(connection):
                self._waiting = {asked: ask for asked, ask in self._waiting.items() if asked[0] != connection}
            case _ if any(isinstance(answer, LookedUp | Acquired | Reserved | Loading) for _, answer in answers):
                violated(Invariant.ANSWERS, f"nobody asked for {answers}")
            case _:
                pass
        return late

    def check_calm(self) -> None:
        """Check that nobody waits once all is quiet."""
        if self._waiting:
            violated(Invariant.WAITS, f"{list(self._waiting)} wait for the disk for ever")


def _check_one_answer(
    connection: int, ask: Lookup | Acquire | Reserve, answers: list[tuple[int, Reply]], *, is_refused: bool
) -> None:
    kinds: dict[type, tuple[type, ...]] = {Lookup: (LookedUp,), Acquire: (Acquired, Loading), Reserve: (Reserved,)}
    expected = (Refused,) if is_refused else kinds[type(ask)]
    if [to for to, _ in answers] != [connection] or type(answers[0][1]) not in expected:
        violated(Invariant.ANSWERS, f"{ask} was answered by {answers}")
    answer = answers[0][1]
    if isinstance(answer, LookedUp | Acquired | Reserved | Loading) and answer.request != ask.request:
        violated(Invariant.ANSWERS, f"{ask} was answered by {answer}")


class Sessions:
    """Who is attached to whom, by the messages alone."""

    def __init__(self) -> None:
        self._worker_by_connection: dict[int, WorkerHello] = {}
        self._hello_by_control: dict[int, SchedulerHello] = {}
        self._members_by_control: dict[int, set[int]] = {}
        self._ended: set[int] = set()  # controls of sessions that lost a member

    def check(self, event: Event, effects: list[Effect]) -> None:
        """Follow the sessions through one event."""
        sends = [effect for effect in effects if isinstance(effect, Send)]
        welcomed = any(isinstance(send.message, Welcome) for send in sends)
        match event:
            case Received(connection, SchedulerHello() as hello):
                if welcomed:
                    rivals = [c for c, other in self._hello_by_control.items() if other.engine == hello.engine]
                    if rivals:
                        violated(Invariant.UNIQUE, f"{hello.engine} is connected on {rivals} and {connection}")
                    self._hello_by_control[connection] = hello
            case Received(connection, WorkerHello() as worker) if welcomed:
                for earlier, other in list(self._worker_by_connection.items()):
                    if other.name == worker.name:
                        self._check_loss(earlier, sends)
                self._worker_by_connection[connection] = worker
            case Disconnected(connection):
                self._check_loss(connection, sends)
            case _:
                pass
        for send in sends:
            if isinstance(send.message, Acquired | Reserved) and send.message.lease:
                self._check_lease(send.connection)
        attached = {send.connection for send in sends if isinstance(send.message, Attached)}
        for control in attached & self._hello_by_control.keys():
            workers = [self._worker_by_connection.get(member) for member in attached - {control}]
            names = {worker.rank: worker.name for worker in workers if worker is not None}
            if [names.get(rank) for rank in range(len(workers))] != list(self._hello_by_control[control].workers):
                violated(Invariant.SESSIONS, f"{attached} make a session without all its workers")
            if any(attached & members - {control} for members in self._members_by_control.values()):
                violated(Invariant.SESSIONS, f"{attached} make a session with another's workers")
            self._members_by_control[control] = attached

    def hello(self, control: int) -> SchedulerHello:
        """Return what a session was opened with."""
        return self._hello_by_control[control]

    def may_ask(self, control: int, ask: Lookup | Acquire | Reserve) -> bool:
        """Return whether there is a session, and what is asked of states can be meant."""
        hello = self._hello_by_control.get(control)
        if hello is None:
            return False
        if isinstance(ask, Reserve):
            return not ask.ends_in_state or (hello.state_bytes > 0 and len(ask.keys) > 1)
        return not ask.states or (hello.state_bytes > 0 and len(ask.states) == len(ask.keys))

    def is_open(self, control: int) -> bool:
        """Return whether a session is attached and has lost nobody."""
        return control in self._members_by_control and control not in self._ended

    def _check_lease(self, control: int) -> None:
        if not self.is_open(control):
            violated(Invariant.SESSIONS, f"a lease was given on {control}, whose lifelines aren't all there")

    def _check_loss(self, connection: int, sends: list[Send]) -> None:
        for control, members in self._members_by_control.items():
            if connection not in members:
                continue
            told = {send.connection for send in sends if isinstance(send.message, SessionEnded)}
            if control not in self._ended and not members - {connection} <= told:
                violated(Invariant.WAITS, f"{members} lost {connection}, and only {told} were told")
            self._ended.add(control)
        self._hello_by_control.pop(connection, None)
        self._worker_by_connection.pop(connection, None)
        if connection in self._members_by_control:
            del self._members_by_control[connection]
            self._ended.discard(connection)


def check_stats(stats: Stats, page_bytes: int, *, is_erasing: bool) -> None:
    """Check that a snapshot agrees with itself: tenants are the sums of their users, and each tier that of its tenants.

    Users who are erased, and perhaps not gone yet, are in the sums alone.
    """
    arena, disk, tenants = stats.snapshot.arena, stats.snapshot.disk, stats.snapshot.tenants
    for tenant in tenants:
        used_bytes = sum(user.used_bytes for user in tenant.users)
        is_sum = used_bytes <= tenant.used_bytes if is_erasing else used_bytes == tenant.used_bytes
        is_sum = is_sum and sum(user.disk_blocks for user in tenant.users) == tenant.disk_blocks
        sizes = [(user.used_bytes, user.disk_used_bytes) for user in tenant.users]
        is_sum = is_sum and len(tenant.users) == tenant.users_total and sizes == sorted(sizes, reverse=True)
        if not is_sum or sum(user.blocks for user in tenant.users) != tenant.blocks:
            violated(Invariant.STATS, f"{tenant}")
    sums = sum(tenant.used_bytes for tenant in tenants), sum(tenant.blocks for tenant in tenants)
    if sums != (arena.used_bytes, arena.blocks):
        violated(Invariant.STATS, f"{stats}")
    if arena.used_bytes % page_bytes or arena.used_bytes > arena.total_bytes:
        violated(Invariant.STATS, f"{stats}")
    if disk is not None:
        sums = sum(tenant.disk_used_bytes for tenant in tenants), sum(tenant.disk_blocks for tenant in tenants)
        if not sums[0] <= disk.used_bytes <= disk.total_bytes or sums[1] != disk.blocks:
            violated(Invariant.STATS, f"{stats}")


def _lineage(block: Block) -> Iterator[Block]:
    """Yield a block and what it continues, up to the first."""
    above: Block | None = block
    while above is not None:
        yield above
        above = above.parent
