"""The cache: decides what is kept, for whom and where, as a pure function of events.

`handle(event, now)` changes the state and returns what the shell shall do; it never waits, reads a clock
or fails on a peer's account: a peer that breaks the protocol is closed, with the reason. `now` is in
seconds on any clock that doesn't go back.

Read `blocks` (the life of a block) and `leases` (the life of a session) first.
"""

from collections.abc import Sequence
from heapq import nlargest
from itertools import count

from saltern.core.blocks import Block, BlockState
from saltern.core.effects import Close, Disconnected, Effect, Event, Gone, Logged, Received, Send
from saltern.core.extents import PagePool
from saltern.core.keys import Key, UserId
from saltern.core.leases import ConnectionId, Lease, Lifeline, Session, SessionState
from saltern.core.messages import (
    Abort,
    Acquire,
    Acquired,
    Attached,
    Commit,
    Discard,
    GetStats,
    Grant,
    LeaseId,
    LookedUp,
    Lookup,
    Refusal,
    Refused,
    Release,
    Reply,
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
from saltern.core.snapshot import ArenaStats, Counts, SessionStats, Snapshot, TenantStats, UserStats
from saltern.core.tenants import DEFAULT_TENANT, NO_LIMITS, Limits, Tenant

USERS_SHOWN = 1_000
"""Most users in a snapshot, the largest first: ten thousand would still fit a frame, a million not."""


class ViolationError(Exception):
    """A peer asked for what the protocol doesn't allow; its connection is closed with this message."""


class Cache:
    """All state of the server.

    `pages` of `page_bytes` each make the arena. `naming_secret` (32 bytes) is handed to schedulers, who
    derive keys with it; the cache itself never uses it.
    """

    def __init__(self, *, pages: int, page_bytes: int, limits: Limits = NO_LIMITS, naming_secret: bytes = b"") -> None:
        self.page_bytes = page_bytes
        self.pool = PagePool(pages)
        self.tenant = Tenant(DEFAULT_TENANT, limits, page_bytes=page_bytes)
        self.session_by_control: dict[ConnectionId, Session] = {}
        self.sessions: list[Session] = []  # those that hold leases or may yet
        self.lifeline_by_connection: dict[ConnectionId, Lifeline] = {}
        self.lifeline_by_name: dict[bytes, Lifeline] = {}
        self._naming_secret = naming_secret
        self._serials = count(1)
        self._lease_ids = count(1)
        self._now = 0.0
        self._effects: list[Effect] = []

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at time `now` and return what shall be done about it, in order."""
        self._now = max(now, self._now)
        effects: list[Effect] = []
        self._effects = effects
        match event:
            case Received(connection, message):
                try:
                    self._receive(connection, message)
                except ViolationError as violation:
                    self._refuse(connection, str(violation))
            case Disconnected(connection):
                self._disconnect(connection)
            case Gone(connection):
                self._forget_lifeline(connection)
        return effects

    def snapshot(self) -> Snapshot:
        """Describe everything as of now; the cost is linear in the users, not in the blocks."""
        tenant, leases = self.tenant, [lease for session in self.sessions for lease in session.lease_by_id.values()]
        blocks = sum(len(user.block_by_key) for user in tenant.user_by_id.values())
        return Snapshot(
            arena=ArenaStats(
                total_bytes=self.pool.pages * self.page_bytes,
                used_bytes=(self.pool.pages - self.pool.free_pages) * self.page_bytes,
                page_bytes=self.page_bytes,
                blocks=blocks,
                pinned_blocks=len({id(block) for lease in leases if not lease.is_write for block in lease.blocks}),
                writing_blocks=sum(len(lease.blocks) for lease in leases if lease.is_write),
            ),
            tenants=(
                TenantStats(
                    tenant=tenant.name,
                    blocks=blocks,
                    used_bytes=tenant.used_pages * self.page_bytes,
                    limit_bytes=tenant.limits.limit_bytes,
                    user_limit_bytes=tenant.limits.user_limit_bytes,
                    counts=_counts(tenant),
                    users=tuple(
                        UserStats(
                            user=user.id.hex(),
                            blocks=len(user.block_by_key),
                            used_bytes=user.used_pages * self.page_bytes,
                        )
                        for user in nlargest(USERS_SHOWN, tenant.user_by_id.values(), key=lambda user: user.used_pages)
                    ),
                    users_total=len(tenant.user_by_id),
                ),
            ),
            sessions=tuple(
                SessionStats(
                    engine=session.engine,
                    state=session.state.value,
                    workers=len(session.workers),
                    block_bytes=session.block_bytes,
                    read_leases=sum(not lease.is_write for lease in session.lease_by_id.values()),
                    write_leases=sum(lease.is_write for lease in session.lease_by_id.values()),
                )
                for session in self.sessions
            ),
        )

    # Messages

    def _receive(self, connection: ConnectionId, message: Request) -> None:
        match message:
            case SchedulerHello():
                self._open_session(connection, message)
            case WorkerHello():
                self._open_lifeline(connection, message)
            case GetStats():
                self._send(connection, Stats(self.snapshot()))
            case _:
                session = self.session_by_control.get(connection)
                if session is None:
                    raise ViolationError(f"{type(message).__name__} on a connection without a session")
                self._serve(session, connection, message)

    def _serve(
        self,
        session: Session,
        connection: ConnectionId,
        message: Lookup | Acquire | Release | Reserve | Commit | Abort | Discard,
    ) -> None:
        match message:
            case Lookup(request, user, keys):
                self._send(connection, LookedUp(request, ready=len(self._ready_prefix(session, user, keys))))
            case Acquire():
                self._send(connection, self._acquire(session, message))
            case Reserve():
                self._send(connection, self._reserve(session, message))
            case Release(lease_id):
                self._release(_end_lease(session, lease_id, is_write=False))
            case Commit(lease_id):
                self._commit(session, _end_lease(session, lease_id, is_write=True))
            case Abort(lease_id):
                self._abort(session, _end_lease(session, lease_id, is_write=True))
            case Discard(user, key):
                self._discard(session, user, key)

    # Sessions

    def _open_session(self, connection: ConnectionId, hello: SchedulerHello) -> None:
        if connection in self.session_by_control or connection in self.lifeline_by_connection:
            raise ViolationError("a second hello on one connection")
        if any(session.engine == hello.engine for session in self.session_by_control.values()):
            self._refuse(connection, f"an engine with the id {hello.engine!r} is connected already")
            return
        if len(set(hello.workers)) != len(hello.workers):
            raise ViolationError("two workers of one engine have the same name")
        session = Session(
            engine=hello.engine,
            incarnation=hello.incarnation,
            control=connection,
            workers=hello.workers,
            block_bytes=hello.block_bytes,
        )
        self.session_by_control[connection] = session
        self.sessions.append(session)
        self._welcome(connection, naming_secret=self._naming_secret)
        self._attach(session)

    def _open_lifeline(self, connection: ConnectionId, hello: WorkerHello) -> None:
        if connection in self.session_by_control or connection in self.lifeline_by_connection:
            raise ViolationError("a second hello on one connection")
        for earlier in [old for old in self.lifeline_by_connection.values() if old.name == hello.name]:
            # A worker says hello anew only once it has drained. Waiting for its process would pin for as long as
            # the engine runs what one lost connection left behind, where a device may outlive its socket.
            self._disconnect(earlier.connection)
            self._forget_lifeline(earlier.connection)
        lifeline = Lifeline(connection, name=hello.name, rank=hello.rank, world_size=hello.world_size)
        self.lifeline_by_connection[connection] = lifeline
        self.lifeline_by_name[hello.name] = lifeline
        self._welcome(connection)
        for session in self.sessions:
            if session.state is SessionState.WAITING and hello.name in session.workers:
                self._attach(session)

    def _welcome(self, connection: ConnectionId, *, naming_secret: bytes | None = None) -> None:
        welcome = Welcome(
            arena_bytes=self.pool.pages * self.page_bytes,
            page_bytes=self.page_bytes,
            naming_secret=naming_secret or b"",
        )
        self._effects.append(Send(connection, welcome, with_arena=naming_secret is None))

    def _attach(self, session: Session) -> None:
        """Open a waiting session if all its lifelines are there, each at its rank and serving nobody else."""
        lifelines = [self.lifeline_by_name.get(name) for name in session.workers]
        present = [lifeline for lifeline in lifelines if lifeline is not None and lifeline.session is None]
        if len(present) < len(lifelines):
            return
        ranks = [(lifeline.rank, lifeline.world_size) for lifeline in present]
        if ranks != [(rank, len(present)) for rank in range(len(present))]:
            named = ", ".join(f"{rank} of {world_size}" for rank, world_size in ranks)
            self._end_session(session, f"its workers are not all its ranks in order: {named}")
            return
        session.state = SessionState.OPEN
        session.lifelines = present
        for lifeline in present:
            lifeline.session = session
            self._send(lifeline.connection, Attached(session.incarnation))
        assert session.control is not None, "a session waits without its control connection"
        self._send(session.control, Attached(session.incarnation))
        self._log("session-opened", session)

    def _disconnect(self, connection: ConnectionId) -> None:
        session = self.session_by_control.pop(connection, None)
        if session is not None:
            session.control = None
            self._end_session(session, "its scheduler's connection is gone")
            self._drop_if_unreachable(session)
        lifeline = self.lifeline_by_connection.get(connection)
        if lifeline is not None:
            if self.lifeline_by_name.get(lifeline.name) is lifeline:
                del self.lifeline_by_name[lifeline.name]
            if lifeline.session is not None:
                self._end_session(lifeline.session, f"the lifeline of rank {lifeline.rank} is gone")

    def _forget_lifeline(self, connection: ConnectionId) -> None:
        lifeline = self.lifeline_by_connection.pop(connection, None)
        if lifeline is not None and lifeline.session is not None:
            lifeline.session.lifelines.remove(lifeline)
            self._drop_if_unreachable(lifeline.session)

    def _end_session(self, session: Session, reason: str) -> None:
        if session.state is SessionState.ENDED:
            return
        session.state = SessionState.ENDED
        connected = [lifeline.connection for lifeline in session.lifelines]
        if session.control is not None:
            connected.append(session.control)
        for connection in connected:
            self._send(connection, SessionEnded(reason))
        self._log("session-ended", session, detail=reason)

    def _drop_if_unreachable(self, session: Session) -> None:
        """Let all leases fall once nothing is left that could touch what they hold."""
        if session.control is not None or session.lifelines:
            return
        self.sessions.remove(session)
        for lease in session.lease_by_id.values():
            if lease.is_write:
                self._abort(session, lease)
            else:
                self._release(lease)
        session.lease_by_id.clear()

    # The four verbs

    def _ready_prefix(self, session: Session, user_id: UserId, keys: Sequence[Key]) -> list[Block]:
        """Return the blocks of the longest READY prefix."""
        user = self.tenant.user_by_id.get(user_id)
        if user is None or session.state is not SessionState.OPEN:
            return []
        blocks = []
        for key in keys:
            block = user.block_by_key.get(key)
            if block is None or block.state is not BlockState.READY or block.length != session.block_bytes:
                break
            blocks.append(block)
        return blocks

    def _acquire(self, session: Session, ask: Acquire) -> Acquired:
        prefix = self._ready_prefix(session, ask.user, ask.keys)
        for block in prefix:
            block.touched_at = self._now
        tally = self.tenant.tally
        tally.acquires += 1
        tally.hit_blocks += len(prefix)
        tally.missed_blocks += len(ask.keys) - len(prefix)
        pinned = prefix[ask.start :]
        for block in pinned:
            block.pins += 1
        self._log("acquired", session, blocks=len(prefix), detail=f"of {len(ask.keys)}")
        return Acquired(
            request=ask.request,
            lease=self._lease(session, pinned, is_write=False),
            acquired_at=self._now,
            ready=len(prefix),
            extents=tuple(block.extent for block in pinned),
        )

    def _reserve(self, session: Session, ask: Reserve) -> Reserved:
        """Grant extents for missing blocks, from `start` on, until one is refused."""
        at = min(self._now, ask.acquired_at)  # in this order: NaN becomes now, and so does the time of a server before
        refusal = None if session.state is SessionState.OPEN else Refusal.NO_SESSION
        grants: list[Grant] = []
        written: list[Block] = []
        parent: Block | None = None
        index = 0
        while refusal is None and index < len(ask.keys):
            block = self._linked(ask.user, ask.keys[index])
            if block is None and index >= ask.start:
                granted = self._write(session, ask.user, ask.keys[index], parent=parent, at=at)
                if isinstance(granted, Refusal):
                    refusal = granted
                    break
                block = granted
                written.append(block)
                grants.append(Grant(index=index, extent=block.extent))
            elif block is None or block.length != session.block_bytes:
                refusal = Refusal.NO_PARENT
                break
            # The time of the Acquire, not of this message: a prefix stays at least as recent as what continues it.
            block.touched_at = max(block.touched_at, at)
            parent = block
            index += 1
        if refusal is not None:
            refusals = self.tenant.tally.refusals
            refusals[refusal.value] = refusals.get(refusal.value, 0) + 1
            self._log("refused", session, blocks=len(ask.keys) - index, detail=refusal.value)
        if written:
            self._log("reserved", session, blocks=len(written))
        return Reserved(
            request=ask.request,
            lease=self._lease(session, written, is_write=True),
            grants=tuple(grants),
            upto=index,
            refusal=refusal,
        )

    def _write(
        self, session: Session, user_id: UserId, key: Key, *, parent: Block | None, at: float
    ) -> Block | Refusal:
        """Make one block that its session may write, evicting what must go for it."""
        pages = -(-session.block_bytes // self.page_bytes)
        stamp = (at, -(parent.depth + 1) if parent else 0, next(self._serials))
        evicted = self._make_room(user_id, pages, stamp)
        if isinstance(evicted, Refusal):
            return evicted
        extent = self.pool.allocate(pages)
        assert extent is not None, "made room, and yet there is none"
        user = self.tenant.user(user_id)
        block = Block(
            user=user,
            key=key,
            parent=parent,
            extent=extent,
            length=session.block_bytes,
            touched_at=at,
            serial=stamp[2],
            evicted_for_it=evicted > 0,
        )
        user.block_by_key[key] = block
        user.used_pages += pages
        self.tenant.used_pages += pages
        return block

    def _make_room(self, user_id: UserId, pages: int, stamp: Stamp) -> Refusal | int:
        """Evict until `pages` more fit the user's limit, the tenant's and the arena; return how many blocks went.

        Victims are only unlinked until there are enough of them: a refusal puts them back.
        """
        victims: list[tuple[Block, Block | None]] = []  # with their parents
        refusal = self._choose_victims(user_id, pages, stamp, victims)
        if refusal is not None:
            for victim, parent in reversed(victims):
                self._relink(victim, parent)
            return refusal
        for victim, _ in victims:
            self._free_if_unheld(victim)
        self.tenant.tally.evicted += len(victims)
        return len(victims)

    def _choose_victims(
        self, user_id: UserId, pages: int, stamp: Stamp, victims: list[tuple[Block, Block | None]]
    ) -> Refusal | None:
        """Unlink blocks into `victims` until `pages` more would fit without them.

        Whoever is over a limit pays with its own oldest. A block with a smaller `stamp` than every victim
        would be the next to go, and is refused instead.
        """
        tenant, user = self.tenant, self.tenant.user_by_id.get(user_id)
        if _exceeds(pages, tenant.user_limit_pages) or _exceeds(pages, tenant.limit_pages):
            return Refusal.OVER_LIMIT
        if pages > self.pool.pages:
            return Refusal.NO_ROOM
        freed, freed_own = 0, 0  # pages, of all victims and of the user's
        while True:
            if user is not None and _exceeds(user.used_pages - freed_own + pages, tenant.user_limit_pages):
                victim = user.order.first()
            elif (
                _exceeds(tenant.used_pages - freed + pages, tenant.limit_pages) or self.pool.free_pages + freed < pages
            ):
                victim = tenant.first_victim()
            else:
                return None
            if victim is None:
                return Refusal.ALL_PINNED
            victim_stamp = victim.stamp
            assert victim_stamp is not None, "the first of an order may not be evicted"
            if victim_stamp > stamp:
                return Refusal.NEXT_VICTIM
            victims.append((victim, victim.parent))
            freed += victim.pages
            freed_own += victim.pages if victim.user is user else 0
            self._unlink(victim)

    def _commit(self, session: Session, lease: Lease) -> None:
        tally = self.tenant.tally
        stored = 0
        for block in lease.blocks:
            if block.state is BlockState.WRITING:
                block.state = BlockState.READY
                stored += 1
                tally.stored += not block.evicted_for_it
                tally.stored_after_evicting += block.evicted_for_it
            self._unpin(block)
        self._log("stored", session, blocks=stored)

    def _abort(self, session: Session, lease: Lease) -> None:
        for block in lease.blocks:
            if block.state is BlockState.WRITING:
                self._doom(block)
            self._unpin(block)
        self.tenant.tally.aborted += len(lease.blocks)
        self._log("aborted", session, blocks=len(lease.blocks))

    def _release(self, lease: Lease) -> None:
        for block in lease.blocks:
            self._unpin(block)

    def _discard(self, session: Session, user_id: UserId, key: Key) -> None:
        block = self._linked(user_id, key)
        if block is not None:
            doomed = self._doom(block)
            self.tenant.tally.discarded += doomed
            self._log("discarded", session, blocks=doomed)

    # Blocks

    def _linked(self, user_id: UserId, key: Key) -> Block | None:
        user = self.tenant.user_by_id.get(user_id)
        return user.block_by_key.get(key) if user is not None else None

    def _lease(self, session: Session, blocks: list[Block], *, is_write: bool) -> LeaseId:
        if not blocks:
            return 0
        lease_id = next(self._lease_ids)
        session.lease_by_id[lease_id] = Lease(blocks, is_write=is_write)
        return lease_id

    def _unpin(self, block: Block) -> None:
        assert block.pins > 0, "released a block nobody pinned"
        block.pins -= 1
        if block.state is BlockState.DOOMED:
            self._free_if_unheld(block)
        else:
            self._offer(block)

    def _doom(self, root: Block) -> int:
        """Unlink a block and all that continues it, free what nobody holds of them, and return how many."""
        doomed = self._unlink(root)
        for block in doomed:
            self._free_if_unheld(block)
        return len(doomed)

    def _unlink(self, root: Block) -> list[Block]:
        """Take a block and all that continues it out of their user's dictionary."""
        parent = root.parent
        doomed = list(root.with_descendants())
        for block in doomed:
            del block.user.block_by_key[block.key]
            block.user.order.withdraw(block)
            block.leave_parent()
            block.state = BlockState.DOOMED
        if parent is not None:
            self._offer(parent)  # it may be a leaf now
        return doomed

    def _relink(self, victim: Block, parent: Block | None) -> None:
        """Undo the unlinking of a leaf that nobody pins."""
        victim.state = BlockState.READY
        victim.user.block_by_key[victim.key] = victim
        victim.join_parent(parent)
        self._offer(victim)

    def _offer(self, block: Block) -> None:
        if block.stamp is not None:
            block.user.order.offer(block)
            self.tenant.order.offer(block.user)

    def _free_if_unheld(self, block: Block) -> None:
        if block.pins:
            return
        self.pool.free(block.extent)
        pages = block.pages
        self.tenant.used_pages -= pages
        block.user.used_pages -= pages
        self.tenant.forget_if_empty(block.user)

    # Effects

    def _send(self, connection: ConnectionId, message: Reply) -> None:
        self._effects.append(Send(connection, message))

    def _refuse(self, connection: ConnectionId, reason: str) -> None:
        self._effects += [Send(connection, Refused(reason)), Close(connection, reason=reason)]

    def _log(self, event: str, session: Session, *, blocks: int = 0, detail: str = "") -> None:
        self._effects.append(
            Logged(event, engine=session.engine, tenant=self.tenant.name, blocks=blocks, detail=detail)
        )


def _end_lease(session: Session, lease_id: LeaseId, *, is_write: bool) -> Lease:
    lease = session.lease_by_id.get(lease_id)
    if lease is None or lease.is_write != is_write:
        raise ViolationError(f"the session holds no {'write' if is_write else 'read'} lease {lease_id}")
    return session.lease_by_id.pop(lease_id)


def _exceeds(pages: int, limit_pages: int | None) -> bool:
    return limit_pages is not None and pages > limit_pages


def _counts(tenant: Tenant) -> Counts:
    tally = tenant.tally
    return Counts(
        acquires=tally.acquires,
        hit_blocks=tally.hit_blocks,
        missed_blocks=tally.missed_blocks,
        stored=tally.stored,
        stored_after_evicting=tally.stored_after_evicting,
        aborted=tally.aborted,
        evicted=tally.evicted,
        discarded=tally.discarded,
        **{f"refused_{reason.value.replace('-', '_')}": tally.refusals.get(reason.value, 0) for reason in Refusal},
    )
