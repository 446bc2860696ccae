"""The scene of a fault: a server whose disk holds prompts of all users, and a client that looks for them."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec

from demo.server import ServerError
from faults.torture.books import Books, read_books
from faults.torture.client import Client, Prompt, ServerLostError
from faults.torture.population import USERS, User, block_bytes, prompt_keys
from faults.torture.server import TorturedServer
from saltern.core.disk import DISK_PAGE_BYTES
from saltern.core.extents import Extent
from saltern.core.snapshot import DiskStats
from saltern.tiers.errors import DiskError
from saltern.tiers.index import Row

T = TypeVar("T")

PROMPT = 0
"""Everybody asks for this one: other blocks for each."""

SETTLE_SECONDS_MAX = 60.0
POLL_SECONDS = 0.01


class Outcome(msgspec.Struct, frozen=True):
    """What became of the blocks that were asked for after a fault. `counted` is what the server says of it."""

    name: str
    did: str
    asked: int
    right: int
    wrong: int
    counted: dict[str, int]
    problems: tuple[str, ...]

    @property
    def missed(self) -> int:
        """Return how many blocks were not there."""
        return self.asked - self.right - self.wrong


class Scene:
    """One fault's: the server runs, and every user has one prompt on the disk and nothing in RAM."""

    def __init__(self, folder: Path, *, users: Sequence[User] = USERS) -> None:
        self.server = TorturedServer(folder)
        self.disk, self.slab, self.index = (
            self.server.disk_path,
            self.server.disk_path / "slab",
            self.server.disk_path / "index.db",
        )
        self._scratch = folder / "scratch"
        self._scratch.mkdir()
        self.generation, self.number = 0, PROMPT
        self.asked = self.right = self.wrong = 0
        self.counted: dict[str, int] = {}
        self.problems: list[str] = []
        self.server.start()
        self._client = Client(str(self.server.socket_path), engine="scene")
        for user in users:
            self.store(user)
        self.restart()

    def close(self) -> None:
        """End everything."""
        self.server.kill()
        self._client.close()

    def expect(self, holds: bool, otherwise: str) -> None:
        """Note a problem unless something holds."""
        if not holds:
            self.problems.append(otherwise)

    def outcome(self, name: str, did: str) -> Outcome:
        """Return what was seen."""
        return Outcome(name, did, self.asked, self.right, self.wrong, self.counted, tuple(self.problems))

    # The server

    def restart(self) -> None:
        """Stop the server and start it: what was in RAM is gone."""
        self.server.stop()
        self.start()

    def start(self) -> None:
        """Start the server, and count what it says of damage. Raises `ServerError` if it refuses to."""
        self.server.start()
        restored = self.server.restored()
        self.count("damaged at the start", restored.damaged)
        self.count("torn at the start", restored.torn)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the server for the length of a `with` block."""
        self.server.stop()
        yield
        self.start()

    def refusal(self) -> str:
        """Start a server that is to refuse; return what it says, or nothing if it starts."""
        with suppress(subprocess.TimeoutExpired):
            refused = subprocess.run(
                self.server.command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=SETTLE_SECONDS_MAX
            )
            if refused.returncode == 1:
                return refused.stderr.decode(errors="replace").strip()
        self.expect(False, "a server that should refuse to start did not")
        return ""

    def repair(self) -> str:
        """Run `saltern check --repair`, which ends with status 1 where it found damage; return what it says."""
        command = (*self._command("check"), "--repair", "--config", str(self.server.config_path))
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SETTLE_SECONDS_MAX)
        return (done.stdout + done.stderr).decode(errors="replace")

    def stats(self) -> DiskStats:
        """Return what the server says of its disk."""
        disk = self.server.stats().disk
        assert disk is not None, "a server without a disk tier has no disk to break"
        return disk

    # Blocks

    def prompt(self, user: User) -> Prompt:
        """Return a user's prompt."""
        identity = user.identity(self.server.naming_secret, self.generation)
        return Prompt(user.tenant, identity.id, prompt_keys(identity, self.number))

    def store(self, user: User, *, to_disk: bool = True) -> None:
        """Store a user's prompt and wait until it is on the disk."""
        prompt = self.prompt(user)

        def store() -> None:
            reserved = self._client.reserve(prompt, time.monotonic())
            self._client.store(reserved, lambda index: block_bytes(prompt.user, prompt.keys[index], self.generation))

        def is_on_disk() -> bool:
            if self._is_on_disk(prompt):
                return True
            self._ask(partial(self._client.load, prompt))  # which has what was skipped offered to the disk again
            return False

        self._ask(store)
        if to_disk:
            self.until(is_on_disk, "a prompt is on the disk")

    def look(self, users: Iterable[User]) -> int:
        """Look for users' prompts, check and count all that is found; return how many blocks were right."""
        lost, right = self.stats().lost, self.right
        for user in users:
            prompt = self.prompt(user)
            blocks = self._ask(partial(self._client.load, prompt))
            for key, block in zip(prompt.keys, blocks, strict=False):
                is_right = block == block_bytes(prompt.user, key, self.generation)
                self.right += is_right
                self.wrong += not is_right
            self.asked += len(prompt.keys)
        self.count("lost", self.stats().lost - lost)
        return self.right - right

    def discard(self, user: User, index: int) -> None:
        """Say of a block that it is bad."""
        self._ask(lambda: self._client.discard(self.prompt(user), index))

    # Files

    def books(self) -> Books:
        """Return what the index has; of a running server that writes nothing."""
        return read_books(self.disk, self._scratch)

    def rows(self, user: User) -> list[Row]:
        """Return the rows of a user's prompt, in the order of its blocks."""
        row_by_key = {row.name.key: row for row in self.books().rows if row.name.user == self.prompt(user).user}
        return [row_by_key[key] for key in self.prompt(user).keys]

    def record(self, slot: Extent) -> bytes:
        """Return what is in the pages of a slot."""
        with self.slab.open("rb") as file:
            return b"".join(
                os.pread(file.fileno(), run.count * DISK_PAGE_BYTES, run.start * DISK_PAGE_BYTES) for run in slot
            )

    def put_record(self, slot: Extent, record: bytes) -> None:
        """Write over the pages of a slot."""
        with self.slab.open("r+b") as file:
            for run in slot:
                size = run.count * DISK_PAGE_BYTES
                file.seek(run.start * DISK_PAGE_BYTES)
                file.write(record[:size])
                record = record[size:]

    def change_index(self, *statements: tuple[str, tuple[object, ...]]) -> None:
        """Change rows behind the server's back, while none runs."""
        database = sqlite3.connect(self.index)
        with database:
            for statement, values in statements:
                database.execute(statement, values)
        database.close()

    def copy_index(self, folder: Path) -> None:
        """Copy the index's files to a folder, while no server runs."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in self.disk.glob("index.db*"):
            shutil.copy2(path, folder)

    def put_index(self, folder: Path) -> None:
        """Put a copy of the index in its place, while no server runs."""
        for path in self.disk.glob("index.db*"):
            path.unlink()
        for path in folder.iterdir():
            shutil.copy2(path, self.disk)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until something holds. Raises `ServerError` when it never does."""
        deadline = time.monotonic() + SETTLE_SECONDS_MAX
        while not condition():
            if time.monotonic() > deadline:
                raise ServerError(f"waited {SETTLE_SECONDS_MAX:.0f} s in vain until {what}\n{self.server.log_tail()}")
            time.sleep(POLL_SECONDS)

    def _ask(self, request: Callable[[], T]) -> T:
        """Do a request with the server that runs now, which a client may have yet to find."""
        deadline = time.monotonic() + SETTLE_SECONDS_MAX
        while True:
            self.until(lambda: self._client.keep_up(POLL_SECONDS), "the session is open")
            try:
                with self._client.request():
                    return request()
            except ServerLostError:
                if time.monotonic() > deadline:
                    raise

    def _is_on_disk(self, prompt: Prompt) -> bool:
        """Tell whether the index names all of a prompt, and nothing that is to be forgotten."""
        with suppress(DiskError, sqlite3.Error):  # a copy of what is being written may be no index
            stats, names = self.stats(), {(name.user, name.key) for name in self.books().names}
            is_settled = not stats.writing_blocks and stats.blocks == len(names)
            return is_settled and all((prompt.user, key) in names for key in prompt.keys)
        return False

    def count(self, what: str, by: int = 1) -> None:
        """Count something that a fault has led to."""
        if by:
            self.counted[what] = self.counted.get(what, 0) + by

    def _command(self, name: str) -> tuple[str, ...]:
        return (sys.executable, "-m", "saltern.cli", name)
