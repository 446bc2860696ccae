"""Tests of the settings: what an operator may write, and what a wrong one is told."""

import os
from pathlib import Path
from typing import Any

import pytest

from saltern.paths import default_socket_path
from saltern.vllm.settings import LOAD_PATIENCE_MS, PATIENCE_MS, SettingsError, StoreMode, parse_settings


def test_nothing_needs_to_be_set() -> None:
    settings = parse_settings({})
    assert settings.socket == str(default_socket_path())
    assert settings.block_tokens is None
    assert settings.store is StoreMode.PROMPT
    assert not settings.require_salt
    assert settings.naming_secret is None
    assert settings.patience_seconds == PATIENCE_MS / 1000
    assert settings.load_patience_seconds == LOAD_PATIENCE_MS / 1000


def test_everything_can_be_set(tmp_path: Path) -> None:
    secret = tmp_path / "naming"
    secret.write_bytes(b"s" * 32)
    secret.chmod(0o600)
    settings = parse_settings(
        {
            "saltern.socket": "/run/saltern.sock",
            "saltern.block_tokens": 64,
            "saltern.store": "all",
            "saltern.require_salt": True,
            "saltern.secret_file": str(secret),
            "saltern.patience_ms": 20,
            "saltern.load_patience_ms": 500,
        }
    )
    assert settings.socket == "/run/saltern.sock"
    assert settings.block_tokens == 64
    assert settings.store is StoreMode.ALL
    assert settings.require_salt
    assert settings.naming_secret == b"s" * 32
    assert settings.patience_seconds == 0.02
    assert settings.load_patience_seconds == 0.5


def test_settings_of_others_are_none_of_ours() -> None:
    assert parse_settings({"other.socket": 1, "salternsocket": 2}) == parse_settings({})


def test_an_unknown_setting_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(SettingsError, match=r"'saltern\.sockets'; did you mean 'saltern\.socket'"):
        parse_settings({"saltern.sockets": "/run/saltern.sock"})


def test_an_unknown_setting_that_is_near_to_none_is_refused_with_all_names() -> None:
    with pytest.raises(SettingsError, match=r"known are saltern\.socket, .*saltern\.load_patience_ms"):
        parse_settings({"saltern.zzzzzzzzzzzzzzzzz": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("socket", 1),
        ("socket", None),
        ("block_tokens", "16"),
        ("block_tokens", True),
        ("block_tokens", 1.5),
        ("store", "some"),
        ("store", "PROMPT"),
        ("store", True),
        ("require_salt", 1),
        ("require_salt", "true"),
        ("secret_file", 1),
        ("patience_ms", "50"),
        ("patience_ms", 0),
        ("patience_ms", -1),
        ("patience_ms", 10_001),
        ("patience_ms", float("nan")),
        ("patience_ms", float("inf")),
        ("patience_ms", True),
        ("load_patience_ms", "2000"),
        ("load_patience_ms", 0),
        ("load_patience_ms", 60_001),
        ("load_patience_ms", float("nan")),
        ("load_patience_ms", True),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=rf"saltern\.{name} is .* must be"):
        parse_settings({f"saltern.{name}": value})


@pytest.mark.parametrize("content", [b"", b"s" * 31, b"s" * 33, b"s" * 32 + b"\n"])
def test_a_secret_of_the_wrong_length_is_refused_without_being_shown(tmp_path: Path, content: bytes) -> None:
    secret = tmp_path / "naming"
    secret.write_bytes(content)
    secret.chmod(0o600)
    with pytest.raises(SettingsError, match=r"saltern\.secret_file") as refusal:
        parse_settings({"saltern.secret_file": str(secret)})
    assert "sss" not in str(refusal.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_secret_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    secret = tmp_path / "naming"
    secret.write_bytes(os.urandom(32))
    secret.chmod(mode)
    with pytest.raises(SettingsError, match="chmod 600"):
        parse_settings({"saltern.secret_file": str(secret)})


@pytest.mark.parametrize("path", ["/no/such/file", "/", "a\0b", "~no-such-user/secret"])
def test_a_secret_that_can_not_be_read_is_refused(path: str) -> None:
    with pytest.raises(SettingsError, match=r"saltern\.secret_file"):
        parse_settings({"saltern.secret_file": path})
