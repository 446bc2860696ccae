"""What holds for a server with a disk tier: what it stored is there again after its end, however it ended."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from saltern.core.keys import KEY_BYTES, Key, UserId
from saltern.core.messages import (
    Acquire,
    Acquired,
    Commit,
    Loading,
    LookedUp,
    Lookup,
    NamespaceChanged,
    PublicationId,
    PublicDepth,
    Refusal,
    Release,
    Reserve,
    Reserved,
)
from saltern.core.snapshot import DiskStats
from saltern.operations import (
    Failed,
    ListTenants,
    OpenPublication,
    PublicationOpened,
    RemovePublication,
    SetTenant,
    TenantSettings,
    TenantShown,
    TenantsListed,
)
from tests.server.test_admin import ask
from tests.support import Engine, Server, Settings, engine_at, serving, until

PAGE = 65_536
ROOT = bytes(32)
MIB = 1024**2
SLOT = 17 * 4096
"""What a block of a page takes on disk."""


def user(name: str) -> UserId:
    return UserId(name.encode().ljust(16))


def chain(name: str, count: int) -> tuple[Key, ...]:
    return tuple(Key(f"{name}{number}".encode().ljust(KEY_BYTES)) for number in range(count))


def content(name: str, block: int) -> bytes:
    """Return what a block of a user holds, unlike any other."""
    return f"{name}/{block}/".encode().ljust(32, b".") * (PAGE // 32)


@contextmanager
def serving_disk(**settings: Settings | str) -> Iterator[Server]:
    with serving(disk={"size": "64 MiB"}, **settings) as server:  # type: ignore[arg-type]
        yield server


def disk_of(server: Server) -> DiskStats:
    disk = server.stats().disk
    assert disk is not None, "there is no disk tier"
    return disk


def store(engine: Engine, name: str, count: int, tenant: str = "default") -> None:
    """Store a prompt of `count` blocks of a page each, with the bytes that `content` says."""
    hold = engine.hold()
    asked = engine.ask(Acquire(request=1, user=user(name), keys=chain(name, count), start=0, tenant=tenant))
    assert isinstance(asked, Acquired)
    reserved = engine.ask(
        Reserve(
            request=1, user=user(name), keys=chain(name, count), start=asked.ready, acquired_at=asked.acquired_at,
            tenant=tenant, began_at=time.monotonic(),
        )
    )  # fmt: skip
    assert isinstance(reserved, Reserved)
    assert reserved.refusal is None
    for grant in reserved.grants:
        (run,) = grant.extent
        hold.buffer[run.start * PAGE : (run.start + 1) * PAGE] = content(name, grant.index)
    engine.control.send(Commit(lease=reserved.lease))
    hold.release()


def load(engine: Engine, name: str, count: int, tenant: str = "default", *, public: bool = False) -> list[bytes]:
    """Ask for a prompt, wait for what comes from the disk, and return the bytes of the blocks that hit."""
    keys = chain(name, count)
    engine.control.send(
        Acquire(request=2, user=user(name), keys=keys, start=0, tenant=tenant, public=keys if public else ())
    )
    answer = engine.receive()
    while isinstance(answer, Loading):
        answer = engine.receive()
    assert isinstance(answer, Acquired)
    if not answer.ready:
        return []
    hold = engine.hold()
    found = [bytes(hold.buffer[run.start * PAGE : (run.start + 1) * PAGE]) for (run,) in answer.extents]
    hold.release()
    engine.control.send(Release(lease=answer.lease))
    return found


def written(server: Server, blocks: int) -> None:
    until(lambda: disk_of(server).blocks == blocks and not disk_of(server).writing_blocks, f"{blocks} are on disk")


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_what_was_stored_is_a_hit_after_the_end_of_the_server(how: str) -> None:
    with serving_disk() as server:
        with engine_at(server.path) as engine:
            store(engine, "alice", 8)
            store(engine, "bob", 3, tenant="acme")
            written(server, 11)
        getattr(server, how)()
        server.start()
        assert "11 blocks are there, 0 were damaged and 0 not written whole" in server.log
        assert disk_of(server).blocks == 11
        assert server.stats().arena.blocks == 0
        users = {each.user: each for tenant in server.stats().tenants for each in tenant.users}
        assert (users[user("alice").hex()].blocks, users[user("alice").hex()].disk_used_bytes) == (0, 8 * SLOT)
        with engine_at(server.path) as engine:
            assert engine.ask(Lookup(request=1, user=user("alice"), keys=chain("alice", 9))) == LookedUp(1, ready=8)
            assert load(engine, "alice", 9) == [content("alice", block) for block in range(8)]
            assert load(engine, "bob", 3, tenant="acme") == [content("bob", block) for block in range(3)]
            assert not load(engine, "bob", 3)
            assert not load(engine, "carol", 3)
        counts = {tenant.tenant: tenant.counts.disk_loaded for tenant in server.stats().tenants}
        assert (counts["default"], counts["acme"]) == (8, 3)


def published(server: Server) -> list[tuple[str, int, int]]:
    """Return the labels of what is published, and of how many blocks how many can be read."""
    return [(each.label, each.blocks, each.blocks_ready) for each in server.stats().publications]


def test_what_is_published_is_brought_back_and_what_was_removed_is_not() -> None:
    with serving_disk(tenants={"public": {"guarantee": "1 MiB"}}) as server:
        names = {}
        with engine_at(server.path) as engine:
            engine.control.send(NamespaceChanged(ROOT))
            for name in ("one", "other"):
                opened = ask(server, OpenPublication(root=ROOT, content=bytes(32), blocks=3, label=name))
                assert isinstance(opened, PublicationOpened)
                names[name] = UserId(opened.publication)
                publish(engine, names[name], name, 3)
            written(server, 6)
        server.kill()
        server.start()
        until(lambda: published(server) == [("one", 3, 3), ("other", 3, 3)], "both are back")
        with engine_at(server.path) as engine:
            assert engine.ask(NamespaceChanged(ROOT)) == PublicDepth(3)
            assert load(engine, "one", 3, public=True) == [content("one", block) for block in range(3)]
            ask(server, RemovePublication(PublicationId(names["one"])))
            assert engine.ask(lookup("one", 3)) == LookedUp(1, ready=0)
        server.kill()
        server.start()
        until(lambda: published(server) == [("other", 3, 3)], "one alone is back")
        written(server, 3)
        with engine_at(server.path) as engine:
            assert engine.ask(NamespaceChanged(ROOT)) == PublicDepth(3)
            assert engine.ask(lookup("one", 3)) == LookedUp(1, ready=0)
            publish(engine, names["one"], "one", 3, refused=Refusal.NOT_PUBLISHED)
        assert isinstance(ask(server, RemovePublication(PublicationId(names["one"]))), Failed)


def lookup(name: str, count: int) -> Lookup:
    """Look for what is published, as a user who has nothing."""
    return Lookup(request=1, user=user("nobody"), keys=chain("nobody", count), public=chain(name, count))


def publish(engine: Engine, id_: UserId, name: str, count: int, *, refused: Refusal | None = None) -> None:
    """Store the blocks of a publication."""
    hold = engine.hold()
    reserve = Reserve(
        request=1,
        user=id_,
        keys=chain(name, count),
        start=0,
        acquired_at=time.monotonic(),
        tenant="public",
        began_at=time.monotonic(),
    )
    engine.control.send(reserve)
    reserved = engine.receive()
    while isinstance(reserved, PublicDepth):
        reserved = engine.receive()
    assert isinstance(reserved, Reserved)
    assert reserved.refusal is refused
    for grant in reserved.grants:
        (run,) = grant.extent
        hold.buffer[run.start * PAGE : (run.start + 1) * PAGE] = content(name, grant.index)
    if reserved.lease:
        engine.control.send(Commit(lease=reserved.lease))
    hold.release()


def test_what_was_used_last_is_known_after_a_restart() -> None:
    with serving_disk() as server:
        with engine_at(server.path) as engine:
            for name in ("alice", "bob", "carol"):
                store(engine, name, 2)
            written(server, 6)
            assert load(engine, "alice", 2)
        server.stop()
        server.start()
        # There is room for two of the three: the one that was not used for longest goes.
        set_disk_limit(server, 2 * 2 * SLOT)
        until(lambda: disk_of(server).blocks == 4, "the tenant is at its limit")
        with engine_at(server.path) as engine:
            assert [len(load(engine, name, 2)) for name in ("alice", "bob", "carol")] == [2, 0, 2]


def set_disk_limit(server: Server, limit: int) -> None:
    answer = ask(server, SetTenant("default", TenantSettings(disk_limit=limit)))
    assert isinstance(answer, TenantShown), answer


def test_limits_and_guarantees_hold_on_disk_and_are_shown() -> None:
    tenants: dict[str, Settings] = {"acme": {"disk_limit": "200 KiB", "disk_user_limit": "140 KiB"}}
    with serving_disk(tenants=tenants) as server:
        with engine_at(server.path) as engine:
            store(engine, "alice", 4, tenant="acme")
            store(engine, "bob", 1, tenant="acme")
            store(engine, "carol", 4)
            until(lambda: (held(server, "acme"), held(server, "default")) == (2 * SLOT, 4 * SLOT), "all is begun")
            until(lambda: not disk_of(server).writing_blocks, "all is written")
        server.kill()
        server.start()
        assert held(server, "acme") == 2 * SLOT
        listed = ask(server, ListTenants())
        assert isinstance(listed, TenantsListed)
        assert listed.disk_bytes == 64 * MIB
        assert {tenant.tenant: tenant.disk_bytes for tenant in listed.tenants} == {
            "acme": 2 * SLOT,
            "default": 4 * SLOT,
        }
        refused = ask(server, SetTenant("acme", TenantSettings(disk_guarantee=100 * MIB, disk_limit=None)))
        assert isinstance(refused, Failed)
        assert "(guaranteed: acme 100 MiB)" in refused.reason


def held(server: Server, tenant: str) -> int:
    return next(stats.disk_used_bytes for stats in server.stats().tenants if stats.tenant == tenant)


def test_without_a_disk_tier_its_settings_promise_nothing() -> None:
    with serving(tenants={"acme": {"disk_guarantee": "100 GiB"}}) as server, engine_at(server.path) as engine:
        assert server.stats().disk is None
        store(engine, "alice", 2, tenant="acme")
        assert len(load(engine, "alice", 2, tenant="acme")) == 2
        assert not (server.folder / "state/disk").exists()
        assert not (server.folder / "state/deployment.key").exists()


def test_a_disk_without_its_key_is_refused_and_the_key_is_named() -> None:
    with serving_disk() as server:
        server.stop()
        key = server.folder / "state/deployment.key"
        made = key.read_bytes()
        for content_of_key in (None, b"0" * 64 + b"\n", b"no key\n"):
            key.unlink()
            if content_of_key is not None:
                key.write_bytes(content_of_key)
                key.chmod(0o600)
            before = len(server.log)
            with pytest.raises(AssertionError, match=r"ended at once"):
                server.start()
            line = server.log[before:].splitlines()[-1]
            assert line.startswith("saltern: ")
            assert str(key) in line
            key.write_bytes(made)
        server.start()


def test_a_smaller_disk_says_what_had_no_room_in_it() -> None:
    with serving_disk() as server:
        with engine_at(server.path) as engine:
            store(engine, "alice", 8)
            written(server, 8)
        server.stop()
        settings = server.folder / "saltern.toml"
        text = settings.read_text(encoding="utf-8")
        settings.write_text(text.replace('[disk]\nsize = "64 MiB"', f"[disk]\nsize = {3 * SLOT}"), encoding="utf-8")
        server.start()
        assert "3 blocks are there, 0 were damaged and 0 not written whole" in server.log
        assert "5 blocks had no room in a smaller disk tier" in server.log


def test_less_room_than_the_disk_may_have_is_said() -> None:
    with serving(disk={"size": "10 TiB"}) as server:
        assert f"disk.size is 10 TiB, and the filesystem of {server.folder / 'state/disk'} has room for" in server.log
    with serving_disk() as server:
        assert "disk.size is" not in server.log
