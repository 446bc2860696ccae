"""Where the server's socket and what outlives it are, unless somebody says otherwise."""

import os
from pathlib import Path


def default_socket_path() -> Path:
    """Return a path that server, engines and operator of one user agree on without being told."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime, "saltern") if runtime else Path(f"/tmp/saltern-{os.getuid()}")
    return folder / "saltern.sock"


def default_admin_socket_path() -> Path:
    """Return where a server with the default socket listens for its operator."""
    return default_socket_path().with_name("admin.sock")


def default_state_folder() -> Path:
    """Return the folder of what must outlive the server: secrets, API keys, tenants' settings.

    Raises RuntimeError for a user without a home.
    """
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "saltern"


def make_private_folder(path: Path) -> None:
    """Make a folder that only its owner may enter, unless it is there. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
