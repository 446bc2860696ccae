"""`saltern erase`: forget a user, in memory and on disk, and get a receipt of it."""

import argparse
import sys
from typing import TYPE_CHECKING

from saltern.cli.asking import AskedWronglyError, operate
from saltern.cli.output import complain
from saltern.paths import default_admin_socket_path
from saltern.sizes import format_size

if TYPE_CHECKING:
    from saltern.cli.output import Commands
    from saltern.operations import Answer, Operation


def add_commands(commands: "Commands") -> None:
    """Add the command's parser."""
    erase = commands.add_parser("erase", help="forget a user for ever, in all tiers, and get a receipt")
    erase.add_argument("--tenant", required=True, metavar="NAME", help="whose user; without a user, all of its users")
    user = erase.add_mutually_exclusive_group()
    user.add_argument("--user", metavar="NAME", help="by name, as the middleware knows users")
    user.add_argument("--user-id", metavar="HEX", help="by opaque id, as `saltern stats` lists users")
    user.add_argument("--salt-stdin", action="store_true", help="by the salt, read from standard input")
    erase.add_argument("--json", action="store_true", help="print the receipt alone: that is what to keep")
    erase.add_argument("--socket", metavar="PATH", help=f"the admin socket (default: {default_admin_socket_path()})")
    erase.set_defaults(run=lambda options: operate(options, _erase, _show), offline=None)


def _erase(options: argparse.Namespace) -> "Operation":
    from saltern.operations import Erase

    salt = _salt() if options.salt_stdin else None
    user = None if options.user_id is None else _user_id(options.user_id)
    return Erase(options.tenant, user_name=options.user, user=user, salt=salt)


def _salt() -> str:
    """Read a salt where neither a list of processes nor a shell's history shows it; one line end is not part of it."""
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:  # whose text would hold some of it
        raise AskedWronglyError("the salt on standard input is not UTF-8") from None


def _user_id(text: str) -> bytes:
    from saltern.core.keys import USER_ID_BYTES

    try:
        user = bytes.fromhex(text)
    except ValueError:
        user = b""
    if len(user) != USER_ID_BYTES:
        raise AskedWronglyError(f"--user-id: {text!r} is no id: `saltern stats` lists them, {2 * USER_ID_BYTES} digits")
    return user


def _show(answer: "Answer", options: argparse.Namespace) -> None:
    from saltern.audit import parse_receipt
    from saltern.operations import UserErased

    assert isinstance(answer, UserErased), f"{answer} is no answer to show"
    if not options.json:
        receipt = parse_receipt(answer.receipt.encode())
        said = receipt.details
        users = said["users"]
        whom = "all users" if users == "all" else f"user {', '.join(map(str, users))}"  # type: ignore[arg-type]
        ram, leased, disk = (format_size(int(str(said[f"{name}_bytes"]))) for name in ("ram", "leased", "disk"))
        print(f"erased     {whom} of tenant {said['tenant']}")
        print(f"in memory  {ram}; of these {leased} are in use by engines, and fall when those let go")
        print(f"on disk    {disk}; {said['keys_destroyed']} data keys are destroyed")
        print(f"receipt    line {receipt.serial} of the audit log, as follows; keep it where the log is not")
    print(answer.receipt, flush=True)
    if answer.may_be_in_vllm:
        engines = ", ".join(answer.engines) or "none is connected"
        complain(
            "vLLM's own prefix cache may hold it as well, and the same salt finds it there: send POST"
            f" /reset_prefix_cache to each engine ({engines}), or restart it",
            0,
        )
