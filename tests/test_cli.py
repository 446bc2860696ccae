"""What holds for the command line, run as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from saltern import __version__, cli
from saltern.core.messages import Reserve
from saltern.core.snapshot import Snapshot
from tests.server.test_loop import ALICE, keys, pin, store
from tests.support import PATIENCE_SECONDS, engine_at, serving


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
    tenant = msgspec.structs.replace(empty.tenants[0], users_total=cli.USERS_SHOWN + 5)
    assert "and 5 more users" in cli.describe(msgspec.structs.replace(empty, tenants=(tenant,)))


def test_what_is_refused_is_shown_by_reason() -> None:
    with serving(limit="64 KiB") as server, engine_at(server.path, block_bytes=128 * 1024) as engine:
        engine.ask(Reserve(request=1, user=ALICE, keys=keys(1), start=0, acquired_at=0.0))
        assert "  refused 1 over limit" in cli.describe(server.stats()).splitlines()


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
