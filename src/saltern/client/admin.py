"""An operator's questions to a server, each over a connection of its own."""

import os
import time
from contextlib import suppress

from saltern.client.control import Control
from saltern.client.sockets import ConnectionLost
from saltern.core.messages import GetStats, Refused, Stats
from saltern.core.snapshot import Snapshot


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


def _owner(path: str) -> int | None:
    with suppress(OSError):  # which connecting will tell better
        return os.stat(path).st_uid
    return None
