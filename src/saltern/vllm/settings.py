"""The connector's settings: `kv_connector_extra_config`, checked once at start."""

import difflib
import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from msgspec import Struct

from saltern.paths import default_socket_path
from saltern.secret import read_secret

PATIENCE_MS = 250.0
"""How long a request waits for the server's answer before it counts as a miss.

A round trip takes 0.1 ms, but on a machine with more work than cores a server has waited for 50 ms to run, and a
miss costs more. It is paid once for a frozen server, and never for a dead one, whose end is seen at once.
"""

LOAD_PATIENCE_MS = 2000.0
"""How long a request waits at most for blocks from the server's disk, however much computing them would take.

A disk that reads 1 GB/s brings 2 GB in that time; one that hasn't by then has a problem that waiting doesn't solve.
"""

BLOCK_TOKENS = 128
"""Tokens of a block: the smallest size at which a page of a small model is still copied at memory speed."""


KNOWN = (
    "saltern.socket",
    "saltern.block_tokens",
    "saltern.store",
    "saltern.require_salt",
    "saltern.strict",
    "saltern.secret_file",
    "saltern.patience_ms",
    "saltern.load_patience_ms",
    "saltern.server_uid",
)


class SettingsError(ValueError):
    """A setting can't be used. The text names it and says what to do."""


class StoreMode(Enum):
    """Which blocks are stored."""

    PROMPT = "prompt"
    ALL = "all"  # those of generated tokens too


class Settings(Struct, frozen=True):
    """What the operator set, in the order of the documentation."""

    socket: str
    block_tokens: int | None = None  # None: `BLOCK_TOKENS`, or vLLM's block size where that is larger
    store: StoreMode = StoreMode.PROMPT
    require_salt: bool = False
    strict: bool = False
    naming_secret: bytes | None = None  # None: the server's
    patience_seconds: float = PATIENCE_MS / 1000
    load_patience_seconds: float = LOAD_PATIENCE_MS / 1000
    server_uid: int | None = None  # who may serve us, beside root and the engine's own user


def parse_settings(extra_config: Mapping[str, Any]) -> Settings:
    """Read the `saltern.*` keys; raises `SettingsError` for one that is unknown or can't be used."""
    values = {name: value for name, value in extra_config.items() if name.startswith("saltern.")}
    for name in values:
        if name not in KNOWN:
            nearest = difflib.get_close_matches(name, KNOWN, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(KNOWN)}"
            raise SettingsError(f"kv_connector_extra_config has no setting {name!r}{hint}")
    return Settings(
        socket=os.path.expanduser(
            _checked(values, "saltern.socket", str, str(default_socket_path()), "the path of the server's socket")
        ),
        block_tokens=_checked(values, "saltern.block_tokens", int, None, "a number of tokens"),
        store=_store_mode(_checked(values, "saltern.store", str, "prompt", '"prompt" or "all"')),
        require_salt=_checked(values, "saltern.require_salt", bool, False, "true or false"),
        strict=_checked(values, "saltern.strict", bool, False, "true or false"),
        naming_secret=_secret(_checked(values, "saltern.secret_file", str, None, "the path of a file")),
        patience_seconds=_milliseconds(values, "saltern.patience_ms", PATIENCE_MS, most=10_000) / 1000,
        load_patience_seconds=_milliseconds(values, "saltern.load_patience_ms", LOAD_PATIENCE_MS, most=60_000) / 1000,
        server_uid=_checked(values, "saltern.server_uid", int, None, "a user's number"),
    )


def _checked(values: Mapping[str, Any], name: str, kind: type, default: Any, expected: str) -> Any:
    value = values.get(name, default)
    if value is default:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise SettingsError(f"{name} is {value!r}, but must be {expected}")
    return value


def _store_mode(value: str) -> StoreMode:
    try:
        return StoreMode(value)
    except ValueError:
        raise SettingsError(f'saltern.store is {value!r}, but must be "prompt" or "all"') from None


def _milliseconds(values: Mapping[str, Any], name: str, default: float, *, most: int) -> float:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise SettingsError(f"{name} is {value!r}, but must be a number of milliseconds up to {most}")
    return float(value)


def _secret(path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return read_secret(Path(path).expanduser())
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: nobody's home
        raise SettingsError(f"saltern.secret_file: {error}") from None
