"""The tortured server: small, on real files, with four tenants that want more than there is room for."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import NamedTuple

from demo.interrupts import deferred
from demo.server import Server

ARENA, ARENA_PAGE = "6 MiB", "16 KiB"
DISK = "40 MiB"

TENANTS = {
    "default": {"disk_limit": "12 MiB", "disk_user_limit": "5 MiB"},
    "acme": {"guarantee": "256 KiB", "disk_guarantee": "6 MiB", "disk_limit": "14 MiB"},
    "bolt": {"disk_limit": "10 MiB", "disk_user_limit": "2 MiB"},
    "calm": {"disk_guarantee": "8 MiB"},  # more than its users can store
}
LOWERED_TENANT, LOWERED_BYTES = "bolt", (4 << 20, 10 << 20)
"""Whose disk limit goes down and up again while the server runs."""


END_SECONDS_MAX = 10.0

_RESTORED = re.compile(r"(\d+) blocks are there, (\d+) were damaged and (\d+) not written whole")


class Restored(NamedTuple):
    """What a server has said at its start of what it found."""

    blocks: int
    damaged: int
    torn: int


class TorturedServer(Server):
    """One `saltern serve` after the other on the same files."""

    def __init__(self, folder: Path, *, disk: str = DISK) -> None:
        super().__init__(folder, arena=ARENA, disk=disk)
        self.folder = folder
        self.state_path = folder / "state"
        self.disk_path = self.state_path / "disk"
        self.key_path = self.state_path / "deployment.key"
        self._settings["arena"]["page_size"] = ARENA_PAGE
        self._settings |= {f"tenants.{name}": settings for name, settings in TENANTS.items()}

    @property
    def naming_secret(self) -> bytes:
        """Return what users' names are derived from."""
        return self._secret_path.read_bytes()

    @property
    def config_path(self) -> Path:
        """Return the file of the settings."""
        return self._config_path

    @property
    def is_running(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.poll() is None

    def has_ended(self) -> bool:
        """Tell whether its process is gone, or will be in a moment: connections end before a killed process does."""
        deadline = time.monotonic() + END_SECONDS_MAX
        while self.is_running and time.monotonic() < deadline:
            time.sleep(0.005)
        return not self.is_running

    @property
    def log(self) -> str:
        """Return what all servers so far have said."""
        return self.log_path.read_text(errors="replace")

    def restored(self) -> Restored:
        """Return what the last server to start has found."""
        return Restored(*map(int, _RESTORED.findall(self.log)[-1]))

    def begin_to_stop(self) -> None:
        """Ask it to stop, and don't wait until it has."""
        with deferred():
            assert self._process is not None, "a server that was not started can't be stopped"
            self._process.send_signal(signal.SIGTERM)
