"""Time to the first token on a real vLLM: computed cold, from vLLM's own prefix cache, and from Saltern.

Two engines with the same settings are alive at once and get their requests strictly in turn: `own` has vLLM's prefix
caching and no connector, `ours` has Saltern's connector and no prefix caching, so that whatever it hits came
from the server. Before each request both are left idle for as long as vLLM's processes go on spinning after their
last: they would take the cores from the other engine. Prompts are random token ids; a new one for every cold request.
"""

import random
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from bench.report import Cell, Report, Table, Target, spread
from bench.rounds import interleaved, median
from bench.serving import Server, until
from demo.engine import Engine, started_together
from demo.model import BLOCK_TOKENS, ensure_model

TOKEN_IDS = range(1_000, 40_000)  # ordinary ones of SmolLM2's 49,152
RATIO_MAX = 1.2
SPINNING_SECONDS = 1.1
"""vLLM's workers and their scheduler poll each other for a second after the last message (`SpinCondition`)."""

ARENA_BYTES = 2 * 1024**3
MISSES_MAX = 20
"""A hit may be missed when the machine is so busy that the server's answer comes late; it is then asked again."""


class Size(NamedTuple):
    """How much is measured: every round has a new prompt of each length and `hits` hits of it on either engine."""

    lengths: tuple[int, ...]
    rounds: int
    hits: int


FULL = Size(lengths=(1_000, 4_096, 7_000), rounds=3, hits=5)
SMOKE = Size(lengths=(300,), rounds=1, hits=1)


class Times(NamedTuple):
    """Milliseconds to the first token at one length, all rounds together; the hits in pairs."""

    cold_own: list[float]
    cold_ours: list[float]
    hit_own: list[float]
    hit_ours: list[float]


def run(size: Size) -> Report:
    """Start a server and both engines, warm them up, and measure."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saltern-bench-")))
        server = stack.enter_context(Server(arena_bytes=ARENA_BYTES))
        model = ensure_model()
        own = Engine(model, log_path=folder / "own.log")
        ours = Engine(
            model,
            log_path=folder / "ours.log",
            kv_transfer_config=connector(server.socket),
            prefix_caching=False,
        )
        stack.enter_context(started_together(own, ours))
        bench = _Bench(own, ours, server)
        bench.measure(max(size.lengths), rounds=1, hits=2)  # warms both up
        times_by_length = {length: bench.measure(length, rounds=size.rounds, hits=size.hits) for length in size.lengths}
    rows: list[tuple[Cell, ...]] = []
    targets = []
    for length, times in times_by_length.items():
        ratio = median(times.hit_ours) / median(times.hit_own)
        rows.append(
            (
                f"{length:,}",
                *(median(values) for values in times),
                spread(times.hit_own),
                spread(times.hit_ours),
                ratio,
                median(times.cold_ours) / median(times.hit_ours),
            )
        )
        targets.append(Target(f"{length:,} tokens: our hit against vLLM's own", ratio, RATIO_MAX, "×"))
    columns = (
        "prompt tokens", "cold, plain ms", "cold, storing ms", "own hit ms", "our hit ms", "own hit, all",
        "our hit, all", "ours / own", "cold / ours",
    )  # fmt: skip
    missed = (
        f"Hits that were missed and asked again: {bench.misses.get(own, 0)} by vLLM, {bench.misses.get(ours, 0)} by us."
    )
    return Report("ttft", (Table("Median time to first token", columns, tuple(rows)),), tuple(targets), (missed,))


def connector(socket: str) -> dict[str, object]:
    """Return vLLM's `--kv-transfer-config` for our connector."""
    return {
        "kv_connector": "SalternConnector",
        "kv_connector_module_path": "saltern.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"saltern.socket": socket},
    }


class _Bench:
    """The two engines, and how much they have done."""

    def __init__(self, own: Engine, ours: Engine, server: Server) -> None:
        self._own = own
        self._ours = ours
        self._server = server
        self._chance = random.Random(1)
        self._stored_blocks = 0
        self.misses: dict[Engine, int] = {}

    def measure(self, length: int, *, rounds: int, hits: int) -> Times:
        """Measure one prompt length; which engine begins changes with every request."""
        times = Times([], [], [], [])
        for _ in range(rounds):
            prompt = self._chance.choices(TOKEN_IDS, k=length)
            cold = interleaved({"own": self._cold(self._own, prompt), "ours": self._cold(self._ours, prompt)}, 1)
            self._wait_until_stored(prompt)
            hit = interleaved({"own": self._hit(self._own, prompt), "ours": self._hit(self._ours, prompt)}, hits)
            times.cold_own.extend(cold["own"])
            times.cold_ours.extend(cold["ours"])
            times.hit_own.extend(hit["own"])
            times.hit_ours.extend(hit["ours"])
        return times

    def _cold(self, engine: Engine, prompt: list[int]) -> Callable[[], float]:
        def measure() -> float:
            time.sleep(SPINNING_SECONDS)
            completion = engine.complete(prompt, max_tokens=1)
            assert not completion.cached_tokens, f"cold, and yet {completion.cached_tokens} tokens were cached"
            return completion.ttft_ms

        return measure

    def _hit(self, engine: Engine, prompt: list[int]) -> Callable[[], float]:
        def measure() -> float:
            while True:
                time.sleep(SPINNING_SECONDS)
                completion = engine.complete(prompt, max_tokens=1)
                if completion.cached_tokens >= _full_blocks(len(prompt) - 1) * BLOCK_TOKENS:
                    return completion.ttft_ms
                self.misses[engine] = self.misses.get(engine, 0) + 1
                assert self.misses[engine] <= MISSES_MAX, f"{engine} keeps missing"

        return measure

    def _wait_until_stored(self, prompt: list[int]) -> None:
        self._stored_blocks += _full_blocks(len(prompt))
        until(self._has_stored)

    def _has_stored(self) -> bool:
        (tenant,) = self._server.stats().tenants
        return tenant.counts.stored + tenant.counts.stored_after_evicting >= self._stored_blocks


def _full_blocks(tokens: int) -> int:
    return tokens // BLOCK_TOKENS
