"""The arena: the RAM tier's bytes, one sealed memfd that the server's engines map as well."""

import ctypes
import fcntl
import logging
import mmap
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from saltern.sizes import format_size

log = logging.getLogger(__name__)

PREFAULT_BYTES = 64 * 1024 * 1024
"""Prefaulted at a time, between two looks at how much memory there still is."""

MEMORY_SPARE_BYTES = 256 * 1024 * 1024
"""Prefaulting leaves this much: the rest of the arena then comes as it is used."""

MEMORY_WAIT_SECONDS = 10.0
"""How long a start waits for memory: engines let a dead server's arena go once their copies have drained."""


class ArenaError(Exception):
    """There can't be such an arena here. The text has the numbers, and says what to do."""


class Arena:
    """Memory of a fixed size behind a file descriptor that nobody can shrink, grow or find by a name."""

    def __init__(self, *, total_bytes: int, huge_pages: bool) -> None:
        self.total_bytes = total_bytes
        self.fd = os.memfd_create("saltern-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, total_bytes)
            # Without the seals an engine could shrink the arena under all others, whose next touch would kill them.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._map = mmap.mmap(self.fd, total_bytes)
        except (OSError, ValueError) as error:
            os.close(self.fd)
            raise ArenaError(f"no arena of {format_size(total_bytes)}: {error}") from None
        self._map.madvise(mmap.MADV_DONTDUMP)  # plaintext of all users
        self.memory = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        if huge_pages:
            self._ask_for_huge_pages()
        self._closing = threading.Event()
        self._prefaulting: threading.Thread | None = None

    def prefault(self) -> None:
        """Touch all pages in the background, so that no engine's first copy has to."""
        self._prefaulting = threading.Thread(target=self._prefault, name="saltern-prefault", daemon=True)
        self._prefaulting.start()

    def wipe(self, *, offset: int, length: int) -> None:
        """Overwrite bytes with zeros."""
        assert 0 <= offset <= offset + length <= self.total_bytes, "wipes beyond the arena"
        ctypes.memset(self._address + offset, 0, length)  # does not keep the interpreter's lock, as a slice would

    def close(self) -> None:
        """Let go of the memory, which then lives as long as engines still map it."""
        self._closing.set()
        if self._prefaulting is not None:
            self._prefaulting.join()
        with suppress(BufferError):  # a thread that hangs on a dead disk has a piece of it, to the end of the process
            self.memory.release()
            self._map.close()
        os.close(self.fd)

    def _prefault(self) -> None:
        started = time.monotonic()
        for start in range(0, self.total_bytes, PREFAULT_BYTES):
            size = min(PREFAULT_BYTES, self.total_bytes - start)
            available = available_bytes()
            if self._closing.is_set():
                return
            if available < size + MEMORY_SPARE_BYTES:
                log.warning(
                    "prefaulting stops at %s of %s: only %s of memory are available",
                    *map(format_size, (start, self.total_bytes, available)),
                )
                return
            # Not `mmap.madvise`, which keeps the interpreter's lock and thereby stops the loop.
            if _madvise(self._address + start, size, _MADV_POPULATE_WRITE):
                log.warning("the arena is not prefaulted: %s", os.strerror(ctypes.get_errno()))
                return
        log.info("arena of %s prefaulted in %.1f s", format_size(self.total_bytes), time.monotonic() - started)

    def _ask_for_huge_pages(self) -> None:
        """Ask the kernel, which grants them to shared memory only where it is told to."""
        try:
            self._map.madvise(mmap.MADV_HUGEPAGE)
            setting = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text(encoding="ascii")
        except OSError as error:
            log.info("the arena has no huge pages: %s", error.strerror)
            return
        if "[never]" in setting or "[deny]" in setting:
            log.info(
                "the arena has no huge pages: 'echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled'"
                " as root makes it faster to touch"
            )


def check_memory(total_bytes: int) -> None:
    """Raise `ArenaError` unless an arena of `total_bytes` fits into memory, perhaps after a moment."""
    limit, limiting = _memory_limit()
    if total_bytes > limit:
        raise ArenaError(
            f"an arena of {format_size(total_bytes)} is more than {limiting} of {format_size(limit)}:"
            " make arena.size smaller, or give the server more memory"
        )
    deadline = time.monotonic() + MEMORY_WAIT_SECONDS
    while total_bytes > (available := available_bytes()):
        if time.monotonic() > deadline:
            raise ArenaError(
                f"an arena of {format_size(total_bytes)} does not fit into the {format_size(available)} of memory"
                " that are available: make arena.size smaller, or stop what holds the memory"
                " (engines may still map the arena of a server before)"
            )
        time.sleep(0.1)


def available_bytes() -> int:
    """Return how much memory can still be taken before the kernel kills somebody."""
    rooms = [_meminfo("MemAvailable")]
    for folder, names in _cgroups():
        limit, used = _number(folder / names.limit), _number(folder / names.used)
        if limit is not None and used is not None:
            rooms.append(max(0, limit - used + _reclaimable(folder)))
    return min(rooms)


def _memory_limit() -> tuple[int, str]:
    """Return the most memory that there can ever be, and what sets that bound."""
    limits = [(_meminfo("MemTotal"), "this machine's memory")]
    for folder, names in _cgroups():
        limit = _number(folder / names.limit)
        if limit is not None:
            limits.append((limit, f"the limit in {folder / names.limit}"))
    return min(limits)


class _Names:
    """What the two generations of control groups call the same numbers."""

    def __init__(self, limit: str, used: str) -> None:
        self.limit, self.used = limit, used


_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes")
_V2 = _Names("memory.max", "memory.current")


def _cgroups(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[tuple[Path, _Names]]:
    """Return this process's memory control group and all those above it: each one's limit holds."""
    found: list[tuple[Path, _Names]] = []
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        names, top = (_V1, root / "memory") if controllers else (_V2, root)
        folder = top / path.lstrip("/")
        # Inside a container the path may be the host's, and what is mounted is only the own group.
        chain = [folder, *folder.parents] if folder.is_dir() else [top]
        found += [(folder, names) for folder in chain if folder.is_relative_to(top)]
    return found


def _number(path: Path) -> int | None:
    """Read one number; None where the file is missing or says "max"."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _reclaimable(folder: Path) -> int:
    """Return the page cache that a group's use counts, and that gives way under pressure."""
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    value_by_name = dict(line.split(" ", 1) for line in lines)
    return int(value_by_name.get("total_inactive_file") or value_by_name.get("inactive_file", "0"))


def _meminfo(name: str) -> int:
    """Return a line of /proc/meminfo in bytes."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ArenaError(f"/proc/meminfo has no {name}")


_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MADV_POPULATE_WRITE = 23
