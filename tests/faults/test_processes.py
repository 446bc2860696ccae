"""What is seen of other processes is what they do."""

from __future__ import annotations

import mmap
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from faults.processes import (
    STRIDE_BYTES,
    Progress,
    arena_of,
    children_of,
    descriptors,
    is_alive,
    largest_anonymous,
    lowest_free_descriptor,
    mapped_arenas,
    stopped,
    stopped_in_the_middle,
)
from tests.support import until

SIZE = 64 * STRIDE_BYTES

WRITER = f"""
import mmap, sys
memory = mmap.mmap(-1, {SIZE}, flags=mmap.MAP_PRIVATE)
print("ready", flush=True)
for line in sys.stdin:
    start, end = map(int, line.split())
    memory[start:end] = b"x" * (end - start)
    print("written", flush=True)
"""


class Writer:
    """A process that writes what it is told to into memory of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.pid = process.pid
        self._process = process

    def write(self, start: int, end: int) -> None:
        """Have bytes `[start, end)` written."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(start, end, file=self._process.stdin, flush=True)
        assert self._process.stdout.readline() == "written\n"


@contextmanager
def writer() -> Iterator[Writer]:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield Writer(process)


def progress_of(pid: int) -> Progress:
    memory = largest_anonymous(pid)
    return Progress(Path(f"/proc/{pid}/mem"), memory.start, memory.size)


def test_what_a_process_writes_is_seen_by_its_bytes() -> None:
    with writer() as process:
        assert largest_anonymous(process.pid).size >= SIZE
        progress = progress_of(process.pid)
        assert (progress.has_begun, progress.changed_bytes) == (False, 0)
        process.write(0, SIZE // 2)
        assert progress.has_begun
        assert abs(progress.changed_bytes - SIZE // 2) <= STRIDE_BYTES
        progress.close()


@pytest.mark.parametrize(("written", "is_middle"), [(SIZE // 2, True), (SIZE, False)])
def test_a_copy_is_in_its_middle_when_some_bytes_are_moved_and_some_not(written: int, is_middle: bool) -> None:
    with writer() as process:
        progress = progress_of(process.pid)
        process.write(0, written)
        with stopped_in_the_middle(process.pid, progress, lambda: SIZE, lambda: False) as is_reached:
            assert is_reached is is_middle
            assert states(process.pid) == {"T"}
        assert "T" not in states(process.pid), "it goes on afterwards"
        progress.close()


def test_a_copy_that_never_begins_is_not_waited_for_when_its_request_is_over() -> None:
    with writer() as process:
        progress = progress_of(process.pid)
        with stopped_in_the_middle(process.pid, progress, lambda: SIZE, lambda: True) as is_reached:
            assert not is_reached
            assert "T" not in states(process.pid)
        progress.close()


def test_what_dies_while_it_is_stopped_is_let_go() -> None:
    with writer() as process, stopped(process.pid):
        assert is_alive(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: not is_alive(process.pid), "its end")
        assert process.pid not in children_of(os.getpid())


def test_a_limit_at_the_lowest_free_descriptor_lets_nothing_be_opened() -> None:
    with writer() as process:
        assert lowest_free_descriptor(process.pid) == descriptors(process.pid) == 3  # its standard ones
    script = """
import os, resource, sys
low, high = os.open("/", os.O_RDONLY), os.open("/", os.O_RDONLY)
os.close(low)
print("ready", flush=True)
sys.stdin.readline()
try:
    os.open("/", os.O_RDONLY)
except OSError as error:
    print(error.strerror)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (lowest_free_descriptor(process.pid), 4096))
        said, _ = process.communicate("\n", timeout=60)
        assert said == "Too many open files\n"


def test_arenas_are_told_apart() -> None:
    before = mapped_arenas(os.getpid())
    fds = [os.memfd_create("saltern-arena") for _ in range(2)]
    for fd in fds:
        os.ftruncate(fd, mmap.PAGESIZE)
    maps = [mmap.mmap(fd, mmap.PAGESIZE) for fd in (*fds, fds[0])]
    assert mapped_arenas(os.getpid()) - before == {os.fstat(fd).st_ino for fd in fds}
    assert arena_of(os.getpid()).name == str(fds[0])
    for mapped in maps:
        mapped.close()
    for fd in fds:
        os.close(fd)
    assert mapped_arenas(os.getpid()) == before


def states(pid: int) -> set[str]:
    """Return the states of a process's threads."""
    stats = Path(f"/proc/{pid}/task").glob("*/stat")
    return {stat.read_text().rpartition(")")[2].split()[0] for stat in stats}
