"""Leases and the sessions that hold them.

A session is one incarnation of one engine: its control connection and the lifelines of all its workers.

                 all lifelines are there
    WAITING ──────────────────────────────► OPEN
       │                                     │
       │  the control connection or a lifeline is lost
       ▼                                     ▼
     ENDED ◄─────────────────────────────────┘      no new lease; those given still hold,
       │                                            since a worker may be copying
       └──► gone with all its leases, when the last process that could touch the arena is gone
"""

from collections import Counter
from enum import Enum

from saltern.core.blocks import Block
from saltern.core.messages import LeaseId

ConnectionId = int
"""Names a connection for the lifetime of the server."""


class Lease:
    """What a session holds: a read lease pins READY blocks, a write lease blocks being written."""

    __slots__ = ("blocks", "is_write")

    def __init__(self, blocks: list[Block], *, is_write: bool) -> None:
        self.blocks = blocks
        self.is_write = is_write


class SessionState(Enum):
    """Where a session is in its life; see the drawing above."""

    WAITING = "waiting"
    OPEN = "open"
    ENDED = "ended"


class Lifeline:
    """A worker's connection. It serves one session in its life."""

    def __init__(self, connection: ConnectionId, *, name: bytes, rank: int, world_size: int) -> None:
        self.connection = connection
        self.name = name
        self.rank = rank
        self.world_size = world_size
        self.session: Session | None = None


class Session:
    """One incarnation of one engine."""

    def __init__(
        self,
        *,
        engine: str,
        incarnation: bytes,
        control: ConnectionId,
        workers: tuple[bytes, ...],
        block_bytes: int,
        state_bytes: int,
        root: bytes = b"",
        block_tokens: int = 0,
    ) -> None:
        self.engine = engine
        self.incarnation = incarnation
        self.control: ConnectionId | None = control
        self.workers = workers
        self.block_bytes = block_bytes
        self.state_bytes = state_bytes  # 0: its model has no states
        self.root = root
        self.block_tokens = block_tokens
        self.public_depth = 0  # as its scheduler was told
        self.state = SessionState.WAITING
        self.lifelines: list[Lifeline] = []  # of those still able to touch the arena
        self.lease_by_id: dict[LeaseId, Lease] = {}
        self.waiting: Counter[str] = Counter()  # requests by tenant, for what comes from the disk
        self.leased_blocks = 0  # in all of them, each as often as it is leased
        self.write_leases = 0
