"""The command line: `saltern serve` and `saltern stats`.

Exit status: 0 done, 1 it failed, 2 it was asked wrongly (usage or settings). What each command needs is imported
by it alone, so that none waits for the others' modules.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saltern import __version__
from saltern.paths import default_socket_path
from saltern.sizes import format_size

if TYPE_CHECKING:
    from saltern.core.snapshot import Snapshot, TenantStats

EXIT_FAILED = 1
EXIT_ASKED_WRONGLY = 2
USERS_SHOWN = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return _serve(options) if options.command == "serve" else _stats(options)
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells say it
    except BrokenPipeError:
        sys.stderr.close()  # the reader of a pipe has seen enough
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="saltern", description="A multi-tenant KV cache outside the inference engine."
    )
    parser.add_argument("--version", action="version", version=f"saltern {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="run the server until SIGTERM or Ctrl-C")
    serve.add_argument("--config", type=Path, metavar="FILE", help="settings, as TOML")
    serve.add_argument("--socket", metavar="PATH", help=f"where to listen (default: {default_socket_path()})")
    serve.add_argument("--arena", metavar="SIZE", help='how much memory to cache in, such as "64 GiB"')
    stats = commands.add_parser("stats", help="show what a server holds and has decided")
    stats.add_argument("--json", action="store_true", help="print everything, for programs")
    stats.add_argument("--socket", metavar="PATH", default=str(default_socket_path()), help="default: %(default)s")
    return parser


def _serve(options: argparse.Namespace) -> int:
    from saltern.server.arena import ArenaError
    from saltern.server.config import ConfigError, load_config
    from saltern.server.listener import ListenError
    from saltern.server.serve import serve

    try:
        serve(load_config(options.config, socket=options.socket, arena=options.arena))
    except ConfigError as error:
        return _complain(str(error), EXIT_ASKED_WRONGLY)
    except (ArenaError, ListenError) as error:
        return _complain(str(error), EXIT_FAILED)
    return 0


def _stats(options: argparse.Namespace) -> int:
    import msgspec

    from saltern.client.admin import fetch_stats
    from saltern.client.sockets import ConnectionLost

    try:
        snapshot = fetch_stats(os.path.expanduser(options.socket))
    except ConnectionLost as error:
        return _complain(str(error), EXIT_FAILED)
    print(msgspec.json.encode(snapshot).decode() if options.json else describe(snapshot), flush=True)
    return 0


def _complain(text: str, status: int) -> int:
    print(f"saltern: {text}", file=sys.stderr)
    return status


def describe(snapshot: "Snapshot") -> str:
    """Write a snapshot as tables for a terminal."""
    arena = snapshot.arena
    parts = [
        f"arena     {_share(arena.used_bytes, arena.total_bytes)}, pages of {format_size(arena.page_bytes)}",
        f"blocks    {arena.blocks}, of which {arena.pinned_blocks} pinned and {arena.writing_blocks} being written",
    ]
    for tenant in snapshot.tenants:
        parts += ["", *_describe_tenant(tenant)]
    sessions = [
        (session.engine, session.state, session.workers, format_size(session.block_bytes), session.read_leases,
         session.write_leases)
        for session in snapshot.sessions
    ]  # fmt: skip
    parts += ["", *_table(("engine", "state", "workers", "block", "reads", "writes"), sessions)]
    return "\n".join(parts)


def _describe_tenant(tenant: "TenantStats") -> Iterable[str]:
    counts = tenant.counts
    refusals = {
        "over limit": counts.refused_over_limit,
        "no room": counts.refused_no_room,
        "all pinned": counts.refused_all_pinned,
        "next victim": counts.refused_next_victim,
        "no parent": counts.refused_no_parent,
        "no session": counts.refused_no_session,
    }
    asked = counts.hit_blocks + counts.missed_blocks
    yield f"tenant    {tenant.tenant}"
    yield f"  used    {_share(tenant.used_bytes, tenant.limit_bytes)}, {tenant.blocks} blocks"
    yield f"  hits    {counts.hit_blocks} of {asked} blocks asked for in {counts.acquires} requests"
    yield (
        f"  stored  {counts.stored} blocks, and {counts.stored_after_evicting} after evicting;"
        f" {counts.aborted} aborted, {counts.discarded} discarded"
    )
    yield f"  evicted {counts.evicted} blocks"
    said = ", ".join(f"{count} {reason}" for reason, count in refusals.items() if count)
    yield f"  refused {said or 'nothing'}"
    yield ""
    users = [(user.user, user.blocks, _share(user.used_bytes, tenant.user_limit_bytes)) for user in tenant.users]
    yield from _table(("user", "blocks", "used"), users[:USERS_SHOWN])
    if tenant.users_total > USERS_SHOWN:
        yield f"and {tenant.users_total - USERS_SHOWN} more users"


def _share(used_bytes: int, limit_bytes: int | None) -> str:
    if limit_bytes is None:
        return f"{format_size(used_bytes)}, no limit"
    return f"{format_size(used_bytes)} of {format_size(limit_bytes)} ({used_bytes / limit_bytes:.0%})"


def _table(header: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> list[str]:
    """Line columns up, the first to the left and the others to the right. Control characters come out escaped."""
    cells = [header, *(tuple(_printable(str(value)) for value in row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in cells
    ]  # fmt: skip


def _printable(text: str) -> str:
    """An engine names itself: keep its name from driving the operator's terminal."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


if __name__ == "__main__":
    sys.exit(main())
