"""The books: what the index names, what the server says it holds, and what it may not hold; each against the others."""

from __future__ import annotations

import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from saltern.core.disk import DISK_PAGE_BYTES
from saltern.core.effects import RecordName
from saltern.core.extents import extent_pages
from saltern.core.snapshot import Snapshot
from saltern.tiers.damage import misplaced
from saltern.tiers.datakeys import KeyId, Owner
from saltern.tiers.index import Index, Row, WrappedKey

INDEX_FILES = ("index.db", "index.db-wal")
SETTLE_SECONDS_MAX = 30.0
POLL_SECONDS = 0.01
WRAPPED_SAMPLE = slice(12, 44)
"""Of a wrapped key what is the key, encrypted: nothing else in any file has these bytes."""


class Books(NamedTuple):
    """What the index held at one moment, as rows and as bytes."""

    rows: list[Row]
    keys: list[WrappedKey]
    raw: bytes

    @property
    def used_bytes(self) -> int:
        """Return how much of the slab the rows name."""
        return sum(extent_pages(row.slot) for row in self.rows) * DISK_PAGE_BYTES

    def used_by(self, whose: Callable[[Row], object]) -> Counter[object]:
        """Return how much of the slab the rows name, by whatever is wanted."""
        used: Counter[object] = Counter()
        for row in self.rows:
            used[whose(row)] += extent_pages(row.slot) * DISK_PAGE_BYTES
        return used

    @property
    def names(self) -> set[RecordName]:
        """Return the blocks that the rows name."""
        return {row.name for row in self.rows}


def read_books(disk: Path, scratch: Path) -> Books:
    """Read a copy of the index, so that neither the file nor its log is touched.

    Nobody writes, or what is read may be of no moment at all: then this may raise `DiskError` or sqlite3's errors.
    """
    raw = b""
    for name in INDEX_FILES:
        copy = scratch / name
        copy.unlink(missing_ok=True)
        if (disk / name).exists():
            shutil.copyfile(disk / name, copy)
            copy.chmod(0o600)
            raw += copy.read_bytes()
    index = Index(scratch / INDEX_FILES[0])
    try:
        return Books(list(index.rows()), index.wrapped_keys(), raw)
    finally:
        index.close()


class Balance(NamedTuple):
    """What was found wrong, and how many bytes are held by nobody."""

    problems: list[str]
    leaked_bytes: int


def balance(books: Books, snapshot: Snapshot) -> Balance:
    """Compare what the index names with what the server says, while nothing is under way."""
    disk, arena = snapshot.disk, snapshot.arena
    assert disk is not None, "a server without a disk tier is not tortured"
    by_tenant = books.used_by(lambda row: row.name.tenant)
    stated = {tenant.tenant: tenant.disk_used_bytes for tenant in snapshot.tenants if tenant.disk_used_bytes}
    problems = []
    if disk.used_bytes != books.used_bytes:
        problems.append(f"{disk.used_bytes} bytes of the slab are in use, and the index names {books.used_bytes}")
    if stated != dict(by_tenant):
        problems.append(f"tenants are charged {stated}, and the index names {dict(by_tenant)}")
    if disk.blocks != len(books.rows):
        problems.append(f"{disk.blocks} blocks are said to be on the disk, and the index names {len(books.rows)}")
    wrong = misplaced(books.rows, disk.total_bytes // DISK_PAGE_BYTES)
    if wrong:
        problems.append(f"{len(wrong)} records overlap or lie nowhere")
    if arena.pinned_blocks or arena.writing_blocks:
        problems.append(f"with nobody at work {arena.pinned_blocks} blocks are pinned, {arena.writing_blocks} written")
    problems += _over_quota(books, snapshot)
    return Balance(problems, abs(disk.used_bytes - books.used_bytes))


def _over_quota(books: Books, snapshot: Snapshot) -> Iterable[str]:
    by_user: defaultdict[str, Counter[bytes]] = defaultdict(Counter)
    for row in books.rows:
        by_user[row.name.tenant][row.name.user] += extent_pages(row.slot) * DISK_PAGE_BYTES
    for tenant in snapshot.tenants:
        used, largest = tenant.disk_used_bytes, max(by_user[tenant.tenant].values(), default=0)
        for what, held, limit in (
            ("the tenant", used, tenant.disk_limit_bytes),
            ("a user", largest, tenant.disk_user_limit_bytes),
        ):
            if limit is not None and held > limit:
                yield f"{what} of {tenant.tenant} has {held} bytes on the disk where {limit} are allowed"


def settled(balance_now: Callable[[], Balance]) -> Balance:
    """Return the balance once there is nothing wrong with it, or what is wrong for good."""
    deadline = time.monotonic() + SETTLE_SECONDS_MAX
    while (found := balance_now()).problems and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return found


class Vault:
    """Wrapped data keys as they were seen in the index, so that they are known again where they should be gone."""

    def __init__(self) -> None:
        self._seen: defaultdict[KeyId, set[bytes]] = defaultdict(set)
        self._destroyed: set[KeyId] = set()

    def see(self, keys: Iterable[WrappedKey]) -> None:
        """Take note of what is there."""
        for key in keys:
            self._seen[key.id].add(key.wrapped[WRAPPED_SAMPLE])

    def destroy(self, keys: Iterable[KeyId]) -> None:
        """Take note of what may not be there any more."""
        self._destroyed |= set(keys)

    @property
    def known(self) -> int:
        """Return of how many destroyed keys the bytes are known."""
        return len(self._destroyed & self._seen.keys())

    def left(self, books: Books, erased: Collection[Owner]) -> Iterable[str]:
        """Yield which keys are there that may not be, in the index's rows or in the bytes of its files."""
        for key in books.keys:
            if key.id in self._destroyed:
                yield f"the data key {key.id.hex()} was destroyed, and the index has it"
            if key.owner in erased:
                yield f"the erased user {key.owner[1].hex()} of {key.owner[0]} has a data key"
        for key_id in self._destroyed & self._seen.keys():
            if any(wrapped in books.raw for wrapped in self._seen[key_id]):
                yield f"the data key {key_id.hex()} was destroyed, and its bytes are in the index's files"
