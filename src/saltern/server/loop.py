"""The loop: the one thread that owns the cache, and the connections that it serves.

    epoll ──► read ≤ 64 KiB ──► wire ──► Received ──► Cache.handle ──► effects ──► outgoing ──► write

How a connection ends depends on who ends it, because what a worker holds may be given to others only when it
no longer touches the arena:

    OPEN ── the peer closes ───────────────────────────────► Disconnected, Gone
      │                                                              ▲
      ├─ Close: what was sent before goes out first ─► FLUSHING      │ the peer closes its end
      │                                                   │          │
      └─ it does not read what we send ───────────────────┴─► PARTED │   Disconnected when it begins
                                                              └──────┘

Other threads have the loop do something between two turns by `call()`, and handle an event by `tell()`; nothing else of
it is theirs to touch. The disk tier does beside the loop what takes time, and tells what came of it.

Only lifelines are PARTED; other connections are closed at once. `Gone` of a worker whose device may outlive its socket
waits for the end of its process, of which a pidfd tells, or for the same worker's next hello.
"""

import gc
import logging
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from enum import Enum
from itertools import count
from threading import Lock
from typing import Any, TypeVar

from saltern.core.cache import Cache
from saltern.core.effects import (
    Close,
    Disconnected,
    Effect,
    Event,
    ForgetRecords,
    Gone,
    KeepPublication,
    Logged,
    ReadRecord,
    Received,
    Send,
    Tick,
    WipePages,
    WriteRecord,
)
from saltern.core.leases import ConnectionId
from saltern.core.messages import Refused, Reply, Request, WorkerHello
from saltern.server.arena import Arena
from saltern.server.listener import Listener, Peer
from saltern.server.logs import log_decision
from saltern.server.store import Erased
from saltern.tiers.disk import DiskTier, Restored
from saltern.wire import FRAME_BYTES_MAX, ProtocolError, encode, server_wire

log = logging.getLogger(__name__)

READ_BYTES = 64 * 1024
"""Read from a connection before others have their turn: at most some thousand messages."""

TURN_SECONDS = 0.002
"""A connection's messages are handled for this long before others have their turn."""

OUTGOING_BYTES_MAX = 2 * FRAME_BYTES_MAX
"""Most bytes kept for a peer that does not read. Beyond it the connection is ended, and the engine starts anew."""

LINGER_SECONDS = 1.0
"""How long a refused peer may take to read why."""

ACCEPT_RETRY_SECONDS = 1.0
"""How long connections wait once the process is out of file descriptors."""

TOUCHED_SECONDS = 30.0
"""How often the disk tier is told what was used: what a crash makes it forget."""

_TICK_SECONDS = 0.25  # while something waits for the clock
_WAIT_SECONDS_MAX = 86_400.0


_Result = TypeVar("_Result")


class LoopEndedError(Exception):
    """The loop has ended, and does nothing any more."""


class _State(Enum):
    OPEN = "open"
    FLUSHING = "flushing"
    PARTED = "parted"
    CLOSED = "closed"


class _Connection:
    """A socket, what came in and is not handled yet, and what is still to go out."""

    def __init__(self, id_: ConnectionId, connection: socket.socket, peer: Peer) -> None:
        self.id = id_
        self.socket = connection
        self.peer = peer
        self.wire = server_wire()
        self.incoming: deque[Request] = deque()
        self.outgoing = bytearray(self.wire.preamble)
        self.arena_at: int | None = None  # which byte of `outgoing` the arena's descriptor goes with
        self.state = _State.OPEN
        self.flush_until = 0.0
        self.worker: bytes | None = None  # the name, on a lifeline
        self.pidfd: int | None = None  # of a worker whose device may still write when its socket is closed
        self.polled = select.EPOLLIN

    def queue(self, message: Reply, *, with_arena: bool) -> None:
        """Put a message behind what is still to go out."""
        if with_arena:
            assert self.arena_at is None, "one connection gets the arena once"
            self.arena_at = len(self.outgoing)
        self.outgoing += encode(message)

    def flush(self, arena_fd: int) -> None:
        """Send what the socket takes. Raises `OSError` when nobody will ever read the rest."""
        while self.outgoing:
            try:
                if self.arena_at == 0:
                    sent = socket.send_fds(self.socket, [self.outgoing], [arena_fd])
                    self.arena_at = None
                else:
                    # Up to the byte that the descriptor goes with.
                    with memoryview(self.outgoing) as view:
                        sent = self.socket.send(view[: self.arena_at])
            except BlockingIOError:
                return
            del self.outgoing[:sent]
            if self.arena_at is not None:
                self.arena_at -= sent


