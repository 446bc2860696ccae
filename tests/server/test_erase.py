"""What holds for whoever is erased: nothing is found, kept or stored again, and a receipt says so."""

import json
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest

from saltern.audit import AuditError, AuditLog, Detail, Line, parse_receipt, read_public_key, verify_log
from saltern.client.sockets import ConnectionLost
from saltern.core.effects import Event
from saltern.core.keys import UserId, digest, signed_user_key, unsigned_user_key, user_id
from saltern.core.messages import (
    Acquire,
    Acquired,
    Commit,
    Loading,
    PublicationId,
    Refusal,
    Release,
    Reserve,
    Reserved,
)
from saltern.core.snapshot import PublicationStats
from saltern.epochs import make_epochs, read_epochs
from saltern.operations import Erase, Failed, KeyRotated, RotateKey, UserErased
from saltern.secret import make_signing_secrets, read_secret, read_signing_secrets
from saltern.server.erasure import KEYS_SHOWN, Erasure, Secrets, Whom
from saltern.server.operations import Holding, OperationError, Operations
from saltern.server.store import Store, StoreError
from saltern.server.tenancy import Layers
from saltern.signing import Signed, sign, user_tag
from tests.server.test_admin import ask, audited
from tests.server.test_disk import PAGE, SLOT, chain, content, disk_of, load, serving_disk, store, user, written
from tests.support import PATIENCE_SECONDS, Engine, Server, engine_at, serving, until
from tests.tiers.test_disk import small_filesystem, write_all


def erase(server: Server, tenant: str = "default", **whom: object) -> UserErased:
    """Erase somebody, and check the receipt."""
    answer = ask(server, Erase(tenant, **whom))  # type: ignore[arg-type]
    assert isinstance(answer, UserErased), answer
    log = AuditLog(server.folder / "state")
    verify_log(log.path, read_public_key(log.public_key_path), parse_receipt(answer.receipt.encode()))
    return answer


def said(answer: UserErased) -> Mapping[str, Detail]:
    return parse_receipt(answer.receipt.encode()).details


def signed_id(server: Server, tenant: str, name: str, epoch: int) -> UserId:
    naming = read_secret(server.folder / "state/naming.key")
    return user_id(signed_user_key(naming, tenant, user_tag(tenant, name), epoch))


def store_as(engine: Engine, id_: UserId, count: int, *, tenant: str, began_at: float) -> Refusal | None:
    """Try to store a prompt as an engine does for a request that it has since `began_at`."""
    asked = engine.ask(Acquire(request=1, user=id_, keys=chain("x", count), start=0, tenant=tenant))
    assert isinstance(asked, Acquired)
    if asked.lease:
        engine.control.send(Release(asked.lease))
    message = Reserve(
        request=1, user=id_, keys=chain("x", count), start=0, acquired_at=asked.acquired_at, tenant=tenant,
        began_at=began_at,
    )  # fmt: skip
    reserved = engine.ask(message)
    assert isinstance(reserved, Reserved)
    if reserved.lease:
        engine.control.send(Commit(reserved.lease))
    return reserved.refusal


def hits(engine: Engine, id_: UserId, count: int, *, tenant: str) -> int:
    engine.control.send(Acquire(request=2, user=id_, keys=chain("x", count), start=0, tenant=tenant))
    answer = engine.receive()
    while isinstance(answer, Loading):
        answer = engine.receive()
    assert isinstance(answer, Acquired)
    if answer.lease:
        engine.control.send(Release(answer.lease))
    return answer.ready


