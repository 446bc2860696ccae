"""Secret files: 32 random bytes that only their owner can read, the same for server and connector."""

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from saltern.core.keys import SECRET_BYTES


def read_secret(path: Path) -> bytes:
    """Return a file's secret. Raises OSError, or ValueError with a text for a person."""
    mode, secret = path.stat().st_mode, path.read_bytes()
    if mode & 0o077:
        raise ValueError(f"others may read {path}: chmod 600 it, or delete it for a new secret")
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"{path} holds {len(secret)} bytes, a secret has {SECRET_BYTES}: delete it for a new one")
    return secret


def make_secret(path: Path) -> bytes:
    """Make a secret where there is none, whole or not at all, and return it; of two who try, both get the first's."""
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # of mode 0600
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):  # the other's, then
            os.link(temporary, path)
    finally:
        os.unlink(temporary)
    return read_secret(path)
