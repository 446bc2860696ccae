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
DISK_BYTES = 16 * 1024**3  # what a server has where nothing is said


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
    """Start empty servers in turn, without and with a disk tier, then fill one for every number of blocks."""
    alone: list[_Started] = []
    with_disk: list[_Started] = []
    for _ in range(size.rounds):
        alone.append(_start(size.arena_bytes, disk_bytes=0))
        with_disk.append(_start(size.arena_bytes, disk_bytes=DISK_BYTES))
    empty = Table(
        f"An empty server with an arena of {size.arena_bytes // MEBIBYTE:,} MiB",
        ("", "to first answer, s", "rounds", "RssAnon, MiB", "rounds"),
        (("without a disk tier", *_described(alone)), ("with an empty one", *_described(with_disk))),
    )
    anonymous_bytes = int(median([start.anonymous_bytes for start in alone]))
    full = Table(
        f"With an index of {size.users:,} users; lookups are Acquires of {PROMPT_BLOCKS} keys"
        f" ({PROMPT_TOKENS:,} tokens) of random users",
        ("blocks", "RssAnon MiB", "bytes per block", "lookup p50 µs", "lookup p99 µs", "stored blocks per s"),
        tuple(_filled(size, blocks, empty_bytes=anonymous_bytes) for blocks in size.blocks),
    )
    return Report(
        "start",
        (empty, full),
        (
            Target("start to first answer, with a disk tier", median([start.seconds for start in with_disk]), 1.0, "s"),
            Target("RssAnon with an empty index", anonymous_bytes / 1e6, 80, "MB"),
        ),
    )


def _start(arena_bytes: int, *, disk_bytes: int) -> _Started:
    with Server(arena_bytes=arena_bytes, disk_bytes=disk_bytes) as server:
        return _Started(server.seconds_to_answer, server.anonymous_bytes)


def _described(started: list[_Started]) -> tuple[float, str, float, str]:
    seconds = [start.seconds for start in started]
    anonymous = [start.anonymous_bytes / MEBIBYTE for start in started]
    return median(seconds), spread(seconds), median(anonymous), spread(anonymous)


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
