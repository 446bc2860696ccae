"""The disk tier on real files: what is told is true, and what can't be done is said, with its cause."""

import errno
import logging
import os
import random
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty

import msgspec
import pytest

from saltern.core.disk import DISK_PAGE_BYTES
from saltern.core.effects import (
    ForgetRecords,
    KeepPublication,
    Loss,
    RecordLost,
    RecordNotWritten,
    RecordRead,
    RecordsForgotten,
    RecordWritten,
    StoredPublication,
    WriteRecord,
)
from saltern.core.extents import Run
from saltern.core.messages import PublicationId
from saltern.tiers.check import check
from saltern.tiers.disk import RESERVE_BYTES, DiskTier
from saltern.tiers.errors import DiskError, DiskInUseError
from tests.tiers.rig import (
    ARENA_PAGE_BYTES,
    LENGTH,
    SLOT_PAGES,
    Rig,
    change_index,
    content_of,
    name_of,
    slot_of,
    wait_until,
)

NAME = name_of(0)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    rig.start()
    yield rig
    rig.tier.close()


@contextmanager
def small_filesystem(size: str) -> Iterator[Path]:
    """Mount a filesystem of its own, which can be full without the machine being so."""
    folder = Path("/dev/shm") / f"saltern-test-{os.getpid()}"
    folder.mkdir()
    try:
        mounted = (
            os.geteuid() == 0
            and not subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=False, capture_output=True
            ).returncode
        )
        if not mounted:
            pytest.skip("may not mount a filesystem")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
    finally:
        folder.rmdir()


# Blocks go to the disk and come back


def test_a_block_that_was_written_is_read_back(rig: Rig) -> None:
    assert rig.write(NAME, slot_of(3)) == RecordWritten(1)
    read = rig.read(NAME, slot_of(3))
    assert isinstance(read, RecordRead) and read.op == 2 and read.seconds > 0
    assert rig.was_read == content_of(NAME)


def test_a_block_and_its_slot_may_be_in_pieces(rig: Rig) -> None:
    slot = (Run(start=900, count=SLOT_PAGES - 30), Run(start=5, count=29), Run(start=700, count=1))
    content = content_of(NAME)
    runs = (Run(start=9, count=1), Run(start=2, count=2), Run(start=20, count=1))
    place = 0
    for run in runs:
        start, size = run.start * ARENA_PAGE_BYTES, min(run.count * ARENA_PAGE_BYTES, LENGTH - place)
        rig.arena[start : start + size] = content[place : place + size]
        place += size
    rig.tier.perform(WriteRecord(1, NAME, runs, slot, LENGTH, 0, 0.0))
    assert rig.next_event() == RecordWritten(1)
    assert isinstance(rig.read(NAME, slot), RecordRead)
    assert rig.was_read == content
    (restored,) = rig.restart().records
    assert restored.slot == slot


def test_nothing_but_the_block_s_own_bytes_of_the_arena_is_touched(rig: Rig) -> None:
    rig.write(NAME, slot_of(0))
    rig.arena[:] = b"\xee" * len(rig.arena)
    rig.begin_read(NAME, slot_of(0), (Run(start=10, count=4),))
    assert isinstance(rig.next_event(), RecordRead)
    start = 10 * ARENA_PAGE_BYTES
    assert rig.arena[start : start + LENGTH] == content_of(NAME)
    assert set(rig.arena[:start]) == set(rig.arena[start + LENGTH :]) == {0xEE}


def test_no_plaintext_name_of_a_prompt_or_key_is_on_the_disk(rig: Rig) -> None:
    rig.fill(4)
    assert content_of(NAME)[:32] not in rig.slab.read_bytes()
    secret = rig.tier._keyring._key_by_owner["acme", NAME.user].secret
    assert secret not in rig.raw() + rig.slab.read_bytes() + rig.key_path.read_bytes()


def test_files_are_their_owner_s_alone(rig: Rig) -> None:
    rig.fill(1)
    paths = [rig.data, *rig.data.iterdir(), rig.key_path]
    assert len(paths) >= 4
    assert not any(stat.S_IMODE(path.stat().st_mode) & 0o077 for path in paths)


