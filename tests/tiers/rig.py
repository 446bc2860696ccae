"""A disk tier on real files, and an arena for it, driven as the core drives it."""

import mmap
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from hashlib import shake_128
from pathlib import Path
from queue import SimpleQueue

from saltern.core.disk import DISK_PAGE_BYTES, record_pages
from saltern.core.effects import (
    Event,
    ForgetRecords,
    ReadRecord,
    RecordName,
    RecordsForgotten,
    RecordWritten,
    WriteRecord,
)
from saltern.core.extents import Extent, Run
from saltern.core.keys import Key, UserId
from saltern.tiers.datakeys import Owner
from saltern.tiers.disk import DiskTier, Restored

ARENA_PAGE_BYTES = 65_536
ARENA_PAGES = 64
LENGTH = 200_000
SLOT_PAGES = record_pages(LENGTH)
SLAB_BYTES = 64 * SLOT_PAGES * DISK_PAGE_BYTES
PATIENCE_SECONDS = 60.0


def name_of(number: int, *, user: int = 0, tenant: str = "acme") -> RecordName:
    """Name a block of a user."""
    return RecordName(
        tenant, UserId(user.to_bytes(16, "little")), Key(b"key" + number.to_bytes(29, "little")), b"root" + bytes(28)
    )


def content_of(name: RecordName, length: int = LENGTH) -> bytes:
    """Return the bytes of a block, which no other has."""
    return shake_128(name.tenant.encode() + name.user + name.key).digest(length)


def slot_of(number: int) -> Extent:
    """Return the slot that the tests give a record."""
    return (Run(start=number * SLOT_PAGES, count=SLOT_PAGES),)


class Rig:
    """A tier in `folder`. Blocks are written from the first pages of the arena, and read into the ones behind."""

    def __init__(self, folder: Path, *, slab_bytes: int = SLAB_BYTES) -> None:
        self.folder, self.slab_bytes = folder, slab_bytes
        self.data, self.key_path = folder / "disk", folder / "deployment.key"
        self.arena = memoryview(mmap.mmap(-1, ARENA_PAGES * ARENA_PAGE_BYTES))
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.wall, self.now = 1_000_000.0, 100.0
        self.op = 0
        self.tier: DiskTier

    @property
    def slab(self) -> Path:
        """Return the slab's path."""
        return self.data / "slab"

    def open(self) -> DiskTier:
        """Open the tier without starting it."""
        self.tier = DiskTier(
            self.data,
            size_bytes=self.slab_bytes,
            key_path=self.key_path,
            arena=self.arena,
            page_bytes=ARENA_PAGE_BYTES,
            tell=self.events.put,
            wall_clock=lambda: self.wall,
        )
        return self.tier

    def start(self, erased: Sequence[Owner] = ()) -> Restored:
        """Open, restore and start the tier, with these erased for good."""
        restored = self.open().restore(self.now, erased)
        self.tier.start()
        return restored

    def restart(self, erased: Sequence[Owner] = ()) -> Restored:
        """Close the tier and start another one."""
        self.tier.close()
        return self.start(erased)

    def next_event(self) -> Event:
        """Wait for what the tier tells next."""
        return self.events.get(timeout=PATIENCE_SECONDS)

    def next_op(self) -> int:
        """Return an operation's id that was never used."""
        self.op += 1
        return self.op

    def begin_write(self, name: RecordName, slot: Extent, *, touched_at: float | None = None, depth: int = 0) -> int:
        """Ask for a block to be written from the arena's first pages."""
        content = content_of(name)
        self.arena[: len(content)] = content
        extent = (Run(start=0, count=-(-len(content) // ARENA_PAGE_BYTES)),)
        op = self.next_op()
        self.tier.perform(
            WriteRecord(op, name, extent, slot, len(content), depth, self.now if touched_at is None else touched_at)
        )
        return op

    def write(self, name: RecordName, slot: Extent, *, touched_at: float | None = None, depth: int = 0) -> Event:
        """Write a block and return what came of it."""
        self.begin_write(name, slot, touched_at=touched_at, depth=depth)
        return self.next_event()

    def fill(self, count: int, *, users: int = 1) -> list[RecordName]:
        """Write blocks, each to the slot of its number."""
        names = [name_of(number, user=number % users) for number in range(count)]
        for number, name in enumerate(names):
            assert isinstance(self.write(name, slot_of(number)), RecordWritten)
        return names

    def begin_read(self, name: RecordName, slot: Extent, extent: Extent | None = None) -> int:
        """Ask for a block to be read into the arena."""
        op = self.next_op()
        self.tier.perform(ReadRecord(op, name, extent or (Run(start=32, count=4),), slot, LENGTH))
        return op

    def read(self, name: RecordName, slot: Extent) -> Event:
        """Read a block into pages of ones, and return what came of it."""
        start = 32 * ARENA_PAGE_BYTES
        self.arena[start : start + LENGTH] = b"\xff" * LENGTH
        self.begin_read(name, slot)
        return self.next_event()

    @property
    def was_read(self) -> bytes:
        """Return the bytes of the block that was read last."""
        return bytes(self.arena[32 * ARENA_PAGE_BYTES : 32 * ARENA_PAGE_BYTES + LENGTH])

    def forget(self, names: Sequence[RecordName]) -> None:
        """Have records forgotten, and wait for it."""
        op = self.next_op()
        self.tier.perform(ForgetRecords(op, names))
        assert self.next_event() == RecordsForgotten(op)

    def change_slab(self, place: int, content: bytes) -> None:
        """Change bytes of the slab behind the tier's back."""
        with self.slab.open("r+b") as file:
            file.seek(place)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def raw(self) -> bytes:
        """Return all bytes of the index's files."""
        return b"".join(path.read_bytes() for path in sorted(self.data.glob("index.db*")))


def change_index(rig: Rig, *statements: str) -> None:
    """Change the index of a tier that is closed, as damage would."""
    database = sqlite3.connect(rig.data / "index.db", isolation_level=None)
    for statement in statements:
        database.execute(statement)
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.001)
