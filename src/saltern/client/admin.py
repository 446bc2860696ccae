"""An operator's questions and orders to a server, each over a connection of its own."""

import os
import time
from contextlib import suppress

from saltern.client.control import Control
from saltern.client.sockets import ConnectionLost, open_socket
from saltern.core.messages import GetStats, Refused, Stats
from saltern.core.snapshot import Snapshot
from saltern.operations import Answer, Operation
from saltern.wire import ProtocolError, admin_client_wire, encode

_READ_BYTES = 256 * 1024


def fetch_stats(path: str, timeout: float = 5.0) -> Snapshot:
    """Return the server's state, waiting for it up to `timeout` seconds. Raises `ConnectionLost`."""
    deadline = time.monotonic() + timeout
    control = Control.connect(
        path, server_uid=_owner(path)
    )  # an operator reads other users' servers, and sends nothing
    try:
        control.send(GetStats())
        while (wait_seconds := deadline - time.monotonic()) > 0:
            for reply in control.receive(wait_seconds):
                match reply:
                    case Stats(snapshot):
                        return snapshot
                    case Refused(reason):
                        raise ConnectionLost(reason)
        raise ConnectionLost(f"the server on {path} did not answer within {timeout:g} s")
    finally:
        control.close()


def operate(path: str, operation: Operation, timeout: float = 60.0) -> Answer:
    """Have the server whose admin socket is at `path` do something, and return its answer.

    Waits up to `timeout` seconds in all, long enough for a change to reach a slow disk. Raises `ConnectionLost`; what
    was asked may then have been done or not.
    """
    deadline = time.monotonic() + timeout
    wire = admin_client_wire()
    connection = open_socket(path, server_uid=_owner(path))
    try:
        connection.settimeout(timeout)
        with suppress(BrokenPipeError):  # whoever turned us away has said why before
            connection.sendall(wire.preamble + encode(operation))
        while (wait_seconds := deadline - time.monotonic()) > 0:
            connection.settimeout(wait_seconds)
            data = connection.recv(_READ_BYTES)
            if not data:
                raise ConnectionLost(f"the server on {path} ended before it answered: see what it has now")
            for answer in wire.feed(data):
                if isinstance(answer, Refused):
                    raise ConnectionLost(answer.reason)
                return answer
        raise TimeoutError
    except TimeoutError:
        raise ConnectionLost(f"the server on {path} did not answer within {timeout:g} s") from None
    except OSError as error:
        raise ConnectionLost(f"the connection to {path} failed: {error.strerror}") from None
    except ProtocolError as error:
        raise ConnectionLost(str(error)) from None
    finally:
        connection.close()


def _owner(path: str) -> int | None:
    with suppress(OSError):  # which connecting will tell better
        return os.stat(path).st_uid
    return None
