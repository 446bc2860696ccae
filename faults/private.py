"""The run's private view of the machine: mounts that nobody else sees, and that go with the last process."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

SMALL_DISK = "size=1m,nr_inodes=48"
"""Room for a socket, a secret, settings and a log, and soon full."""

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000  # unshare(2)
_MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x4000, 0x40000, 2  # mount(2), umount2(2)
_libc = ctypes.CDLL(None, use_errno=True)


def hide_mounts() -> bool:
    """Give this process and its children mounts and a /dev/shm of their own, and tell whether that is allowed here.

    Root may; others only in a user namespace, which some machines forbid. To be called while the process has one
    thread.
    """
    uid, gid = os.getuid(), os.getgid()
    if uid != 0:
        if _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS):
            return False
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1", encoding="ascii")
    elif _libc.unshare(_CLONE_NEWNS):
        return False
    is_private = not _libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    return is_private and not _libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"mode=1777")


@contextmanager
def small_disk(folder: Path, size: str = SMALL_DISK) -> Iterator[bool]:
    """Make `folder`, with a small disk behind it, and yield whether there is one: without, it is a plain folder."""
    folder.mkdir()
    mounted = not _libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, size.encode())
    try:
        yield mounted
    finally:
        if mounted:
            _libc.umount2(bytes(folder), _MNT_DETACH)


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """Fill the small disk of a folder until it takes neither a byte nor a file more; empty it again afterwards."""
    filling = folder / "filling"
    filling.mkdir()
    try:
        with suppress(OSError), (filling / "bytes").open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        with suppress(OSError):
            for number in count():
                (filling / f"file-{number}").touch()
        yield
    finally:
        shutil.rmtree(filling)
