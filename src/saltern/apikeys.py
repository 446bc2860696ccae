"""API keys: who may use the engine, as a file of digests and never of keys.

A key is 256 random bits, so there is nothing to guess and nothing to try out: a plain SHA-256 of it hides it as well as
a slow or salted hash would, and is looked up in a dictionary. The time that a lookup takes could only tell of the
digest of what was sent, and nobody can choose that.

The file is JSON, of mode 0600, and only ever replaced as a whole:

    {"keys": [{"digest": "9f86…", "tenant": "acme", "user": "alice", "role": "user", "added": "2026-11-24"}]}
"""

import fcntl
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from hashlib import sha256
from pathlib import Path
from typing import Annotated
from unicodedata import category

import msgspec
from msgspec import Meta, Struct

from saltern.secret import read_private, write_private
from saltern.signing import is_signable

KEY_PREFIX = "sk-saltern-"
KEY_BYTES = 32

NAME_CHARACTERS_MAX = 256
"""Of a user's name."""

_SHOWN_DIGITS = 12

_UNSEEN = ("Cc", "Cs", "Zl", "Zp")
"""Unicode's categories of control characters, halves of surrogate pairs, and line and paragraph separators."""


class Role(Enum):
    """What a key is for."""

    USER = "user"
    OPERATOR = "operator"  # may also publish, and use the engine's own administration


class ApiKey(Struct, frozen=True, forbid_unknown_fields=True):
    """One key's digest and whom it stands for; without a `user`, requests name theirs or the tenant is one user."""

    digest: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    tenant: str
    user: Annotated[str, Meta(min_length=1, max_length=NAME_CHARACTERS_MAX)] | None = None
    role: Role = Role.USER
    added: str = ""  # a date, for people

    @property
    def name(self) -> str:
        """Return what the key is called, by whoever must not know it."""
        return self.digest[:_SHOWN_DIGITS]


Note = Callable[[ApiKey], None]
"""Is told of a change before it is made."""


class _File(Struct, frozen=True, forbid_unknown_fields=True):
    keys: tuple[ApiKey, ...]


class KeysError(Exception):
    """The keys file can't be used, or not for that. The text is for a person."""


def digest_of(token: str) -> str:
    """Return the digest by which a key is known."""
    return sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(path: Path) -> Mapping[str, ApiKey]:
    """Return a file's keys by digest. Raises `KeysError`."""
    try:
        keys = _decoder.decode(read_private(path)).keys
    except OSError as error:
        raise KeysError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # msgspec's are
        raise KeysError(f"{path}: {error}") from None
    for key in keys:
        if not is_signable(key.tenant):
            raise KeysError(f"{path}: key {key.name} is for {key.tenant!r}, which no tenant can be called")
    key_by_digest = {key.digest: key for key in keys}
    if len(key_by_digest) < len(keys):
        raise KeysError(f"{path}: a key is listed twice")
    return key_by_digest


def add_key(
    path: Path, *, tenant: str, user: str | None, role: Role, added: str, note: Note | None = None
) -> tuple[str, ApiKey]:
    """Make a key, the file with it if there is none, and return it: nobody can show it again. Raises `KeysError`.

    `note` is told of the key before the file is changed; if it raises, the file stays as it was.
    """
    if not is_signable(tenant):
        raise KeysError(
            f"{tenant!r} can't be a tenant: names are up to 40 of a-z, 0-9, '.', '_' and '-', begin with a letter or"
            ' a digit, and are not "public"'
        )
    if user is not None and not 1 <= len(user) <= NAME_CHARACTERS_MAX:
        raise KeysError(f"a user's name has 1 to {NAME_CHARACTERS_MAX} characters")
    if user is not None and (not user.strip() or any(category(character) in _UNSEEN for character in user)):
        raise KeysError(f"{user!r} can't be a user's name: it is blank, or has characters that nobody sees")
    token = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    key = ApiKey(digest_of(token), tenant, user, role, added)
    with _locked(path):
        present = read_keys(path) if path.exists() else {}
        if note is not None:
            note(key)
        _write(path, {**present, key.digest: key})
    return token, key


def revoke_key(path: Path, name: str, *, note: Note | None = None) -> ApiKey:
    """Remove the key that is called so, and return it; `note` as above. Raises `KeysError`.

    A key goes by its `name`, by more of its digest, or by itself. Less than the name would end another key than the one
    that was meant as soon as somebody mistypes it.
    """
    with _locked(path):
        present = read_keys(path)
        meant = [key for key in present.values() if len(name) >= _SHOWN_DIGITS and key.digest.startswith(name.lower())]
        meant = meant or [key for key in present.values() if key.digest == digest_of(name)]
        if len(meant) != 1:
            said = "several keys begin with" if meant else "there is no key"
            raise KeysError(f"{path}: {said} {name}; a key goes by the {_SHOWN_DIGITS} digits listed, or by itself")
        if note is not None:
            note(meant[0])
        _write(path, {digest: key for digest, key in present.items() if key is not meant[0]})
    return meant[0]


def _write(path: Path, key_by_digest: Mapping[str, ApiKey]) -> None:
    content = msgspec.json.format(msgspec.json.encode(_File(tuple(key_by_digest.values()))), indent=2)
    try:
        write_private(path, content + b"\n")
    except OSError as error:
        raise KeysError(f"{path}: {error.strerror}") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one change the file at a time. The lock is on its folder, since the file itself is replaced."""
    try:
        fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise KeysError(f"{path.parent}: {error.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


_decoder = msgspec.json.Decoder(_File)
