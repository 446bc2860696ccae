"""What holds for the admin socket: changes are checked, durable and at once, and nobody at it holds up the cache."""

import errno
import json
import os
import resource
import socket
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from saltern.audit import AuditLog, read_public_key, verify_log
from saltern.client.admin import operate
from saltern.client.sockets import ConnectionLost
from saltern.core.cache import Cache
from saltern.core.effects import Effect, Event, SecretsRotated, Tick
from saltern.core.keys import KEY_BYTES, Key, UserId
from saltern.core.messages import (
    PUBLIC_TENANT,
    Acquire,
    Acquired,
    Commit,
    LookedUp,
    Lookup,
    PublicationId,
    Refused,
    Release,
    Reserve,
    Reserved,
    SigningSecrets,
)
from saltern.core.snapshot import PublicationStats, TenantStats
from saltern.operations import (
    Answer,
    Failed,
    GetTenant,
    ListPlans,
    ListTenants,
    OpenPublication,
    Operation,
    PlanSettings,
    PlansListed,
    PublicationOpened,
    RemovePlan,
    RemovePublication,
    RemoveTenant,
    RotateSigning,
    SetPlan,
    SetTenant,
    SigningRotated,
    TenantSettings,
    TenantShown,
    TenantsListed,
)
from saltern.secret import make_signing_secrets, read_signing_secrets
from saltern.server.admin import CONNECTIONS_MAX, AdminServer
from saltern.server.arena import Arena
from saltern.server.erasure import Erasure, Secrets
from saltern.server.listener import Listener, Peer
from saltern.server.loop import Loop, LoopEndedError
from saltern.server.offline import operate_offline
from saltern.server.operations import Holding, Operations
from saltern.server.store import Store
from saltern.server.tenancy import Layers
from saltern.wire import admin_client_wire, encode
from tests.server.test_loop import ALICE
from tests.support import PATIENCE_SECONDS, Engine, Server, engine_at, serving, until

MIB = 1024**2
PAGE = 65_536


def ask(server: Server, operation: Operation) -> Answer:
    return operate(str(server.admin_path), operation, PATIENCE_SECONDS)


def set_tenant(server: Server, name: str, **settings: Any) -> None:
    answer = ask(server, SetTenant(name, TenantSettings(**settings)))
    assert isinstance(answer, TenantShown), answer


def refused(server: Server, operation: Operation) -> str:
    answer = ask(server, operation)
    assert isinstance(answer, Failed), answer
    return answer.reason


def shown(server: Server, name: str) -> dict[str, tuple[object, str]]:
    """Return a tenant's values with their origins."""
    answer = ask(server, GetTenant(name))
    assert isinstance(answer, TenantShown), answer
    fields = TenantSettings.__struct_fields__
    return {field: (getattr(answer.tenant, field).value, getattr(answer.tenant, field).origin) for field in fields}


def stats_of(server: Server, name: str) -> TenantStats:
    return next(tenant for tenant in server.stats().tenants if tenant.tenant == name)


def chain(text: str, count: int) -> tuple[Key, ...]:
    return tuple(Key(f"{text}{number}".encode().ljust(KEY_BYTES)) for number in range(count))


def store(engine: Engine, tenant: str, count: int) -> None:
    """Store a prompt of `count` blocks of a page each for a tenant's only user, some at a time, as engines do."""
    keys = chain(tenant, count)
    for upto in range(0, count + 1, 4):
        message = Reserve(
            request=1, user=ALICE, keys=keys[: upto or 1], start=0, acquired_at=engine_now(engine), tenant=tenant
        )
        reserved = engine.ask(message)
        assert isinstance(reserved, Reserved)
        assert reserved.refusal is None
        if reserved.lease:
            engine.control.send(Commit(lease=reserved.lease))


