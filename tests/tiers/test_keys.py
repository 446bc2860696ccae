"""Keys: a destroyed one is nowhere any more, a wrong one is refused, an interrupted rotation is finished."""

import errno
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from saltern.core.effects import Loss, RecordLost, RecordName, RecordNotWritten, RecordRead, RecordWritten
from saltern.core.keys import Key, UserId
from saltern.tiers.datakeys import (
    DataKey,
    KeyId,
    Keyring,
    Owner,
    new_data_key,
    read_deployment_keys,
    unwrap,
    wrap,
)
from saltern.tiers.errors import DiskError
from saltern.tiers.index import Index, Row
from saltern.tiers.record import unseal
from tests.tiers.rig import PATIENCE_SECONDS, Rig, content_of, name_of, slot_of

ROOT = Path(__file__).parents[2]
FIRST, SECOND = name_of(0, user=0), name_of(1, user=1)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    rig.start()
    yield rig
    rig.tier.close()


def wrapped_keys(rig: Rig) -> list[bytes]:
    """Return all wrapped keys of an index that is open."""
    return [key.wrapped for key in rig.tier._index.wrapped_keys()]


def traces(wrapped: bytes, raw: bytes) -> list[int]:
    """Return where in `raw` parts of a wrapped key are: no twelve bytes on end of it are missed."""
    return [place for start in range(0, len(wrapped) - 7, 4) if (place := raw.find(wrapped[start : start + 8])) >= 0]


# Wrapping


def test_a_wrapped_key_is_its_user_s_and_its_id_s() -> None:
    key, deployment = new_data_key(), bytes(32)
    owner = ("acme", UserId(b"u" * 16))
    wrapped = wrap(deployment, owner, key)
    assert key.secret not in wrapped
    assert unwrap(deployment, owner, key.id, wrapped) == key
    assert unwrap(b"\1" * 32, owner, key.id, wrapped) is None
    assert unwrap(deployment, ("acmf", owner[1]), key.id, wrapped) is None
    assert unwrap(deployment, ("acme", UserId(b"v" * 16)), key.id, wrapped) is None
    assert unwrap(deployment, owner, KeyId(bytes(16)), wrapped) is None
    assert unwrap(deployment, owner, key.id, wrapped[:5]) is None


def test_a_key_is_not_printed() -> None:
    assert "73" * 4 not in repr(DataKey(KeyId(b"i" * 16), b"s" * 32)) and "ssss" not in repr(
        DataKey(KeyId(b"i" * 16), b"s" * 32)
    )


def test_operations_up_to_the_erasure_have_no_key() -> None:
    ring, owner = Keyring(), ("acme", UserId(b"u" * 16))
    first = ring.find_or_make(1, owner)
    assert first is not None and ring.find(2, owner) == first
    ring.refuse("acme", None)
    assert ring.find(3, owner) is None and ring.find_or_make(10**9, owner) is None
    assert ring.find_or_make(3, ("other", owner[1])) is not None
    ring.drop(ring.owners("acme"), for_good=False)
    ring.allow("acme", None, after=7)
    assert ring.find_or_make(7, owner) is None
    second = ring.find_or_make(8, owner)
    assert second is not None and second.id != first.id
    ring.drop([owner], for_good=True)
    assert ring.find(10, owner) is None


# The deployment's key


