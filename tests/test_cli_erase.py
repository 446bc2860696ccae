"""`saltern erase`, `rotate-key`, `check`, `audit-log` and the disk in `stats`, run as an operator runs them."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from saltern.audit import AuditLog
from saltern.cli import main
from saltern.core.keys import unsigned_user_key, user_id
from saltern.secret import read_secret
from tests.server.test_disk import content, disk_of, load, serving_disk, store, user, written
from tests.support import PATIENCE_SECONDS, Server, engine_at, until

PAGE = 65_536


def saltern(*arguments: str, stdin: bytes = b"") -> "subprocess.CompletedProcess[str]":
    run = subprocess.run(
        [sys.executable, "-m", "saltern.cli", *arguments],
        input=stdin,
        capture_output=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    return subprocess.CompletedProcess(run.args, run.returncode, run.stdout.decode(), run.stderr.decode())


def on(server: Server, *arguments: str, stdin: bytes = b"") -> "subprocess.CompletedProcess[str]":
    return saltern(*arguments, "--socket", str(server.admin_path), stdin=stdin)


def verify(server: Server, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return saltern("audit-log", "verify", "--log", str(server.folder / "state/audit.log"), *arguments)


def test_a_user_is_erased_and_the_receipt_verified() -> None:
    with serving_disk() as server:
        with engine_at(server.path, engine="llama") as engine:
            store(engine, "alice", 4)
            written(server, 4)
            shown = on(server, "erase", "--tenant", "default", "--user-id", user("alice").hex())
            assert shown.returncode == 0, shown
            *told, receipt = shown.stdout.splitlines()
            assert told == [
                f"erased     user {user('alice').hex()} of tenant default",
                "in memory  256 KiB; of these 0 B are in use by engines, and fall when those let go",
                "on disk    272 KiB; 1 data keys are destroyed",
                "receipt    line 2 of the audit log, as follows; keep it where the log is not",
            ]
            assert json.loads(receipt)["what"] == "erased"
            assert "POST /reset_prefix_cache to each engine (llama)" in shown.stderr
            assert not load(engine, "alice", 4)
        path = server.folder / "receipt.json"
        path.write_text(on(server, "erase", "--tenant", "acme", "--user", "bob", "--json").stdout, encoding="ascii")
        verified = verify(server, "--receipt", str(path))
        assert verified.returncode == 0
        assert "audit.log: 4 lines, each as it was written" in verified.stdout
        assert "the receipt is of line 4: erased, 20" in verified.stdout
        log = server.folder / "state/audit.log"
        log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:3]))
        assert verify(server).returncode == 0
        cut = verify(server, "--receipt", str(path))
        assert (cut.returncode, cut.stdout) == (1, "")
        assert "ends after line 3, and the receipt is of line 4: at least 1 lines were cut" in cut.stderr
        other = AuditLog(server.folder)
        other.prepare()
        assert "it is forged" in verify(server, "--public-key", str(other.public_key_path)).stderr


def test_a_salt_is_read_from_standard_input() -> None:
    with serving_disk() as server:
        naming = read_secret(server.folder / "state/naming.key")
        for stdin, salt in ((b"s\xc3\xa4lt\n", "sält"), (b"salt", "salt"), (b" two \n\n", " two \n"), (b"", "")):
            shown = on(server, "erase", "--tenant", "default", "--salt-stdin", "--json", stdin=stdin)
            assert json.loads(shown.stdout)["details"]["users"] == [user_id(unsigned_user_key(naming, salt)).hex()]
        refused = on(server, "erase", "--tenant", "default", "--salt-stdin", stdin=b"secret\xff")
        assert refused.returncode == 2
        assert refused.stderr == "saltern: the salt on standard input is not UTF-8\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--tenant", "acme", "--user-id", "zz"), "--user-id: 'zz' is no id: `saltern stats` lists them, 32 digits"),
        (("--tenant", "acme", "--user-id", "00"), "--user-id: '00' is no id"),
        (("--tenant", "Acme"), "a name has 1 to 40 of a-z"),
        ((), "required: --tenant"),
        (("--tenant", "acme", "--user", "a", "--salt-stdin"), "not allowed with argument"),
    ],
)
def test_what_is_asked_wrongly_is_said_before_anybody_is_asked(arguments: tuple[str, ...], complaint: str) -> None:
    failed = saltern("erase", *arguments, "--socket", "/nowhere/admin.sock")
    assert failed.returncode == 2
    assert complaint in failed.stderr


def test_what_can_not_be_verified_is_one_line(tmp_path: Path) -> None:
    for arguments, complaint in (
        (("--log", str(tmp_path / "audit.log")), f"{tmp_path}/receipt.pub: No such file"),
        (("--log", str(tmp_path / "audit.log"), "--public-key", __file__), "is no public key: receipt.pub in the"),
    ):
        failed = saltern("audit-log", "verify", *arguments)
        assert (failed.returncode, failed.stdout) == (1, "")
        assert complaint in failed.stderr
        assert failed.stderr.count("\n") == 1
    AuditLog(tmp_path).append("tenant-set", {}, by="uid 7")
    log = ("audit-log", "verify", "--log", str(tmp_path / "audit.log"))
    assert "nowhere: No such file" in saltern(*log, "--receipt", str(tmp_path / "nowhere")).stderr
    assert "this is no receipt" in saltern(*log, "--receipt", __file__).stderr
    assert saltern(*log).returncode == 0


def test_stats_show_the_disk() -> None:
    with serving_disk(limit="none") as server, engine_at(server.path) as engine:
        store(engine, "alice", 3)
        written(server, 3)
        lines = saltern("stats", "--socket", server.path).stdout.splitlines()
        assert lines[2:4] == [
            "disk      204 KiB of 64 MiB (0%), 3 blocks, of which 0 being written and 0 being read",
            "          3 written, 0 loaded, 0 lost, 0 skipped, 0 evicted",
        ]
        assert "  on disk 204 KiB, no limit, 3 blocks; 0 loaded, 0 lost, 0 skipped" in lines


def test_the_deployment_key_is_rotated_by_a_command() -> None:
    with serving_disk() as server:
        with engine_at(server.path) as engine:
            store(engine, "alice", 3)
            written(server, 3)
        path = server.folder / "state/deployment.key"
        assert f"a new key in {path} wraps 1 users' keys: back it up" in on(server, "rotate-key").stdout
        assert json.loads(on(server, "rotate-key", "--json").stdout) == {"key-file": str(path), "keys": 1}
        server.stop()
        server.start()
        with engine_at(server.path) as engine:
            assert load(engine, "alice", 3) == [content("alice", block) for block in range(3)]


def check(server: Server, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return saltern("check", "--config", str(server.folder / "saltern.toml"), *arguments)


def test_a_disk_is_checked_and_mended_while_the_server_is_down() -> None:
    with serving_disk() as server:
        with engine_at(server.path) as engine:
            store(engine, "alice", 3)
            store(engine, "bob", 2, tenant="acme")
            written(server, 5)
        assert "another server, or a check, uses" in check(server).stderr
        server.stop()
        shown = check(server)
        assert shown.returncode == 0, shown
        assert "nothing is wrong" in shown.stdout
        assert "5 blocks are whole, 340 KiB" in shown.stdout
        read = json.loads(check(server, "--json").stdout)
        assert {(usage["tenant"], usage["records"]) for usage in read["report"]["usage"]} == {
            ("default", 3),
            ("acme", 2),
        }
        slab = server.folder / "state/disk/slab"
        with slab.open("r+b") as file:
            file.seek(300)
            byte = file.read(1)
            file.seek(300)
            file.write(bytes([byte[0] ^ 1]))
        damaged = check(server)
        assert damaged.returncode == 1
        assert "damage: 1 records are not authentic" in damaged.stdout
        assert "`saltern check --repair` would: forget them" in damaged.stdout
        key = server.folder / "state/receipt.key"
        AuditLog(server.folder / "state").append("tenant-set", {}, by="uid 7")
        key.rename(server.folder / "away")
        unwritten = check(server, "--repair")
        assert unwritten.returncode == 1
        assert f"there is no {key}" in unwritten.stderr
        assert check(server).stdout == damaged.stdout, "something was mended without a line"
        (server.folder / "away").rename(key)
        mended = check(server, "--repair")
        assert mended.returncode == 0
        assert "; done: forget them" in mended.stdout
        assert check(server).returncode == 0
        line = json.loads((server.folder / "state/audit.log").read_text(encoding="ascii").splitlines()[-1])
        assert (line["what"], line["by"]) == ("disk-repaired", f"uid {os.getuid()}, offline")
        assert line["details"]["not-authentic"] == 1
        server.start()
        assert disk_of(server).blocks == 4


def test_a_repair_that_fails_is_written_down_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_disk() as server:
        server.stop()
        (server.folder / "state/disk/index.db").write_bytes(b"SQLite format 3\0" + os.urandom(8000))

        def unlink(path: Path, *, missing_ok: bool = False) -> None:
            log = server.folder / "state/audit.log"
            assert json.loads(log.read_text(encoding="ascii"))["what"] == "disk-repaired"
            raise PermissionError(errno.EPERM, "not permitted", str(path))

        monkeypatch.setattr(Path, "unlink", unlink)
        assert main(["check", "--repair", "--config", str(server.folder / "saltern.toml")]) == 1
        monkeypatch.undo()
        begun, ended = map(json.loads, (server.folder / "state/audit.log").read_text(encoding="ascii").splitlines())
        assert (ended["what"], ended["details"]["line"]) == ("not-done", begun["serial"])
        assert "not permitted" in ended["details"]["reason"]


def test_who_is_above_a_limit_on_disk_is_named() -> None:
    with serving_disk() as server:
        with engine_at(server.path) as engine:
            store(engine, "bob", 3, tenant="acme")
            written(server, 3)
        server.stop()
        file = str(server.folder / "state/saltern.db")
        saltern("tenants", "set", "acme", "--disk-limit", "140KiB", "--disk-user-limit", "80KiB", "--offline", file)
        shown = check(server).stdout
        assert f"user {user('bob').hex()} of tenant acme has 204 KiB on disk, more than its limit of 80 KiB" in shown
        assert "tenant acme has 204 KiB on disk, more than its limit of 140 KiB; evicted at the next start" in shown
        server.start()
        until(lambda: disk_of(server).blocks == 1, "it is evicted down to its limits")
