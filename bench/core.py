"""The core alone, in this process: how many decisions it makes a second with a full index, and what keys cost."""

import gc
import random
import time
from array import array
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import NamedTuple

from bench.population import PROMPT_TOKENS, populate, prompt_keys, store, user_id
from bench.report import Report, Table, spread
from bench.rounds import interleaved, median, seconds_of
from saltern.core.cache import Cache
from saltern.core.effects import Effect, Received, Send
from saltern.core.keys import Key, block_key, namespace_content, next_content, unsigned_user_key
from saltern.core.messages import (
    NAME_BYTES,
    Acquire,
    Acquired,
    Lookup,
    Release,
    Reply,
    Request,
    SchedulerHello,
    WorkerHello,
)

PAGE_BYTES = 4096
PROMPT_BLOCKS = 128
STORED_BLOCKS = 32  # 8,192 tokens in blocks of 256: what one step of a large engine fills


class Size(NamedTuple):
    """How much is measured."""

    blocks: int
    users: int
    rounds: int
    calls: int


FULL = Size(blocks=1_000_000, users=10_000, rounds=7, calls=300)
SMOKE = Size(blocks=2_000, users=100, rounds=2, calls=3)


class _Direct:
    """A core with one open session, asked without a socket."""

    def __init__(self, pages: int) -> None:
        self.cache = Cache(pages=pages, page_bytes=PAGE_BYTES)
        self._ticks = count(1)
        name = bytes(NAME_BYTES)
        self._handle(1, WorkerHello("engine", name, rank=0, world_size=1, outlives_socket=False))
        self._handle(2, SchedulerHello("engine", bytes(NAME_BYTES), (name,), PAGE_BYTES))

    def ask(self, message: Request) -> Reply:
        """Return the answer to a message."""
        (reply,) = [effect.message for effect in self._handle(2, message) if isinstance(effect, Send)]
        return reply

    def tell(self, message: Request) -> None:
        """Hand over a message that has no answer."""
        self._handle(2, message)

    def _handle(self, connection: int, message: Request) -> list[Effect]:
        return self.cache.handle(Received(connection, message), now=float(next(self._ticks)))


def run(size: Size) -> Report:
    """Fill a core to its last page and measure each verb; then make keys as a connector does."""
    gc.disable()  # as the server does
    try:
        return Report("core", (_decisions(size), _keys(size)))
    finally:
        gc.enable()


def _decisions(size: Size) -> Table:
    direct = _Direct(size.blocks)
    began = time.perf_counter()
    prompts = populate(direct, users=size.users, blocks=size.blocks, prompt_blocks=PROMPT_BLOCKS)
    newcomers = count(size.users)
    while direct.cache.pool.free_pages:
        store(direct, next(newcomers), 1)
    filled_seconds = time.perf_counter() - began
    evicted_before = direct.cache.default_tenant.tally.evicted
    measures = {
        f"Lookup of {PROMPT_BLOCKS} keys": lambda: _look_up(direct, prompts, size.calls),
        f"Acquire and Release of {PROMPT_BLOCKS} keys": lambda: _acquire(direct, prompts, size.calls),
        f"Reserve and Commit of {STORED_BLOCKS} blocks that evict as many": lambda: _store(
            direct, newcomers, size.calls
        ),
    }
    results = interleaved(measures, size.rounds)
    evicted = direct.cache.default_tenant.tally.evicted - evicted_before
    assert evicted >= size.rounds * size.calls * STORED_BLOCKS, f"no more than {evicted} blocks were evicted"
    rows = []
    for (name, seconds), blocks in zip(results.items(), (PROMPT_BLOCKS, PROMPT_BLOCKS, STORED_BLOCKS), strict=True):
        each = median(seconds)
        rows.append((name, each * 1e6, spread([value * 1e6 for value in seconds]), 1 / each, blocks / each))
    title = (
        f"Decisions with {size.blocks:,} blocks of {size.users:,} users and no free page"
        f" (filled in {filled_seconds:.1f} s)"
    )
    return Table(title, ("", "µs", "µs, rounds", "per s", "blocks per s"), tuple(rows))


def _look_up(direct: _Direct, prompts: int, calls: int) -> float:
    asked = _some_prompts(prompts, calls)
    began = time.perf_counter()
    for user, keys in asked:
        direct.ask(Lookup(1, user_id(user), keys))
    return (time.perf_counter() - began) / calls


def _acquire(direct: _Direct, prompts: int, calls: int) -> float:
    asked = _some_prompts(prompts, calls)
    began = time.perf_counter()
    for user, keys in asked:
        acquired = direct.ask(Acquire(1, user_id(user), keys, start=0))
        assert isinstance(acquired, Acquired)
        if acquired.lease:
            direct.tell(Release(acquired.lease))
    return (time.perf_counter() - began) / calls


def _store(direct: _Direct, newcomers: "count[int]", calls: int) -> float:
    """Store prompts of new users; the making of their keys, a tenth of it, is counted as well."""
    began = time.perf_counter()
    for _ in range(calls):
        store(direct, next(newcomers), STORED_BLOCKS)
    return (time.perf_counter() - began) / calls


def _some_prompts(prompts: int, calls: int) -> list[tuple[int, tuple[Key, ...]]]:
    """Return prompts from all over the index, whose blocks are in no processor's cache.

    The later half of them: what `_store` evicts is the earlier.
    """
    chance = random.Random(prompts)
    users = [chance.randrange(prompts // 2, prompts) for _ in range(calls)]
    return [(user, prompt_keys(user, PROMPT_BLOCKS)) for user in users]


def _keys(size: Size) -> Table:
    """Measure what a connector does once for every prompt before it can ask."""
    token_ids = list(range(PROMPT_TOKENS))
    user_key = unsigned_user_key(bytes(32), "salt")
    tokens = array("i", token_ids)

    def hashing(block_tokens: int) -> Callable[[], object]:
        def work() -> None:
            content = namespace_content(b"namespace")
            for start in range(0, PROMPT_TOKENS, block_tokens):
                content = next_content(content, tokens[start : start + block_tokens].tobytes())
                block_key(user_key, content)

        return work

    works: dict[str, Callable[[], object]] = {
        "token ids to int32": lambda: array("i", token_ids),
        "keys of 128 blocks of 256": hashing(256),
        "keys of 256 blocks of 128": hashing(128),
    }
    results = interleaved({name: partial(seconds_of, work) for name, work in works.items()}, max(size.rounds * 5, 2))
    rows = tuple((name, median(seconds) * 1e6, min(seconds) * 1e6) for name, seconds in results.items())
    return Table(f"Keys of {PROMPT_TOKENS:,} tokens, once a prompt, in the engine", ("", "µs", "µs, best"), rows)
