"""Records: what the cache takes to be on the disk, counted from scratch, against what the disk has and is asked."""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain

from saltern.core.cache import Cache
from saltern.core.disk import (
    DISK_PAGE_BYTES,
    FORGOTTEN_MAX,
    RecordState,
    StoredBlock,
    record_pages,
)
from saltern.core.effects import (
    Effect,
    Event,
    ForgetRecords,
    Received,
    RecordLost,
    RecordNotWritten,
    RecordRead,
    RecordWritten,
    Tick,
    WriteRecord,
)
from saltern.core.keys import Key, UserId
from saltern.core.messages import DEFAULT_TENANT, Discard
from saltern.core.tenants import Limits
from tests.simulator.claims import Invariant, violated
from tests.simulator.disk import DiskTier, pages_of
from tests.simulator.erasures import Erasures
from tests.simulator.holdings import Holdings, stamp_of


class Records(Holdings[StoredBlock]):
    """The records of a cache at one time."""

    def __init__(self, cache: Cache, settings: Mapping[str, Limits]) -> None:
        disk = self._disk = cache.disk
        super().__init__(disk.shares, settings, pages=disk.pool.pages, page_bytes=DISK_PAGE_BYTES)
        queued = chain.from_iterable(disk._to_read._queue_by_tenant.values())
        self._reads = Counter(record for record, _ in chain(disk.reads.values(), queued))
        tenants = disk.shares.tenant_by_name.values()
        users = [user for tenant in tenants for user in tenant.user_by_id.values()]
        self.linked = {record.name: record for user in users for record in user.block_by_key.values()}
        self.erasing = [record for user in disk._erasing for record in user.block_by_key.values()]
        writing = [record for record, _ in disk.writes.values()]
        # Whoever has to go is found no more, and charged for until the end of the write or of the last read.
        self.held = {*self.linked.values(), *self.erasing, *writing, *self._reads}
        self.leaving = [*chain.from_iterable(disk.forgetting.values()), *disk._to_forget]
        for record in self.held:
            self.count(record.user, len(pages_of(record.slot)))
        self.use = {record: (record.state, self._reads[record]) for record in self.held}
        found = chain(self.linked.values(), self.erasing)
        self.see([record for record in found if self.use[record] == (RecordState.STORED, 0)])
        self._record_by_name = {(name.tenant, name.user, name.key): record for name, record in self.linked.items()}
        self.record_by_op = {op: record for op, (record, _) in chain(disk.writes.items(), disk.reads.items())}

    def find(self, tenant: str, user: UserId, key: Key, *, length: int, now: float) -> StoredBlock | None:
        """Return what could be read of a user's block."""
        record = self._record_by_name.get((tenant, user, key))
        if record is None or self.use[record][0] is not RecordState.STORED or record.length != length:
            return None
        return None if self.has_expired(record, now) else record

    def has_expired(self, record: StoredBlock, now: float) -> bool:
        """Return whether a record was used too long ago."""
        ttl = self.limits(record.name.tenant).ttl_seconds
        return ttl is not None and record.touched_at + ttl <= now

    def check(self, before: "Records", due_at: float | None, now: float) -> None:
        """Check the books after an event."""
        pool = self._disk.pool
        slots = [record.slot for record in chain(self.held, self.leaving)]
        taken = [(run.start, run.count) for slot in slots for run in slot]
        self.check_tiles(taken, [(run.start, run.count) for run in pool.free_runs()], pool.free_pages)
        self.check_charges({DEFAULT_TENANT, *self._settings})
        self.check_limits(before)
        for record in self.held:
            if record.reads != self._reads[record]:
                violated(Invariant.PINS, f"{record} is read {self._reads[record]} times")
            if len(pages_of(record.slot)) != record_pages(record.length):
                violated(Invariant.SIZES, f"{record} of {record.length} bytes lies in {record.slot}")
        if sum(record.pages for record in self.leaving) != self._disk._leaving_pages:
            violated(Invariant.CHARGES, f"{self._disk._leaving_pages} pages are said to be leaving with {self.leaving}")
        with self.undisturbed():
            self.check_order()
            self.check_payers()
            self.check_due(due_at, now)

    def check_work(self, effects: Iterable[Effect]) -> None:
        """Check that no more is under way than may be."""
        disk = self._disk
        if len(disk.writes) > disk.writes_in_flight_max or len(disk.reads) > disk.reads_in_flight_max:
            violated(Invariant.BOUNDED, f"{len(disk.writes)} are written and {len(disk.reads)} read at one time")
        for effect in effects:
            if isinstance(effect, ForgetRecords) and not 0 < len(effect.names) <= FORGOTTEN_MAX:
                violated(Invariant.BOUNDED, f"{len(effect.names)} are forgotten at once")

    def check_vanished(self, before: "Records", event: Event, effects: Iterable[Effect], now: float) -> None:
        """Records go by expiry, above lowered limits, lost, discarded or erased; else as one that nobody uses."""
        evicted: dict[str, list[StoredBlock]] = {}
        for name, record in before.linked.items():
            if self.linked.get(name) is record or record.user.is_erased:
                continue
            match event:
                case RecordLost(op) | RecordNotWritten(op):
                    is_meant = before.record_by_op.get(op) is record
                case Received(message=Discard()):
                    is_meant = True  # of its blocks, and what continues them in RAM
                case Tick():
                    is_meant = before.has_expired(record, now) or before.is_above_limits(record.user)
                case _:
                    is_meant = False
            if not is_meant:
                is_just_done = isinstance(event, RecordWritten | RecordRead) and before.record_by_op[event.op] is record
                if before.use[record] != (RecordState.STORED, 0) and not is_just_done:
                    violated(Invariant.VICTIMS, f"{record} was evicted as {before.use[record]}")
                evicted.setdefault(name.tenant, []).append(record)
        started = {effect.name.tenant for effect in effects if isinstance(effect, WriteRecord)}
        for tenant, victims in evicted.items():
            self._check_guarantee(tenant, victims, started)

    def _check_guarantee(self, tenant: str, victims: list[StoredBlock], started: set[str]) -> None:
        """Nothing goes below its guarantee, but for what the last record takes with it, or what comes instead."""
        waiting = [block for block, _ in chain.from_iterable(self._disk._to_write._queue_by_tenant.values())][:1]
        asked = sum(record_pages(block.length) for block in waiting if block.user.tenant.name == tenant)
        is_asker = bool(asked) or tenant in started
        if is_asker and self.limits(tenant).user_limit_bytes is not None:
            return  # a user above its own limit pays, wherever its tenant is
        last = max(victims, key=stamp_of)
        pages = max(victim.pages for victim in victims) if is_asker else last.pages
        if self.used(tenant) + pages + asked <= self.guarantee(tenant):
            violated(Invariant.GUARANTEES, f"{last} was taken from {tenant}, which has {self.used(tenant)} pages left")

    # Against the disk

    def check_named(self, tier: DiskTier, erasures: Erasures) -> None:
        """Check that the index names what can be read, whole and in its place, and nothing that is erased."""
        rows, whole = tier.platter.rows, tier.platter.record
        for name, record in self.linked.items():
            if record.state is not RecordState.STORED or tier.is_destroyed(name):
                continue
            row = rows.get(name)
            if row is None or (row.slot, row.length) != (record.slot, record.length):
                violated(Invariant.RECORDS, f"{record} of {name} should lie in {record.slot}, and the index says {row}")
        for name, row in rows.items():
            content = whole(name, row)
            if content is None:
                violated(Invariant.RECORDS, f"{name} is torn in {row}")
            began = [cell[3] for cell in content.cells if cell is not None]
            if any(erasures.reaches(name.user, began_at) for began_at in began):
                violated(Invariant.ERASED, f"{name} is on the disk, begun at {began}")

    def check_quiet(self, tier: DiskTier | None) -> None:
        """Check that nothing is under way or waits, and that the index names what is known and nothing else."""
        disk = self._disk
        work = [disk.writes, disk.reads, disk.forgetting, disk._to_forget, disk._going, disk._to_write, disk._to_read]
        if any(work) or disk._pages_to_read or disk._leaving_pages or (tier is not None and tier.in_flight):
            violated(Invariant.DRAINED, f"the disk is done, and yet there are {work}")
        rows = tier.platter.rows if tier is not None else {}
        if rows.keys() != self.linked.keys():
            violated(Invariant.RECORDS, f"the index names {rows.keys() ^ self.linked.keys()}, and nobody else does")
