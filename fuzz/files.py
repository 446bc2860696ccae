"""What people write: the server's file, the connector's settings, secrets. A mistake is an error that says where."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from fuzz.script import Script
from saltern.secret import read_secret
from saltern.server.config import ConfigError, load_config, naming_secret
from saltern.sizes import format_size, parse_size
from saltern.vllm.settings import KNOWN, SettingsError, parse_settings

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 4096, 2**63, 2**70, 1.5, -0.0, float("nan"), float("inf"), "", "prompt", "all",
    "64 GiB", "1e9 B", "0 B", "9" * 40, "٣ GiB", "~nobody-at-all/x", "\0", "\ud800", "x" * 300, "/", [], [1], [-1],
    {}, {"a": 1}, b"x",
)  # fmt: skip
"""What a connector's setting may be given."""

SIZES = ('"1 B"', '"4 KiB"', '"64 KiB"', '"1 MiB"', '"5000 B"', '"0 B"', "4096", "0", "-1", '"9 TiB"', '"64 parsecs"')
SWITCHES = ("true", "false")
TEXTS = ('"/tmp/s.sock"', '""', '"~nobody-at-all/x"', '"\\u0000"', "1")
TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "server": {
        "socket": TEXTS,
        "socket_mode": ("0o600", "0o1000", "-1", '"rw"'),
        "allowed_uids": ("[0]", "[]", "[-1]", "[2e3]", "0"),
        "connections_max": ("1", "0", "100001"),
        "secret_file": ('""', '"~nobody-at-all/x"', '"/dev/null/x"'),
    },
    "arena": {"size": SIZES, "page_size": SIZES, "prefault": SWITCHES, "huge_pages": SWITCHES},
    "tenants.default": {"limit": SIZES, "user_limit": SIZES},
    "log": {"level": ('"debug"', '"loud"', "1"), "format": ('"json"', '"xml"')},
}
"""The server's file: every setting, and values for it, right ones and wrong ones."""

OTHER_LINES = (
    "",
    "[server",
    "[[arena]]",
    "[tenants]",
    "[server.x]",
    "x = 1",
    '"" = 1',
    "# nothing",
    "a.b = 2",
    "log = 7",
)


def play(data: bytes) -> None:
    """Read what a script writes. Raises unless it is understood, or refused as such things are."""
    script = Script(data)
    with tempfile.TemporaryDirectory(prefix="saltern-") as name:
        _read_config(Path(name), script)
        _read_secret(Path(name), script)
    _parse_settings(script)
    _parse_size(script)


def _read_config(folder: Path, script: Script) -> None:
    path = folder / "saltern.toml"
    text = "\n".join(_lines(script)).encode()
    cut = script.number(256)
    path.write_bytes(text if script.number(8) else text[:cut] + script.take(script.number(8)) + text[cut:])
    with suppress(ConfigError):
        config = load_config(path, arena=_text(script) if script.number(4) == 3 else None)
        assert config.arena.size >= config.arena.page_size
        assert config.server.socket_path.name
        if not config.server.secret_file:
            naming_secret(config.server)


def _lines(script: Script) -> list[str]:
    lines = []
    for table, settings in TABLES.items():
        if script.number(3):
            lines += [
                f"[{table}]",
                *(f"{name} = {script.choice(settings[name])}" for name in sorted(settings) if script.number(2)),
            ]
        if script.number(12) == 11:
            lines.append(script.choice(OTHER_LINES))
    return lines


def _read_secret(folder: Path, script: Script) -> None:
    path = folder / "secret"
    path.write_bytes(script.take(script.choice((32, 32, 0, 31, 33))))
    mode = script.choice((0o600, 0o400, 0o644, 0o660, 0o000))
    os.chmod(path, mode)
    with suppress(ValueError, PermissionError):
        assert len(read_secret(path)) == 32
        assert not mode & 0o077, "others may read a secret that is used"


def _parse_settings(script: Script) -> None:
    names = (*KNOWN, "saltern.", "saltern.sockt", "saltern.\n", "other")
    with suppress(SettingsError):
        settings = parse_settings({script.choice(names): script.choice(VALUES) for _ in range(script.number(5))})
        assert 0 < settings.patience_seconds <= 10


def _parse_size(script: Script) -> None:
    with suppress(ValueError):
        assert format_size(parse_size(_text(script)))


def _text(script: Script) -> str:
    return script.take(script.number(24)).decode("utf-8", "replace")
