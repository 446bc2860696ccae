"""A relay between an engine and its server, which keeps every byte that passes."""

from __future__ import annotations

import os
import socket
import threading
from array import array
from contextlib import suppress
from pathlib import Path

READ_BYTES = 64 * 1024
FDS_MAX = 4


class Relay:
    """Listens on `path` and connects each caller to `server_path`; file descriptors are passed on as well.

    `passed` is what went either way, each connection by itself, so that what is looked for is never cut by another's
    bytes. A server that isn't there is a connection that ends at once.
    """

    def __init__(self, path: Path, server_path: Path) -> None:
        self.path = path
        self.passed: list[bytearray] = []
        self._server_path = server_path
        self._sockets: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def close(self) -> None:
        """End the relay and all that it has connected."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # which wakes the thread that accepts
        self._listener.close()
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                engine, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                server.connect(str(self._server_path))
            except OSError:
                engine.close()
                server.close()
                continue
            self._sockets += [engine, server]
            threading.Thread(target=self._serve, args=(engine, server), name="relay", daemon=True).start()

    def _serve(self, engine: socket.socket, server: socket.socket) -> None:
        """Pass bytes both ways until both have ended: a worker that drains closes later than its server."""
        back = threading.Thread(target=self._pump, args=(server, engine), name="relay", daemon=True)
        back.start()
        self._pump(engine, server)
        back.join()
        engine.close()
        server.close()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        passed = bytearray()
        self.passed.append(passed)
        with suppress(OSError):
            while True:
                fds = array("i")
                data, ancillary, _, _ = source.recvmsg(READ_BYTES, socket.CMSG_SPACE(FDS_MAX * fds.itemsize))
                for level, kind, payload in ancillary:
                    assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS), "something else came with the bytes"
                    fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                if not data:
                    break
                passed += data
                sent = socket.send_fds(target, [data], list(fds))
                for fd in fds:
                    os.close(fd)
                target.sendall(data[sent:])
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)
