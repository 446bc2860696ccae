"""Callers: the middleware's settings, and who calls, from files that may change while it runs.

The environment variable `SALTERN_TENANTS` names a TOML file, every line of which may be left out:

keys_file = "keys.json"          # API keys, as `saltern keys` keeps them; relative paths begin at this file's folder
signing_file = "signing.keys"    # signing secrets, the server's or a copy of them
epochs_file = "epochs.json"      # which users have begun anew, the server's or a copy of it
user_header = "x-user"           # names the user of a key that has none; or
user_field = "user"              # a field of the request's body that does
open = ["/metrics", "/load"]     # which of these need no key
allow_unsalted = false           # true: lets through what has no field for a salt, audio above all
body_max = "64 MiB"              # largest body of a request
"""

import logging
import os
import re
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import msgspec
from msgspec import Struct

from saltern.apikeys import ApiKey, KeysError, read_keys
from saltern.epochs import Epochs, read_epochs
from saltern.paths import default_state_folder
from saltern.secret import read_signing_secrets
from saltern.sizes import parse_size

logger = logging.getLogger(__name__)

SETTINGS_VARIABLE = "SALTERN_TENANTS"

LOOK_SECONDS = 1.0
"""How often a file may be looked at: a change counts after this long, and a request costs no look at the disk."""

_HEADERS_TAKEN = {"authorization", "content-type", "content-length", "content-encoding", "transfer-encoding", "host"}
_FIELDS_TAKEN = {"cache_salt", "kv_transfer_params", "ec_transfer_params"}

T = TypeVar("T")


class TenantsError(Exception):
    """The middleware can't start. The text says what is wrong, where, and what to do."""


class TenantsSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """What the operator set, in the order of the documentation."""

    keys_file: str = "keys.json"
    signing_file: str = "signing.keys"
    epochs_file: str = "epochs.json"
    user_header: str = ""
    user_field: str = ""
    open: tuple[Literal["/metrics", "/load"], ...] = ()
    allow_unsalted: bool = False
    body_max: int | str = "64 MiB"


class Watched(Generic[T]):
    """What a file says, read anew after it has changed. One that can't be read any more counts as it was before."""

    def __init__(self, path: Path, read: Callable[[Path], T], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._read = read
        self._clock = clock
        self._stamp = _stamp(path)  # before reading: what changes in between is read again
        self._value = read(path)
        self._look_at = clock() + LOOK_SECONDS
        self._complaint = ""

    @property
    def value(self) -> T:
        """Return what the file said when it was last whole."""
        now = self._clock()
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            self._look()
        return self._value

    def _look(self) -> None:
        try:
            stamp = _stamp(self._path)
            if stamp == self._stamp:
                return
            self._value = self._read(self._path)
        except (KeysError, OSError, ValueError) as error:
            if str(error) != self._complaint:  # once, not once a second
                self._complaint = str(error)
                logger.error("Saltern goes on with what %s said before: %s", self._path, error)
            return
        self._stamp, self._complaint = stamp, ""
        logger.info("Saltern has read %s anew", self._path)


def _stamp(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode


class Callers:
    """Who may call, and with what their salts are signed."""

    def __init__(self, settings: TenantsSettings, folder: Path) -> None:
        self.settings = settings
        self.body_bytes_max = _size(settings.body_max)
        if settings.user_header and settings.user_field:
            raise TenantsError("user_header and user_field are both set: leave one of them out")
        if settings.user_header and not re.fullmatch(r"[A-Za-z0-9-]+", settings.user_header):
            raise TenantsError(f"user_header: {settings.user_header!r} is no header's name")
        if settings.user_header.lower() in _HEADERS_TAKEN or settings.user_field in _FIELDS_TAKEN:
            taken = settings.user_header or settings.user_field
            raise TenantsError(f"{taken!r} can't name the user: it has another meaning")
        self._keys = _watched("keys_file", folder, settings.keys_file, read_keys, "make one with `saltern keys add`")
        self._secrets = _watched(
            "signing_file", folder, settings.signing_file, read_signing_secrets,
            "the server makes it at its first start; name it, or copy it here",
        )  # fmt: skip
        self._epochs = _watched(
            "epochs_file", folder, settings.epochs_file, read_epochs,
            "the server makes it at its first start; name it, or copy it here",
        )  # fmt: skip

    @property
    def key_by_digest(self) -> Mapping[str, ApiKey]:
        """Return the keys that are valid now."""
        return self._keys.value

    @property
    def signing_secret(self) -> bytes:
        """Return the newest secret."""
        return self._secrets.value[0]

    @property
    def epochs(self) -> Epochs:
        """Return who has begun anew, and how often."""
        return self._epochs.value


def load_callers(environment: Mapping[str, str] = os.environ) -> Callers:
    """Read the settings and the files that they name. Raises `TenantsError`: without all of them nobody may call."""
    name = environment.get(SETTINGS_VARIABLE)
    try:
        path = Path(name).expanduser() if name else None
        folder = path.parent if path is not None else default_state_folder()
        tree: dict[str, Any] = {} if path is None else tomllib.loads(path.read_text(encoding="utf-8"))
        return Callers(msgspec.convert(tree, TenantsSettings), folder)
    except OSError as error:
        raise TenantsError(f"{SETTINGS_VARIABLE}: {name}: {error.strerror}") from None
    except (RuntimeError, ValueError) as error:  # nobody's home; no TOML, no UTF-8, or no such setting
        raise TenantsError(f"{SETTINGS_VARIABLE}: {name or 'not set'}: {error}") from None


def _watched(name: str, folder: Path, file: str, read: Callable[[Path], T], hint: str) -> Watched[T]:
    path = folder / Path(file).expanduser()
    try:
        return Watched(path, read)
    except FileNotFoundError:
        raise TenantsError(f"{name}: there is no {path}: {hint}") from None
    except OSError as error:
        raise TenantsError(f"{name}: {path}: {error.strerror}") from None
    except (KeysError, ValueError) as error:
        raise TenantsError(f"{name}: {error}") from None


def _size(value: int | str) -> int:
    try:
        size = parse_size(value) if isinstance(value, str) else value
    except ValueError as error:
        raise TenantsError(f"body_max: {error}") from None
    if size <= 0:
        raise TenantsError(f"body_max: {value} is no size of anything")
    return size
