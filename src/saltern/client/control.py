"""The control connection: a scheduler's line to the server, without a thread and without waiting."""

import ctypes
import errno
import math
import os
import select
import time

from saltern.client.sockets import ConnectionLost, forget_in_children, open_socket
from saltern.core.messages import Refused, Reply, Request
from saltern.wire import FRAME_BYTES_MAX, ProtocolError, client_wire, encode

__all__ = ["OUTGOING_BYTES_MAX", "ConnectionLost", "Control"]

OUTGOING_BYTES_MAX = 2 * FRAME_BYTES_MAX
"""Most bytes kept for a server that doesn't read. When they are full the session ends: a release that were
dropped instead would pin its blocks for ever."""

_READ_BYTES = 256 * 1024


class Control:
    """A connection that is used from one thread. Whatever ends it is a `ConnectionLost`; it is then closed."""

    def __init__(self, path: str, *, server_uid: int | None = None) -> None:
        self._socket = open_socket(path, server_uid=server_uid)
        self._path = path
        self._wire = client_wire()
        self._outgoing = bytearray(self._wire.preamble)
        forget_in_children(self)

    @classmethod
    def connect(cls, path: str, *, server_uid: int | None = None) -> "Control":
        """Connect to the server's socket. Never waits: raises `ConnectionLost` if nobody takes the connection."""
        return cls(path, server_uid=server_uid)

    def send(self, message: Request) -> None:
        """Send a message, or as much of it as the socket takes now; the rest follows with the next call."""
        try:
            self._outgoing += encode(message)
        except ProtocolError as error:
            raise self._end(str(error)) from None
        self._flush()
        if len(self._outgoing) > OUTGOING_BYTES_MAX:
            raise self._end(f"the server on {self._path} has not read {len(self._outgoing)} bytes")

    def receive(self, timeout: float = 0.0) -> list[Reply]:
        """Return the replies that are there, waiting up to `timeout` seconds for at least one."""
        deadline = time.monotonic() + timeout
        while True:
            replies, ended = self._read()  # before anything is sent: what the server said last explains a failure
            if replies:
                return replies
            if ended:
                raise self._end(f"the server on {self._path} closed the connection")
            self._flush()
            wait_seconds = deadline - time.monotonic()
            if wait_seconds <= 0:
                return []
            events = select.POLLIN | (select.POLLOUT if self._outgoing else 0)
            _wait(self._socket.fileno(), events, wait_seconds)

    def close(self) -> None:
        """Close the connection; the server lets all leases of the session fall when its workers are gone too."""
        self._socket.close()
        self._outgoing.clear()

    def forget_in_child(self) -> None:
        """Close the child's copy of the socket, so that the server sees the parent's end."""
        self._socket.close()

    def _flush(self) -> None:
        while self._outgoing:
            try:
                sent = self._socket.send(self._outgoing)
            except BlockingIOError:
                return
            except OSError as error:
                raise self._end(self._last_words() or self._failed(error)) from None
            del self._outgoing[:sent]

    def _read(self) -> tuple[list[Reply], bool]:
        """Return the replies that are there and whether the connection has ended behind them."""
        replies: list[Reply] = []
        while True:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                return replies, False
            except ConnectionResetError:
                return replies, True
            except OSError as error:
                raise self._end(self._failed(error)) from None
            if not data:
                return replies, True
            try:
                replies += self._wire.feed(data)
            except ProtocolError as error:
                raise self._end(str(error)) from None

    def _last_words(self) -> str | None:
        """Return why the server closed the connection, if it said so before."""
        replies, _ = self._read()
        return next((reply.reason for reply in replies if isinstance(reply, Refused)), None)

    def _failed(self, error: OSError) -> str:
        return f"the connection to {self._path} failed: {error.strerror}"

    def _end(self, reason: str) -> ConnectionLost:
        self.close()
        return ConnectionLost(reason)


# ppoll(2) itself: `select.poll` and `select.epoll` round up to a millisecond, several times what a scheduler may
# wait, and `select.select` takes no descriptor above 1023.


class _PollFd(ctypes.Structure):
    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_ppoll = ctypes.CDLL(None, use_errno=True).ppoll
_ppoll.argtypes = (ctypes.POINTER(_PollFd), ctypes.c_ulong, ctypes.POINTER(_TimeSpec), ctypes.c_void_p)


def _wait(fd: int, events: int, seconds: float) -> None:
    """Wait until one of `events` has happened, `seconds` are over, or a signal came."""
    fraction, whole = math.modf(seconds)
    poll_fd = _PollFd(fd=fd, events=events)
    timeout = _TimeSpec(seconds=int(whole), nanoseconds=int(fraction * 1e9))
    if _ppoll(ctypes.byref(poll_fd), 1, ctypes.byref(timeout), None) < 0:
        code = ctypes.get_errno()
        assert code == errno.EINTR, f"ppoll failed: {os.strerror(code)}"
