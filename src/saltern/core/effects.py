"""Events that the shell tells the cache, and effects that the cache asks of the shell."""

from msgspec import Struct

from saltern.core.leases import ConnectionId
from saltern.core.messages import Reply, Request


class Received(Struct, frozen=True):
    """A message came in."""

    connection: ConnectionId
    message: Request


class Disconnected(Struct, frozen=True):
    """A connection is closed, by whichever side."""

    connection: ConnectionId


class Gone(Struct, frozen=True):
    """Whoever was behind a closed connection can no longer touch the arena.

    Follows `Disconnected` at once, or, for a worker whose device may still write, when its process ends.
    """

    connection: ConnectionId


Event = Received | Disconnected | Gone


class Send(Struct, frozen=True):
    """Send a message; a `Welcome` to a worker goes with the arena's file descriptor."""

    connection: ConnectionId
    message: Reply
    with_arena: bool = False


class Close(Struct, frozen=True):
    """Close a connection once what was sent before is out. `Disconnected` follows as for any other."""

    connection: ConnectionId
    reason: str


class Logged(Struct, frozen=True):
    """Log a decision: what happened, to which engine or tenant, and to how many blocks."""

    event: str
    engine: str = ""
    tenant: str = ""
    blocks: int = 0
    detail: str = ""


Effect = Send | Close | Logged
