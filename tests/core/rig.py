"""A rig around one cache: engines in a line each, prompts as words of one letter a block, and a clock that ticks."""

from collections.abc import Mapping
from hashlib import blake2b
from itertools import count
from typing import TypeVar

from saltern.core.cache import NO_TENANTS, Cache
from saltern.core.effects import Close, Disconnected, Effect, Event, Gone, Logged, Received, Send
from saltern.core.keys import Key, UserId
from saltern.core.leases import ConnectionId
from saltern.core.messages import (
    DEFAULT_TENANT,
    Acquire,
    Acquired,
    Commit,
    LookedUp,
    Lookup,
    Release,
    Reply,
    Request,
    Reserve,
    Reserved,
    SchedulerHello,
    WorkerHello,
)
from saltern.core.tenants import NO_LIMITS, Limits

PAGE_BYTES = 10

ALICE = UserId(b"alice".ljust(16, b"."))
BOB = UserId(b"bob".ljust(16, b"."))
CAROL = UserId(b"carol".ljust(16, b"."))

Answer = TypeVar("Answer", bound=Reply)


def keys(prompt: str) -> tuple[Key, ...]:
    """Name the blocks of a prompt, one letter a block; equal for all users, which the cache must not rely on."""
    return tuple(Key(blake2b(prompt[: end + 1].encode(), digest_size=32).digest()) for end in range(len(prompt)))


def states(prompt: str) -> tuple[Key, ...]:
    """Name the state after each block of a prompt."""
    return tuple(Key(blake2b(key, digest_size=32, person=b"state").digest()) for key in keys(prompt))


class Rig:
    """A cache of `pages` pages of 10 bytes, and whoever talks to it. Every event takes a second."""

    def __init__(
        self,
        *,
        pages: int = 8,
        limits: Limits = NO_LIMITS,
        tenants: Mapping[str, Limits] = NO_TENANTS,
        in_flight_max_bytes: int | None = None,
        disk_pages: int = 0,
        disk_tenants: Mapping[str, Limits] = NO_TENANTS,
        secret: bytes = b"",
    ) -> None:
        self.cache = Cache(
            pages=pages,
            page_bytes=PAGE_BYTES,
            tenants={DEFAULT_TENANT: limits, **tenants},
            in_flight_max_bytes=in_flight_max_bytes,
            disk_pages=disk_pages,
            disk_tenants=disk_tenants,
            naming_secret=secret,
        )
        self.now = 0.0
        self.effects: list[Effect] = []
        self._connections = count(1)
        self._requests = count(1)

    def connect(self) -> ConnectionId:
        """Return a connection that has said nothing yet."""
        return next(self._connections)

    def handle(self, event: Event) -> list[Effect]:
        """Hand one event to the cache, a second after the last."""
        self.now += 1.0
        self.effects = self.cache.handle(event, self.now)
        return self.effects

    def say(self, connection: ConnectionId, message: Request) -> None:
        """Send a message; what came of it is in `effects`."""
        self.handle(Received(connection, message))

    def hang_up(self, connection: ConnectionId) -> None:
        """Close a connection with nothing behind it that could outlive it."""
        self.handle(Disconnected(connection))
        disconnected = self.effects
        self.handle(Gone(connection))
        self.effects = disconnected + self.effects

    def sent(self, kind: type[Answer], connection: ConnectionId | None = None) -> list[Answer]:
        """Return what the last event sent, of one kind, to one connection if given."""
        sends = [effect for effect in self.effects if isinstance(effect, Send)]
        messages = [send.message for send in sends if connection in (None, send.connection)]
        return [message for message in messages if isinstance(message, kind)]

    @property
    def closed(self) -> list[Close]:
        """Return what the last event closed."""
        return [effect for effect in self.effects if isinstance(effect, Close)]

    @property
    def logged(self) -> list[Logged]:
        """Return what the last event logged."""
        return [effect for effect in self.effects if isinstance(effect, Logged)]

    # Engines

    def worker(self, name: bytes, rank: int = 0, world_size: int = 1, *, outlives_socket: bool = False) -> ConnectionId:
        """Attach a lifeline."""
        connection = self.connect()
        self.say(connection, WorkerHello("engine", name.ljust(16, b"."), rank, world_size, outlives_socket))
        return connection

    def scheduler(
        self, engine: str, workers: list[bytes], *, block_bytes: int = PAGE_BYTES, state_bytes: int = 0
    ) -> ConnectionId:
        """Say a scheduler's hello."""
        connection = self.connect()
        names = tuple(name.ljust(16, b".") for name in workers)
        incarnation = connection.to_bytes(16, "little")
        self.say(connection, SchedulerHello(engine, incarnation, names, block_bytes, state_bytes))
        return connection

    def engine(self, name: str = "engine", *, block_bytes: int = PAGE_BYTES, state_bytes: int = 0) -> ConnectionId:
        """Open a session with one worker, and return its control connection."""
        self.worker(name.encode())
        return self.scheduler(name, [name.encode()], block_bytes=block_bytes, state_bytes=state_bytes)

    # Verbs

    def lookup(self, engine: ConnectionId, user: UserId, prompt: str, *, in_state: bool = False) -> int:
        """Return how many blocks a lookup finds, of a prefix that ends in a state if so wanted."""
        self.say(engine, Lookup(next(self._requests), user, keys(prompt), states(prompt) if in_state else ()))
        (answer,) = self.sent(LookedUp, engine)
        return answer.ready

    def acquire(
        self, engine: ConnectionId, user: UserId, prompt: str, start: int = 0, *, in_state: bool = False
    ) -> Acquired:
        """Acquire a prefix, one that ends in a state if so wanted."""
        wanted = states(prompt) if in_state else ()
        self.say(engine, Acquire(next(self._requests), user, keys(prompt), start, wanted))
        (answer,) = self.sent(Acquired, engine)
        return answer

    def reserve(
        self,
        engine: ConnectionId,
        user: UserId,
        prompt: str,
        start: int = 0,
        *,
        at: float | None = None,
        in_state: bool = False,
        tenant: str = DEFAULT_TENANT,
        began_at: float | None = None,
    ) -> Reserved:
        """Reserve room, also for the state at the end if so wanted, for a request acquired `at` (now by default)."""
        at = self.now + 1.0 if at is None else at
        began_at = self.now + 1.0 if began_at is None else began_at
        wanted = keys(prompt) + (states(prompt)[-1:] if in_state else ())
        request = next(self._requests)
        self.say(engine, Reserve(request, user, wanted, start, at, in_state, tenant, began_at=began_at))
        (answer,) = self.sent(Reserved, engine)
        return answer

    def store(
        self,
        engine: ConnectionId,
        user: UserId,
        prompt: str,
        *,
        at: float | None = None,
        in_state: bool = False,
        tenant: str = DEFAULT_TENANT,
    ) -> Reserved:
        """Reserve and commit what is missing of a prompt, and of the state at its end if so wanted."""
        answer = self.reserve(engine, user, prompt, at=at, in_state=in_state, tenant=tenant)
        if answer.lease:
            self.say(engine, Commit(answer.lease))
        return answer

    def touch(self, engine: ConnectionId, user: UserId, prompt: str) -> int:
        """Acquire and release at once; return how many blocks were there."""
        answer = self.acquire(engine, user, prompt)
        if answer.lease:
            self.say(engine, Release(answer.lease))
        return answer.ready

    @property
    def used_pages(self) -> int:
        """Return how many pages are not free."""
        return self.cache.pool.pages - self.cache.pool.free_pages
