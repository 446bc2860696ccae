"""Secret files: what only their owner may read, written whole or not at all.

A naming secret is 32 random bytes, the same for server and connector. Signing secrets are text, one a line in
hexadecimal, the newest first: an operator may carry them to the machine that signs.
"""

import os
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from saltern.core.keys import SECRET_BYTES

SIGNING_SECRETS_MAX = 2
"""Signing secrets that are valid at once: the present one, and the one before it."""


def read_secret(path: Path) -> bytes:
    """Return a file's secret. Raises OSError, or ValueError with a text for a person."""
    secret = read_private(path, hint="chmod 600 it, or delete it for a new secret")
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"{path} holds {len(secret)} bytes, a secret has {SECRET_BYTES}: delete it for a new one")
    return secret


def make_secret(path: Path) -> bytes:
    """Make a secret where there is none, whole or not at all, and return it; of two who try, both get the first's."""
    with suppress(FileExistsError):  # the other's, then
        write_private(path, secrets.token_bytes(SECRET_BYTES), replace=False)
    return read_secret(path)


def read_signing_secrets(path: Path) -> tuple[bytes, ...]:
    """Return the signing secrets of a file, newest first. Raises OSError, or ValueError with a text for a person."""
    lines = read_private(path).split()
    try:
        found = tuple(bytes.fromhex(line.decode("ascii")) for line in lines)
    except ValueError:  # UnicodeDecodeError is one
        raise ValueError(f"{path} is no list of secrets in hexadecimal, one a line") from None
    if not 1 <= len(found) <= SIGNING_SECRETS_MAX or any(len(secret) != SECRET_BYTES for secret in found):
        raise ValueError(f"{path} must hold one or two secrets of {SECRET_BYTES} bytes in hexadecimal, one a line")
    return found


def make_signing_secrets(path: Path) -> tuple[bytes, ...]:
    """Make a first signing secret where there is none; of two who try, both get the first's."""
    with suppress(FileExistsError):
        write_private(path, _lines((secrets.token_bytes(SECRET_BYTES),)), replace=False)
    return read_signing_secrets(path)


def next_signing_secrets(signing_secrets: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """Return a new secret and the present one, which stays valid until the next rotation."""
    return (secrets.token_bytes(SECRET_BYTES), *signing_secrets)[:SIGNING_SECRETS_MAX]


def write_signing_secrets(path: Path, signing_secrets: tuple[bytes, ...]) -> None:
    """Make these the signing secrets of a file. Raises OSError."""
    write_private(path, _lines(signing_secrets))


def _lines(signing_secrets: tuple[bytes, ...]) -> bytes:
    return "".join(f"{secret.hex()}\n" for secret in signing_secrets).encode()


def read_private(path: Path, *, hint: str = "chmod 600 it") -> bytes:
    """Return what is in a file that only its owner may read. Raises OSError, or ValueError with a text for a person."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_mode & 0o077:
            raise ValueError(f"others may read {path}: {hint}")
        return file.read()


def keep_private(path: Path) -> None:
    """See that a file or folder is its owner's alone.

    Raises OSError, or ValueError with a text for a person: others might have changed it, so they must say that it is
    right. What others could only read is taken from them.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o022:
        right = 700 if path.is_dir() else 600
        raise ValueError(f"others may change {path}: chmod {right} it once you trust what it says")
    if mode & 0o077:
        path.chmod(mode & 0o700)


def write_private(path: Path, content: bytes, *, replace: bool = True) -> None:
    """Write a file of mode 0600, so that a reader finds all of it or what was there before. Raises OSError."""
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=_unfinished(path))  # of mode 0600
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.rename(temporary, path)
        else:
            os.link(temporary, path)
    finally:
        with suppress(FileNotFoundError):  # it was renamed
            os.unlink(temporary)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)  # a rename that a crash undoes would bring back a revoked key
    finally:
        os.close(folder)


def delete_unfinished(path: Path) -> None:
    """Delete what a process that was killed while it wrote a private file has left beside it. Raises OSError."""
    for left in path.parent.iterdir():
        if left.name.startswith(_unfinished(path)):
            left.unlink(missing_ok=True)


def _unfinished(path: Path) -> str:
    """Return what names of unfinished files begin with: nobody's copy of a key is called so."""
    return f".{path.name}.tmp-"
