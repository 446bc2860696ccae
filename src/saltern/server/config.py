"""The server's settings: one TOML file, every line of which may be left out.

[server]
socket = "/run/user/1000/saltern/saltern.sock"
socket_mode = 0o600          # for other users: 0o660 and a group, or 0o666, and allowed_uids
allowed_uids = [1000]        # who may connect; without it the server's own user
connections_max = 1024
state_folder = "~/.local/state/saltern"             # what must outlive the server
secret_file = "~/.local/state/saltern/naming.key"   # from which engines derive keys
signing_file = "~/.local/state/saltern/signing.keys"
epochs_file = "~/.local/state/saltern/epochs.json"  # which users begin anew
admin_socket = "/run/user/1000/saltern/admin.sock"  # for the server's own user, and root

[arena]
size = "4 GiB"
page_size = "64 KiB"
prefault = true
huge_pages = true

[disk]
size = "16 GiB"              # 0 for none
path = "~/.local/state/saltern/disk"
key_file = "~/.local/state/saltern/deployment.key"  # opens all that is there

[plans.gold]
guarantee = "512 MiB"        # always its own; 0 where left out
limit = "2 GiB"              # no limit where left out, or "none"
user_limit = "256 MiB"       # the same, for each user
disk_guarantee = "4 GiB"     # the same three, on disk
disk_limit = "none"
disk_user_limit = "1 GiB"
ttl = "7 days"               # since the last use; "none" keeps blocks for ever
weight = 2                   # its share of what is borrowed above guarantees; 1 where left out

[tenants.acme]
plan = "gold"                # what is said here stands above the plan
limit = "3 GiB"

[tenants.default]            # whom nobody signed for
limit = "1 GiB"

[log]
level = "info"               # debug logs every decision
format = "plain"             # or "json"
"""

import difflib
import re
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Meta, Struct

from saltern.core.disk import DISK_PAGE_BYTES
from saltern.core.tenants import is_tenant_name
from saltern.epochs import make_epochs, read_epochs
from saltern.operations import Duration, PlanSettings, Size, TenantSettings
from saltern.paths import default_socket_path, default_state_folder, make_private_folder
from saltern.secret import make_secret, make_signing_secrets, read_secret, read_signing_secrets
from saltern.server.tenancy import Layers
from saltern.sizes import format_size, parse_duration, parse_size

NAME_RULE = "1 to 40 of a-z, 0-9, dot, dash and underscore, and the first a letter or digit"

_T = TypeVar("_T")


class ConfigError(Exception):
    """A setting is wrong. The text says which, where, and what would be right."""


class ServerSettings(Struct, frozen=True):
    """The sockets, who may use them, and where files are."""

    socket: str = ""  # the default path is asked for at start, not at import
    socket_mode: Annotated[int, Meta(ge=0, le=0o777)] = 0o600
    allowed_uids: tuple[Annotated[int, Meta(ge=0)], ...] | None = None
    connections_max: Annotated[int, Meta(ge=1, le=100_000)] = 1024
    secret_file: str = ""
    state_folder: str = ""
    signing_file: str = ""
    epochs_file: str = ""
    admin_socket: str = ""

    @property
    def socket_path(self) -> Path:
        """Return where the server listens for engines."""
        return _expanded(self.socket, "server.socket") if self.socket else default_socket_path()

    @property
    def admin_socket_path(self) -> Path:
        """Return where it listens for its operator."""
        if self.admin_socket:
            return _expanded(self.admin_socket, "server.admin_socket")
        return self.socket_path.with_name("admin.sock")

    @property
    def state_path(self) -> Path:
        """Return the folder of what must outlive the server."""
        if self.state_folder:
            return _expanded(self.state_folder, "server.state_folder")
        try:
            return default_state_folder()
        except RuntimeError as error:
            raise ConfigError(f"server.state_folder: {error}: name a folder") from None

    @property
    def store_path(self) -> Path:
        """Return the file of what is set at run time."""
        return self.state_path / "saltern.db"

    @property
    def signing_path(self) -> Path:
        """Return the file of the signing secrets."""
        if self.signing_file:
            return _expanded(self.signing_file, "server.signing_file")
        return self.state_path / "signing.keys"

    @property
    def naming_path(self) -> Path:
        """Return the file of the naming secret."""
        if self.secret_file:
            return _expanded(self.secret_file, "server.secret_file")
        return self.state_path / "naming.key"

    @property
    def epochs_path(self) -> Path:
        """Return the file that says which users begin anew."""
        if self.epochs_file:
            return _expanded(self.epochs_file, "server.epochs_file")
        return self.state_path / "epochs.json"


class ArenaSettings(Struct, frozen=True):
    """The RAM tier."""

    size: Size = 4 * 1024**3
    page_size: Size = 64 * 1024  # a block wastes half of one on average
    prefault: bool = True
    huge_pages: bool = True


class DiskSettings(Struct, frozen=True):
    """The disk tier."""

    path: str = ""
    size: Size = 16 * 1024**3
    key_file: str = ""


