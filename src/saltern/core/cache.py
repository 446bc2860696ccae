"""The cache: decides what is kept, for whom and where, as a pure function of events.

`handle(event, now)` changes the state and returns what the shell shall do; it never waits, reads a clock
or fails on a peer's account: a peer that breaks the protocol is closed, with the reason. `now` is in
seconds on any clock that doesn't go back.

Read `blocks` (the life of a block) and `leases` (the life of a session) first.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping
from itertools import count
from math import inf

from saltern.core.blocks import Block, BlockState
from saltern.core.census import Census
from saltern.core.describe import describe, describe_erasable, describe_publications
from saltern.core.disk import Disk, StoredBlock, is_on_disk
from saltern.core.effects import (
    Close,
    Disconnected,
    Effect,
    Erased,
    Event,
    Gone,
    KeepPublication,
    Logged,
    Loss,
    OpId,
    PublicationAdded,
    PublicationRemoved,
    Received,
    RecordLost,
    RecordNotWritten,
    RecordRead,
    RecordsForgotten,
    RecordWritten,
    SecretsRotated,
    Send,
    StoredPublication,
    StoredRecord,
    TenantRemoved,
    TenantSet,
    Tick,
    WipePages,
)
from saltern.core.extents import PagePool
from saltern.core.keys import Key, UserId
from saltern.core.leases import ConnectionId, Lease, Lifeline, Session, SessionState
from saltern.core.loads import Load, Loads
from saltern.core.messages import (
    DEFAULT_TENANT,
    PUBLIC_TENANT,
    PUBLIC_USER,
    Abort,
    Acquire,
    Acquired,
    Attached,
    Commit,
    Discard,
    GetStats,
    Grant,
    LeaseId,
    Loading,
    LookedUp,
    Lookup,
    NamespaceChanged,
    PublicationId,
    PublicDepth,
    Refusal,
    Refused,
    Release,
    Reply,
    Request,
    Reserve,
    Reserved,
    SchedulerHello,
    SessionEnded,
    SigningSecrets,
    Stats,
    Welcome,
    WorkerHello,
)
from saltern.core.order import Stamp
from saltern.core.prefix import Prefix
from saltern.core.publications import Publication
from saltern.core.shares import Shares
from saltern.core.snapshot import ErasedStats, PublicationStats, Snapshot
from saltern.core.tenants import Limits, Tenant, User, exceeds

LEASED_BLOCKS_MAX = 1_048_576
"""Most blocks in all leases of one session, counted once a lease: 16 million tokens in blocks of 16, more than an
engine has room for. One that never gives its leases back must not fill the server's memory with them."""

ERASE_BYTES = 4 * 1024 * 1024
"""What one `Tick` overwrites with zeros of what erased users had: half a millisecond. A larger block goes alone."""

TICK_BLOCKS = 64
"""Most blocks that one `Tick` lets go: half a millisecond, so that it holds up nobody's lookup."""

LOADING_SHARE = 2
"""Loads may take one in so many pages of the arena: a disk that hangs must leave room for what engines store."""

ANSWERED_BLOCKS = 1024
"""How much is asked for by the requests that one `Tick` answers, of those that waited for the disk: half a millisecond.

One that asks for more is answered alone."""

NO_TENANTS: Mapping[str, Limits] = {}


class ViolationError(Exception):
    """A peer asked for what the protocol doesn't allow; its connection is closed with this message."""


