"""The check finds each kind of damage, says what it would do, and then does it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from saltern.core.disk import DISK_PAGE_BYTES
from saltern.core.effects import RecordRead, RecordWritten
from saltern.core.extents import Run
from saltern.tiers.check import Report, check
from saltern.tiers.datakeys import new_deployment_key, read_deployment_keys, write_deployment_keys
from saltern.tiers.errors import DiskError, DiskInUseError
from tests.tiers.rig import LENGTH, SLOT_PAGES, Rig, change_index, content_of, name_of, slot_of

RECORDS = 6
SLOT_BYTES = SLOT_PAGES * DISK_PAGE_BYTES


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A folder with six records of two users, which nobody uses."""
    rig = Rig(tmp_path)
    rig.start()
    rig.fill(RECORDS, users=2)
    rig.tier.close()
    yield rig
    rig.tier.close()


def found(report: Report) -> dict[str, int]:
    return {finding.kind: finding.count for finding in report.findings}


def run(rig: Rig, *, repair: bool = False) -> Report:
    return check(rig.data, rig.key_path, repair)


def test_a_sound_folder_has_nothing_to_find(rig: Rig) -> None:
    report = run(rig)
    assert report.is_sound and not report.findings and not report.repaired
    assert [(usage.tenant, usage.user, usage.records, usage.used_bytes) for usage in report.usage] == [
        ("acme", name_of(0, user=user).user.hex(), 3, 3 * SLOT_BYTES) for user in range(2)
    ]
    assert report.used_bytes == RECORDS * SLOT_BYTES


def flip(rig: Rig, place: int) -> None:
    rig.change_slab(place, bytes([rig.slab.read_bytes()[place] ^ 1]))


def swap(rig: Rig) -> None:
    content = rig.slab.read_bytes()
    rig.change_slab(0, content[SLOT_BYTES : 2 * SLOT_BYTES])
    rig.change_slab(SLOT_BYTES, content[:SLOT_BYTES])


SLOT_OF_FIRST = "SELECT slot FROM record WHERE serial = 1"