def test_nothing_of_an_erased_user_is_found_in_memory_or_on_disk() -> None:
    with serving_disk() as server:
        with engine_at(server.path, engine="llama") as engine:
            store(engine, "alice", 6)
            store(engine, "bob", 2)
            written(server, 8)
            answer = erase(server, user=user("alice"))
            keys = said(answer)["keys"]
            assert isinstance(keys, list)
            assert len(bytes.fromhex(*keys)) == 16
            assert said(answer) == {
                "tenant": "default",
                "users": [user("alice").hex()],
                "users_found": 1,
                "ram_bytes": 6 * PAGE,
                "leased_bytes": 0,
                "disk_bytes": 6 * SLOT,
                "keys_destroyed": 1,
                "keys": keys,
                "keys_hash": digest(b"saltern.keys", [bytes.fromhex(*keys)]).hex(),
            }
            assert (answer.may_be_in_vllm, answer.engines) == (True, ("llama",))
            assert not load(engine, "alice", 6)
            assert load(engine, "bob", 2) == [content("bob", block) for block in range(2)]
            until(lambda: server.stats().arena.blocks == 2, "only what is not erased is in memory")
            until(lambda: disk_of(server).used_bytes == 2 * SLOT, "only what is not erased is on disk")
            hold = engine.hold()
            until(lambda: b"alice" not in bytes(hold.buffer), "memory is zeroed")
            assert b"bob/1" in bytes(hold.buffer)
            hold.release()
        server.kill()
        server.start()
        with engine_at(server.path) as engine:
            assert not load(engine, "alice", 6)
            assert load(engine, "bob", 2) == [content("bob", block) for block in range(2)]


def test_who_was_erased_by_id_may_store_again_but_not_what_was_begun_before() -> None:
    with serving_disk() as server, engine_at(server.path) as engine:
        alice, before = user("alice"), time.monotonic()
        assert store_as(engine, alice, 3, tenant="default", began_at=before) is None
        erase(server, user=alice)
        assert store_as(engine, alice, 3, tenant="default", began_at=before) is Refusal.ERASED
        assert store_as(engine, user("bob"), 3, tenant="default", began_at=before) is None
        assert store_as(engine, alice, 3, tenant="default", began_at=time.monotonic()) is None

        def all_is_on_disk() -> bool:
            # What leaves the disk is not written again before it is gone, but when it is next used.
            assert hits(engine, alice, 3, tenant="default") == 3
            disk = disk_of(server)
            return disk.blocks == 6 and not disk.writing_blocks

        until(all_is_on_disk, "what is new is on disk")


def test_who_was_erased_by_name_begins_anew_and_the_old_id_is_dead_for_good() -> None:
    with serving_disk() as server:
        epochs, tag = server.folder / "state/epochs.json", user_tag("acme", "alice")
        with engine_at(server.path) as engine:
            ids = [signed_id(server, "acme", "alice", epoch) for epoch in range(3)]
            assert store_as(engine, ids[0], 4, tenant="acme", began_at=time.monotonic()) is None
            until(lambda: disk_of(server).written == 4, "it is on disk")
            answer = erase(server, "acme", user_name="alice")
            assert not answer.may_be_in_vllm
            assert said(answer)["users"] == [ids[0].hex()]
            assert said(answer)["disk_bytes"] == 4 * SLOT
            assert read_epochs(epochs).of("acme", tag) == 1
            assert read_epochs(epochs).of("acme", user_tag("acme", "bob")) == 0
            assert store_as(engine, ids[0], 4, tenant="acme", began_at=time.monotonic()) is Refusal.ERASED
            assert store_as(engine, ids[1], 4, tenant="acme", began_at=time.monotonic()) is None
            until(lambda: disk_of(server).written == 8, "the user has begun anew")
        server.kill()
        server.start()
        with engine_at(server.path) as engine:
            assert store_as(engine, ids[0], 4, tenant="acme", began_at=time.monotonic()) is Refusal.ERASED
            assert hits(engine, ids[1], 4, tenant="acme") == 4
            assert said(erase(server, "acme", user_name="alice"))["users"] == [ids[1].hex()]
            assert said(erase(server, "acme", user_name="alice"))["users"] == [ids[2].hex()]