class Cache:
    """All state of the server.

    `pages` of `page_bytes` each make the arena, `disk_pages` of 4 KiB the disk tier, if there is one. `tenants` are the
    configured ones, `disk_tenants` says the same of the disk; `in_flight_max_bytes` bounds what may be pinned at one
    time (see `shares`). `naming_secret` (32 bytes) and `signing_secrets` are handed to schedulers, who derive keys and
    verify salts with them; the cache itself never uses them. Raises `ValueError` if the guarantees can't be kept.
    """

    def __init__(
        self,
        *,
        pages: int,
        page_bytes: int,
        tenants: Mapping[str, Limits] = NO_TENANTS,
        in_flight_max_bytes: int | None = None,
        disk_pages: int = 0,
        disk_tenants: Mapping[str, Limits] = NO_TENANTS,
        naming_secret: bytes = b"",
        signing_secrets: tuple[bytes, ...] = (),
    ) -> None:
        self.page_bytes = page_bytes
        self.pool = PagePool(pages)
        self.census = Census()
        self.shares: Shares[Block] = Shares(
            tenants,
            pages=pages,
            page_bytes=page_bytes,
            in_flight_max_pages=None if in_flight_max_bytes is None else in_flight_max_bytes // page_bytes,
            census=self.census,
        )
        self.disk = Disk(disk_pages, disk_tenants, self.census)
        self.loads = Loads()
        self.answered_blocks_max = ANSWERED_BLOCKS
        self.session_by_control: dict[ConnectionId, Session] = {}
        self.sessions: list[Session] = []  # those that hold leases or may yet
        self.lifeline_by_connection: dict[ConnectionId, Lifeline] = {}
        self.lifeline_by_name: dict[bytes, Lifeline] = {}
        self.publication_by_id: dict[PublicationId, Publication] = {}
        self._naming_secret = naming_secret
        self._signing_secrets = signing_secrets
        self.erased_bytes_max = ERASE_BYTES
        self._erasing: list[User[Block]] = []
        self._to_wipe: deque[Block] = deque()  # of erased users; charged for and pinned until they are wiped
        self._wiped_pages = 0  # by this `Tick`
        self._erased_at: dict[tuple[str, UserId | None], float] = {}
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
            case PublicationAdded(id_, root, blocks, label):
                self.publication_by_id[id_] = Publication(id_, root=root, blocks=blocks, label=label)
                self._tell_depths()
            case PublicationRemoved(id_):
                self._unpublish(id_)
            case TenantSet(name, limits, disk_limits):
                self.shares.set_limits(name, limits)
                self.disk.shares.set_limits(name, disk_limits)
            case TenantRemoved(name):
                self.shares.set_limits(name, None)
                self.disk.shares.set_limits(name, None)
            case RecordWritten(op) | RecordNotWritten(op):
                self._end_write(op, is_written=isinstance(event, RecordWritten))
            case RecordRead(op, seconds):
                self._end_read(op, seconds=seconds)
            case RecordLost(op, loss):
                self._end_read(op, seconds=None, loss=loss)
            case RecordsForgotten(op):
                self.disk.end_forgetting(op)
            case Erased(tenant, user, for_good):
                self._erase(tenant, user, for_good=for_good)
            case Tick():
                self._tick()
            case SecretsRotated(secrets):
                self._signing_secrets = secrets
                for control in self.session_by_control:
                    self._effects.append(Send(control, SigningSecrets(secrets)))
        self._work()
        return effects

    def restore(
        self,
        records: Iterable[StoredRecord],
        erased: Iterable[tuple[str, UserId | None, bool]],
        now: float,
        publications: Iterable[StoredPublication] = (),
    ) -> list[Effect]:
        """Know what an earlier server has left on the disk, before anything else happens.

        `erased` names whom it has erased, and whether for good: nothing that began before now is stored for them. What
        is published is brought into memory, for it is found nowhere else.
        """
        for tenant, user, for_good in erased:
            self._erased_at[tenant, user] = inf if for_good else now
        self._now = now
        for stored in publications:
            self.publication_by_id[stored.id] = Publication(
                stored.id, root=stored.root, blocks=stored.blocks, label=stored.label, keys=stored.keys
            )
        self.disk.restore(records, {key for each in self.publication_by_id.values() for key in each.keys})
        self._effects = []
        for publication in self.publication_by_id.values():
            self._bring_back(publication)
        self._work()
        return self._effects

    def check_tenants(
        self, limits_by_name: Mapping[str, Limits], disk_limits_by_name: Mapping[str, Limits] = NO_TENANTS
    ) -> str | None:
        """Return why these can't be the limits of all tenants, for a person, or None if they can."""
        return self.shares.why_not(limits_by_name) or self.disk.shares.why_not(disk_limits_by_name)

    def erasable(self, tenant: str, user: UserId | None) -> ErasedStats:
        """Say what a user holds in all tiers, or with None all users of a tenant."""
        return describe_erasable(self, tenant, user)

    def is_erased_for_good(self, tenant: str, user: UserId) -> bool:
        """Return whether nothing is ever stored for a user again."""
        return self._erased_at.get((tenant, user)) == inf

    @property
    def last_op(self) -> OpId:
        """Return the id of what was last asked of the disk."""
        return self.disk.last_op

    @property
    def tenant_by_name(self) -> dict[str, Tenant[Block]]:
        """Return all tenants that are configured or hold something."""
        return self.shares.tenant_by_name

    @property
    def default_tenant(self) -> Tenant[Block]:
        """Return who is charged for users that nobody signed for."""
        return self.shares.tenant_by_name[DEFAULT_TENANT]

    @property
    def due_at(self) -> float | None:
        """Return when the shell shall send a `Tick`; None is never."""
        if self._erasing or self._to_wipe or self.loads.answerable:
            return self._now
        times = [due_at for due_at in (self.shares.due_at, self.disk.due_at) if due_at is not None]
        return max(min(times), self._now) if times else None

    def snapshot(self) -> Snapshot:
        """Describe everything as of now; the cost is linear in the tenants, not in their users or blocks."""
        return describe(self)

    def publications(self) -> tuple[PublicationStats, ...]:
        """Describe what is published, the oldest first; the cost is linear in its blocks."""
        return describe_publications(self)

    def _tick(self) -> None:
        """Let go what is due, wipe what erased users had, and answer who waited: a bounded piece of each."""
        self._wiped_pages = 0
        gone_by_tenant: dict[str, int] = {}
        for _ in range(TICK_BLOCKS):
            if self._has_wiped_enough:
                break  # an erased user's blocks expire as well
            tenant = self.shares.first_due(self._now)
            if tenant is None:
                if not self.disk.tick(self._now):
                    break
                continue
            gone_by_tenant[tenant.name] = gone_by_tenant.get(tenant.name, 0) + self._give_up_one(tenant)
            self.shares.note_due(tenant)
        for name, blocks in gone_by_tenant.items():
            self._log("given-up", None, tenant=name, blocks=blocks)
        self._erase_some()
        blocks = 0
        while self.loads.answerable and blocks < self.answered_blocks_max:
            blocks += self._answer_next()

    def _give_up_one(self, tenant: Tenant[Block]) -> int:
        """Evict the next block that is due, or see that a user is not above the lowered limit; return how many went."""
        due = self.shares.due_victim(tenant)
        if due is None:
            return 0
        victim, is_expired = due
        assert not is_expired or tenant.expires_at(victim) <= self._now, "something was due, and nothing is"
        doomed = self._doom(victim)
        tenant.tally.expired += doomed if is_expired else 0
        tenant.tally.evicted += 0 if is_expired else doomed
        return 1

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
        message: Lookup | Acquire | Release | Reserve | Commit | Abort | Discard | NamespaceChanged,
    ) -> None:
        match message:
            case Lookup():
                prefix, _ = self._find(session, message)
                coming = self._coming(session, message, prefix)
                self._send(connection, LookedUp(message.request, ready=len(prefix) + len(coming)))
            case Acquire():
                found, state = self._find(session, message)
                if not self._fetch(session, message, found):
                    self._send(connection, self._acquire(session, message, found, state))
            case Reserve():
                self._send(connection, self._reserve(session, message))
            case NamespaceChanged(root):
                session.root = root
                self._tell_depths()
            case Release(lease_id):
                self._release(_end_lease(session, lease_id, is_write=False))
            case Commit(lease_id):
                self._commit(session, _end_lease(session, lease_id, is_write=True))
            case Abort(lease_id):
                self._abort(session, _end_lease(session, lease_id, is_write=True))
            case Discard():
                self._discard(session, message)

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
            state_bytes=hello.state_bytes,
            root=hello.root,
            block_tokens=hello.block_tokens,
        )
        self.session_by_control[connection] = session
        self.sessions.append(session)
        self._welcome(connection, is_scheduler=True)
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

    def _welcome(self, connection: ConnectionId, *, is_scheduler: bool = False) -> None:
        welcome = Welcome(
            arena_bytes=self.pool.pages * self.page_bytes,
            page_bytes=self.page_bytes,
            naming_secret=self._naming_secret if is_scheduler else b"",
            signing_secrets=self._signing_secrets if is_scheduler else (),
        )
        self._effects.append(Send(connection, welcome, with_arena=not is_scheduler))

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
        self._tell_depths()
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
        for lease_id, lease in list(session.lease_by_id.items()):
            _end_lease(session, lease_id, is_write=lease.is_write)
            if lease.is_write:
                self._abort(session, lease)
            else:
                self._release(lease)

    # The four verbs

    def _find(self, session: Session, ask: Lookup | Acquire) -> tuple[list[Block], Block | None]:
        """Return the blocks of the longest prefix of use to the asker and, if it wants one, the state it ends in."""
        if ask.states and not session.state_bytes:
            raise ViolationError("the session's model has no states, and yet some were asked for")
        if ask.states and len(ask.states) != len(ask.keys):
            raise ViolationError(f"{len(ask.states)} states were asked for with {len(ask.keys)} blocks")
        prefix = self._ready_prefix(session, ask)
        return self._up_to_a_state(session, ask, prefix) if ask.states else (prefix, None)

    def _up_to_a_state(
        self, session: Session, ask: Lookup | Acquire, prefix: list[Block], *, pages_max: int | None = None
    ) -> tuple[list[Block], Block | None]:
        """Return the longest part of a prefix that ends in a state, and that state.

        With `pages_max`, of those that would pin no more pages than that.
        """
        unpinned = _first_unpinned(prefix)
        for ready in range(len(prefix), 0, -1):
            state = self._found(ask.tenant, ask.user, ask.states[ready - 1])
            if state is None or state.state is not BlockState.READY or state.length != session.state_bytes:
                continue
            if state.parent is not prefix[ready - 1]:
                continue
            pages = max(ready - unpinned, 0) * prefix[0].pages + (0 if state.pins else state.pages)
            if not exceeds(pages, pages_max):
                return prefix[:ready], state
        return [], None

    def _ready_prefix(self, session: Session, ask: Lookup | Acquire) -> list[Block]:
        """Return the blocks of the longest READY prefix."""
        if session.state is not SessionState.OPEN:
            return []
        own_by_key, public_by_key = self._blocks_of(ask.tenant, ask.user), self._public_blocks(ask)
        blocks: list[Block] = []
        prefix = Prefix()
        for index, key in enumerate(ask.keys):
            public = public_by_key.get(ask.public[index]) if index < len(ask.public) else None
            prefix.descend(own_by_key.get(key), public, length=session.block_bytes)
            block = prefix.block
            if block is None or block.state is not BlockState.READY:
                break
            blocks.append(block)
        while blocks and self._is_expired(blocks[-1]):  # none is used later than what it continues
            blocks.pop()
        return blocks

    def _acquire(self, session: Session, ask: Acquire, found: list[Block], found_state: Block | None) -> Acquired:
        """Pin what was found just now of what an Acquire asks for."""
        tenant = self.shares.tenant(ask.tenant)
        prefix, state = self._pinnable(session, tenant, ask, found, found_state)
        pinned = prefix[ask.start :]
        if session.leased_blocks + len(pinned) > LEASED_BLOCKS_MAX:
            raise ViolationError(f"the session holds leases of {session.leased_blocks} blocks, and asked for more")
        public = sum(block.user.tenant.name == PUBLIC_TENANT for block in found) if ask.public else 0
        if 0 < public < len(found):
            self._adopt(found[public], found[public - 1])
        self._touch(found)
        self._offer_to_disk(session, found)
        if found_state is not None:
            found_state.touched_at = self._now
        if state is not None and pinned:  # otherwise the engine is as far by itself, and has no use for the state
            pinned.append(state)
        tally = tenant.tally
        tally.acquires += 1
        tally.hit_blocks += len(found)
        tally.public_blocks += public
        tally.missed_blocks += len(ask.keys) - len(found)
        tally.shortened += len(prefix) < len(found)
        self._pin(pinned)
        self._log("acquired", session, tenant=tenant.name, blocks=len(prefix), detail=f"of {len(ask.keys)}")
        return Acquired(
            request=ask.request,
            lease=self._lease(session, pinned, is_write=False),
            acquired_at=self._now,
            ready=len(prefix),
            extents=tuple(block.extent for block in pinned),
            public=min(public, len(prefix)),
        )

    def _pinnable(
        self, session: Session, tenant: Tenant[Block], ask: Acquire, found: list[Block], state: Block | None
    ) -> tuple[list[Block], Block | None]:
        """Return as much of what was found as the tenant may pin now; what the engine has itself needs no pin."""
        pages_max = self.shares.may_hold(tenant)
        if pages_max is None or len(found) <= ask.start:
            return found, state
        unpinned = _first_unpinned(found)
        pages = (len(found) - unpinned) * found[0].pages
        if state is not None and not state.pins:
            pages += state.pages
        if pages <= pages_max:
            return found, state
        prefix = found[: unpinned + pages_max // found[0].pages]
        if state is not None:
            prefix, state = self._up_to_a_state(session, ask, prefix, pages_max=pages_max)
        if len(prefix) > ask.start:
            return prefix, state
        own = found[: ask.start]
        return self._up_to_a_state(session, ask, own) if ask.states else (own, None)

    def _reserve(self, session: Session, ask: Reserve) -> Reserved:
        """Grant extents for missing blocks, from `start` on, until one is refused."""
        if ask.ends_in_state and not session.state_bytes:
            raise ViolationError("the session's model has no states, and yet room for one was asked for")
        if ask.ends_in_state and len(ask.keys) < 2:
            raise ViolationError("room was asked for a state at the end of no block")
        at = min(self._now, ask.acquired_at)  # in this order: NaN becomes now, and so does the time of a server before
        refusal = None if session.state is SessionState.OPEN else Refusal.NO_SESSION
        tenant = self.shares.tenant(ask.tenant)
        if self._erased_at and self._is_of_erased(ask):
            refusal = refusal or Refusal.ERASED
        if refusal is None and tenant.name == PUBLIC_TENANT and not self._is_publishing(session, ask):
            refusal = Refusal.NOT_PUBLISHED
        user_id = PUBLIC_USER if tenant.name == PUBLIC_TENANT else ask.user
        public_by_key = self._public_blocks(ask)
        grants: list[Grant] = []
        written: list[Block] = []
        prefix = Prefix()
        index = 0
        while refusal is None and index < len(ask.keys):
            is_state = ask.ends_in_state and index == len(ask.keys) - 1
            length = session.state_bytes if is_state else session.block_bytes
            own, parent = self._fresh(tenant, user_id, ask.keys[index]), prefix.block
            public = public_by_key.get(ask.public[index]) if index < len(ask.public) else None
            prefix.descend(own, public, length=length)
            if prefix.block is None and own is None and index >= ask.start:
                granted = self._write(tenant, user_id, ask.keys[index], parent=parent, length=length, at=at)
                if isinstance(granted, Refusal):
                    refusal = granted
                    break
                prefix.own = granted
                written.append(granted)
                grants.append(Grant(index=index, extent=granted.extent))
            elif prefix.block is None:
                refusal = Refusal.NO_PARENT
                break
            # The time of the Acquire, not of this message: a prefix stays at least as recent as what continues it.
            for block in (prefix.own, prefix.public):
                if block is not None:
                    block.touched_at = max(block.touched_at, at)
            index += 1
        if refusal is not None:
            if (publication := self._publication(ask)) is not None:
                publication.refusal = refusal.value
            refusals = tenant.tally.refusals
            refusals[refusal.value] = refusals.get(refusal.value, 0) + 1
            self._log("refused", session, tenant=tenant.name, blocks=len(ask.keys) - index, detail=refusal.value)
        if written:
            self._log("reserved", session, tenant=tenant.name, blocks=len(written))
        return Reserved(
            request=ask.request,
            lease=self._lease(session, written, is_write=True),
            grants=tuple(grants),
            upto=index,
            refusal=refusal,
        )

    def _write(
        self, tenant: Tenant[Block], user_id: UserId, key: Key, *, parent: Block | None, length: int, at: float
    ) -> Block | Refusal:
        """Make one block to be written, evicting what must go for it."""
        pages = -(-length // self.page_bytes)
        stamp = (at, -(parent.depth + 1) if parent else 0, next(self._serials))
        evicted = self._make_room(tenant, user_id, pages, stamp, parent)
        if isinstance(evicted, Refusal):
            return evicted
        extent = self.pool.allocate(pages)
        assert extent is not None, "made room, and yet there is none"
        self.shares.keep(tenant)
        user = tenant.user(user_id)
        block = Block(
            user=user,
            key=key,
            parent=parent,
            extent=extent,
            pages=pages,
            length=length,
            touched_at=at,
            serial=stamp[2],
            evicted_for_it=evicted > 0,
        )
        user.link(key, block)
        self._charge(user, pages)
        self._pin([block])
        if tenant.name == PUBLIC_TENANT:
            block.pins += 1  # until it is doomed
        return block

    def _make_room(
        self, tenant: Tenant[Block], user_id: UserId, pages: int, stamp: Stamp, parent: Block | None
    ) -> Refusal | int:
        """Evict until `pages` more fit the limits and the arena; return how many blocks went.

        Victims are only unlinked until there are enough of them: a refusal puts them back.
        """
        never = self.shares.why_never(tenant, pages)
        if never is not None:
            return never
        if exceeds(pages + _unpinned_pages(parent), self.shares.may_hold(tenant)):
            return Refusal.IN_FLIGHT
        victims: list[tuple[Block, Block | None]] = []  # with their parents

        def take(victim: Block) -> None:
            victims.append((victim, victim.parent))
            self._unlink(victim)
            self._charge(victim.user, -victim.pages)

        refusal = self.shares.choose_victims(tenant, user_id, pages, stamp, free_pages=self.pool.free_pages, take=take)
        if refusal is not None:
            for victim, above in reversed(victims):
                self._relink(victim, above)
            return refusal
        for victim, _ in victims:
            victim.user.tenant.tally.evicted += 1
            self._free(victim)
        return len(victims)

    def _commit(self, session: Session, lease: Lease) -> None:
        tenant = lease.blocks[0].user.tenant
        tally = tenant.tally
        stored = 0
        for block in lease.blocks:
            if block.state is BlockState.WRITING and not block.user.is_erased:
                block.state = BlockState.READY
                stored += 1
                tally.stored += not block.evicted_for_it
                tally.stored_after_evicting += block.evicted_for_it
        self._offer_to_disk(session, lease.blocks)
        self._release(lease)
        self._log("stored", session, tenant=tenant.name, blocks=stored)

    def _abort(self, session: Session, lease: Lease) -> None:
        tenant = lease.blocks[0].user.tenant
        tenant.tally.aborted += len(lease.blocks)
        for block in lease.blocks:
            if block.state is BlockState.WRITING and not block.user.is_erased:
                self._doom(block)
        self._release(lease)
        self._log("aborted", session, tenant=tenant.name, blocks=len(lease.blocks))

    def _release(self, lease: Lease) -> None:
        for block in lease.blocks:
            assert block.pins > 0, "released a block nobody pinned"
            block.pins -= 1
            if not block.pins:
                self._unpinned(block)

    # What is published

    def _publication(self, ask: Reserve) -> Publication | None:
        """Return what a reservation for the public pool is about; there its user names a publication."""
        return self.publication_by_id.get(PublicationId(ask.user)) if ask.tenant == PUBLIC_TENANT else None

    def _is_publishing(self, session: Session, ask: Reserve) -> bool:
        """Return whether these blocks may be stored for all users."""
        publication = self._publication(ask)
        if publication is None or ask.ends_in_state:
            return False
        known = publication.keys
        is_admitted = publication.admits(session.root, ask.keys)
        if publication.keys is not known and self.disk.pool.pages:
            self._effects.append(KeepPublication(publication.stored))
        return is_admitted

    def _bring_back(self, publication: Publication) -> None:
        """Have what is published read from the disk, as far as its first blocks are there and have room."""
        tenant, parent = self.shares.tenant(PUBLIC_TENANT), None
        load: list[Block] = []
        for key in publication.keys:
            block = self._linked(PUBLIC_TENANT, PUBLIC_USER, key)  # if another publication has it too
            if block is None:
                record = self.disk.find(PUBLIC_TENANT, PUBLIC_USER, key, length=None, now=self._now)
                if record is None:
                    break
                made = self._write_from(record, tenant, parent)
                if isinstance(made, Refusal):
                    publication.refusal = made.value
                    break
                load.append(made)
                block = made
            parent = block
        if load:
            self.loads.begin(load)

    def _public_blocks(self, ask: Lookup | Acquire | Reserve) -> Mapping[Key, Block]:
        return self._blocks_of(PUBLIC_TENANT, PUBLIC_USER) if ask.public else {}

    def _adopt(self, block: Block, parent: Block) -> None:
        """Let a user's block hang on the published one before it: the user's own has served, and ages away."""
        before = block.parent
        if before is None or before is parent:
            return
        block.leave_parent()
        block.join_parent(parent)
        if block.pins:
            parent.pins += 1
            before.pins -= 1
        if block.pins and not before.pins:
            self._unpinned(before)
        else:
            self.shares.offer(before)

    def _unpublish(self, id_: PublicationId) -> None:
        """Let the blocks go that no other publication has, and what users have behind them."""
        publication = self.publication_by_id.pop(id_, None)
        kept = {key for other in self.publication_by_id.values() for key in other.keys}
        gone = [key for key in publication.keys if key not in kept] if publication is not None else []
        for key in gone:
            self.disk.discard(PUBLIC_TENANT, PUBLIC_USER, key)
        for key in gone[:1]:  # the others continue it
            block = self._linked(PUBLIC_TENANT, PUBLIC_USER, key)
            doomed = self._doom(block) if block is not None else 0
            self._log("unpublished", None, tenant=PUBLIC_TENANT, blocks=doomed)
        self._tell_depths()

    def _tell_depths(self) -> None:
        """Tell schedulers how far it is of use to ask for what is published."""
        for control, session in self.session_by_control.items():
            publications = self.publication_by_id.values()
            depth = max((each.blocks for each in publications if each.root == session.root), default=0)
            if session.state is SessionState.OPEN and depth != session.public_depth:
                session.public_depth = depth
                self._send(control, PublicDepth(depth))

    def _discard(self, session: Session, ask: Discard) -> None:
        user = PUBLIC_USER if ask.tenant == PUBLIC_TENANT else ask.user
        block = self._found(ask.tenant, user, ask.key)
        self.disk.discard(ask.tenant, user, ask.key)
        if block is not None:
            tenant = block.user.tenant
            for behind in block.with_descendants():
                if behind.record is not None:
                    self.disk.let_go(behind.record)
            doomed = self._doom(block)
            tenant.tally.discarded += doomed
            self._log("discarded", session, tenant=tenant.name, blocks=doomed)

    # What is on the disk

    def _coming(self, session: Session, ask: Lookup | Acquire, found: list[Block]) -> list[Block | StoredBlock]:
        """Return what continues a READY prefix and is, or could now be, on its way from the disk, in order.

        Nothing, where the engine is expected to compute it faster.
        """
        coming: list[Block | StoredBlock] = []
        if not self.disk.pool.pages or session.state_bytes or session.state is not SessionState.OPEN:
            return coming
        block_by_key, pages = self._blocks_of(ask.tenant, ask.user), 0
        for key in ask.keys[len(found) :]:
            block = block_by_key.get(key)
            if block is not None:
                if block not in self.loads.load_by_block:
                    break
                coming.append(block)
                continue
            record = self.disk.find(ask.tenant, ask.user, key, length=session.block_bytes, now=self._now)
            if record is None:
                break
            coming.append(record)
            pages += record.pages
        start = ask.start if isinstance(ask, Acquire) else 0
        gained = len(found) + len(coming) - max(len(found), start)  # over what is there at once
        if gained <= 0 or 0 < ask.block_seconds * gained <= self.disk.reading_seconds(ask.tenant, pages):
            return []
        return coming

    def _fetch(self, session: Session, ask: Acquire, found: list[Block]) -> bool:
        """Have what continues a READY prefix brought from the disk, and return whether the answer waits for that."""
        coming = self._coming(session, ask, found)
        if not coming or not self.loads.may_wait(session, ask.tenant):
            return False
        self._touch(found)  # what is to come must not evict what it continues
        tenant = self.shares.tenant(ask.tenant)
        parent = found[-1] if found else None
        awaited: dict[Load, None] = {}
        fetched: list[Block] = []
        pages = self.loads.pages
        for source in coming:
            if isinstance(source, Block):
                awaited[self.loads.load_by_block[source]] = None
                parent = source
                continue
            if pages >= self.pool.pages // LOADING_SHARE:
                break
            made = self._write_from(source, tenant, parent)
            if isinstance(made, Refusal):
                break
            pages += made.pages
            parent = made
            fetched.append(made)
        self._touch([block for block in coming if isinstance(block, Block)])
        self._touch(fetched)
        if fetched:
            awaited[self.loads.begin(fetched)] = None
        if not awaited:
            return False
        assert session.control is not None, "a session asked without a control connection"
        self.loads.wait(session, ask, awaited)
        blocks = sum(load.left for load in awaited)
        self._send(
            session.control, Loading(ask.request, blocks=blocks, seconds=self.disk.reading_seconds(tenant.name, 0))
        )
        self._log("loading", session, tenant=tenant.name, blocks=len(fetched), detail=f"of {len(ask.keys)}")
        return True

    def _write_from(self, record: StoredBlock, tenant: Tenant[Block], parent: Block | None) -> Block | Refusal:
        """Make one block to be read from the disk, evicting what must go for it."""
        name = record.name
        made = self._write(tenant, name.user, name.key, parent=parent, length=record.length, at=self._now)
        if not isinstance(made, Refusal):
            made.record = record
            self.disk.queue_read(record, made)
        return made

    def _end_read(self, op: OpId, *, seconds: float | None, loss: Loss | None = None) -> None:
        block = self.disk.end_read(op, seconds=seconds)
        if loss is not None:
            self._log("lost", None, tenant=block.user.tenant.name, blocks=1, detail=loss.value)
        self._end_loading(block, is_there=loss is None)
        if self.loads.answerable:
            self._answer_next()  # the others with the next `Tick`

    def _end_loading(self, block: Block, *, is_there: bool) -> None:
        """Publish a block that has come from the disk, or let it go with all that continues it."""
        if block.state is BlockState.WRITING and not block.user.is_erased:
            if is_there:
                block.state = BlockState.READY
            else:
                self._doom(block)
        unawaited = self.loads.end(block)
        if unawaited is not None:
            self._release(Lease(unawaited.blocks, is_write=True))

    def _answer_next(self) -> int:
        """Answer the next request that has waited for the disk, and return how many blocks it asked for."""
        waiting = self.loads.take()
        control = waiting.session.control
        if control is not None:
            try:
                found, state = self._find(waiting.session, waiting.ask)
                self._send(control, self._acquire(waiting.session, waiting.ask, found, state))
            except ViolationError as violation:
                self._refuse(control, str(violation))
        for load in self.loads.leave(waiting):
            self._release(Lease(load.blocks, is_write=True))
        return len(waiting.ask.keys)

    def _touch(self, blocks: list[Block]) -> None:
        for block in blocks:
            block.touched_at = self._now
            if block.record is not None:
                self.disk.touch(block.record, self._now)

    def _offer_to_disk(self, session: Session, blocks: list[Block]) -> None:
        """Have those of a prefix written that are not on the disk, now that they are READY or used again."""
        if not self.disk.pool.pages or session.state_bytes:
            return
        for block in blocks:  # all of them: one that was skipped may be in front of others that were not
            if block.state is BlockState.READY and not is_on_disk(block):
                self.disk.offer(block, session.root)

    def _end_write(self, op: OpId, *, is_written: bool) -> None:
        block = self.disk.end_write(op, is_written=is_written)
        self._release(Lease([block], is_write=False))

    def _may_pin(self, block: Block) -> bool:
        return not exceeds(_unpinned_pages(block), self.shares.may_hold(block.user.tenant))

    def _work(self) -> None:
        """Ask for what the disk can do now."""
        reads, needless = self.disk.start_reads()
        self._effects += reads
        for block in needless:
            self._end_loading(block, is_there=False)
        while (write := self.disk.start_write(self._may_pin)) is not None:
            work, block = write
            self._pin([block])
            self._effects.append(work)
        self._effects += self.disk.start_forgetting()

    # What is erased

    def _erase(self, tenant_name: str, user_id: UserId | None, *, for_good: bool) -> None:
        """Let nobody find what a user has, or all users of a tenant, nor store what was begun before."""
        assert tenant_name != PUBLIC_TENANT, "what is published is removed, not erased"
        tenant, stored = self.tenant_by_name.get(tenant_name), self.disk.shares.tenant_by_name.get(tenant_name)
        known = [owner.user_by_id for owner in (tenant, stored) if owner is not None]
        user_ids = {id_ for ids in known for id_ in ids} if user_id is None else {user_id}
        self._erased_at[tenant_name, user_id] = max(self._now, self._erased_at.get((tenant_name, user_id), -inf))
        for id_ in user_ids:
            if for_good:
                self._erased_at[tenant_name, id_] = inf
            user = tenant.erase(id_) if tenant is not None else None
            if user is not None:
                self._erasing.append(user)
        self.disk.erase(tenant_name, user_id)
        self._log("erased", None, tenant=tenant_name)

    def _erase_some(self) -> None:
        """Unlink, wipe and free a bounded part of what erased users have; what is pinned follows once it isn't."""
        for _ in range(TICK_BLOCKS):
            if self._has_wiped_enough:
                break
            if self._to_wipe:
                block = self._to_wipe.popleft()
                block.pins -= 1
                self.shares.count_held(block.user, pages=-block.pages, blocks=-1)
                self._free_if_unheld(block)
            elif self._erasing:
                self._unlink_next()
            else:
                break

    def _unlink_next(self) -> None:
        """Take one block of an erased user out of its dictionary, or forget the user if there is none."""
        user = self._erasing[-1]
        if not user.block_by_key:
            self._erasing.pop()
            user.tenant.forget_if_empty(user)
            self.shares.forget_if_empty(user.tenant)
            return
        block = next(reversed(user.block_by_key.values()))
        while block.children is not None:  # seldom: what continues a block is stored after it
            block = block.children
        self._doom(block)

    @property
    def _has_wiped_enough(self) -> bool:
        return self._wiped_pages * self.page_bytes >= self.erased_bytes_max

    def _is_of_erased(self, ask: Reserve) -> bool:
        """Return whether a request began before its user was erased, or its tenant."""
        times = [self._erased_at[key] for key in ((ask.tenant, ask.user), (ask.tenant, None)) if key in self._erased_at]
        return any(not ask.began_at > erased_at for erased_at in times)  # a time that is no number is before all

    # Blocks

    def _blocks_of(self, tenant_name: str, user_id: UserId) -> Mapping[Key, Block]:
        tenant = self.shares.tenant_by_name.get(tenant_name)
        user = tenant.user_by_id.get(user_id) if tenant is not None else None
        return user.block_by_key if user is not None else {}

    def _linked(self, tenant_name: str, user_id: UserId, key: Key) -> Block | None:
        return self._blocks_of(tenant_name, user_id).get(key)

    def _found(self, tenant_name: str, user_id: UserId, key: Key) -> Block | None:
        """Return a linked block, unless it has expired."""
        block = self._linked(tenant_name, user_id, key)
        return None if block is None or self._is_expired(block) else block

    def _fresh(self, tenant: Tenant[Block], user_id: UserId, key: Key) -> Block | None:
        """Return a linked block; one that has expired goes, so that it can be stored anew."""
        user = tenant.user_by_id.get(user_id)
        block = user.block_by_key.get(key) if user is not None else None
        if block is not None and self._is_expired(block):
            tenant.tally.expired += self._doom(block)
            return None
        return block

    def _is_expired(self, block: Block) -> bool:
        tenant = block.user.tenant
        return (
            tenant.ttl_seconds is not None and block.state is BlockState.READY and tenant.expires_at(block) <= self._now
        )

    def _lease(self, session: Session, blocks: list[Block], *, is_write: bool) -> LeaseId:
        if not blocks:
            return 0
        lease_id = next(self._lease_ids)
        session.lease_by_id[lease_id] = Lease(blocks, is_write=is_write)
        session.leased_blocks += len(blocks)
        if is_write:
            session.write_leases += 1
            blocks[0].user.tenant.leased_to_write += len(blocks)
        return lease_id

    def _pin(self, blocks: list[Block]) -> None:
        """Pin blocks once more, each the parent of the next, and thereby all that the first of them continues."""
        pages = held = 0
        above: Block | None = blocks[-1] if blocks else None
        while above is not None:
            above.pins += 1
            if above.pins > 1:
                break
            pages += above.pages
            held += 1
            above = above.parent
        if held:
            self.shares.count_held(blocks[-1].user, pages=pages, blocks=held)
        for block in blocks[:-1]:  # for the lease; the last has its pin, and a pin for their child all have by now
            block.pins += 1

    def _unpinned(self, block: Block) -> None:
        """Follow the loss of a block's last pin: what it continues loses one, and what is doomed goes."""
        if block.state is BlockState.DOOMED and block.user.is_erased:
            # A lease may hold any number. Until `_erase_some` comes to it, nobody can have its room: so it is pinned.
            block.pins = 1
            self._to_wipe.append(block)
            return
        pages, held = block.pages, 1
        above = block.parent
        while above is not None:
            above.pins -= 1
            if above.pins:
                break
            pages += above.pages
            held += 1
            above = above.parent
        self.shares.count_held(block.user, pages=-pages, blocks=-held)
        if block.state is BlockState.DOOMED:
            self._free_if_unheld(block)
        else:
            self.shares.offer(block)

    def _doom(self, root: Block) -> int:
        """Unlink a block and all that continues it, free what nobody holds of them, and return how many."""
        if root.user.tenant.name == PUBLIC_TENANT:
            for block in reversed(list(root.with_descendants())):
                if block.user is root.user:  # the pin that it had for being published
                    block.pins -= 1
                    if not block.pins:
                        self._unpinned(block)
        doomed = self._unlink(root)
        for block in doomed:
            self._free_if_unheld(block)
        return len(doomed)

    def _unlink(self, root: Block) -> list[Block]:
        """Take a block and all that continues it out of their user's dictionary."""
        parent, was_pinned = root.parent, root.pins > 0
        doomed = list(root.with_descendants())
        for block in doomed:
            if block is not root and block.pins and block.parent is not None:
                above = block.parent
                above.pins -= 1
                if not above.pins:  # it was pinned only by what continues it
                    self.shares.count_held(above.user, pages=-above.pages, blocks=-1)
            block.user.unlink(block.key)
            block.user.order.withdraw(block)
            block.state = BlockState.DOOMED
        for block in doomed:
            block.leave_parent()
        if parent is not None:
            parent.pins -= was_pinned
            if was_pinned and not parent.pins:
                self._unpinned(parent)
            else:
                self.shares.offer(parent)  # it may be a leaf now
        return doomed

    def _relink(self, victim: Block, parent: Block | None) -> None:
        """Undo the unlinking of a leaf that nobody pins."""
        victim.state = BlockState.READY
        victim.user.link(victim.key, victim)
        victim.join_parent(parent)
        self._charge(victim.user, victim.pages)
        self.shares.offer(victim)

    def _charge(self, user: User[Block], pages: int) -> None:
        user.charge(pages)
        if pages > 0:
            self.shares.note_growth(user.tenant)

    def _free_if_unheld(self, block: Block) -> None:
        if not block.pins:
            self._charge(block.user, -block.pages)
            self._free(block)

    def _free(self, block: Block) -> None:
        """Give the pages of a block back that nobody is charged for any more."""
        if block.user.is_erased:
            self._effects.append(WipePages(block.extent))
            self._wiped_pages += block.pages
        self.pool.free(block.extent)
        block.user.tenant.forget_if_empty(block.user)
        self.shares.forget_if_empty(block.user.tenant)

    # Effects

    def _send(self, connection: ConnectionId, message: Reply) -> None:
        self._effects.append(Send(connection, message))

    def _refuse(self, connection: ConnectionId, reason: str) -> None:
        self._effects += [Send(connection, Refused(reason)), Close(connection, reason=reason)]

    def _log(
        self, event: str, session: Session | None, *, tenant: str = DEFAULT_TENANT, blocks: int = 0, detail: str = ""
    ) -> None:
        engine = session.engine if session is not None else ""
        self._effects.append(Logged(event, engine=engine, tenant=tenant, blocks=blocks, detail=detail))


def _end_lease(session: Session, lease_id: LeaseId, *, is_write: bool) -> Lease:
    lease = session.lease_by_id.get(lease_id)
    if lease is None or lease.is_write != is_write:
        raise ViolationError(f"the session holds no {'write' if is_write else 'read'} lease {lease_id}")
    del session.lease_by_id[lease_id]
    session.leased_blocks -= len(lease.blocks)
    if is_write:
        session.write_leases -= 1
        lease.blocks[0].user.tenant.leased_to_write -= len(lease.blocks)
    return lease


def _first_unpinned(prefix: list[Block]) -> int:
    """Return how many blocks of a prefix are pinned: the first ones, for a pin goes up to the root."""
    return bisect_left(prefix, True, key=lambda block: not block.pins)


def _unpinned_pages(block: Block | None) -> int:
    """Return how many pages would be pinned with a block that isn't yet."""
    pages = 0
    while block is not None and not block.pins:
        pages += block.pages
        block = block.parent
    return pages
