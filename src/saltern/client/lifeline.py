"""The lifeline: a worker's connection to the server, and the arena that it maps for as long as that lives.

      connect ──► hello, Welcome ──► map ──► Attached ──► populate, hand out uses
         ▲                                       │
         │ 50 ms … 1 s                           │ SessionEnded, or the server is gone
         │                                       ▼
      close ◄──── unmap ◄──── wait until every use is released

The order at the end matters. The server lets a session's leases fall once all its connections are closed, so
a worker closes its own only when nothing of it can touch the arena any more; and a server that was
restarted finds the memory of the old arena free as soon as its workers have drained.
"""

import ctypes
import fcntl
import logging
import mmap
import os
import select
import socket
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from saltern.client.sockets import ConnectionLost, forget_in_children, open_socket
from saltern.core.messages import Attached, Refused, Reply, SessionEnded, Welcome, WorkerHello
from saltern.wire import ProtocolError, client_wire, encode

log = logging.getLogger(__name__)

RETRY_SECONDS_MIN = 0.05
RETRY_SECONDS_MAX = 1.0
RETRY_SECONDS_REFUSED = 5.0
"""A refusal seldom heals by itself: another uid, another release, another engine of the same id."""

POPULATE_BYTES = 16 * 1024 * 1024
"""Populated at a time; takes some 3 ms, for which an Attached or SessionEnded may have to wait."""

_READ_BYTES = 64 * 1024
_FDS_MAX = 4  # one is expected; room for more so that surplus ones are seen, and closed


