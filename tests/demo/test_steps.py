"""The demo's judgement: each step fails where what it shows isn't so. The engine and server here only pretend."""

from __future__ import annotations

from pathlib import Path
from threading import Lock

import pytest
from msgspec.structs import replace

from demo.engine import Completion, Engine, EngineError, RequestError
from demo.front import Front, User
from demo.model import BLOCK_TOKENS, KV_BYTES_PER_TOKEN
from demo.prompts import SYSTEM_PROMPT
from demo.server import Server, ServerError
from demo.steps import STEPS, Scene, Step, take_step
from saltern.audit import Detail, Line
from saltern.core.snapshot import (
    ArenaStats,
    Counts,
    PublicationStats,
    SessionStats,
    Snapshot,
    TenantStats,
    UserStats,
)
from saltern.epochs import begin_anew, make_epochs
from saltern.secret import make_signing_secrets, read_signing_secrets
from saltern.signing import user_tag, verify

BLOCK_BYTES = BLOCK_TOKENS * KV_BYTES_PER_TOKEN
LIMIT_BLOCKS = 7  # a word is a token here: alice's prompt has 6 blocks, and carol's three have 9
TENANT_BLOCKS = 36  # of tenants other than the first; the flood's 14 prompts have 84
BEHIND_KEYS = {"flood-unharmed", "public-prefix", "forged-salt-refused", "server-restarted", "erased"}
GUARANTEE_BYTES = 1 << 20
ARENA_BYTES = 50 * BLOCK_BYTES
PUBLISHED_BLOCKS = len(SYSTEM_PROMPT.split()) // BLOCK_TOKENS


