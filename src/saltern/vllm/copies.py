"""Copies: what a step asks of the workers, and what they report back; plain data, known to both roles."""

from dataclasses import dataclass, field

from saltern.core.extents import Extent


@dataclass(frozen=True, slots=True)
class Piece:
    """Engine blocks of one group that lie one after the other in one block of the cache.

    `engine_blocks[i]` is slot `first_slot + i` of what the group has in the block that lies in `extent`. vLLM's null
    block among them stands for a slot that nobody needs: nothing is copied.
    """

    extent: Extent
    first_slot: int
    engine_blocks: tuple[int, ...]
    group: int = 0


@dataclass(frozen=True, slots=True)
class Copy:
    """One operation: all its pieces in one direction, under one lease of one session."""

    op_id: int
    incarnation: bytes
    request_id: str
    pieces: tuple[Piece, ...]


@dataclass
class Copies:
    """What every rank copies in one step."""

    loads: list[Copy] = field(default_factory=list)
    stores: list[Copy] = field(default_factory=list)


@dataclass
class Reports:
    """How many ranks have finished an operation since the last report, and how many have failed it."""

    done: dict[int, int] = field(default_factory=dict)
    failed: dict[int, int] = field(default_factory=dict)
    untouched: dict[int, int] = field(default_factory=dict)  # of the failed: those that never had the arena

    def add(self, other: "Reports") -> None:
        """Sum another rank's, or another step's, into this one."""
        for mine, theirs in (
            (self.done, other.done),
            (self.failed, other.failed),
            (self.untouched, other.untouched),
        ):
            for op_id, ranks in theirs.items():
                mine[op_id] = mine.get(op_id, 0) + ranks

    def __bool__(self) -> bool:
        return bool(self.done or self.failed)
