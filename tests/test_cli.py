"""What holds for the command line, run as a user runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from saltern import __version__
from saltern.cli.stats import USERS_SHOWN, describe
from saltern.core.messages import Reserve
from saltern.core.snapshot import Snapshot
from tests.server.test_loop import ALICE, keys, pin, store
from tests.support import PATIENCE_SECONDS, Server, engine_at, serving


def saltern(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "saltern.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def test_it_knows_its_version() -> None:
    assert saltern("--version").stdout == f"saltern {__version__}\n"


def test_stats_are_a_table_for_people_and_json_for_programs() -> None:
    with serving(arena="1 MiB", limit="512 KiB", user_limit="256 KiB") as server:
        with engine_at(server.path, engine="llama\x1b[31m") as engine:
            store(engine, 3)
            pin(engine, 3)
            shown = saltern("stats", "--socket", server.path)
            read = saltern("stats", "--json", "--socket", server.path)
        assert shown.returncode == 0
        assert shown.stdout.splitlines() == [
            "arena     192 KiB of 1 MiB (19%), pages of 64 KiB",
            "blocks    3, of which 3 pinned and 0 being written",
            "",
            "tenant    default",
            "  used    192 KiB of 512 KiB (38%), 3 blocks",
            "  hits    3 of 3 blocks asked for in 1 requests",
            "  stored  3 blocks, and 0 after evicting; 0 aborted, 0 discarded",
            "  evicted 0 blocks",
            "  refused nothing",
            "",
            "user                              blocks                      used",
            "616c6963652020202020202020202020       3  192 KiB of 256 KiB (75%)",
            "",
            "engine         state  workers   block  reads  writes",
            "llama\\x1b[31m   open        1  64 KiB      1       0",
        ]
        snapshot = msgspec.json.decode(read.stdout, type=Snapshot)
        assert snapshot.tenants[0].user_limit_bytes == 256 * 1024
        assert snapshot.sessions[0].engine == "llama\x1b[31m"


def test_failures_are_one_line_and_tell_failing_from_asking_wrongly(tmp_path: Path) -> None:
    (tmp_path / "saltern.toml").write_text("[arena]\nsice = 1\n", encoding="utf-8")
    for arguments, status, complaint in (
        (["stats", "--socket", "/nowhere/s"], 1, "no server listens on /nowhere/s: start one with `saltern serve`"),
        (["serve", "--arena", "lots"], 2, "--arena: 'lots' is not a size"),
        (["serve", "--arena", "9000 TiB", "--socket", str(tmp_path / "s")], 1, "an arena of 9000 TiB is more than"),
        (["serve", "--config", str(tmp_path / "saltern.toml")], 2, "saltern.toml:2: unknown setting sice in [arena]"),
        (["serve", "--socket", "/proc/s"], 1, "cannot listen on /proc/s"),
    ):
        failed = saltern(*arguments)
        assert failed.returncode == status, failed
        assert complaint in failed.stderr
        assert failed.stderr.startswith("saltern: ")
        assert failed.stderr.count("\n") == 1
    assert saltern("serve", "--no-such-option").returncode == 2
    assert saltern().returncode == 2
    assert not (tmp_path / "s").exists()


def test_the_default_socket_is_where_both_sides_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert f"no server listens on {tmp_path}/saltern/saltern.sock" in saltern("stats").stderr


def imported_by(arguments: list[str]) -> set[str]:
    """Return the modules that a command has imported when it fails at its first real step."""
    code = f"import sys; from saltern.cli import main; main({arguments!r}); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_commands_import_only_what_they_need() -> None:
    stats = imported_by(["stats", "--socket", "/nowhere/s"])
    assert "saltern.client.admin" in stats
    assert not {name for name in stats if name.startswith("saltern.server")}
    serve = imported_by(["serve", "--arena", "lots"])
    assert "saltern.server.serve" in serve
    assert not {"numpy", "torch", "vllm", "asyncio", "saltern.client"} & serve


def test_an_empty_server_is_small() -> None:
    with serving(arena="64 MiB", prefault=True) as server:
        status = Path(f"/proc/{server.pid}/status").read_text(encoding="utf-8")
        anonymous = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:"))
        assert anonymous < 80 * 1024


def test_more_users_than_a_terminal_holds_are_counted() -> None:
    with serving() as server:
        empty = server.stats()
    tenant = msgspec.structs.replace(empty.tenants[0], users_total=USERS_SHOWN + 5)
    assert "and 5 more users" in describe(msgspec.structs.replace(empty, tenants=(tenant,)))


def test_what_is_refused_is_shown_by_reason() -> None:
    with serving(limit="64 KiB") as server, engine_at(server.path, block_bytes=128 * 1024) as engine:
        engine.ask(Reserve(request=1, user=ALICE, keys=keys(1), start=0, acquired_at=0.0))
        assert "  refused 1 over limit" in describe(server.stats()).splitlines()


def test_the_reader_of_a_pipe_may_leave_early() -> None:
    with serving() as server:
        receiver, sender = os.pipe()
        os.close(receiver)
        run = subprocess.run(
            [sys.executable, "-m", "saltern.cli", "stats", "--socket", server.path],
            stdout=sender,
            stderr=subprocess.PIPE,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        os.close(sender)
        assert b"Traceback" not in run.stderr


def on(server: Server, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a command against a server's admin socket."""
    return saltern(*arguments, "--socket", str(server.admin_path))


