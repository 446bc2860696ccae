"""Events that the shell tells the cache, and effects that the cache asks of the shell."""

from collections.abc import Sequence
from enum import Enum

from msgspec import Struct

from saltern.core.extents import Extent
from saltern.core.keys import Key, UserId
from saltern.core.leases import ConnectionId
from saltern.core.messages import PublicationId, Reply, Request
from saltern.core.tenants import NO_LIMITS, Limits

OpId = int
"""Names something that is under way outside the core, for the lifetime of the server; ids only grow."""


class Loss(Enum):
    """Why a record could not be read."""

    UNREADABLE = "unreadable"  # the disk said so, or had less
    NOT_AUTHENTIC = "not-authentic"  # torn, changed, or another block's


class RecordName(Struct, frozen=True):
    """Whose block a record holds, and which: all of this is authenticated with it.

    `root` is the content of the empty prefix in the block's namespace.
    """

    tenant: str
    user: UserId
    key: Key
    root: bytes


class StoredRecord(Struct, frozen=True):
    """A record that was found on the disk at a start, in pages `slot` of the slab, last used at `touched_at`."""

    name: RecordName
    slot: Extent
    length: int
    depth: int
    touched_at: float


class StoredPublication(Struct, frozen=True):
    """A publication whose blocks' names are known, as it is kept on the disk."""

    id: PublicationId
    root: bytes
    blocks: int
    label: str
    keys: tuple[Key, ...]


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


class TenantSet(Struct, frozen=True):
    """A tenant's limits are these from now on, in RAM and on disk. Ask `Cache.check_tenants` first if they can be."""

    name: str
    limits: Limits
    disk: Limits = NO_LIMITS


class TenantRemoved(Struct, frozen=True):
    """A tenant has no settings any more. What it stores stays, as that of a tenant nobody has configured."""

    name: str


class Tick(Struct, frozen=True):
    """`Cache.due_at` has come: do a bounded piece of what waits for the time, not for a message."""


class SecretsRotated(Struct, frozen=True):
    """These secrets sign salts from now on, the newest first."""

    secrets: tuple[bytes, ...]


class PublicationAdded(Struct, frozen=True):
    """Blocks of this prefix may be stored for all users: `blocks` of them, in the namespace that `root` stands for."""

    id: PublicationId
    root: bytes
    blocks: int
    label: str = ""


class PublicationRemoved(Struct, frozen=True):
    """What only this publication made readable is gone, with all that continues it."""

    id: PublicationId


class RecordWritten(Struct, frozen=True):
    """The record of a `WriteRecord` is on the disk, and will be found there after a restart."""

    op: OpId


class RecordNotWritten(Struct, frozen=True):
    """It isn't: the disk is full or fails, or its user's data key was destroyed."""

    op: OpId


class RecordRead(Struct, frozen=True):
    """What a `ReadRecord` asked for is in the arena, and it was authentic. It took `seconds` to read."""

    op: OpId
    seconds: float


class RecordLost(Struct, frozen=True):
    """It isn't in the arena, and never will be."""

    op: OpId
    loss: "Loss"


class RecordsForgotten(Struct, frozen=True):
    """The index doesn't name the records of a `ForgetRecords` any more, not after a crash either."""

    op: OpId


class Erased(Struct, frozen=True):
    """A user is to be forgotten in all tiers, or with None all users of a tenant. Its data key is destroyed already.

    What was begun before is never stored; with `for_good`, nothing is stored for this user again.
    """

    tenant: str
    user: UserId | None
    for_good: bool = False


Event = (
    Received
    | Disconnected
    | Gone
    | TenantSet
    | TenantRemoved
    | Tick
    | SecretsRotated
    | PublicationAdded
    | PublicationRemoved
    | RecordWritten
    | RecordNotWritten
    | RecordRead
    | RecordLost
    | RecordsForgotten
    | Erased
)


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


class WriteRecord(Struct, frozen=True):
    """Write a block's record: the first `length` bytes of `extent` in the arena, to pages `slot` of the slab.

    Both hold still until the answer, `RecordWritten` or `RecordNotWritten`. `depth` and `touched_at` are kept with it.
    """

    op: OpId
    name: RecordName
    extent: Extent
    slot: Extent
    length: int
    depth: int
    touched_at: float


class ReadRecord(Struct, frozen=True):
    """Read a block's record into the arena. Answered by `RecordRead` or `RecordLost`."""

    op: OpId
    name: RecordName
    extent: Extent
    slot: Extent
    length: int


class ForgetRecords(Struct, frozen=True):
    """Take records out of the index. Their slots are given to others after the answer, `RecordsForgotten`."""

    op: OpId
    names: Sequence[RecordName]


Work = WriteRecord | ReadRecord | ForgetRecords
"""What takes time: done beside the loop, each answered by one event."""


class KeepPublication(Struct, frozen=True):
    """Have a publication known again after a restart, as it is now."""

    publication: StoredPublication


class WipePages(Struct, frozen=True):
    """Overwrite pages of the arena with zeros, before anything is done about the effects behind this one."""

    extent: Extent


Effect = Send | Close | Logged | Work | KeepPublication | WipePages
