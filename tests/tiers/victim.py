"""A process that uses a disk tier and is killed, or may not do what it wants: `python -m tests.tiers.victim WHAT …`."""

import os
import random
import resource
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saltern.core.effects import ForgetRecords, RecordName, RecordRead, RecordsForgotten, RecordWritten
from saltern.core.extents import Extent, PagePool
from tests.tiers.rig import SLAB_BYTES, SLOT_PAGES, Rig, content_of, name_of, slot_of


def limited(folder: Path, file_bytes: int) -> None:
    """Write eight blocks where files may only have so many bytes, and read the first six."""
    rig = Rig(folder)
    rig.start()
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    for number in range(8):
        print(type(rig.write(name_of(number), slot_of(number))).__name__)
    for number in range(6):
        print(type(rig.read(name_of(number), slot_of(number))).__name__)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    rig.tier.close()


def unsynced(folder: Path, blocks: int) -> None:
    """Write blocks and die."""
    rig = Rig(folder)
    rig.start()
    rig.fill(blocks)
    die()


def rotating(folder: Path, steps: int) -> None:
    """Replace the deployment key, and die before one of the steps in which that is done."""
    rig = Rig(folder)
    rig.start()
    doom(rig, steps)
    rig.tier.rotate_key()
    print("survived")


def erasing(folder: Path, steps: int) -> None:
    """Erase the first user, and die before one of the steps in which that is done."""
    rig = Rig(folder)
    rig.start()
    doom(rig, steps)
    rig.tier.destroy_keys("acme", name_of(0).user, for_good=True)
    print("survived")


def busy(folder: Path, seed: int) -> None:
    """Store, forget and read back for ever, and say what was promised: "+" and "-" a block's number.

    Pages are handed out as the core does it. What a read returns is compared.
    """
    rig = Rig(folder)
    chance = random.Random(seed)
    slot_by_name: dict[RecordName, Extent] = {record.name: record.slot for record in rig.start().records}
    pool = PagePool.around(SLAB_BYTES // 4096, [run for slot in slot_by_name.values() for run in slot])
    number = seed * 1_000_000
    while True:
        for _ in range(chance.randrange(1, 5)):
            number += 1
            name = name_of(number, user=number % 3)
            slot = pool.allocate(SLOT_PAGES)
            if slot is None:
                break
            assert isinstance(rig.write(name, slot), RecordWritten)
            slot_by_name[name] = slot
            say("+", name)
        for name in chance.sample(sorted(slot_by_name, key=lambda name: name.key), min(2, len(slot_by_name))):
            assert isinstance(rig.read(name, slot_by_name[name]), RecordRead)
            assert rig.was_read == content_of(name)
            if chance.random() < 0.7:
                say("?", name)
                op = rig.next_op()
                rig.tier.perform(ForgetRecords(op, [name]))
                assert rig.next_event() == RecordsForgotten(op)
                pool.free(slot_by_name.pop(name))
                say("-", name)


def say(sign: str, name: RecordName) -> None:
    """Write a line that nothing can cut in two."""
    os.write(1, f"{sign}{int.from_bytes(name.key[3:], 'little')}\n".encode())


def die() -> None:
    """End without any warning."""
    os.kill(os.getpid(), signal.SIGKILL)


def doom(rig: Rig, steps: int) -> None:
    """Let so many things happen that change or sync a file, and then die."""
    left = iter(range(steps))

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: object, **keywords: object) -> Any:
            if next(left, None) is None:
                die()
            return function(*arguments, **keywords)

        return counting

    class Database:
        def __init__(self, database: sqlite3.Connection) -> None:
            self._database = database
            self.execute = counted(database.execute)
            self.executemany = counted(database.executemany)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._database, name)

    index: Any = rig.tier._index
    index._database = Database(index._database)
    for name in ("fsync", "rename", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


if __name__ == "__main__":
    what, folder, *arguments = sys.argv[1:]
    acts = (limited, unsynced, rotating, erasing, busy)
    {act.__name__: act for act in acts}[what](Path(folder), *map(int, arguments))
