"""The engine's end of a Unix socket: opened without waiting, and never kept by a forked child."""

import errno
import os
import socket
from struct import Struct
from typing import Protocol
from weakref import WeakSet

ROOT = 0
"""Whoever this is could take what it wants from this process anyhow."""


class ConnectionLost(Exception):  # noqa: N818  # an event of the field, not a fault of ours
    """There is no server at the other end (any more). The text says why, for a person."""


class ForgottenByChildren(Protocol):
    """What a forked child must let go of, lest its parent's death stay unseen."""

    def forget_in_child(self) -> None:
        """Close whatever the parent had open. Runs in the child, where no other thread exists."""


def open_socket(path: str, *, server_uid: int | None = None) -> socket.socket:
    """Connect to a server's socket without waiting and return it, non-blocking and close-on-exec.

    Raises `ConnectionLost`, also for a server of anybody but this user, root, or `server_uid`: whoever serves us
    sees every user's KV, and could have put its socket in the place of ours.
    """
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    except OSError as error:  # out of descriptors
        raise ConnectionLost(_why(path, error)) from None
    try:
        connection.connect(path)
        _, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    except OSError as error:
        connection.close()
        raise ConnectionLost(_why(path, error)) from None
    if uid not in {ROOT, os.getuid(), server_uid}:
        connection.close()
        raise ConnectionLost(f"{path} is served by another user (uid {uid}): set saltern.server_uid if that is right")
    return connection


def forget_in_children(owner: ForgottenByChildren) -> None:
    """Have `owner.forget_in_child()` called in every child that this process forks."""
    _owners.add(owner)


def _why(path: str, error: OSError) -> str:
    match error.errno:
        case errno.ENOENT | errno.ECONNREFUSED:
            return f"no server listens on {path}: start one with `saltern serve`"
        case errno.EACCES | errno.EPERM:
            return f"this user (uid {os.getuid()}) may not open {path}: run as the server's user"
        case errno.EAGAIN:
            return f"the server on {path} does not accept connections: it is stopped or overloaded"
        case None:
            return f"{path}: {error}"  # a path that no socket can have
        case _:
            return f"{path}: {error.strerror}"


def _forget_all() -> None:
    for owner in list(_owners):
        owner.forget_in_child()
    _owners.clear()


_UCRED = Struct("3i")  # pid, uid, gid
_owners: "WeakSet[ForgottenByChildren]" = WeakSet()
os.register_at_fork(after_in_child=_forget_all)
