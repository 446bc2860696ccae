"""The disk tier against plain I/O of the same sizes on the same disk, and how soon it is there after a restart.

What is stored and loaded are blocks of an arena. In each round each of these ways writes all of them to pages of a file
that were never written before, for which the filesystem has to find room; writes them again; and reads them:

    tier            WriteRecord and ReadRecord as the cache asks for them, with as many in flight; encrypted
    unencrypted     the same with a copy in place of the cipher, which only this benchmark can do
    direct          plain O_DIRECT from and to the arena, at the same places of a file like the slab
    buffered        through the page cache: written and then synced; read after the cache has dropped it
    file a block    O_DIRECT, each block to a file that is then renamed into place, as a tier without a slab would

The folder is a temporary one: TMPDIR says on which disk.
"""

import gc
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple
from unittest.mock import patch

import numpy as np

from bench.population import prompt_keys, user_id
from bench.report import Cell, Report, Table, Target, spread
from bench.rounds import median, seconds_of
from saltern.core.cache import Cache
from saltern.core.disk import DISK_PAGE_BYTES, READS_IN_FLIGHT_MAX, WRITES_IN_FLIGHT_MAX, record_pages
from saltern.core.effects import Event, ReadRecord, RecordName, RecordRead, RecordWritten, WriteRecord
from saltern.core.extents import Extent, Run
from saltern.tiers.datakeys import new_data_key, wrap
from saltern.tiers.disk import IO_THREADS, DiskTier
from saltern.tiers.index import Row
from saltern.tiers.rotation import current_key, open_index

MEBIBYTE = 1024 * 1024
ARENA_PAGE_BYTES = 64 * 1024


class Size(NamedTuple):
    """How much is measured: `total_bytes` by each way in each round, and a start with so many records."""

    total_bytes: int
    rounds: int
    records: int
    users: int


FULL = Size(total_bytes=768 * MEBIBYTE, rounds=5, records=100_000, users=1000)
SMOKE = Size(total_bytes=48 * MEBIBYTE, rounds=1, records=500, users=10)

# Blocks of 128 tokens: 30 layers with 3 heads of 64, and 32 layers with 8 heads of 128; K and V in bfloat16.
BLOCK_BYTES = {"SmolLM2-135M": 2_949_120, "Llama-8B": 16_777_216}


class Seconds(NamedTuple):
    """What each act took in one round of one way."""

    new: float
    again: float
    load: float


_ACTS = {"new": "store, new pages", "again": "store, pages written before", "load": "load"}


def run(size: Size) -> Report:
    """Measure the blocks of both models, and then a start."""
    rows: list[tuple[Cell, ...]] = []
    targets: list[Target] = []
    for name, block_bytes in BLOCK_BYTES.items():
        with tempfile.TemporaryDirectory() as folder:
            bench = _Bench(Path(folder), block_bytes, size.total_bytes)
            rounds_by_way = bench.measure(size.rounds)
            bench.close()
        for act, said in _ACTS.items():
            seconds_by_way = {way: [getattr(each, act) for each in rounds] for way, rounds in rounds_by_way.items()}
            plain = min("direct", "buffered", key=lambda way, seconds=seconds_by_way: median(seconds[way]))  # type: ignore[misc]
            for way, seconds in seconds_by_way.items():
                shares = [100 * theirs / ours for ours, theirs in zip(seconds, seconds_by_way[plain], strict=True)]
                speed = bench.total_bytes / median(seconds) / 1e9
                rows.append((f"{name}, {said}: {way}", speed, median(shares), spread(shares)))
                if way == "tier":
                    what = f"{name}, {said}: encrypted, against plain I/O ({plain})"
                    targets.append(Target(what, median(shares), 70, "%", at_least=True))
    blocks = " and ".join(f"{block / MEBIBYTE:.1f} MiB ({name})" for name, block in BLOCK_BYTES.items())
    title = f"{size.total_bytes // MEBIBYTE} MiB at a time in blocks of {blocks}, {IO_THREADS} threads each"
    columns = ("GB = 10⁹ bytes", "GB/s", "% of the faster plain way", "rounds")
    return Report("disk", (Table(title, columns, tuple(rows)), _starts(size)), tuple(targets))


