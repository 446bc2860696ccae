"""`saltern replay`: what a trace would hit in caches of other sizes, policies and quotas."""

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from saltern.cli.output import EXIT_ASKED_WRONGLY, EXIT_FAILED, complain, table
from saltern.sizes import format_size, parse_size

if TYPE_CHECKING:
    from saltern.cli.output import Commands
    from saltern.replay.study import Point, Study
    from saltern.replay.traces import UserColumn

T = TypeVar("T")

POLICIES = ("guaranteed", "static", "lru")
COUNT_MAX = 1000  # tenants, or public blocks: a typing error, not a plan
FACTOR_MAX = 1000


def add_commands(commands: "Commands") -> None:
    """Add the command's parser."""
    replay = commands.add_parser("replay", help="show what a trace would hit in caches of other sizes and quotas")
    replay.add_argument("trace", type=Path, metavar="TRACE", help="requests as JSON lines, in Mooncake's format")
    replay.add_argument(
        "--user", type=_typed(_user_column), metavar="COLUMN", help="what stands for the user: a field, or hash_ids[1]"
    )
    replay.add_argument(
        "--tenants",
        type=_typed(_tenants),
        default=1,
        metavar="N",
        help="hash users onto so many tenants (default: %(default)s)",
    )
    replay.add_argument(
        "--skew",
        type=_typed(_positive),
        default=0.0,
        metavar="S",
        help="make the k-th tenant 1/k^S as large as the first",
    )
    replay.add_argument("--salted", action="store_true", help="isolate every user, not only every tenant")
    replay.add_argument(
        "--public",
        type=_typed(_whole),
        default=0,
        metavar="N",
        help="publish the N first blocks of every prompt",
    )
    replay.add_argument(
        "--flood",
        type=_typed(_positive),
        default=0.0,
        metavar="X",
        help="add a tenant that stores X times the trace's blocks",
    )
    replay.add_argument(
        "--capacity",
        type=_several(_capacity),
        default=["1%", "3%", "10%", "30%"],
        metavar="SIZES",
        help="parts of all different blocks, numbers of blocks, or sizes (default: 1%%,3%%,10%%,30%%)",
    )
    replay.add_argument(
        "--block-bytes", type=_typed(parse_size), metavar="SIZE", help="the KV of one block: lets --capacity be sizes"
    )
    replay.add_argument(
        "--policy",
        type=_several(_policy),
        default=list(POLICIES),
        metavar="NAMES",
        help=f"who gives way when the cache is full (default: {','.join(POLICIES)})",
    )
    replay.add_argument(
        "--quota",
        type=_several(_part),
        default=[1.0],
        metavar="PARTS",
        help="how much of what can be promised is, in equal parts (default: 100%%)",
    )
    replay.add_argument("--json", action="store_true", help="print everything, for programs")
    replay.add_argument("--plot", type=Path, metavar="FILE", help="draw it too: .png or .svg (needs saltern[plot])")
    replay.set_defaults(run=_replay)


def _replay(options: argparse.Namespace) -> int:
    import msgspec

    from saltern.replay.plot import PlotError, check_plot, draw
    from saltern.replay.traces import TraceError

    try:
        if options.plot:
            check_plot(options.plot)
        study = _study(options)
        if options.plot:
            draw(study, options.plot)
    except TraceError as error:
        return complain(str(error), EXIT_FAILED)
    except (PlotError, ValueError) as error:
        return complain(str(error), EXIT_ASKED_WRONGLY)
    print(msgspec.json.encode(study).decode() if options.json else describe(study, options.block_bytes), flush=True)
    return 0


def _study(options: argparse.Namespace) -> "Study":
    """Play every setting that was asked for, and say on stderr how far it is. Raises `TraceError`, `ValueError`."""
    from saltern.replay.player import Policy, why_no_room
    from saltern.replay.study import Study, measure, settings
    from saltern.replay.traces import read_trace
    from saltern.replay.workload import make_workload

    trace = read_trace(options.trace, options.user)
    workload = make_workload(
        trace,
        tenants=options.tenants,
        skew=options.skew,
        salted=options.salted,
        published=options.public,
        flood=options.flood,
    )
    capacities = [_blocks(text, trace.distinct_blocks, options.block_bytes) for text in options.capacity]
    for capacity in capacities:
        if reason := why_no_room(workload, capacity):
            raise ValueError(reason)
    todo = settings([Policy(name) for name in options.policy], capacities, options.quota)
    points: list[Point] = []
    for number, setting in enumerate(todo, start=1):
        began = time.perf_counter()
        _tell(f"{number} of {len(todo)}: {setting} …")
        points.append(measure(workload, setting))
        _tell(f"{number} of {len(todo)}: hit {points[-1].hit_rate:.1%} ({time.perf_counter() - began:.1f} s)")
    return Study(
        trace=trace.name,
        requests=len(trace.requests),
        asked_blocks=trace.blocks,
        distinct_blocks=trace.distinct_blocks,
        user=str(options.user or ""),
        tenants=options.tenants,
        skew=options.skew,
        salted=options.salted,
        published_blocks=workload.published_blocks,
        flood=options.flood,
        points=tuple(points),
    )