def test_a_first_start_makes_a_key_and_asks_for_a_backup(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(tmp_path)
    rig.start()
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "back it up" in message and str(rig.key_path) in message
    assert rig.key_path.stat().st_mode & 0o777 == 0o600
    caplog.clear()
    rig.restart()
    assert not caplog.records
    rig.tier.close()


def test_a_missing_key_is_a_refusal_and_changes_nothing(rig: Rig) -> None:
    rig.fill(2)
    rig.tier.close()
    backup = rig.key_path.rename(rig.folder / "backup")
    with pytest.raises(DiskError, match=r"deployment\.key is missing: put it back"):
        rig.open()
    assert not rig.key_path.exists()
    backup.rename(rig.key_path)
    assert len(rig.start().records) == 2


def test_a_wrong_key_is_a_refusal_and_changes_nothing(rig: Rig) -> None:
    rig.fill(2)
    rig.tier.close()
    right = rig.key_path.read_text()
    rig.key_path.write_text("ab" * 32 + "\n")
    with pytest.raises(DiskError, match=r"is not the key that .* was written with"):
        rig.open()
    rig.key_path.write_text(right)
    assert len(rig.start().records) == 2


@pytest.mark.parametrize("text", ["", "ab" * 31, "xy" * 32, "ab" * 32 + "\n" + "cd" * 32 + "\n" + "ef" * 32])
def test_a_file_that_is_no_key_is_a_refusal(rig: Rig, text: str) -> None:
    rig.tier.close()
    right = rig.key_path.read_text()
    rig.key_path.write_text(text)
    with pytest.raises(DiskError, match=r"deployment\.key"):
        rig.open()
    rig.key_path.write_text(right)
    rig.start()


def test_a_key_that_others_may_read_is_a_refusal(rig: Rig) -> None:
    rig.tier.close()
    rig.key_path.chmod(0o644)
    with pytest.raises(DiskError, match="others may read"):
        rig.open()
    rig.key_path.chmod(0o600)
    rig.start()


def test_a_key_may_be_there_before_the_folder(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.key_path.write_text("ab" * 32 + "\n")
    rig.key_path.chmod(0o600)
    rig.start()
    rig.fill(1)
    assert len(rig.restart().records) == 1
    assert rig.key_path.read_text() == "ab" * 32 + "\n"
    rig.tier.close()


def test_a_start_deletes_unfinished_key_files_and_nobody_s_backups(rig: Rig) -> None:
    backups = [rig.folder / f"deployment.key{end}" for end in ("_backup1", "20261129", ".tmp", "abcdefgh")]
    for backup in backups:
        shutil.copy(rig.key_path, backup)
    (rig.folder / ".deployment.key.tmp-abcdefgh").write_text("ab" * 32)
    rig.restart()
    assert sorted(path for path in rig.folder.iterdir() if path.is_file()) == sorted([rig.key_path, *backups])


# Destroying a data key


def test_a_destroyed_key_is_nowhere_in_the_files(rig: Rig) -> None:
    rig.fill(6, users=3)
    wrapped, other, _ = wrapped_keys(rig)
    assert traces(wrapped, rig.raw()), "the search finds what is there"
    key_ids = rig.tier.destroy_keys("acme", FIRST.user, for_good=False)
    assert not traces(wrapped, rig.raw())
    assert traces(other, rig.raw())
    slab = rig.slab.read_bytes()
    assert [slab.count(key_id) for key_id in key_ids] == [2], "records say which key they were under"


def test_no_page_that_was_ever_split_or_joined_keeps_a_copy_of_a_key(tmp_path: Path) -> None:
    """SQLite overwrites what it deletes, but not always what it moved before: with this seed it leaves some."""
    index = Index(tmp_path / "index.db")
    chance = random.Random(5)
    wrapped_by_owner: dict[Owner, bytes] = {}
    erased: list[bytes] = []
    for _ in range(3000):
        with index.transaction():
            if chance.random() < 0.55 or len(wrapped_by_owner) < 5:
                owner = "t" * chance.randint(1, 40), UserId(chance.randbytes(16))
                wrapped = wrapped_by_owner[owner] = chance.randbytes(60)
                row = Row(RecordName(*owner, Key(chance.randbytes(32)), b""), slot_of(0), 1, 0, 0.0)
                index.put(row, KeyId(chance.randbytes(16)), partial(bytes, wrapped))
            else:
                owner = chance.choice(list(wrapped_by_owner))
                index.destroy([owner])
                erased.append(wrapped_by_owner.pop(owner))
    index.purge()
    raw = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert not [wrapped for wrapped in erased if traces(wrapped, raw)]
    assert all(wrapped in raw for wrapped in wrapped_by_owner.values())
    index.close()


def test_an_erased_user_has_nothing_and_others_have_all(rig: Rig) -> None:
    names = rig.fill(6, users=3)
    rig.tier.destroy_keys("acme", FIRST.user, for_good=False)
    for number, name in enumerate(names):
        event = rig.read(name, slot_of(number))
        assert event == RecordLost(rig.op, Loss.UNREADABLE) if number % 3 == 0 else isinstance(event, RecordRead)
    assert [record.name for record in rig.restart().records] == [name for name in names if name.user != FIRST.user]


def test_a_whole_tenant_can_be_erased(rig: Rig) -> None:
    rig.fill(6, users=3)
    other = name_of(9, tenant="other")
    rig.write(other, slot_of(9))
    assert len(set(rig.tier.destroy_keys("acme", None, for_good=True))) == 3
    assert rig.write(name_of(7, user=8), slot_of(7)) == RecordNotWritten(rig.op), (
        "one who had nothing is of the tenant too"
    )
    rig.tier.allow("acme", None, after=rig.op)
    assert isinstance(rig.write(name_of(8, user=8), slot_of(7)), RecordWritten)
    assert isinstance(rig.write(FIRST, slot_of(0)), RecordNotWritten), "erased for good"
    assert {record.name for record in rig.restart().records} == {other, name_of(8, user=8)}


def test_what_was_begun_before_an_erasure_does_not_succeed_after_it(rig: Rig) -> None:
    rig.fill(1)
    writes = [rig.begin_write(name_of(number), slot_of(number)) for number in range(1, 40)]
    rig.tier.destroy_keys("acme", FIRST.user, for_good=False)
    last = rig.begin_write(name_of(40), slot_of(40))
    rig.tier.allow("acme", FIRST.user, after=last)
    told = [rig.next_event() for _ in (*writes, last)]
    assert {event.op for event in told} == {*writes, last}  # type: ignore[union-attr]
    assert RecordNotWritten(last) in told
    assert not rig.restart().records
    assert isinstance(rig.write(name_of(41), slot_of(41)), RecordWritten)


def test_a_read_that_ends_after_its_user_was_erased_is_a_loss(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    names = rig.fill(2, users=2)
    reached, go_on = Event(), Event()

    def slowly(*arguments: Any) -> bool:
        reached.set()
        assert go_on.wait(PATIENCE_SECONDS)
        return unseal(*arguments)

    monkeypatch.setattr("saltern.tiers.disk.unseal", slowly)
    op = rig.begin_read(FIRST, slot_of(0))
    assert reached.wait(PATIENCE_SECONDS)
    rig.tier.destroy_keys("acme", FIRST.user, for_good=False)
    go_on.set()
    assert rig.next_event() == RecordLost(op, Loss.UNREADABLE)
    assert not any(rig.was_read), "what was decrypted is still in the arena"
    assert isinstance(rig.read(names[1], slot_of(1)), RecordRead)


def test_an_erased_user_who_comes_back_has_another_key(rig: Rig) -> None:
    rig.fill(1)
    (before,) = rig.tier.destroy_keys("acme", FIRST.user, for_good=False)
    rig.tier.allow("acme", FIRST.user, after=rig.op)
    content = rig.slab.read_bytes()
    assert isinstance(rig.write(FIRST, slot_of(1)), RecordWritten)
    rig.restart()
    assert isinstance(rig.read(FIRST, slot_of(1)), RecordRead)
    assert rig.read(FIRST, slot_of(0)) == RecordLost(rig.op, Loss.NOT_AUTHENTIC), "the block under the destroyed key"
    assert rig.slab.read_bytes()[: len(content) // 64] == content[: len(content) // 64], "it still lies there"
    (after,) = rig.tier.destroy_keys("acme", FIRST.user, for_good=False)
    assert after != before


def test_an_erasure_that_fails_can_be_asked_for_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.fill(2, users=2)
    wrapped, _ = wrapped_keys(rig)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raising)
        with pytest.raises(DiskError, match="No space"):
            rig.tier.destroy_keys("acme", FIRST.user, for_good=False)
    assert rig.read(FIRST, slot_of(0)) == RecordLost(rig.op, Loss.UNREADABLE)
    assert len(rig.tier.destroy_keys("acme", FIRST.user, for_good=False)) == 1, "the receipt names the key all the same"
    assert not traces(wrapped, rig.raw())


def raising(fd: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_erasure_that_did_not_begin_leaves_all_as_it_was(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.fill(2)
    with monkeypatch.context() as patch:
        patch.setattr(rig.tier._index, "destroy", failing)
        with pytest.raises(DiskError, match="is full"):
            rig.tier.destroy_keys("acme", FIRST.user, for_good=False)
    rig.tier.allow("acme", FIRST.user, after=rig.op)
    assert isinstance(rig.write(name_of(2), slot_of(2)), RecordWritten)
    assert len(rig.restart().records) == 3
    assert isinstance(rig.read(name_of(2), slot_of(2)), RecordRead), "under the key that is still there"


def failing(owners: object) -> None:
    raise sqlite3.OperationalError("the database or disk is full")


def test_whoever_asks_at_the_end_is_answered(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.start()
    rig.tier.close()
    with pytest.raises(DiskError, match="about to end"):
        rig.tier.rotate_key()


def test_erased_for_good_has_no_key_any_more(rig: Rig) -> None:
    rig.fill(1)
    rig.tier.destroy_keys("acme", FIRST.user, for_good=True)
    rig.tier.allow("acme", FIRST.user, after=rig.op)
    assert isinstance(rig.write(FIRST, slot_of(0)), RecordNotWritten)
    rig.restart([("acme", FIRST.user)])
    assert isinstance(rig.write(FIRST, slot_of(0)), RecordNotWritten)
    assert isinstance(rig.write(SECOND, slot_of(1)), RecordWritten)


def test_a_start_destroys_the_keys_of_who_is_erased_for_good(rig: Rig) -> None:
    names = rig.fill(6, users=3)
    wrapped, other, _ = wrapped_keys(rig)
    gone = [("acme", FIRST.user), ("acme", name_of(9, user=9).user), ("other", SECOND.user)]
    restored = rig.restart(gone)
    assert [record.name for record in restored.records] == [name for name in names if name.user != FIRST.user]
    assert restored.dropped == 0
    assert not traces(wrapped, rig.raw())
    assert traces(other, rig.raw())


def test_erasing_one_who_has_nothing_destroys_nothing(rig: Rig) -> None:
    assert rig.tier.destroy_keys("acme", FIRST.user, for_good=False) == []
    assert rig.tier.destroy_keys("nobody", None, for_good=False) == []


def test_an_older_index_brings_nobody_back_under_another_key(rig: Rig) -> None:
    """With a copy of the index from before, and the key that was replaced since, there is nothing to be read."""
    rig.fill(2, users=2)
    rig.tier.close()
    old = (rig.data / "index.db").read_bytes()
    rig.start()
    rig.tier.destroy_keys("acme", FIRST.user, for_good=False)
    rig.tier.rotate_key()
    rig.tier.close()
    (rig.data / "index.db").write_bytes(old)
    with pytest.raises(DiskError, match="is not the key"):
        rig.open()
    (rig.data / "index.db").unlink()
    rig.start()


# Replacing the deployment's key


def test_rotation_keeps_every_record_and_no_old_key(rig: Rig) -> None:
    names = rig.fill(6, users=3)
    before, old = wrapped_keys(rig), rig.key_path.read_text()
    assert rig.tier.rotate_key() == 3
    assert not [wrapped for wrapped in before if traces(wrapped, rig.raw())]
    assert old.strip() not in rig.key_path.read_text()
    assert len(rig.key_path.read_text().split()) == 1
    rig.write(name_of(9, user=9), slot_of(9))
    assert [record.name for record in rig.restart().records] == [*names, name_of(9, user=9)]
    for number, name in enumerate(names):
        assert isinstance(rig.read(name, slot_of(number)), RecordRead)
        assert rig.was_read == content_of(name)
    rig.tier.close()
    new = rig.key_path.read_text()
    rig.key_path.write_text(old)
    with pytest.raises(DiskError, match="is not the key"):
        rig.open()
    rig.key_path.write_text(new)
    rig.start()


def test_records_are_written_and_read_while_the_key_is_replaced(rig: Rig) -> None:
    rig.fill(2, users=2)
    for number in range(2, 30):
        rig.begin_write(name_of(number, user=number), slot_of(number))
        if number % 9 == 0:
            rig.tier.rotate_key()
    assert all(isinstance(rig.next_event(), RecordWritten) for _ in range(2, 30))
    assert len(rig.restart().records) == 30


def survivors(rig: Rig, what: str) -> Iterator[tuple[bool, str]]:
    """Do something again and again from the same state, killed before its first step, its second and so on.

    Yields after each death, with the folder as it was left; the last time it was done.
    """
    rig.tier.close()
    saved = rig.folder.with_name(rig.folder.name + "-saved")
    shutil.copytree(rig.folder, saved)
    steps, done = 0, False
    while not done:
        ran = subprocess.run(
            [sys.executable, "-m", "tests.tiers.victim", what, str(rig.folder), str(steps)],
            cwd=ROOT, check=False, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        done = "survived" in ran.stdout
        assert done or ran.returncode == -9, ran.stderr
        yield done, f"killed before step {steps}"
        rig.tier.close()
        shutil.rmtree(rig.folder)
        shutil.copytree(saved, rig.folder)
        steps += 1
    assert steps > 8, "it died at too few places to say anything"
    rig.start()


def test_a_rotation_that_was_interrupted_anywhere_is_finished(rig: Rig) -> None:
    names = rig.fill(4, users=2)
    before, old = wrapped_keys(rig), rig.key_path.read_text().strip()
    rotated = 0
    for _, where in survivors(rig, "rotating"):
        begun = len(rig.key_path.read_text().split()) == 2 or old not in rig.key_path.read_text()
        assert [record.name for record in rig.start().records] == names, where
        for number, name in enumerate(names):
            assert isinstance(rig.read(name, slot_of(number)), RecordRead), where
        keys = [key.hex() for key in read_deployment_keys(rig.key_path)]
        assert len(keys) == 1, where
        assert (keys != [old]) == begun, where
        assert [path for path in rig.folder.iterdir() if path.is_file()] == [rig.key_path], where
        if begun:
            rotated += 1
            assert not [wrapped for wrapped in before if traces(wrapped, rig.raw())], where
    assert rotated > 5


def test_an_erasure_that_was_interrupted_anywhere_is_all_or_nothing(rig: Rig) -> None:
    names = rig.fill(4, users=2)
    wrapped, _ = wrapped_keys(rig)
    outcomes = []
    for done, where in survivors(rig, "erasing"):
        restored = rig.start()
        erased = all(record.name.user != FIRST.user for record in restored.records)
        assert erased or not done
        kept = [name for name in names if not erased or name.user != FIRST.user]
        assert [record.name for record in restored.records] == kept, where
        assert (not traces(wrapped, rig.raw())) == erased, where
        outcomes.append(erased)
    assert outcomes == sorted(outcomes) and not outcomes[0] and outcomes[-1]


def test_a_rotation_without_its_files_is_refused_and_loses_nothing(rig: Rig) -> None:
    rig.fill(1)
    os.rename(rig.key_path, rig.folder / "away")
    with pytest.raises(DiskError, match="missing"):
        rig.tier.rotate_key()
    os.rename(rig.folder / "away", rig.key_path)
    assert rig.tier.rotate_key() == 1
    assert len(rig.restart().records) == 1
