"""Messages: everything that crosses the socket, one type each; the types are the protocol.

An engine opens one *control* connection from vLLM's scheduler and one *lifeline* from each worker:

    worker      WorkerHello  →  Welcome (with the arena's file descriptor)  …  Attached  …  SessionEnded
    scheduler   SchedulerHello  →  Welcome  →  Attached (all lifelines are there)
                Lookup → LookedUp      Acquire → Acquired … Release
                Reserve → Reserved … Commit | Abort      Discard
    operator    GetStats → Stats

Requests are answered in the order in which they were sent. `Release`, `Commit`, `Abort` and `Discard`
have no answer. `Refused` and `SessionEnded` say why, in words for a person.
"""

from enum import Enum
from typing import Annotated

from msgspec import Meta, Struct

from saltern.core.extents import Extent
from saltern.core.keys import KEY_BYTES, USER_ID_BYTES, Key, UserId
from saltern.core.snapshot import Snapshot

KEYS_MAX = 65_536
"""Most keys in one message: a prompt of a million tokens in blocks of 16."""

NAME_BYTES = 16
"""Length of the random names of incarnations and workers."""

LeaseId = int
"""Names a lease within its session; 0 is no lease."""

# What a peer may send, checked while decoding.
_Key = Annotated[Key, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
_Keys = Annotated[tuple[_Key, ...], Meta(max_length=KEYS_MAX)]
_User = Annotated[UserId, Meta(min_length=USER_ID_BYTES, max_length=USER_ID_BYTES)]
_Name = Annotated[bytes, Meta(min_length=NAME_BYTES, max_length=NAME_BYTES)]
_Engine = Annotated[str, Meta(max_length=256)]
_Count = Annotated[int, Meta(ge=0)]


class SchedulerHello(Struct, frozen=True, array_like=True, tag=1):
    """Open an engine's session.

    `incarnation` is fresh random bytes for every connection and names the session; `workers` are the
    names of the lifelines that must be attached before any lease is given, in rank order;
    `block_bytes` is the size of one block with the shards of all ranks.
    """

    engine: _Engine
    incarnation: _Name
    workers: Annotated[tuple[_Name, ...], Meta(min_length=1, max_length=4096)]
    block_bytes: Annotated[int, Meta(gt=0)]


class WorkerHello(Struct, frozen=True, array_like=True, tag=2):
    """Open a worker's lifeline. `name` is random bytes that the worker's scheduler knows it by.

    A name belongs to one process. Saying hello anew by it says that the process has drained: nothing of it touches
    the arena any more for the sessions before.

    With `outlives_socket` (a GPU may still write when the socket is closed) the session's leases fall
    only when the process is gone, not when its lifeline is.
    """

    engine: _Engine
    name: _Name
    rank: _Count
    world_size: Annotated[int, Meta(gt=0)]
    outlives_socket: bool


class Welcome(Struct, frozen=True, array_like=True, tag=3):
    """Accept a connection. A worker gets the arena's file descriptor with it, a scheduler the secret."""

    arena_bytes: int
    page_bytes: int
    naming_secret: Annotated[bytes, Meta(max_length=64)] = b""  # BLAKE2b's longest key


class Refused(Struct, frozen=True, array_like=True, tag=4):
    """Turn a connection away, and close it."""

    reason: str


class Attached(Struct, frozen=True, array_like=True, tag=5):
    """The session is complete: leases of `incarnation` may now be used on this connection."""

    incarnation: bytes


class SessionEnded(Struct, frozen=True, array_like=True, tag=6):
    """No lease will be given any more: finish what runs, close, and say hello anew."""

    reason: str


class Lookup(Struct, frozen=True, array_like=True, tag=7):
    """Ask how many leading blocks are there, without pinning any."""

    request: int
    user: _User
    keys: _Keys


class LookedUp(Struct, frozen=True, array_like=True, tag=8):
    """The first `ready` keys of the lookup were there."""

    request: int
    ready: int


class Acquire(Struct, frozen=True, array_like=True, tag=9):
    """Ask for the longest prefix and pin its blocks `[start, ready)`; the rest the engine has itself."""

    request: int
    user: _User
    keys: _Keys
    start: _Count


class Acquired(Struct, frozen=True, array_like=True, tag=10):
    """Blocks `[start, ready)` are pinned under `lease` (0 if there are none) and lie in `extents`.

    `acquired_at` is the server's time of this answer; a `Reserve` of the same request carries it back.
    """

    request: int
    lease: LeaseId
    acquired_at: float
    ready: int
    extents: tuple[Extent, ...]


class Release(Struct, frozen=True, array_like=True, tag=11):
    """Give a read lease back."""

    lease: LeaseId


class Reserve(Struct, frozen=True, array_like=True, tag=12):
    """Ask for room for whichever of the blocks `[start, len(keys))` are missing.

    `keys` begins at block 0 so that the server can see that every block hangs on its parent.
    """

    request: int
    user: _User
    keys: _Keys
    start: _Count
    acquired_at: float


class Grant(Struct, frozen=True, array_like=True, gc=False):
    """Block `index` of the reservation may be written to `extent`."""

    index: int
    extent: Extent


class Refusal(Enum):
    """Why blocks of a reservation were not granted."""

    OVER_LIMIT = "over-limit"  # a block alone is larger than what the user or tenant may ever hold
    NO_ROOM = "no-room"  # a block alone is larger than the arena
    ALL_PINNED = "all-pinned"  # at the limit, or arena full, and nothing there may be evicted now
    NEXT_VICTIM = "next-victim"  # it would be the first to be evicted again
    NO_PARENT = "no-parent"  # a block before `start` is not there (any more)
    NO_SESSION = "no-session"  # a lifeline is missing


class Reserved(Struct, frozen=True, array_like=True, tag=13):
    """The blocks in `grants` may be written under `lease`; blocks `[start, upto)` are now there or being written.

    `refusal` says why `upto` is not the number of keys.
    """

    request: int
    lease: LeaseId
    grants: tuple[Grant, ...]
    upto: int
    refusal: Refusal | None


class Commit(Struct, frozen=True, array_like=True, tag=14):
    """Every rank has written every block of a write lease: publish them."""

    lease: LeaseId


class Abort(Struct, frozen=True, array_like=True, tag=15):
    """Every rank has stopped writing and one has failed: forget the lease's blocks."""

    lease: LeaseId


class Discard(Struct, frozen=True, array_like=True, tag=16):
    """A block could not be loaded: it and all that continues it shall not be found again."""

    user: _User
    key: _Key


class GetStats(Struct, frozen=True, array_like=True, tag=17):
    """Ask for a snapshot; needs no hello."""


class Stats(Struct, frozen=True, array_like=True, tag=18):
    """The server's state, as of now."""

    snapshot: Snapshot


Request = SchedulerHello | WorkerHello | Lookup | Acquire | Release | Reserve | Commit | Abort | Discard | GetStats
"""What a server receives."""

Reply = Welcome | Refused | Attached | SessionEnded | LookedUp | Acquired | Reserved | Stats
"""What an engine or an operator receives."""
