"""The stage: one server and one engine, which a fault finds in good order and has to leave so."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path

from demo.engine import Completion, Engine, EngineError, RequestError
from demo.model import BLOCK_TOKENS, room_for
from demo.orphans import bury
from demo.prompts import STORY
from demo.server import Server, ServerError, connector_config
from faults.private import small_disk
from faults.processes import (
    Progress,
    Roles,
    arena_of,
    children_of,
    descriptors,
    is_alive,
    largest_anonymous,
    mapped_arenas,
    roles_of,
    stopped_in_the_middle,
)
from faults.prompts import CHUNK_TOKENS, GREETING, OTHER_SAGA, SAGA, References, Timed, timed_completion
from faults.watch import Watch
from saltern.core.snapshot import ArenaStats, Snapshot

ARENA = room_for(360)
DISK = "16 GiB"  # the default
ENGINE_ID = "faults"
SETTLE_SECONDS_MAX = 60.0
ATTEMPTS_MAX = 8
REFUSED_SECONDS_MAX = 30.0
POLL_SECONDS = 0.02


class NotReachedError(Exception):
    """A fault could not be brought about, or not at the moment that it is about."""


class FaultyServer(Server):
    """A server that can be started otherwise than it should be. `prefix` is a command that starts the server's.

    Its disk tier is in `disk_folder`, and all else in `folder`, which may be full.
    """

    def __init__(self, folder: Path, disk_folder: Path) -> None:
        super().__init__(folder, arena=ARENA, disk=DISK)
        self._settings["disk"]["path"] = str(disk_folder)
        self.folder = folder
        self.prefix: Sequence[str] = ()

    @property
    def command(self) -> list[str]:
        """What is run to start the server."""
        return [*self.prefix, *super().command]

    @property
    def arena(self) -> str:
        """The arena's size, from the next start on."""
        return self._settings["arena"]["size"]

    @arena.setter
    def arena(self, size: str) -> None:
        self._settings["arena"]["size"] = size

    @property
    def is_running(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.poll() is None

    def restart(self) -> None:
        """Stop it, if it runs, and start it."""
        self.stop()
        self.start()

    def refusal(self) -> str:
        """Start one more with the present settings, which must refuse to; return what it says."""
        refused = subprocess.run(
            self.command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=REFUSED_SECONDS_MAX
        )
        if refused.returncode != 1:
            raise ServerError(f"a server that can't listen ended with status {refused.returncode}")
        return refused.stderr.decode(errors="replace").strip()


class Stage:
    """What all faults of a run share."""

    def __init__(self, folder: Path, model: Path, *, has_own_mounts: bool, logs: Path | None) -> None:
        self._folder = folder
        self._logs = logs
        self._model = model
        self._numbers = count(1)
        self._has_own_mounts = has_own_mounts
        self._descriptors_before: dict[int, int] = {}
        self._disk = small_disk(folder / "small")
        self.has_small_disk = self._disk.__enter__()
        self.server = FaultyServer(folder / "small", folder / "disk")
        self.engine = self.new_engine()
        self.second: Engine | None = None

    def new_engine(self) -> Engine:
        """Return an engine, not started, with the connector and vLLM's own cache off."""
        return Engine(
            self._model,
            log_path=self._folder / "vllm.log",
            kv_transfer_config={**connector_config(self.server.socket_path), "engine_id": ENGINE_ID},
            prefix_caching=False,
            extra_args=("--max-num-batched-tokens", str(CHUNK_TOKENS)),
        )

    def measure_references(self) -> References:
        """Start an engine without a connector for as long as it takes to see what all prompts come to."""
        with Engine(
            self._model,
            log_path=self._folder / "reference.log",
            prefix_caching=False,
            extra_args=("--max-num-batched-tokens", str(CHUNK_TOKENS)),
        ) as engine:
            return References(engine)

    def close(self) -> None:
        """End every process and remove every trace of the run."""
        for engine in (self.second, self.engine):
            if engine is not None:
                engine.kill()
        self.server.kill()
        if self._logs is not None:
            for log in self._folder.rglob("*.log"):
                shutil.copy(log, self._logs)
        self._disk.__exit__(None, None, None)

    # Good order

    def settle(self) -> None:
        """Bring server and engine into good order: running as usual, with an open session and nothing under way."""
        if not self.server.is_running or self.server.arena != ARENA or self.server.prefix:
            self.server.kill()
            self.server.arena, self.server.prefix = ARENA, ()
            self.server.start()
        if not self.is_engine_well:
            self.restart_engine()
        self.attach()
        self._descriptors_before = self._descriptors()

    def restart_engine(self) -> None:
        """End what is left of the engine and start it again."""
        self.engine.kill()
        self.engine.start()

    @property
    def is_engine_well(self) -> bool:
        """Whether the engine runs and says that it is healthy."""
        with suppress(AssertionError, EngineError, RequestError, OSError, ValueError):
            self.engine.get("/health")
            return all(is_alive(pid) for pid in self.roles)
        return False

    @property
    def roles(self) -> Roles:
        """The engine's processes."""
        return roles_of(self.engine.pid)

    def attach(self) -> None:
        """Wait until the engine has a session, and keep it going meanwhile: an idle one does nothing."""
        deadline = time.monotonic() + SETTLE_SECONDS_MAX
        while not any(session.state == "open" for session in self.server.stats().sessions):
            if time.monotonic() > deadline:
                raise ServerError("the engine did not come to the server")
            timed_completion(self.engine, GREETING)

    def check(self, watch: Watch) -> None:
        """Note in what way things are not in good order after a fault."""
        watch.expect(self.is_engine_well, f"the engine is not well.\n{self.engine.log_tail()}")
        watch.left += self.leftovers(sessions=1)
        if self.is_engine_well and not watch.left:
            watch.left += [
                f"process {pid} had {before} file descriptors and has {now}"
                for pid, now in self._descriptors().items()
                if now > (before := self._descriptors_before.get(pid, now))
            ]

    def leftovers(self, *, sessions: int) -> list[str]:
        """Return what is there without belonging to `sessions` idle sessions, when it has had time to go."""
        deadline = time.monotonic() + SETTLE_SECONDS_MAX
        while (left := self._leftovers(sessions)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return left

    def _leftovers(self, sessions: int) -> list[str]:
        left = held_by(self.server.stats(), sessions=sessions)
        bury()
        engines = [engine for engine in (self.engine, self.second) if engine is not None and engine.is_started]
        known = {self.server.pid, *(engine.pid for engine in engines)}
        left += [f"process {pid}" for pid in children_of(os.getpid()) if pid not in known]
        if self._has_own_mounts and not engines:  # of a /dev/shm that others use as well nobody knows whose is what
            left += map(str, Path("/dev/shm").iterdir())
        if sessions and self.is_engine_well:
            arenas = mapped_arenas(self.roles.worker)
            left += [f"{len(arenas)} arenas mapped by the worker"] if len(arenas) != 1 else []
        return left

    def _descriptors(self) -> dict[int, int]:
        """Return what the processes that speak with each other have open; clients come and go at the API server."""
        return {pid: descriptors(pid) for pid in (self.server.pid, *self.roles[1:])}

    # Steps of several faults

    def fresh_arena(self) -> None:
        """Restart the server: in an arena of zeros whatever is written is seen at once."""
        self.server.restart()
        self.attach()

    def start_second(self) -> Engine:
        """Start an engine just like the first, beside it."""
        self.second = self.new_engine()
        self.second.start()
        return self.second

    def replace_engine(self) -> None:
        """Stop the engine, whose place the second one takes."""
        assert self.second is not None, "there is nobody to take its place"
        self.engine.stop()
        self.engine, self.second = self.second, None

    def expect_soon(self, condition: Callable[[], bool], otherwise: str) -> None:
        """Wait until the fault is there. Raises `NotReachedError` when it does not come."""
        deadline = time.monotonic() + SETTLE_SECONDS_MAX
        while not condition():
            if time.monotonic() > deadline:
                raise NotReachedError(otherwise)
            time.sleep(POLL_SECONDS)

    # Requests

    def salt(self) -> str:
        """Return the salt of a user who has nothing yet."""
        return f"user-{next(self._numbers)}"

    def ask(self, watch: Watch, prompt: str = STORY, *, salt: str, engine: Engine | None = None) -> Completion:
        """Send a request and judge its answer."""
        timed = timed_completion(engine or self.engine, prompt, salt=salt)
        watch.judge(prompt, timed)
        return timed.completion

    def store(self, watch: Watch, prompt: str = STORY, *, salt: str | None = None) -> str:
        """Have a prompt stored for a user who has none of it; return the user's salt."""
        salt = salt or self.salt()
        before = self.server.user(self.server.stats(), salt).blocks
        tokens = self.ask(watch, prompt, salt=salt).prompt_tokens
        self.server.wait_for_blocks(salt, before + tokens // BLOCK_TOKENS)
        self.server.wait_for("the disk to have it too", lambda snapshot: not held_by_disk(snapshot))
        return salt

    def hit(self, watch: Watch, salt: str, prompt: str = STORY) -> None:
        """Send a request that must be a hit."""
        watch.expect(self.ask(watch, prompt, salt=salt).cached_tokens > 0, "what was stored was not found")

    def await_hit(self, watch: Watch, salt: str | None = None, prompt: str = STORY) -> None:
        """See caching come back."""
        salt = salt or self.salt()
        watch.await_hit(lambda: self.ask(watch, prompt, salt=salt))

    # The middle of a copy

    @contextmanager
    def mid_store(self) -> Iterator[UnderWay]:
        """Stop the worker in the middle of storing a prompt; yield the request, which is at its second chunk."""
        for _ in range(ATTEMPTS_MAX):
            arena = arena_of(self.server.pid)
            progress = Progress(arena, 0, os.stat(arena).st_size)
            with self._in_the_middle(progress, SAGA, self.salt(), self._stored_at_once) as request:
                if request is not None:
                    yield request
                    return
        raise NotReachedError(f"{ATTEMPTS_MAX} stores were over before they could be stopped")

    @contextmanager
    def mid_load(self, salt: str) -> Iterator[UnderWay]:
        """Stop the worker in the middle of loading a prompt; yield the request.

        The user `salt` has stored both sagas, the other one last. The engine gives its requests the same blocks again
        and again, so each load finds the other's bytes there, and is seen by the bytes that change.
        """
        worker = self.roles.worker
        kv = largest_anonymous(worker)
        for attempt in range(ATTEMPTS_MAX):
            progress = Progress(Path(f"/proc/{worker}/mem"), kv.start, kv.size)
            prompt = (SAGA, OTHER_SAGA)[attempt % 2]
            with self._in_the_middle(progress, prompt, salt, lambda arena: arena.pinned_blocks) as request:
                if request is not None:
                    yield request
                    return
        raise NotReachedError(f"{ATTEMPTS_MAX} loads were over before they could be stopped")

    def _stored_at_once(self, arena: ArenaStats) -> int:
        """Return how many blocks a copy has: those of one chunk, while the next one's may be reserved already."""
        return min(arena.writing_blocks, CHUNK_TOKENS // BLOCK_TOKENS)

    @contextmanager
    def _in_the_middle(
        self, progress: Progress, prompt: str, salt: str, blocks_of: Callable[[ArenaStats], int]
    ) -> Iterator[UnderWay | None]:
        """Send a request and stop the worker in the middle of its copy; yield None if it was over too soon."""
        with ThreadPoolExecutor(1) as pool, closing(progress):
            future = pool.submit(timed_completion, self.engine, prompt, salt=salt)

            def whole_bytes() -> int:
                snapshot = self.server.stats()
                return blocks_of(snapshot.arena) * snapshot.sessions[0].block_bytes

            request = UnderWay(prompt, salt, future)
            with stopped_in_the_middle(self.roles.worker, progress, whole_bytes, future.done) as is_reached:
                began = time.monotonic()
                yield request if is_reached else None
                request.stopped_seconds = time.monotonic() - began


class UnderWay:
    """A request that was under way when the worker was stopped."""

    def __init__(self, prompt: str, salt: str, future: Future[Timed]) -> None:
        self.salt = salt
        self._prompt = prompt
        self._future = future
        self.stopped_seconds = 0.0

    def judge(self, watch: Watch) -> None:
        """Wait for its answer and judge it; the worker must go on again."""
        watch.judge(self._prompt, self._future.result(), stopped_seconds=self.stopped_seconds)


def held_by_disk(snapshot: Snapshot) -> list[str]:
    """Return what a server's disk tier has under way."""
    assert snapshot.disk is not None, "the servers here have one"
    under_way = {"written": snapshot.disk.writing_blocks, "read": snapshot.disk.reading_blocks}
    return [f"{blocks} blocks being {what} on the disk" for what, blocks in under_way.items() if blocks]


def held_by(snapshot: Snapshot, *, sessions: int) -> list[str]:
    """Return what a server holds beyond committed blocks and `sessions` open sessions."""
    found = held_by_disk(snapshot)
    if snapshot.arena.pinned_blocks:
        found.append(f"{snapshot.arena.pinned_blocks} blocks pinned")
    if snapshot.arena.writing_blocks:
        found.append(f"{snapshot.arena.writing_blocks} blocks being written")
    leases = sum(session.read_leases + session.write_leases for session in snapshot.sessions)
    if leases:
        found.append(f"{leases} leases")
    states = [session.state for session in snapshot.sessions]
    if states != ["open"] * sessions:
        found.append(f"sessions that are {', '.join(states) or 'none'}, where {sessions} should be open")
    return found
