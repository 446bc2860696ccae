"""Time to the first token on a real vLLM: computed, and from Saltern's disk or memory.

Two engines with the same settings are alive at once and get their requests strictly in turn: `plain` has no cache of
any kind, so that it computes every prompt, and `ours` has Saltern's connector and no prefix caching. Before each
request that is to be a hit from the disk, the server's memory is emptied as eviction empties it; before each that is
to be a hit from memory, the prompt is brought there. As in `ttft`, both engines rest before every request.

Nothing is asked again: a prompt that the engine computed, because that is expected to be faster or the disk came too
late, counts with the time it took, and the table says how many hits there were.
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
from bench.ttft import SPINNING_SECONDS, TOKEN_IDS, connector
from demo.engine import Completion, Engine, started_together
from demo.model import BLOCK_TOKENS, ensure_model

ARENA_BYTES = 512 * 1024**2
DISK_BYTES = 4 * 1024**3
TOKENS_TO_WIN = 512
"""From this length on a hit from the disk is to be faster than computing."""


class Size(NamedTuple):
    """How much is measured: every round has a new prompt of each length, which is asked for `hits` times each way."""

    lengths: tuple[int, ...]
    rounds: int
    hits: int


FULL = Size(lengths=(256, 512, 1_024, 2_048), rounds=3, hits=5)
SMOKE = Size(lengths=(300,), rounds=1, hits=1)


class Times(NamedTuple):
    """Milliseconds to the first token at one length, all rounds together, and how many came from the disk."""

    computed: list[float]
    from_disk: list[float]
    from_memory: list[float]
    hits: int


def run(size: Size) -> Report:
    """Start a server and both engines, warm them up, and measure."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saltern-bench-")))
        server = stack.enter_context(Server(arena_bytes=ARENA_BYTES, disk_bytes=DISK_BYTES))
        model = ensure_model()
        plain = Engine(model, log_path=folder / "plain.log", prefix_caching=False)
        ours = Engine(
            model,
            log_path=folder / "ours.log",
            kv_transfer_config=connector(server.socket),
            prefix_caching=False,
        )
        stack.enter_context(started_together(plain, ours))
        bench = _Bench(plain, ours, server)
        bench.measure(max(size.lengths), rounds=1, hits=1)  # warms both up
        times_by_length = {length: bench.measure(length, rounds=size.rounds, hits=size.hits) for length in size.lengths}
    rows: list[tuple[Cell, ...]] = []
    targets = []
    for length, times in times_by_length.items():
        gain = median(times.computed) / median(times.from_disk)
        rows.append(
            (
                f"{length:,}",
                *(median(values) for values in (times.computed, times.from_disk, times.from_memory)),
                spread(times.computed),
                spread(times.from_disk),
                gain,
                f"{times.hits} of {len(times.from_disk)}",
            )
        )
        if length >= TOKENS_TO_WIN:
            targets.append(Target(f"{length:,} tokens: computed against from the disk", gain, 1.0, "×", at_least=True))
    columns = (
        "prompt tokens", "computed ms", "from disk ms", "from memory ms", "computed, all", "from disk, all",
        "computed / disk", "hits",
    )  # fmt: skip
    return Report("ttft-disk", (Table("Median time to first token", columns, tuple(rows)),), tuple(targets))


class _Bench:
    """The two engines and the server of one of them."""

    def __init__(self, plain: Engine, ours: Engine, server: Server) -> None:
        self._plain = plain
        self._ours = ours
        self._server = server
        self._chance = random.Random(1)
        self._stored_blocks = 0

    def measure(self, length: int, *, rounds: int, hits: int) -> Times:
        """Measure one prompt length; which way begins changes with every request."""
        computed: list[float] = []
        from_disk: list[Completion] = []
        from_memory: list[float] = []
        for _ in range(rounds):
            prompt = self._chance.choices(TOKEN_IDS, k=length)
            self._store(prompt)
            times = interleaved(
                {
                    "computed": self._computed(prompt),
                    "disk": self._from_disk(prompt, from_disk),
                    "memory": self._from_memory(prompt),
                },
                hits,
            )
            computed += times["computed"]
            from_memory += times["memory"]
        found = sum(completion.cached_tokens >= _cached_tokens(length) for completion in from_disk)
        return Times(computed, [completion.ttft_ms for completion in from_disk], from_memory, found)

    def _store(self, prompt: list[int]) -> None:
        """Have a prompt computed and kept on the disk."""
        self._ours.complete(prompt, max_tokens=1)
        self._stored_blocks += len(prompt) // BLOCK_TOKENS
        until(self._has_written)

    def _computed(self, prompt: list[int]) -> Callable[[], float]:
        def measure() -> float:
            completion = _ask(self._plain, prompt)
            assert not completion.cached_tokens, f"computed, and yet {completion.cached_tokens} tokens were cached"
            return completion.ttft_ms

        return measure

    def _from_disk(self, prompt: list[int], completions: list[Completion]) -> Callable[[], float]:
        def measure() -> float:
            self._server.empty_memory()
            completions.append(_ask(self._ours, prompt))
            return completions[-1].ttft_ms

        return measure

    def _from_memory(self, prompt: list[int]) -> Callable[[], float]:
        def measure() -> float:
            until(lambda: self._is_in_memory(prompt))
            completion = _ask(self._ours, prompt)
            assert completion.cached_tokens >= _cached_tokens(len(prompt)), "what is in memory was not found"
            return completion.ttft_ms

        return measure

    def _is_in_memory(self, prompt: list[int]) -> bool:
        """Tell whether all of a prompt's blocks are in memory; if not, they are on their way then."""
        if self._server.stats().arena.blocks >= len(prompt) // BLOCK_TOKENS:
            return True
        self._ours.complete(prompt, max_tokens=1)
        return False

    def _has_written(self) -> bool:
        disk = self._server.stats().disk
        assert disk is not None, "the server has a disk tier"
        return disk.written >= self._stored_blocks


def _ask(engine: Engine, prompt: list[int]) -> Completion:
    time.sleep(SPINNING_SECONDS)
    return engine.complete(prompt, max_tokens=1)


def _cached_tokens(tokens: int) -> int:
    """Return how many tokens of a prompt a hit brings at least: its full blocks, but for its last token."""
    return (tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
