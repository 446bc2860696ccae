"""Engines under load with and without Saltern: tokens per second, and how long a client waits for the next token.

Four engines with the same settings, vLLM's prefix caching on in all, are alive at once and take their rounds in turn:
two without a connector, and two with Saltern's, whose servers have a disk tier or none. In a round eight clients send
prompts of random tokens to one engine, each its next when the last was answered; the other engines get the same ones.
Two kinds of rounds:

- missing: every prompt is new. Saltern looks up and stores everything and finds nothing, so it can only be in the way.
- mixed: half of the prompts were computed before, by every engine, and have left vLLM's own cache since.

What Saltern's engines did is compared with the mean of the two without; what these two differ by says how much of a
difference means nothing. Before each round all engines are left idle for as long as vLLM's processes go on spinning
after their last message.
"""

import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

import msgspec

from bench.report import Cell, Report, Table, Target, spread
from bench.rounds import interleaved, median, quantile
from bench.serving import Server, until
from bench.ttft import SPINNING_SECONDS, TOKEN_IDS, connector
from demo.engine import Completion, Engine, started_together
from demo.model import ensure_model

CLIENTS = 8
DISK_BYTES = 16 * 1024**3  # of the disk tier, the default
RATIO_MIN = 0.97
IDLE_SECONDS = 5.0

PLAIN = ("no connector", "another such engine")
IN_MEMORY = "Saltern without a disk tier"
ON_DISK = "Saltern with a disk tier"