def _tell(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


def describe(study: "Study", block_bytes: int | None = None) -> str:
    """Write a study as tables for a terminal; `block_bytes` is the KV of one block, to show sizes with."""
    whose = f"{study.user} stands for the user" if study.user else "of one user"
    parts = [
        f"trace    {study.trace}: {study.requests} requests for {study.asked_blocks} blocks,"
        f" {study.distinct_blocks} of them different",
        f"users    {whose}, {'each' if study.salted else 'each tenant'} isolated from the others",
        f"tenants  {study.tenants}, the k-th 1/k^{study.skew:g} as large as the first",
    ]
    if study.published_blocks:
        parts.append(f"public   {study.published_blocks} different blocks, which prompts begin with")
    if study.flood:
        parts.append(f"flood    a further tenant stores {study.flood:g} times the trace's blocks, none of them twice")
    tenants = [
        (share.tenant, share.requests, share.asked_blocks, share.longest_blocks) for share in study.points[0].shares
    ]
    parts += [
        "",
        *table(("tenant", "requests", "blocks", "longest"), tenants),
        "",
        "hit rates, in % of the blocks asked for",
    ]
    header = ("policy", "capacity", "quota", "all", *(share.tenant for share in study.points[0].shares), "below", "cut")
    rows: list[tuple[object, ...]] = []
    for point in study.points:
        rows += _rows(point, block_bytes)
    return "\n".join([*parts, *table(header, rows)])


def _rows(point: "Point", block_bytes: int | None) -> Iterator[tuple[object, ...]]:
    capacity = format_size(point.capacity_blocks * block_bytes) if block_bytes else point.capacity_blocks
    quota = "-" if point.policy == "lru" else f"{point.quota:.0%}"
    known = [share.requests_below for share in point.shares if share.requests_below is not None]
    cut = sum(share.requests_cut for share in point.of_the_trace)
    rates = [_percent(share.hit_blocks, share.asked_blocks) for share in point.shares]
    yield point.policy, capacity, quota, f"{100 * point.hit_rate:.1f}", *rates, sum(known) if known else "-", cut
    if known and point.policy == "guaranteed":
        alone = [_percent(share.private_hit_blocks, share.asked_blocks) for share in point.shares]
        yield "  each alone in its guarantee", "", "", "", *alone, "", ""


def _percent(part: int | None, whole: int) -> str:
    return "-" if part is None or not whole else f"{100 * part / whole:.1f}"


def _blocks(text: str, distinct_blocks: int, block_bytes: int | None) -> int:
    """Return a capacity in blocks. Raises `ValueError` with a text for a person."""
    if text.endswith("%"):
        blocks = int(distinct_blocks * _part(text))
    elif text.isdecimal():
        blocks = int(text)
    elif block_bytes is None:
        raise ValueError(f"a capacity of {text!r} needs --block-bytes, the KV of one block of the trace")
    else:
        blocks = parse_size(text) // block_bytes
    if blocks < 1:
        raise ValueError(f"a capacity of {text!r} holds no block")
    return blocks


# What the options are read with


def _typed(read: Callable[[str], T]) -> Callable[[str], T]:
    """Let argparse say what a reader says is wrong, rather than only that something is."""

    def typed(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return typed


def _several(read: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Read one or more of something, with commas between them."""
    return _typed(lambda text: [read(part.strip()) for part in text.split(",")])


def _user_column(text: str) -> "UserColumn":
    from saltern.replay.traces import parse_user_column

    return parse_user_column(text)


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) > COUNT_MAX:
        raise ValueError(f"{text!r} is no whole number up to {COUNT_MAX}")
    return int(text)


def _tenants(text: str) -> int:
    if not _whole(text):
        raise ValueError("without tenants there is nobody to serve")
    return int(text)


def _positive(text: str) -> float:
    number = float(text) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) else -1.0
    if not 0 <= number <= FACTOR_MAX:
        raise ValueError(f"{text!r} is no number from 0 to {FACTOR_MAX}")
    return number


def _part(text: str) -> float:
    part = _positive(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if part > 1:
        raise ValueError(f"{text!r} is more than the whole: write 25% or 0.25")
    return part


def _policy(text: str) -> str:
    if text not in POLICIES:
        raise ValueError(f"{text!r} is no policy: there are {', '.join(POLICIES)}")
    return text


def _capacity(text: str) -> str:
    """Check what can be without the trace; `_blocks` does the rest."""
    if text.endswith("%"):
        _part(text)
    elif not text.isdecimal():
        parse_size(text)
    return text