def test_what_others_may_read_is_taken_from_them_and_what_they_may_change_is_refused(rig: Rig) -> None:
    rig.fill(1)
    rig.tier.close()
    index = rig.data / "index.db"
    for path, readable in ((rig.data, 0o755), (index, 0o644), (rig.slab, 0o666)):
        path.chmod(readable)
    assert len(rig.start().records) == 1
    assert not any(stat.S_IMODE(path.stat().st_mode) & 0o077 for path in (rig.data, *rig.data.iterdir()))
    rig.tier.close()
    for path, changeable, advice in ((rig.data, 0o777, "chmod 700"), (index, 0o660, "chmod 600")):
        right = path.stat().st_mode
        path.chmod(changeable)
        with pytest.raises(DiskError, match=f"others may change {path}: {advice} it"):
            rig.open()
        with pytest.raises(DiskError, match=f"others may change {path}: {advice} it"):
            check(rig.data, rig.key_path, False)
        path.chmod(right)
    rig.start()


def test_the_slab_takes_room_only_where_it_was_written(rig: Rig) -> None:
    assert rig.slab.stat().st_size == rig.slab_bytes
    assert rig.slab.stat().st_blocks == 0
    rig.fill(2)
    assert rig.slab.stat().st_blocks * 512 <= 3 * SLOT_PAGES * DISK_PAGE_BYTES


# Losses


def damage_first(rig: Rig, place: int) -> None:
    """Flip a bit of what lies in slot 0."""
    with rig.slab.open("rb") as file:
        file.seek(place)
        (byte,) = file.read(1)
    rig.change_slab(place, bytes([byte ^ 0x10]))


@pytest.mark.parametrize(
    "place", [0, 9, 30, 45, 60, 80, 110, 140, 255, 256, 100_000, 256 + LENGTH - 1, 256 + LENGTH + 15]
)
def test_a_flipped_bit_is_a_loss(rig: Rig, place: int) -> None:
    rig.fill(2)
    damage_first(rig, place)
    assert rig.read(NAME, slot_of(0)) == RecordLost(3, Loss.NOT_AUTHENTIC)
    assert set(rig.was_read) in ({0}, {0xFF}), "bytes that are not authentic are in the arena"
    assert isinstance(rig.read(name_of(1), slot_of(1)), RecordRead)


def test_records_that_changed_places_are_losses(rig: Rig) -> None:
    rig.fill(4, users=2)
    size = SLOT_PAGES * DISK_PAGE_BYTES
    content = rig.slab.read_bytes()
    # Blocks 0 and 2 are one user's, 1 and 3 another's.
    for first, second in ((0, 2), (1, 0)):
        rig.change_slab(0, content)
        rig.change_slab(first * size, content[second * size : (second + 1) * size])
        rig.change_slab(second * size, content[first * size : (first + 1) * size])
        for number in (first, second):
            lost = rig.read(name_of(number, user=number % 2), slot_of(number))
            assert lost == RecordLost(rig.op, Loss.NOT_AUTHENTIC)
            assert set(rig.was_read) in ({0}, {0xFF})


def test_a_slab_that_was_cut_is_a_loss_behind_the_cut(rig: Rig) -> None:
    rig.fill(3)
    os.truncate(rig.slab, 2 * SLOT_PAGES * DISK_PAGE_BYTES + 5000)
    assert rig.read(name_of(2), slot_of(2)) == RecordLost(4, Loss.UNREADABLE)
    assert isinstance(rig.read(name_of(1), slot_of(1)), RecordRead)


def test_a_block_that_was_never_written_is_a_loss(rig: Rig) -> None:
    rig.fill(1)
    assert rig.read(name_of(9, user=0), slot_of(9)) == RecordLost(2, Loss.NOT_AUTHENTIC)
    assert rig.read(name_of(9, user=5), slot_of(9)) == RecordLost(3, Loss.UNREADABLE)


def test_a_name_with_no_room_in_a_record_is_not_written(rig: Rig) -> None:
    assert rig.write(name_of(0, tenant="ü" * 64), slot_of(0)) == RecordNotWritten(1)
    assert isinstance(rig.write(NAME, slot_of(0)), RecordWritten)


def test_a_full_disk_stores_nothing_and_keeps_what_it_has(caplog: pytest.LogCaptureFixture) -> None:
    with small_filesystem("3m") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiskTier, "_has_room", lambda tier, work: True)
        rig = Rig(folder)
        rig.start()
        events = [rig.write(name_of(number), slot_of(number)) for number in range(30)]
        written = [number for number, event in enumerate(events) if isinstance(event, RecordWritten)]
        assert 3 < len(written) < 20
        assert isinstance(events[-1], RecordNotWritten)
        assert sum("can't be written" in record.message for record in caplog.records) <= 2, "said for every block"
        for number in written:
            assert isinstance(rig.read(name_of(number), slot_of(number)), RecordRead)
            assert rig.was_read == content_of(name_of(number))
        kept = [record.name for record in rig.restart().records]
        assert kept == [name_of(number) for number in written]
        rig.tier.close()