def engine_now(engine: Engine) -> float:
    """Return the server's time."""
    acquired = engine.ask(Acquire(request=0, user=ALICE, keys=chain("nobody's", 1), start=0))
    assert isinstance(acquired, Acquired)
    return acquired.acquired_at


def found(engine: Engine, tenant: str, count: int) -> int:
    answer = engine.ask(Lookup(request=3, user=ALICE, keys=chain(tenant, count), tenant=tenant))
    assert isinstance(answer, LookedUp)
    return answer.ready


# What is set holds


def test_what_is_set_holds_at_once_and_says_where_it_comes_from() -> None:
    plans = {"gold": {"guarantee": "1 MiB", "weight": 2}}
    with serving(tenants={"acme": {"plan": "gold", "limit": "8 MiB"}}, plans=plans) as server:
        assert shown(server, "acme") == {
            "guarantee": (MIB, "plan gold"),
            "limit": (8 * MIB, "file"),
            "user_limit": (None, ""),
            "disk_guarantee": (0, ""),
            "disk_limit": (None, ""),
            "disk_user_limit": (None, ""),
            "ttl": (None, ""),
            "weight": (2.0, "plan gold"),
            "plan": ("gold", "file"),
        }
        set_tenant(server, "acme", limit=None, ttl=60.0)
        set_tenant(server, "acme", user_limit=MIB)  # what was set before stays
        values = shown(server, "acme")
        assert values["limit"] == (None, "run time")
        assert values["ttl"] == (60.0, "run time")
        assert values["user_limit"] == (MIB, "run time")
        assert values["guarantee"] == (MIB, "plan gold")
        stats = stats_of(server, "acme")
        assert (stats.guarantee_bytes, stats.limit_bytes, stats.user_limit_bytes) == (MIB, None, MIB)
        assert (stats.ttl_seconds, stats.weight) == (60.0, 2.0)
        assert isinstance(ask(server, SetTenant("acme", TenantSettings(), inherit=("limit",))), TenantShown)
        assert shown(server, "acme")["limit"] == (8 * MIB, "file")


def test_a_plan_that_is_set_holds_for_all_who_have_it() -> None:
    with serving(tenants={"acme": {"plan": "gold"}}, plans={"gold": {"limit": "1 MiB"}}) as server:
        set_tenant(server, "beta", plan="gold")
        answer = ask(server, SetPlan("gold", PlanSettings(limit=2 * MIB, ttl=9.0)))
        assert isinstance(answer, PlansListed)
        (plan,) = answer.plans
        assert plan.tenants == ("acme", "beta")
        assert {name: (bound.value, bound.origin) for name, bound in plan.bounds.items()} == {
            "limit": (2 * MIB, "run time"),
            "ttl": (9.0, "run time"),
        }
        assert [stats_of(server, name).limit_bytes for name in ("acme", "beta")] == [2 * MIB, 2 * MIB]
        assert isinstance(ask(server, RemovePlan("gold")), PlansListed)
        assert [stats_of(server, name).limit_bytes for name in ("acme", "beta")] == [MIB, MIB]


def test_removing_gives_a_tenant_back_to_the_file() -> None:
    with serving(tenants={"acme": {"limit": "8 MiB"}}) as server:
        set_tenant(server, "acme", limit=4 * MIB)
        set_tenant(server, "beta", guarantee=MIB)
        for name in ("acme", "beta"):
            assert isinstance(ask(server, RemoveTenant(name)), TenantShown)
        assert stats_of(server, "acme").limit_bytes == 8 * MIB
        answer = ask(server, ListTenants())
        assert isinstance(answer, TenantsListed)
        assert [tenant.tenant for tenant in answer.tenants] == ["acme", "default"]
        assert answer.guaranteed_bytes == 0
        assert "of the settings' file alone" in refused(server, RemoveTenant("acme"))
        assert "of nobody" in refused(server, RemoveTenant("beta"))
        assert "no tenant beta has" in refused(server, GetTenant("beta"))