class _Bench:
    """An arena full of blocks, a tier with room for all of them, and files like its slab."""

    def __init__(self, folder: Path, block_bytes: int, total_bytes: int) -> None:
        self._folder, self._block_bytes = folder, block_bytes
        self._blocks = total_bytes // block_bytes
        self.total_bytes = self._blocks * block_bytes
        self._slot_pages = record_pages(block_bytes)
        self._slab_bytes = self._blocks * self._slot_pages * DISK_PAGE_BYTES
        self._block_pages = -(-block_bytes // ARENA_PAGE_BYTES)
        self._arena = memoryview(mmap.mmap(-1, self._blocks * self._block_pages * ARENA_PAGE_BYTES))
        self._contents = np.frombuffer(self._arena, dtype=np.uint64)
        self._contents[:] = np.arange(len(self._contents), dtype=np.uint64)
        self._names = list(islice(_names(1), self._blocks))
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._ops = count(1)
        self._tier = _tier(folder, self._slab_bytes, arena=self._arena, tell=self._events.put)
        self._tier.restore(time.monotonic())
        self._tier.start()
        self._pool = ThreadPoolExecutor(IO_THREADS)
        self._direct = os.open(folder / "direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        self._buffered = os.open(folder / "buffered", os.O_RDWR | os.O_CREAT, 0o600)

    def measure(self, rounds: int) -> dict[str, list[Seconds]]:
        """Return what each way took in each round; every round begins with another one of them."""
        ways: dict[str, Callable[[], Seconds]] = {
            "tier": self._tier_round,
            "unencrypted": self._unencrypted_round,
            "direct": lambda: self._plain_round(self._folder / "direct", self._direct, is_buffered=False),
            "buffered": lambda: self._plain_round(self._folder / "buffered", self._buffered, is_buffered=True),
            "file a block": self._files_round,
        }
        names = list(ways)
        results: dict[str, list[Seconds]] = {name: [] for name in names}
        for number in range(rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                results[name].append(ways[name]())
        return results

    def close(self) -> None:
        """End the tier and let go of the files."""
        self._tier.close()
        self._pool.shutdown()
        os.close(self._direct)
        os.close(self._buffered)

    # Each way

    def _tier_round(self) -> Seconds:
        writes = [
            WriteRecord(next(self._ops), name, self._extent(number), self._slot(number), self._block_bytes, 0, 0.0)
            for number, name in enumerate(self._names)
        ]
        reads = [
            ReadRecord(next(self._ops), name, self._extent(number), self._slot(number), self._block_bytes)
            for number, name in enumerate(self._names)
        ]
        return self._round(
            self._folder / "disk" / "slab",
            lambda: self._perform(writes, WRITES_IN_FLIGHT_MAX, RecordWritten),
            lambda: self._perform(reads, READS_IN_FLIGHT_MAX, RecordRead),
        )

    def _unencrypted_round(self) -> Seconds:
        with patch("saltern.tiers.disk.seal", _copy_in), patch("saltern.tiers.disk.unseal", _copy_out):
            return self._tier_round()

    def _plain_round(self, path: Path, fd: int, *, is_buffered: bool) -> Seconds:
        def write() -> None:
            self._each(lambda number: os.pwrite(fd, self._block(number), self._place(number)))
            if is_buffered:
                os.fdatasync(fd)

        def read() -> None:
            self._each(lambda number: os.preadv(fd, [self._block(number)], self._place(number)))

        return self._round(path, write, read)

    def _files_round(self) -> Seconds:
        folder = self._folder / "files"
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.unlink()

        def write(number: int) -> None:
            temporary = folder / f"{number}.new"
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
            os.pwrite(fd, self._block(number), 0)
            os.close(fd)
            temporary.rename(folder / f"{number}")

        def read(number: int) -> None:
            fd = os.open(folder / f"{number}", os.O_RDONLY | os.O_DIRECT)
            os.preadv(fd, [self._block(number)], 0)
            os.close(fd)

        return self._round(None, lambda: self._each(write), lambda: self._each(read))

    # What they share

    def _round(self, path: Path | None, write: Callable[[], None], read: Callable[[], None]) -> Seconds:
        if path is not None:
            os.truncate(path, 0)
            os.truncate(path, self._slab_bytes)
        os.sync()
        new, again = seconds_of(write), seconds_of(write)
        os.sync()
        if path is not None:
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        sample = slice(None, None, 1021)
        before = self._contents[sample].copy()
        self._contents[:] = 0
        load = seconds_of(read)
        blocks = self._contents.reshape(self._blocks, -1)[:, : self._block_bytes // 8]
        assert np.array_equal(self._contents[sample][before != 0], before[before != 0]), (
            "what was read is not what was written"
        )
        assert blocks[:, -1].all(), "the end of a block was not read"
        return Seconds(new, again, load)

    def _perform(self, works: Iterable[WriteRecord | ReadRecord], in_flight_max: int, wanted: type[Event]) -> None:
        in_flight = 0
        for work in works:
            if in_flight == in_flight_max:
                self._expect(wanted)
                in_flight -= 1
            self._tier.perform(work)
            in_flight += 1
        for _ in range(in_flight):
            self._expect(wanted)

    def _expect(self, wanted: type[Event]) -> None:
        event = self._events.get()
        assert isinstance(event, wanted), f"the disk fails: {event}"

    def _each(self, work: Callable[[int], object]) -> None:
        for _ in self._pool.map(work, range(self._blocks)):
            pass

    def _block(self, number: int) -> memoryview:
        """Return a block's bytes: direct I/O takes whole pages, which these are."""
        start = number * self._block_pages * ARENA_PAGE_BYTES
        return self._arena[start : start + self._block_bytes]

    def _place(self, number: int) -> int:
        return number * self._slot_pages * DISK_PAGE_BYTES

    def _extent(self, number: int) -> Extent:
        return (Run(start=number * self._block_pages, count=self._block_pages),)

    def _slot(self, number: int) -> Extent:
        return (Run(start=number * self._slot_pages, count=self._slot_pages),)


def _copy_in(name: object, key: object, nonce: object, block: list[memoryview], record: memoryview) -> None:
    """Stand in for `seal`, without a cipher."""
    for piece in block:
        np.copyto(np.frombuffer(record, np.uint8)[: len(piece)], np.frombuffer(piece, np.uint8))


def _copy_out(name: object, key: object, record: memoryview, block: list[memoryview]) -> bool:
    """Stand in for `unseal`, without a cipher."""
    for piece in block:
        np.copyto(np.frombuffer(piece, np.uint8), np.frombuffer(record, np.uint8)[: len(piece)])
    return True


# A start


def _starts(size: Size) -> Table:
    """Measure a start with many records, and what of an erasure and a rotation depends on their number."""
    block_bytes = BLOCK_BYTES["SmolLM2-135M"]
    slab_bytes = size.records * record_pages(block_bytes) * DISK_PAGE_BYTES
    opened, restored, known, erased, rotated = [], [], [], [], []
    for _ in range(size.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            _fill_index(folder, size, record_pages(block_bytes), block_bytes)
            began = time.perf_counter()
            tier = _tier(folder, slab_bytes, arena=memoryview(b""), tell=lambda event: None)
            opened.append(time.perf_counter() - began)
            gc.disable()  # as the server does it
            began = time.perf_counter()
            found = tier.restore(time.monotonic())
            restored.append(time.perf_counter() - began)
            assert (len(found.records), found.dropped, found.torn) == (size.records, 0, 0), "not all records were found"
            cache = Cache(pages=1024, page_bytes=ARENA_PAGE_BYTES, disk_pages=slab_bytes // DISK_PAGE_BYTES)
            began = time.perf_counter()
            cache.restore(found.records, (), time.monotonic())
            known.append(time.perf_counter() - began)
            gc.enable()
            tier.start()
            erased.append(seconds_of(lambda: tier.destroy_keys("default", user_id(1), for_good=False)))  # noqa: B023
            rotated.append(seconds_of(tier.rotate_key))
            tier.close()
    rows = (
        ("opening the index and checking its pages", median(opened), spread(opened)),
        ("restoring the records", median(restored), spread(restored)),
        ("taking them up in the cache", median(known), spread(known)),
        ("destroying a user's key", median(erased), spread(erased)),
        ("replacing the deployment's key", median(rotated), spread(rotated)),
    )
    return Table(f"{size.records:,} records of {size.users:,} users", ("after a restart", "s", "rounds"), rows)


def _fill_index(folder: Path, size: Size, slot_pages: int, block_bytes: int) -> None:
    """Write an index as a server leaves it, of a slab that nobody looks into."""
    (folder / "disk").mkdir()
    index = open_index(folder / "disk", folder / "key")
    deployment = current_key(index, folder / "key")
    key_by_user = {user_id(number): new_data_key() for number in range(size.users)}
    with index.transaction():
        for number, name in enumerate(islice(_names(size.users), size.records)):
            key, slot = key_by_user[name.user], (Run(start=number * slot_pages, count=slot_pages),)
            row = Row(name, slot, block_bytes, number % 32, float(number))
            index.put(row, key.id, lambda row=row, key=key: wrap(deployment, row.owner, key))  # type: ignore[misc]
        index.set_synced(index.serial)
    index.close()
    (folder / "disk" / "slab").touch(0o600)
    os.truncate(folder / "disk" / "slab", size.records * slot_pages * DISK_PAGE_BYTES)


def _names(users: int) -> Iterator[RecordName]:
    """Yield names of blocks for ever, one prompt of 32 blocks a user in turn."""
    for prompt in count():
        for key in prompt_keys(prompt, 32):
            yield RecordName("default", user_id(prompt % users), key, bytes(32))


def _tier(folder: Path, slab_bytes: int, *, arena: memoryview, tell: Callable[[Event], None]) -> DiskTier:
    return DiskTier(
        folder / "disk",
        size_bytes=slab_bytes,
        key_path=folder / "key",
        arena=arena,
        page_bytes=ARENA_PAGE_BYTES,
        tell=tell,
        wall_clock=time.time,
    )
