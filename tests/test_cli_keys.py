"""`saltern keys`, run as an operator runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from saltern.apikeys import digest_of, read_keys
from saltern.audit import AuditLog, read_public_key, verify_log
from tests.support import PATIENCE_SECONDS


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def keys(state: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "saltern.cli", "keys", *arguments],
        env={**os.environ, "XDG_STATE_HOME": str(state)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def test_a_key_is_shown_once_and_kept_as_a_digest(state: Path) -> None:
    added = keys(state, "add", "acme", "--user", "alice")
    assert added.returncode == 0
    token = added.stdout.strip()
    assert token.startswith("sk-saltern-")
    assert len(token) == len("sk-saltern-") + 43
    path = state / "saltern" / "keys.json"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600
    assert token not in path.read_text()
    assert token not in added.stderr
    key = read_keys(path)[digest_of(token)]
    assert (key.tenant, key.user) == ("acme", "alice")


def test_keys_are_listed_and_revoked(state: Path) -> None:
    tokens = [keys(state, "add", *whose).stdout.strip() for whose in (("acme",), ("ops", "--operator"))]
    listed = keys(state, "list").stdout.splitlines()
    assert [line.split()[:4] for line in listed] == [
        ["key", "tenant", "user", "role"],
        [digest_of(tokens[0])[:12], "acme", "-", "user"],
        [digest_of(tokens[1])[:12], "ops", "-", "operator"],
    ]
    assert [key["tenant"] for key in json.loads(keys(state, "list", "--json").stdout)] == ["acme", "ops"]
    assert keys(state, "revoke", digest_of(tokens[0])[:12]).returncode == 0
    assert [key["tenant"] for key in json.loads(keys(state, "list", "--json").stdout)] == ["ops"]


def test_a_key_is_revoked_by_its_whole_name_and_by_nothing_shorter(state: Path) -> None:
    token = keys(state, "add", "acme").stdout.strip()
    name = digest_of(token)[:12]
    for part in ("", name[:1], name[:11]):
        refused = keys(state, "revoke", part)
        assert refused.returncode == 1
        assert "a key goes by the 12 digits listed, or by itself" in refused.stderr
    assert len(json.loads(keys(state, "list", "--json").stdout)) == 1
    assert keys(state, "revoke", name.upper()).returncode == 0
    assert keys(state, "revoke", keys(state, "add", "acme").stdout.strip()).returncode == 0
    assert json.loads(keys(state, "list", "--json").stdout) == []


def test_changes_are_in_the_audit_log_beside_the_file_and_name_no_user(state: Path, tmp_path: Path) -> None:
    token = keys(state, "add", "acme", "--user", "alice").stdout.strip()
    name = digest_of(token)[:12]
    keys(state, "revoke", name)
    keys(state, "revoke", name)  # is there no more
    log = AuditLog(state / "saltern")
    assert verify_log(log.path, read_public_key(log.public_key_path)).lines == 2
    text = log.path.read_text(encoding="utf-8")
    assert "alice" not in text
    assert token not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["what"] for line in lines] == ["key-added", "key-revoked"]
    assert lines[0]["details"] == {"key": name, "tenant": "acme", "role": "user"}
    assert lines[0]["by"] == f"uid {os.getuid()}, offline"
    assert keys(state, "add", "acme", "--file", str(tmp_path / "keys.json")).returncode == 0
    assert not (tmp_path / "audit.log").exists()


def test_no_key_is_made_that_can_not_be_written_down(state: Path) -> None:
    token = keys(state, "add", "acme").stdout.strip()
    folder = state / "saltern"
    before = (folder / "keys.json").read_bytes()
    (folder / "receipt.key").unlink()
    for arguments in (("add", "beta"), ("revoke", token)):
        refused = keys(state, *arguments)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert f"there is no {folder / 'receipt.key'}" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    assert (folder / "keys.json").read_bytes() == before


def test_what_can_not_be_done_is_one_line(state: Path, tmp_path: Path) -> None:
    for arguments, reason in (
        (("list",), "No such file"),
        (("revoke", "abc"), "No such file"),
        (("add", "Acme"), "can't be a tenant"),
        (("add", "acme", "--user", ""), "characters"),
        (("add", "acme", "--user", "   "), "'   ' can't be a user's name"),
        (("add", "acme", "--user", "al\x1bice"), r"'al\x1bice' can't be a user's name"),
        (("add", "acme", "--user", "alice\n"), r"'alice\n' can't be a user's name"),
        (("add", "acme", "--file", str(tmp_path / "nowhere" / "keys.json")), "No such file"),
    ):
        result = keys(state, *arguments)
        assert result.returncode == 1
        assert reason in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not result.stdout
