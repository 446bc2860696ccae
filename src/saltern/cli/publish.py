"""`saltern publish`: let all users read what chats with one system prompt begin with."""

import argparse
import os
import re
import sys
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from saltern.cli.output import EXIT_ASKED_WRONGLY, EXIT_FAILED, complain, table
from saltern.paths import default_admin_socket_path, default_socket_path
from saltern.sizes import format_size

if TYPE_CHECKING:
    from saltern.cli.output import Commands
    from saltern.core.snapshot import PublicationStats, SessionStats
    from saltern.operations import Answer, Operation

_Answer = TypeVar("_Answer", bound="Answer")

MARK_SECONDS = 900
"""How long the engine may take to come to the request."""

STORED_SECONDS = 30.0
"""How long what the engine has computed may take to be stored."""


class PublishError(Exception):
    """It can't be published. The text says why, and what to do."""


def add_commands(commands: "Commands") -> None:
    """Add the command's parser."""
    publish = commands.add_parser("publish", help="let all users read what chats with one system prompt begin with")
    publish.add_argument("--endpoint", metavar="URL", help="the engine's API, such as http://127.0.0.1:8000")
    what = publish.add_mutually_exclusive_group()
    what.add_argument("--system-prompt", type=Path, metavar="FILE", help="its text, as chats carry it")
    publish.add_argument("--model", help="as the API calls it (default: the only one)")
    publish.add_argument("--engine", metavar="ID", help="as `saltern stats` calls it (default: the only kind)")
    publish.add_argument("--key-file", type=Path, metavar="FILE", help="holds the operator's API key")
    publish.add_argument("--label", default="", help="what the list shows (default: the file's name)")
    what.add_argument("--list", action="store_true", help="show what is published")
    what.add_argument("--remove", type=_publication, metavar="ID", help="publish it no longer")
    publish.add_argument("--json", action="store_true", help="print for programs")
    publish.add_argument("--socket", metavar="PATH", default=str(default_socket_path()), help="default: %(default)s")
    publish.add_argument(
        "--admin-socket", metavar="PATH", default=str(default_admin_socket_path()), help="default: %(default)s"
    )
    publish.set_defaults(run=_publish)


def _publish(options: argparse.Namespace) -> int:
    from saltern.client.endpoint import EndpointError
    from saltern.client.sockets import ConnectionLost

    try:
        if options.list:
            _show(_listed(options), as_json=options.json)
        elif options.remove:
            _remove(options, options.remove)
        elif options.endpoint and options.system_prompt:
            _publish_prompt(options)
        else:
            text = "say --endpoint URL and --system-prompt FILE, or --list, or --remove ID"
            return complain(text, EXIT_ASKED_WRONGLY)
    except (ConnectionLost, EndpointError, PublishError, OSError) as error:
        return complain(str(error), EXIT_FAILED)
    return 0


def _publish_prompt(options: argparse.Namespace) -> None:
    from saltern.client.admin import fetch_stats
    from saltern.client.endpoint import Endpoint
    from saltern.core.keys import Content, content_of
    from saltern.operations import OpenPublication, PublicationOpened
    from saltern.publishing import FIELD

    key = _read(options.key_file).strip() if options.key_file else os.environ.get("SALTERN_API_KEY")
    endpoint = Endpoint(options.endpoint, key)
    prompt = _read(options.system_prompt)
    session = choose_session(fetch_stats(os.path.expanduser(options.socket)).sessions, options.engine)
    model = options.model or endpoint.model()
    tokens = endpoint.chat_prefix(model, prompt)
    blocks = len(tokens) // session.block_tokens
    if not blocks:
        raise PublishError(
            f"chats with this system prompt have {len(tokens)} tokens in common, fewer than a block of"
            f" {session.block_tokens}: there is nothing to share. A template that puts the system prompt behind"
            " the chat, or a longer prompt, would explain it"
        )
    tokens = tokens[: blocks * session.block_tokens]
    root = Content(bytes.fromhex(session.root))
    content = content_of(root, array("i", tokens), session.block_tokens)
    opened = _operate(
        options,
        OpenPublication(
            root=root,
            content=content,
            blocks=blocks,
            label=options.label or options.system_prompt.name,
            seconds=MARK_SECONDS,
        ),
        PublicationOpened,
    )
    publication = opened.publication.hex()
    try:
        endpoint.compute(model, tokens, {FIELD: opened.mark})
        stats = _wait_until_stored(options, publication)
    except BaseException:
        _remove(options, opened.publication)
        raise
    if options.json:
        _show([stats], as_json=True)
    else:
        print(f"published {stats.blocks} blocks, {len(tokens)} tokens, {format_size(stats.used_bytes)}: {publication}")


