"""The disk tier: which records there are, for whom and where, and what is to be written, read and let go.

A record is the copy of one block in pages of the slab. It is right by itself, for a block's key names all that comes
before it. So records form no tree: what lies behind a missing one is not found any more, and ages out.

                RecordWritten               evicted, expired, lost or erased
    WRITING ───────────────────► STORED ─────────────────────────────────────► LEAVING ───────────────────► gone
       │                          │  ▲                                            ▲     RecordsForgotten:
       │ RecordNotWritten         └──┘ is read                                    │     its pages are free
       └──► gone                       (whoever has to go meanwhile waits for the end of the write or of the reads)

Blocks are offered once they are READY, and written in the background: so many at a time, each tenant in its turn. What
can't be is skipped, counted, and offered again when it is next used.
"""

from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Mapping
from enum import Enum
from itertools import count, pairwise
from typing import Final, Generic, TypeVar

from saltern.core.blocks import Block, BlockState
from saltern.core.census import Census
from saltern.core.effects import ForgetRecords, OpId, ReadRecord, RecordName, StoredRecord, WriteRecord
from saltern.core.extents import Extent, PagePool, Run
from saltern.core.keys import Key, UserId
from saltern.core.messages import PUBLIC_TENANT, Refusal
from saltern.core.order import Stamp
from saltern.core.shares import Shares
from saltern.core.tenants import Limits, Tally, User

DISK_PAGE_BYTES = 4096
"""A page of the slab: what O_DIRECT reads and writes whole."""

RECORD_HEADER_BYTES = 256
RECORD_TAG_BYTES = 16

WRITES_IN_FLIGHT_MAX = 4
"""Records that are written at one time. Their blocks are pinned meanwhile."""

READS_IN_FLIGHT_MAX = 8

OFFERED_MAX = 1024
"""Blocks of one tenant that may wait to be written; further ones are skipped."""

SKIPPED_MAX = 64
"""Most blocks that are looked at in one event for one that can be written."""

TOUCHED_MAX = 10_000
"""Most records that `take_touched` names at once: some milliseconds."""

FORGOTTEN_MAX = 64
"""Most records that are forgotten by one `ForgetRecords`."""

_SPEED_GAIN = 0.2  # of the last read in what reads are expected to take

_T = TypeVar("_T")


