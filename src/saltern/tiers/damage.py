"""Damage: what can be wrong with a record that the index names."""

from collections.abc import Collection
from enum import Enum

from saltern.core.disk import record_pages
from saltern.core.effects import Loss
from saltern.core.extents import extent_pages
from saltern.tiers.datakeys import DataKey, Owner, unwrap
from saltern.tiers.index import Index, Row
from saltern.tiers.record import record_bytes, unseal
from saltern.tiers.slab import PageBuffer, Slab


class Misplaced(Enum):
    """Why a record can't be where the index says."""

    NO_SLOT = "no-slot"  # what stands there is no slot, or not as long as the record
    BEYOND = "beyond"  # the slab ends before
    OVERLAPS = "overlaps"  # another record is said to be there as well


def misplaced(rows: Collection[Row], pages: int) -> dict[int, Misplaced]:
    """Return which of these rows, by serial, can't be in a slab of so many pages. Of two that overlap, both can't."""
    wrong: dict[int, Misplaced] = {}
    runs: list[tuple[int, int, int]] = []
    for row in rows:
        if any(run.start < 0 or run.count < 1 for run in row.slot) or extent_pages(row.slot) != record_pages(
            row.length
        ):
            wrong[row.serial] = Misplaced.NO_SLOT
        elif any(run.start + run.count > pages for run in row.slot):
            wrong[row.serial] = Misplaced.BEYOND
        else:
            runs += [(run.start, run.start + run.count, row.serial) for run in row.slot]
    runs.sort()
    furthest, holder = 0, 0
    for start, end, serial in runs:
        if start < furthest:
            wrong[serial] = wrong[holder] = Misplaced.OVERLAPS
        if end > furthest:
            furthest, holder = end, serial
    return wrong


def sound_keys(index: Index, deployment_key: bytes) -> tuple[dict[Owner, DataKey], list[int]]:
    """Return the users' data keys, and the numbers of the rows whose key isn't authentic."""
    key_by_owner: dict[Owner, DataKey] = {}
    bad: list[int] = []
    for wrapped in index.wrapped_keys():
        key = unwrap(deployment_key, wrapped.owner, wrapped.id, wrapped.wrapped)
        if key is None:
            bad.append(wrapped.number)
        else:
            key_by_owner[wrapped.owner] = key
    return key_by_owner, bad


class Verifier:
    """Reads records for no other purpose than to know whether they are whole."""

    def __init__(self, slab: Slab) -> None:
        self._slab = slab
        self._record, self._block = PageBuffer(), PageBuffer()

    def loss(self, row: Row, key: DataKey) -> Loss | None:
        """Return why a record is lost, or None if it isn't."""
        record = self._record.view(record_bytes(row.length))
        try:
            self._slab.read(row.slot, record)
        except OSError:
            return Loss.UNREADABLE
        whole = unseal(row.name, key, record, [self._block.view(row.length)])
        return None if whole else Loss.NOT_AUTHENTIC