class Arena:
    """A mapping of the server's arena. `buffer` is all of it, `page_bytes` what extents count in."""

    def __init__(self, fd: int, *, arena_bytes: int, page_bytes: int) -> None:
        self._map = mmap.mmap(fd, arena_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._map.madvise(mmap.MADV_DONTDUMP)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._populated = 0
        self.buffer = memoryview(self._map)
        self.page_bytes = page_bytes
        self.uses = 0
        self.is_announced = False  # to `Lifeline.on_map`

    @property
    def populated(self) -> bool:
        """Tell whether this process has page table entries for all of the arena."""
        return self._populated >= len(self._map)

    def populate(self) -> bool:
        """Map the next pages that exist into this process, and tell whether there were any.

        Without this the first copy to or from each page runs at a third of the speed. Pages that the server has
        not touched are left alone: it knows how much memory there is, and a worker doesn't.
        """
        size = min(POPULATE_BYTES, len(self._map) - self._populated)
        address = ctypes.c_void_p(self._address + self._populated)
        resident = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        if _mincore(address, size, resident) or 0 in bytes(resident):
            return False
        if _madvise(address, size, _MADV_POPULATE_WRITE):
            log.debug("the arena is not populated ahead: %s", os.strerror(ctypes.get_errno()))
            self._populated = len(self._map)  # a kernel before 5.14; pages come as they are touched
            return False
        self._populated += size
        return True

    def unmap(self) -> bool:
        """Unmap, unless someone still has a view of the buffer."""
        try:
            self.buffer.release()
            self._map.close()
        except BufferError:
            return False
        return True


class Mapping:
    """One use of the arena: it stays mapped until this is released."""

    def __init__(self, lifeline: "Lifeline", arena: Arena) -> None:
        self.buffer = arena.buffer
        self.page_bytes = arena.page_bytes
        self._lifeline = lifeline
        self._arena: Arena | None = arena

    def release(self) -> None:
        """End the use; every view of `buffer` must be gone. May be called again, and from any thread."""
        arena, self._arena = self._arena, None
        if arena is not None:
            self._lifeline._release(arena)


class Lifeline:
    """A worker's connection, kept up by a thread of its own from `start()` to `close()`.

    `name` is the random name by which the worker's scheduler knows it. With `outlives_socket` the server waits for the
    end of this process before it reuses what was leased. `on_map` and `on_unmap` are called on that thread with
    an arena once it is handed out, and once it has drained, before it is unmapped; they must not raise.
    """

    def __init__(
        self,
        path: str,
        *,
        engine: str,
        name: bytes,
        rank: int,
        world_size: int,
        outlives_socket: bool = False,
        server_uid: int | None = None,
        on_map: Callable[[Arena], None] | None = None,
        on_unmap: Callable[[Arena], None] | None = None,
    ) -> None:
        self._path = path
        self._server_uid = server_uid
        self._hello = WorkerHello(
            engine=engine, name=name, rank=rank, world_size=world_size, outlives_socket=outlives_socket
        )
        self.on_map, self.on_unmap = on_map, on_unmap
        self._thread = threading.Thread(target=self._run, name="saltern-lifeline", daemon=True)
        self._said: set[str] = set()  # reasons that were logged already
        self._connection: _Connection | None = None
        self._closing = threading.Event()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # readable once closing

        # Shared with the threads that use the arena, and guarded by the condition.
        self._changed = threading.Condition()
        self._arena: Arena | None = None
        self._incarnation: bytes | None = None  # while uses are handed out
        self._ended_incarnation: bytes | None = None  # the last one, which doesn't come back

    def start(self) -> None:
        """Begin to connect, in the background."""
        forget_in_children(self)
        self._thread.start()

    def hold(self, incarnation: bytes, timeout: float = 0.0) -> Mapping | None:
        """Return a use of the arena that `incarnation` has leases in, or None if this worker isn't part of it.

        Waits up to `timeout` seconds: a scheduler may learn of the session's opening an instant earlier.
        """
        with self._changed:
            if incarnation == self._ended_incarnation:
                return None
            self._changed.wait_for(lambda: self._incarnation == incarnation or self._closing.is_set(), timeout)
            if self._incarnation != incarnation:
                return None
            assert self._arena is not None, "attached without an arena"
            self._arena.uses += 1
            return Mapping(self, self._arena)

    def close(self) -> None:
        """End the connection: waits until all uses are released and the arena is unmapped."""
        with self._changed:
            self._closing.set()
            self._incarnation = None
            self._changed.notify_all()
        if self._wake_fd < 0:
            return
        # Not a shutdown of the socket: the server must not see an end before the uses have drained.
        os.eventfd_write(self._wake_fd, 1)
        if self._thread.is_alive():
            self._thread.join()
        os.close(self._wake_fd)
        self._wake_fd = -1

    def forget_in_child(self) -> None:
        """Close the child's copy of the socket and, if nobody in the child looks at it, of the arena."""
        self._changed = threading.Condition()  # a thread that is not in the child may have held the old one
        self._closing.set()
        self._incarnation = None
        if self._wake_fd >= 0:
            os.close(self._wake_fd)
            self._wake_fd = -1
        if self._connection is not None:
            self._connection.close()
        if self._arena is not None:
            self._arena.unmap()

    def _release(self, arena: Arena) -> None:
        with self._changed:
            assert arena.uses > 0, "released a use of the arena that nobody held"
            arena.uses -= 1
            self._changed.notify_all()

    # Everything below runs on the lifeline's own thread.

    def _run(self) -> None:
        retry_seconds = 0.0
        while not self._closing.is_set():
            try:
                self._live()
                retry_seconds = RETRY_SECONDS_MIN
            except _RefusedError as refusal:
                self._say(logging.WARNING, f"the server refuses this worker: {refusal}")
                retry_seconds = RETRY_SECONDS_REFUSED
            except ConnectionLost as lost:
                self._say(logging.INFO, str(lost))
                retry_seconds = min(max(2 * retry_seconds, RETRY_SECONDS_MIN), RETRY_SECONDS_MAX)
            self._closing.wait(retry_seconds)

    def _live(self) -> None:
        """Connect, map, and hand out uses until the session ends.

        Returns if the worker was attached or closes; raises `ConnectionLost` or `_RefusedError` if it never was.
        """
        self._connection = connection = _Connection(open_socket(self._path, server_uid=self._server_uid), self._wake_fd)
        try:
            connection.send(self._hello)
            arena = self._map(connection)
            if arena is not None:
                try:
                    self._attend(connection, arena)
                finally:
                    self._unmap(arena)
        finally:
            self._connection = None
            connection.close()

    def _map(self, connection: "_Connection") -> Arena | None:
        """Wait for the Welcome and map the arena; None if closing."""
        message = connection.receive()
        match message:
            case None:
                return None
            case Refused(reason):
                raise _RefusedError(reason)
            case Welcome(arena_bytes, page_bytes):
                fd = connection.take_fd()
            case _:
                raise ConnectionLost(f"the server answered a hello with {type(message).__name__}")
        try:
            check_sealed(fd, arena_bytes)
            arena = Arena(fd, arena_bytes=arena_bytes, page_bytes=page_bytes)
        except (OSError, ValueError) as error:
            raise ConnectionLost(f"cannot map the arena of {arena_bytes} bytes: {error}") from None
        finally:
            os.close(fd)
        self._arena = arena
        return arena

    def _attend(self, connection: "_Connection", arena: Arena) -> None:
        """Hand out uses from Attached until the session ends, and populate the mapping meanwhile."""
        attached, wait_seconds = False, 0.0
        while True:
            if attached and not arena.populated and not connection.wait(wait_seconds):
                # Where the server has not been yet, follow it: it touches the arena in the same order.
                wait_seconds = 0.0 if arena.populate() else min(max(2 * wait_seconds, 0.01), 1.0)
                continue
            try:
                message = connection.receive()
            except ConnectionLost as lost:
                if not attached:
                    raise
                log.info("the session ended: %s", lost)
                return
            match message:
                case None:
                    return
                case Attached(incarnation):
                    attached = True
                    self._hand_out(incarnation)
                    self._announce(arena)
                case SessionEnded(reason):
                    log.info("the session ended: %s", reason)
                    return
                case Refused(reason):
                    raise _RefusedError(reason)
                case _:
                    raise ConnectionLost(f"the server sent a {type(message).__name__} on a lifeline")

    def _hand_out(self, incarnation: bytes) -> None:
        self._said.clear()
        with self._changed:
            if not self._closing.is_set():
                self._incarnation = incarnation
                self._changed.notify_all()

    def _announce(self, arena: Arena) -> None:
        """Tell of a mapping that is in use already: pinning it may take long, and copies need not wait for that."""
        arena.is_announced = True
        if self.on_map is not None:
            self.on_map(arena)

    def _unmap(self, arena: Arena) -> None:
        with self._changed:
            self._ended_incarnation, self._incarnation = self._incarnation, None
            self._changed.wait_for(lambda: not arena.uses)
        if arena.is_announced and self.on_unmap is not None:
            self.on_unmap(arena)
        self._arena = None
        if arena.unmap():
            return
        log.warning("a use of the arena was released with a view of it left: it stays mapped until that is gone")
        retry_seconds = RETRY_SECONDS_MIN
        while not arena.unmap():
            time.sleep(retry_seconds)
            retry_seconds = min(2 * retry_seconds, RETRY_SECONDS_MAX)

    def _say(self, level: int, reason: str) -> None:
        """Log each reason once, not at every attempt."""
        if reason not in self._said:
            self._said.add(reason)
            log.log(level, "%s", reason)


class _RefusedError(Exception):
    """The server turned this worker away; the text is its reason."""


class _Connection:
    """A lifeline's socket: messages in order, and the file descriptor that comes with one of them."""

    def __init__(self, connection: socket.socket, wake_fd: int) -> None:
        self._socket = connection
        self._wake_fd = wake_fd
        self._wire = client_wire()
        self._messages: deque[Reply] = deque()
        self._fds: list[int] = []
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._poll.register(wake_fd, select.POLLIN)

    def send(self, hello: WorkerHello) -> None:
        """Send all that a worker ever sends; a fresh socket has room for it."""
        with suppress(OSError):  # the server has closed; what it said before is still to be read
            self._socket.sendall(self._wire.preamble + encode(hello))

    def wait(self, seconds: float | None) -> bool:
        """Wait until there is something to receive, for `seconds` or for ever."""
        return bool(self._messages or self._poll.poll(None if seconds is None else seconds * 1000))

    def receive(self) -> Reply | None:
        """Wait for the next message and return it, or None when woken in order to close.

        Raises `ConnectionLost` at the end, `_RefusedError` if the two sides don't understand each other.
        """
        while not self._messages:
            if any(fd == self._wake_fd for fd, _ in self._poll.poll()):
                return None
            self._read()
        return self._messages.popleft()

    def take_fd(self) -> int:
        """Return the file descriptor that has come; the caller closes it."""
        if not self._fds:
            raise ConnectionLost("the server's welcome came without the arena")
        return self._fds.pop()

    def close(self) -> None:
        """Close the socket, and what came with it and was not taken."""
        self._socket.close()
        while self._fds:
            os.close(self._fds.pop())

    def _read(self) -> None:
        fds = array("i")
        try:
            data, ancillary, _, _ = self._socket.recvmsg(
                _READ_BYTES, socket.CMSG_SPACE(_FDS_MAX * fds.itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            raise ConnectionLost(f"the lifeline failed: {error.strerror}") from None
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        self._fds += fds
        if not data:
            raise ConnectionLost("the server closed the lifeline")
        try:
            self._messages += self._wire.feed(data)
        except ProtocolError as error:
            raise _RefusedError(str(error)) from None


def check_sealed(fd: int, arena_bytes: int) -> None:
    """Raise `ValueError` unless the arena stays as large as it is said to be: a shorter one ends us with SIGBUS."""
    wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & wanted != wanted or os.fstat(fd).st_size != arena_bytes:
        raise ValueError("it is not sealed, or of another size")


# madvise(2) and mincore(2) themselves: `mmap.madvise` keeps the interpreter's lock while pages are populated.
_libc = ctypes.CDLL(None, use_errno=True)
_madvise = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_mincore = _libc.mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_MADV_POPULATE_WRITE = 23
