"""The player: puts a workload's requests to a core, as an engine does that is done with each before the next.

Every request is an `Acquire` of its prefix and a `Release`, then a `Reserve` and a `Commit` of what was missing.
Nothing is copied and nobody waits: what comes out are the core's own decisions. A block is one page of one byte here,
so that bytes are blocks. What is published is stored before the first request.
"""

import gc
from enum import Enum
from itertools import count
from typing import NamedTuple

from saltern.core.cache import Cache
from saltern.core.effects import Effect, PublicationAdded, Received, Send
from saltern.core.keys import USER_ID_BYTES, Key, UserId
from saltern.core.messages import (
    DEFAULT_TENANT,
    NAME_BYTES,
    PUBLIC_TENANT,
    Acquire,
    Acquired,
    Commit,
    PublicationId,
    Refusal,
    Release,
    Reply,
    Request,
    Reserve,
    Reserved,
    SchedulerHello,
    WorkerHello,
)
from saltern.core.tenants import Limits
from saltern.replay.workload import FLOOD, Workload

_LIFELINE, _CONTROL = 1, 2  # connections


class Policy(Enum):
    """Who gives way when the cache is full."""

    GUARANTEED = "guaranteed"  # whoever is furthest above its guarantee; what is free may be borrowed
    STATIC = "static"  # everybody in a share of its own, which nobody else may use
    LRU = "lru"  # whoever's block was used least recently: no tenants at all


class Setting(NamedTuple):
    """One way to run a cache. `quota` is the part of what can be promised that is promised, in equal parts."""

    policy: Policy
    capacity_blocks: int
    quota: float = 1.0

    def __str__(self) -> str:
        quota = "" if self.policy is Policy.LRU else f" and a quota of {self.quota:.0%}"
        return f"{self.policy.value} with {self.capacity_blocks} blocks{quota}"


def limits_of(workload: Workload, setting: Setting) -> dict[str, Limits]:
    """Return what each tenant is promised and may hold, in blocks.

    An eighth of the cache can't be promised: the core keeps it for blocks that are being read or written.
    """
    published = workload.published_blocks
    public = {PUBLIC_TENANT: Limits(guarantee_bytes=published)} if published else {}
    match setting.policy:
        case Policy.LRU:
            return public
        case Policy.GUARANTEED:
            promised = _share(setting.capacity_blocks * 7 // 8 - published, workload, setting)
            return public | {name: Limits(guarantee_bytes=promised) for name in workload.tenants}
        case Policy.STATIC:
            room = setting.capacity_blocks - published
            share = _share(room, workload, setting)
            limits = public | {name: Limits(limit_bytes=share) for name in workload.tenants}
            if workload.flooded:
                limits[FLOOD] = Limits(limit_bytes=room - share * len(workload.tenants))
            return limits


def why_no_room(workload: Workload, capacity_blocks: int) -> str | None:
    """Return why a capacity can't hold what is published, which the core promises room, or None if it can."""
    room = capacity_blocks - -(-capacity_blocks // 8)
    if workload.published_blocks <= room:
        return None
    return (
        f"{workload.published_blocks} blocks are published, and a capacity of {capacity_blocks} blocks can promise room"
        f" for {room}: publish fewer, or take a larger one"
    )


def _share(blocks: int, workload: Workload, setting: Setting) -> int:
    return int(max(blocks, 0) * setting.quota) // len(workload.tenants)


class Played(NamedTuple):
    """What came of one request.

    `found` leading blocks were there. Blocks `[allowed, …)` were not stored since its tenant had as many in flight as
    it may: a prompt may be longer than that.
    """

    found: int
    allowed: int


def play(workload: Workload, setting: Setting) -> list[Played]:
    """Return what came of each request, in the workload's order."""
    collects = gc.isenabled()
    gc.disable()  # as the server does: the core makes no cycles that outlive their use
    try:
        player = _Player(workload, setting)
        return [player.serve(*ask) for ask in workload.asks]
    finally:
        if collects:
            gc.enable()


class _Player:
    """A core and its one engine."""

    def __init__(self, workload: Workload, setting: Setting) -> None:
        self._cache = Cache(pages=setting.capacity_blocks, page_bytes=1, tenants=limits_of(workload, setting))
        self._shared = setting.policy is Policy.LRU
        self._public_blocks = workload.public_blocks
        self._requests = count(1)
        self._now = 0.0
        name = bytes(NAME_BYTES)
        self._tell(WorkerHello("replay", name, rank=0, world_size=1, outlives_socket=False), _LIFELINE)
        self._tell(SchedulerHello("replay", bytes(NAME_BYTES), (name,), block_bytes=1))
        for number, prefix in enumerate(workload.published):
            self._publish(PublicationId(number.to_bytes(USER_ID_BYTES)), prefix)

    def serve(self, at: float, tenant: str, user: UserId, keys: tuple[Key, ...]) -> Played:
        """Acquire what is there of a request, and store what is missing."""
        # Requests of one moment follow one another as well: the order of eviction tells them apart by their time.
        self._now = max(at, self._now + 1e-6)
        charged = DEFAULT_TENANT if self._shared else tenant
        public = keys[: self._public_blocks]  # here a block is called the same wherever it is published
        acquired = self._ask(Acquire(next(self._requests), user, keys, start=0, tenant=charged, public=public))
        assert isinstance(acquired, Acquired), "an Acquire is answered by Acquired"
        if acquired.lease:
            self._tell(Release(acquired.lease))
        allowed = len(keys)
        if acquired.ready < len(keys):
            request = next(self._requests)
            ask = Reserve(request, user, keys, acquired.ready, acquired.acquired_at, tenant=charged, public=public)
            reserved = self._store(ask)
            if reserved.refusal is Refusal.IN_FLIGHT:
                allowed = reserved.upto
        return Played(found=acquired.ready, allowed=allowed)

    def _publish(self, publication: PublicationId, keys: tuple[Key, ...]) -> None:
        self._cache.handle(PublicationAdded(publication, root=b"", blocks=len(keys)), self._now)
        ask = Reserve(next(self._requests), UserId(publication), keys, 0, self._now, tenant=PUBLIC_TENANT)
        assert self._store(ask).refusal is None, "the operator is promised room for all that is published"

    def _store(self, ask: Reserve) -> Reserved:
        reserved = self._ask(ask)
        assert isinstance(reserved, Reserved), "a Reserve is answered by Reserved"
        if reserved.lease:
            self._tell(Commit(reserved.lease))
        return reserved

    def _ask(self, message: Request) -> Reply:
        (reply,) = [effect.message for effect in self._tell(message) if isinstance(effect, Send)]
        return reply

    def _tell(self, message: Request, connection: int = _CONTROL) -> list[Effect]:
        return self._cache.handle(Received(connection, message), self._now)
