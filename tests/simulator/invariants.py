"""What must always hold, and what is checked after every event to see that it does.

The checker keeps books of its own from the messages alone (which keys were granted, published, discarded;
who is attached) and counts everything else from scratch: a field of the cache is never its own witness.
"""

from saltern.core.blocks import Block, BlockState
from saltern.core.cache import Cache
from saltern.core.effects import Close, Disconnected, Effect, Event, Gone, Received, Send
from saltern.core.extents import Extent
from saltern.core.keys import Key, UserId
from saltern.core.leases import SessionState
from saltern.core.messages import (
    Abort,
    Acquire,
    Acquired,
    Attached,
    Commit,
    Discard,
    LeaseId,
    LookedUp,
    Lookup,
    Refusal,
    Reply,
    Reserve,
    Reserved,
    SchedulerHello,
    SessionEnded,
    Stats,
    Welcome,
    WorkerHello,
)
from saltern.core.order import EvictionOrder, Stamp
from saltern.core.tenants import User
from tests.simulator.arena import Arena
from tests.simulator.claims import Invariant, violated

Name = tuple[UserId, Key]
"""What a block is called: by its user and its key."""


_ANSWER_BY_ASK: dict[type, type] = {Lookup: LookedUp, Acquire: Acquired, Reserve: Reserved}