def test_what_can_not_hold_is_refused_and_changes_nothing() -> None:
    with serving(tenants={"acme": {"guarantee": "32 MiB"}}, plans={"gold": {"limit": "1 MiB"}}) as server:
        set_tenant(server, "beta", plan="gold")
        reason = refused(server, SetTenant("beta", TenantSettings(guarantee=30 * MIB, limit=None)))
        assert f"add up to {62 * MIB} bytes" in reason
        assert "(guaranteed: acme 32 MiB, beta 30 MiB)" in reason
        assert "above limit" in refused(server, SetTenant("beta", TenantSettings(guarantee=2 * MIB)))
        assert "above limit" in refused(server, SetPlan("gold", PlanSettings(guarantee=2 * MIB)))
        assert "nobody has defined the plan tin" in refused(server, SetTenant("beta", TenantSettings(plan="tin")))
        assert "less than one page" in refused(server, SetTenant("beta", TenantSettings(limit=7)))
        assert "no setting limits" in refused(server, SetTenant("beta", TenantSettings(), inherit=("limits",)))
        assert "no plan can be called none" in refused(server, SetPlan("none", PlanSettings()))
        assert "alone: change it there" in refused(server, RemovePlan("gold"))
        values = {name: value for name, (value, origin) in shown(server, "beta").items() if origin}
        assert values == {"plan": "gold", "limit": MIB}


def test_a_plan_that_tenants_have_is_not_removed_from_under_them() -> None:
    with serving() as server:
        assert isinstance(ask(server, SetPlan("gold", PlanSettings(limit=MIB))), PlansListed)
        set_tenant(server, "acme", plan="gold")
        assert "tenants.acme.plan: nobody has defined the plan gold" in refused(server, RemovePlan("gold"))
        assert isinstance(ask(server, RemoveTenant("acme")), TenantShown)
        assert ask(server, RemovePlan("gold")) == PlansListed(())
        assert ask(server, ListPlans()) == PlansListed(())


def test_a_lowered_limit_is_evicted_down_to_without_a_message_from_anybody() -> None:
    with serving() as server, engine_at(server.path) as engine:
        store(engine, "acme", 40)
        store(engine, "beta", 40)
        assert stats_of(server, "acme").used_bytes == 40 * PAGE
        set_tenant(server, "acme", limit=8 * PAGE)
        until(lambda: stats_of(server, "acme").used_bytes == 8 * PAGE, "the tenant is at its new limit")
        assert found(engine, "acme", 40) == 8
        assert found(engine, "beta", 40) == 40
        set_tenant(server, "acme", limit=0)
        until(lambda: found(engine, "acme", 1) == 0, "nothing is left")


def test_unused_blocks_expire_without_a_message_from_anybody() -> None:
    with serving(tenants={"acme": {"ttl": "0.2 s"}}) as server, engine_at(server.path) as engine:
        store(engine, "acme", 8)
        store(engine, "beta", 8)
        until(lambda: "acme" not in held(server), "the blocks of one tenant have expired")
        assert held(server)["beta"] == 8 * PAGE


def held(server: Server) -> dict[str, int]:
    return {tenant.tenant: tenant.used_bytes for tenant in server.stats().tenants if tenant.used_bytes}


def test_a_rotation_reaches_engines_and_the_file_and_keeps_the_secret_before() -> None:
    with serving() as server, engine_at(server.path) as engine:
        path = server.folder / "state/signing.keys"
        (first,) = read_signing_secrets(path)
        assert engine.welcome.signing_secrets == (first,)
        assert ask(server, RotateSigning()) == SigningRotated(str(path))
        pushed = engine.receive()
        assert isinstance(pushed, SigningSecrets)
        assert pushed.secrets == read_signing_secrets(path)
        assert pushed.secrets[1] == first
        assert ask(server, RotateSigning()) == SigningRotated(str(path))
        pushed_again = engine.receive()
        assert isinstance(pushed_again, SigningSecrets)
        assert pushed_again.secrets[1] == pushed.secrets[0]
        server.kill()
        server.start()
        with engine_at(server.path) as anew:
            assert anew.welcome.signing_secrets == pushed_again.secrets


