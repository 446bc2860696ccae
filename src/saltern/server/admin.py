"""The admin socket's server: threads that each converse with one operator, beside the loop and never in its way.

Operators are few, and what they ask waits for the disk. So each has a thread, which blocks where it must: on a slow
client as long as `IDLE_SECONDS`, on the disk, and on the loop for the moment in which it tells the core. The socket is
for the server's own user alone; the kernel is asked who connects as well, since a mode can be changed.
"""

import logging
import os
import socket
from contextlib import suppress
from threading import Event, Lock, Thread

from saltern.core.messages import Refused
from saltern.server.listener import Listener, Peer
from saltern.server.operations import Operations
from saltern.wire import ProtocolError, admin_server_wire, encode

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 16
IDLE_SECONDS = 30.0
"""How long an operator may say nothing, or take to read an answer."""

_READ_BYTES = 64 * 1024
_ACCEPT_RETRY_SECONDS = 1.0
_JOIN_SECONDS = 5.0  # for a change that is being written


class AdminServer:
    """Serves `listener`'s connections from `operations` until `close()`."""

    def __init__(self, listener: Listener, operations: Operations) -> None:
        self._listener = listener
        self._operations = operations
        self._closing = Event()
        self._lock = Lock()
        self._thread_by_connection: dict[socket.socket, Thread] = {}
        # Daemons: a change that hangs on a dead disk must not keep the server from stopping.
        self._acceptor = Thread(target=self._accept_all, name="admin", daemon=True)

    def start(self) -> None:
        """Take connections from now on."""
        self._listener.socket.setblocking(True)
        self._acceptor.start()

    def close(self) -> None:
        """Take no more connections, end those there are, and wait a moment for a change that is being made."""
        self._closing.set()
        with suppress(OSError):  # which wakes whoever waits in accept
            self._listener.socket.shutdown(socket.SHUT_RDWR)
        with self._lock:
            conversations = list(self._thread_by_connection.items())
        for connection, _ in conversations:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RD)  # an answer may still go out
        for thread in (self._acceptor, *(thread for _, thread in conversations)):
            thread.join(_JOIN_SECONDS)
        self._listener.close()

    def _accept_all(self) -> None:
        while not self._closing.is_set():
            try:
                accepted = self._listener.accept()
            except OSError as error:
                if not self._closing.is_set():
                    log.error("cannot accept an operator's connection, it waits: %s", error.strerror)
                self._closing.wait(_ACCEPT_RETRY_SECONDS)
                continue
            if accepted is None:
                continue
            connection, peer = accepted
            connection.settimeout(IDLE_SECONDS)
            with self._lock:
                refusal = self._refusal(peer)
                thread = Thread(target=self._serve, args=(connection, peer, refusal), name="operator", daemon=True)
                self._thread_by_connection[connection] = thread
                thread.start()

    def _refusal(self, peer: Peer) -> str | None:
        if peer.uid not in {0, os.getuid()}:
            return f"uid {peer.uid} may not change this server, only {os.getuid()} and root"
        if len(self._thread_by_connection) >= CONNECTIONS_MAX:
            return f"{CONNECTIONS_MAX} operators are connected already: try again"
        return None

    def _serve(self, connection: socket.socket, peer: Peer, refusal: str | None) -> None:
        try:
            with connection:
                self._converse(connection, peer, refusal)
        except ProtocolError as error:
            refusal = str(error)
        except OSError:
            pass  # it left, or was too slow
        finally:
            with self._lock:
                del self._thread_by_connection[connection]
        if refusal is not None:
            log.warning("refused pid %d of uid %d on the admin socket: %s", peer.pid, peer.uid, refusal)

    def _converse(self, connection: socket.socket, peer: Peer, refusal: str | None) -> None:
        wire = admin_server_wire()
        connection.sendall(wire.preamble)
        if refusal is not None:
            connection.sendall(encode(Refused(refusal)))
            return
        while not self._closing.is_set() and (data := connection.recv(_READ_BYTES)):
            try:
                operations = wire.feed(data)
            except ProtocolError as error:
                connection.sendall(encode(Refused(str(error))))
                raise
            for operation in operations:
                connection.sendall(encode(self._operations.answer(operation, by=f"uid {peer.uid}")))
