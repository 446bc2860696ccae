"""The claims: what must hold after every event, each with the name that a violation reports."""

from enum import Enum
from typing import NoReturn


class Invariant(Enum):
    """What must hold after every event, each under the name that a violation reports."""

    TILES = "runs held and runs free tile the arena, and the slab"
    LIMITS = "no user and no tenant holds more than its limit"
    CHARGES = "used equals the sum over blocks held"
    PINS = "pins equal leases"
    REACHABLE = "every linked block hangs on linked parents down to the first"
    RECENCY = "no block is more recent than its parent, and what was just acquired is as recent as can be"
    ORDER = "what is evicted next is the oldest, deepest leaf that nobody pins"
    VICTIMS = "blocks go only as unpinned leaves, with an aborted parent or by a discard"
    NEEDED = "nothing is evicted while there is room"
    PAYER = "who pays when the arena is full is furthest above its guarantee, for its weight"
    GUARANTEES = "nothing is taken from a tenant at or below its guarantee"
    PROMISED = "a tenant within its guarantee is given room"
    CONSERVED = "no page that may go idles while somebody with less surplus is refused"
    HITS = "a tenant hits at least as much as in a private cache of its guarantee less what it has in flight"
    IN_FLIGHT = "no tenant pins what is kept for others' pins"
    EXPIRED = "what nobody has used for its tenant's ttl is not found"
    DUE = "a tick is due when something expires or is above a lowered limit"
    REFUSALS = "a refusal's reason is true"
    BYTES = "served bytes belong to that user and key and stay unchanged under a lease"
    UNFINISHED = "an unfinished write is never served"
    LONGEST = "what is found is the longest prefix that is there, of those that end in a state where one is asked for"
    STATES = "a prefix found for a model with states ends in one that was published for that user and prefix"
    SIZES = "what is granted is as long as the block or state that it is for"
    DISCARDED = "a discarded block is not found again"
    QUIET = "what a worker touches is leased to its session, and to no other"
    SESSIONS = "no lease without all lifelines"
    UNIQUE = "one engine a name"
    ANSWERS = "every request gets one answer, in order, or when what it waits for has come from the disk"
    WAITS = "nobody waits for nothing"
    FORGOTTEN = "users without pages are forgotten"
    LOADS = "what is READY never waits for the disk, and what is on the disk is fetched where there is room"
    PIECES = "no event does more than a bounded piece of what waits"
    BOUNDED = "no more is under way to and from the disk at one time than may be"
    WORK = "each operation of the disk is new, and ends once"
    SLOTS = "a slot is never written while the index, a write or a read names it"
    RECORDS = "the index names, whole and in its place, what the cache takes to be on the disk, and nothing else"
    RESTORED = "a new server has of the disk what the index names, charged as before"
    ERASED = "of an erased user nothing is served or kept that was begun before"
    WIPED = "what is erased is overwritten before its pages are anybody's"
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