def test_a_rotation_that_can_not_be_written_leaves_engines_with_the_secrets_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "signing.keys"
    present = make_signing_secrets(path)
    told, audit = Noted(), AuditLog(tmp_path)
    secrets = Secrets(bytes(32), path, tmp_path / "epochs.json", tmp_path / "deployment.key")
    operations = Operations(Layers({}, {}), Store(tmp_path / "saltern.db"), told, audit, secrets)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("saltern.server.operations.write_signing_secrets", full)
    answer = operations.answer(RotateSigning(), by="uid 7")
    assert answer == Failed(f"the signing secret can't be rotated: {path}: No space left on device")
    rotated, restored = told.told
    assert isinstance(rotated, SecretsRotated)
    assert rotated.secrets[1:] == present
    assert restored == SecretsRotated(present)
    assert read_signing_secrets(path) == present
    begun, ended = audited(tmp_path)
    assert (begun["what"], ended["what"]) == ("signing-rotated", "not-done")
    assert ended["details"]["line"] == 1
    path.chmod(0o644)
    answer = operations.answer(RotateSigning(), by="uid 7")
    assert isinstance(answer, Failed)
    assert f"others may read {path}" in answer.reason
    assert len(audited(tmp_path)) == 2


# And is written down


def audited(state: Path) -> list[dict[str, Any]]:
    """Return the lines of an audit log that is what was written."""
    log = AuditLog(state)
    verify_log(log.path, read_public_key(log.public_key_path))
    return [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]


def test_every_change_is_in_the_audit_log_when_it_is_answered() -> None:
    with serving() as server:
        set_tenant(server, "acme", limit=MIB, weight=2.0, ttl=None)
        ask(server, SetTenant("acme", TenantSettings(), inherit=("weight",)))
        ask(server, SetPlan("gold", PlanSettings(guarantee=MIB)))
        set_tenant(server, PUBLIC_TENANT, plan="gold")
        opened = ask(server, OpenPublication(root=bytes(32), content=bytes(32), blocks=3, label="système"))
        assert isinstance(opened, PublicationOpened)
        ask(server, RemovePublication(opened.publication))
        ask(server, RotateSigning())
        server.kill()
        lines = audited(server.folder / "state")
        assert {line["by"] for line in lines} == {f"uid {os.getuid()}"}
        publication = opened.publication.hex()
        assert [(line["what"], line["details"]) for line in lines] == [
            ("tenant-set", {"tenant": "acme", "limit": MIB, "weight": 2.0, "ttl": None}),
            ("tenant-set", {"tenant": "acme", "inherited": ["weight"]}),
            ("plan-set", {"plan": "gold", "guarantee": MIB}),
            ("tenant-set", {"tenant": PUBLIC_TENANT, "plan": "gold"}),
            ("publication-opened", {"publication": publication, "label": "système", "blocks": 3}),
            ("publication-removed", {"publication": publication}),
            ("signing-rotated", {"file": str(server.folder / "state/signing.keys")}),
        ]
        file = server.folder / "state/saltern.db"
        operate_offline(file, RemoveTenant("acme"))
        operate_offline(file, ListTenants())
        server.start()
        ask(server, ListPlans())
        refused(server, RemovePlan("silver"))
        refused(server, SetTenant("acme", TenantSettings(guarantee=2**50)))
        last = audited(server.folder / "state")[7:]
        assert [(line["what"], line["by"]) for line in last] == [("tenant-removed", f"uid {os.getuid()}, offline")]