def test_all_users_of_a_tenant_are_erased_together_and_no_others() -> None:
    with serving_disk() as server, engine_at(server.path) as engine:
        alice, bob = (signed_id(server, "acme", name, 0) for name in ("alice", "bob"))
        for id_, tenant in ((alice, "acme"), (bob, "acme"), (alice, "umbrella"), (user("carol"), "default")):
            assert store_as(engine, id_, 2, tenant=tenant, began_at=time.monotonic()) is None
        until(lambda: disk_of(server).written == 8, "it is on disk")
        answer = erase(server, "acme")
        assert (said(answer)["users"], said(answer)["users_found"], said(answer)["keys_destroyed"]) == ("all", 2, 2)
        assert hits(engine, alice, 2, tenant="acme") == hits(engine, bob, 2, tenant="acme") == 0
        assert hits(engine, alice, 2, tenant="umbrella") == hits(engine, user("carol"), 2, tenant="default") == 2
        for id_ in (alice, bob):
            assert store_as(engine, id_, 2, tenant="acme", began_at=time.monotonic()) is Refusal.ERASED
        assert (
            store_as(engine, signed_id(server, "acme", "bob", 1), 2, tenant="acme", began_at=time.monotonic()) is None
        )
        assert said(erase(server))["users_found"] == 1
        assert hits(engine, user("carol"), 2, tenant="default") == 0
        assert store_as(engine, user("carol"), 2, tenant="default", began_at=time.monotonic()) is None


def test_a_salt_names_its_user_and_is_written_nowhere() -> None:
    with serving_disk() as server, engine_at(server.path) as engine:
        naming = read_secret(server.folder / "state/naming.key")
        secret = read_signing_secrets(server.folder / "state/signing.keys")[0]
        salt, signed = "correct horse battery", sign(Signed("acme", user_tag("acme", "alice"), 0), secret)
        ids = (user_id(unsigned_user_key(naming, salt)), signed_id(server, "acme", "alice", 0))
        for id_, tenant in zip(ids, ("default", "acme"), strict=True):
            assert store_as(engine, id_, 2, tenant=tenant, began_at=time.monotonic()) is None
        unsigned = erase(server, salt=salt)
        assert (said(unsigned)["users"], said(unsigned)["ram_bytes"]) == ([ids[0].hex()], 2 * PAGE)
        assert unsigned.may_be_in_vllm
        reasons = [
            ask(server, Erase("acme", salt=salt)),
            ask(server, Erase("umbrella", salt=signed)),
            ask(server, Erase("acme", salt=salt, user_name="alice")),
        ]
        by_signed = erase(server, "acme", salt=signed)
        assert (said(by_signed)["users"], by_signed.may_be_in_vllm) == ([ids[1].hex()], False)
        assert said(erase(server, salt=""))["users_found"] == 0
        for reason in reasons:
            assert isinstance(reason, Failed)
            assert reason.reason.startswith("nothing was erased: ")
        server.stop()
        texts = [reason.reason.encode() for reason in reasons if isinstance(reason, Failed)]
        texts += [path.read_bytes() for path in server.folder.rglob("*") if path.is_file() and path.name != "slab"]
        for text in texts:
            assert salt.encode() not in text
            assert signed.encode() not in text


def test_what_can_not_be_meant_erases_nothing() -> None:
    with serving() as server:
        for wanted, reason in (
            (Erase("public"), "`saltern publish --remove ID` removes it"),
            (Erase("acme", user_name="a", user=bytes(16)), "name the user in one way"),
            (Erase("acme", salt="x"), "nobody has signed this salt"),
        ):
            answer = ask(server, wanted)
            assert isinstance(answer, Failed)
            assert reason in answer.reason
        assert not (server.folder / "state/audit.log").exists()
        assert isinstance(ask(server, RotateKey()), Failed)


