"""Secret files: 32 random bytes that only their owner can read, the same for server and connector."""

from pathlib import Path

from saltern.core.keys import SECRET_BYTES


def read_secret(path: Path) -> bytes:
    """Return a file's secret. Raises OSError, or ValueError with a text for a person."""
    mode, secret = path.stat().st_mode, path.read_bytes()
    if mode & 0o077:
        raise ValueError(f"others may read {path}: chmod 600 it, or delete it for a new secret")
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"{path} holds {len(secret)} bytes, a secret has {SECRET_BYTES}")
    return secret
