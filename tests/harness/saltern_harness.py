"""Saltern as a subject: a real server on a socket of its own, for as long as a test needs it.

It knows no more of Saltern than a user does: the command that serves, the connector's name and its settings. For what
runs in one process and can be repeated, see `saltern_world`.
"""

import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .options import Options
from .subjects import Subject

ARENA = "64 MiB"
START_SECONDS_MAX = 20.0
IDLE_SECONDS = 0.0005  # replies and copies come from other processes and threads, so an idle step waits a little


@contextmanager
def saltern(options: Options, arena: str = ARENA) -> Iterator[Subject]:
    """Serve an empty cache for a while; yields the connector, its blocks as large as the engine's.

    The engine's `idle_seconds` should be `IDLE_SECONDS`.
    """
    connector = importlib.import_module("saltern.vllm.connector").SalternConnector
    with tempfile.TemporaryDirectory(prefix="saltern-harness-") as folder:
        path = str(Path(folder) / "socket")
        command = [sys.executable, "-c", "import sys; from saltern.cli import main; sys.exit(main())"]
        environment = {**os.environ, "XDG_STATE_HOME": folder}
        server = subprocess.Popen([*command, "serve", "--socket", path, "--arena", arena], env=environment)
        try:
            _await_listening(path, server)
            settings = {
                "saltern.socket": path,
                "saltern.block_tokens": options.block_tokens,
                "saltern.store": "all",
                "saltern.patience_ms": 10_000,  # a slow machine must not turn a hit into a miss
            }
            yield Subject(connector, settings)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=START_SECONDS_MAX)


def _await_listening(path: str, server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline:
        assert server.poll() is None, f"the server ended with status {server.returncode}"
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(path)
                return
        except OSError:
            time.sleep(0.01)
    raise AssertionError(f"no server listens on {path} after {START_SECONDS_MAX} s")