class Loop:
    """Serves `listener`'s connections from `cache` until `stop()`; only `uids` may connect."""

    def __init__(
        self, cache: Cache, arena: Arena, listener: Listener, *, uids: frozenset[int], connections_max: int
    ) -> None:
        self._cache = cache
        self._arena = arena
        self._listener = listener
        self._uids = uids
        self._connections_max = connections_max
        self._ids = count(1)
        self._connection_by_fd: dict[int, _Connection] = {}
        self._connection_by_id: dict[ConnectionId, _Connection] = {}
        self._ended_by_pidfd: dict[int, _Connection] = {}  # closed, but the process behind it may still write
        self._events: deque[Event] = deque()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()  # of other threads
        self._calls_lock = Lock()
        self._told: deque[Event] = deque()  # by other threads; as many as the cache has in flight on the disk
        self._disk: DiskTier | None = None
        self._touched_at = 0.0  # when the disk tier shall be told next what was used
        self._ended = False
        self._unhandled: dict[ConnectionId, _Connection] = {}  # with messages left over from their last turn
        self._unflushed: dict[ConnectionId, _Connection] = {}  # with messages of this turn to send
        self._flushing: dict[ConnectionId, _Connection] = {}
        self._accepts_again_at: float | None = None  # while the process is out of descriptors
        self._stopping = False
        self._is_woken_by_signals = False
        self._buffer = bytearray(READ_BYTES)
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(listener.socket, select.EPOLLIN)
        self._epoll.register(self._wake_receiver, select.EPOLLIN)

    def stop(self) -> None:
        """Make `run()` return; may be called from another thread or a signal handler."""
        self._stopping = True
        self._wake()

    def call(self, function: Callable[[], _Result]) -> _Result:
        """Have the loop run a function between two turns, and return what it returns.

        For other threads, which wait meanwhile. Raises `LoopEndedError` when the loop has ended.
        """
        future: Future[_Result] = Future()
        with self._calls_lock:
            if self._ended:
                raise LoopEndedError
            self._calls.append((future, function))
        self._wake()
        return future.result()

    def tell(self, event: Event) -> None:
        """Have the cache decide about an event that happened on another thread; does not wait for that."""
        self._told.append(event)
        self._wake()

    def use_disk(self, disk: DiskTier, erased: Sequence[Erased]) -> Restored:
        """Take up what is on the disk, before `run()`, and have the disk tier do what the cache asks of the disk.

        `erased` names whom earlier servers have erased. Returns what was found. Raises `DiskError`.
        """
        assert self._disk is None, "there is one disk tier"
        now = time.monotonic()
        gc.disable()  # 100,000 records take half as long without collections, which find nothing
        try:
            gone = [(tenant, user) for tenant, user, for_good in erased if user is not None and for_good]
            restored = disk.restore(now, gone)
            effects = self._cache.restore(restored.records, erased, now, restored.publications)
        finally:
            gc.enable()
        self._disk, self._touched_at = disk, now + TOUCHED_SECONDS
        disk.start()
        for effect in effects:
            self._perform(effect)
        return restored

    def handle(self, *events: Event) -> None:
        """Let the cache decide about events that are no peer's; on the loop's own thread, or before it runs."""
        for event in events:
            self._handle(event)

    def stop_on_signals(self) -> None:
        """Stop at SIGTERM and SIGINT, also while waiting.

        The interpreter itself writes to the wake-up socket: a signal that comes right before epoll begins to wait
        would otherwise be noticed only when it ends.
        """
        signal.set_wakeup_fd(self._wake_sender.fileno(), warn_on_full_buffer=False)
        self._is_woken_by_signals = True
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())

    def run(self) -> None:
        """Serve until stopped, then close everything."""
        # A collection walks a million blocks for 0.1 s and finds nothing: the core leaves no cycles behind.
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            while not self._stopping:
                self._turn()
        finally:
            gc.enable()
            self._close()

    def _turn(self) -> None:
        waits_for_clock = bool(self._flushing) or self._accepts_again_at is not None
        for fd, happened in self._epoll.poll(self._wait_seconds(waits_for_clock=waits_for_clock)):
            connection = self._connection_by_fd.get(fd)
            if connection is not None:
                if happened & select.EPOLLOUT:
                    self._flush(connection)
                if happened & ~select.EPOLLOUT:
                    self._read(connection)
            elif fd in self._ended_by_pidfd:
                self._process_ended(fd)
            elif fd == self._listener.socket.fileno():
                self._accept()
            elif fd == self._wake_receiver.fileno():
                self._wake_up()
        for connection in list(self._unhandled.values()):
            self._serve(connection)
            self._flush_all()
        if waits_for_clock:
            self._look_at_clock(time.monotonic())
        due_at = self._cache.due_at
        if due_at is not None and due_at <= time.monotonic():
            self._handle(Tick())  # one bounded step a turn, so that messages come in between
        if self._disk is not None and self._touched_at <= time.monotonic():
            # Some at a time as well.
            self._touched_at = time.monotonic() + (0.0 if self._note_touched(self._disk) else TOUCHED_SECONDS)
        self._flush_all()

    def _wait_seconds(self, *, waits_for_clock: bool) -> float | None:
        """Return how long to wait for the sockets: until something is due, or None for as long as it takes."""
        if self._unhandled or self._stopping:
            return 0.0
        due_at = self._cache.due_at
        waits = [_TICK_SECONDS] if waits_for_clock else []
        if due_at is not None:
            # A day at most: epoll counts milliseconds in 32 bits.
            waits.append(min(max(due_at - time.monotonic(), 0.0), _WAIT_SECONDS_MAX))
        if self._disk is not None:
            waits.append(max(self._touched_at - time.monotonic(), 0.0))
        return min(waits, default=None)

    def _wake(self) -> None:
        with suppress(OSError):  # woken already, or closed
            self._wake_sender.send(b"\0")

    def _wake_up(self) -> None:
        """Do what other threads want."""
        with suppress(BlockingIOError):
            self._wake_receiver.recv(4096)
        until = time.monotonic() + TURN_SECONDS
        for _ in range(len(self._told)):  # what is told meanwhile wakes the loop anew, after messages had their turn
            self._handle(self._told.popleft())
            if time.monotonic() > until:
                self._wake()
                break
        while self._calls:
            future, function = self._calls.popleft()
            future.set_result(function())

    def _note_touched(self, disk: DiskTier) -> bool:
        """Tell the disk tier what was used lately, some of it, and return whether there was anything."""
        touched = self._cache.disk.take_touched()
        if touched:
            disk.note_touched(touched, time.monotonic())
        return bool(touched)

    # Connections

    def _accept(self) -> None:
        try:
            accepted = self._listener.accept()
        except OSError as error:
            # Out of descriptors or memory. Not polled for a while: it would be ready again at once, for ever.
            log.error("cannot accept a connection, it waits: %s", error.strerror)
            self._epoll.unregister(self._listener.socket)
            self._accepts_again_at = time.monotonic() + ACCEPT_RETRY_SECONDS
            return
        if accepted is None:
            return
        connection = _Connection(next(self._ids), *accepted)
        self._connection_by_fd[connection.socket.fileno()] = connection
        self._connection_by_id[connection.id] = connection
        self._epoll.register(connection.socket, connection.polled)
        uid = connection.peer.uid
        if uid not in self._uids:
            allowed = ", ".join(map(str, sorted(self._uids)))
            self._refuse(connection, f"uid {uid} may not use this server, only {allowed}: see server.allowed_uids")
        elif len(self._connection_by_fd) > self._connections_max:
            self._refuse(connection, f"the server has its most connections, {self._connections_max}")
        self._flush(connection)

    def _read(self, connection: _Connection) -> None:
        """Take bytes of one connection; while some of its messages are unhandled it has to wait."""
        if connection.incoming:
            return
        try:
            size = connection.socket.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            size = 0  # reset: closed with something of ours unread
        if not size:
            self._end(connection)
        elif connection.state is _State.OPEN:
            with memoryview(self._buffer) as view:
                try:
                    connection.incoming += connection.wire.feed(view[:size])
                except ProtocolError as error:
                    self._refuse(connection, str(error))
                    self._flush(connection)
            if connection.incoming:
                self._unhandled[connection.id] = connection

    def _serve(self, connection: _Connection) -> None:
        """Handle a connection's messages until they are all done or its turn is over."""
        until = time.monotonic() + TURN_SECONDS
        while connection.incoming and connection.state is _State.OPEN:
            message = connection.incoming.popleft()
            if isinstance(message, WorkerHello) and not self._watch(connection, message):
                break
            self._handle(Received(connection.id, message))
            if time.monotonic() > until:
                break
        if not connection.incoming or connection.state is not _State.OPEN:
            connection.incoming.clear()
            self._unhandled.pop(connection.id, None)

    def _watch(self, connection: _Connection, hello: WorkerHello) -> bool:
        """Learn when a worker can no longer touch the arena, or refuse it."""
        connection.worker = hello.name
        for pidfd in [pidfd for pidfd, ended in self._ended_by_pidfd.items() if ended.worker == hello.name]:
            self._process_ended(pidfd)  # it has drained, or it would not be here again
        if hello.outlives_socket and connection.pidfd is None:
            try:
                connection.pidfd = os.pidfd_open(connection.peer.pid)
            except OSError as error:
                self._refuse(
                    connection,
                    f"the server cannot watch the worker's process {connection.peer.pid}: {error.strerror}."
                    " Run both in one pid namespace",
                )
                self._unflushed[connection.id] = connection
                return False
        return True

    def _refuse(self, connection: _Connection, reason: str) -> None:
        log.warning("refused pid %d of uid %d: %s", connection.peer.pid, connection.peer.uid, reason)
        connection.queue(Refused(reason), with_arena=False)
        self._close_when_flushed(connection)

    def _close_when_flushed(self, connection: _Connection) -> None:
        connection.state = _State.FLUSHING
        connection.flush_until = time.monotonic() + LINGER_SECONDS
        self._flushing[connection.id] = connection

    def _flush_all(self) -> None:
        while self._unflushed:
            self._flush(self._unflushed.popitem()[1])

    def _flush(self, connection: _Connection) -> None:
        if connection.state in (_State.PARTED, _State.CLOSED):
            return
        try:
            connection.flush(self._arena.fd)
        except OSError:
            # Nobody reads any more. What the peer sent before it closed is still to be read, and so is its end.
            connection.outgoing.clear()
            connection.arena_at = None
        polled = select.EPOLLIN | (select.EPOLLOUT if connection.outgoing else 0)
        if polled != connection.polled:
            connection.polled = polled
            self._epoll.modify(connection.socket, polled)
        if connection.state is _State.FLUSHING and not connection.outgoing:
            self._part(connection)

    def _part(self, connection: _Connection) -> None:
        """End a connection from our side; a worker still has the arena until it closes its own."""
        if connection.worker is None:
            self._end(connection)
            return
        connection.state = _State.PARTED
        self._forget_work(connection)
        self._epoll.modify(connection.socket, select.EPOLLIN)
        try:
            connection.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self._end(connection)  # the peer was faster
            return
        self._handle(Disconnected(connection.id))

    def _end(self, connection: _Connection) -> None:
        """Close a connection whose peer is gone, or can't have the arena."""
        was_told = connection.state is _State.PARTED
        connection.state = _State.CLOSED
        self._forget_work(connection)
        del self._connection_by_fd[connection.socket.fileno()]
        del self._connection_by_id[connection.id]
        self._epoll.unregister(connection.socket)
        connection.socket.close()
        if not was_told:
            self._handle(Disconnected(connection.id))
        if connection.pidfd is None:
            self._handle(Gone(connection.id))
        else:
            self._ended_by_pidfd[connection.pidfd] = connection
            self._epoll.register(connection.pidfd, select.EPOLLIN)

    def _forget_work(self, connection: _Connection) -> None:
        connection.incoming.clear()
        connection.outgoing.clear()
        connection.arena_at = None
        self._unhandled.pop(connection.id, None)
        self._unflushed.pop(connection.id, None)
        self._flushing.pop(connection.id, None)

    def _process_ended(self, pidfd: int) -> None:
        self._epoll.unregister(pidfd)
        os.close(pidfd)
        self._handle(Gone(self._ended_by_pidfd.pop(pidfd).id))

    def _look_at_clock(self, now: float) -> None:
        for connection in [connection for connection in self._flushing.values() if connection.flush_until < now]:
            self._part(connection)
        if self._accepts_again_at is not None and self._accepts_again_at < now:
            self._accepts_again_at = None
            self._epoll.register(self._listener.socket, select.EPOLLIN)

    # The cache

    def _handle(self, event: Event) -> None:
        """Let the cache decide about an event, and about those that its effects bring about."""
        self._events.append(event)
        if len(self._events) > 1:
            return  # called from below: the loop there comes to it
        while self._events:
            for effect in self._cache.handle(self._events[0], time.monotonic()):
                self._perform(effect)
            self._events.popleft()

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Logged():
                log_decision(effect)
            case Send(id_, message, with_arena):
                connection = self._connection_by_id.get(id_)
                if connection is not None and connection.state is _State.OPEN:
                    self._send(connection, message, with_arena=with_arena)
            case Close(id_, reason):
                connection = self._connection_by_id.get(id_)
                if connection is not None and connection.state is _State.OPEN:
                    log.warning("closing the connection of pid %d: %s", connection.peer.pid, reason)
                    self._close_when_flushed(connection)
                    self._unflushed[id_] = connection
            case WriteRecord() | ReadRecord() | ForgetRecords() | KeepPublication():
                assert self._disk is not None, "the cache asks something of a disk that isn't there"
                self._disk.perform(effect)
            case WipePages(extent):
                page_bytes = self._cache.page_bytes
                for run in extent:
                    self._arena.wipe(offset=run.start * page_bytes, length=run.count * page_bytes)

    def _send(self, connection: _Connection, message: Reply, *, with_arena: bool) -> None:
        try:
            connection.queue(message, with_arena=with_arena)
        except ProtocolError as error:
            log.error("closing the connection of pid %d: %s", connection.peer.pid, error)
            self._part(connection)
            return
        self._unflushed[connection.id] = connection
        if len(connection.outgoing) > OUTGOING_BYTES_MAX:
            self._flush(connection)
        if len(connection.outgoing) > OUTGOING_BYTES_MAX:
            log.warning("closing the connection of pid %d: it does not read what is sent to it", connection.peer.pid)
            self._part(connection)

    def _close(self) -> None:
        with self._calls_lock:
            self._ended = True
        for future, _ in self._calls:
            future.set_exception(LoopEndedError())
        while self._disk is not None and self._note_touched(self._disk):
            pass
        self._listener.close()
        for connection in self._connection_by_fd.values():
            connection.socket.close()
            if connection.pidfd is not None:
                os.close(connection.pidfd)
        for pidfd in self._ended_by_pidfd:
            os.close(pidfd)
        self._epoll.close()
        if self._is_woken_by_signals:
            signal.set_wakeup_fd(-1)
        self._wake_receiver.close()
        self._wake_sender.close()
