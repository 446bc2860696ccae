"""An engine under load with and without Saltern: tokens per second, and how long a client waits for the next token.

Two engines with the same settings, vLLM's prefix caching on in both, are alive at once and take their rounds in turn:
`own` has no connector, `ours` has Saltern's. In a round eight clients send prompts of random tokens to one engine, each
its next when the last was answered; the other engine gets the same ones. Two kinds of rounds:

- missing: every prompt is new. Saltern looks up and stores everything and finds nothing, so it can only be in the way.
- mixed: half of the prompts were computed before, by either engine, and have left vLLM's own cache since.

Before each round both engines are left idle for as long as vLLM's processes go on spinning after their last message.
"""

import os
import random
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench.report import Cell, Report, Table, Target, spread
from bench.rounds import median, quantile
from bench.serving import Server, until
from bench.ttft import SPINNING_SECONDS, TOKEN_IDS, connector
from demo.engine import Completion, Engine, started_together
from demo.model import ensure_model

CLIENTS = 8
ARENA_BYTES = 4 * 1024**3
DISK_BYTES = 16 * 1024**3  # of the disk tier, the default
RATIO_MIN = 0.97
IDLE_SECONDS = 5.0

Prompt = list[int]


class Size(NamedTuple):
    """How much is measured: every round has so many prompts, of lengths drawn from a range."""

    rounds: int
    prompts: int
    lengths: range
    output_tokens: int


FULL = Size(rounds=4, prompts=16, lengths=range(600, 1400), output_tokens=48)
SMOKE = Size(rounds=1, prompts=4, lengths=range(300, 400), output_tokens=4)


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


def run(size: Size, *, name: str, disk_bytes: int) -> Report:
    """Start a server and both engines, warm them up, and measure both kinds of rounds."""
    chance = random.Random(1)

    def prompts(count: int) -> list[Prompt]:
        return [chance.choices(TOKEN_IDS, k=chance.choice(size.lengths)) for _ in range(count)]

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saltern-bench-")))
        server = stack.enter_context(Server(arena_bytes=ARENA_BYTES, disk_bytes=disk_bytes))
        own = _engine(folder / "own.log", None)
        ours = _engine(folder / "ours.log", connector(server.socket))
        stack.enter_context(started_together(own, ours))
        bench = _Bench(own, ours, server, size)
        bench.compare([prompts(CLIENTS)])  # warms both up
        missing = bench.compare([prompts(size.prompts) for _ in range(size.rounds)])
        known = [prompts(size.prompts // 2) for _ in range(size.rounds)]
        bench.make_known([prompt for prompts in known for prompt in prompts])
        mixed = bench.compare([_shuffled(half + prompts(size.prompts - len(half)), chance) for half in known])
        idle = {"no connector": _idle_share(own), "Saltern": _idle_share(ours)}
    ratios = _ratios(missing)
    return Report(
        name,
        (_table("All missing", missing), _table("Half of the prompts computed before", mixed)),
        (Target("all missing: tokens per second against no connector", median(ratios), RATIO_MIN, "×", at_least=True),),
        tuple(f"Cores taken by an idle engine, {name}: {share:.3f}." for name, share in idle.items()),
    )


def _engine(log_path: Path, kv_transfer_config: dict[str, object] | None) -> Engine:
    env = {"VLLM_SERVER_DEV_MODE": "1"}  # which has the route that empties vLLM's own cache
    return Engine(ensure_model(), log_path=log_path, kv_transfer_config=kv_transfer_config, env=env)


def _shuffled(prompts: list[Prompt], chance: random.Random) -> list[Prompt]:
    return chance.sample(prompts, len(prompts))


class _Bench:
    """The two engines, asked in turn."""

    def __init__(self, own: Engine, ours: Engine, server: Server, size: Size) -> None:
        self._own = own
        self._ours = ours
        self._server = server
        self._output_tokens = size.output_tokens

    def compare(self, rounds: Sequence[list[Prompt]]) -> dict[str, list[Load]]:
        """Send the prompts of each round to both engines; which begins changes with every round."""
        loads: dict[str, list[Load]] = {"own": [], "ours": []}
        engines = {"own": self._own, "ours": self._ours}
        for number, prompts in enumerate(rounds):
            names = sorted(engines, reverse=number % 2 == 0)
            for name in names:
                time.sleep(SPINNING_SECONDS)
                loads[name].append(self._load(engines[name], prompts))
        return loads

    def make_known(self, prompts: list[Prompt]) -> None:
        """Let both engines compute prompts, wait until ours has stored them, and empty vLLM's own caches.

        An engine asks for room in the step that fills a block, so when the last answer is here only copies are missing.
        """
        for engine in (self._own, self._ours):
            self._load(engine, prompts)
        until(lambda: not self._server.stats().arena.writing_blocks)
        until(lambda: all(_empties_its_cache(engine) for engine in (self._own, self._ours)))

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


def _table(title: str, loads: dict[str, list[Load]]) -> Table:
    columns = (
        "", "tokens per s", "rounds", "first token ms", "token to token p50 ms", "p99 ms", "cached %",
    )  # fmt: skip
    own, ours = (_cells(loads[name]) for name in ("own", "ours"))
    ratios = _ratios(loads)
    compared = [ours_value / own_value for own_value, ours_value in zip(own.times, ours.times, strict=True)]
    rows: list[tuple[Cell, ...]] = [
        ("no connector", own.tokens_per_second, own.rounds, *own.times, own.cached_percent),
        ("Saltern", ours.tokens_per_second, ours.rounds, *ours.times, ours.cached_percent),
        ("Saltern / no connector", median(ratios), spread(ratios), *compared, ""),
    ]
    return Table(title, columns, tuple(rows))


class _Cells(NamedTuple):
    """What a table shows of one engine."""

    tokens_per_second: float
    rounds: str
    times: tuple[float, float, float]
    cached_percent: float


def _cells(loads: list[Load]) -> _Cells:
    rates = [load.tokens_per_second for load in loads]
    gaps = [gap for load in loads for gap in load.gaps_ms]
    first = median([ttft for load in loads for ttft in load.ttfts_ms])
    cached = sum(load.cached_tokens for load in loads) / sum(load.tokens for load in loads)
    return _Cells(median(rates), spread(rates), (first, median(gaps), quantile(gaps, 0.99)), 100 * cached)


def _ratios(loads: dict[str, list[Load]]) -> list[float]:
    """Return ours against own for each round, whose two halves came right after each other."""
    return [
        ours.tokens_per_second / own.tokens_per_second for own, ours in zip(loads["own"], loads["ours"], strict=True)
    ]


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