def test_tenants_are_set_and_listed_with_where_each_value_comes_from() -> None:
    with serving(tenants={"acme": {"plan": "gold"}}, plans={"gold": {"guarantee": "8 MiB", "ttl": "7 days"}}) as server:
        made = on(server, "quota", "set", "acme", "--limit", "16MiB", "--weight", "2.5", "--user-limit", "none")
        assert made.stdout.splitlines() == [
            "tenant           acme",
            "used             0 B, 0 users",
            "used on disk     0 B",
            "guarantee        8 MiB (plan gold)",
            "limit            16 MiB (run time)",
            "user limit       none (run time)",
            "disk guarantee   0 B",
            "disk limit       none",
            "disk user limit  none",
            "ttl              7 d (plan gold)",
            "weight           2.5 (run time)",
            "plan             gold (file)",
        ]
        assert on(server, "tenants", "get", "acme").stdout == made.stdout
        listed = on(server, "tenants", "list").stdout
        assert [re.split("  +", line) for line in listed.splitlines()] == [
            ["tenant", "used", "on disk", "guarantee", "limit", "user limit", "ttl", "weight", "plan"],
            [
                "acme",
                "0 B",
                "0 B",
                "8 MiB (plan gold)",
                "16 MiB (run time)",
                "none (run time)",
                "7 d (plan gold)",
                "2.5 (run time)",
                "gold (file)",
            ],
            ["default", "0 B", "0 B", "0 B", "none", "none", "none", "1", "none"],
            [""],
            ["guaranteed 8 MiB of an arena of 64 MiB"],
        ]
        read = msgspec.json.decode(on(server, "tenants", "list", "--json").stdout)
        assert read["guaranteed-bytes"] == 8 * 1024**2
        assert read["tenants"][0]["limit"] == {"value": 16 * 1024**2, "origin": "run time"}
        assert "limit            none\n" in on(server, "tenants", "set", "acme", "--limit", "inherit").stdout
        assert "weight           1\n" in on(server, "tenants", "remove", "acme").stdout
        on(server, "tenants", "set", "acme", "--disk-limit", "1GiB", "--disk-guarantee", "1MiB")
        header, acme, *_ = (re.split("  +", line) for line in on(server, "quota", "list").stdout.splitlines())
        assert header[4:8] == ["limit", "user limit", "disk guarantee", "disk limit"]
        assert acme[6:8] == ["1 MiB (run time)", "1 GiB (run time)"]


def test_the_default_tenant_is_shown_though_nobody_has_set_anything() -> None:
    with serving(start=False) as server:
        path = server.folder / "saltern.toml"
        path.write_text(path.read_text(encoding="utf-8").replace("[tenants.default]", ""), encoding="utf-8")
        server.start()
        rows = [line.split() for line in on(server, "tenants", "list").stdout.splitlines()]
        assert [row[0] for row in rows if row] == ["tenant", "default", "guaranteed"]
        shown = on(server, "tenants", "get", "default").stdout
        assert "tenant           default\nused             0 B, 0 users\n" in shown


def test_what_holds_for_no_publication_is_not_set() -> None:
    with serving() as server:
        assert on(server, "tenants", "set", "public", "--guarantee", "1MiB", "--disk-limit", "1GiB").returncode == 0
        for option, value in (("limit", "1GiB"), ("user-limit", "1MiB"), ("ttl", "7d"), ("weight", "2")):
            refused = on(server, "tenants", "set", "public", f"--{option}", value)
            assert refused.returncode == 1
            assert f"tenants.public.{option.replace('-', '_')} (run time): what is published has the" in refused.stderr
        assert "limit            none\n" in on(server, "tenants", "get", "public").stdout


