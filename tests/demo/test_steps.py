"""The demo's judgement: each step fails where what it shows isn't so. The engine and server here only pretend."""

from __future__ import annotations

from pathlib import Path
from threading import Lock

import pytest
from msgspec.structs import replace

from demo.engine import Completion, Engine, EngineError
from demo.model import KV_BYTES_PER_TOKEN
from demo.server import Server
from demo.steps import STEPS, Scene, Step, take_step
from saltern.core.snapshot import ArenaStats, Counts, SessionStats, Snapshot, TenantStats, UserStats

BLOCK_TOKENS = 128
BLOCK_BYTES = BLOCK_TOKENS * KV_BYTES_PER_TOKEN
LIMIT_BLOCKS = 7  # a word is a token here: alice's prompt has 6 blocks, and carol's three have 9


class PretendedServer(Server):
    """A server that counts what the engine below tells it."""

    def __init__(self, folder: Path, faults: frozenset[str]) -> None:
        super().__init__(folder, arena="1 GiB")
        self._secret_path.write_bytes(bytes(32))
        self.blocks_by_salt: dict[str, list[str]] = {}
        self.counts = Counts()
        self.faults = faults
        self.is_alive = True
        self._lock = Lock()  # the demo looks on from a thread of its own

    def start(self) -> None:
        self.is_alive, self.blocks_by_salt, self.counts = True, {}, Counts()

    def kill(self) -> None:
        self.is_alive = False

    def stats(self) -> Snapshot:
        with self._lock:
            users = tuple(
                UserStats(user=self.user_id(salt).hex(), blocks=len(blocks), used_bytes=len(blocks) * BLOCK_BYTES)
                for salt, blocks in self.blocks_by_salt.items()
            )
        return Snapshot(
            arena=ArenaStats(0, 0, page_bytes=BLOCK_BYTES, blocks=0, pinned_blocks=0, writing_blocks=0),
            tenants=(TenantStats("default", 0, 0, None, LIMIT_BLOCKS * BLOCK_BYTES, self.counts, users, len(users)),),
            sessions=(SessionStats("engine", "open", 1, BLOCK_BYTES, 0, 0),),
        )

    def serve(self, prompt: str, salt: str, blocks: int) -> int:
        """Return how many of a prompt's blocks are there, and store the others."""
        with self._lock:
            owner = "alice" if f"shared with {salt or 'nobody'}" in self.faults else salt
            hits = self.blocks_by_salt.get(owner, []).count(prompt)
            kept = self.blocks_by_salt.setdefault(salt, [])
            kept += [prompt] * (blocks - kept.count(prompt))
            evicted = 0 if "no limit" in self.faults else max(0, len(kept) - LIMIT_BLOCKS)
            victim = self.blocks_by_salt["alice"] if "evicts alice" in self.faults else kept
            del victim[:evicted]
            self.counts = replace(
                self.counts,
                acquires=self.counts.acquires + 1,
                hit_blocks=self.counts.hit_blocks + hits,
                missed_blocks=self.counts.missed_blocks + blocks - hits,
                evicted=self.counts.evicted + evicted,
            )
        return hits


class PretendedEngine(Engine):
    """An engine that "computes" and asks the server above, until it is faulty."""

    def __init__(self, server: PretendedServer) -> None:
        super().__init__(Path("model"), log_path=Path("log"))
        self._server = server

    def start(self, seconds_max: float = 0.0) -> None:
        if "engine broken" in self._server.faults:
            raise EngineError("it did not start")
        if "nothing outlives" in self._server.faults:
            self._server.blocks_by_salt.clear()

    def stop(self, seconds_max: float = 0.0) -> None:
        pass

    def complete(self, prompt: object, *, salt: str | None = None, **_fields: object) -> Completion:
        assert isinstance(prompt, str)
        tokens = len(prompt.split())
        is_cached = self._server.is_alive or "served by the dead" in self._server.faults
        hits = self._server.serve(prompt, salt or "", tokens // BLOCK_TOKENS) if is_cached else 0
        if "never hits" in self._server.faults:
            hits = 0
        is_wrong = hits and "wrong bytes" in self._server.faults
        return Completion(
            text="out",
            token_ids=(1, 2, 4 if is_wrong else 3),
            prompt_tokens=tokens,
            cached_tokens=hits * BLOCK_TOKENS,
            ttft_ms=1.0,
        )


def failed(folder: Path, *faults: str) -> set[str]:
    """Take all steps with some faults and return which failed."""
    server = PretendedServer(folder, frozenset(faults))
    scene = Scene(server, PretendedEngine(server))
    steps: list[Step] = [take_step(scene, name) for name in STEPS]
    assert all(step.ok or step.problems for step in steps)
    return {step.name for step in steps if not step.ok}


def test_a_cache_that_keeps_its_promises_passes(tmp_path: Path) -> None:
    assert failed(tmp_path) == set()


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("shared with bob", {"bob-isolated"}),
        ("shared with nobody", {"unsalted-isolated"}),
        ("never hits", {"alice-hit", "engine-restarted", "user-limit", "server-back"}),
        ("wrong bytes", {"alice-hit", "engine-restarted", "user-limit", "server-killed", "server-back"}),
        ("nothing outlives", {"engine-restarted"}),
        ("engine broken", {"engine-restarted"}),
        ("no limit", {"user-limit"}),
        ("evicts alice", {"user-limit"}),
        ("served by the dead", {"server-killed"}),
    ],
)
def test_a_broken_promise_fails_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, expected: set[str]
) -> None:
    monkeypatch.setattr("demo.server.SETTLE_SECONDS_MAX", 2.0)  # what does not come at once here never does
    assert failed(tmp_path, fault) == expected