ENGINE_ENV = {
    "VLLM_SERVER_DEV_MODE": "1",  # which has the route that empties vLLM's own cache
    # The memory that a step computes in is kept for the next, and in huge pages. Else it is given back and faulted in
    # anew in some steps and not in others, by which rounds of one engine differ by up to twenty percent.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

Prompt = list[int]


class Size(NamedTuple):
    """How much is measured: every round has so many prompts, of lengths drawn from a range."""

    arena_bytes: int
    missing_rounds: int
    mixed_rounds: int
    prompts: int
    lengths: range
    output_tokens: int


FULL = Size(
    arena_bytes=3 * 1024**3,
    missing_rounds=8,
    mixed_rounds=4,
    prompts=16,
    lengths=range(600, 1400),
    output_tokens=48,
)
SMOKE = Size(
    arena_bytes=256 * 1024**2,
    missing_rounds=1,
    mixed_rounds=1,
    prompts=4,
    lengths=range(300, 400),
    output_tokens=4,
)


class Load(NamedTuple):
    """What one round came to. `tokens` are those of prompts and answers."""

    seconds: float
    tokens: int
    cached_tokens: int
    gaps_ms: list[float]
    ttfts_ms: list[float]

    @property
    def tokens_per_second(self) -> float:
        """Return what the engine got through, cached or computed."""
        return self.tokens / self.seconds


Loads = Mapping[str, list[Load]]  # by engine, one a round


def run(size: Size) -> Report:
    """Start two servers and all engines, warm them up, and measure both kinds of rounds."""
    chance = random.Random(1)

    def prompts(count: int) -> list[Prompt]:
        return [chance.choices(TOKEN_IDS, k=chance.choice(size.lengths)) for _ in range(count)]

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saltern-bench-")))
        servers = {
            IN_MEMORY: stack.enter_context(Server(arena_bytes=size.arena_bytes)),
            ON_DISK: stack.enter_context(Server(arena_bytes=size.arena_bytes, disk_bytes=DISK_BYTES)),
        }
        engines = {
            name: Engine(
                ensure_model(),
                log_path=folder / f"{number}.log",
                kv_transfer_config=connector(servers[name].socket) if name in servers else None,
                env=ENGINE_ENV,
            )
            for number, name in enumerate((*PLAIN, *servers))
        }
        stack.enter_context(started_together(*engines.values()))
        bench = _Bench(engines, list(servers.values()), size)
        bench.compare([prompts(CLIENTS)])  # warms them up
        missing = bench.compare([prompts(size.prompts) for _ in range(size.missing_rounds)])
        known = [prompts(size.prompts // 2) for _ in range(size.mixed_rounds)]
        bench.make_known([prompt for prompts in known for prompt in prompts])
        mixed = bench.compare([_shuffled(half + prompts(size.prompts - len(half)), chance) for half in known])
        idle = {name: _idle_share(engines[name]) for name in (PLAIN[0], *servers)}
    return Report(
        "load",
        (_table("All missing", missing), _table("Half of the prompts computed before", mixed)),
        tuple(
            Target(
                f"all missing, {name}: tokens per second", median(_ratios(missing, name)), RATIO_MIN, "×", at_least=True
            )
            for name in servers
        ),
        tuple(f"Cores taken by an idle engine, {name}: {share:.3f}." for name, share in idle.items()),
    )


def _shuffled(prompts: list[Prompt], chance: random.Random) -> list[Prompt]:
    return chance.sample(prompts, len(prompts))


class _Bench:
    """The engines, asked in turn."""

    def __init__(self, engines: Mapping[str, Engine], servers: Sequence[Server], size: Size) -> None:
        self._engines = engines
        self._servers = servers
        self._output_tokens = size.output_tokens

    def compare(self, rounds: Sequence[list[Prompt]]) -> Loads:
        """Send the prompts of each round to all engines; which begins changes with every round."""
        measures = {name: partial(self._load_next, engine, iter(rounds)) for name, engine in self._engines.items()}
        return interleaved(measures, len(rounds))

    def make_known(self, prompts: list[Prompt]) -> None:
        """Let all engines compute prompts, wait until ours have stored them, and empty vLLM's own caches.

        An engine asks for room in the step that fills a block, so when the last answer is here only copies are missing.
        """
        for engine in self._engines.values():
            self._load(engine, prompts)
        until(lambda: not any(server.stats().arena.writing_blocks for server in self._servers))
        until(lambda: all(_empties_its_cache(engine) for engine in self._engines.values()))

    def _load_next(self, engine: Engine, rounds: Iterator[list[Prompt]]) -> Load:
        time.sleep(SPINNING_SECONDS)
        return self._load(engine, next(rounds))

    def _load(self, engine: Engine, prompts: list[Prompt]) -> Load:
        def ask(prompt: Prompt) -> Completion:
            return engine.complete(prompt, max_tokens=self._output_tokens, fields={"ignore_eos": True})

        began = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as clients:
            answers = list(clients.map(ask, prompts))
        return Load(
            seconds=time.perf_counter() - began,
            tokens=sum(answer.prompt_tokens + len(answer.token_ids) for answer in answers),
            cached_tokens=sum(answer.cached_tokens for answer in answers),
            gaps_ms=[gap for answer in answers for gap in answer.gaps_ms],
            ttfts_ms=[answer.ttft_ms for answer in answers],
        )


def _empties_its_cache(engine: Engine) -> bool:
    """Have vLLM forget its prefixes, which it refuses while blocks are in use."""
    return bool(msgspec.json.decode(engine.post("/reset_prefix_cache", {}))["success"])


def _table(title: str, loads: Loads) -> Table:
    columns = (
        "", "tokens per s", "rounds", "first token ms", "token to token p50 ms", "p99 ms", "cached %",
        "against no connector", "rounds",
    )  # fmt: skip
    return Table(title, columns, tuple((name, *_cells(loads, name)) for name in loads))


def _cells(loads: Loads, name: str) -> tuple[Cell, ...]:
    rounds = loads[name]
    rates = [load.tokens_per_second for load in rounds]
    gaps = [gap for load in rounds for gap in load.gaps_ms]
    first = median([ttft for load in rounds for ttft in load.ttfts_ms])
    cached = 100 * sum(load.cached_tokens for load in rounds) / sum(load.tokens for load in rounds)
    ratios = _ratios(loads, name)
    return (
        median(rates), spread(rates), first, median(gaps), quantile(gaps, 0.99), cached, median(ratios), spread(ratios),
    )  # fmt: skip


def _ratios(loads: Loads, name: str) -> list[float]:
    """Return an engine's tokens per second in each round against those of the engines without a connector there."""
    plain = [
        geometric_mean(load.tokens_per_second for load in same_round)
        for same_round in zip(*(loads[other] for other in PLAIN), strict=True)
    ]
    return [load.tokens_per_second / rate for load, rate in zip(loads[name], plain, strict=True)]


def _idle_share(engine: Engine) -> float:
    """Return how much of one core the engine's processes take while nobody asks anything."""
    time.sleep(SPINNING_SECONDS)
    began, spent = time.perf_counter(), _cpu_seconds(engine.pid)
    time.sleep(IDLE_SECONDS)
    return (_cpu_seconds(engine.pid) - spent) / (time.perf_counter() - began)


def _cpu_seconds(group: int) -> float:
    """Return the processor time of a process group's members so far."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            fields = stat.read_text("ascii", errors="replace").rpartition(")")[2].split()
            if int(fields[2]) == group:  # fields from the third on, as proc(5) counts them
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
