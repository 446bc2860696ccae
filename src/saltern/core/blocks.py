"""A block and its life.

                 commit                    evict (a leaf that nobody pins)
    WRITING ───────────────► READY ─────────────────────────────────────────► gone
       │                       │
       │ abort, lost parent    │ discard, lost parent
       ▼                       ▼
     DOOMED ◄──────────────────┘    unlinked: no lookup finds it, its pages are held
       │                            only for whoever still reads or writes them
       └──► gone, when the last of them has let go

A block is *linked* while its user's dictionary holds it. Linked blocks form trees: every block but the
first of a prefix has a linked parent. Only leaves are evicted, so whatever is READY can be reached from
the first block, unless a parent is still being written.

The state of a model with recurrent layers is a block like any other, and a child of the block at whose end
it stands. Nothing continues a state.
"""

from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING, Final

from saltern.core.extents import Extent
from saltern.core.keys import Key
from saltern.core.order import Stamp

if TYPE_CHECKING:
    from saltern.core.disk import StoredBlock
    from saltern.core.tenants import User


class BlockState(Enum):
    """Where a block is in its life; see the drawing above."""

    WRITING = "writing"
    READY = "ready"
    DOOMED = "doomed"


class Block:
    """The KV of `block_tokens` consecutive tokens of one user, or a state at the end of such a block.

    `pins` counts what keeps the block where it is: the leases that hold it (its writer's, then its readers') and its
    pinned children. So whatever isn't pinned can be evicted, once what continues it is. Children hang on the
    parent in a linked list of siblings, since a million sets of one child each would be most of the index.
    """

    __slots__ = (
        "children",
        "depth",
        "evicted_for_it",
        "extent",
        "key",
        "length",
        "next_sibling",
        "pages",
        "parent",
        "pins",
        "previous_sibling",
        "record",
        "serial",
        "state",
        "touched_at",
        "user",
    )

    def __init__(
        self,
        *,
        user: "User[Block]",
        key: Key,
        parent: "Block | None",
        extent: Extent,
        pages: int,
        length: int,
        touched_at: float,
        serial: int,
        evicted_for_it: bool,
    ) -> None:
        self.user: Final = user
        self.key: Final = key
        self.extent: Final = extent
        self.pages: Final = pages  # of the extent: what the block is charged for
        self.length: Final = length  # bytes, at most the extent's
        self.depth: Final[int] = parent.depth + 1 if parent else 0
        self.serial: Final = serial
        self.evicted_for_it: Final = evicted_for_it
        self.state = BlockState.WRITING
        self.record: StoredBlock | None = None  # of it on the disk
        self.pins = 0
        self.touched_at = touched_at
        self.parent: Block | None = None
        self.children: Block | None = None  # the first of them
        self.next_sibling: Block | None = None
        self.previous_sibling: Block | None = None
        self.join_parent(parent)

    @property
    def stamp(self) -> Stamp | None:
        """Return when this may be evicted, or None while it may not: see `EvictionOrder`."""
        if self.state is not BlockState.READY or self.pins or self.children is not None:
            return None
        return (self.touched_at, -self.depth, self.serial)

    def join_parent(self, parent: "Block | None") -> None:
        """Become the first of the parent's children."""
        self.parent = parent
        if parent is not None:
            self.next_sibling = parent.children
            if parent.children is not None:
                parent.children.previous_sibling = self
            parent.children = self

    def leave_parent(self) -> None:
        """Undo the link to the parent."""
        if self.previous_sibling is not None:
            self.previous_sibling.next_sibling = self.next_sibling
        elif self.parent is not None:
            self.parent.children = self.next_sibling
        if self.next_sibling is not None:
            self.next_sibling.previous_sibling = self.previous_sibling
        self.parent = self.next_sibling = self.previous_sibling = None

    def with_descendants(self) -> Iterator["Block"]:
        """Yield this block and all that continues it, each parent before its children."""
        pending = [self]
        while pending:
            block = pending.pop()
            yield block
            child = block.children
            while child is not None:
                pending.append(child)
                child = child.next_sibling

    def __repr__(self) -> str:
        return f"<Block {self.key.hex()[:8]} depth={self.depth} {self.state.value} pins={self.pins}>"
