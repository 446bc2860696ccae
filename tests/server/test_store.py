"""What holds for the store: what was written is there after a crash, and no file that isn't ours is touched."""

import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from saltern.core.keys import UserId
from saltern.operations import PlanSettings, TenantSettings
from saltern.server.store import Store, StoreError
from tests.support import PATIENCE_SECONDS

ACME = TenantSettings(guarantee=5, limit=None, ttl=1.5, plan="gold")
GOLD = PlanSettings(weight=2.0, user_limit=7)


def altered(path: Path, *statements: str) -> None:
    """Change a store behind Saltern's back."""
    database = sqlite3.connect(path)
    with database:
        for statement in statements:
            database.execute(statement)
    database.close()


def made(path: Path) -> Path:
    store = Store(path)
    store.write({"acme": ACME}, {"gold": GOLD})
    store.close()
    return path


def test_what_was_written_is_read_with_all_three_states_of_a_setting(tmp_path: Path) -> None:
    store = Store(made(tmp_path / "saltern.db"))
    assert store.tenants == {"acme": ACME}
    assert store.plans == {"gold": GOLD}
    store.write({"beta": TenantSettings()}, {})
    store.close()
    store = Store(tmp_path / "saltern.db")
    assert store.tenants == {"beta": TenantSettings()}
    assert not store.plans
    store.close()


def test_who_was_erased_is_known_and_for_good_stays_so(tmp_path: Path) -> None:
    store = Store(tmp_path / "saltern.db")
    alice, bob = UserId(b"a" * 16), UserId(b"b" * 16)
    store.note_erased([("acme", None, False), ("acme", alice, True), ("acme", bob, False)])
    store.note_erased([("acme", alice, False)])
    store.close()
    store = Store(tmp_path / "saltern.db")
    assert set(store.erased) == {("acme", None, False), ("acme", alice, True), ("acme", bob, False)}
    store.close()


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "saltern.db")
    store.write({"acme": ACME}, {})
    files = list(tmp_path.iterdir())
    assert len(files) >= 2, "the log of changes lies beside it"
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    store.close()


def test_what_was_written_survives_a_kill(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, pathlib\n"
        "from saltern.operations import TenantSettings\n"
        "from saltern.server.store import Store\n"
        "store = Store(pathlib.Path(sys.argv[1]))\n"
        "store.write({'acme': TenantSettings(limit=9)}, {})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "saltern.db")], timeout=PATIENCE_SECONDS)
    assert killed.returncode == -9
    store = Store(tmp_path / "saltern.db")
    assert store.tenants == {"acme": TenantSettings(limit=9)}
    store.close()


def test_writing_waits_for_the_disk(tmp_path: Path) -> None:
    store = Store(tmp_path / "saltern.db")
    pragmas = {
        name: store._database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")
    }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2}  # FULL
    store.close()


def test_two_servers_do_not_share_a_file(tmp_path: Path) -> None:
    store = Store(tmp_path / "saltern.db")
    with pytest.raises(StoreError, match=r"another server uses .*: give this one a server\.state_folder of its own"):
        Store(tmp_path / "saltern.db")
    store.close()


def test_a_failed_write_changes_nothing(tmp_path: Path) -> None:
    path = made(tmp_path / "saltern.db")
    altered(path, "CREATE TRIGGER full BEFORE INSERT ON plan BEGIN SELECT RAISE(ABORT, 'disk full'); END")
    store = Store(path)
    with pytest.raises(StoreError, match="disk full"):
        store.write({"beta": ACME}, {"silver": GOLD})
    assert store.tenants == {"acme": ACME}
    store.write({}, {"gold": GOLD})
    store.close()
    store = Store(path)
    assert not store.tenants
    store.close()


@pytest.mark.parametrize(
    ("statements", "complaint"),
    [
        (["PRAGMA user_version = 99"], "written by a newer Saltern (schema 99, this one knows"),
        (["PRAGMA application_id = 1"], "another program's database"),
        (["UPDATE tenant SET settings = '{'"], "damaged (tenant 'acme': "),
        (["UPDATE tenant SET settings = '{\"limit\": -1}'"], "damaged (tenant 'acme': "),
        (["UPDATE tenant SET settings = '{\"lim\": 1}'"], "damaged (tenant 'acme': "),
        (["UPDATE tenant SET settings = x'ff'"], "damaged (tenant 'acme': "),
        (["INSERT INTO erased VALUES ('acme', x'00', 1)"], "damaged (who was erased): "),
        (["DROP TABLE plan"], "no such table"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_right_is_refused(tmp_path: Path, statements: list[str], complaint: str) -> None:
    path = made(tmp_path / "saltern.db")
    altered(path, *statements)
    with pytest.raises(StoreError) as refused:
        Store(path)
    assert complaint in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_foreign_database_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "saltern.db"
    altered(path, "CREATE TABLE theirs (x)")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="another program's database"):
        Store(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "spoil", [lambda _: b"x" * 8192, lambda content: content[:4096] + b"\xff" * 4096 + content[8192:]]
)
def test_a_damaged_file_is_refused_with_what_to_do(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = made(tmp_path / "saltern.db")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(StoreError, match=r"is damaged \(.*move it away to start"):
        Store(path)


def test_a_file_that_others_may_change_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path / "saltern.db")
    path.chmod(0o660)
    with pytest.raises(StoreError, match="others may change"):
        Store(path)


def test_a_place_where_nothing_can_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file or directory"):
        Store(tmp_path / "nowhere/saltern.db")
