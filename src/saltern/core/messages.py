"""Messages: everything that crosses the socket, one type each; the types are the protocol.

An engine opens one *control* connection from vLLM's scheduler and one *lifeline* from each worker:

    worker      WorkerHello  →  Welcome (with the arena's file descriptor)  …  Attached  …  SessionEnded
    scheduler   SchedulerHello  →  Welcome  →  Attached (all lifelines are there)
                Lookup → LookedUp      Acquire → (Loading …) Acquired … Release
                Reserve → Reserved … Commit | Abort      Discard
                SigningSecrets, whenever they change
    operator    GetStats → Stats

Requests are answered in the order in which they were sent; an Acquire of what has to come from the disk is answered by
`Loading` in its turn, and by `Acquired` once it is there. `Release`, `Commit`, `Abort` and `Discard` have no answer.
`Refused` and `SessionEnded` say why, in words for a person.

`Lookup`, `Acquire`, `Reserve` and `Discard` name a user and the tenant that is charged for it. Engines are trusted
to name only tenants that they have verified.

A model with recurrent layers keeps, beside the KV of every token, a *state* that stands for the whole prefix
up to one position. It is stored like a block, under a key of its own, as a child of the block at whose end it
stands; a prefix is of use to such a model only up to a block whose state is there as well.
"""

from enum import Enum
from typing import Annotated, NewType

from msgspec import Meta, Struct

from saltern.core.extents import Extent
from saltern.core.keys import KEY_BYTES, USER_ID_BYTES, Key, UserId
from saltern.core.snapshot import Snapshot

KEYS_MAX = 65_536
"""Most keys in one message: a prompt of a million tokens in blocks of 16."""

DEFAULT_TENANT = "default"
"""Who is charged for users that nobody signed for."""

PUBLIC_TENANT = "public"
"""The operator's, which owns what is published. No user belongs to it."""

PublicationId = NewType("PublicationId", bytes)
"""Names what is published; as long as a user's id, which it stands for in messages. 16 random bytes."""

PUBLIC_USER = UserId(bytes(USER_ID_BYTES))
"""Under whom the server keeps what is published. In messages for the tenant `public`, `user` names a publication."""

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
_Root = Annotated[bytes, Meta(max_length=KEY_BYTES)]
_Tenant = Annotated[str, Meta(max_length=64)]
_Secret = Annotated[bytes, Meta(max_length=64)]  # BLAKE2b's longest key
_Secrets = Annotated[tuple[_Secret, ...], Meta(max_length=8)]


class SchedulerHello(Struct, frozen=True, array_like=True, tag=1):
    """Open an engine's session.

    `incarnation` is fresh random bytes for every connection and names the session; `workers` are the
    names of the lifelines that must be attached before any lease is given, in rank order;
    `block_bytes` is the size of one block with the shards of all ranks, `state_bytes` that of one state, 0
    for a model that has none. `root` is the content of the empty prefix in the engine's namespace, and `block_tokens`
    how many tokens a block has: 0 where nothing can be published, since there are states.
    """

    engine: _Engine
    incarnation: _Name
    workers: Annotated[tuple[_Name, ...], Meta(min_length=1, max_length=4096)]
    block_bytes: Annotated[int, Meta(gt=0)]
    state_bytes: _Count = 0
    root: _Root = b""
    block_tokens: _Count = 0


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
    """Accept a connection. A worker gets the arena's file descriptor with it, a scheduler the secrets."""

    arena_bytes: int
    page_bytes: int
    naming_secret: _Secret = b""
    signing_secrets: _Secrets = ()


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
    """Ask how many leading blocks are there, without pinning any.

    `states` is empty or as long as `keys`: `states[i]` names the state after block `keys[i]`, and only a prefix
    that ends in a state counts. `public` names the first blocks once more, as they are called where they are published.
    `block_seconds` is how long the engine takes to compute a block, 0 where it doesn't know: what would take longer to
    come from the disk is not looked for there.
    """

    request: int
    user: _User
    keys: _Keys
    states: _Keys = ()
    tenant: _Tenant = DEFAULT_TENANT
    public: _Keys = ()
    block_seconds: float = 0.0


