"""The claims: what must hold after every event, each with the name that a violation reports."""

from enum import Enum
from typing import NoReturn


class Invariant(Enum):
    """What must hold after every event, each under the name that a violation reports."""

    TILES = "runs held and runs free tile the arena"
    LIMITS = "no user and no tenant holds more than its limit"
    CHARGES = "used equals the sum over blocks held"
    PINS = "pins equal leases"
    REACHABLE = "every linked block hangs on linked parents down to the first"
    RECENCY = "no block is more recent than its parent"
    ORDER = "what is evicted next is the oldest, deepest leaf that nobody pins"
    VICTIMS = "blocks go only as unpinned leaves, with an aborted parent or by a discard"
    NEEDED = "nothing is evicted while there is room"
    REFUSALS = "a refusal's reason is true"
    BYTES = "served bytes belong to that user and key and stay unchanged under a lease"
    UNFINISHED = "an unfinished write is never served"
    DISCARDED = "a discarded block is not found again"
    QUIET = "what a worker touches is leased to its session, and to no other"
    SESSIONS = "no lease without all lifelines"
    UNIQUE = "one engine a name"
    ANSWERS = "every request gets one answer, in order"
    WAITS = "nobody waits for nothing"
    FORGOTTEN = "users without pages are forgotten"
    DRAINED = "drained means empty"
    STATS = "a snapshot agrees with itself"
    NO_CRASH = "no event makes the cache raise"


class ViolationError(Exception):
    """An invariant doesn't hold."""

    def __init__(self, invariant: Invariant, detail: str) -> None:
        super().__init__(f"{invariant.name}: {invariant.value}: {detail}")
        self.invariant = invariant


def violated(invariant: Invariant, detail: str) -> NoReturn:
    """Report a violation."""
    raise ViolationError(invariant, detail)
