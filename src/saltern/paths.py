"""Where the server's socket is, unless somebody says otherwise."""

import os
from pathlib import Path


def default_socket_path() -> Path:
    """Return a path that server, engines and operator of one user agree on without being told."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime, "saltern") if runtime else Path(f"/tmp/saltern-{os.getuid()}")
    return folder / "saltern.sock"
