"""`saltern keys`: make, list and revoke the API keys that the middleware knows.

What is changed goes into the audit log beside the keys file: in the state folder always, elsewhere if one is there.
"""

import argparse
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from saltern.cli.output import EXIT_FAILED, complain, table
from saltern.paths import default_state_folder, make_private_folder

if TYPE_CHECKING:
    from saltern.apikeys import ApiKey
    from saltern.cli.output import Commands

_FILE_NAME = "keys.json"


def add_commands(commands: "Commands") -> None:
    """Add the commands' parsers."""
    keys = commands.add_parser("keys", help="make, list and revoke API keys").add_subparsers(
        dest="keys_command", required=True, metavar="COMMAND"
    )
    add = keys.add_parser("add", help="make a key, and show it once")
    add.add_argument("tenant", metavar="TENANT", help="who is charged for what the key's requests store")
    add.add_argument("--user", metavar="NAME", help="whose the requests are; else they name their user")
    add.add_argument("--operator", action="store_true", help="for publishing and for the engine's administration")
    add.set_defaults(run=_add)
    show = keys.add_parser("list", help="show who has a key; the keys themselves are known to nobody")
    show.add_argument("--json", action="store_true", help="print everything, for programs")
    show.set_defaults(run=_list)
    revoke = keys.add_parser("revoke", help="make a key invalid, within a second")
    revoke.add_argument("key", metavar="KEY", help="the key's name as listed, or the key itself")
    revoke.set_defaults(run=_revoke)
    for parser in (add, show, revoke):
        parser.add_argument("--file", type=Path, metavar="PATH", help=f"default: {_FILE_NAME} in the state folder")


def _add(options: argparse.Namespace) -> int:
    from saltern.apikeys import KeysError, Role, add_key
    from saltern.audit import AuditError

    try:
        if options.file is None:
            make_private_folder(default_state_folder())
        token, key = add_key(
            _path(options),
            tenant=options.tenant,
            user=options.user,
            role=Role.OPERATOR if options.operator else Role.USER,
            added=datetime.now(UTC).date().isoformat(),
            note=lambda key: _audit(options, "key-added", key),
        )
    except (AuditError, KeysError, OSError, RuntimeError) as error:  # RuntimeError: nobody's home
        return complain(str(error), EXIT_FAILED)
    print(token, flush=True)
    complain(f"this is key {key.name} of {_whose(key.tenant, key.user)}; it can't be shown again", 0)
    return 0


def _list(options: argparse.Namespace) -> int:
    import msgspec

    from saltern.apikeys import KeysError, read_keys

    try:
        keys = list(read_keys(_path(options)).values())
    except (KeysError, RuntimeError) as error:
        return complain(str(error), EXIT_FAILED)
    if options.json:
        print(msgspec.json.encode(keys).decode())
        return 0
    rows = [
        (key.name, key.tenant, key.user if key.user is not None else "-", key.role.value, key.added) for key in keys
    ]
    print("\n".join(table(("key", "tenant", "user", "role", "added"), rows)), flush=True)
    return 0


def _revoke(options: argparse.Namespace) -> int:
    from saltern.apikeys import KeysError, revoke_key
    from saltern.audit import AuditError

    try:
        key = revoke_key(_path(options), options.key, note=lambda key: _audit(options, "key-revoked", key))
    except (AuditError, KeysError, RuntimeError) as error:
        return complain(str(error), EXIT_FAILED)
    print(f"revoked key {key.name} of {_whose(key.tenant, key.user)}", flush=True)
    return 0


def _audit(options: argparse.Namespace, what: str, key: "ApiKey") -> None:
    """Write a change down before it is made; by no user's name, since names must not outlive their users there."""
    from saltern.audit import AuditLog

    audit = AuditLog(_path(options).parent)
    if options.file is None or audit.path.exists():
        audit.append(
            what, {"key": key.name, "tenant": key.tenant, "role": key.role.value}, by=f"uid {os.getuid()}, offline"
        )


def _path(options: argparse.Namespace) -> Path:
    path: Path | None = options.file
    return default_state_folder() / _FILE_NAME if path is None else path.expanduser()


def _whose(tenant: str, user: str | None) -> str:
    return f"tenant {tenant}" if user is None else f"user {user} of tenant {tenant}"