def test_what_can_not_be_written_down_is_not_done() -> None:
    with serving() as server:
        set_tenant(server, "acme", limit=2 * MIB)
        log = server.folder / "state/audit.log"
        log.write_bytes(log.read_bytes().replace(b"acme", b"beta"))
        assert f"{log}: the last line was changed" in refused(server, SetTenant("acme", TenantSettings(limit=MIB)))
        assert stats_of(server, "acme").limit_bytes == 2 * MIB
        server.kill()
        server.start()
        assert f"nothing can be changed by commands: {log}: the last line was changed" in server.log
        assert stats_of(server, "acme").limit_bytes == 2 * MIB


@contextmanager
def no_room_on_disk(server: Server) -> Iterator[None]:
    """Have every write to a file fail, as on a full disk (Python ignores the signal that comes with it)."""
    before = resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, before)


def test_a_change_that_can_not_be_written_is_not_made() -> None:
    with serving() as server:
        set_tenant(server, "acme", limit=2 * MIB)
        with no_room_on_disk(server):
            assert "can't be written" in refused(server, SetTenant("acme", TenantSettings(limit=MIB)))
        assert len(audited(server.folder / "state")) == 1
        assert stats_of(server, "acme").limit_bytes == 2 * MIB
        set_tenant(server, "acme", limit=3 * MIB)
        server.kill()
        server.start()
        assert stats_of(server, "acme").limit_bytes == 3 * MIB


# And is there again


def test_what_was_answered_survives_a_kill() -> None:
    with serving() as server:
        for size in range(1, 6):
            set_tenant(server, "acme", guarantee=size * MIB, ttl=None)
            ask(server, SetPlan("gold", PlanSettings(weight=float(size))))
            server.kill()  # right after the answer
            server.start()
            values = shown(server, "acme")
            assert values["guarantee"] == (size * MIB, "run time")
            assert values["ttl"] == (None, "run time")
            answer = ask(server, ListPlans())
            assert isinstance(answer, PlansListed)
            assert answer.plans[0].bounds["weight"].value == size
            assert stats_of(server, "acme").guarantee_bytes == size * MIB


def test_a_smaller_arena_refuses_to_start_and_says_how_to_mend_it() -> None:
    with serving() as server:
        set_tenant(server, "acme", guarantee=40 * MIB)
        assert server.stop() == 0
        settings = (server.folder / "saltern.toml").read_text(encoding="utf-8")
        (server.folder / "saltern.toml").write_text(settings.replace('"64 MiB"', '"32 MiB"'), encoding="utf-8")
        file = server.folder / "state/saltern.db"
        with pytest.raises(AssertionError) as failed:
            server.start()
        said = str(failed.value)
        assert "saltern: what was set at run time does not fit these settings: the guarantees add up to" in said
        assert "(guaranteed: acme 40 MiB)" in said
        assert f"by `saltern tenants` or `saltern plans` with --offline {file}" in said
        assert "Traceback" not in said


def test_more_guarantees_in_the_file_than_room_are_refused_with_the_sum() -> None:
    tenants = {"acme": {"guarantee": "40 MiB"}, "beta": {"guarantee": "20 MiB"}}
    with serving(tenants=tenants, start=False) as server:
        with pytest.raises(AssertionError) as failed:
            server.start()
        assert f"saltern: the tenants of the settings: the guarantees add up to {60 * MIB} bytes" in str(failed.value)
        assert "(guaranteed: acme 40 MiB, beta 20 MiB)" in str(failed.value)


def test_a_plan_that_has_left_the_file_refuses_to_start() -> None:
    with serving(plans={"gold": {}}) as server:
        set_tenant(server, "acme", plan="gold")
        assert server.stop() == 0
        settings = (server.folder / "saltern.toml").read_text(encoding="utf-8")
        (server.folder / "saltern.toml").write_text(settings.replace("[plans.gold]", ""), encoding="utf-8")
        with pytest.raises(
            AssertionError, match=r"nobody has defined the plan gold; there is none: change the settings back"
        ):
            server.start()


