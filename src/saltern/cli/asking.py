"""How commands ask a server's admin socket, or in its place the file of a server that is down."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from saltern.cli.output import EXIT_ASKED_WRONGLY, EXIT_FAILED, complain
from saltern.paths import default_admin_socket_path

if TYPE_CHECKING:
    from saltern.operations import Answer, Operation


class AskedWronglyError(Exception):
    """The arguments can't be meant. The text says why."""


def operate(
    options: argparse.Namespace,
    make: Callable[[argparse.Namespace], "Operation"],
    show: Callable[["Answer", argparse.Namespace], None],
) -> int:
    """Ask a server for what `make` makes of the options, and `show` its answer; return the exit status."""
    import msgspec

    from saltern.client import admin
    from saltern.client.sockets import ConnectionLost
    from saltern.operations import Failed, Operation

    try:
        operation = make(options)
        msgspec.convert(msgspec.to_builtins(operation), Operation)  # names and bounds, before anybody is asked
    except AskedWronglyError as error:
        return complain(str(error), EXIT_ASKED_WRONGLY)
    except msgspec.ValidationError as error:
        return complain(_said_plainly(str(error)), EXIT_ASKED_WRONGLY)
    if options.offline is not None:
        answer: Answer = _operate_offline(Path(options.offline).expanduser(), operation)
    else:
        try:
            answer = admin.operate(os.path.expanduser(options.socket or str(default_admin_socket_path())), operation)
        except ConnectionLost as error:
            return complain(str(error), EXIT_FAILED)
    if isinstance(answer, Failed):
        return complain(answer.reason, EXIT_FAILED)
    show(answer, options)
    return 0


def _operate_offline(path: Path, operation: "Operation") -> "Answer":
    from saltern.operations import Failed
    from saltern.server.offline import operate_offline
    from saltern.server.store import StoreError

    try:
        return operate_offline(path, operation)
    except StoreError as error:
        return Failed(str(error))


def _said_plainly(error: str) -> str:
    """Turn msgspec's words about a field of a message into words about an option."""
    if "regex" in error:
        return "a name has 1 to 40 of a-z, 0-9, dot, dash and underscore, and the first is a letter or digit"
    what, _, where = error.partition(" - at `$")
    return f"--{where.rstrip('`').rpartition('.')[2].replace('_', '-')}: {what[:1].lower()}{what[1:]}"
