"""A disk in one process: a slab, an index and data keys, as far as the cache can tell them from the real ones.

It outlives its servers. What it is asked for begins, ends and is told steps later, in any order; half of a record's
bytes move at the beginning and half at the end, so whoever lets go of pages or of a slot too early is seen. A read
brings the bytes that were written under the very same name, and under a key that was not destroyed since, or it is
lost: that is what authenticated encryption comes to.
"""

import math
from collections.abc import Iterator
from random import Random

import msgspec
import numpy as np
from numpy.typing import NDArray

from saltern.core.disk import DISK_PAGE_BYTES, RECORD_HEADER_BYTES
from saltern.core.effects import (
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

from .findings import Finding

Bytes = NDArray[np.uint8]
Places = NDArray[np.intp]
Answer = RecordWritten | RecordNotWritten | RecordRead | RecordLost | RecordsForgotten
Owner = tuple[str, UserId | None]

GARBAGE = 0xDB  # what a read that fails leaves in the arena


class Overwritten(Finding):
    """A slot was given away while the index named the record in it, or a record was looked for where it isn't."""


class Row(msgspec.Struct):
    """What the index has of a record, and what was written under it."""

    record: StoredRecord
    key: int  # the number of the data key
    content: bytes
    is_rotten: bool = False


class Pending(msgspec.Struct, eq=False):
    """Work that has not been told about: it begins before one step, ends before another and is told before a third."""

    work: Work
    arena: Bytes
    page_bytes: int
    begins_at: int
    ends_at: int
    told_at: int
    has_begun: bool = False
    answer: Answer | None = None  # as soon as it has ended


class SteppedDisk:
    """`random` decides what fails, `seconds_a_step` how long a read says that it took."""

    def __init__(self, pages: int, random: Random) -> None:
        self.pages = pages
        self.random = random
        self.steps_max = 0
        self.read_fault_share = 0.0
        self.write_fault_share = 0.0
        self.is_stalled = False
        self.written = self.loaded = self.lost = 0  # so far
        self._slab: Bytes = np.zeros(pages * DISK_PAGE_BYTES, dtype=np.uint8)
        self._row_by_name: dict[RecordName, Row] = {}
        self._pending: list[Pending] = []
        self._keys = 0  # made so far, if everybody's were made anew at each erasure
        self._destroyed: dict[Owner, int] = {}  # up to which key
        self._barred: dict[Owner, float] = {}  # up to which op
        self.erased: dict[Owner, bool] = {}  # for good, or only what was before

    # What the server asks

    def perform(self, work: Work, arena: Bytes, page_bytes: int, step: int) -> None:
        """Begin work, at once or some steps later."""
        begins_at = step + self._delay()
        ends_at = begins_at + self._delay()
        self._pending.append(Pending(work, arena, page_bytes, begins_at, ends_at, ends_at + self._delay() // 2))

    def advance(self, step: int) -> Iterator[Answer]:
        """Do what is due, and yield what is to be told, in any order."""
        for pending in self._pending if not self.is_stalled else ():
            if not pending.has_begun and pending.begins_at <= step:
                self._move(pending, slice(None, None, 2))
                pending.has_begun = True
            if pending.answer is None and pending.ends_at <= step:
                pending.answer = self._end(pending, step)
        told = [pending for pending in self._pending if pending.answer is not None and pending.told_at <= step]
        self.random.shuffle(told)
        self._pending = [pending for pending in self._pending if pending not in told]
        for pending in told:
            assert pending.answer is not None, "told before its end"
            yield pending.answer

    @property
    def is_busy(self) -> bool:
        """Return whether anything is under way."""
        return bool(self._pending)

    def hurry(self, step: int) -> None:
        """Let all that is under way end now."""
        self.is_stalled = False
        for pending in self._pending:
            pending.begins_at = pending.ends_at = pending.told_at = min(pending.told_at, step)

    def may_touch(self, arena: Bytes, extent: Extent) -> bool:
        """Return whether there is work to or from an extent of an arena of whose end nobody was told."""
        return any(
            pending.arena is arena and pending.work.extent == extent
            for pending in self._pending
            if isinstance(pending.work, WriteRecord | ReadRecord)
        )

    # Restarts

    def crash(self) -> None:
        """Lose the server: what has not ended is torn or as if never asked, but the index may have forgotten more."""
        for pending in self._pending:
            if isinstance(pending.work, ForgetRecords) and pending.answer is None and self.random.random() < 0.5:
                self._forget(pending.work)
        self._pending = []
        self._barred = {}

    def restore(self) -> list[StoredRecord]:
        """Return what is there for a server that starts; what no key opens any more is not."""
        for name, row in list(self._row_by_name.items()):
            if not self._is_open(row):
                del self._row_by_name[name]
        records = [row.record for row in self._row_by_name.values()]
        self.random.shuffle(records)
        return records

    def touch(self, name: RecordName, touched_at: float) -> None:
        """Keep when a record was last used."""
        row = self._row_by_name.get(name)
        if row is not None:
            row.record = msgspec.structs.replace(row.record, touched_at=touched_at)

    # Erasures and decay

    def destroy_keys(self, owner: Owner, *, for_good: bool) -> None:
        """Open nothing of a user's any more, and do nothing more for it, until `allow`."""
        self._destroyed[owner] = self._keys
        self._keys += 1
        self._barred[owner] = math.inf
        self.erased[owner] = for_good or self.erased.get(owner, False)

    def allow(self, owner: Owner, *, after: OpId) -> None:
        """Work for a user again that is asked for after this."""
        self._barred[owner] = after

    def rot(self) -> None:
        """Change a byte of some record."""
        rows = [row for row in self._row_by_name.values() if not row.is_rotten]
        if rows:
            row = self.random.choice(rows)
            self._slab[self.random.choice(list(self._places(row.record.slot, row.record.length)))] ^= 0xFF
            row.is_rotten = True

    # The end

    @property
    def records(self) -> dict[RecordName, StoredRecord]:
        """Return what the index names."""
        return {name: row.record for name, row in self._row_by_name.items()}

    def _end(self, pending: Pending, step: int) -> Answer:
        work = pending.work
        match work:
            case WriteRecord(op, name):
                self._move(pending, slice(1, None, 2))
                if self._is_barred(name, op) or self.random.random() < self.write_fault_share:
                    return RecordNotWritten(op)
                record = StoredRecord(name, work.slot, work.length, work.depth, work.touched_at)
                content = self._slab[self._places(work.slot, work.length)].tobytes()
                self._row_by_name[name] = Row(record, self._keys, content)
                self.written += 1
                return RecordWritten(op)
            case ReadRecord(op, name):
                loss = self._loss(work)
                if loss is None:
                    self._move(pending, slice(1, None, 2))
                    self.loaded += 1
                    return RecordRead(op, seconds=0.01 * (step - pending.begins_at))
                pending.arena[_places(work.extent, pending.page_bytes)] = GARBAGE
                self.lost += 1
                return RecordLost(op, loss)
            case ForgetRecords(op):
                self._forget(work)
                return RecordsForgotten(op)

    def _loss(self, work: ReadRecord) -> Loss | None:
        row = self._row_by_name.get(work.name)
        if self._is_barred(work.name, work.op) or self.random.random() < self.read_fault_share:
            return Loss.UNREADABLE
        if row is None or (row.record.slot, row.record.length) != (work.slot, work.length):
            raise Overwritten(f"{work} is of {row.record if row else 'nothing'}")
        if not self._is_open(row) or row.is_rotten:
            return Loss.NOT_AUTHENTIC
        if self._slab[self._places(work.slot, work.length)].tobytes() != row.content:
            raise Overwritten(f"{row.record} was written over")
        return None

    def _move(self, pending: Pending, part: slice) -> None:
        match pending.work:
            case WriteRecord(slot=slot, extent=extent, length=length) as write:
                self._check_slot(write)
                source = _places(extent, pending.page_bytes)[:length]
                self._slab[self._places(slot, length)[part]] = pending.arena[source[part]]
            case ReadRecord(slot=slot, extent=extent, length=length):
                target = _places(extent, pending.page_bytes)[:length]
                pending.arena[target[part]] = self._slab[self._places(slot, length)[part]]
            case ForgetRecords():
                pass

    def _check_slot(self, write: WriteRecord) -> None:
        """Raise if a record would be written over another that may still be needed."""
        pages = {*_places(write.slot, 1)}
        others = [(name, row.record.slot) for name, row in self._row_by_name.items()]
        others += [
            (other.work.name, other.work.slot)
            for other in self._pending
            if isinstance(other.work, WriteRecord) and other.work is not write
        ]
        for name, slot in others:
            if name == write.name or not pages.isdisjoint(_places(slot, 1)):
                raise Overwritten(f"{write} would be written over {name} in {slot}")

    def _forget(self, work: ForgetRecords) -> None:
        for name in work.names:
            self._row_by_name.pop(name, None)

    def _is_open(self, row: Row) -> bool:
        name = row.record.name
        return row.key > max(self._destroyed.get((name.tenant, user), -1) for user in (name.user, None))

    def _is_barred(self, name: RecordName, op: OpId) -> bool:
        return op <= max(self._barred.get((name.tenant, user), -1) for user in (name.user, None))

    def _delay(self) -> int:
        return self.random.randint(0, self.steps_max)

    @staticmethod
    def _places(slot: Extent, length: int) -> Places:
        return _places(slot, DISK_PAGE_BYTES)[RECORD_HEADER_BYTES : RECORD_HEADER_BYTES + length]


def _places(extent: Extent, page_bytes: int) -> Places:
    """Return where the bytes of an extent lie, in logical order."""
    return np.concatenate([np.arange(run.start * page_bytes, (run.start + run.count) * page_bytes) for run in extent])
