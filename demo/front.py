"""A front: vLLM behind Saltern's middleware, where an API key says who somebody is."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from demo.engine import Engine
from demo.server import Server, connector_config
from saltern.audit import Line, parse_receipt
from saltern.core.snapshot import PublicationStats
from saltern.epochs import read_epochs
from saltern.secret import read_signing_secrets
from saltern.signing import Signed, sign, user_tag
from saltern.vllm.callers import SETTINGS_VARIABLE


class User(msgspec.Struct, frozen=True):
    """Somebody with an API key, and the tenant that is charged for it."""

    tenant: str
    name: str


ALICE, BOB = User("acme", "alice"), User("acme", "bob")
MALLORY, EVE = User("umbrella", "mallory"), User("umbrella", "eve")
ERIN, DAVE = User("hooli", "erin"), User("hooli", "dave")


class Front:
    """One vLLM that only those with a key get answers of, and the keys and signed salts of its users."""

    def __init__(self, model: Path, server: Server, folder: Path, *, patience_ms: int) -> None:
        self._server = server
        self._folder = folder
        self._settings_path = folder / "tenants.toml"
        self._key_by_user: dict[User, str] = {}
        self._operator_key_path = folder / "operator.key"
        self.engine = Engine(
            model,
            log_path=folder / "vllm.log",
            kv_transfer_config=connector_config(server.socket_path, patience_ms=patience_ms, strict=True),
            prefix_caching=False,
            extra_args=("--middleware", "saltern.vllm.TenantMiddleware"),
            env={SETTINGS_VARIABLE: str(self._settings_path)},
        )

    def start(self) -> None:
        """Give everybody a key and start vLLM. Raises `ServerError` and `EngineError`."""
        # Before the start: the middleware looks at the keys no more than once a second.
        for user in (ALICE, BOB, MALLORY, EVE, ERIN, DAVE):
            self._key_by_user[user] = self._add_key(user.tenant, "--user", user.name)
        self._operator_key_path.touch(mode=0o600)
        self._operator_key_path.write_text(self._add_key("ops", "--operator"))
        files = {
            "keys_file": self._keys_path.name,
            "signing_file": str(self._server.signing_path),
            "epochs_file": str(self._server.epochs_path),
        }
        self._settings_path.write_text("".join(f"{name} = {json.dumps(path)}\n" for name, path in files.items()))
        self.engine.start()

    def key(self, user: User) -> str:
        """Return a user's API key."""
        return self._key_by_user[user]

    def salt(self, user: User) -> str:
        """Return the signed salt that stands for a user, which no client ever gets to see."""
        secret = read_signing_secrets(self._server.signing_path)[0]
        tag = user_tag(user.tenant, user.name)
        return sign(Signed(user.tenant, tag, read_epochs(self._server.epochs_path).of(user.tenant, tag)), secret)

    def publish(self, system_prompt: str) -> PublicationStats:
        """Publish what chats with a system prompt begin with, by `saltern publish`. Raises `ServerError`."""
        path = self._folder / "system.txt"
        path.write_text(system_prompt, encoding="utf-8")
        printed = self._server.command_line(
            "publish",
            *("--endpoint", f"http://127.0.0.1:{self.engine.port}/saltern/publish"),
            *("--key-file", str(self._operator_key_path)),
            *("--system-prompt", str(path)),
            *("--socket", str(self._server.socket_path)),
            *("--admin-socket", str(self._server.admin_socket_path)),
            "--json",
        )
        (publication,) = msgspec.json.decode(printed, type=list[PublicationStats])
        return publication

    def erase(self, user: User) -> Line:
        """Erase a user by name, by `saltern erase`, and return the receipt. Raises `ServerError`."""
        printed = self._server.command_line(
            *("erase", "--tenant", user.tenant, "--user", user.name),
            *("--socket", str(self._server.admin_socket_path)),
            "--json",
        )
        return parse_receipt(printed.encode())

    def verify(self, receipt: Line) -> str:
        """Return what `saltern audit-log verify` says of a receipt. Raises `ServerError` where it doesn't hold."""
        path = self._folder / "receipt.json"
        path.write_text(receipt.text, encoding="utf-8")
        log = ("--log", str(self._server.audit_path))
        return self._server.command_line("audit-log", "verify", *log, "--receipt", str(path)).splitlines()[-1]

    @property
    def _keys_path(self) -> Path:
        return self._folder / "keys.json"

    def _add_key(self, tenant: str, *options: str) -> str:
        return self._server.command_line("keys", "add", tenant, *options, "--file", str(self._keys_path)).strip()