class PretendedServer(Server):
    """A server that counts what the engine below tells it."""

    def __init__(self, folder: Path, faults: frozenset[str]) -> None:
        super().__init__(folder, arena="1 GiB")
        self._secret_path.write_bytes(bytes(32))
        self.signing_path.parent.mkdir()
        make_signing_secrets(self.signing_path)
        make_epochs(self.epochs_path)
        self.blocks_by_salt: dict[str, list[str]] = {}
        self.disk_by_salt: dict[str, list[str]] = {}
        self.erased_salts: set[str] = set()
        self.guaranteed: set[str] = set()
        self.counts_by_tenant = {"default": Counts()}
        self.published: str | None = None
        self.faults = faults
        self.is_alive = True
        self._lock = Lock()  # the demo looks on from a thread of its own

    def start(self) -> None:
        self.is_alive, self.blocks_by_salt = True, {}
        self.counts_by_tenant = dict.fromkeys(("default", *self.guaranteed), Counts())
        if "disk forgets" in self.faults:
            self.disk_by_salt = {}
        if "tenants forgotten" in self.faults:
            self.guaranteed = set()

    def stop(self) -> None:
        self.is_alive = False

    def kill(self) -> None:
        self.is_alive = False

    def set_tenant(self, name: str, *settings: str) -> None:
        self.guaranteed.add(name)

    def erase(self, salt: str) -> None:
        """Forget a user, and store nothing for it any more."""
        if "erases nothing" in self.faults:
            return
        self.erased_salts.add(salt)
        others = [other for other in self.blocks_by_salt if self.tenant_of(other) == self.tenant_of(salt)]
        for erased in others if "erases neighbours" in self.faults else [salt]:
            self.blocks_by_salt.pop(erased, None)
            self.disk_by_salt.pop(erased, None)

    def tenant_of(self, salt: str) -> str:
        """Return who is charged for what is stored under a salt."""
        signed = verify(salt, read_signing_secrets(self.signing_path))
        return "default" if signed is None else signed.tenant

    def stats(self) -> Snapshot:
        with self._lock:
            arena = ArenaStats(ARENA_BYTES, 0, page_bytes=BLOCK_BYTES, blocks=0, pinned_blocks=0, writing_blocks=0)
            return Snapshot(
                arena=arena,
                tenants=tuple(map(self._tenant_stats, self.counts_by_tenant)),
                sessions=(SessionStats("engine", "open", 1, BLOCK_BYTES, 0, 0),),
            )

    def _tenant_stats(self, tenant: str) -> TenantStats:
        users = tuple(
            UserStats(user=self.user_id(salt).hex(), blocks=len(blocks), used_bytes=len(blocks) * BLOCK_BYTES)
            for salt, blocks in self.blocks_by_salt.items()
            if self.tenant_of(salt) == tenant
        )
        used_bytes = sum(user.used_bytes for user in users)
        counts = self.counts_by_tenant[tenant]
        guarantee_bytes = GUARANTEE_BYTES if tenant in self.guaranteed else 0
        limit_bytes = LIMIT_BLOCKS * BLOCK_BYTES
        return TenantStats(tenant, 0, used_bytes, None, limit_bytes, counts, users, len(users), guarantee_bytes)

    def serve(self, prompt: str, salt: str, blocks: int) -> int:
        """Return how many of a prompt's blocks are there, and store the others."""
        with self._lock:
            tenant = self.tenant_of(salt)
            owner = "alice" if f"shared with {salt or 'nobody'}" in self.faults else salt
            hits = self.blocks_by_salt.get(owner, []).count(prompt)
            loaded = max(0, self.disk_by_salt.get(owner, []).count(prompt) - hits)
            hits += loaded
            if salt in self.erased_salts and "resurrects" not in self.faults:
                return 0
            kept = self.blocks_by_salt.setdefault(salt, [])
            public = PUBLISHED_BLOCKS if self.published is not None and prompt.startswith(self.published) else 0
            hits = max(hits, public)
            kept += [prompt] * (blocks - public - kept.count(prompt))
            on_disk = self.disk_by_salt.setdefault(salt, [])
            on_disk += [prompt] * (blocks - public - on_disk.count(prompt))
            blocks_max = LIMIT_BLOCKS if tenant == "default" else TENANT_BLOCKS
            evicted = 0 if "no limit" in self.faults else max(0, len(kept) - blocks_max)
            del self._victim(salt)[:evicted]
            counts = self.counts_by_tenant.get(tenant, Counts())
            self.counts_by_tenant[tenant] = replace(
                counts,
                acquires=counts.acquires + 1,
                hit_blocks=counts.hit_blocks + hits,
                public_blocks=counts.public_blocks + public,
                missed_blocks=counts.missed_blocks + blocks - hits,
                evicted=counts.evicted + evicted,
                disk_loaded=counts.disk_loaded + loaded,
            )
        return hits

    def _victim(self, salt: str) -> list[str]:
        """Return whose blocks have to go for those stored under a salt."""
        others = [other for other in self.blocks_by_salt if self.tenant_of(other) == "acme"]
        if "evicts alice" in self.faults and self.tenant_of(salt) == "default":
            return self.blocks_by_salt["alice"]
        if "floods others" in self.faults and self.tenant_of(salt) == "umbrella" and others:
            return self.blocks_by_salt[others[0]]
        return self.blocks_by_salt[salt]


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
            self._server.disk_by_salt.clear()

    def stop(self, seconds_max: float = 0.0) -> None:
        pass

    def complete(
        self, prompt: object, *, salt: str | None = None, key: str | None = None, **_fields: object
    ) -> Completion:
        assert isinstance(prompt, str)
        return self._compute(prompt, self._salt(key, sent=salt))

    def chat(self, system_prompt: str, message: str, *, key: str | None = None, **_fields: object) -> Completion:
        return self._compute(f"{system_prompt} {message}", self._salt(key, sent=None))

    def _salt(self, key: str | None, *, sent: str | None) -> str | None:
        return sent

    def _compute(self, prompt: str, salt: str | None) -> Completion:
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