def _read(path: Path) -> str:
    """Return a file's text. Raises `PublishError`."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PublishError(f"{path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PublishError(f"{path} is not text in UTF-8") from None


def choose_session(sessions: Sequence["SessionStats"], engine: str | None) -> "SessionStats":
    """Return the engine that is named, or any of several that compute the same KV. Raises `PublishError`."""
    able = [session for session in sessions if session.state == "open" and engine in (None, session.engine)]
    if not able:
        said = f"no engine called {engine!r}" if engine else "no engine"
        raise PublishError(f"{said} is connected to the server: `saltern stats` lists them")
    if len({session.root for session in able}) > 1:
        names = ", ".join(session.engine for session in able)
        raise PublishError(f"the engines compute different KV: name one of {names} with --engine, and its --endpoint")
    if not able[0].block_tokens:
        raise PublishError("the engine's model keeps states, and those can't be published")
    return able[0]


def _wait_until_stored(options: argparse.Namespace, publication: str) -> "PublicationStats":
    until = time.monotonic() + STORED_SECONDS
    while True:
        found = [stats for stats in _listed(options) if stats.publication == publication]
        if not found:
            raise PublishError("somebody has removed it meanwhile")
        if found[0].blocks_ready == found[0].blocks:
            return found[0]
        if time.monotonic() > until:
            reason = f" ({found[0].refusal})" if found[0].refusal else ""
            raise PublishError(
                f"the engine computed the prompt, and {found[0].blocks_ready} of its {found[0].blocks} blocks were"
                f" stored{reason}. Is the endpoint that of the engine, does Saltern's connector run there,"
                " does the guarantee of the tenant public suffice,"
                " and does a middleware on the way leave kv_transfer_params in?"
            )
        time.sleep(0.1)


def _listed(options: argparse.Namespace) -> Sequence["PublicationStats"]:
    from saltern.operations import ListPublications, PublicationsListed

    return _operate(options, ListPublications(), PublicationsListed).publications


def _remove(options: argparse.Namespace, publication: bytes) -> None:
    from saltern.operations import PublicationsListed, RemovePublication

    _operate(options, RemovePublication(publication), PublicationsListed)
    print(f"removed {publication.hex()}", file=sys.stderr)


def _operate(options: argparse.Namespace, operation: "Operation", expected: type[_Answer]) -> _Answer:
    from saltern.client.admin import operate
    from saltern.operations import Failed

    answer = operate(os.path.expanduser(options.admin_socket), operation)
    if isinstance(answer, Failed):
        raise PublishError(answer.reason)
    if not isinstance(answer, expected):
        raise PublishError(f"the server answered with {type(answer).__name__}")
    return answer


def _publication(text: str) -> bytes:
    """Read an ID on the command line."""
    from saltern.core.keys import USER_ID_BYTES

    if re.fullmatch(f"[0-9a-fA-F]{{{2 * USER_ID_BYTES}}}", text) is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} names no publication: write the {2 * USER_ID_BYTES} digits that --list shows"
        )
    return bytes.fromhex(text)


def _show(publications: Sequence["PublicationStats"], *, as_json: bool) -> None:
    import msgspec

    if as_json:
        print(msgspec.json.encode(publications).decode(), flush=True)
        return
    rows = [
        (stats.publication, stats.label, f"{stats.blocks_ready} of {stats.blocks}", format_size(stats.used_bytes))
        for stats in publications
    ]
    print("\n".join(table(("publication", "label", "blocks", "size"), rows)), flush=True)