def write_all(path: Path, *, leave_bytes: int = 0) -> None:
    """Fill a filesystem but for so much."""
    with path.open("wb", buffering=0) as file:
        with suppress(OSError):
            while file.write(bytes(4096)):
                pass
        os.ftruncate(file.fileno(), max(0, path.stat().st_size - leave_bytes))


def test_a_disk_that_the_tier_has_filled_has_room_to_erase(caplog: pytest.LogCaptureFixture) -> None:
    with small_filesystem("20m") as folder:
        rig = Rig(folder)
        rig.start()
        events = [rig.write(name_of(number, user=number % 2), slot_of(number)) for number in range(40)]
        written = [number for number, event in enumerate(events) if isinstance(event, RecordWritten)]
        assert 3 < len(written) < 30
        free = os.statvfs(folder)
        assert free.f_bavail * free.f_frsize > RESERVE_BYTES
        assert sum("is almost full" in record.message for record in caplog.records) == 1, "said for every block"
        last = max(written)
        assert isinstance(rig.write(name_of(last, user=last % 2), slot_of(last)), RecordWritten), "it takes no new room"
        write_all(folder / "ballast", leave_bytes=RESERVE_BYTES // 2)
        assert len(rig.tier.destroy_keys("acme", name_of(0).user, for_good=False)) == 1
        assert {record.name for record in rig.restart().records} == {
            name_of(number, user=1) for number in written if number % 2
        }
        rig.tier.close()


@pytest.mark.parametrize("by", ["start", "repair"])
def test_an_erasure_that_ran_out_of_room_is_ended_in_the_room_of_what_was_erased(by: str) -> None:
    with small_filesystem("24m") as folder:
        rig = Rig(folder)
        rig.start()
        names = rig.fill(6, users=2)
        wrapped, _ = (key.wrapped for key in rig.tier._index.wrapped_keys())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rig.tier._index, "purge", out_of_room)
            with pytest.raises(DiskError, match=r"No space .*: make room on its filesystem, and try again"):
                rig.tier.destroy_keys("acme", NAME.user, for_good=False)
        rig.tier.close()
        write_all(folder / "ballast")
        if by == "repair":
            assert {finding.kind for finding in check(rig.data, rig.key_path, True).findings} == {"purge", "unnamed"}
        assert [record.name for record in rig.start().records] == names[1::2]
        assert wrapped[:12] not in rig.raw()
        rig.tier.close()


def out_of_room() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_start_without_any_room_says_what_to_do() -> None:
    with small_filesystem("24m") as folder:
        rig = Rig(folder)
        rig.start()
        rig.tier.close()
        change_index(rig, "UPDATE meta SET value = 1 WHERE name = 'purge'")
        write_all(folder / "ballast")
        with pytest.raises(DiskError, match=r"full: make room on its filesystem, and try again"):
            rig.open()
        (folder / "ballast").unlink()
        rig.start()
        rig.tier.close()


def test_an_index_that_has_no_room_holds_back_what_it_owes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with small_filesystem("24m") as folder:
        rig = Rig(folder)
        rig.start()
        rig.fill(3)
        rig.forget([name_of(2)])  # its pages have room, whatever else has none
        ballast = folder / "ballast"
        write_all(ballast)
        # The log has room for some more rows. All go to the same pages, which a core would never have.
        events = (rig.write(name_of(number), slot_of(2)) for number in range(10, 1000))
        assert any(isinstance(event, RecordNotWritten) for event in events)
        rig.tier.perform(ForgetRecords(rig.next_op(), [name_of(1)]))
        assert isinstance(rig.write(name_of(11), slot_of(2)), RecordNotWritten)
        with pytest.raises(Empty):
            rig.events.get_nowait()
        assert isinstance(rig.read(NAME, slot_of(0)), RecordRead), "reading needs no room"
        forgotten = rig.op - 2
        ballast.unlink()
        assert rig.next_event() == RecordsForgotten(forgotten)
        assert isinstance(rig.write(name_of(1), slot_of(1)), RecordWritten)
        assert [record.name for record in rig.restart().records] == [NAME, name_of(1)]
        rig.tier.close()
    assert any("no longer" in record.message for record in caplog.records)