@pytest.mark.parametrize(
    ("content", "complaint"), [(b"x" * 9000, "is damaged"), (b"SQLite format 3\0" * 600, "is damaged")]
)
def test_a_file_that_is_no_store_refuses_to_start(content: bytes, complaint: str) -> None:
    with serving() as server:
        assert server.stop() == 0
        (server.folder / "state/saltern.db").write_bytes(content)
        with pytest.raises(AssertionError, match=rf"saltern: .*saltern\.db {complaint}"):
            server.start()
        assert "Traceback" not in server.log


def test_two_servers_do_not_share_their_settings() -> None:
    with serving() as first, serving(server={"state_folder": str(first.folder / "state")}, start=False) as second:
        with pytest.raises(AssertionError, match=r"another server uses .*saltern\.db: give this one"):
            second.start()
        assert isinstance(ask(first, ListTenants()), TenantsListed)


# Who may ask


def test_the_socket_and_the_state_are_for_their_owner_alone() -> None:
    with serving(server={"socket_mode": 0o666}) as server:
        assert stat.S_IMODE(server.admin_path.stat().st_mode) == 0o600
        assert stat.S_IMODE((server.folder / "state").stat().st_mode) == 0o700
        names = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (server.folder / "state").iterdir()}
        made = {
            "saltern.db",
            "saltern.db-wal",
            "naming.key",
            "signing.keys",
            "epochs.json",
            "receipt.key",
            "receipt.pub",
        }
        assert names == dict.fromkeys(made, 0o600)
        assert server.stop() == 0
        assert not server.admin_path.exists()


