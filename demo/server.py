"""A Saltern server as a child process, and what is asked of it, by its own commands where there is one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from demo.interrupts import deferred
from saltern.client.admin import fetch_stats
from saltern.client.sockets import ConnectionLost
from saltern.core.keys import UserKey, signed_user_key, unsigned_user_key, user_id
from saltern.core.snapshot import Snapshot, UserStats
from saltern.secret import read_signing_secrets
from saltern.signing import verify

START_SECONDS_MAX = 30.0
STOP_SECONDS_MAX = 10.0
SETTLE_SECONDS_MAX = 30.0  # storing a prompt takes milliseconds after its computation; a busy machine far longer
COMMAND_SECONDS_MAX = 300.0  # publishing waits for the engine
POLL_SECONDS = 0.02
LOG_TAIL_LINES = 20


class ServerError(Exception):
    """The server did not start, died, or didn't come to what was waited for; or a command failed."""


class Server:
    """One `saltern serve` with its settings, socket, secret and log in one folder.

    A server that was stopped or killed may be started again: it finds the same settings and the same secret, so that
    a user keeps its opaque id. What it had stored it finds only with a `disk`, of which it has none unless one is
    wanted: most of those who start servers anew expect them to be empty.
    """

    def __init__(
        self, folder: Path, *, arena: str, disk: str = "0", user_limit: str | None = None, log_level: str = "info"
    ) -> None:
        self.socket_path = folder / "saltern.sock"
        self.admin_socket_path = folder / "admin.sock"
        self.signing_path = folder / "state" / "signing.keys"
        self.epochs_path = folder / "state" / "epochs.json"
        self.audit_path = folder / "state" / "audit.log"
        self.log_path = folder / "saltern.log"
        self._secret_path = folder / "naming.key"
        self._config_path = folder / "saltern.toml"
        self._settings: dict[str, dict[str, str]] = {
            "server": {
                "socket": str(self.socket_path),
                "secret_file": str(self._secret_path),
                "state_folder": str(folder / "state"),
            },
            "arena": {"size": arena},
            "disk": {"size": disk},
            "tenants.default": {} if user_limit is None else {"user_limit": user_limit},
            "log": {"level": log_level},
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None, "a server that was not started has no process"
        return self._process.pid

    @property
    def command(self) -> list[str]:
        """What is run to start the server."""
        return [sys.executable, "-m", "saltern.cli", "serve", "--config", str(self._config_path)]

    # Life and death

    def start(self) -> None:
        """Start the server and wait until it answers. Raises `ServerError`."""
        self.spawn()
        self.await_answers()

    def spawn(self) -> None:
        """Start the server's process, and don't wait for it."""
        assert self._process is None, "a server is started once, or again after its end"
        self._config_path.write_text(_toml(self._settings))
        with deferred(), self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us: we end it when the engine is gone
            )

    def await_answers(self) -> None:
        """Wait until the server that was spawned answers. Raises `ServerError`."""
        deadline = time.monotonic() + START_SECONDS_MAX
        while time.monotonic() < deadline and self._process is not None and self._process.poll() is None:
            try:
                self.stats()
            except ConnectionLost:
                time.sleep(POLL_SECONDS)
            else:
                return
        raise ServerError(f"the server did not start.\n{self.log_tail()}")

    def stop(self) -> None:
        """Ask the server to stop, and kill it if it doesn't; does nothing when it is not running."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        self._end(signal.SIGKILL)

    def _end(self, signum: int) -> None:
        with deferred():
            if self._process is None:
                return
            self._process.send_signal(signum)
            try:
                self._process.wait(STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def log_tail(self) -> str:
        """Return the path of the log and its last lines."""
        tail = self.log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"The end of {self.log_path}:", *tail])

    # Questions and orders

    def command_line(self, *arguments: str) -> str:
        """Run `saltern` with these arguments and return what it prints. Raises `ServerError` where it fails."""
        command = [sys.executable, "-m", "saltern.cli", *arguments]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=COMMAND_SECONDS_MAX
            )
        except subprocess.TimeoutExpired as error:
            raise ServerError(f"saltern {' '.join(arguments)} took more than {error.timeout:.0f} s") from None
        if done.returncode:
            raise ServerError(f"saltern {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def set_tenant(self, name: str, *settings: str) -> None:
        """Change a tenant by `saltern tenants set`. Raises `ServerError`."""
        self.command_line("tenants", "set", name, *settings, "--socket", str(self.admin_socket_path))

    def stats(self) -> Snapshot:
        """Return what the server holds and has decided. Raises `ConnectionLost`."""
        return fetch_stats(str(self.socket_path))

    def wait_for(self, what: str, condition: Callable[[Snapshot], bool]) -> Snapshot:
        """Return the first stats that meet a condition. Raises `ServerError` when none do in time, saying `what`."""
        deadline = time.monotonic() + SETTLE_SECONDS_MAX
        snapshot = self.stats()
        while not condition(snapshot):
            if time.monotonic() > deadline:
                raise ServerError(f"waited {SETTLE_SECONDS_MAX:.0f} s in vain for {what}: the server has {snapshot}")
            time.sleep(POLL_SECONDS)
            snapshot = self.stats()
        return snapshot

    def wait_for_blocks(self, salt: str, blocks: int) -> Snapshot:
        """Wait until a user has this many blocks and nothing is being written."""
        return self.wait_for(
            f"{blocks} blocks of the user {salt!r}",
            lambda snapshot: self.user(snapshot, salt).blocks == blocks and not snapshot.arena.writing_blocks,
        )

    def user(self, snapshot: Snapshot, salt: str) -> UserStats:
        """Return what the snapshot says of the user with this salt, of whom the server knows only an opaque id."""
        opaque = self.user_id(salt).hex()
        users = (user for tenant in snapshot.tenants for user in tenant.users if user.user == opaque)
        return next(users, UserStats(user=opaque, blocks=0, used_bytes=0))

    def user_id(self, salt: str) -> bytes:
        """Return the opaque id of a user, as engines derive it from the server's secret."""
        return user_id(self._user_key(salt))

    def _user_key(self, salt: str) -> UserKey:
        naming_secret = self._secret_path.read_bytes()
        signed = verify(salt, read_signing_secrets(self.signing_path))
        if signed is None:
            return unsigned_user_key(naming_secret, salt)
        return signed_user_key(naming_secret, signed.tenant, signed.user, signed.epoch)


def connector_config(socket_path: Path | str, **settings: object) -> dict[str, object]:
    """Return what `--kv-transfer-config` needs for Saltern; `settings` are further ones, without their "saltern."."""
    return {
        "kv_connector": "SalternConnector",
        "kv_connector_module_path": "saltern.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "saltern.socket": str(socket_path),
            **{f"saltern.{name}": value for name, value in settings.items()},
        },
    }


def _toml(settings: dict[str, dict[str, str]]) -> str:
    """Write tables of strings; a string of JSON is one of TOML."""
    tables = (
        "\n".join([f"[{table}]", *(f"{name} = {json.dumps(value)}" for name, value in values.items())])
        for table, values in settings.items()
    )
    return "\n\n".join(tables) + "\n"
