"""The processes of an engine: who is who, what they hold, and a copy of theirs that is stopped in its middle."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

SAMPLE_BYTES = 64
STRIDE_BYTES = 256 * 1024  # a block of the demo's model has 2.8 MiB, and is seen in some 11 samples
GLANCE = 16  # every so many samples tell whether anything has begun, and leave the processor to the engine
POLL_SECONDS = 0.001
STOP_SECONDS_MAX = 10.0


class Roles(NamedTuple):
    """An engine's processes by what they do, in the order in which each starts the next."""

    api_server: int
    engine_core: int
    worker: int


class Mapped(NamedTuple):
    """A stretch of a process's memory, `[start, start + size)`."""

    start: int
    size: int


def roles_of(api_server: int) -> Roles:
    """Return the processes of an engine that serves, by the titles that vLLM gives them."""
    (engine_core,) = (pid for pid in children_of(api_server) if command(pid).startswith("VLLM::EngineCore"))
    (worker,) = (pid for pid in children_of(engine_core) if command(pid).startswith("VLLM::Worker"))
    return Roles(api_server=api_server, engine_core=engine_core, worker=worker)


def children_of(parent: int) -> list[int]:
    """Return the children of a process that have not exited."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it exited between the listing and the reading
            state, of = stat.read_text().rpartition(")")[2].split()[:2]
            if int(of) == parent and state not in "ZX":
                children.append(int(stat.parent.name))
    return children


def is_alive(pid: int) -> bool:
    """Tell whether a process has not exited."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def command(pid: int) -> str:
    """Return a process's command line, empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def descriptors(pid: int) -> int:
    """Return how many file descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def lowest_free_descriptor(pid: int) -> int:
    """Return the number that the next file of a process would get: as a limit it keeps the process from opening any."""
    taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    return next(number for number in count() if number not in taken)


def mapped_arenas(pid: int) -> set[int]:
    """Return the inodes of the arenas that a process maps."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {int(line.split()[4]) for line in lines if "/memfd:saltern-arena" in line}


def arena_of(server: int) -> Path:
    """Return a server's arena as a file that can be read."""
    for entry in Path(f"/proc/{server}/fd").iterdir():
        with suppress(FileNotFoundError):
            if os.readlink(entry).startswith("/memfd:saltern-arena"):
                return entry
    raise AssertionError("a server has an arena")


def largest_anonymous(pid: int) -> Mapped:
    """Return the largest stretch of memory that has no file behind it: of a worker, its KV cache."""
    stretches = [Mapped(0, 0)]
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        found = re.fullmatch(r"([0-9a-f]+)-([0-9a-f]+) rw-p 0+ 00:00 0 *", line)
        if found is not None:
            start, end = (int(address, 16) for address in found.groups())
            stretches.append(Mapped(start, end - start))
    return max(stretches, key=lambda stretch: stretch.size)


class Progress:
    """How much of a file, or of a process's memory, has changed since this was made, by samples of it.

    `path` is a file such as an arena, or `/proc/PID/mem`; looked at are bytes `[start, start + size)`.
    """

    def __init__(self, path: Path, start: int, size: int) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._offsets = range(start, start + size, STRIDE_BYTES)
        self._before = [self._sample(offset) for offset in self._offsets]

    @property
    def has_begun(self) -> bool:
        """Whether, at a glance, anything has changed."""
        return any(map(self._has_changed, range(0, len(self._offsets), GLANCE)))

    @property
    def changed_bytes(self) -> int:
        """Roughly how many bytes are others than before."""
        return STRIDE_BYTES * sum(map(self._has_changed, range(len(self._offsets))))

    def close(self) -> None:
        """Look no longer."""
        os.close(self._fd)

    def _has_changed(self, index: int) -> bool:
        return self._sample(self._offsets[index]) != self._before[index]

    def _sample(self, offset: int) -> bytes:
        return os.pread(self._fd, SAMPLE_BYTES, offset)


def stop(pid: int) -> None:
    """Stop a process, and return when none of its threads runs any more."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + STOP_SECONDS_MAX
    while not all(_state(task) in "TZX" for task in Path(f"/proc/{pid}/task").iterdir()):
        assert time.monotonic() < deadline, f"process {pid} can't be stopped"
        time.sleep(POLL_SECONDS)


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Stop processes, and let go on what is left of them afterwards."""
    try:
        for pid in pids:
            stop(pid)
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextmanager
def stopped_in_the_middle(
    worker: int, progress: Progress, whole_bytes: Callable[[], int], is_over: Callable[[], bool]
) -> Iterator[bool]:
    """Stop a worker while it copies; yield whether some of the bytes have been moved, and not all of them.

    `whole_bytes` says, once the worker stands still, how many the copy has. Gives up when `is_over` and nothing moved.
    """
    while not progress.has_begun:
        if is_over():
            yield False
            return
        time.sleep(POLL_SECONDS)
    with stopped(worker):
        # Samples tell the size to a few hundredths.
        yield 0 < progress.changed_bytes < 0.9 * whole_bytes()


def _state(task: Path) -> str:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"
