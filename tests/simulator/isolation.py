"""The isolation guarantee as a witness: each tenant's hits against those of a private cache, request by request.

What happens to a tenant is written down as it happens. Once it ends, or the tenant's settings change, W is known: the
most pages that were pinned, used by a request whose store was not done yet, or erased and not gone yet. Then the
private cache of the guarantee less W is told the same, and must hit no more than the real one did. It is also told
what the real one refused although the theorem owes it, so that a guarantee withheld shows as well as one taken.

Nothing is owed while more is pinned than there may be, since somebody's guarantee was raised. Requests whose answer was
shortened aren't compared: their tenant's pins were to leave its part. What a request has used that never stores
anything is in W until a later one that used it has been stored, or it has gone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import pytest

from saltern.core.blocks import Block, BlockState
from saltern.core.cache import Cache
from saltern.core.effects import Effect, Erased, Event, Received, Send, TenantRemoved, TenantSet
from saltern.core.keys import Key, UserId
from saltern.core.messages import Acquire, Acquired, Commit, Discard, LeaseId, Refusal, Refused, Reserve, Reserved
from saltern.core.order import Stamp
from saltern.core.tenants import NO_LIMITS, Limits, Tenant
from saltern.replay.private import Piece, PrivateCache
from tests.simulator.claims import Invariant, violated


class Blocks(Protocol):
    """The real cache's blocks after an event."""

    held: list[Block]
    pinned: set[Block]

    def block(self, tenant: str, user: UserId, key: Key) -> Block | None:
        """Return a linked block."""

    def is_owed(self, ask: Reserve, answer: Reserved, pages: int) -> bool:
        """Return whether what a Reserve was refused for want of room or pins is promised to its tenant."""


@dataclass(frozen=True)
class Used:
    """An Acquire, and how much it found; None where less was pinned than found."""

    ask: Acquire
    now: float
    ready: int | None


@dataclass(frozen=True)
class Stored:
    """A prompt whose store is done, in the blocks that came of it and the refused one that was due: see `Pending`."""

    user: UserId
    pieces: tuple[Piece, ...]
    at: float
    now: float


@dataclass(frozen=True)
class Pending:
    """A Reserve whose blocks are being written, or an Acquire that found all.

    The private cache is offered the `refused` one as well: a next victim, which it has to refuse by itself, or what the
    tenant was owed, for which it has room.
    """

    ask: Acquire | Reserve
    keys: tuple[Key, ...]
    at: float
    refused: Piece | None


@dataclass
class Record:
    """What happened to one tenant under one setting."""

    limits: Limits
    happened: list[Used | Stored | Discard | Erased] = field(default_factory=list)
    settled_at_by_name: dict[tuple[UserId, Key], float] = field(default_factory=dict)
    in_flight_pages: int = 0  # W