class PretendedFront(Front):
    """A front that knows everybody by a key, which says who that is, unless it is faulty."""

    def __init__(self, server: PretendedServer, folder: Path) -> None:
        super().__init__(Path("model"), server, folder, patience_ms=0)
        self.late_salts: dict[User, str] = {}  # of who was erased: the middleware has not looked yet
        self._pretended = server
        self.engine = EngineBehindKeys(server, self)

    def start(self) -> None:
        pass

    def key(self, user: User) -> str:
        return f"{user.tenant}/{user.name}"

    def publish(self, system_prompt: str) -> PublicationStats:
        blocks = len(system_prompt.split()) // BLOCK_TOKENS
        self._pretended.published = None if "publishes nothing" in self._pretended.faults else system_prompt
        return PublicationStats("", "", "", blocks, blocks, blocks * BLOCK_BYTES, None)

    def erase(self, user: User) -> Line:
        salt = self.salt(user)
        self._pretended.erase(salt)
        if "stays erased" not in self._pretended.faults:
            begin_anew(self._pretended.epochs_path, user.tenant, user_tag(user.tenant, user.name))
        self.late_salts[user] = salt
        erased_bytes = 0 if "erases nothing" in self._pretended.faults else BLOCK_BYTES
        details: dict[str, Detail] = {"ram_bytes": erased_bytes, "disk_bytes": erased_bytes, "keys_destroyed": 1}
        return Line(1, "2026-01-01T00:00:00.000+00:00", "erase", "uid 0", details, "", "00", "00")

    def verify(self, receipt: Line) -> str:
        if "receipt cut off" in self._pretended.faults:
            raise ServerError("the log has no such line")
        return "it holds"


class EngineBehindKeys(PretendedEngine):
    """An engine that makes the salt of the key, as the middleware does."""

    def __init__(self, server: PretendedServer, front: PretendedFront) -> None:
        super().__init__(server)
        self._front = front

    def _salt(self, key: str | None, *, sent: str | None) -> str | None:
        tenant, _, name = (key or "").partition("/")
        if not name:
            if "lets everybody in" in self._server.faults:
                return sent
            raise RequestError(401, "an API key is needed")
        is_sent_believed = sent is not None and "believes salts" in self._server.faults
        user = User(tenant, name)
        return sent if is_sent_believed else self._front.late_salts.pop(user, None) or self._front.salt(user)


def failed(folder: Path, *faults: str) -> set[str]:
    """Take all steps with some faults and return which failed."""
    server = PretendedServer(folder, frozenset(faults))
    scene = Scene(server, PretendedEngine(server), PretendedFront(server, folder))
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
        ("never hits", {"alice-hit", "engine-restarted", "user-limit", "server-back", *BEHIND_KEYS}),
        ("wrong bytes", {"alice-hit", "engine-restarted", "user-limit", "server-killed", "server-back", *BEHIND_KEYS}),
        ("disk forgets", {"server-back", "server-restarted"}),
        ("tenants forgotten", {"server-restarted"}),
        ("erases nothing", {"erased"}),
        ("erases neighbours", {"erased"}),
        ("resurrects", {"erased"}),
        ("stays erased", {"erased"}),
        ("receipt cut off", {"erased"}),
        ("nothing outlives", {"engine-restarted"}),
        ("engine broken", {"engine-restarted"}),
        ("no limit", {"user-limit", "flood-unharmed"}),
        ("evicts alice", {"user-limit"}),
        ("served by the dead", {"server-killed"}),
        ("floods others", {"flood-unharmed"}),
        ("publishes nothing", {"public-prefix"}),
        ("believes salts", {"forged-salt-refused"}),
        ("lets everybody in", {"forged-salt-refused"}),
    ],
)
def test_a_broken_promise_fails_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, expected: set[str]
) -> None:
    for seconds_max in ("demo.server.SETTLE_SECONDS_MAX", "demo.steps.SETTLE_SECONDS_MAX"):
        monkeypatch.setattr(seconds_max, 2.0)  # what does not come at once here never does
    assert failed(tmp_path, fault) == expected
