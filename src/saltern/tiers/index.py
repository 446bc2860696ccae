"""The index: which record lies where in the slab, and the users' wrapped data keys, in one SQLite file.

Rows are committed without waiting for the disk (synchronous=NORMAL): they outlive the process, and after the machine's
death the youngest may be missing. Only what destroys or replaces a key, or removes a publication, waits.
docs/disk-format.md has the tables, and what is written in which order.
"""

import errno
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from saltern.core.effects import RecordName, StoredPublication
from saltern.core.extents import Extent, Run
from saltern.core.keys import Key, UserId
from saltern.core.messages import PublicationId
from saltern.database import Kind
from saltern.tiers.datakeys import KeyId, Owner
from saltern.tiers.errors import DiskDamagedError, DiskError, DiskInUseError

_SCHEMA = (
    """
    CREATE TABLE meta (name TEXT PRIMARY KEY NOT NULL, value) WITHOUT ROWID;
    CREATE TABLE data_key (
        owner INTEGER PRIMARY KEY, id BLOB NOT NULL, tenant TEXT NOT NULL, user BLOB NOT NULL, wrapped BLOB NOT NULL,
        UNIQUE (tenant, user)
    );
    CREATE TABLE record (
        owner INTEGER NOT NULL, key BLOB NOT NULL, root BLOB NOT NULL, slot BLOB NOT NULL, length INTEGER NOT NULL,
        depth INTEGER NOT NULL, touched REAL NOT NULL, serial INTEGER NOT NULL,
        PRIMARY KEY (owner, key)
    ) WITHOUT ROWID;
    CREATE TABLE publication (
        id BLOB NOT NULL UNIQUE, root BLOB NOT NULL, blocks INTEGER NOT NULL, label TEXT NOT NULL, keys BLOB NOT NULL
    );
    INSERT INTO meta VALUES ('synced', 0), ('purge', 0);
    """,
)

_KIND = Kind(
    application_id=0x53414C44,  # "SALD"
    schema=_SCHEMA,
    pragmas=("synchronous=NORMAL", "secure_delete=ON", "temp_store=MEMORY"),
    setting="disk.path",
    in_use="another server, or a check, uses {}: give this one a disk.path of its own",
    damaged=(
        "{} is damaged ({}). The keys of all that is stored are in it: 'saltern check --repair' starts anew with an"
        " empty disk"
    ),
    error=DiskError,
    in_use_error=DiskInUseError,
    damaged_error=DiskDamagedError,
)

INDEX_ERRORS = (sqlite3.Error, UnicodeError)
"""What using a database may raise: the second where its damage is in the error's own text."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

_NUMBER = "SELECT owner FROM data_key WHERE tenant = ? AND user = ?"
_KEY = "SELECT owner, id FROM data_key WHERE tenant = ? AND user = ?"

# SQLite's own check finds pages that are no pages. What a row holds may be anything.
_SOUND_RECORD = """
    typeof(key) = 'blob' AND length(key) = 32 AND typeof(root) = 'blob' AND length(root) <= 32
    AND typeof(slot) = 'blob' AND typeof(length) = 'integer' AND length > 0 AND typeof(depth) = 'integer'
    AND typeof(touched) = 'real' AND typeof(serial) = 'integer' AND owner IN (SELECT owner FROM data_key)
"""
_SOUND_KEY = """
    typeof(id) = 'blob' AND length(id) = 16 AND typeof(tenant) = 'text' AND typeof(user) = 'blob' AND length(user) = 16
    AND typeof(wrapped) = 'blob'
"""


class Row(Struct, frozen=True):
    """A record that the index names. `slot` is empty if what stands there is none; `touched` is by the wall clock."""

    name: RecordName
    slot: Extent
    length: int
    depth: int
    touched: float
    serial: int = 0

    @property
    def owner(self) -> Owner:
        """Return whose record it is."""
        return self.name.tenant, self.name.user


class WrappedKey(Struct, frozen=True):
    """A user's data key as it lies on the disk, in the row `number`."""

    number: int
    owner: Owner
    id: KeyId
    wrapped: bytes


