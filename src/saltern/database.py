"""The database: how an SQLite file is opened that is ours and nobody else's, and refused where it can't be.

It is locked for as long as it is open: two servers with one file would each overwrite what the other believes.
"""

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from saltern.secret import keep_private


class Kind(NamedTuple):
    """What distinguishes one of our files from another: its tables, and what to say when it can't be used."""

    application_id: int
    """SQLite keeps it in the file's header."""
    schema: tuple[str, ...]
    """The steps from an empty file to this release's tables; `user_version` counts those that a file has taken."""
    pragmas: tuple[str, ...]
    setting: str
    """Names the folder."""
    in_use: str
    """What to say of a file that another process has locked, with {} for its path."""
    damaged: str
    """The same of one that isn't what was written, with {} for what is wrong behind that."""
    error: type[Exception]
    in_use_error: type[Exception]
    damaged_error: type[Exception]

    def open(self, path: Path) -> sqlite3.Connection:
        """Open the file, made if it is missing. For one thread at a time. Raises `error` or what is one.

        Texts that are none are not refused, but made some.
        """
        try:
            # Of mode 0600, which SQLite gives to those beside it.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            keep_private(path)
            # Autocommit: transactions are begun where they are meant.
            database = sqlite3.connect(path, timeout=1.0, isolation_level=None, check_same_thread=False)
        except ValueError as error:
            raise self.error(str(error)) from None
        except (OSError, sqlite3.Error) as error:
            raise self.error(f"{path}: {getattr(error, 'strerror', None) or error}") from None
        try:
            database.text_factory = lambda text: text.decode(errors="replace")
            self._take(path, database)
        except (sqlite3.Error, UnicodeError) as error:
            database.close()
            raise self.translated(path, error) from None
        except self.error:
            database.close()
            raise
        return database

    def translated(self, path: Path, error: Exception) -> Exception:
        """Return what to raise for an error of the database."""
        name = getattr(error, "sqlite_errorname", "")  # an error of the module's own has none
        if name.startswith("SQLITE_BUSY"):
            return self.in_use_error(self.in_use.format(path))
        if isinstance(error, UnicodeError) or name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            return self.damage(path, str(error))
        return self.error(f"{path}: {error}")

    def damage(self, path: Path, wrong: str) -> Exception:
        """Return what to raise for a file that isn't what was written."""
        return self.damaged_error(self.damaged.format(path, wrong))

    def _take(self, path: Path, database: sqlite3.Connection) -> None:
        """Lock the file and bring its tables up to date, if it is one of ours and whole."""
        for pragma in ("locking_mode=EXCLUSIVE", *self.pragmas):
            database.execute(f"PRAGMA {pragma}")
        application, version, tables = (
            int(database.execute(query).fetchone()[0])
            for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        )
        if application != self.application_id and (application or version or tables):
            raise self.error(f"{path} is another program's database: name another {self.setting}")
        if version > len(self.schema):
            raise self.error(
                f"{path} was written by a newer Saltern (schema {version}, this one knows {len(self.schema)}):"
                f" run that release, or name another {self.setting}"
            )
        # Before this, since a foreign file must not be changed at all.
        database.execute("PRAGMA journal_mode=WAL")
        with closing(database.execute("PRAGMA quick_check")) as found:
            wrong = found.fetchone()[0]
        if wrong != "ok":
            raise self.damage(path, wrong)
        steps = "".join(self.schema[version:])
        if steps:
            steps += f"PRAGMA application_id={self.application_id}; PRAGMA user_version={len(self.schema)};"
        database.executescript(f"BEGIN EXCLUSIVE; {steps} COMMIT;")  # without steps: for the lock
