"""The server's settings: one TOML file, every line of which may be left out.

[server]
socket = "/run/user/1000/saltern/saltern.sock"
socket_mode = 0o600          # for other users: 0o660 and a group, or 0o666, and allowed_uids
allowed_uids = [1000]        # who may connect; without it the server's own user
connections_max = 1024
secret_file = "naming.key"   # from which engines derive keys; without it a new secret at every start

[arena]
size = "4 GiB"
page_size = "64 KiB"
prefault = true
huge_pages = true

[tenants.default]
limit = "3 GiB"              # both: no limit where left out
user_limit = "512 MiB"

[log]
level = "info"               # debug logs every decision
format = "plain"             # or "json"
"""

import difflib
import re
import secrets
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from saltern.core.keys import SECRET_BYTES
from saltern.core.tenants import Limits
from saltern.paths import default_socket_path
from saltern.secret import make_secret, read_secret
from saltern.sizes import format_size, parse_size


class ConfigError(Exception):
    """A setting is wrong. The text says which, where, and what would be right."""


Size = Annotated[int, Meta(ge=1)]
"""A number of bytes, written as "64 GiB" or as a plain number."""


class ServerSettings(Struct, frozen=True):
    """The socket, and who may use it."""

    socket: str = ""  # the default path is asked for at start, not at import
    socket_mode: Annotated[int, Meta(ge=0, le=0o777)] = 0o600
    allowed_uids: tuple[Annotated[int, Meta(ge=0)], ...] | None = None
    connections_max: Annotated[int, Meta(ge=1, le=100_000)] = 1024
    secret_file: str = ""

    @property
    def socket_path(self) -> Path:
        """Return where the server listens."""
        return _expanded(self.socket, "server.socket") if self.socket else default_socket_path()


class ArenaSettings(Struct, frozen=True):
    """The RAM tier."""

    size: Size = 4 * 1024**3
    page_size: Size = 64 * 1024  # a block wastes half of one on average
    prefault: bool = True
    huge_pages: bool = True


class TenantSettings(Struct, frozen=True):
    """What a tenant may hold."""

    limit: Size | None = None
    user_limit: Size | None = None

    @property
    def limits(self) -> Limits:
        """Return the limits in the core's terms."""
        return Limits(limit_bytes=self.limit, user_limit_bytes=self.user_limit)


class TenantsSettings(Struct, frozen=True):
    """All tenants; users that nobody signed for belong to the one called default."""

    default: TenantSettings = TenantSettings()


class LogSettings(Struct, frozen=True):
    """What is logged, to stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["plain", "json"] = "plain"


class Config(Struct, frozen=True):
    """Everything that can be set."""

    server: ServerSettings = ServerSettings()
    arena: ArenaSettings = ArenaSettings()
    tenants: TenantsSettings = TenantsSettings()
    log: LogSettings = LogSettings()


def load_config(path: Path | None, *, socket: str | None = None, arena: str | None = None) -> Config:
    """Read the file, if there is one, and put the command line's `socket` and `arena` above it.

    Raises `ConfigError`.
    """
    config = Config() if path is None else _read(path)
    if socket is not None:
        config = msgspec.structs.replace(config, server=msgspec.structs.replace(config.server, socket=socket))
    if arena is not None:
        size = _size(arena, "--arena")
        config = msgspec.structs.replace(config, arena=msgspec.structs.replace(config.arena, size=size))
    _check(config, "the settings" if path is None else str(path))
    return config


def naming_secret(settings: ServerSettings) -> bytes:
    """Return the secret that engines derive users' keys from, made at the first start.

    Without a file it is new at every start: all that it names is in RAM and ends with the server.
    """
    if not settings.secret_file:
        return secrets.token_bytes(SECRET_BYTES)
    path = _expanded(settings.secret_file, "server.secret_file")
    try:
        with suppress(FileNotFoundError):
            return read_secret(path)
        return make_secret(path)
    except OSError as error:
        raise ConfigError(f"server.secret_file: {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"server.secret_file: {error}") from None


def _expanded(path: str, name: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # of somebody without a home
        raise ConfigError(f"{name}: {path}: {error}") from None


def _read(path: Path) -> Config:
    try:
        text = path.read_text(encoding="utf-8")
        tree = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    tree = _resolve(path, text, tree, Config, place=())
    try:
        return msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(_say(path, text, str(error))) from None


def _resolve(
    path: Path, text: str, tree: dict[str, Any], kind: type[Struct], *, place: tuple[str, ...]
) -> dict[str, Any]:
    """Return a table with its sizes as numbers. Refuses names that `kind` doesn't have."""
    field_by_name = {field.name: field for field in msgspec.structs.fields(kind)}
    resolved = dict(tree)
    for name, value in tree.items():
        here = (*place, name)
        field = field_by_name.get(name)
        if field is None:
            near = difflib.get_close_matches(name, field_by_name, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(field_by_name)}"
            where = f"in [{'.'.join(place)}]" if place else "at the top"
            raise ConfigError(f"{_at(path, text, here)}: unknown setting {name} {where}; {hint}")
        if isinstance(value, dict) and isinstance(field.type, type) and issubclass(field.type, Struct):
            resolved[name] = _resolve(path, text, value, field.type, place=here)
        elif isinstance(value, str) and field.type in (Size, Size | None):
            resolved[name] = _size(value, f"{_at(path, text, here)}: {'.'.join(here)}")
    return resolved


def _size(text: str, where: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _say(path: Path, text: str, error: str) -> str:
    """Turn msgspec's "Expected …, got … - at `$.table.key`" into a place in the file."""
    what, _, where = error.partition(" - at `$")
    place = tuple(re.sub(r"\[[^]]*\]", "", where.rstrip("`")).strip(".").split("."))
    return f"{_at(path, text, place)}: {'.'.join(place)}: {what[:1].lower()}{what[1:]}"


def _at(path: Path, text: str, place: tuple[str, ...]) -> str:
    """Return `file:line` of a setting or table, or the file alone where it is written in some unusual way."""
    table: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[([^\[\]]+)\]", line):
            table = [name.strip() for name in header[1].split(".")]
            if tuple(table) == place:
                return f"{path}:{number}"
        elif (key := re.match(r"\s*([A-Za-z0-9_.-]+)\s*=", line)) and (*table, *key[1].split(".")) == place:
            return f"{path}:{number}"
    return str(path)


def _check(config: Config, source: str) -> None:
    arena, tenant = config.arena, config.tenants.default
    if arena.page_size < 4096 or arena.page_size & (arena.page_size - 1):
        raise ConfigError(f"{source}: arena.page_size: {arena.page_size} is not a power of two from 4 KiB up")
    if config.server.allowed_uids == ():
        raise ConfigError(
            f"{source}: server.allowed_uids: nobody could connect; leave it out for the server's own user"
        )
    if arena.size < arena.page_size:
        raise ConfigError(f"{source}: arena.size: {format_size(arena.size)} is less than one page")
    for name, limit in (("limit", tenant.limit), ("user_limit", tenant.user_limit)):
        if limit is not None and limit < arena.page_size:
            raise ConfigError(
                f"{source}: tenants.default.{name}: {format_size(limit)} is less than one page of the arena"
            )
