"""Start and memory: how soon a server answers, and what its index costs, empty and full."""

import random
import time
from typing import NamedTuple

from bench.population import PROMPT_TOKENS, populate, prompt_keys, user_id
from bench.report import Report, Table, Target, spread
from bench.rounds import median, quantile
from bench.serving import Peer, Server
from saltern.core.messages import Acquire, Acquired, Release

PAGE_BYTES = 4096
PROMPT_BLOCKS = 128
MEBIBYTE = 1024 * 1024


class Size(NamedTuple):
    """How much is measured. `arena_bytes` is that of the empty server."""

    rounds: int
    arena_bytes: int
    blocks: tuple[int, ...]
    users: int
    lookups: int


FULL = Size(rounds=7, arena_bytes=1024 * MEBIBYTE, blocks=(100_000, 1_000_000), users=10_000, lookups=2_000)
SMOKE = Size(rounds=1, arena_bytes=16 * MEBIBYTE, blocks=(2_000,), users=100, lookups=10)


class _Started(NamedTuple):
    seconds: float
    anonymous_bytes: int


def run(size: Size) -> Report:
    """Start empty servers in turn, then fill one for every number of blocks."""
    started = [_start(size.arena_bytes) for _ in range(size.rounds)]
    seconds = [start.seconds for start in started]
    anonymous = [start.anonymous_bytes / MEBIBYTE for start in started]
    empty = Table(
        f"An empty server with an arena of {size.arena_bytes // MEBIBYTE:,} MiB",
        ("", "median", "rounds"),
        (
            ("process start to first answer, s", median(seconds), spread(seconds)),
            ("RssAnon, MiB", median(anonymous), spread(anonymous)),
        ),
    )
    full = Table(
        f"With an index of {size.users:,} users; lookups are Acquires of {PROMPT_BLOCKS} keys"
        f" ({PROMPT_TOKENS:,} tokens) of random users",
        ("blocks", "RssAnon MiB", "bytes per block", "lookup p50 µs", "lookup p99 µs", "stored blocks per s"),
        tuple(_filled(size, blocks, empty_bytes=int(median(anonymous) * MEBIBYTE)) for blocks in size.blocks),
    )
    return Report(
        "start",
        (empty, full),
        (
            Target("start to first answer", median(seconds), 1.0, "s"),
            Target("RssAnon with an empty index", median(anonymous) * MEBIBYTE / 1e6, 80, "MB"),
        ),
    )


def _start(arena_bytes: int) -> _Started:
    with Server(arena_bytes=arena_bytes) as server:
        return _Started(server.seconds_to_answer, server.anonymous_bytes)


def _filled(size: Size, blocks: int, *, empty_bytes: int) -> tuple[int, float, float, float, float, float]:
    with Server(arena_bytes=blocks * PAGE_BYTES, page_bytes=PAGE_BYTES, prefault=False) as server:
        peer = Peer(server.socket, block_bytes=PAGE_BYTES)
        began = time.perf_counter()
        prompts = populate(peer, users=size.users, blocks=blocks, prompt_blocks=PROMPT_BLOCKS)
        per_second = blocks / (time.perf_counter() - began)
        chance = random.Random(blocks)
        times = []
        for _ in range(size.lookups):
            user = chance.randrange(prompts)
            ask = Acquire(1, user_id(user), prompt_keys(user, PROMPT_BLOCKS), start=0)
            began = time.perf_counter()
            answer = peer.ask(ask)
            times.append((time.perf_counter() - began) * 1e6)
            assert isinstance(answer, Acquired) and answer.ready == PROMPT_BLOCKS, f"not found: {answer}"
            peer.tell(Release(answer.lease))
        anonymous = server.anonymous_bytes
        peer.close()
    per_block = (anonymous - empty_bytes) / blocks
    return blocks, anonymous / MEBIBYTE, per_block, median(times), quantile(times, 0.99), per_second