DAMAGES: dict[str, tuple[Callable[[Rig], object], dict[str, int]]] = {
    "a flipped bit": (lambda rig: flip(rig, 5000), {"not-authentic": 1}),
    "a flipped bit of a header": (lambda rig: flip(rig, 20), {"not-authentic": 1}),
    "a swap between users": (swap, {"not-authentic": 2}),
    "zeros": (lambda rig: rig.change_slab(2 * SLOT_BYTES, bytes(3 * SLOT_BYTES)), {"not-authentic": 3}),
    "a slab cut": (lambda rig: os.truncate(rig.slab, 4 * SLOT_BYTES + 1), {"beyond": 2}),
    "no slab": (lambda rig: rig.slab.unlink(), {"beyond": 6}),
    "pages claimed twice": (
        lambda rig: change_index(rig, f"UPDATE record SET slot = ({SLOT_OF_FIRST}) WHERE serial = 2"),
        {"overlaps": 2},
    ),
    "no slot": (lambda rig: change_index(rig, "UPDATE record SET slot = x'c1' WHERE serial = 2"), {"no-slot": 1}),
    "another length": (lambda rig: change_index(rig, "UPDATE record SET length = 7 WHERE serial = 2"), {"no-slot": 1}),
    "a row that is none": (lambda rig: change_index(rig, "UPDATE record SET root = 7 WHERE serial = 2"), {"row": 1}),
    "a key lost": (lambda rig: change_index(rig, "DELETE FROM data_key WHERE owner = 1"), {"row": 3}),
    "a key damaged": (
        lambda rig: change_index(rig, "UPDATE data_key SET wrapped = zeroblob(60) WHERE owner = 1"),
        {"key": 1},
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_told_and_mended(rig: Rig, damage: str) -> None:
    cause, expected = DAMAGES[damage]
    cause(rig)
    before = (rig.data / "index.db").read_bytes()
    report = run(rig)
    damages = {finding.kind: finding.count for finding in report.findings if finding.is_damage}
    assert damages == expected and not report.is_sound and not report.repaired
    assert all(finding.what and finding.remedy for finding in report.findings)
    assert (rig.data / "index.db").read_bytes() == before, "it was only asked what it would do"
    assert run(rig, repair=True).findings == report.findings, "it did something else than it said"
    after = run(rig)
    assert after.findings == ()
    assert after.usage == report.usage
    restored = rig.start()
    assert (restored.dropped, restored.torn) == (0, 0)
    assert sum(usage.records for usage in report.usage) == len(restored.records)
    for record in restored.records:
        assert isinstance(rig.read(record.name, record.slot), RecordRead)
        assert rig.was_read == content_of(record.name)
    assert isinstance(rig.write(name_of(50), slot_of(50)), RecordWritten)


def test_it_names_some_of_what_it_found(rig: Rig) -> None:
    rig.change_slab(0, bytes(6 * SLOT_BYTES))
    (finding,) = [finding for finding in run(rig).findings if finding.is_damage]
    assert finding.what.startswith("records are not authentic: ")
    assert finding.what.count(" in acme") == 3 and finding.what.endswith("…")
    assert name_of(0).user.hex() in finding.what


def test_pages_that_nobody_names_are_given_back(rig: Rig) -> None:
    rig.start()
    rig.forget([name_of(0), name_of(3, user=1)])
    rig.tier.destroy_keys("acme", name_of(0).user, for_good=False)
    rig.tier.close()
    report = run(rig)
    assert report.is_sound
    assert found(report) == {"unnamed": 4 * SLOT_PAGES}
    assert "4 records in them" in report.findings[0].what
    rooms = rig.slab.stat().st_blocks
    run(rig, repair=True)
    assert rig.slab.stat().st_blocks * 512 <= 2 * SLOT_BYTES < rooms * 512
    assert run(rig).findings == ()
    assert len(rig.start().records) == 2


def test_the_end_of_a_store_that_was_killed_is_given_back(rig: Rig) -> None:
    rig.change_slab(20 * SLOT_BYTES, rig.slab.read_bytes()[: 20 * DISK_PAGE_BYTES])
    assert found(run(rig)) == {"unnamed": 20}


def test_a_key_without_records_is_found_and_dropped(rig: Rig) -> None:
    rig.start()
    rig.forget([name_of(number, user=0) for number in (0, 2, 4)])
    rig.tier.close()
    report = run(rig, repair=True)
    assert report.is_sound and found(report)["unused-key"] == 1
    assert not run(rig).findings


def test_an_interrupted_rotation_is_found_and_finished(rig: Rig) -> None:
    (key,) = read_deployment_keys(rig.key_path)
    write_deployment_keys(rig.key_path, (new_deployment_key(), key))
    report = run(rig)
    assert report.is_sound and found(report) == {"rotation": 1}
    assert len(read_deployment_keys(rig.key_path)) == 2
    run(rig, repair=True)
    assert len(read_deployment_keys(rig.key_path)) == 1
    assert not run(rig).findings
    assert len(rig.start().records) == RECORDS


def test_an_index_that_can_t_be_read_is_deleted_with_what_it_named(rig: Rig) -> None:
    (rig.data / "index.db").write_bytes(b"SQLite format 3\0" + os.urandom(8000))
    with pytest.raises(DiskError, match=r"is damaged .* 'saltern check --repair' starts anew"):
        rig.open()
    report = run(rig)
    assert found(report) == {"index": 1} and not report.is_sound
    assert rig.slab.exists()
    run(rig, repair=True)
    assert not rig.slab.exists()
    assert rig.start().records == []
    assert isinstance(rig.write(name_of(0), slot_of(0)), RecordWritten)


def test_it_is_refused_what_a_server_is_refused(rig: Rig) -> None:
    rig.start()
    with pytest.raises(DiskInUseError):
        run(rig)
    rig.tier.close()
    key = rig.key_path.read_text()
    rig.key_path.write_text("ab" * 32)
    with pytest.raises(DiskError, match="is not the key"):
        run(rig)
    rig.key_path.write_text(key)
    with pytest.raises(DiskError, match=r"has no index\.db"):
        check(rig.folder / "elsewhere", rig.key_path, False)


def test_the_length_of_a_record_is_checked_with_its_bytes(rig: Rig) -> None:
    change_index(rig, f"UPDATE record SET length = {LENGTH + 1} WHERE serial = 3")
    assert found(run(rig))["not-authentic"] == 1


def test_one_page_of_many_is_read(rig: Rig) -> None:
    """A slot of several runs is checked as one."""
    rig.start()
    slot = (Run(start=900, count=20), Run(start=800, count=SLOT_PAGES - 20))
    rig.write(name_of(9), slot)
    rig.tier.close()
    assert not run(rig).findings
    flip(rig, 800 * DISK_PAGE_BYTES + 50)
    assert found(run(rig))["not-authentic"] == 1
