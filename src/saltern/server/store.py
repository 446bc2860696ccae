"""The store: what operators set at run time, and whom they erased, in one SQLite file below the state folder.

Each row is one tenant or plan with its settings as JSON, since every setting has three states (unset, none, a value);
or who was erased. That is here, not on the disk tier, which may be turned off or begun anew: whoever was erased for
good stays so.

Writing waits for the disk (synchronous=FULL): whoever was answered finds the setting again after a crash. So it is
never done on the loop's thread. The file is locked for as long as the server runs: two servers with one file would
each overwrite what the other believes.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from saltern.core.keys import USER_ID_BYTES, UserId
from saltern.database import Kind
from saltern.operations import PlanSettings, TenantSettings

_Settings = TypeVar("_Settings", TenantSettings, PlanSettings)


Erased = tuple[str, UserId | None, bool]
"""A tenant, one of its users or None for all of them, and whether nothing is stored for that user again."""


class StoreError(Exception):
    """The file can't be used. The text says why, and what to do."""


class InUseError(StoreError):
    """A server holds the file."""


_KIND = Kind(
    application_id=0x53414C54,  # "SALT"
    schema=(
        """
        CREATE TABLE tenant (name TEXT PRIMARY KEY NOT NULL, settings TEXT NOT NULL) WITHOUT ROWID;
        CREATE TABLE plan (name TEXT PRIMARY KEY NOT NULL, settings TEXT NOT NULL) WITHOUT ROWID;
        CREATE TABLE erased (
            tenant TEXT NOT NULL, user BLOB NOT NULL, for_good INTEGER NOT NULL, PRIMARY KEY (tenant, user)
        ) WITHOUT ROWID;
        """,
    ),
    pragmas=("synchronous=FULL",),
    setting="server.state_folder",
    in_use="another server uses {}: give this one a server.state_folder of its own",
    damaged="{} is damaged ({}): put a copy of it back, or move it away to start with the settings of the file alone",
    error=StoreError,
    in_use_error=InUseError,
    damaged_error=StoreError,
)


class Store:
    """The file at `path`, made if it is missing. Raises `StoreError`. Used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database = _KIND.open(path)
        self._database.text_factory = str  # a name that is no text is nobody's
        try:
            self.tenants = self._read("tenant", TenantSettings)
            self.plans = self._read("plan", PlanSettings)
            self.erased = self._read_erased()
            """Who was erased when the file was opened."""
        except sqlite3.Error as error:
            self.close()
            raise _KIND.translated(path, error) from None
        except StoreError:
            self.close()
            raise

    def write(self, tenants: Mapping[str, TenantSettings], plans: Mapping[str, PlanSettings]) -> None:
        """Make these the settings, all or nothing, and wait until they are on the disk. Raises `StoreError`."""
        with self._transaction():
            self._replace("tenant", self.tenants, tenants)
            self._replace("plan", self.plans, plans)
        self.tenants, self.plans = dict(tenants), dict(plans)

    def note_erased(self, erased: Iterable[Erased]) -> None:
        """Note who is erased, and wait until it is on the disk; who was for good stays so. Raises `StoreError`."""
        rows = [(tenant, user or b"", for_good) for tenant, user, for_good in erased]
        change = "ON CONFLICT (tenant, user) DO UPDATE SET for_good = max(for_good, excluded.for_good)"
        with self._transaction():
            self._database.executemany(f"INSERT INTO erased VALUES (?, ?, ?) {change}", rows)

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Do what is inside all or not at all. Raises `StoreError`."""
        try:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except sqlite3.Error:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise StoreError(f"{self.path} can't be written: {error}") from None

    def _read(self, table: str, kind: type[_Settings]) -> dict[str, _Settings]:
        settings: dict[str, _Settings] = {}
        for name, text in self._database.execute(f"SELECT name, settings FROM {table} ORDER BY name"):
            try:
                settings[name] = msgspec.json.decode(text, type=kind)
            except (msgspec.MsgspecError, TypeError) as error:
                raise _KIND.damage(self.path, f"{table} {name!r}: {error}") from None
        return settings

    def _read_erased(self) -> list[Erased]:
        rows = self._database.execute("SELECT tenant, user, for_good FROM erased").fetchall()
        if any(not isinstance(user, bytes) or len(user) not in (0, USER_ID_BYTES) for _, user, _ in rows):
            raise _KIND.damage(self.path, "who was erased")
        return [(tenant, UserId(user) if user else None, bool(for_good)) for tenant, user, for_good in rows]

    def _replace(self, table: str, old: Mapping[str, PlanSettings], new: Mapping[str, PlanSettings]) -> None:
        gone = [(name,) for name in old if name not in new]
        changed = [
            (name, msgspec.json.encode(settings).decode())
            for name, settings in new.items()
            if old.get(name) != settings
        ]
        self._database.executemany(f"DELETE FROM {table} WHERE name = ?", gone)
        self._database.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", changed)