class Checker:
    """Watches one server from its start."""

    def __init__(self, cache: Cache, arena: Arena) -> None:
        self._cache = cache
        self._arena = arena
        self._books = Books(arena)
        self._sessions = Sessions()
        self._blocks: dict[int, Seen] = {}
        self._used: tuple[dict[UserId, int], int, int] = ({}, 0, cache.pool.free_pages)
        self._evicted = 0

    def check(self, event: Event, effects: list[Effect], now: float) -> None:
        """Compare everything with how it should be after `event`."""
        self._sessions.check(event, effects)
        self._books.check(event, effects)
        self._check_answer(event, effects)
        self._check_state(event, effects, now)

    def check_calm(self) -> None:
        """Check that nothing is held or awaited once everybody is alive and nobody asks for anything."""
        for session in self._cache.sessions:
            if session.state is not SessionState.OPEN:
                violated(Invariant.WAITS, f"the session of {session.engine} is {session.state.value} for ever")
            if session.lease_by_id:
                violated(Invariant.WAITS, f"{session.engine} holds leases {list(session.lease_by_id)} for ever")

    def check_drained(self) -> None:
        """Check that a server without engines holds nothing but READY blocks, and without those nothing at all."""
        cache = self._cache
        if cache.sessions or cache.session_by_control or cache.lifeline_by_connection or cache.lifeline_by_name:
            violated(Invariant.DRAINED, f"engines are gone, and yet there are sessions {cache.sessions}")
        for user in cache.tenant.user_by_id.values():
            for block in user.block_by_key.values():
                if block.pins or block.state is not BlockState.READY:
                    violated(Invariant.DRAINED, f"engines are gone, and yet there is {block}")
        while (victim := cache.tenant.first_victim()) is not None:
            cache._doom(victim)
        free = list(cache.pool.free_runs())
        if [(run.start, run.count) for run in free] != [(0, cache.pool.pages)]:
            violated(Invariant.DRAINED, f"everything is evicted, and only {free} is free")
        if cache.tenant.user_by_id or cache.tenant.used_pages:
            violated(Invariant.DRAINED, f"everything is evicted, and {cache.tenant.user_by_id} remain")

    def _check_answer(self, event: Event, effects: list[Effect]) -> None:
        """Exactly one answer to each request, on its own connection, unless that is closed."""
        match event:
            case Received(connection, Lookup() | Acquire() | Reserve() as ask):
                kind = _ANSWER_BY_ASK[type(ask)]
                closed = any(isinstance(effect, Close) and effect.connection == connection for effect in effects)
                answers = [effect for effect in effects if isinstance(effect, Send)]
                if closed and not answers:
                    return
                if [(answer.connection, type(answer.message)) for answer in answers] != [(connection, kind)]:
                    violated(Invariant.ANSWERS, f"{ask} was answered by {answers}")
                answer = answers[0].message
                if isinstance(answer, LookedUp | Acquired | Reserved) and answer.request != ask.request:
                    violated(Invariant.ANSWERS, f"{ask} was answered by {answer}")

    def _check_state(self, event: Event, effects: list[Effect], now: float) -> None:
        cache, tenant = self._cache, self._cache.tenant
        state = State(cache)
        state.check_blocks(now)
        state.check_pages()
        state.check_limits()
        state.check_touched(self._arena)
        for user in tenant.user_by_id.values():
            _check_first(user.order, state.candidates(user), [user.order])
        _check_first_user(cache, state)
        evicted = tenant.tally.evicted - self._evicted
        self._check_vanished(event, state, evicted)
        if isinstance(event, Received) and isinstance(event.message, Reserve):
            for effect in effects:
                if isinstance(effect, Send) and isinstance(effect.message, Reserved):
                    self._check_reserved(event.connection, event.message, effect.message, state, evicted, now)
        self._blocks = state.seen
        self._used = ({user.id: user.used_pages for user in tenant.user_by_id.values()}, *state.totals)
        self._evicted = tenant.tally.evicted

    def _check_vanished(self, event: Event, state: "State", evicted: int) -> None:
        """Blocks go only by eviction (leaves that nobody pins), by an abort, or by a discard."""
        gone = {name: seen for name, seen in self._blocks.items() if name not in state.seen}
        match event:
            case Received(message=Reserve()):
                for seen in gone.values():
                    if seen.state is not BlockState.READY or seen.pins:
                        violated(Invariant.VICTIMS, f"{seen.block} was evicted with {seen.pins} pins")
                if len(gone) != evicted:
                    violated(Invariant.VICTIMS, f"{len(gone)} blocks are gone, {evicted} are counted as evicted")
            case Received(message=Abort() | WorkerHello()) | Disconnected() | Gone():
                for seen in gone.values():
                    if not any(above.state is BlockState.WRITING for above in self._lineage(seen)):
                        violated(Invariant.VICTIMS, f"{seen.block} fell with a session that wrote nothing above it")
            case Received(message=Discard(user, key)):
                for seen in gone.values():
                    if not any((above.block.user.id, above.block.key) == (user, key) for above in self._lineage(seen)):
                        violated(Invariant.VICTIMS, f"{seen.block} fell with {key.hex()[:8]}, not its own")
            case _:
                if gone:
                    violated(Invariant.VICTIMS, f"{gone} fell for no reason")

    def _lineage(self, seen: "Seen") -> "list[Seen]":
        lineage = [seen]
        while (parent := lineage[-1].parent) is not None:
            lineage.append(self._blocks[id(parent)])
        return lineage

    def _check_reserved(
        self, connection: int, ask: Reserve, answer: Reserved, state: "State", evicted: int, now: float
    ) -> None:
        """A refusal needs its reason, and so does every eviction."""
        cache, tenant = self._cache, self._cache.tenant
        session = cache.session_by_control[connection]
        pages = -(-session.block_bytes // cache.page_bytes)
        user = tenant.user_by_id.get(ask.user)
        at = ask.acquired_at if ask.acquired_at < now else now
        justified = True
        match answer.refusal:
            case Refusal.OVER_LIMIT:
                justified = _over(pages, tenant.limit_pages) or _over(pages, tenant.user_limit_pages)
            case Refusal.NO_ROOM:
                justified = pages > cache.pool.pages
            case Refusal.ALL_PINNED | Refusal.NEXT_VICTIM:
                justified = answer.refusal is _room_refused(cache, state, user, pages, (at, -answer.upto))
            case Refusal.NO_PARENT:
                linked = user.block_by_key.get(ask.keys[answer.upto]) if user is not None else None
                justified = (linked is None and answer.upto < ask.start) or (
                    linked is not None and linked.length != session.block_bytes
                )
            case Refusal.NO_SESSION:
                justified = session.state is not SessionState.OPEN
            case None:
                justified = answer.upto == len(ask.keys)
        if not justified:
            violated(Invariant.REFUSALS, f"{ask} was answered by {answer}")
        if evicted:
            used_by_user, used, free = self._used
            wanted = pages * len(answer.grants)
            short = _over(used_by_user.get(ask.user, 0) + wanted, tenant.user_limit_pages)
            if not (short or _over(used + wanted, tenant.limit_pages) or free < wanted):
                violated(Invariant.NEEDED, f"{evicted} blocks were evicted for {wanted} pages while {free} were free")


def _room_refused(
    cache: Cache, state: "State", user: User | None, pages: int, newcomer: tuple[float, int]
) -> Refusal | None:
    """Choose victims for `pages` more of a user by the rules, one scan each, and say why that fails, if it does."""
    tenant = cache.tenant
    gone: frozenset[Block] = frozenset()
    while True:
        freed = sum(block.pages for block in gone)
        freed_own = sum(block.pages for block in gone if block.user is user)
        over_user = user is not None and _over(user.used_pages - freed_own + pages, tenant.user_limit_pages)
        over_all = _over(tenant.used_pages - freed + pages, tenant.limit_pages)
        if not (over_user or over_all or cache.pool.free_pages + freed < pages):
            return None
        victims = state.evictable(user if over_user else None, without=gone)
        if not victims:
            return Refusal.ALL_PINNED
        victim = min(victims, key=_stamp)
        if _stamp(victim)[:2] > newcomer:
            return Refusal.NEXT_VICTIM
        gone |= {victim}


def _stamp(block: Block) -> Stamp:
    return (block.touched_at, -block.depth, block.serial)


class Seen:
    """A linked block as it was after the last event."""

    __slots__ = ("block", "parent", "pins", "state")

    def __init__(self, block: Block, pins: int) -> None:
        self.block = block
        self.parent = block.parent
        self.pins = pins
        self.state = block.state


class State:
    """The cache's blocks, counted from scratch."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._tenant = cache.tenant
        self._linked: list[Block] = []
        self._pins_by_block: dict[Block, int] = {}
        self._parents: set[Block] = set()
        for session in cache.sessions:
            for lease in session.lease_by_id.values():
                for block in lease.blocks:
                    self._pins_by_block[block] = self._pins_by_block.get(block, 0) + 1
        for user in self._tenant.user_by_id.values():
            for key, block in user.block_by_key.items():
                if block.key != key or block.user is not user:
                    violated(Invariant.REACHABLE, f"{block} is linked as {key.hex()[:8]} of {user.id.hex()}")
                self._linked.append(block)
                if block.parent is not None:
                    self._parents.add(block.parent)
        self.seen = {id(block): Seen(block, self._pins_by_block.get(block, 0)) for block in self._linked}
        self.totals = (self._tenant.used_pages, cache.pool.free_pages)

    @property
    def held(self) -> list[Block]:
        """Return all blocks that hold pages: linked, or doomed and still leased."""
        return self._linked + [block for block in self._pins_by_block if id(block) not in self.seen]

    def candidates(self, user: User | None = None) -> list[Stamp]:
        """Return the stamps of all blocks (of one user) that may be evicted: READY leaves that nobody pins."""
        return [_stamp(block) for block in self.evictable(user)]

    def evictable(self, user: User | None = None, *, without: frozenset[Block] = frozenset()) -> list[Block]:
        """Return all blocks (of one user) that may be evicted, or could be if those `without` were gone."""
        parents = self._parents
        if without:
            parents = {block.parent for block in self._linked if block.parent is not None and block not in without}
        return [
            block
            for block in self._linked
            if block.state is BlockState.READY
            and block not in self._pins_by_block
            and block not in parents
            and block not in without
            and (user is None or block.user is user)
        ]

    def check_blocks(self, now: float) -> None:
        """Check pins, links and the time of each block."""
        for block in self.held:
            pins = self._pins_by_block.get(block, 0)
            if block.pins != pins:
                violated(Invariant.PINS, f"{block} is in {pins} leases")
            if (block.state is BlockState.DOOMED) != (id(block) not in self.seen):
                violated(Invariant.REACHABLE, f"{block} is {'' if id(block) in self.seen else 'not '}linked")
        for block in self._linked:
            if block.touched_at > now:
                violated(Invariant.RECENCY, f"{block} was touched at {block.touched_at}, and it is {now}")
            if block.state is BlockState.WRITING and not block.pins:
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
        pool, tenant = self._cache.pool, self._tenant
        used_by_user: dict[User, int] = {}
        runs = [(run.start, run.count) for run in pool.free_runs()]
        free = sum(count for _, count in runs)
        for block in self.held:
            pages = sum(run.count for run in block.extent)
            used_by_user[block.user] = used_by_user.get(block.user, 0) + pages
            runs += [(run.start, run.count) for run in block.extent]
            if pages != -(-block.length // self._cache.page_bytes):
                violated(Invariant.TILES, f"{block} of {block.length} bytes lies in {block.extent}")
        position = 0
        for start, count in sorted(runs):
            if start != position or count <= 0:
                violated(Invariant.TILES, f"runs {sorted(runs)} don't tile the arena at page {position}")
            position += count
        if position != pool.pages or free != pool.free_pages:
            violated(Invariant.TILES, f"runs {sorted(runs)} with {free} free don't make {pool.pages} pages")
        for user in tenant.user_by_id.values():
            if user.used_pages != used_by_user.get(user, 0):
                violated(
                    Invariant.CHARGES, f"{user.id.hex()} is charged {user.used_pages}, not {used_by_user.get(user)}"
                )
            if user not in used_by_user:
                violated(Invariant.FORGOTTEN, f"{user.id.hex()} is remembered without a page")
        for user in used_by_user:
            if tenant.user_by_id.get(user.id) is not user:
                violated(Invariant.CHARGES, f"{user.id.hex()} has pages and is not known")
        if tenant.used_pages != sum(used_by_user.values()):
            violated(Invariant.CHARGES, f"the tenant is charged {tenant.used_pages} for {used_by_user}")
        if len(tenant.order._stamp_by_id) > len(tenant.user_by_id):
            violated(Invariant.FORGOTTEN, "a user without a page stands in the order of users")

    def check_limits(self) -> None:
        """Check the limits against bytes counted from the blocks."""
        limits, page_bytes = self._tenant.limits, self._cache.page_bytes
        used_by_user: dict[UserId, int] = {}
        for block in self.held:
            pages = sum(run.count for run in block.extent)
            used_by_user[block.user.id] = used_by_user.get(block.user.id, 0) + pages * page_bytes
        if _over(sum(used_by_user.values()), limits.limit_bytes):
            violated(Invariant.LIMITS, f"the tenant holds {used_by_user} of {limits}")
        for user, used in used_by_user.items():
            if _over(used, limits.user_limit_bytes):
                violated(Invariant.LIMITS, f"{user.hex()} holds {used} of {limits}")

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

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._extent_by_granted: dict[LeaseId, dict[Name, Extent]] = {}
        self._extent_by_published: dict[Name, Extent] = {}
        self._discarded: set[Name] = set()  # and not granted again

    def check(self, event: Event, effects: list[Effect]) -> None:
        """Follow the books through one event."""
        if not isinstance(event, Received):
            return
        refused = any(isinstance(effect, Close) and effect.connection == event.connection for effect in effects)
        match event.message:
            case Commit(lease) if not refused:
                for name, extent in self._extent_by_granted.pop(lease).items():
                    if name not in self._discarded:
                        self._extent_by_published[name] = extent
            case Abort(lease) if not refused:
                self._extent_by_granted.pop(lease)
            case Discard(user, key) if not refused:
                self._discarded.add((user, key))
                self._extent_by_published.pop((user, key), None)
                for granted in self._extent_by_granted.values():
                    granted.pop((user, key), None)
            case Lookup() | Acquire() | Reserve() as ask:
                for effect in effects:
                    if isinstance(effect, Send):
                        self._check_answer(ask, effect.message)
            case _:
                pass

    def _check_answer(self, ask: Lookup | Acquire | Reserve, answer: Reply) -> None:
        match ask, answer:
            case Lookup(), LookedUp(ready=ready):
                self._check_served(ask.user, ask.keys[:ready])
            case Acquire(), Acquired(ready=ready, extents=extents, lease=lease):
                served = ask.keys[ask.start : ready]
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
                    self._arena.check_quiet(grant.extent)
                if granted:
                    self._extent_by_granted[lease] = granted
            case _:
                pass

    def _check_served(self, user: UserId, keys: tuple[Key, ...]) -> None:
        for key in keys:
            if (user, key) in self._discarded:
                violated(Invariant.DISCARDED, f"{key.hex()[:8]} was found again")
            if (user, key) not in self._extent_by_published:
                violated(Invariant.UNFINISHED, f"{key.hex()[:8]} of {user.hex()} was served without a commit")


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
        match event:
            case Received(connection, SchedulerHello() as hello):
                if any(isinstance(send.message, Welcome) for send in sends):
                    rivals = [c for c, other in self._hello_by_control.items() if other.engine == hello.engine]
                    if rivals:
                        violated(Invariant.UNIQUE, f"{hello.engine} is connected on {rivals} and {connection}")
                    self._hello_by_control[connection] = hello
            case Received(connection, WorkerHello() as worker):
                for earlier, other in list(self._worker_by_connection.items()):
                    if other.name == worker.name:
                        self._check_loss(earlier, sends)
                self._worker_by_connection[connection] = worker
            case Received(connection, Acquire() | Reserve()):
                for send in sends:
                    if isinstance(send.message, Acquired | Reserved) and send.message.lease:
                        self._check_lease(connection)
            case Disconnected(connection):
                self._check_loss(connection, sends)
            case _:
                pass
        attached = {send.connection for send in sends if isinstance(send.message, Attached)}
        for control in attached & self._hello_by_control.keys():
            workers = [self._worker_by_connection.get(member) for member in attached - {control}]
            names = {worker.rank: worker.name for worker in workers if worker is not None}
            if [names.get(rank) for rank in range(len(workers))] != list(self._hello_by_control[control].workers):
                violated(Invariant.SESSIONS, f"{attached} make a session without all its workers")
            if any(attached & members - {control} for members in self._members_by_control.values()):
                violated(Invariant.SESSIONS, f"{attached} make a session with another's workers")
            self._members_by_control[control] = attached

    def _check_lease(self, control: int) -> None:
        if control not in self._members_by_control or control in self._ended:
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


def check_stats(stats: Stats, page_bytes: int) -> None:
    """Check that a snapshot agrees with itself."""
    arena, (tenant,) = stats.snapshot.arena, stats.snapshot.tenants
    sums = sum(user.used_bytes for user in tenant.users), sum(user.blocks for user in tenant.users)
    if sums != (arena.used_bytes, arena.blocks) or arena.used_bytes != tenant.used_bytes:
        violated(Invariant.STATS, f"{stats}")
    if arena.used_bytes % page_bytes or arena.used_bytes > arena.total_bytes:
        violated(Invariant.STATS, f"{stats}")


def _over(used: int, limit: int | None) -> bool:
    return limit is not None and used > limit


def _check_first(order: "EvictionOrder[Block]", candidates: list[Stamp], touched: "list[EvictionOrder[Block]]") -> None:
    """Compare the order's idea of who goes first with a scan, leaving its heap as lazy as it was."""
    saved = [(order, list(order._heap), dict(order._stamp_by_id), order._pushes) for order in touched]
    first = order.first()
    stamp = None if first is None else (first.touched_at, -first.depth, first.serial)
    if stamp != min(candidates, default=None):
        violated(Invariant.ORDER, f"{first} goes first, and the oldest is {min(candidates, default=None)}")
    for kept, heap, stamp_by_id, pushes in saved:
        kept._heap, kept._stamp_by_id, kept._pushes = heap, stamp_by_id, pushes


def _check_first_user(cache: Cache, state: State) -> None:
    """As `_check_first`, for the tenant's order of users, which looks into theirs."""
    users = cache.tenant.order
    saved = (list(users._heap), dict(users._stamp_by_id), users._pushes)
    orders = [user.order for user in cache.tenant.user_by_id.values()]
    kept = [(order, list(order._heap), dict(order._stamp_by_id), order._pushes) for order in orders]
    first = cache.tenant.first_victim()
    stamp = None if first is None else (first.touched_at, -first.depth, first.serial)
    expected = min(state.candidates(), default=None)
    if stamp != expected:
        violated(Invariant.ORDER, f"{first} goes first of all, and the oldest is {expected}")
    users._heap, users._stamp_by_id, users._pushes = saved
    for order, heap, stamp_by_id, pushes in kept:
        order._heap, order._stamp_by_id, order._pushes = heap, stamp_by_id, pushes