@pytest.mark.parametrize("disk", [False, True])
def test_nobody_is_erased_as_well(disk: bool) -> None:
    with serving_disk() if disk else serving() as server:
        for whom in ({"user": user("nobody")}, {"salt": "nobody"}, {"user_name": "nobody"}, {}):
            answer = said(erase(server, **whom))
            assert (answer["ram_bytes"], answer["disk_bytes"], answer["keys"]) == (0, 0, [])


def test_what_an_earlier_disk_tier_has_left_can_not_be_erased_without_it() -> None:
    with serving() as server:
        assert isinstance(ask(server, Erase("default")), UserErased)
        (server.folder / "state/disk").mkdir()
        (server.folder / "state/disk/index.db").touch()
        answer = ask(server, Erase("default"))
        assert isinstance(answer, Failed) and "disk.size is 0" in answer.reason


def test_what_engines_hold_falls_when_they_let_go_and_nobody_waits_for_it() -> None:
    with serving_disk() as server, engine_at(server.path) as engine:
        store(engine, "alice", 4)
        written(server, 4)
        asked = engine.ask(Acquire(request=1, user=user("alice"), keys=chain("alice", 3), start=0))
        assert isinstance(asked, Acquired)
        answer = said(erase(server, user=user("alice")))
        assert (answer["ram_bytes"], answer["leased_bytes"]) == (4 * PAGE, 3 * PAGE)
        hold = engine.hold()
        (first,) = asked.extents[0]
        place = slice(first.start * PAGE, (first.start + 1) * PAGE)
        assert bytes(hold.buffer[place]) == content("alice", 0), "whoever copies is not given other bytes"
        assert not load(engine, "alice", 3)
        engine.control.send(Release(asked.lease))
        until(lambda: not any(hold.buffer[place]), "it is zeroed")
        hold.release()
        until(lambda: server.stats().arena.used_bytes == 0, "all is free")


def test_a_store_under_way_is_not_kept() -> None:
    with serving_disk() as server, engine_at(server.path) as engine:
        asked = engine.ask(Reserve(request=1, user=user("alice"), keys=chain("alice", 2), start=0, acquired_at=0.0))
        assert isinstance(asked, Reserved)
        assert said(erase(server, user=user("alice")))["leased_bytes"] == 2 * PAGE
        engine.control.send(Commit(asked.lease))
        assert not load(engine, "alice", 2)
        until(lambda: server.stats().arena.used_bytes == 0, "all is free")
        assert disk_of(server).blocks == 0


