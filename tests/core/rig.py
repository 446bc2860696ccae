"""A rig around one cache: engines in a line each, prompts as words of one letter a block, and a clock that ticks."""

from hashlib import blake2b
from itertools import count
from typing import TypeVar

from saltern.core.cache import Cache
from saltern.core.effects import Close, Disconnected, Effect, Event, Gone, Logged, Received, Send
from saltern.core.keys import Key, UserId
from saltern.core.leases import ConnectionId
from saltern.core.messages import (
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


class Rig:
    """A cache of `pages` pages of 10 bytes, and whoever talks to it. Every event takes a second."""

    def __init__(self, *, pages: int = 8, limits: Limits = NO_LIMITS, secret: bytes = b"") -> None:
        self.cache = Cache(pages=pages, page_bytes=PAGE_BYTES, limits=limits, naming_secret=secret)
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

    def scheduler(self, engine: str, workers: list[bytes], *, block_bytes: int = PAGE_BYTES) -> ConnectionId:
        """Say a scheduler's hello."""
        connection = self.connect()
        names = tuple(name.ljust(16, b".") for name in workers)
        incarnation = connection.to_bytes(16, "little")
        self.say(connection, SchedulerHello(engine, incarnation, names, block_bytes))
        return connection

    def engine(self, name: str = "engine", *, block_bytes: int = PAGE_BYTES) -> ConnectionId:
        """Open a session with one worker, and return its control connection."""
        self.worker(name.encode())
        return self.scheduler(name, [name.encode()], block_bytes=block_bytes)

    # Verbs

    def lookup(self, engine: ConnectionId, user: UserId, prompt: str) -> int:
        """Return how many blocks a lookup finds."""
        self.say(engine, Lookup(next(self._requests), user, keys(prompt)))
        (answer,) = self.sent(LookedUp, engine)
        return answer.ready

    def acquire(self, engine: ConnectionId, user: UserId, prompt: str, start: int = 0) -> Acquired:
        """Acquire a prefix."""
        self.say(engine, Acquire(next(self._requests), user, keys(prompt), start))
        (answer,) = self.sent(Acquired, engine)
        return answer

    def reserve(
        self, engine: ConnectionId, user: UserId, prompt: str, start: int = 0, *, at: float | None = None
    ) -> Reserved:
        """Reserve room, for a request that was acquired `at` (now by default)."""
        at = self.now + 1.0 if at is None else at
        self.say(engine, Reserve(next(self._requests), user, keys(prompt), start, at))
        (answer,) = self.sent(Reserved, engine)
        return answer

    def store(self, engine: ConnectionId, user: UserId, prompt: str, *, at: float | None = None) -> Reserved:
        """Reserve and commit what is missing of a prompt."""
        answer = self.reserve(engine, user, prompt, at=at)
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
