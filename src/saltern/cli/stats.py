"""`saltern stats`: show what a server holds and has decided."""

import argparse
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from saltern.cli.output import EXIT_FAILED, complain, table
from saltern.paths import default_socket_path
from saltern.sizes import format_size

if TYPE_CHECKING:
    from saltern.cli.output import Commands
    from saltern.core.snapshot import DiskStats, Snapshot, TenantStats

USERS_SHOWN = 20


def add_commands(commands: "Commands") -> None:
    """Add the command's parser."""
    stats = commands.add_parser("stats", help="show what a server holds and has decided")
    stats.add_argument("--json", action="store_true", help="print everything, for programs")
    stats.add_argument("--socket", metavar="PATH", default=str(default_socket_path()), help="default: %(default)s")
    stats.set_defaults(run=_stats)


def _stats(options: argparse.Namespace) -> int:
    import msgspec

    from saltern.client.admin import fetch_stats
    from saltern.client.sockets import ConnectionLost

    try:
        snapshot = fetch_stats(os.path.expanduser(options.socket))
    except ConnectionLost as error:
        return complain(str(error), EXIT_FAILED)
    print(msgspec.json.encode(snapshot).decode() if options.json else describe(snapshot), flush=True)
    return 0


def describe(snapshot: "Snapshot") -> str:
    """Write a snapshot as tables for a terminal."""
    arena = snapshot.arena
    parts = [
        f"arena     {_share(arena.used_bytes, arena.total_bytes)}, pages of {format_size(arena.page_bytes)}",
        f"blocks    {arena.blocks}, of which {arena.pinned_blocks} pinned and {arena.writing_blocks} being written",
        *(_describe_disk(snapshot.disk) if snapshot.disk is not None else ()),
    ]
    for tenant in snapshot.tenants:
        parts += ["", *_describe_tenant(tenant, has_disk=snapshot.disk is not None)]
    sessions = [
        (session.engine, session.state, session.workers, format_size(session.block_bytes), session.read_leases,
         session.write_leases)
        for session in snapshot.sessions
    ]  # fmt: skip
    parts += ["", *table(("engine", "state", "workers", "block", "reads", "writes"), sessions)]
    return "\n".join(parts)


def _describe_disk(disk: "DiskStats") -> Iterable[str]:
    yield (
        f"disk      {_share(disk.used_bytes, disk.total_bytes)}, {disk.blocks} blocks, of which {disk.writing_blocks}"
        f" being written and {disk.reading_blocks} being read"
    )
    yield (
        f"          {disk.written} written, {disk.loaded} loaded, {disk.lost} lost, {disk.skipped} skipped,"
        f" {disk.evicted} evicted" + (f", {disk.expired} expired" if disk.expired else "")
    )


def _describe_tenant(tenant: "TenantStats", *, has_disk: bool) -> Iterable[str]:
    counts = tenant.counts
    refusals = {
        "over limit": counts.refused_over_limit,
        "no room": counts.refused_no_room,
        "all pinned": counts.refused_all_pinned,
        "next victim": counts.refused_next_victim,
        "in flight": counts.refused_in_flight,
        "no parent": counts.refused_no_parent,
        "no session": counts.refused_no_session,
        "not published": counts.refused_not_published,
        "erased": counts.refused_erased,
    }
    asked = counts.hit_blocks + counts.missed_blocks
    yield f"tenant    {tenant.tenant}"
    yield f"  used    {_share(tenant.used_bytes, tenant.limit_bytes)}, {tenant.blocks} blocks"
    public = f", {counts.public_blocks} of them published" if counts.public_blocks else ""
    yield f"  hits    {counts.hit_blocks} of {asked} blocks asked for in {counts.acquires} requests{public}"
    yield (
        f"  stored  {counts.stored} blocks, and {counts.stored_after_evicting} after evicting;"
        f" {counts.aborted} aborted, {counts.discarded} discarded"
    )
    if has_disk:
        yield (
            f"  on disk {_share(tenant.disk_used_bytes, tenant.disk_limit_bytes)}, {tenant.disk_blocks} blocks;"
            f" {counts.disk_loaded} loaded, {counts.disk_lost} lost, {counts.disk_skipped} skipped"
        )
    yield f"  evicted {counts.evicted} blocks" + (f", and {counts.expired} expired" if counts.expired else "")
    said = ", ".join(f"{count} {reason}" for reason, count in refusals.items() if count)
    yield f"  refused {said or 'nothing'}"
    yield ""
    header: tuple[str, ...] = ("user", "blocks", "used")
    users: list[tuple[object, ...]] = [
        (user.user, user.blocks, _share(user.used_bytes, tenant.user_limit_bytes)) for user in tenant.users
    ]
    if has_disk:
        header = (*header, "on disk")
        users = [
            (*cells, _share(user.disk_used_bytes, tenant.disk_user_limit_bytes))
            for cells, user in zip(users, tenant.users, strict=True)
        ]
    yield from table(header, users[:USERS_SHOWN])
    if tenant.users_total > USERS_SHOWN:
        yield f"and {tenant.users_total - USERS_SHOWN} more users"


def _share(used_bytes: int, limit_bytes: int | None) -> str:
    if limit_bytes is None:
        return f"{format_size(used_bytes)}, no limit"
    share = used_bytes / limit_bytes if limit_bytes else 0.0
    return f"{format_size(used_bytes)} of {format_size(limit_bytes)} ({share:.0%})"