class LogSettings(Struct, frozen=True):
    """What is logged, to stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["plain", "json"] = "plain"


class Config(Struct, frozen=True):
    """Everything that can be set."""

    server: ServerSettings = ServerSettings()
    arena: ArenaSettings = ArenaSettings()
    disk: DiskSettings = DiskSettings()
    plans: dict[str, PlanSettings] = {}
    tenants: dict[str, TenantSettings] = {}
    log: LogSettings = LogSettings()

    @property
    def disk_path(self) -> Path:
        """Return the folder of the disk tier."""
        return _expanded(self.disk.path, "disk.path") if self.disk.path else self.server.state_path / "disk"

    @property
    def deployment_key_path(self) -> Path:
        """Return the file of the key under which users' keys are kept."""
        if self.disk.key_file:
            return _expanded(self.disk.key_file, "disk.key_file")
        return self.server.state_path / "deployment.key"


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
    """Return the secret that engines derive users' keys from, made at the first start."""
    return _read_or_made("server.secret_file", settings.naming_path, read_secret, make_secret)


def signing_secrets(settings: ServerSettings) -> tuple[bytes, ...]:
    """Return the secrets that salts are signed with, newest first, made at the first start."""
    return _read_or_made("server.signing_file", settings.signing_path, read_signing_secrets, make_signing_secrets)


def check_epochs(settings: ServerSettings) -> None:
    """Make the file of epochs at the first start, and see that it can be read at any other."""
    _read_or_made("server.epochs_file", settings.epochs_path, read_epochs, make_epochs)


def _read_or_made(setting: str, path: Path, read: Callable[[Path], _T], make: Callable[[Path], _T]) -> _T:
    """Return what a file says, which is made where there is none. Raises `ConfigError`, naming the setting."""
    try:
        with suppress(FileNotFoundError):
            return read(path)
        return make(path)
    except OSError as error:
        raise ConfigError(f"{setting}: {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{setting}: {error}") from None


def make_state_folder(settings: ServerSettings) -> None:
    """Make the folder of what must outlive the server, for its own user alone."""
    path = settings.state_path
    try:
        make_private_folder(path)
        if not path.is_dir():
            raise ConfigError(f"server.state_folder: {path} is no folder")
    except OSError as error:
        raise ConfigError(f"server.state_folder: cannot make {path}: {error.strerror}; name another") from None


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
    """Return a table with its sizes and durations as numbers. Refuses names that `kind` doesn't have."""
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
        inner = _inner_kind(field.type)
        if isinstance(value, dict) and get_origin(field.type) is dict and inner is not None:
            resolved[name] = _resolve_named(path, text, value, inner, place=here)
        elif isinstance(value, dict) and inner is not None:
            resolved[name] = _resolve(path, text, value, inner, place=here)
        elif isinstance(value, str):
            resolved[name] = _number(value, field.type, f"{_at(path, text, here)}: {'.'.join(here)}")
    return resolved


def _resolve_named(
    path: Path, text: str, tree: dict[str, Any], kind: type[Struct], *, place: tuple[str, ...]
) -> dict[str, Any]:
    """Return tables that the operator has named, such as `[tenants.acme]`, resolved."""
    for name in tree:
        if not is_tenant_name(name):
            raise ConfigError(f"{_at(path, text, (*place, name))}: {'.'.join(place)}: {name!r} is no name: {NAME_RULE}")
    named: dict[str, Any] = {}
    for name, table in tree.items():
        here = (*place, name)
        inner = _resolve(path, text, table, kind, place=here) if isinstance(table, dict) else table
        try:
            named[name] = msgspec.convert(inner, kind)  # here, since what msgspec says of the whole names no table
        except msgspec.ValidationError as error:
            raise ConfigError(_say(path, text, str(error), place=here)) from None
    return named


def _inner_kind(kind: object) -> type[Struct] | None:
    """Return the Struct that a field is, or is a dictionary of."""
    inner = get_args(kind)[1] if get_origin(kind) is dict else kind
    return inner if isinstance(inner, type) and issubclass(inner, Struct) else None


def _number(value: str, kind: object, where: str) -> object:
    """Return a text as the number that a field holds, or as it is where it holds something else."""
    choices = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if NoneType in choices and value == "none" and (Size in choices or Duration in choices):
        return None
    try:
        if Size in choices:
            return parse_size(value)
        return parse_duration(value) if Duration in choices else value
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _size(text: str, where: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _say(path: Path, text: str, error: str, *, place: tuple[str, ...] = ()) -> str:
    """Turn msgspec's "Expected …, got … - at `$.table.key`" into a place in the file."""
    what, _, where = error.partition(" - at `$")
    names = re.sub(r"\[[^]]*\]", "", where.rstrip("`")).strip(".")
    place += tuple(names.split(".")) if names else ()
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
    arena = config.arena
    if arena.page_size < 4096 or arena.page_size & (arena.page_size - 1):
        raise ConfigError(f"{source}: arena.page_size: {arena.page_size} is not a power of two from 4 KiB up")
    if config.server.allowed_uids == ():
        raise ConfigError(
            f"{source}: server.allowed_uids: nobody could connect; leave it out for the server's own user"
        )
    if arena.size < arena.page_size:
        raise ConfigError(f"{source}: arena.size: {format_size(arena.size)} is less than one page")
    if 0 < config.disk.size < DISK_PAGE_BYTES:
        raise ConfigError(
            f"{source}: disk.size: {format_size(config.disk.size)} is less than one page; 0 turns the disk tier off"
        )
    reason = Layers(config.tenants, config.plans).why_not(page_bytes=arena.page_size)
    if reason is not None:
        raise ConfigError(f"{source}: {reason}")