def record_pages(length: int) -> int:
    """Return how many pages of the slab the record of a block of `length` bytes takes."""
    return -(-(RECORD_HEADER_BYTES + length + RECORD_TAG_BYTES) // DISK_PAGE_BYTES)


class RecordState(Enum):
    """Where a record is in its life; see the drawing above."""

    WRITING = "writing"
    STORED = "stored"
    LEAVING = "leaving"


class StoredBlock:
    """A block's record on the disk, or what will be one."""

    __slots__ = (
        "depth",
        "has_to_go",
        "is_touched",
        "length",
        "name",
        "pages",
        "reads",
        "serial",
        "slot",
        "state",
        "touched_at",
        "user",
    )

    def __init__(
        self,
        *,
        user: "User[StoredBlock]",
        name: RecordName,
        slot: Extent,
        pages: int,
        length: int,
        depth: int,
        touched_at: float,
        serial: int,
    ) -> None:
        self.user: Final = user
        self.name: Final = name
        self.slot: Final = slot
        self.pages: Final = pages  # of the slot
        self.length: Final = length  # bytes of the block
        self.depth: Final = depth
        self.serial: Final = serial
        self.touched_at = touched_at
        self.state = RecordState.WRITING
        self.reads = 0  # under way, or about to be
        self.has_to_go = False  # as soon as it is neither written nor read
        self.is_touched = False  # since the shell was last told

    @property
    def is_kept(self) -> bool:
        """Return whether this is on the disk, or will be."""
        return self.state is not RecordState.LEAVING and not self.has_to_go

    @property
    def stamp(self) -> Stamp | None:
        """Return when this may be evicted, or None while it may not: see `EvictionOrder`."""
        if self.state is not RecordState.STORED or self.reads:
            return None
        return (self.touched_at, -self.depth, self.serial)

    def __repr__(self) -> str:
        return f"<StoredBlock {self.name.key.hex()[:8]} depth={self.depth} {self.state.value} reads={self.reads}>"


class Turns(Generic[_T]):
    """A queue for each tenant, and each tenant in its turn: a long queue of one holds up no other."""

    def __init__(self) -> None:
        self._queue_by_tenant: dict[str, deque[_T]] = {}

    def __bool__(self) -> bool:
        return bool(self._queue_by_tenant)

    def waiting(self, tenant: str) -> int:
        """Return how long a tenant's queue is."""
        return len(self._queue_by_tenant.get(tenant, ()))

    def put(self, tenant: str, item: _T) -> None:
        """Put an item at the end of a tenant's queue."""
        self._queue_by_tenant.setdefault(tenant, deque()).append(item)

    def first(self) -> _T:
        """Return the item whose turn it is."""
        return next(iter(self._queue_by_tenant.values()))[0]

    def take(self) -> _T:
        """Take the item whose turn it is; the next is another tenant's, if any other waits."""
        tenant, queue = next(iter(self._queue_by_tenant.items()))
        del self._queue_by_tenant[tenant]
        item = queue.popleft()
        if queue:
            self._queue_by_tenant[tenant] = queue
        return item


class Disk:
    """All records, of `pages` pages of the slab; with none nothing is ever offered, found or due."""

    def __init__(self, pages: int, limits_by_name: Mapping[str, Limits], census: Census) -> None:
        self.pool = PagePool(pages)
        self.shares: Shares[StoredBlock] = Shares(
            limits_by_name,
            pages=pages,
            page_bytes=DISK_PAGE_BYTES,
            in_flight_max_pages=0,
            census=census,
            place="disk",
            has_pool=False,
        )
        self.writes_in_flight_max = WRITES_IN_FLIGHT_MAX
        self.reads_in_flight_max = READS_IN_FLIGHT_MAX
        self.tally = Tally()
        self.last_op: OpId = 0
        self.writes: dict[OpId, tuple[StoredBlock, Block]] = {}
        self.reads: dict[OpId, tuple[StoredBlock, Block]] = {}
        self.forgetting: dict[OpId, list[StoredBlock]] = {}
        self._leaving_pages = 0
        self._to_forget: list[StoredBlock] = []
        self._going: set[RecordName] = set()  # what the index may still name, or will: not written again before
        self._to_write: Turns[tuple[Block, bytes]] = Turns()
        self._has_more_to_write = False
        self._to_read: Turns[tuple[StoredBlock, Block]] = Turns()
        self._pages_to_read: Counter[str] = Counter()  # by tenant
        self._page_seconds = 0.0  # how long reads have taken lately; 0: there was none yet
        self._touched: deque[StoredBlock] = deque()
        self._erasing: list[User[StoredBlock]] = []
        self._erasing_by_name: dict[tuple[str, UserId], list[User[StoredBlock]]] = {}
        self._serials = count(1)

    def restore(self, records: Iterable[StoredRecord], published: Container[Key] = ()) -> None:
        """Know these records again, before anything else happens. Those that can't be are forgotten.

        Of two that claim one page, at least one is. Of the public pool only what is still `published` is known.
        """
        by_age = sorted(records, key=lambda record: (record.touched_at, -record.depth))
        claims = sorted((run.start, run.start + run.count) for record in by_age for run in record.slot)
        clashing = {place for one, other in pairwise(claims) if one[1] > other[0] for place in (one, other)}
        taken: list[Run] = []
        for record in by_age:
            places = [(run.start, run.start + run.count) for run in record.slot]
            fits = all(0 <= start < end <= self.pool.pages and (start, end) not in clashing for start, end in places)
            tenant = self.shares.tenant(record.name.tenant)
            if fits and (record.name.tenant != PUBLIC_TENANT or record.name.key in published):
                taken += record.slot
                stored = self._add(record.name, record.slot, record.length, record.depth, record.touched_at)
                stored.state = RecordState.STORED
                self.shares.offer(stored)
            else:
                user = User[StoredBlock](record.name.user, tenant)
                self._to_forget.append(
                    StoredBlock(
                        user=user,
                        name=record.name,
                        slot=(),
                        pages=0,
                        length=record.length,
                        depth=record.depth,
                        touched_at=record.touched_at,
                        serial=next(self._serials),
                    )
                )
        self.pool = PagePool.around(self.pool.pages, taken)
        for owner in self.shares.tenant_by_name.values():
            owner.set_limits(owner.limits)  # which may be lower than what is there
            self.shares.note_due(owner)

    # What is there

    def find(
        self, tenant_name: str, user_id: UserId, key: Key, *, length: int | None, now: float
    ) -> StoredBlock | None:
        """Return a block's record, of some length or with None of any, if it can be read."""
        record = self._linked(tenant_name, user_id, key)
        if record is None or record.state is not RecordState.STORED or length not in (None, record.length):
            return None
        return None if self._is_expired(record, now) else record

    def touch(self, record: StoredBlock, now: float) -> None:
        """Note that a block was used, wherever it was."""
        record.touched_at = max(record.touched_at, now)
        if not record.is_touched:
            record.is_touched = True
            self._touched.append(record)

    def take_touched(self) -> list[tuple[RecordName, float]]:
        """Return which records were used since this was last asked, and when; at most some, then ask again."""
        touched = [self._touched.popleft() for _ in range(min(len(self._touched), TOUCHED_MAX))]
        for record in touched:
            record.is_touched = False
        return [(record.name, record.touched_at) for record in touched if record.is_kept]

    def reading_seconds(self, tenant_name: str, pages: int) -> float:
        """Return how long a tenant will wait for so many pages more; 0 is not known.

        Each tenant has its turn: of another's queue only as much is read before as this one's is long.
        """
        own = self._pages_to_read[tenant_name] + pages
        others = sum(min(queued, own) for name, queued in self._pages_to_read.items() if name != tenant_name)
        return (own + others) * self._page_seconds

    # What is written

    def offer(self, block: Block, root: bytes) -> None:
        """Have a READY block written, unless it is on the disk already; `root` stands for its namespace."""
        tenant, user = block.user.tenant, block.user
        known = self._linked(tenant.name, user.id, block.key)
        if known is not None and known.is_kept and known.length == block.length:
            block.record = known
            self.touch(known, block.touched_at)
        elif self.pool.pages and not user.is_erased:
            if self._to_write.waiting(tenant.name) < OFFERED_MAX and not self._is_to_go(user, block.key):
                self._to_write.put(tenant.name, (block, root))
            else:
                self._count(tenant.name, "skipped")

    def _is_to_go(self, user: User[Block], key: Key) -> bool:
        """Return whether an erased user of that name still has such a record, which will be forgotten by its name."""
        return any(key in erased.block_by_key for erased in self._erasing_by_name.get((user.tenant.name, user.id), ()))

    def start_write(self, may_pin: Callable[[Block], bool]) -> tuple[WriteRecord, Block] | None:
        """Return what is to be written now, and the block, which has to stay where it is until the answer."""
        self._has_more_to_write = False
        for _ in range(SKIPPED_MAX):
            if not self._to_write or len(self.writes) >= self.writes_in_flight_max:
                return None
            block, root = self._to_write.first()
            if block.state is not BlockState.READY or block.user.is_erased or is_on_disk(block):
                self._to_write.take()
                continue
            pages = record_pages(block.length)
            name = RecordName(block.user.tenant.name, block.user.id, block.key, root)
            # One of another length may have the name: engines that disagree must not stop the server.
            is_taken = name in self._going or self._linked(name.tenant, name.user, name.key) is not None
            if is_taken or not may_pin(block) or self._make_room(block, pages) is not None:
                self._to_write.take()
                self._count(name.tenant, "skipped")
                continue
            if self.pool.free_pages < pages:
                return None  # until what leaves is forgotten
            self._to_write.take()
            slot = self.pool.allocate(pages)
            assert slot is not None, "made room, and yet there is none"
            block.record = self._add(name, slot, block.length, block.depth, block.touched_at)
            op = self._next_op()
            self.writes[op] = (block.record, block)
            return WriteRecord(op, name, block.extent, slot, block.length, block.depth, block.touched_at), block
        self._has_more_to_write = True
        return None

    def end_write(self, op: OpId, *, is_written: bool) -> Block:
        """Take in how a write has ended, and return its block, which may move again."""
        record, block = self.writes.pop(op)
        if not is_written:
            self._count(record.name.tenant, "skipped")
            self._drop(record)
            record.state = RecordState.LEAVING
            self._going.discard(record.name)
            self.pool.free(record.slot)
            return block
        record.state = RecordState.STORED
        self._count(record.name.tenant, "stored")
        if record.has_to_go or record.user.is_erased:
            self.let_go(record)
        else:
            self.shares.offer(record)
        return block

    # What is read

    def queue_read(self, record: StoredBlock, block: Block) -> None:
        """Have a record read into a block that is WRITING; it stays until then."""
        record.reads += 1
        self._pages_to_read[record.name.tenant] += record.pages
        self._to_read.put(record.name.tenant, (record, block))

    def start_reads(self) -> tuple[list[ReadRecord], list[Block]]:
        """Return what is to be read now, and for which blocks it isn't needed any more."""
        work: list[ReadRecord] = []
        needless: list[Block] = []
        while self._to_read and len(self.reads) < self.reads_in_flight_max:
            record, block = self._to_read.take()
            if block.state is BlockState.DOOMED or block.user.is_erased:
                self._end_read(record)
                needless.append(block)
                continue
            op = self._next_op()
            self.reads[op] = (record, block)
            work.append(ReadRecord(op, record.name, block.extent, record.slot, record.length))
        return work, needless

    def end_read(self, op: OpId, *, seconds: float | None) -> Block:
        """Take in how long a read took, or with None that its record is lost, and return the block it was for."""
        record, block = self.reads[op]
        del self.reads[op]
        if seconds is not None:
            page_seconds = max(seconds, 0.0) / (len(self.reads) + 1) / record.pages
            self._page_seconds += (page_seconds - self._page_seconds) * (_SPEED_GAIN if self._page_seconds else 1.0)
            self._count(record.name.tenant, "loaded")
        else:
            self._count(record.name.tenant, "lost")
            self.let_go(record)
        self._end_read(record)
        return block

    def _end_read(self, record: StoredBlock) -> None:
        self._pages_to_read[record.name.tenant] -= record.pages
        if not self._pages_to_read[record.name.tenant]:
            del self._pages_to_read[record.name.tenant]
        record.reads -= 1
        if not record.reads:
            if record.has_to_go or record.user.is_erased:
                self.let_go(record)
            else:
                self.shares.offer(record)

    # What goes

    def let_go(self, record: StoredBlock) -> None:
        """Forget a record, as soon as it is neither written nor read. Nobody finds it from now on."""
        if record.state is RecordState.LEAVING:
            return
        record.has_to_go = True
        self._going.add(record.name)
        if record.state is RecordState.STORED and not record.reads:
            self._drop(record)
            self._leave(record)
        else:
            self._unlink(record)

    def discard(self, tenant_name: str, user_id: UserId, key: Key) -> None:
        """Let a block's record go, since the block was found to be bad."""
        record = self._linked(tenant_name, user_id, key)
        if record is not None:
            self.let_go(record)

    def erase(self, tenant_name: str, user_id: UserId | None) -> None:
        """Let all records of a user go, or with None of a tenant; nobody finds them from now on."""
        tenant = self.shares.tenant_by_name.get(tenant_name)
        for id_ in list(tenant.user_by_id) if tenant is not None and user_id is None else [user_id]:
            user = tenant.erase(id_) if tenant is not None and id_ is not None else None
            if user is not None:
                self._erasing.append(user)
                self._erasing_by_name.setdefault((tenant_name, user.id), []).append(user)

    @property
    def due_at(self) -> float | None:
        """Return when something has to go though nobody needs its room, or is still to be written; -inf is now."""
        return -float("inf") if self._erasing or self._has_more_to_write else self.shares.due_at

    def tick(self, now: float) -> bool:
        """Let one record go that is due, or see that none of a user is; return whether there was anything to do."""
        while self._erasing:
            user = self._erasing[-1]
            if user.block_by_key:
                self.let_go(next(reversed(user.block_by_key.values())))
                return True
            self._erasing.pop()
            namesakes = self._erasing_by_name[user.tenant.name, user.id]
            namesakes.remove(user)
            if not namesakes:
                del self._erasing_by_name[user.tenant.name, user.id]
            user.tenant.forget_if_empty(user)
            self.shares.forget_if_empty(user.tenant)
        tenant = self.shares.first_due(now)
        if tenant is None:
            return False
        due = self.shares.due_victim(tenant)
        if due is not None:
            victim, is_expired = due
            self._count(tenant.name, "expired" if is_expired else "evicted")
            self.let_go(victim)
        self.shares.note_due(tenant)
        return True

    def start_forgetting(self) -> list[ForgetRecords]:
        """Return which records are to be taken out of the index now."""
        work: list[ForgetRecords] = []
        while self._to_forget:
            records, self._to_forget = self._to_forget[:FORGOTTEN_MAX], self._to_forget[FORGOTTEN_MAX:]
            op = self._next_op()
            self.forgetting[op] = records
            work.append(ForgetRecords(op, [record.name for record in records]))
        return work

    def end_forgetting(self, op: OpId) -> None:
        """Free the pages of records that the index doesn't name any more."""
        for record in self.forgetting.pop(op):
            self._going.discard(record.name)
            if record.slot:
                self._leaving_pages -= record.pages
                self.pool.free(record.slot)

    def _make_room(self, block: Block, pages: int) -> Refusal | None:
        """Let go what must for `pages` more; they are free now, or once it is forgotten."""
        tenant = self.shares.tenant(block.user.tenant.name)
        stamp = (block.touched_at, -block.depth, next(self._serials))
        victims: list[StoredBlock] = []

        def take(victim: StoredBlock) -> None:
            victims.append(victim)
            self._drop(victim)

        refusal = self.shares.why_never(tenant, pages) or self.shares.choose_victims(
            tenant, block.user.id, pages, stamp, free_pages=self.pool.free_pages + self._leaving_pages, take=take
        )
        for victim in victims:
            if refusal is None:
                self._count(victim.name.tenant, "evicted")
                self._leave(victim)
            else:
                self._link(victim)
                self.shares.offer(victim)
        return refusal

    # Books

    def _linked(self, tenant_name: str, user_id: UserId, key: Key) -> StoredBlock | None:
        tenant = self.shares.tenant_by_name.get(tenant_name)
        user = tenant.user_by_id.get(user_id) if tenant is not None else None
        return user.block_by_key.get(key) if user is not None else None

    def _is_expired(self, record: StoredBlock, now: float) -> bool:
        tenant = record.user.tenant
        return tenant.ttl_seconds is not None and tenant.expires_at(record) <= now

    def _add(self, name: RecordName, slot: Extent, length: int, depth: int, touched_at: float) -> StoredBlock:
        """Make a record, linked and charged for."""
        tenant = self.shares.tenant(name.tenant)
        self.shares.keep(tenant)
        record = StoredBlock(
            user=tenant.user(name.user),
            name=name,
            slot=slot,
            pages=sum(run.count for run in slot),
            length=length,
            depth=depth,
            touched_at=touched_at,
            serial=next(self._serials),
        )
        self._link(record)
        return record

    def _link(self, record: StoredBlock) -> None:
        user = record.user
        assert record.name.key not in user.block_by_key, "two records of one block"
        user.link(record.name.key, record)
        user.charge(record.pages)
        if not user.is_erased:  # whom nobody finds again
            user.tenant.user_by_id.setdefault(user.id, user)
        self.shares.keep(user.tenant)
        self.shares.note_growth(user.tenant)

    def _unlink(self, record: StoredBlock) -> None:
        """Let nobody find a record any more; it is charged for until it is dropped."""
        if record.user.block_by_key.get(record.name.key) is record:
            record.user.unlink(record.name.key)
        record.user.order.withdraw(record)

    def _drop(self, record: StoredBlock) -> None:
        """Charge nobody for a record any more. Its pages are not free yet."""
        self._unlink(record)
        user = record.user
        user.charge(-record.pages)
        user.tenant.forget_if_empty(user)
        self.shares.forget_if_empty(user.tenant)

    def _leave(self, record: StoredBlock) -> None:
        record.state = RecordState.LEAVING
        self._going.add(record.name)
        self._leaving_pages += record.pages
        self._to_forget.append(record)

    def _count(self, tenant_name: str, what: str) -> None:
        """Count a decision, for a tenant as long as it has something here, and in all."""
        for tally in (self.shares.tenant(tenant_name).tally, self.tally):
            setattr(tally, what, getattr(tally, what) + 1)

    def _next_op(self) -> OpId:
        self.last_op += 1
        return self.last_op


def is_on_disk(block: Block) -> bool:
    """Return whether a block has a record, or will have one."""
    return block.record is not None and block.record.is_kept
