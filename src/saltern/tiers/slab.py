"""The slab: one file of pages that all records lie in."""

import ctypes
import errno
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from saltern.core.disk import DISK_PAGE_BYTES
from saltern.core.extents import Extent, Run

HUGE_PAGE_BYTES = 2 * 1024 * 1024


class Slab:
    """The file at `path`, made if it is missing. Raises OSError. For any number of threads.

    `direct` says whether it is read and written past the page cache. Buffers must then begin at a page, as those of
    `page_buffer` do, and be whole pages.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self.direct = True
        try:
            self._fd = os.open(path, flags | os.O_DIRECT, 0o600)
            self._probe()
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.direct = False
            self._fd = os.open(path, flags, 0o600)
        if os.fstat(self._fd).st_mode & 0o077:
            os.fchmod(self._fd, 0o600)  # what others may have changed in it isn't authentic

    @property
    def pages(self) -> int:
        """Return how many whole pages the file has."""
        return os.fstat(self._fd).st_size // DISK_PAGE_BYTES

    def resize(self, pages: int) -> None:
        """Make the file this long. What is added takes no room on the disk before it is written."""
        os.ftruncate(self._fd, pages * DISK_PAGE_BYTES)

    def read(self, slot: Extent, into: memoryview) -> None:
        """Read the pages of a slot. Raises OSError, also where the file has less."""
        for run in slot:
            size = run.count * DISK_PAGE_BYTES
            part, into = into[:size], into[size:]
            place = run.start * DISK_PAGE_BYTES
            while part:
                count = os.preadv(self._fd, [part], place)
                if count == 0:
                    raise OSError(errno.EIO, "the slab ends before the record does")
                part, place = part[count:], place + count

    def write(self, slot: Extent, content: memoryview) -> None:
        """Write the pages of a slot. Raises OSError."""
        for run in slot:
            size = run.count * DISK_PAGE_BYTES
            part, content = content[:size], content[size:]
            place = run.start * DISK_PAGE_BYTES
            while part:
                count = os.pwritev(self._fd, [part], place)
                part, place = part[count:], place + count

    @property
    def free_bytes(self) -> int:
        """Return how much room the filesystem has for whoever isn't root. Raises OSError."""
        status = os.fstatvfs(self._fd)
        return status.f_bavail * status.f_frsize

    def has_room_for(self, slot: Extent) -> bool:
        """Return whether the pages of a slot take room on the disk already. Raises OSError."""
        ends = ((run.start * DISK_PAGE_BYTES, (run.start + run.count) * DISK_PAGE_BYTES) for run in slot)
        return all(os.lseek(self._fd, start, os.SEEK_HOLE) >= end for start, end in ends)

    def unnamed(self, slots: Iterable[Extent]) -> Iterator[Run]:
        """Yield the pages that take room on the disk and are in none of these slots, in order. Raises OSError."""
        rest = iter(sorted((run.start, run.start + run.count) for slot in slots for run in slot))
        start, end = next(rest, _NOWHERE)
        for run in self.written():
            place, run_end = run.start, run.start + run.count
            while place < run_end:
                while end <= place:
                    start, end = next(rest, _NOWHERE)
                if place < start:
                    yield Run(start=place, count=min(start, run_end) - place)
                place = end

    def written(self) -> Iterator[Run]:
        """Yield the pages that take room on the disk, in order. Raises OSError."""
        end = 0
        while True:
            try:
                start = os.lseek(self._fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no data behind `end`
                    return
                raise
            end = os.lseek(self._fd, start, os.SEEK_HOLE)
            first, behind = start // DISK_PAGE_BYTES, min(-(-end // DISK_PAGE_BYTES), self.pages)
            if behind > first:
                yield Run(start=first, count=behind - first)

    def give_back(self, run: Run) -> None:
        """Let pages take no room on the disk any more, where the filesystem can. Raises OSError."""
        place, size = run.start * DISK_PAGE_BYTES, run.count * DISK_PAGE_BYTES
        if _fallocate(self._fd, _PUNCH_HOLE | _KEEP_SIZE, place, size) and ctypes.get_errno() != errno.EOPNOTSUPP:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(self.path))

    def sync(self) -> None:
        """Wait until what was written is on the platter. Raises OSError."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)

    def _probe(self) -> None:
        """Raise OSError where the filesystem takes the flag but not such reads."""
        with page_buffer(DISK_PAGE_BYTES) as buffer:
            try:
                os.preadv(self._fd, [buffer], 0)
            except OSError:
                os.close(self._fd)
                raise


def page_buffer(size: int) -> mmap.mmap:
    """Return memory that begins at a page, as direct I/O needs it. `size` is in bytes."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTDUMP)  # it may hold a user's block
    with suppress(OSError):  # from a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class PageBuffer:
    """Memory that is kept from one record to the next, as large as the largest so far.

    In huge pages where there are any: direct I/O pins every page of it for every record.
    """

    def __init__(self) -> None:
        self._memory = memoryview(b"")

    def view(self, size: int) -> memoryview:
        """Return the first `size` bytes."""
        if size > len(self._memory):
            whole_pages = -(-size // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES  # others the kernel doesn't place at one
            self._memory = memoryview(page_buffer(whole_pages))
        return self._memory[:size]


_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)
_KEEP_SIZE, _PUNCH_HOLE = 1, 2

_NOWHERE = (1 << 62, 1 << 62)
