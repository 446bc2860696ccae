"""The disk tier: carries out what the cache asks of the disk, and tells it what came of it.

    perform(ReadRecord)    →  I/O threads  ──────────────────────────→  RecordRead | RecordLost
    perform(WriteRecord)   →  I/O threads  ─┬────────────────────────→  RecordNotWritten
                                            └→  index thread  → commit → RecordWritten | RecordNotWritten
    perform(ForgetRecords)  ─────────────────→  index thread  → commit → RecordsForgotten
    perform(KeepPublication)  ───────────────→  index thread  → commit

Reads go before writes, since somebody waits for them, but only so many before any one write. What happens in the index
happens in the order in which it was put there, in batches of one commit each. Both queues are as long as what the cache
has in flight, which it bounds.
"""

import logging
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from itertools import count
from math import inf
from pathlib import Path
from queue import Empty, PriorityQueue, SimpleQueue
from threading import Event as Flag
from threading import Lock, Thread
from typing import TypeVar

from msgspec import Struct

from saltern.core.disk import DISK_PAGE_BYTES
from saltern.core.effects import (
    Event,
    ForgetRecords,
    KeepPublication,
    Loss,
    OpId,
    ReadRecord,
    RecordLost,
    RecordName,
    RecordNotWritten,
    RecordRead,
    RecordsForgotten,
    RecordWritten,
    StoredPublication,
    StoredRecord,
    WriteRecord,
)
from saltern.core.extents import Extent
from saltern.core.keys import UserId
from saltern.core.messages import PublicationId
from saltern.tiers.damage import Verifier, misplaced, sound_keys
from saltern.tiers.datakeys import DataKey, KeyId, Keyring, Owner, wrap
from saltern.tiers.errors import DiskError
from saltern.tiers.index import INDEX_ERRORS, Row, disk_error, is_out_of_room
from saltern.tiers.record import NONCE_BYTES, pieces, record_bytes, seal, unseal
from saltern.tiers.rotation import current_key, finish_rotation, open_index, rotate
from saltern.tiers.slab import PageBuffer, Slab

log = logging.getLogger(__name__)

IO_THREADS = 2
"""One encrypts while the other's record is on its way; more made neither reads nor writes faster where measured."""

OVERTAKING_MAX = 32
"""Reads that may go before a write that was asked for earlier: who only reads must not keep others from storing."""

SYNC_SECONDS = 5.0
SYNC_BYTES = 1 << 30
"""The slab is synced so often, or after so much: what a start after a crash has to read to know that it is whole."""

BATCH_MAX = 1024
"""Changes of the index in one commit at most."""

RESERVE_BYTES = 16 << 20
"""Left free on the filesystem besides twice the index: for its log, and for what else lies beside the slab."""

RETRY_SECONDS = 1.0
"""How long an index that can't be written is left alone."""

_Result = TypeVar("_Result")

Record = ReadRecord | WriteRecord
DiskWork = Record | ForgetRecords | KeepPublication


class Restored(Struct, frozen=True):
    """What was found at a start.

    `dropped` records were damaged, `torn` ones were not written whole, and `cut` ones lay beyond the slab's new end.
    """

    records: list[StoredRecord]
    publications: list[StoredPublication]
    dropped: int
    torn: int
    cut: int


class _Written(Struct, frozen=True):
    """A record is in the slab, and the index must name it."""

    work: WriteRecord
    key: DataKey


class _Touched(Struct, frozen=True):
    """Records were used, by the wall clock."""

    touched: Sequence[tuple[RecordName, float]]


class _Synced(Struct, frozen=True):
    """Records up to this serial are on the platter."""

    serial: int


class _Call(Struct, frozen=True):
    """Something that the index thread does when its turn has come."""

    function: Callable[[], None]


class _Stop(Struct, frozen=True):
    """No change follows."""


_Change = _Written | ForgetRecords | KeepPublication | _Touched | _Synced