class Witness:
    """Watches one server from its start. `compared` and `hits` say how much the private caches were asked, and had."""

    def __init__(self, settings: Mapping[str, Limits], page_bytes: int) -> None:
        self.compared = 0
        self.hits = 0
        self._page_bytes = page_bytes
        self._record_by_tenant = {name: Record(limits) for name, limits in settings.items()}
        self._pending_by_lease: dict[LeaseId, Pending] = {}

    def check(self, event: Event, effects: list[Effect], blocks: Blocks, now: float) -> None:
        """Write down what an event was to its tenant."""
        refusals = [effect for effect in effects if isinstance(effect, Send) and isinstance(effect.message, Refused)]
        match event, refusals:
            case TenantSet(name, limits), _:
                self._begin(name, limits)
            case TenantRemoved(name), _:
                self._begin(name, NO_LIMITS)
            case Erased(tenant) as erased, _:
                self._record(tenant).happened.append(erased)
            case Received(message=Discard() as discard), []:
                self._record(discard.tenant).happened.append(discard)
            case Received(message=Commit(lease)), [] if lease in self._pending_by_lease:
                self._settle(self._pending_by_lease.pop(lease), blocks, now)
            case _:
                pass

    def acquired(self, ask: Acquire, answer: Acquired, found: int, blocks: Blocks, now: float) -> None:
        """Write down what an Acquire in an open session found."""
        ready = answer.ready if answer.ready == found else None
        self._record(ask.tenant).happened.append(Used(ask, now, ready))
        if found == len(ask.keys) and not ask.states:  # there is nothing to store
            self._settle(Pending(ask, ask.keys, now, None), blocks, now)

    def reserved(self, ask: Reserve, answer: Reserved, refused_pages: int, blocks: Blocks, now: float) -> None:
        """Write down what a Reserve offers to the private cache, as soon as it is written."""
        is_next_victim, refused = answer.refusal is Refusal.NEXT_VICTIM, None
        if is_next_victim or blocks.is_owed(ask, answer, refused_pages):
            refused = (ask.keys[answer.upto], refused_pages)
        at = ask.acquired_at if ask.acquired_at < now else now
        pending = Pending(ask, ask.keys[: answer.upto], at, refused)
        if answer.lease:
            self._pending_by_lease[answer.lease] = pending
        else:
            self._settle(pending, blocks, now)
        self._count_in_flight(blocks.held, blocks.pinned, ask.tenant, refused_pages if is_next_victim else 0)

    def count_in_flight(self, blocks: Blocks) -> None:
        """See how much of each tenant's is in use now."""
        for name in self._record_by_tenant:
            self._count_in_flight(blocks.held, blocks.pinned, name, 0)

    def verify(self) -> None:
        """Compare all that has happened with the private caches."""
        for name in list(self._record_by_tenant):
            self._begin(name, NO_LIMITS)

    def _record(self, tenant: str) -> Record:
        return self._record_by_tenant.setdefault(tenant, Record(NO_LIMITS))

    def _settle(self, pending: Pending, blocks: Blocks, now: float) -> None:
        ask, record, pieces = pending.ask, self._record(pending.ask.tenant), list[Piece]()
        for key in pending.keys:
            block = blocks.block(ask.tenant, ask.user, key)
            if block is None or block.state is not BlockState.READY:
                break  # another request is writing it, or it is gone already
            pieces.append((key, block.pages))
            settled_at = record.settled_at_by_name.get((ask.user, key), pending.at)
            record.settled_at_by_name[ask.user, key] = max(settled_at, pending.at)
        if pending.refused is not None and len(pieces) == len(pending.keys):
            pieces.append(pending.refused)
        record.happened.append(Stored(ask.user, tuple(pieces), pending.at, now))

    def _count_in_flight(self, held: Iterable[Block], pinned: set[Block], tenant: str, more_pages: int) -> None:
        record = self._record(tenant)
        pages = more_pages
        for block in held:
            if block.user.tenant.name == tenant:
                settled_at = record.settled_at_by_name.get((block.user.id, block.key))
                is_settled = settled_at is not None and settled_at >= block.touched_at
                if block in pinned or not is_settled or block.user.is_erased:
                    pages += block.pages
        record.in_flight_pages = max(record.in_flight_pages, pages)

    def _begin(self, tenant: str, limits: Limits) -> None:
        """Judge what has happened to a tenant, and begin anew."""
        record = self._record(tenant)
        self._record_by_tenant[tenant] = Record(limits)
        for lease in [lease for lease, pending in self._pending_by_lease.items() if pending.ask.tenant == tenant]:
            del self._pending_by_lease[lease]
        pages = record.limits.guarantee_bytes // self._page_bytes - record.in_flight_pages
        if pages > 0 and record.limits.user_limit_bytes is None:
            self._compare(tenant, record, pages)

    def _compare(self, tenant: str, record: Record, pages: int) -> None:
        alone = PrivateCache(pages, ttl_seconds=record.limits.ttl_seconds)
        for happened in record.happened:
            match happened:
                case Used(ask, now, ready):
                    hits = alone.acquire(ask.user, ask.keys, now, states=ask.states)
                    self.compared += 1
                    self.hits += hits
                    if ready is not None and hits > ready:
                        violated(Invariant.HITS, f"{ask} of {tenant} hit {ready} at {now}, and {hits} of {pages} pages")
                case Stored(user, pieces, at, now):
                    alone.store(user, pieces, at, now)
                case Discard(user=user, key=key):
                    alone.discard(user, key)
                case Erased(user=erased):
                    alone.erase(erased)


def steal_a_block(monkeypatch: pytest.MonkeyPatch, *, always: bool = False) -> None:
    """Plant a bug: once in a cache's life, making room takes the youngest block of another tenant at its guarantee.

    `always` is each time, even when nothing had to go.
    """
    make_room = Cache._make_room
    robbed: list[Cache] = []

    def make_room_and_steal(
        self: Cache, tenant: Tenant[Block], user: UserId, pages: int, stamp: Stamp, parent: Block | None
    ) -> Refusal | int:
        made = make_room(self, tenant, user, pages, stamp, parent)
        others = [other for other in self.tenant_by_name.values() if other is not tenant]
        is_time = always or (made and self not in robbed)
        for other in others if is_time and not isinstance(made, Refusal) else ():
            blocks = [block for user in other.user_by_id.values() for block in user.block_by_key.values()]
            stolen = max((block for block in blocks if block.stamp is not None), key=_youth, default=None)
            if stolen is not None and other.used_pages <= other.guarantee_pages:
                self._doom(stolen)
                robbed.append(self)
                break
        return made

    monkeypatch.setattr(Cache, "_make_room", make_room_and_steal)


def withhold_the_guarantee(monkeypatch: pytest.MonkeyPatch, refusal: Refusal) -> None:
    """Plant a bug: once no page is free, nobody gives one up for a tenant below its guarantee."""
    make_room = Cache._make_room

    def make_room_or_withhold(
        self: Cache, tenant: Tenant[Block], user: UserId, pages: int, stamp: Stamp, parent: Block | None
    ) -> Refusal | int:
        if self.pool.free_pages < pages and tenant.used_pages + pages <= tenant.guarantee_pages:
            return refusal
        return make_room(self, tenant, user, pages, stamp, parent)

    monkeypatch.setattr(Cache, "_make_room", make_room_or_withhold)


def _youth(block: Block) -> Stamp:
    return (block.touched_at, -block.depth, block.serial)
