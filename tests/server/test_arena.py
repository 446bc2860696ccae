"""What holds for the arena's memory."""

import fcntl
import mmap
import os
import threading
from pathlib import Path

import pytest

from saltern.server import arena as arena_module
from saltern.server.arena import Arena, ArenaError, available_bytes, check_memory
from tests.support import until

MIB = 1024**2


def test_nobody_can_shrink_grow_or_unseal_the_arena() -> None:
    arena = Arena(total_bytes=MIB, huge_pages=False)
    for size in (0, MIB - 4096, 2 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert not os.get_inheritable(arena.fd)
    arena.close()


def test_the_arena_is_in_no_core_dump() -> None:
    arena = Arena(total_bytes=MIB, huge_pages=True)
    entry = Path("/proc/self/smaps").read_text(encoding="utf-8").split("memfd:saltern-arena")[1]
    flags = next(line for line in entry.splitlines() if line.startswith("VmFlags:"))
    assert " dd" in flags
    arena.close()


def allocated_bytes(arena: Arena) -> int:
    return os.fstat(arena.fd).st_blocks * 512


def test_prefaulting_touches_all_pages_and_changes_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "PREFAULT_BYTES", 3 * MIB)  # the last piece is shorter
    arena = Arena(total_bytes=16 * MIB, huge_pages=False)
    view = mmap.mmap(arena.fd, 16 * MIB)
    view[5 * MIB :] = b"a worker was faster".ljust(11 * MIB, b"\0")
    assert allocated_bytes(arena) < 16 * MIB
    arena.prefault()
    until(lambda: allocated_bytes(arena) == 16 * MIB, "all is there")
    assert view[5 * MIB :].rstrip(b"\0") == b"a worker was faster"
    view.close()
    arena.close()


def test_prefaulting_stops_before_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(arena_module, "available_bytes", lambda: arena_module.MEMORY_SPARE_BYTES)
    arena = Arena(total_bytes=MIB, huge_pages=False)
    arena.prefault()
    until(lambda: "saltern-prefault" not in {thread.name for thread in threading.enumerate()}, "it ends")
    assert allocated_bytes(arena) == 0
    assert "prefaulting stops at 0 B of 1 MiB: only 256 MiB of memory are available" in caplog.text
    arena.close()


def test_an_arena_larger_than_the_machine_is_refused_with_both_numbers() -> None:
    with pytest.raises(ArenaError, match=r"an arena of 1024 TiB is more than .* of .*: make arena.size smaller"):
        check_memory(1024**5)


def test_an_arena_larger_than_what_is_free_waits_and_is_then_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "MEMORY_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(arena_module, "available_bytes", lambda: 5 * MIB)
    with pytest.raises(ArenaError, match="an arena of 6 MiB does not fit into the 5 MiB of memory that are available"):
        check_memory(6 * MIB)
    check_memory(5 * MIB)
    answers = iter([0, 0, 6 * MIB])
    monkeypatch.setattr(arena_module, "MEMORY_WAIT_SECONDS", 30.0)
    monkeypatch.setattr(arena_module, "available_bytes", lambda: next(answers))
    check_memory(6 * MIB)  # a dead server's arena went meanwhile


def cgroup(folder: Path, **number_by_file: object) -> None:
    folder.mkdir(parents=True)
    for name, number in number_by_file.items():
        (folder / name.replace("__", ".")).write_text(f"{number}\n", encoding="ascii")


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand a folder in for /sys/fs/cgroup; its file `membership` for /proc/self/cgroup."""
    found = arena_module._cgroups
    monkeypatch.setattr(arena_module, "_cgroups", lambda: found(tmp_path / "membership", tmp_path))
    return tmp_path


def test_the_tightest_control_group_above_us_counts(cgroups: Path) -> None:
    (cgroups / "membership").write_text("0::/pod/server\n", encoding="ascii")
    cgroup(cgroups / "pod/server", memory__max="max", memory__current=1)
    (cgroups / "pod/memory.max").write_text(str(100 * MIB), encoding="ascii")
    (cgroups / "pod/memory.current").write_text(str(70 * MIB), encoding="ascii")
    (cgroups / "pod/memory.stat").write_text(f"anon 5\ninactive_file {20 * MIB}\n", encoding="ascii")
    assert available_bytes() == 50 * MIB  # page cache gives way
    with pytest.raises(ArenaError, match=r"is more than the limit in .*/pod/memory\.max of 100 MiB"):
        check_memory(101 * MIB)


def test_the_older_control_groups_count_as_well(cgroups: Path) -> None:
    (cgroups / "membership").write_text("5:cpu:/\n4:cpuset,memory:/box\n0::/\n", encoding="ascii")
    cgroup(cgroups / "memory/box", memory__limit_in_bytes=8 * MIB, memory__usage_in_bytes=9 * MIB)
    assert available_bytes() == 0


def test_a_container_that_sees_only_its_own_group_counts_that(cgroups: Path) -> None:
    (cgroups / "membership").write_text("0::/host/path/of/the/container\n", encoding="ascii")
    (cgroups / "memory.max").write_text(str(3 * MIB), encoding="ascii")
    (cgroups / "memory.current").write_text(str(MIB), encoding="ascii")
    assert available_bytes() == 2 * MIB