class DiskTier:
    """The records in a data folder of at most `size_bytes`. Raises `DiskError`.

    `arena` is the RAM tier's memory, in pages of `page_bytes`; `tell` takes an event, from any thread; `wall_clock`
    returns seconds that go on while no server runs.
    """

    def __init__(
        self,
        folder: Path,
        *,
        size_bytes: int,
        key_path: Path,
        arena: memoryview,
        page_bytes: int,
        tell: Callable[[Event], None],
        wall_clock: Callable[[], float],
    ) -> None:
        self._pages = size_bytes // DISK_PAGE_BYTES
        self._key_path, self._arena, self._page_bytes = key_path, arena, page_bytes
        self._tell, self._wall_clock = tell, wall_clock
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"{folder}: {error.strerror}") from None
        self._index = open_index(folder, key_path)
        try:
            self._slab = Slab(folder / "slab")
            try:
                self._deployment_key = self._finish_rotation()
            except BaseException:
                self._slab.close()
                raise
        except (OSError, *INDEX_ERRORS) as error:
            self._index.close()
            raise disk_error(folder, error) from None
        except DiskError:
            self._index.close()
            raise
        if not self._slab.direct:
            log.info("%s is read and written through the page cache: its filesystem has no direct I/O", self._slab.path)
        self._keyring = Keyring()
        self._wall_minus_core = 0.0
        self._numbers = count()
        self._work: PriorityQueue[tuple[float, int, Record | None]] = PriorityQueue()
        self._changes: SimpleQueue[_Change | _Call | _Stop] = SimpleQueue()
        self._forgets: list[ForgetRecords] = []  # wait for an index that can be written
        self._doubtful: list[RecordName] = []  # a commit failed: whether their rows are there is not known
        self._destroyed: dict[tuple[str, UserId | None], list[KeyId]] = {}  # whose bytes may still be there
        self._serial = self._index.serial  # of the last row that is committed
        self._unsynced_bytes = 0
        self._has_lost_writes = False
        self._sync = Flag()
        self._calling = Lock()  # so that whoever waits for the index thread has asked before it was told to end
        self._closing = self._abandoning = False
        self._room_trouble = _Trouble(
            f"the filesystem of {self._slab.path} is almost full, so that nothing new is stored but in room that it has"
        )
        self._slab_trouble = _Trouble(f"{self._slab.path} can't be written, so that nothing new is stored")
        self._index_trouble = _Trouble(f"{self._index.path} can't be written, so that nothing new is stored")
        self._io_threads = [
            Thread(target=self._do_io, name=f"saltern-disk-{number}", daemon=True) for number in range(IO_THREADS)
        ]
        self._index_thread = Thread(target=self._keep_index, name="saltern-disk-index", daemon=True)
        self._sync_thread = Thread(target=self._keep_synced, name="saltern-disk-sync", daemon=True)

    # A life

    def restore(self, now: float, erased: Collection[Owner] = ()) -> Restored:
        """Return what is stored, once, before `start`. `now` is the core's clock. Raises `DiskError`.

        `erased` are users for whom nothing is ever stored again: a key of theirs that is still there is destroyed.
        """
        self._wall_minus_core = self._wall_clock() - now
        try:
            self._end_erasing(erased)
            return self._restore(now)
        except (OSError, *INDEX_ERRORS) as error:
            raise disk_error(self._index.path.parent, error) from None

    def start(self) -> None:
        """Begin to carry out what `perform` is given."""
        for thread in (*self._io_threads, self._index_thread, self._sync_thread):
            thread.start()

    def perform(self, work: DiskWork) -> None:
        """Have something done; the event that `work` names is told when it is. Never waits."""
        match work:
            case ReadRecord() | WriteRecord() if self._closing:
                self._give_up(work)
            case ReadRecord():
                number = next(self._numbers)
                self._work.put((number, number, work))
            case WriteRecord():
                number = next(self._numbers)
                self._work.put((number + OVERTAKING_MAX, number, work))
            case ForgetRecords() | KeepPublication():
                self._changes.put(work)

    def note_touched(self, touched: Sequence[tuple[RecordName, float]], now: float) -> None:
        """Keep when records were used last, by the core's clock; of use at the next start only. Never waits."""
        self._wall_minus_core = self._wall_clock() - now
        self._changes.put(_Touched([(name, self._by_wall_clock(when)) for name, when in touched]))

    def close(self, seconds: float = 10.0) -> None:
        """Finish what was begun, for so long, give up the rest, and let go of the files."""
        with self._calling:
            if self._closing:
                return
            self._closing = True
        deadline = time.monotonic() + seconds
        started = self._index_thread.is_alive()
        if started:
            for _ in self._io_threads:
                self._work.put((inf, next(self._numbers), None))
            _join(self._io_threads, deadline)
            self._abandoning = True  # what is left in the queue is answered without being done
            _join(self._io_threads, time.monotonic() + 1.0)
            self._sync.set()
            self._changes.put(_Stop())
            _join([self._sync_thread, self._index_thread], max(deadline, time.monotonic() + 1.0))
            if any(thread.is_alive() for thread in (*self._io_threads, self._index_thread, self._sync_thread)):
                log.warning("%s doesn't answer: what was written last is verified at the next start", self._slab.path)
                return
            self._note_all_synced()
        self._index.close()
        self._slab.close()
        self._arena = memoryview(b"")  # whoever lent it can unmap it now

    # Keys, for any thread but the loop's: these wait for the disk

    def destroy_keys(self, tenant: str, user: UserId | None, *, for_good: bool) -> list[KeyId]:
        """Destroy the data key of a user, or with None of all users of a tenant, and return which keys those were.

        What is under way for them fails, and so does all that comes until `allow`; with `for_good`, for ever. Raises
        `DiskError`, after which the keys may or may not be destroyed, and it should be asked for again.
        """
        self._keyring.refuse(tenant, user)
        return self._on_index(lambda: self._destroy(tenant, user, for_good=for_good))

    def allow(self, tenant: str, user: UserId | None, after: OpId) -> None:
        """Let operations younger than `after` make a new key for a user whose key was destroyed."""
        self._keyring.allow(tenant, user, after)

    def rotate_key(self) -> int:
        """Replace the deployment key, and return how many data keys it wraps. Raises `DiskError`."""
        return self._on_index(self._rotate)

    # What is published, likewise

    def forget_publication(self, id_: PublicationId) -> bool:
        """Know a publication no more after a restart, and return whether it was known.

        Raises `DiskError`, after which it may or may not be, and it should be asked for again.
        """
        return self._on_index(lambda: self._forget_publication(id_))

    # A start

    def _finish_rotation(self) -> bytes:
        """Finish what was interrupted that destroys or replaces keys; return the deployment key."""
        try:
            return finish_rotation(self._index, self._key_path)[0]
        except (OSError, *INDEX_ERRORS) as error:
            if not is_out_of_room(error):
                raise
            # What was erased may itself be what takes the room.
            for run in self._slab.unnamed(row.slot for row in self._index.rows()):
                self._slab.give_back(run)
            return finish_rotation(self._index, self._key_path)[0]

    def _end_erasing(self, erased: Collection[Owner]) -> None:
        """Destroy what an erasure that was interrupted has left of these, or an older index has brought back."""
        self._keyring.drop(erased, for_good=True)
        left = {key.owner for key in self._index.wrapped_keys()}.intersection(erased)
        if left:
            with self._index.transaction():
                self._index.destroy(left)
            self._finish_rotation()
            log.warning("%d users were erased and still had a key on the disk: it is destroyed now", len(left))

    def _restore(self, now: float) -> Restored:
        index, verifier = self._index, Verifier(self._slab)
        dropped = index.count_unsound()
        key_by_owner, bad_keys = sound_keys(index, self._deployment_key)
        rows = list(index.rows())
        wrong = misplaced(rows, self._slab.pages)
        cut = 0
        synced, torn = index.synced, 0
        records: list[StoredRecord] = []
        forgotten: list[RecordName] = []
        for row in rows:
            key = key_by_owner.get(row.owner)
            if key is None or row.serial in wrong:
                dropped += 1
                forgotten.append(row.name)
            elif any(run.start + run.count > self._pages for run in row.slot):
                cut += 1
                forgotten.append(row.name)
            elif row.serial > synced and verifier.loss(row, key) is not None:
                torn += 1
                forgotten.append(row.name)
            else:
                touched_at = now - max(0.0, now + self._wall_minus_core - row.touched)
                records.append(StoredRecord(row.name, row.slot, row.length, row.depth, touched_at))
        with index.transaction():
            index.drop_damaged(bad_keys)
            index.forget(forgotten)
            index.drop_unused_keys()
        stored_for = {(record.name.tenant, record.name.user) for record in records}
        for owner in stored_for:
            self._keyring.add(owner, key_by_owner[owner])
        # After the rows beyond its new end are gone.
        self._slab.resize(self._pages)
        return Restored(records, index.publications(), dropped, torn, cut)

    # Records, on the I/O threads

    def _do_io(self) -> None:
        buffer = PageBuffer()
        while (work := self._work.get()[2]) is not None:
            match work:
                case _ if self._abandoning:
                    self._give_up(work)
                case ReadRecord():
                    self._read(work, buffer)
                case WriteRecord():
                    self._write(work, buffer)

    def _give_up(self, work: Record) -> None:
        is_read = isinstance(work, ReadRecord)
        self._tell(RecordLost(work.op, Loss.UNREADABLE) if is_read else RecordNotWritten(work.op))

    def _read(self, work: ReadRecord, buffer: PageBuffer) -> None:
        began = time.monotonic()
        loss = self._read_loss(work, buffer)
        # Under its lock, so that nothing is told to be read once `refuse` has returned.
        with self._keyring.lock:
            if loss is None and not self._keyring.allows(work.op, _owner(work.name)):
                loss = Loss.UNREADABLE
                for piece in self._pieces(work.extent, work.length):
                    piece[:] = bytes(len(piece))  # it was decrypted before its user was erased
            if loss is None:
                self._tell(RecordRead(work.op, time.monotonic() - began))
            else:
                self._tell(RecordLost(work.op, loss))

    def _read_loss(self, work: ReadRecord, buffer: PageBuffer) -> Loss | None:
        key = self._keyring.find(work.op, _owner(work.name))
        if key is None:
            return Loss.UNREADABLE
        try:
            record = buffer.view(record_bytes(work.length))
            self._slab.read(work.slot, record)
        except OSError:
            return Loss.UNREADABLE
        return None if unseal(work.name, key, record, self._pieces(work.extent, work.length)) else Loss.NOT_AUTHENTIC

    def _write(self, work: WriteRecord, buffer: PageBuffer) -> None:
        key = self._keyring.find_or_make(work.op, _owner(work.name))
        # An index that can't be written must not collect what it has missed.
        if key is None or self._index_trouble.now:
            return self._tell(RecordNotWritten(work.op))
        try:
            if not self._has_room(work):
                return self._tell(RecordNotWritten(work.op))
            record = buffer.view(record_bytes(work.length))
            seal(work.name, key, secrets.token_bytes(NONCE_BYTES), self._pieces(work.extent, work.length), record)
            self._slab.write(work.slot, record)
        except (OSError, ValueError) as error:
            self._slab_trouble.begins(error)
            return self._tell(RecordNotWritten(work.op))
        self._slab_trouble.ends()
        return self._changes.put(_Written(work, key))

    def _has_room(self, work: WriteRecord) -> bool:
        """Return whether a record leaves the filesystem the room that erasing needs. Raises OSError."""
        free_bytes = self._slab.free_bytes
        kept_bytes = RESERVE_BYTES + 2 * self._index.path.stat().st_size  # the whole index is written anew
        if free_bytes >= kept_bytes + record_bytes(work.length):
            self._room_trouble.ends()
            return True
        self._room_trouble.begins(f"{free_bytes} bytes are free, {kept_bytes} are kept so that users can be erased")
        return self._slab.has_room_for(work.slot)

    def _pieces(self, extent: Extent, length: int) -> list[memoryview]:
        return list(pieces(self._arena, extent, page_bytes=self._page_bytes, length=length))

    # The index, on its thread

    def _keep_index(self) -> None:
        while True:
            changes, order = self._next_changes()
            if changes or self._index_trouble.now:
                self._change(changes)
            match order:
                case _Call():
                    order.function()
                case _Stop():
                    return

    def _next_changes(self) -> tuple[list[_Change], _Call | _Stop | None]:
        """Wait for changes, and return those that can be one commit, and the order that ended them."""
        changes: list[_Change] = []
        # What failed is tried again even if nothing comes.
        wait_seconds = RETRY_SECONDS if self._index_trouble.now else None
        while len(changes) < BATCH_MAX:
            try:
                item = self._changes.get(timeout=wait_seconds)
            except Empty:
                break
            if isinstance(item, _Call | _Stop):
                return changes, item
            changes.append(item)
            wait_seconds = 0.0
        return changes, None

    def _change(self, changes: Sequence[_Change]) -> None:
        """Make one commit of changes and of what waits, then tell what came of them; or of none of them."""
        forgets = [*self._forgets, *(change for change in changes if isinstance(change, ForgetRecords))]
        written = [change for change in changes if isinstance(change, _Written)]
        named: list[_Written] = []
        try:
            with self._index.transaction():
                self._index.forget(self._doubtful)
                for forget in self._forgets:
                    self._index.forget(forget.names)
                for change in changes:
                    if not isinstance(change, _Written):
                        self._change_rest(change)
                    elif self._keyring.allows(change.work.op, _owner(change.work.name)):
                        self._name(change)
                        named.append(change)
        except INDEX_ERRORS as error:
            self._index_trouble.begins(error)
            self._forgets = forgets
            self._doubtful += [change.work.name for change in written]
            named = []
        else:
            self._index_trouble.ends()
            self._forgets, self._doubtful = [], []
            for forget in forgets:
                self._tell(RecordsForgotten(forget.op))
        named_ops = {change.work.op for change in named}
        for op in (change.work.op for change in written):
            self._tell(RecordWritten(op) if op in named_ops else RecordNotWritten(op))
        self._note_unsynced(named)

    def _name(self, change: _Written) -> None:
        work, key = change.work, change.key
        row = Row(work.name, work.slot, work.length, work.depth, self._by_wall_clock(work.touched_at))
        self._index.put(row, key.id, lambda: wrap(self._deployment_key, row.owner, key))

    def _change_rest(self, change: ForgetRecords | KeepPublication | _Touched | _Synced) -> None:
        match change:
            case KeepPublication(publication):
                self._index.put_publication(publication)
            case ForgetRecords():
                self._index.forget(change.names)
            case _Touched():
                self._index.touch(change.touched)
            case _Synced():
                self._index.set_synced(change.serial)

    def _note_unsynced(self, named: Sequence[_Written]) -> None:
        self._serial = self._index.serial
        self._unsynced_bytes += sum(record_bytes(change.work.length) for change in named)
        if self._unsynced_bytes >= SYNC_BYTES:
            self._unsynced_bytes = 0
            self._sync.set()

    def _on_index(self, function: Callable[[], _Result]) -> _Result:
        """Do something in its turn on the index's thread, and wait for it. Raises `DiskError`."""
        try:
            answer: Future[_Result] = Future()
            with self._calling:
                if self._closing:
                    raise DiskError("the server is about to end")
                if not self._index_thread.is_alive():
                    return function()
                self._changes.put(_Call(lambda: _answer(answer, function)))
            return answer.result()
        except (OSError, *INDEX_ERRORS) as error:
            raise disk_error(self._index.path, error) from None

    def _destroy(self, tenant: str, user: UserId | None, *, for_good: bool) -> list[KeyId]:
        owners = self._keyring.owners(tenant) if user is None else [(tenant, user)]
        with self._index.transaction():
            destroyed = self._index.destroy(owners)
        self._keyring.drop(owners, for_good=for_good)
        # Asked for again after a purge that failed, it must not find that there was nothing.
        self._destroyed.setdefault((tenant, user), []).extend(destroyed)
        self._index.purge()
        return self._destroyed.pop((tenant, user))

    def _forget_publication(self, id_: PublicationId) -> bool:
        with self._index.transaction():
            was_known = self._index.drop_publication(id_)
        self._index.settle()
        return was_known

    def _rotate(self) -> int:
        try:
            return rotate(self._index, self._key_path)[1]
        finally:
            # Also after a failure: what it was interrupted at decides which one data keys are wrapped under.
            self._deployment_key = current_key(self._index, self._key_path)

    # The platter

    def _keep_synced(self) -> None:
        synced = self._serial
        while not self._closing:
            self._sync.wait(SYNC_SECONDS)
            self._sync.clear()
            serial = self._serial
            if serial > synced and self._sync_slab():
                self._changes.put(_Synced(serial))
                synced = serial

    def _sync_slab(self) -> bool:
        """Sync the slab, and return whether all that was written in this life is on the platter.

        After one failure it never is: the kernel says once that it has lost something, and the next sync succeeds.
        """
        try:
            self._slab.sync()
        except OSError as error:
            self._has_lost_writes = True
            self._slab_trouble.begins(error)
        return not self._has_lost_writes

    def _note_all_synced(self) -> None:
        if self._sync_slab():
            try:
                with self._index.transaction():
                    self._index.set_synced(self._index.serial)
            except INDEX_ERRORS as error:
                self._index_trouble.begins(error)

    def _by_wall_clock(self, when: float) -> float:
        return when + self._wall_minus_core


class _Trouble:
    """Something that fails: logged when it begins and when it is over, not each time. From any thread."""

    def __init__(self, what: str) -> None:
        self._what = what
        self.now = False

    def begins(self, error: Exception | str) -> None:
        """Note that it failed."""
        if not self.now:
            self.now = True
            log.warning("%s: %s", self._what, error)

    def ends(self) -> None:
        """Note that it didn't."""
        if self.now:
            self.now = False
            log.info("no longer: %s", self._what)


def _owner(name: RecordName) -> Owner:
    return name.tenant, name.user


def _answer(answer: "Future[_Result]", function: Callable[[], _Result]) -> None:
    try:
        answer.set_result(function())
    except (DiskError, OSError, *INDEX_ERRORS) as error:
        answer.set_exception(error)


def _join(threads: Iterable[Thread], deadline: float) -> None:
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