def test_a_file_that_may_not_grow_stores_nothing(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.start()
    rig.tier.close()
    # In a process of its own, whose limit it is. Its slab is as long as before, but for the last block's pages.
    os.truncate(rig.slab, rig.slab_bytes)
    done = subprocess.run(
        [sys.executable, "-m", "tests.tiers.victim", "limited", str(tmp_path), str(6 * SLOT_PAGES * DISK_PAGE_BYTES)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.split() == ["RecordWritten"] * 6 + ["RecordNotWritten"] * 2 + ["RecordRead"] * 6
    assert "Traceback" not in done.stderr


# Forgetting


def test_what_is_forgotten_is_not_there_after_a_restart(rig: Rig) -> None:
    names = rig.fill(5)
    rig.forget(names[1:3])
    assert [record.name for record in rig.restart().records] == [names[0], *names[3:]]


def test_a_block_may_be_stored_again_elsewhere(rig: Rig) -> None:
    names = rig.fill(2)
    rig.forget(names[:1])
    assert isinstance(rig.write(NAME, slot_of(5)), RecordWritten)
    records = rig.restart().records
    assert {record.name: record.slot for record in records} == {NAME: slot_of(5), names[1]: slot_of(1)}


def test_reads_go_before_writes(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.start()
    rig.fill(2)
    rig.tier.close()
    tier = rig.open()
    tier.restore(rig.now)
    writes = [rig.begin_write(name_of(number), slot_of(number)) for number in range(10, 30)]
    reads = [rig.begin_read(name_of(1), slot_of(1), (Run(start=40 + 4 * number, count=4),)) for number in range(3)]
    tier.start()
    told = [rig.next_event() for _ in range(len(writes) + len(reads))]
    places = [place for place, event in enumerate(told) if isinstance(event, RecordRead)]
    assert len(places) == 3 and max(places) <= 4
    assert sum(isinstance(event, RecordWritten) for event in told) == 20
    tier.close()


# A restart


def test_a_restart_finds_what_was_stored(rig: Rig) -> None:
    names = rig.fill(6, users=3)
    restored = rig.restart()
    assert [record.name for record in restored.records] == names
    assert [record.slot for record in restored.records] == [slot_of(number) for number in range(6)]
    assert {(record.length, record.depth) for record in restored.records} == {(LENGTH, 0)}
    assert (restored.dropped, restored.torn) == (0, 0)
    for number, name in enumerate(names):
        assert isinstance(rig.read(name, slot_of(number)), RecordRead)
        assert rig.was_read == content_of(name)


def test_recency_outlives_a_restart_and_a_clock_that_begins_anew(rig: Rig) -> None:
    for number, touched_at in enumerate((20.0, 80.0, 50.0)):
        rig.write(name_of(number), slot_of(number), touched_at=touched_at, depth=number)
    rig.tier.note_touched([(name_of(0), 95.0), (name_of(77), 96.0)], now=100.0)
    rig.tier.close()
    rig.wall += 10
    rig.now = 7.0
    records = rig.start().records
    assert [(record.touched_at, record.depth) for record in records] == [(-8.0, 0), (-23.0, 1), (-53.0, 2)]


def test_nothing_was_touched_in_the_future(rig: Rig) -> None:
    rig.fill(2)
    rig.tier.close()
    rig.wall -= 1_000_000
    assert [record.touched_at for record in rig.start().records] == [rig.now, rig.now]


def test_a_smaller_slab_keeps_what_fits(rig: Rig) -> None:
    rig.fill(5)
    rig.slab_bytes = 3 * SLOT_PAGES * DISK_PAGE_BYTES + 100
    restored = rig.restart()
    assert [record.name for record in restored.records] == [name_of(number) for number in range(3)]
    assert (restored.dropped, restored.torn, restored.cut) == (0, 0, 2)
    assert rig.slab.stat().st_size == 3 * SLOT_PAGES * DISK_PAGE_BYTES
    restored = rig.restart()
    assert (restored.dropped, restored.torn, restored.cut) == (0, 0, 0)


def test_a_larger_slab_keeps_all(rig: Rig) -> None:
    rig.fill(3)
    rig.slab_bytes *= 2
    assert len(rig.restart().records) == 3
    assert isinstance(rig.write(name_of(9), slot_of(100)), RecordWritten)


@pytest.mark.parametrize("cut", ["gone", "cut"])
def test_records_behind_the_end_of_a_slab_are_dropped_and_counted(rig: Rig, cut: str) -> None:
    rig.fill(3)
    rig.tier.close()
    if cut == "gone":
        rig.slab.unlink()
    else:
        os.truncate(rig.slab, 2 * SLOT_PAGES * DISK_PAGE_BYTES - 1)
    restored = rig.start()
    assert len(restored.records) + restored.dropped == 3
    assert len(restored.records) == (0 if cut == "gone" else 1)
    assert isinstance(rig.write(name_of(50), slot_of(50)), RecordWritten)


def test_rows_that_claim_the_same_pages_are_dropped(rig: Rig) -> None:
    rig.fill(3)
    rig.write(name_of(3), (Run(start=SLOT_PAGES // 2, count=SLOT_PAGES),))
    restored = rig.restart()
    assert [record.name for record in restored.records] == [name_of(2)]
    assert restored.dropped == 3


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE record SET slot = x'c1'",
        "UPDATE record SET slot = x'9192ff01'",
        "UPDATE record SET slot = x'919200cd7fff'",
        "UPDATE record SET slot = 'text'",
        "UPDATE record SET length = -5",
        "UPDATE record SET length = length + 4096",
        "UPDATE record SET length = 'many'",
        "UPDATE record SET key = x'00'",
        "UPDATE record SET root = 7",
        "UPDATE record SET touched = 'yesterday'",
        "UPDATE record SET owner = 99",
        "UPDATE data_key SET wrapped = x'00'",
        "UPDATE data_key SET wrapped = zeroblob(60)",
        "UPDATE data_key SET id = randomblob(16)",
        "UPDATE data_key SET user = randomblob(16)",
        "UPDATE data_key SET tenant = 'other'",
        "UPDATE data_key SET tenant = CAST(x'ff' AS TEXT)",
        "DELETE FROM data_key",
    ],
)
def test_a_row_that_can_be_none_is_dropped_and_counted(rig: Rig, damage: str) -> None:
    rig.fill(2, users=2)
    rig.tier.close()
    change_index(rig, f"{damage} WHERE owner = 1")
    restored = rig.start()
    assert [record.name for record in restored.records] == [name_of(1, user=1)]
    assert restored.dropped == 1
    assert isinstance(rig.write(NAME, slot_of(0)), RecordWritten), "its user can be stored for again"
    restored = rig.restart()
    assert (len(restored.records), restored.dropped) == (2, 0)


def test_the_index_may_be_full_of_noise(rig: Rig, tmp_path: Path) -> None:
    """Whatever bytes of the index are others, a start is refused or finds only what is whole."""
    names = rig.fill(8, users=3)
    rig.tier.close()
    whole = (rig.data / "index.db").read_bytes()
    chance = random.Random(1)
    refused = started = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 4, 40))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        (rig.data / "index.db").write_bytes(damaged)
        try:
            restored = rig.start()
        except DiskError:
            rig.tier.close()  # where it was opened, and could not be restored
            refused += 1
            continue
        started += 1
        for record in restored.records:
            event = rig.read(record.name, record.slot) if record.length == LENGTH else None
            if isinstance(event, RecordRead):
                assert record.name in names
                assert rig.was_read == content_of(record.name)
        rig.tier.close()
        (rig.data / "index.db-wal").unlink(missing_ok=True)
    assert refused > 5 and started > 5
    (rig.data / "index.db").write_bytes(whole)
    rig.start()


# What is published

SYSTEM = StoredPublication(PublicationId(b"s" * 16), b"root" + bytes(28), 3, "a prompt", (name_of(1).key,))


def test_what_is_published_is_known_after_a_restart_as_it_was_last(rig: Rig) -> None:
    longer = msgspec.structs.replace(SYSTEM, keys=(name_of(1).key, name_of(2).key))
    for kept in (SYSTEM, msgspec.structs.replace(SYSTEM, id=PublicationId(b"o" * 16)), longer):
        rig.tier.perform(KeepPublication(kept))
    assert rig.restart().publications == [longer, msgspec.structs.replace(SYSTEM, id=PublicationId(b"o" * 16))]


def test_what_was_removed_is_not(rig: Rig) -> None:
    rig.tier.perform(KeepPublication(SYSTEM))
    assert rig.tier.forget_publication(SYSTEM.id)
    assert not rig.tier.forget_publication(SYSTEM.id)
    assert rig.restart().publications == []


def test_a_removal_waits_for_the_disk(rig: Rig) -> None:
    rig.tier.perform(KeepPublication(SYSTEM))
    rig.tier.forget_publication(SYSTEM.id)
    assert not (rig.data / "index.db-wal").stat().st_size, "the removal is in a log that nobody has synced"
    assert SYSTEM.label.encode() not in (rig.data / "index.db").read_bytes()


@pytest.mark.parametrize("damage", ["keys = x'c1'", "keys = 7", "blocks = 'x'", "id = 1", "root = 1.5"])
def test_a_row_that_can_be_no_publication_is_none(rig: Rig, damage: str) -> None:
    rig.tier.perform(KeepPublication(SYSTEM))
    rig.tier.close()
    change_index(rig, f"UPDATE publication SET {damage}")
    assert rig.start().publications == []


# Torn tails


def crash_after(rig: Rig, *, blocks: int) -> None:
    """Write blocks in a process that is then killed, before anything was synced."""
    subprocess.run(
        [sys.executable, "-m", "tests.tiers.victim", "unsynced", str(rig.folder), str(blocks)],
        cwd=Path(__file__).parents[2],
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("torn_bytes", [1, 256, 4096, 100_000, LENGTH + 272])
def test_a_torn_tail_is_dropped_and_counted(tmp_path: Path, torn_bytes: int) -> None:
    rig = Rig(tmp_path)
    crash_after(rig, blocks=5)
    end = 4 * SLOT_PAGES * DISK_PAGE_BYTES + 256 + LENGTH + 16
    rig.change_slab(end - torn_bytes, bytes(torn_bytes))
    restored = rig.start()
    assert [record.name for record in restored.records] == [name_of(number) for number in range(4)]
    assert (restored.torn, restored.dropped) == (1, 0)
    restored = rig.restart()
    assert (len(restored.records), restored.torn) == (4, 0)
    rig.tier.close()


def test_what_is_synced_is_not_read_at_a_start(rig: Rig) -> None:
    rig.fill(3)
    rig.tier.close()
    damage_first(rig, 1000)
    restored = rig.start()
    assert (len(restored.records), restored.torn) == (3, 0)
    assert isinstance(rig.read(NAME, slot_of(0)), RecordLost)


def test_a_slab_is_synced_while_it_is_written(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.fill(3)
    assert rig.tier._index.synced == 0
    rig.tier._sync.set()  # what comes by time, or by a gibibyte
    wait_until(lambda: rig.tier._index.synced == 3)


def test_after_a_sync_that_failed_all_is_verified_at_the_next_start(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.fill(3)
    failed = []

    def failing(fd: int) -> None:
        failed.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing)
        rig.tier._sync.set()
        wait_until(lambda: bool(failed))
    rig.tier.close()
    damage_first(rig, 1000)
    restored = rig.start()
    assert (len(restored.records), restored.torn) == (2, 1)


# Who may use a folder


def test_a_folder_has_one_user(rig: Rig) -> None:
    with pytest.raises(DiskInUseError, match=r"another server, or a check, uses .*index\.db"):
        Rig(rig.folder).open()
    rig.fill(1)


def test_a_start_that_is_refused_lets_go_of_the_folder(rig: Rig) -> None:
    rig.tier.close()
    rig.slab.unlink()
    rig.slab.mkdir()
    with pytest.raises(DiskError, match="slab"):
        rig.open()
    rig.slab.rmdir()
    rig.start()


def test_what_comes_after_the_end_is_answered(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.start()
    rig.fill(1)
    rig.tier.close()
    assert rig.write(name_of(1), slot_of(1)) == RecordNotWritten(2)
    assert rig.read(NAME, slot_of(0)) == RecordLost(3, Loss.UNREADABLE)
    rig.tier.close()


def test_closing_finishes_what_was_begun(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.start()
    ops = [rig.begin_write(name_of(number), slot_of(number)) for number in range(20)]
    rig.tier.close()
    assert {rig.events.get_nowait() for _ in ops} == {RecordWritten(op) for op in ops}
    assert len(rig.start().records) == 20
    rig.tier.close()


def test_closing_does_not_wait_for_more_than_it_may(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.start()
    ops = [rig.begin_write(name_of(number), slot_of(number)) for number in range(60)]
    rig.tier.close(seconds=0.0)
    told = [rig.events.get_nowait() for _ in ops]
    assert {event.op for event in told} == set(ops)  # type: ignore[union-attr]
    written = {event.op for event in told if isinstance(event, RecordWritten)}
    assert len(written) < 60
    assert {int.from_bytes(record.name.key[3:], "little") + 1 for record in rig.start().records} == written
    rig.tier.close()
