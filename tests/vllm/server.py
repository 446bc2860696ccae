"""A server in memory: the real cache and the real wire, with a clock, delays and deaths that a test controls."""

import os
from collections import deque
from collections.abc import Iterable
from typing import Any

from saltern.client.control import ConnectionLost
from saltern.core.cache import Cache
from saltern.core.effects import (
    Close,
    Disconnected,
    Effect,
    Event,
    ForgetRecords,
    Gone,
    Logged,
    ReadRecord,
    Received,
    Send,
    WipePages,
    Work,
    WriteRecord,
)
from saltern.core.extents import Extent
from saltern.core.keys import SECRET_BYTES
from saltern.core.leases import ConnectionId
from saltern.core.messages import (
    DEFAULT_TENANT,
    NAME_BYTES,
    Attached,
    Commit,
    Refused,
    Reply,
    Request,
    SessionEnded,
    WorkerHello,
)
from saltern.core.tenants import NO_LIMITS, Limits
from saltern.wire import ProtocolError, client_wire, encode, server_wire

ROUND_TRIP_SECONDS = 100e-6


class Clock:
    """Simulated time, in seconds; it passes only where somebody waits or a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


class Line:
    """One control connection, with the calls of `saltern.client.control.Control`."""

    def __init__(self, server: "Server", connection: ConnectionId) -> None:
        self._server = server
        self.connection = connection
        self.is_closed = False
        self.backlog: deque[Request] = deque()  # of a frozen server
        self.coming: deque[tuple[float, Reply]] = deque()
        self.sent: list[Request] = []
        self._theirs, self._ours = server_wire(), client_wire()
        self._theirs.feed(self._ours.preamble)
        self._ours.feed(self._theirs.preamble)

    def send(self, message: Request) -> None:
        """Send over the real wire; raises `ConnectionLost` once the server is gone."""
        if self.is_closed:
            raise ConnectionLost("the server closed the connection")
        self.sent.append(message)
        try:
            self.backlog += self._theirs.feed(encode(message))
        except ProtocolError as error:
            self._server.hang_up(self, Refused(str(error)))
        self._server.serve(self)

    def receive(self, timeout: float = 0.0) -> list[Reply]:
        """Return what has arrived, letting up to `timeout` simulated seconds pass until something has."""
        self._server.serve(self)
        clock = self._server.clock
        if self.coming and self.coming[0][0] <= clock() + timeout:
            clock.now = max(clock.now, self.coming[0][0])
        elif not self.is_closed:
            clock.advance(timeout)
        replies: list[Reply] = []
        while self.coming and self.coming[0][0] <= clock():
            replies += self._ours.feed(encode(self.coming.popleft()[1]))
        if self.is_closed and not replies and not self.coming:
            raise ConnectionLost("the server closed the connection")
        return replies

    def close(self) -> None:
        """Close our end."""
        self._server.disconnect(self)

    def deliver(self, reply: Reply) -> None:
        """Put a reply on its way; none overtakes another."""
        due = self._server.clock() + self._server.reply_seconds
        self.coming.append((max(due, self.coming[-1][0]) if self.coming else due, reply))


class Server:
    """The cache, its connections, and the lifelines of one engine's workers."""

    def __init__(
        self,
        clock: Clock,
        *,
        pages: int,
        page_bytes: int,
        ranks: int,
        limits: Limits = NO_LIMITS,
        disk_pages: int = 0,
        disk_limits: Limits = NO_LIMITS,
    ) -> None:
        self.clock = clock
        self.reply_seconds = ROUND_TRIP_SECONDS
        self.is_frozen = False
        self.is_listening = True
        self.commits_seen: list[int] = []
        self.workers = tuple(os.urandom(NAME_BYTES) for _ in range(ranks))
        self.attached = b""  # the incarnation whose leases the workers may use
        self.lives = 0
        self.signing_secrets: tuple[bytes, ...] = ()  # a restart keeps them
        self._shape = (pages, page_bytes, limits, disk_pages, disk_limits)
        self._connections = 0
        self._lines: dict[ConnectionId, Line] = {}
        self._lifelines: set[ConnectionId] = set()
        self._start()

    def _start(self) -> None:
        self.secret = self._make_secret()
        self.cache = self._empty()
        self.lives += 1
        self.attach_workers()

    def _make_secret(self) -> bytes:
        return os.urandom(SECRET_BYTES)

    def _empty(self) -> Cache:
        pages, page_bytes, limits, disk_pages, disk_limits = self._shape
        return Cache(
            pages=pages,
            page_bytes=page_bytes,
            tenants={DEFAULT_TENANT: limits},
            disk_pages=disk_pages,
            disk_tenants={DEFAULT_TENANT: disk_limits},
            naming_secret=self.secret,
            signing_secrets=self.signing_secrets,
        )

    # What a test does to it

    def tell(self, event: Event) -> None:
        """Hand the cache an event that no connection sent."""
        self._handle(event)

    def attach_workers(self) -> None:
        """Have every worker open a lifeline, unless they have."""
        if self._lifelines:
            return
        for rank, name in enumerate(self.workers):
            self._connections += 1
            self._lifelines.add(self._connections)
            hello = WorkerHello("engine", name, rank, len(self.workers), outlives_socket=False)
            self._handle(Received(self._connections, hello))

    def lose_workers(self) -> None:
        """Close all lifelines: the session ends, and its leases fall with its control connection."""
        self.attached = b""
        lifelines, self._lifelines = self._lifelines, set()
        for connection in lifelines:
            self._handle(Disconnected(connection))
            self._handle(Gone(connection))

    def kill(self) -> None:
        """End the process: every connection breaks, nobody listens, and what was cached is gone."""
        for line in list(self._lines.values()):
            line.is_closed = True
            line.coming.clear()
        self._lines.clear()
        self._lifelines.clear()
        self.attached = b""
        self.is_listening = self.is_frozen = False
        self.cache = self._empty()

    def restart(self) -> None:
        """Kill the process and start another, with nothing cached and another secret."""
        self.kill()
        self.is_listening = True
        self._start()

    def thaw(self) -> None:
        """Serve all that came in while the server was frozen."""
        self.is_frozen = False
        for line in list(self._lines.values()):
            self.serve(line)

    def leases(self) -> int:
        """Return how many leases any session holds."""
        return sum(len(session.lease_by_id) for session in self.cache.sessions)

    # What its connections call

    def connect(self, path: str) -> Any:
        """Take a connection, as `Control.connect` does; raises `ConnectionLost`."""
        if not self.is_listening:
            raise ConnectionLost(f"no server listens on {path}")
        self._connections += 1
        line = self._lines[self._connections] = Line(self, self._connections)
        return line

    def serve(self, line: Line) -> None:
        """Take in what a line has sent."""
        while line.backlog and not self.is_frozen and line.connection in self._lines:
            message = line.backlog.popleft()
            if isinstance(message, Commit):
                self.before_commit(message)
            self._handle(Received(line.connection, message))

    def before_commit(self, commit: Commit) -> None:
        """Take note of a commit; an engine that knows what its bytes should be checks them here."""
        self.commits_seen.append(commit.lease)

    def hang_up(self, line: Line, last_words: Reply) -> None:
        """Close a connection from this side, saying why."""
        line.deliver(last_words)
        self.disconnect(line)

    def disconnect(self, line: Line) -> None:
        """Close a connection, whoever did."""
        line.is_closed = True
        if self._lines.pop(line.connection, None) is not None:
            self._handle(Disconnected(line.connection))
            self._handle(Gone(line.connection))

    def _handle(self, event: Event) -> None:
        self._carry_out(self.cache.handle(event, self.clock()))

    def _carry_out(self, asked: Iterable[Effect]) -> None:
        effects = deque(asked)
        while effects:
            match effects.popleft():
                case Send(connection, message) if connection in self._lifelines:
                    self._tell_worker(connection, message)
                case Send(connection, message):
                    if connection in self._lines:
                        self._lines[connection].deliver(message)
                case Close(connection, reason):
                    line = self._lines[connection]
                    assert len(line.sent) == 1, f"the engine broke the protocol: {reason}"  # more than a hello
                    self.disconnect(line)
                case WriteRecord() | ReadRecord() | ForgetRecords() as work:
                    self.perform(work)
                case WipePages(extent):
                    self.wipe(extent)
                case Logged():
                    pass

    def perform(self, work: Work) -> None:
        """Do what is asked of the disk; a server in memory has none."""
        raise AssertionError(f"there is no disk for {work}")

    def wipe(self, extent: Extent) -> None:
        """Overwrite pages of the arena, which has no bytes here."""

    def _tell_worker(self, connection: ConnectionId, message: Reply) -> None:
        match message:
            case Attached(incarnation):
                self.attached = incarnation
            case SessionEnded():
                # A worker closes its lifeline once it has drained, and comes back with a new one.
                self.attached = b""
                self._lifelines.discard(connection)
                self._handle(Disconnected(connection))
                self._handle(Gone(connection))
                if not self._lifelines:
                    self.attach_workers()
            case _:
                pass