def test_publishing_says_what_it_was_asked_wrongly(tmp_path: Path) -> None:
    publication = "5b1f0e6c0a3d4c57a8a1b64d0f2e9c11"
    binary = tmp_path / "system.bin"
    binary.write_bytes(b"\xff")
    prompt = ["--endpoint", "http://127.0.0.1:9", "--system-prompt"]
    for arguments, status, complaint in (
        (["--list", "--remove", publication], 2, "--remove: not allowed with argument --list"),
        (["--remove", "zz"], 2, "--remove: 'zz' names no publication: write the 32 digits that --list shows"),
        (["--remove", publication[:31] + " "], 2, "names no publication"),
        ([*prompt, str(tmp_path / "none.txt")], 1, f"saltern: {tmp_path / 'none.txt'} can't be read: No such file"),
        ([*prompt, str(binary)], 1, f"saltern: {binary} is not text in UTF-8"),
        ([*prompt, str(binary), "--key-file", "/nowhere/key"], 1, "saltern: /nowhere/key can't be read: No such file"),
    ):
        failed = saltern("publish", *arguments)
        assert failed.returncode == status, failed
        assert complaint in failed.stderr


def test_plans_are_set_listed_and_removed() -> None:
    with serving() as server:
        assert on(server, "plans", "list").stdout == "no plans\n"
        on(server, "plans", "set", "gold", "--guarantee", "1 MiB", "--limit", "none")
        assert on(server, "tenants", "set", "acme", "--plan", "gold").returncode == 0
        assert on(server, "plans", "list").stdout.splitlines() == [
            "plan         guarantee            limit  user limit  ttl  weight  tenants",
            "gold  1 MiB (run time)  none (run time)           -    -       -     acme",
        ]
        (plan,) = msgspec.json.decode(on(server, "plans", "list", "--json").stdout)["plans"]
        assert plan["tenants"] == ["acme"]
        failed = on(server, "plans", "remove", "gold")
        assert (failed.returncode, failed.stdout) == (1, "")
        assert "nobody has defined the plan gold" in failed.stderr
        on(server, "tenants", "set", "acme", "--plan", "none")
        assert on(server, "plans", "remove", "gold").stdout == "no plans\n"


def test_what_is_asked_wrongly_is_said_before_anybody_is_asked() -> None:
    for arguments, complaint in (
        (["set", "acme"], "set what of acme? Name a setting, such as --limit 2GiB"),
        (["set", "Acme", "--limit", "0"], "a name has 1 to 40 of a-z"),
        (["get", "../acme"], "a name has 1 to 40 of a-z"),
        (["set", "acme", "--limit", "much"], "--limit: 'much' is not a size"),
        (["set", "acme", "--ttl", "soon"], "--ttl: 'soon' is not a duration"),
        (["set", "acme", "--ttl", "0"], "--ttl: expected `float` > 0"),
        (["set", "acme", "--weight", "heavy"], "--weight: 'heavy' is not a number"),
        (["set", "acme", "--weight", "nan"], "--weight: expected `float` >="),
        (["set", "acme", "--guarantee", "none"], "--guarantee: write a number"),
    ):
        failed = saltern("tenants", *arguments, "--socket", "/nowhere/admin.sock")
        assert failed.returncode == 2, failed
        assert complaint in failed.stderr
        assert failed.stderr.count("\n") == 1
    failed = saltern("tenants", "list", "--socket", "/nowhere/admin.sock")
    assert failed.returncode == 1
    assert "no server listens on /nowhere/admin.sock" in failed.stderr


def test_a_server_that_does_not_start_any_more_is_mended_offline() -> None:
    with serving() as server:
        on(server, "tenants", "set", "acme", "--guarantee", "40 MiB")
        file = str(server.folder / "state/saltern.db")
        busy = saltern("tenants", "list", "--offline", file)
        assert busy.returncode == 1
        assert f"a server uses {file}: ask it by its admin socket, without --offline" in busy.stderr
        server.stop()
        settings = (server.folder / "saltern.toml").read_text(encoding="utf-8")
        (server.folder / "saltern.toml").write_text(settings.replace('"64 MiB"', '"32 MiB"'), encoding="utf-8")
        with pytest.raises(AssertionError, match="does not fit these settings"):
            server.start()
        mended = saltern("tenants", "set", "acme", "--guarantee", "4 MiB", "--offline", file)
        assert "guarantee        4 MiB (run time)" in mended.stdout
        server.start()
        assert "guarantee        4 MiB (run time)" in on(server, "tenants", "get", "acme").stdout
    missing = saltern("tenants", "list", "--offline", file)
    assert (missing.returncode, missing.stderr) == (1, f"saltern: {file}: there is no such file\n")


def test_the_signing_secret_is_rotated_by_a_command() -> None:
    with serving() as server:
        path = server.folder / "state/signing.keys"
        before = path.read_text(encoding="ascii").split()
        assert f"in {path}; the one before it stays valid" in on(server, "rotate-signing").stdout
        after = path.read_text(encoding="ascii").split()
        assert len(after) == 2
        assert after[1:] == before
        assert msgspec.json.decode(on(server, "rotate-signing", "--json").stdout) == {"signing-file": str(path)}