@pytest.mark.parametrize(("uid", "may"), [(0, True), (os.getuid(), True), (os.getuid() + 1, False)])
def test_only_the_servers_own_user_and_root_are_served(uid: int, may: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    accept = Listener.accept

    def of_uid(listener: Listener) -> tuple[socket.socket, Peer] | None:
        accepted = accept(listener)
        return (accepted[0], Peer(pid=accepted[1].pid, uid=uid)) if accepted else None

    monkeypatch.setattr(Listener, "accept", of_uid)
    with in_process() as (path, _):
        if may:
            assert isinstance(operate(path, ListTenants(), PATIENCE_SECONDS), TenantsListed)
        else:
            with pytest.raises(
                ConnectionLost, match=f"uid {uid} may not change this server, only {os.getuid()} and root"
            ):
                operate(path, ListTenants(), PATIENCE_SECONDS)


# Who is in nobody's way


class Slow(Store):
    """A store on a disk that takes its time."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.begun, self.may_end = threading.Event(), threading.Event()

    def write(self, tenants: Mapping[str, TenantSettings], plans: Mapping[str, PlanSettings]) -> None:
        self.begun.set()
        assert self.may_end.wait(PATIENCE_SECONDS), "the disk never came back"
        super().write(tenants, plans)


class Noted:
    """In place of a running server: writes down what it is told."""

    arena_bytes = 64 * MIB
    disk_bytes = 0

    def __init__(self, loop: Loop | None = None) -> None:
        self.told: list[Event] = []
        self._loop = loop

    def why_not(self, layers: Layers) -> str | None:
        return None

    def tell(self, events: Sequence[Event]) -> None:
        self.told += events
        if self._loop is not None:
            self._loop.call(lambda: None)

    def holdings(self) -> Mapping[str, Holding]:
        return {}

    def publications(self) -> tuple[PublicationStats, ...]:
        return ()

    def forget_publication(self, publication: PublicationId) -> bool:
        return False

    def users(self, tenant: str) -> tuple[UserId, ...]:
        return ()

    def is_erased_for_good(self, tenant: str, user: UserId) -> bool:
        return False

    def erase(self, tenant: str, user: UserId | None, *, for_good: bool) -> Erasure:
        return Erasure()

    def rotate_key(self) -> int:
        return 0

    def engines(self) -> tuple[str, ...]:
        return ()


@contextmanager
def in_process(loop: Loop | None = None) -> Iterator[tuple[str, Slow]]:
    """Serve an admin socket from this process, whose disk waits until it is let go on."""
    with tempfile.TemporaryDirectory(prefix="saltern-") as folder:
        store = Slow(Path(folder, "saltern.db"))
        operations = Operations(Layers({}, {}), store, Noted(loop), AuditLog(Path(folder)))
        server = AdminServer(Listener(Path(folder, "a")), operations)
        server.start()
        try:
            yield str(Path(folder, "a")), store
        finally:
            store.may_end.set()
            server.close()
            store.close()


def test_a_slow_disk_holds_up_no_lookup() -> None:
    with tempfile.TemporaryDirectory(prefix="saltern-") as folder:
        arena = Arena(total_bytes=16 * PAGE, huge_pages=False)
        cache = Cache(pages=16, page_bytes=PAGE)
        path = Path(folder, "s")
        loop = Loop(cache, arena, Listener(path), uids=frozenset([os.getuid()]), connections_max=9)
        thread = threading.Thread(target=loop.run)
        thread.start()
        try:
            with in_process(loop) as (admin_path, disk), engine_at(str(path)) as engine:
                store(engine, "acme", 4)
                operation = SetTenant("acme", TenantSettings(limit=MIB))
                answers: list[Answer] = []
                operator = threading.Thread(
                    target=lambda: answers.append(operate(admin_path, operation, PATIENCE_SECONDS))
                )
                operator.start()
                assert disk.begun.wait(PATIENCE_SECONDS)
                assert found(engine, "acme", 4) == 4
                assert not answers, "nobody is answered before it is written"
                disk.may_end.set()
                operator.join(PATIENCE_SECONDS)
                assert isinstance(answers[0], TenantShown)
        finally:
            loop.stop()
            thread.join(PATIENCE_SECONDS)
            arena.close()
        with pytest.raises(LoopEndedError):
            loop.call(lambda: None)


def test_operators_change_one_after_the_other_and_lose_nothing() -> None:
    with serving() as server:
        fields: list[dict[str, Any]] = [
            {"guarantee": MIB},
            {"limit": 9 * MIB},
            {"ttl": 7.0},
            {"weight": 3.0},
            {"user_limit": MIB},
        ]

        def insist(settings: dict[str, Any]) -> None:
            for _ in range(10):
                set_tenant(server, "acme", **settings)

        operators = [threading.Thread(target=insist, args=(settings,)) for settings in fields]
        for operator in operators:
            operator.start()
        for operator in operators:
            operator.join(PATIENCE_SECONDS)
        values = {name: value for name, (value, origin) in shown(server, "acme").items() if origin == "run time"}
        assert values == {name: value for settings in fields for name, value in settings.items()}


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "doesn't speak Saltern's protocol"),
        (b"SALT\x01\x00\x01\x00" + b"\xff" * 4, "a frame of 4294967295 bytes"),
        (b"SALT\x01\x00\x01\x00\x03\x00\x00\x00\x93c\x00", "malformed"),
        (b"SALT\x63\x00\x63\x00", "run the same release of Saltern on both sides"),
        (b"SALT\x01\x00\x01\x00" + encode(Release(lease=1)), "malformed"),
        (b"SALT\x01\x00\x01\x00" + encode(SetTenant("Acme", TenantSettings())), "malformed"),
        (b"SALT\x01\x00\x01\x00" + encode(SetTenant("acme", TenantSettings(limit=-1))), "malformed"),
        (b"SALT\x01\x00\x01\x00" + encode(SetTenant("acme", TenantSettings(weight=float("nan")))), "malformed"),
        (b"SALT\x01\x00\x01\x00" + encode(SetTenant("acme", TenantSettings(ttl=float("inf")))), "malformed"),
    ],
)  # fmt: skip
def test_garbage_is_answered_with_the_reason_and_harms_nobody(sent: bytes, reason: str) -> None:
    with serving() as server:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(PATIENCE_SECONDS)
            peer.connect(str(server.admin_path))
            peer.sendall(sent)
            wire, answers = admin_client_wire(), list[Answer]()
            with suppress(ConnectionResetError):
                while data := peer.recv(65536):
                    answers += wire.feed(data)
            (answer,) = answers
            assert isinstance(answer, Refused)
            assert reason in answer.reason
        until(lambda: "on the admin socket" in server.log, "it is logged")
        assert isinstance(ask(server, ListTenants()), TenantsListed)


def test_operators_who_say_nothing_and_read_nothing_are_in_nobodys_way() -> None:
    with serving() as server, engine_at(server.path) as engine:
        peers = [socket.socket(socket.AF_UNIX) for _ in range(CONNECTIONS_MAX - 1)]
        flood = encode(ListTenants()) * 1000
        for number, peer in enumerate(peers):
            peer.connect(str(server.admin_path))
            peer.setblocking(False)
            with suppress(BlockingIOError):
                peer.send(b"SALT" + struct.pack("<HH", 1, 1) + (flood if number % 2 else b"\xff\xff"))
        store(engine, "acme", 8)
        assert found(engine, "acme", 8) == 8
        set_tenant(server, "acme", limit=MIB)  # one is left for us
        for _ in range(CONNECTIONS_MAX):  # far more than there are places
            peers.append(socket.socket(socket.AF_UNIX))
            peers[-1].connect(str(server.admin_path))
        with pytest.raises(ConnectionLost, match="16 operators are connected already"):
            ask(server, ListTenants())
        for peer in peers:
            peer.close()
        until(lambda: is_served(server), "they are gone")
        assert server.stop() == 0


def is_served(server: Server) -> bool:
    try:
        return isinstance(ask(server, ListTenants()), TenantsListed)
    except ConnectionLost:
        return False


def test_an_operator_is_no_reason_not_to_stop() -> None:
    with serving() as server, socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(server.admin_path))
        peer.sendall(b"SALT")
        assert server.stop() == 0


class Due(Cache):
    """A cache with so many steps due now, or something due later; each `Tick` is one step."""

    def __init__(self) -> None:
        super().__init__(pages=1, page_bytes=PAGE)
        self.steps, self.ticks = 0, 0
        self.later: float | None = None

    @property
    def due_at(self) -> float | None:
        return 0.0 if self.steps else self.later

    def handle(self, event: Event, now: float) -> list[Effect]:
        if isinstance(event, Tick):
            self.ticks += 1
            self.steps -= 1
        return super().handle(event, now)


def test_the_loop_waits_as_long_as_nothing_is_due() -> None:
    with tempfile.TemporaryDirectory(prefix="saltern-") as folder:
        arena = Arena(total_bytes=PAGE, huge_pages=False)
        cache = Due()
        loop = Loop(cache, arena, Listener(Path(folder, "s")), uids=frozenset(), connections_max=2)
        assert loop._wait_seconds(waits_for_clock=False) is None, "nothing is due: nothing wakes it"
        cache.later = time.monotonic() + 1_000
        wait_seconds = loop._wait_seconds(waits_for_clock=False)
        assert wait_seconds is not None
        assert 0 < wait_seconds <= 1_000
        cache.later = time.monotonic() + 1e12
        assert loop._wait_seconds(waits_for_clock=False) == 86_400, "more than epoll can wait"
        cache.later = None
        thread = threading.Thread(target=loop.run)
        thread.start()
        try:
            loop.call(lambda: setattr(cache, "steps", 5))
            until(lambda: cache.steps == 0, "all that was due is done")
            assert cache.ticks == 5, "one step a turn, and none too many"
        finally:
            loop.stop()
            thread.join(PATIENCE_SECONDS)
            arena.close()
