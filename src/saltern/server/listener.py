"""The listening socket: private from its first instant, and at most one server behind its path."""

import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct


class ListenError(Exception):
    """The server can't listen there. The text says why, and what to do."""


class Peer(Struct, frozen=True):
    """Who connected, as the kernel says."""

    pid: int
    uid: int


class Listener:
    """A Unix socket at `path`, which `setting` named, with permission bits `mode`. Raises `ListenError`."""

    def __init__(self, path: Path, *, mode: int = 0o600, setting: str = "--socket") -> None:
        self.path = path
        self._setting = setting
        self._make_folder()
        # Bound under another name and then renamed: nobody meets it before its mode is set, and the file of a
        # dead server is replaced without a moment in which there is none.
        unready = path.with_name(f".{os.getpid()}")  # short: a socket's path holds 107 bytes
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            with self._exclusively():
                self._refuse_unless_free()
                unready.unlink(missing_ok=True)
                umask = os.umask(0o777)
                try:
                    self.socket.bind(str(unready))
                finally:
                    os.umask(umask)
                unready.chmod(mode)
                self.socket.listen(128)
                unready.rename(path)
                self._inode = path.stat().st_ino
        except OSError as error:
            self.socket.close()
            raise ListenError(f"cannot listen on {path}: {error.strerror or error}") from None
        except ListenError:
            self.socket.close()
            raise

    def accept(self) -> tuple[socket.socket, Peer] | None:
        """Return the next connection, non-blocking and close-on-exec, or None.

        Raises `OSError` when the process or the machine is out of something; the connection then keeps waiting.
        """
        while True:
            try:
                connection, _ = self.socket.accept()
            except BlockingIOError:
                return None
            except ConnectionAbortedError:
                continue
            connection.setblocking(False)
            pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            return connection, Peer(pid=pid, uid=uid)

    def close(self) -> None:
        """Stop listening, and remove the socket's file if it is still ours."""
        try:
            with self._exclusively():
                if self.path.stat().st_ino == self._inode:
                    self.path.unlink()
        except FileNotFoundError:
            pass  # somebody tidied up before
        finally:
            self.socket.close()

    def _make_folder(self) -> None:
        folder = self.path.parent
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status, owners = folder.stat(), {folder.stat().st_uid, folder.lstat().st_uid}
        except OSError as error:
            raise ListenError(f"cannot make {folder} for the socket: {error.strerror}") from None
        # Whoever may rename things in the folder could put a socket of its own in our place.
        if not owners <= {0, os.getuid()}:
            raise ListenError(f"{folder} belongs to another user: choose another {self._setting}")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX:
            raise ListenError(f"others may change {folder}: choose another {self._setting}")

    def _refuse_unless_free(self) -> None:
        """Raise unless the path is free, or holds the socket of a server that is dead."""
        try:
            mode = self.path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise ListenError(f"{self.path} exists and is not a socket: remove it, or choose another {self._setting}")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            code = probe.connect_ex(str(self.path))
        if code != errno.ECONNREFUSED:
            raise ListenError(f"a server listens on {self.path} already: stop it, or choose another {self._setting}")

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Keep other servers from looking at or changing the path meanwhile. Leaves no file behind."""
        fd = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


_UCRED = struct.Struct("3i")  # pid, uid, gid
