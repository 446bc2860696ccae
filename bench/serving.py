"""A real server as a child process, and engines without a model that talk to it."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from saltern.client.admin import fetch_stats, operate
from saltern.client.lifeline import Arena, Lifeline
from saltern.client.sockets import ConnectionLost
from saltern.core.messages import DEFAULT_TENANT, NAME_BYTES, Reply, Request
from saltern.core.snapshot import Snapshot
from saltern.operations import SetTenant, TenantSettings, TenantShown
from saltern.vllm.session import Session

WAIT_SECONDS_MAX = 60.0
"""Longest wait for anything here: far above what a loaded machine takes, so that nothing waits for ever."""


class Server:
    """One `saltern serve` with a socket in a folder of its own, used as a context manager.

    `seconds_to_answer` is the time from starting the process until its first answer was here. Without `disk_bytes` it
    has no disk tier; with them, that lies in the same folder.
    """

    def __init__(
        self, *, arena_bytes: int, page_bytes: int = 64 * 1024, prefault: bool = True, disk_bytes: int = 0
    ) -> None:
        self._settings = (
            f"[arena]\nsize = {arena_bytes}\npage_size = {page_bytes}\nprefault = {str(prefault).lower()}\n"
            f'[disk]\nsize = {disk_bytes}\n[log]\nlevel = "warning"\n'
        )
        self._page_bytes = page_bytes
        self.socket = ""
        self.seconds_to_answer = 0.0

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="saltern-bench-")
        config = Path(self._folder.name, "saltern.toml")
        config.write_text(f'{self._settings}[server]\nstate_folder = "{self._folder.name}/state"\n', "utf-8")
        self.socket = str(Path(self._folder.name, "socket"))
        began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "saltern.cli", "serve", "--config", str(config), "--socket", self.socket]
        )
        try:
            until(self._answers)
        except BaseException:
            self._stop()
            raise
        self.seconds_to_answer = time.perf_counter() - began
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    @property
    def anonymous_bytes(self) -> int:
        """Return RssAnon: memory that is the server's alone, the arena and shared libraries left out."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text("ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("the kernel does not tell RssAnon")

    def stats(self) -> Snapshot:
        """Ask the server what it holds."""
        return fetch_stats(self.socket)

    def empty_memory(self) -> None:
        """Have every block of the tenant that all are charged to evicted; what is on the disk stays there."""
        self._limit(self._page_bytes)
        until(lambda: not self.stats().arena.blocks)
        self._limit(None)

    def _limit(self, limit_bytes: int | None) -> None:
        admin_socket = str(Path(self.socket).with_name("admin.sock"))
        answer = operate(admin_socket, SetTenant(DEFAULT_TENANT, TenantSettings(limit=limit_bytes)))
        assert isinstance(answer, TenantShown), f"the limit could not be set: {answer}"

    def _answers(self) -> bool:
        assert self._process.poll() is None, "the server ended while it started"
        try:
            self.stats()
        except ConnectionLost:
            return False
        return True

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(WAIT_SECONDS_MAX)
        finally:
            self._process.kill()
            self._process.wait()
            self._folder.cleanup()


class Asks(Protocol):
    """Whatever answers requests: a server over its socket, or the core itself."""

    def ask(self, message: Request) -> Reply:
        """Send a request and return its answer."""

    def tell(self, message: Request) -> None:
        """Send a request that has no answer."""


class Peer:
    """An engine without a model: a scheduler's open session, and the lifeline of its one worker."""

    def __init__(self, socket: str, *, block_bytes: int) -> None:
        engine, name = os.urandom(8).hex(), os.urandom(NAME_BYTES)
        self.arenas: list[Arena] = []
        self.lifeline = Lifeline(socket, engine=engine, name=name, rank=0, world_size=1, on_map=self.arenas.append)
        self.lifeline.start()
        self.session = Session(socket, engine=engine, workers=(name,), block_bytes=block_bytes, clock=time.monotonic)
        self.session.await_open(WAIT_SECONDS_MAX)
        assert self.session.is_open, "the server did not open a session"

    def ask(self, message: Request) -> Reply:
        """Send a request and wait for its answer; nothing else may be under way."""
        self.tell(message)
        while True:
            replies = self.session.receive(WAIT_SECONDS_MAX)
            assert self.session.is_open, "the server ended the session"
            if replies:
                (reply,) = replies
                return reply

    def tell(self, message: Request) -> None:
        """Send a request that has no answer."""
        assert self.session.send(message), "the server ended the session"

    def close(self) -> None:
        """Leave the server."""
        self.session.close()
        self.lifeline.close()


def until(condition: Callable[[], bool], poll_seconds: float = 0.001) -> None:
    """Wait until a condition holds, a minute at most."""
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline, "waited a minute for nothing"
        time.sleep(poll_seconds)


def wait_until_populated(arenas: Iterable[Arena]) -> None:
    """Wait until this process has page table entries for all of the arena, as in an engine that has run a while."""
    until(lambda: all(arena.populated for arena in arenas))
