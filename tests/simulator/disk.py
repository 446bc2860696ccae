"""The disk of a simulation: a slab and its index, which outlive servers, and the work on them, late and in any order.

    write    half the pages, the others, the row  ──► RecordWritten
    read     pages into cells of the arena        ──► RecordRead
    forget   rows                                 ──► RecordsForgotten

A crash comes between any two of these. A page holds a piece of a record, which holds cells as the arena does, so that a
record that is torn, or overwritten while the index names it, is seen as such. Times in the index are the world's.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import inf
from random import Random

from saltern.core.effects import (
    Event,
    ForgetRecords,
    Loss,
    OpId,
    ReadRecord,
    RecordLost,
    RecordName,
    RecordNotWritten,
    RecordRead,
    RecordsForgotten,
    RecordWritten,
    StoredRecord,
    Work,
    WriteRecord,
)
from saltern.core.extents import Extent
from saltern.core.keys import UserId
from tests.simulator.arena import Arena, Cell
from tests.simulator.claims import Invariant, violated
from tests.simulator.world import World

SYNC_RATE = 0.2
"""How often a commit is followed by a sync: what was written since can be lost with the machine."""


@dataclass(eq=False)
class Record:
    """What pages hold that were written by one operation."""

    name: RecordName
    cells: list[Cell | None]


@dataclass(frozen=True)
class Row:
    """What the index says of a record."""

    slot: Extent
    length: int
    depth: int
    touched_at: float


Rows = dict[RecordName, Row]


class Platter:
    """What outlives a server."""

    def __init__(self, pages: int) -> None:
        self.pages: list[tuple[Record, int] | None] = [None] * pages
        self.rows: Rows = {}
        self.erased: dict[tuple[str, UserId | None], tuple[float, bool]] = {}  # when, and whether for good
        self._versions: list[Rows] = [{}]  # of the rows since the last sync, any of which a machine may come back with
        self._unsynced: set[int] = set()

    def write(self, pieces: list[tuple[int, int]], record: Record) -> None:
        """Write pieces of a record: which of its pages, and to which of the slab."""
        for piece, page in pieces:
            self.pages[page] = (record, piece)
            self._unsynced.add(page)

    def commit(self, *, is_synced: bool) -> None:
        """Keep the rows as they are, and with a sync all that was written for sure."""
        if is_synced:
            self._versions.clear()
            self._unsynced.clear()
        self._versions.append(dict(self.rows))

    def erase(self, tenant: str, user: UserId | None, *, at: float, for_good: bool) -> None:
        """Forget all of a user for sure, or with None of a tenant, but not that it was erased."""
        _, was_for_good = self.erased.get((tenant, user), (at, False))
        self.erased[tenant, user] = (at, for_good or was_for_good)
        gone = [name for name in self.rows if name.tenant == tenant and user in (None, name.user)]
        for name in gone:
            del self.rows[name]
        self._versions = [dict(self.rows)]

    def lose_power(self, random: Random) -> None:
        """Lose what was not synced, rows from some moment on and pages as it comes, and drop the rows that are torn."""
        self.rows = dict(random.choice(self._versions))
        for page in sorted(self._unsynced):
            if random.random() < 0.3:
                self.pages[page] = None
        self.rows = {name: row for name, row in self.rows.items() if self.record(name, row) is not None}
        self.commit(is_synced=True)

    def record(self, name: RecordName, row: Row) -> Record | None:
        """Return what a row names, if it is whole."""
        held = [self.pages[page] for page in pages_of(row.slot)]
        if held[0] is None:
            return None
        record = held[0][0]
        is_whole = held == [(record, piece) for piece in range(len(held))]
        return record if is_whole and record.name == name else None

    def stored_records(self, now: float, clock_offset: float) -> list[StoredRecord]:
        """Return what a server finds as it starts."""
        return [
            StoredRecord(name, row.slot, row.length, row.depth, min(row.touched_at + clock_offset, now))
            for name, row in self.rows.items()
        ]


class DiskTier:
    """What one server's life does with a platter. `tell` hears of each thing that is done, until the server is down."""

    def __init__(
        self,
        world: World,
        platter: Platter,
        arena: Arena,
        tell: Callable[[Event], None],
        *,
        mean_delay: float,
        failure_rate: float,
        clock_offset: float,
    ) -> None:
        self.platter = platter
        self.in_flight: dict[OpId, Work] = {}
        self._world = world
        self._arena = arena
        self._tell = tell
        self._mean_delay = mean_delay
        self._failure_rate = failure_rate
        self._clock_offset = clock_offset
        self._is_down = False
        self._stalled_until = 0.0
        self._last_op: OpId = 0
        self._denied_up_to: dict[tuple[str, UserId | None], float] = {}  # an operation

    def perform(self, work: Work) -> None:
        """Begin to do what the cache asks for."""
        if work.op <= self._last_op:
            violated(Invariant.WORK, f"{work} comes after operation {self._last_op}")
        self._last_op = work.op
        self.in_flight[work.op] = work
        match work:
            case WriteRecord():
                self._check_slot(work)
                self._go_on(self._write(work))
            case ReadRecord():
                self._check_slot(work)
                self._go_on(self._read(work))
            case ForgetRecords():
                self._go_on(self._forget(work))

    def destroy_keys(self, tenant: str, user: UserId | None, *, for_good: bool) -> None:
        """Let nothing of a user be read or written from now on, not after a crash either."""
        self._denied_up_to[tenant, user] = inf
        self.platter.erase(tenant, user, at=self._world.now, for_good=for_good)

    def allow(self, tenant: str, user: UserId | None, after: OpId) -> None:
        """Let later operations than that be done again."""
        self._denied_up_to[tenant, user] = after

    def is_destroyed(self, name: RecordName) -> bool:
        """Return whether a user's key is destroyed, and the cache may not have heard of it yet."""
        return self._is_denied(name, inf)

    def stall(self, duration: float) -> None:
        """Do nothing for a while."""
        self._stalled_until = max(self._stalled_until, self._world.now + duration)

    def note_touched(self, touched: Iterable[tuple[RecordName, float]]) -> None:
        """Keep when records were used, for a server to come."""
        for name, touched_at in touched:
            row = self.platter.rows.get(name)
            if row is not None:
                self.platter.rows[name] = replace(row, touched_at=max(row.touched_at, touched_at - self._clock_offset))

    def crash(self) -> None:
        """Do nothing more of what is under way."""
        self._is_down = True

    def _is_denied(self, name: RecordName, op: float) -> bool:
        users = ((name.tenant, name.user), (name.tenant, None))
        return any(op <= self._denied_up_to.get(user, 0) for user in users)

    def _check_slot(self, work: WriteRecord | ReadRecord) -> None:
        """Check that nothing is written where the index names something, or where something is written or read."""
        pages, is_write = set(pages_of(work.slot)), isinstance(work, WriteRecord)
        for other in self.in_flight.values():
            meets = isinstance(other, WriteRecord) or (is_write and isinstance(other, ReadRecord))
            if (
                other is not work
                and meets
                and not isinstance(other, ForgetRecords)
                and pages & set(pages_of(other.slot))
            ):
                violated(Invariant.SLOTS, f"{work} meets {other}")
        if is_write and work.name in self.platter.rows:
            violated(Invariant.SLOTS, f"{work} is of a block that the index names already")
        for name, row in self.platter.rows.items() if is_write else ():
            if pages & set(pages_of(row.slot)):
                violated(Invariant.SLOTS, f"{work} goes where {name} lies, in {row.slot}")

    # Work, one step after the other

    def _go_on(self, steps: Iterator[None]) -> None:
        if self._is_down:
            return
        if self._world.now < self._stalled_until:
            self._world.at(self._stalled_until, lambda: self._go_on(steps))
        elif next(steps, self) is not self:
            self._world.after(self._mean_delay, lambda: self._go_on(steps))

    def _write(self, work: WriteRecord) -> Iterator[None]:
        cells, pieces = self._arena.cells(work.extent, work.length), list(enumerate(pages_of(work.slot)))
        self._arena.begin(cells, is_write=False)
        fails = self._world.chance(self._failure_rate)
        record = Record(work.name, [])
        half = len(pieces) // 2
        for part in (pieces[:half], pieces[half:]):
            yield
            if not self._is_denied(work.name, work.op):
                self._arena.check_read(cells, work.name.user, work.name.key, 0)
                record.cells = list(self._arena.held(cells))
                self.platter.write(part, record)
        yield
        is_written = not fails and not self._is_denied(work.name, work.op)
        if is_written:
            row = Row(work.slot, work.length, work.depth, work.touched_at - self._clock_offset)
            self.platter.rows[work.name] = row
            self.platter.commit(is_synced=self._world.chance(SYNC_RATE))
        yield
        self._arena.end(cells, is_write=False)
        self._answer(work, RecordWritten(work.op) if is_written else RecordNotWritten(work.op))

    def _read(self, work: ReadRecord) -> Iterator[None]:
        began_at = self._world.now
        cells = self._arena.cells(work.extent, work.length)
        self._arena.begin(cells, is_write=True)
        yield
        record = None if self._is_denied(work.name, work.op) else self._named(work)
        if record is not None:
            half = len(cells) // 2
            self._arena.fill(cells[:half], record.cells[:half])
            yield
            self._arena.fill(cells[half:], record.cells[half:])
            if self._world.chance(self._failure_rate):
                record = None
        if record is None:
            self._arena.fill(cells, [None] * len(cells))
        yield
        self._arena.end(cells, is_write=True)
        if record is None:
            self._answer(work, RecordLost(work.op, self._world.random.choice(list(Loss))))
        else:
            self._answer(work, RecordRead(work.op, (self._world.now - began_at)))

    def _named(self, work: ReadRecord) -> Record:
        row = self.platter.rows.get(work.name)
        if row is None or (row.slot, row.length) != (work.slot, work.length):
            violated(Invariant.RECORDS, f"{work} is asked for, and the index says {row}")
        record = self.platter.record(work.name, row)
        if record is None:
            violated(Invariant.RECORDS, f"{work} is asked for, and what lies there is torn")
        return record

    def _forget(self, work: ForgetRecords) -> Iterator[None]:
        yield
        for name in work.names:
            self.platter.rows.pop(name, None)
        self.platter.commit(is_synced=self._world.chance(SYNC_RATE))
        yield
        self._answer(work, RecordsForgotten(work.op))

    def _answer(self, work: Work, event: Event) -> None:
        del self.in_flight[work.op]
        self._tell(event)


def pages_of(slot: Extent) -> list[int]:
    """Return the pages of the slab that a slot has, in order."""
    return [page for run in slot for page in range(run.start, run.start + run.count)]