def test_operators_at_one_time_each_get_a_receipt() -> None:
    with serving_disk() as server, engine_at(server.path) as engine:
        store(engine, "alice", 4)
        written(server, 4)
        receipts: list[Line] = []

        def erase_alice() -> None:
            answer = ask(server, Erase("default", user=user("alice")))
            assert isinstance(answer, UserErased)
            receipts.append(parse_receipt(answer.receipt.encode()))

        threads = [threading.Thread(target=erase_alice) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
        assert sorted(int(str(receipt.details["ram_bytes"])) for receipt in receipts) == [0, 0, 0, 4 * PAGE]
        key = read_public_key(server.folder / "state/receipt.pub")
        for receipt in receipts:
            verify_log(server.folder / "state/audit.log", key, receipt)


def test_a_new_deployment_key_opens_what_the_old_one_sealed() -> None:
    with serving_disk() as server:
        path = server.folder / "state/deployment.key"
        with engine_at(server.path) as engine:
            store(engine, "alice", 3)
            store(engine, "bob", 3)
            written(server, 6)
            old = path.read_bytes()
            assert ask(server, RotateKey()) == KeyRotated(str(path), 2)
            assert path.read_bytes() != old
            store(engine, "carol", 3)
            written(server, 9)
        server.kill()
        server.start()
        with engine_at(server.path) as engine:
            for name in ("alice", "bob", "carol"):
                assert load(engine, name, 3) == [content(name, block) for block in range(3)]
        server.stop()
        path.write_bytes(old)
        with pytest.raises(AssertionError, match=str(path)):
            server.start()
        assert [line["what"] for line in audited(server.folder / "state")] == ["deployment-key-rotated"]


def test_a_server_killed_while_it_erases_leaves_all_or_nothing_and_the_next_erasure_ends_it() -> None:
    with serving_disk() as server:
        log = server.folder / "state/audit.log"

        def has_begun(times: int) -> bool:
            return log.exists() and log.read_bytes().count(b"erase-begun") == times

        for attempt in range(1, 4):
            with engine_at(server.path) as engine:
                store(engine, "alice", 8)
                written(server, 8)
            answers: list[UserErased | ConnectionLost] = []

            def erase_alice(answers: list[UserErased | ConnectionLost] = answers) -> None:
                try:
                    answers.append(erase(server, user=user("alice")))
                except ConnectionLost as lost:
                    answers.append(lost)

            thread = threading.Thread(target=erase_alice)
            thread.start()
            until(partial(has_begun, 2 * attempt - 1), "it is begun")
            server.kill()
            thread.join(PATIENCE_SECONDS)
            server.start()
            with engine_at(server.path) as engine:
                left = load(engine, "alice", 8)
                assert left in ([], [content("alice", block) for block in range(8)])
                assert not left or isinstance(answers[0], ConnectionLost), "there is a receipt, and it is not erased"
                assert said(erase(server, user=user("alice")))["disk_bytes"] == len(left) * SLOT
                assert not load(engine, "alice", 8)


def test_who_was_erased_stays_so_without_the_disk_that_it_was_erased_from() -> None:
    with serving_disk() as server:
        before = time.monotonic()
        alice, bob, carol = (signed_id(server, "acme", "alice", 0), user("bob"), signed_id(server, "umbrella", "c", 0))
        with engine_at(server.path) as engine:
            for id_, tenant in ((alice, "acme"), (carol, "umbrella")):
                assert store_as(engine, id_, 2, tenant=tenant, began_at=before) is None
            written(server, 4)
            erase(server, "acme", user_name="alice")
            erase(server, user=bob)
            erase(server, "umbrella")

        def is_known() -> None:
            with engine_at(server.path) as engine:
                for id_, tenant in ((alice, "acme"), (carol, "umbrella")):
                    assert store_as(engine, id_, 2, tenant=tenant, began_at=time.monotonic()) is Refusal.ERASED
                assert store_as(engine, bob, 2, tenant="default", began_at=before) is Refusal.ERASED
                assert store_as(engine, user("dave"), 2, tenant="umbrella", began_at=before) is Refusal.ERASED
                assert store_as(engine, bob, 2, tenant="default", began_at=time.monotonic()) is None

        server.kill()
        shutil.rmtree(server.folder / "state/disk")
        server.start()
        is_known()
        server.stop()
        settings = server.folder / "saltern.toml"
        text = settings.read_text(encoding="utf-8")
        settings.write_text(text.replace('[disk]\nsize = "64 MiB"', "[disk]\nsize = 0"), encoding="utf-8")
        shutil.rmtree(server.folder / "state/disk")
        server.start()
        is_known()


# What fails halfway


def test_a_full_disk_keeps_nobody_in_memory_and_the_next_erasure_destroys_the_keys() -> None:
    with (
        small_filesystem("40m") as folder,
        serving(disk={"size": "64 MiB", "path": str(folder / "disk")}) as server,
        engine_at(server.path) as engine,
    ):
        alice = signed_id(server, "acme", "alice", 0)
        assert store_as(engine, alice, 4, tenant="acme", began_at=time.monotonic()) is None
        store(engine, "bob", 4)
        written(server, 8)
        write_all(folder / "ballast")
        for wanted in (Erase("acme", user_name="alice"), Erase("default", user=user("bob"))):
            failed = ask(server, wanted)
            assert isinstance(failed, Failed)
            assert "it is found no more, in memory or on disk" in failed.reason
            assert "make room on its filesystem, and try again; erase again" in failed.reason
        assert hits(engine, alice, 4, tenant="acme") == 0
        assert not load(engine, "bob", 4)
        until(lambda: server.stats().arena.blocks == 0, "it has left the memory")
        (folder / "ballast").unlink()
        again = said(erase(server, "acme", user_name="alice"))
        assert again["users"] == [alice.hex(), signed_id(server, "acme", "alice", 1).hex()], "its key was not gone"
        assert again["keys_destroyed"] == 1
        assert said(erase(server, user=user("bob")))["keys_destroyed"] == 1
        assert said(erase(server, "acme", user_name="alice"))["keys_destroyed"] == 0


class Faulty:
    """In place of a running server: fails as often as it is told to."""

    arena_bytes = disk_bytes = PAGE

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.erased: list[tuple[str, UserId | None, bool]] = []

    def erase(self, tenant: str, user: UserId | None, *, for_good: bool) -> Erasure:
        if self.failures:
            self.failures -= 1
            raise OperationError("the disk is broken")
        self.erased.append((tenant, user, for_good))
        return Erasure(1, 10, 0, 20, (bytes(16),))

    def forget_publication(self, publication: PublicationId) -> bool:
        return False

    def users(self, tenant: str) -> tuple[UserId, ...]:
        return (user("known"),)

    def is_erased_for_good(self, tenant: str, user: UserId) -> bool:
        return (tenant, user, True) in self.erased

    def why_not(self, layers: Layers) -> str | None:
        return None

    def tell(self, events: Sequence[Event]) -> None:
        pass

    def holdings(self) -> Mapping[str, Holding]:
        return {}

    def publications(self) -> tuple[PublicationStats, ...]:
        return ()

    def rotate_key(self) -> int:
        raise OperationError("the disk is broken")

    def engines(self) -> tuple[str, ...]:
        return ()


def operations_on(folder: Path, subject: Faulty, audit: AuditLog | None = None) -> Operations:
    secrets = Secrets(bytes(32), folder / "signing.keys", folder / "epochs.json", folder / "deployment.key")
    make_signing_secrets(secrets.signing_path)
    make_epochs(secrets.epochs_path)
    return Operations(Layers({}, {}), Store(folder / "saltern.db"), subject, audit or AuditLog(folder), secrets)


def id_at(epoch: int) -> UserId:
    return user_id(signed_user_key(bytes(32), "acme", user_tag("acme", "alice"), epoch))


def test_an_erasure_that_fails_gives_no_receipt_and_the_next_one_erases_what_it_left(tmp_path: Path) -> None:
    subject = Faulty(failures=2)
    operations = operations_on(tmp_path, subject)
    for _ in range(2):
        assert operations.answer(Erase("acme", user_name="alice"), by="uid 7") == Failed("the disk is broken")
    answer = operations.answer(Erase("acme", user_name="alice"), by="uid 7")
    assert isinstance(answer, UserErased)
    assert sorted(subject.erased) == sorted(("acme", id_at(epoch), True) for epoch in range(3))
    whats = [line["what"] for line in audited(tmp_path)]
    assert whats == ["erase-begun", "not-done", "erase-begun", "not-done", "erase-begun", "erased"]
    assert said(answer)["ram_bytes"] == 20, "of two: the third was forgotten when another one failed"
    operations.answer(Erase("acme", user_name="alice"), by="uid 7")
    assert subject.erased[3:] == [("acme", id_at(3), True)], "what is erased for good is left in peace"
    assert operations.answer(RotateKey(), by="uid 7") == Failed("the disk is broken")
    assert [line["what"] for line in audited(tmp_path)[-2:]] == ["deployment-key-rotated", "not-done"]


class Full(AuditLog):
    """A log on a disk that has room for one more line."""

    lines = 1

    def append(self, what: str, details: Mapping[str, Detail], *, by: str) -> Line:
        if not self.lines:
            raise AuditError("no room")
        self.lines -= 1
        return super().append(what, details, by=by)


def test_who_is_erased_is_written_down_before_any_key_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Faulty(failures=1)
    operations = operations_on(tmp_path, subject)
    assert isinstance(operations.answer(Erase("acme", user_name="alice"), by="uid 7"), Failed)
    assert isinstance(operations.answer(Erase("umbrella"), by="uid 7"), UserErased)
    assert isinstance(operations.answer(Erase("default"), by="uid 7"), UserErased)
    operations._store.close()
    store = Store(tmp_path / "saltern.db")
    assert set(store.erased) == {
        ("acme", id_at(0), True),
        ("umbrella", None, False),
        ("umbrella", user("known"), True),
        ("default", None, False),
    }
    store.close()
    operations = operations_on(tmp_path, subject)
    monkeypatch.setattr(Store, "note_erased", unwritten)
    erased = list(subject.erased)
    assert operations.answer(Erase("acme", user=bytes(16)), by="uid 7") == Failed(
        "nothing was erased: no room; erase again"
    )
    assert subject.erased == erased


def unwritten(store: Store, erased: object) -> None:
    raise StoreError("no room")


def test_an_erasure_that_can_not_be_written_down_says_that_it_is_one(tmp_path: Path) -> None:
    subject, audit = Faulty(), Full(tmp_path)
    operations = operations_on(tmp_path, subject, audit)
    answer = operations.answer(Erase("acme", user=bytes(16)), by="uid 7")
    assert answer == Failed("it is erased, and there is no receipt: no room; erase again for one")
    assert subject.erased == [("acme", bytes(16), False)]
    answer = operations.answer(Erase("acme", user=bytes(16)), by="uid 7")
    assert answer == Failed("no room")
    assert len(subject.erased) == 1, "what can't be written down at all is not begun"
    audit.lines = 2
    assert isinstance(operations.answer(Erase("acme", user=bytes(16)), by="uid 7"), UserErased)


def test_a_broken_file_of_epochs_keeps_a_name_from_being_erased_but_not_an_id(tmp_path: Path) -> None:
    subject = Faulty()
    operations = operations_on(tmp_path, subject)
    (tmp_path / "epochs.json").write_text("{", encoding="ascii")
    for wanted in (Erase("acme", user_name="alice"), Erase("acme")):
        answer = operations.answer(wanted, by="uid 7")
        assert isinstance(answer, Failed)
        assert f"nothing was erased: {tmp_path / 'epochs.json'}: " in answer.reason
    assert not subject.erased
    assert isinstance(operations.answer(Erase("acme", user=bytes(16)), by="uid 7"), UserErased)


def test_a_receipt_tells_of_all_keys_also_of_those_that_it_does_not_name() -> None:
    keys = [number.to_bytes(16) for number in range(KEYS_SHOWN + 2)]
    whom = Whom("acme", None)
    details = Erasure(keys=tuple(keys)).details(whom)
    assert details["keys_destroyed"] == len(keys)
    assert details["keys"] == [key.hex() for key in keys[:-2]]
    assert details["keys_hash"] == Erasure(keys=tuple(reversed(keys))).details(whom)["keys_hash"]
    assert details["keys_hash"] != Erasure(keys=(*keys[:-1], bytes(16))).details(whom)["keys_hash"]


def test_a_begun_erasure_is_written_down_by_ids_alone(tmp_path: Path) -> None:
    operations = operations_on(tmp_path, Faulty())
    operations.answer(Erase("acme", user_name="alice"), by="uid 7")
    assert "alice" not in json.dumps(audited(tmp_path))
    assert user_tag("acme", "alice") not in json.dumps(audited(tmp_path))
    assert "alice" not in repr(Erase("acme", user_name="alice"))
    assert os.stat(tmp_path / "audit.log").st_mode & 0o077 == 0