class LookedUp(Struct, frozen=True, array_like=True, tag=8):
    """The first `ready` keys of the lookup are there, or on their way from the disk."""

    request: int
    ready: int


class Acquire(Struct, frozen=True, array_like=True, tag=9):
    """Ask for the longest prefix and pin its blocks `[start, ready)`; the rest the engine has itself.

    With `states`, as in a `Lookup`, the state that the prefix ends in is pinned with them.
    """

    request: int
    user: _User
    keys: _Keys
    start: _Count
    states: _Keys = ()
    tenant: _Tenant = DEFAULT_TENANT
    public: _Keys = ()
    block_seconds: float = 0.0


class Loading(Struct, frozen=True, array_like=True, tag=22):
    """`blocks` of what an Acquire asked for are on their way from the disk, and take about `seconds` from now on.

    Its `Acquired` follows when they are there or lost, and not in the order of the requests.
    """

    request: int
    blocks: int
    seconds: float


class Acquired(Struct, frozen=True, array_like=True, tag=10):
    """Blocks `[start, ready)` are pinned under `lease` (0 if there are none) and lie in `extents`.

    Where states were asked for and there are such blocks, the last extent is that of the state after block
    `ready - 1`, pinned under the same lease.

    `acquired_at` is the server's time of this answer; a `Reserve` of the same request carries it back. Blocks
    `[0, public)` are everybody's, those behind them the user's own.
    """

    request: int
    lease: LeaseId
    acquired_at: float
    ready: int
    extents: tuple[Extent, ...]
    public: int = 0


class Release(Struct, frozen=True, array_like=True, tag=11):
    """Give a read lease back."""

    lease: LeaseId


class Reserve(Struct, frozen=True, array_like=True, tag=12):
    """Ask for room for whichever of the blocks `[start, len(keys))` are missing.

    `keys` begins at block 0 so that the server can see that every block hangs on its parent. With
    `ends_in_state` the last key names the state after the block before it; otherwise it is a key like the others.
    Blocks that are published under their names in `public` are there.

    `began_at` is when the engine took the request, by the machine's monotonic clock: what began before its user was
    erased is refused. 0 is unknown, and before everything.
    """

    request: int
    user: _User
    keys: _Keys
    start: _Count
    acquired_at: float
    ends_in_state: bool = False
    tenant: _Tenant = DEFAULT_TENANT
    public: _Keys = ()
    began_at: float = 0.0


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
    IN_FLIGHT = "in-flight"  # more than the tenant may have under leases at one time
    NO_PARENT = "no-parent"  # a block before `start` is not there (any more)
    NO_SESSION = "no-session"  # a lifeline is missing
    NOT_PUBLISHED = "not-published"  # no such publication (any more), or not of these blocks
    ERASED = "erased"  # the request began before its user was erased


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
    tenant: _Tenant = DEFAULT_TENANT


class GetStats(Struct, frozen=True, array_like=True, tag=17):
    """Ask for a snapshot; needs no hello."""


class Stats(Struct, frozen=True, array_like=True, tag=18):
    """The server's state, as of now."""

    snapshot: Snapshot


class SigningSecrets(Struct, frozen=True, array_like=True, tag=19):
    """These secrets sign salts from now on, the newest first: what a `Welcome` said of them is over."""

    secrets: _Secrets


class NamespaceChanged(Struct, frozen=True, array_like=True, tag=20):
    """The engine's weights are others: what was published for the namespace before is none of its business any more."""

    root: _Root


class PublicDepth(Struct, frozen=True, array_like=True, tag=21):
    """The longest publication in the engine's namespace has so many blocks: there is no use in naming more."""

    blocks: int


Request = (
    SchedulerHello
    | WorkerHello
    | Lookup
    | Acquire
    | Release
    | Reserve
    | Commit
    | Abort
    | Discard
    | GetStats
    | NamespaceChanged
)
"""What a server receives."""

Reply = (
    Welcome
    | Refused
    | Attached
    | SessionEnded
    | LookedUp
    | Loading
    | Acquired
    | Reserved
    | Stats
    | SigningSecrets
    | PublicDepth
)
"""What an engine or an operator receives."""