class Index:
    """The file at `path`, made if it is missing. Raises `DiskError`. Used by one thread at a time.

    Methods raise `INDEX_ERRORS` unless they say something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database = _KIND.open(path)
        try:
            self.serial: int = max(self.synced, self._value("SELECT ifnull(max(serial), 0) FROM record"))
        except INDEX_ERRORS as error:
            self._database.close()
            raise _KIND.translated(path, error) from None

    # What is there

    @property
    def deployment(self) -> bytes | None:
        """Return the name of the key that data keys are wrapped under; None in a new file."""
        name = self._meta("deployment")
        return bytes(name) if isinstance(name, bytes) else None

    @property
    def synced(self) -> int:
        """Return the serial up to which records are known to be on the platter."""
        serial = self._meta("synced")
        return serial if isinstance(serial, int) else 0

    @property
    def must_purge(self) -> bool:
        """Return whether keys that were deleted may still be somewhere in the file."""
        return bool(self._meta("purge"))

    def wrapped_keys(self) -> list[WrappedKey]:
        """Return the users' keys."""
        query = f"SELECT owner, tenant, user, id, wrapped FROM data_key WHERE {_SOUND_KEY}"
        return [
            WrappedKey(number, (tenant, UserId(user)), KeyId(key_id), wrapped)
            for number, tenant, user, key_id, wrapped in self._database.execute(query)
        ]

    def rows(self) -> Iterator[Row]:
        """Yield the records that could be one, in the order of their serials."""
        query = f"""
            SELECT tenant, user, key, root, slot, length, depth, touched, serial FROM record JOIN data_key USING (owner)
            WHERE {_SOUND_RECORD} AND {_SOUND_KEY} ORDER BY serial
        """
        for tenant, user, key, root, slot, length, depth, touched, serial in self._database.execute(query):
            yield Row(RecordName(tenant, UserId(user), Key(key), root), _slot(slot), length, depth, touched, serial)

    def publications(self) -> list[StoredPublication]:
        """Return what is published, the oldest first, as far as a row can be a publication."""
        publications: list[StoredPublication] = []
        query = "SELECT id, root, blocks, label, keys FROM publication ORDER BY rowid"
        for id_, root, blocks, label, keys in self._database.execute(query):
            with suppress(msgspec.MsgspecError, TypeError):
                row = {"id": id_, "root": root, "blocks": blocks, "label": label, "keys": msgspec.msgpack.decode(keys)}
                publications.append(msgspec.convert(row, StoredPublication, strict=True))
        return publications

    def count_unsound(self) -> int:
        """Return how many rows, of records and of keys, can be none, as damage alone leaves them."""
        return self._value(f"SELECT count(*) FROM record WHERE ({_SOUND_RECORD}) IS NOT 1") + self._value(
            f"SELECT count(*) FROM data_key WHERE ({_SOUND_KEY}) IS NOT 1"
        )

    def count_unused_keys(self) -> int:
        """Return how many users have a key and no record."""
        return self._value("SELECT count(*) FROM data_key WHERE owner NOT IN (SELECT owner FROM record)")

    # What changes, inside `transaction`

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Do what is inside all or not at all."""
        serial = self.serial
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            self.serial = serial
            if self._database.in_transaction:
                with suppress(*INDEX_ERRORS):  # what failed has rolled it back
                    self._database.execute("ROLLBACK")
            raise

    def put(self, row: Row, key_id: KeyId, wrapped: Callable[[], bytes]) -> None:
        """Name a record, its user's key first if it isn't there. The row gets the next serial."""
        number, named = self._database.execute(_KEY, row.owner).fetchone() or (None, key_id)
        assert named == key_id, "a user has one key at a time"
        if number is None:
            query = "INSERT INTO data_key (id, tenant, user, wrapped) VALUES (?, ?, ?, ?)"
            number = self._database.execute(query, (key_id, *row.owner, wrapped())).lastrowid
        self.serial += 1
        slot = msgspec.msgpack.encode(row.slot)
        values = (number, row.name.key, row.name.root, slot, row.length, row.depth, row.touched, self.serial)
        self._database.execute("INSERT OR REPLACE INTO record VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)

    def forget(self, names: Iterable[RecordName]) -> None:
        """Name these records no more."""
        rows = [(name.tenant, name.user, name.key) for name in names]
        self._database.executemany(f"DELETE FROM record WHERE owner = ({_NUMBER}) AND key = ?", rows)

    def touch(self, touched: Iterable[tuple[RecordName, float]]) -> None:
        """Note when records were used last, by the wall clock."""
        rows = [(when, name.tenant, name.user, name.key) for name, when in touched]
        self._database.executemany(f"UPDATE record SET touched = ? WHERE owner = ({_NUMBER}) AND key = ?", rows)

    def put_publication(self, publication: StoredPublication) -> None:
        """Know a publication, with the names of its blocks so far."""
        id_, root, blocks, label, keys = msgspec.structs.astuple(publication)
        change = "ON CONFLICT (id) DO UPDATE SET keys = excluded.keys"
        values = (id_, root, blocks, label, msgspec.msgpack.encode(keys))
        self._database.execute(f"INSERT INTO publication VALUES (?, ?, ?, ?, ?) {change}", values)

    def drop_publication(self, id_: PublicationId) -> bool:
        """Know a publication no more, and return whether it was known."""
        return self._database.execute("DELETE FROM publication WHERE id = ?", (id_,)).rowcount > 0

    def set_synced(self, serial: int) -> None:
        """Note that all records up to this serial are on the platter."""
        self._set("synced", serial)

    def drop_damaged(self, numbers: Iterable[int]) -> None:
        """Drop the keys in these rows, and all rows that can be no record or no key."""
        self._database.executemany("DELETE FROM data_key WHERE owner = ?", [(number,) for number in numbers])
        self._database.execute(f"DELETE FROM data_key WHERE ({_SOUND_KEY}) IS NOT 1")
        self._database.execute(f"DELETE FROM record WHERE ({_SOUND_RECORD}) IS NOT 1")

    def drop_unused_keys(self) -> None:
        """Drop the keys of users without a record."""
        self._database.execute("DELETE FROM data_key WHERE owner NOT IN (SELECT owner FROM record)")

    def destroy(self, owners: Iterable[Owner]) -> list[KeyId]:
        """Drop users' keys and records, and return which keys there were. `purge` must follow."""
        destroyed: list[KeyId] = []
        for owner in owners:
            found = self._database.execute(_KEY, owner).fetchone()
            if found:
                self._database.execute("DELETE FROM record WHERE owner = ?", found[:1])
                self._database.execute("DELETE FROM data_key WHERE owner = ?", found[:1])
                destroyed.append(KeyId(found[1]))
        self._set("purge", 1)
        return destroyed

    def set_keys(self, deployment: bytes, wrapped_by_owner: Mapping[Owner, bytes]) -> None:
        """Replace the users' wrapped keys, and the name of what they are wrapped under. `purge` must follow."""
        rows = [(wrapped, *owner) for owner, wrapped in wrapped_by_owner.items()]
        self._database.executemany("UPDATE data_key SET wrapped = ? WHERE tenant = ? AND user = ?", rows)
        self._set("deployment", deployment)
        self._set("purge", 1)

    # What is for good, outside of it

    def purge(self) -> None:
        """Write the file anew with what is valid and nothing else, and wait until it is so on the disk.

        `secure_delete` alone is not enough: where SQLite splits or joins pages it may leave a copy of a row behind.
        Raises OSError as well.
        """
        self._database.execute("VACUUM")
        self._empty_log()
        with self.transaction():
            self._set("purge", 0)
        self._empty_log()

    def settle(self) -> None:
        """Wait until all that was committed is on the platter. Raises OSError as well."""
        self._empty_log()

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def _empty_log(self) -> None:
        busy, *_ = self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        assert not busy, "nobody else can read a file that is locked"
        # SQLite has synced the file, but not that the log is empty. (The file itself must not be opened a second time:
        # closing that would drop this process's locks on it.)
        for path, flags in ((Path(f"{self.path}-wal"), os.O_RDONLY), (self.path.parent, os.O_RDONLY | os.O_DIRECTORY)):
            fd = os.open(path, flags | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def _set(self, name: str, value: int | bytes) -> None:
        self._database.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def _meta(self, name: str) -> Any:
        found = self._database.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return found and found[0]

    def _value(self, query: str) -> int:
        return int(self._database.execute(query).fetchone()[0])


def is_out_of_room(error: Exception) -> bool:
    """Return whether something failed because the disk is full."""
    return getattr(error, "errno", None) in _NO_ROOM or getattr(error, "sqlite_errorname", "") == "SQLITE_FULL"


def disk_error(path: Path, error: Exception) -> DiskError:
    """Return what to raise for an error of the system or the database, with advice where there is any."""
    advice = ": make room on its filesystem, and try again" if is_out_of_room(error) else ""
    return DiskError(f"{path}: {error}{advice}")


def _slot(packed: bytes) -> Extent:
    try:
        return msgspec.msgpack.decode(packed, type=tuple[Run, ...])
    except msgspec.MsgspecError:
        return ()
