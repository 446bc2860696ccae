"""A real server and the engines' ends of it, for tests and benchmarks: real processes on temporary sockets."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from saltern.client.admin import fetch_stats
from saltern.client.control import Control
from saltern.client.lifeline import Lifeline
from saltern.client.lifeline import Mapping as ArenaUse
from saltern.core.messages import NAME_BYTES, Attached, Reply, Request, SchedulerHello, Welcome
from saltern.core.snapshot import Snapshot
from saltern.secret import next_signing_secrets, read_signing_secrets, write_signing_secrets

PATIENCE_SECONDS = 30.0
"""Nothing here takes a second; more means that it never comes, even on a machine with much else to do."""

Settings = Mapping[str, object]


def until(condition: Callable[[], bool], what: str) -> None:
    """Poll until `condition` holds; fails, naming `what`, when it never does."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.002)


class Server:
    """One `saltern serve` process after another on the same socket, with the same settings."""

    def __init__(self, folder: Path, *, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.socket_path = folder / "saltern.sock"
        self.admin_path = folder / "admin.sock"
        self.log_path = folder / "server.log"
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def path(self) -> str:
        """Return the socket's path."""
        return str(self.socket_path)

    @property
    def pid(self) -> int:
        """Return the running process's id."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    @property
    def log(self) -> str:
        """Return what all processes so far have written to stderr."""
        return self.log_path.read_text(encoding="utf-8")

    def start(self) -> None:
        """Start a process and wait until it is ready. Fails with its log if it ends instead."""
        assert self._process is None, "the server is running already"
        command = [sys.executable, "-m", "saltern.cli", "serve", "--config", str(self.folder / "saltern.toml")]
        with self.log_path.open("ab") as log:
            log_begins = log.tell()
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, env=self._environment)

        def ready() -> bool:
            said = self.log_path.read_bytes()[log_begins:].decode()
            assert process.poll() is None, f"the server ended at once:\n{said}"
            return "ready: listening" in said

        self._process = process
        try:
            until(ready, "the server is ready")
        except AssertionError:
            self.close()
            raise

    def stop(self) -> int:
        """Stop it as an operator does, and return the exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it without a warning."""
        self._end(signal.SIGKILL)

    def stats(self) -> Snapshot:
        """Ask the server for a snapshot."""
        return fetch_stats(self.path, PATIENCE_SECONDS)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self.kill()

    def _end(self, number: int) -> int:
        process, self._process = self._process, None
        assert process is not None, "the server is not running"
        process.send_signal(signal.SIGCONT)
        process.send_signal(number)
        return process.wait(PATIENCE_SECONDS)


@contextmanager
def serving(
    *,
    arena: str = "64 MiB",
    page_size: str = "64 KiB",
    limit: str | None = None,
    user_limit: str | None = None,
    server: Settings | None = None,
    log: Settings | None = None,
    disk: Settings | None = None,
    tenants: Mapping[str, Settings] | None = None,
    plans: Mapping[str, Settings] | None = None,
    prefault: bool = False,
    start: bool = True,
) -> Iterator[Server]:
    """Run a server for the length of a `with` block; leaves nothing behind.

    `server` and `log` are further settings of these tables, `tenants` and `plans` those by name. Without `disk` it has
    no disk tier. The folder is short
    enough for a socket's path, unlike pytest's own temporary ones.
    """
    folder = Path(tempfile.mkdtemp(prefix="saltern-"))
    running = Server(folder)
    limits = {name: value for name, value in (("limit", limit), ("user_limit", user_limit)) if value is not None}
    tables: dict[str, Settings] = {
        "server": {"socket": running.path, "state_folder": str(folder / "state"), **(server or {})},
        "arena": {"size": arena, "page_size": page_size, "prefault": prefault},
        "disk": disk or {"size": 0},
        **{f"tenants.{name}": settings for name, settings in {"default": limits, **(tenants or {})}.items()},
        **{f"plans.{name}": settings for name, settings in (plans or {}).items()},
        "log": {"level": "debug", **(log or {})},
    }
    (folder / "saltern.toml").write_text(as_toml(tables), encoding="utf-8")
    try:
        if start:
            running.start()
        yield running
    finally:
        running.close()
        shutil.rmtree(folder)


def as_toml(tables: Mapping[str, Settings]) -> str:
    """Write tables of strings, numbers, booleans and lists; JSON's notation of these is TOML's too."""
    lines = (
        [f"[{table}]", *(f"{name} = {json.dumps(value)}" for name, value in settings.items())]
        for table, settings in tables.items()
    )
    return "\n".join(itertools.chain.from_iterable(lines)) + "\n"


class Engine:
    """An engine's ends of the socket without the engine: a scheduler's, and one lifeline a rank.

    `workers` names lifelines that live in other processes instead.
    """

    def __init__(
        self,
        path: str,
        *,
        engine: str = "engine",
        ranks: int = 1,
        block_bytes: int = 65_536,
        workers: tuple[bytes, ...] | None = None,
    ) -> None:
        names = workers or tuple(os.urandom(NAME_BYTES) for _ in range(ranks))
        self.lifelines = [
            Lifeline(path, engine=engine, name=name, rank=rank, world_size=ranks)
            for rank, name in enumerate(() if workers else names)
        ]
        self._engine, self._workers, self._block_bytes = engine, names, block_bytes
        self._replies: list[Reply] = []
        self._held: list[ArenaUse] = []
        for lifeline in self.lifelines:
            lifeline.start()
        self.attach(path)

    def attach(self, path: str) -> None:
        """Connect the scheduler's end, and wait until all workers are there."""
        self.control = Control.connect(path)
        self.incarnation = os.urandom(NAME_BYTES)
        welcome = self.ask(SchedulerHello(self._engine, self.incarnation, self._workers, self._block_bytes))
        assert isinstance(welcome, Welcome), welcome
        self.welcome = welcome
        attached = self.receive()
        assert isinstance(attached, Attached), attached

    def receive(self) -> Reply:
        """Wait for the next reply."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self._replies:
            assert time.monotonic() < deadline, "the server never answered"
            self._replies += self.control.receive(0.1)
        return self._replies.pop(0)

    def ask(self, message: Request) -> Reply:
        """Send a request and wait for its answer."""
        self.control.send(message)
        return self.receive()

    def hold(self, rank: int = 0) -> ArenaUse:
        """Use the arena as one of the workers does."""
        use = self.lifelines[rank].hold(self.incarnation, PATIENCE_SECONDS)
        assert use is not None, "the worker was never attached"
        self._held.append(use)
        return use

    def close(self) -> None:
        """End the session from the scheduler's side first, as an engine's shutdown does."""
        self.control.close()
        for use in self._held:
            use.release()
        for lifeline in self.lifelines:
            lifeline.close()


@contextmanager
def engine_at(
    path: str,
    *,
    engine: str = "engine",
    ranks: int = 1,
    block_bytes: int = 65_536,
    workers: tuple[bytes, ...] | None = None,
) -> Iterator[Engine]:
    """Attach an engine for the length of a `with` block."""
    attached = Engine(path, engine=engine, ranks=ranks, block_bytes=block_bytes, workers=workers)
    try:
        yield attached
    finally:
        attached.close()


class WorkerProcess:
    """A worker in a process of its own, which can be stopped and killed: see `tests.worker` for its commands."""

    def __init__(self, path: str, *, outlives_socket: bool = False) -> None:
        self.name = os.urandom(NAME_BYTES)
        arguments = [path, self.name.hex(), *(["outlives"] if outlives_socket else [])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )

    def tell(self, command: str) -> str:
        """Send one command and wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        """Kill the process without a warning."""
        self.process.kill()
        self.process.wait(PATIENCE_SECONDS)

    def close(self) -> None:
        """Make sure that it is gone."""
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


@contextmanager
def worker_at(path: str, *, outlives_socket: bool = False) -> Iterator[WorkerProcess]:
    """Run a worker process for the length of a `with` block."""
    worker = WorkerProcess(path, outlives_socket=outlives_socket)
    try:
        yield worker
    finally:
        worker.close()


def rotate_signing_secrets(path: Path) -> tuple[bytes, ...]:
    """Do to a file of signing secrets what a server does that is told to rotate them, and return what it then holds."""
    rotated = next_signing_secrets(read_signing_secrets(path))
    write_signing_secrets(path, rotated)
    return rotated
