"""Models with several kinds of layers, on real vLLM: windows, states, and both beside full attention.

Each test that hits also lets the engine forget one group of layers when it loads, and sees that the answer goes wrong.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from demo.server import Server
from tests.e2e.lab import Answer, Lab
from tests.e2e.models import VOCABULARY, make_gemma, make_gpt_oss, make_qwen

pytestmark = pytest.mark.e2e

ROUNDING = 0.05
"""How far apart log probabilities may be that only rounding makes different: a hit computes fewer tokens at once."""

WRONG = 0.15
"""How far apart they are at least when a group of layers has KV, or a state, of nothing."""

_random = random.Random(11)
TOKENS = [_random.randrange(3, VOCABULARY) for _ in range(2000)]

_numbers = count()


class Model(NamedTuple):
    """A model's maker, and what its engine needs."""

    make: Callable[[Path], Path]
    arguments: dict[str, Any]


MODELS = {
    "Gemma-3": Model(make_gemma, {}),
    "gpt-oss": Model(make_gpt_oss, {}),
    "Qwen3-Next": Model(make_qwen, {"enable_prefix_caching": True}),
}

_block_tokens: dict[str, int] = {}
"""How long a model's blocks are: vLLM makes them as long as a state is large, which depends on the CPU."""


class Bench:
    """One model: the answers it gives without Saltern, and engines with it, one after another."""

    def __init__(self, lab: Lab, server: Server, name: str, folder: Path) -> None:
        self.model = MODELS[name]
        self._lab, self._server = lab, server
        self._folder = self.model.make(folder)
        self._answer_by_length: dict[int, Answer] = {}
        self.user = f"user-{next(_numbers)}"
        if name not in _block_tokens:
            self.start()
            _block_tokens[name] = lab.block_tokens()
        self.block_tokens = _block_tokens[name]

    def know(self, *lengths: int) -> None:
        """Let an engine without Saltern answer the first tokens, so many at a time."""
        self._lab.start(self._folder, **self.model.arguments | {"enable_prefix_caching": False})
        self._answer_by_length = {length: self._lab.ask(TOKENS[:length], "nobody") for length in lengths}

    def start(self, **arguments: Any) -> None:
        """Start an engine that has nothing, on the server that has."""
        self._lab.start(self._folder, socket_path=self._server.socket_path, **self.model.arguments | arguments)

    def forget(self, what: str) -> None:
        """Let the running engine leave something out."""
        self._lab.forget(what)

    def ask(self, length: int, *, user: str | None = None) -> tuple[int, float]:
        """Return how many tokens came from a cache, and how far the answer is from the right one."""
        answer = self._lab.ask(TOKENS[:length], user or self.user)
        return answer.cached_tokens, answer.distance(self._answer_by_length[length])


@pytest.fixture(params=MODELS)
def bench(request: pytest.FixtureRequest, lab: Lab, server: Server, tmp_path: Path) -> Bench:
    return Bench(lab, server, request.param, tmp_path / "model")


def test_a_prefix_is_stored_once_and_loaded_by_the_next_engine_and_by_nobody_else(bench: Bench) -> None:
    size = bench.block_tokens
    short, long = 2 * size + 9, 2 * size + 400
    bench.know(short, long)
    bench.start()
    cached, distance = bench.ask(short)
    assert (cached, distance <= ROUNDING) == (0, True)
    bench.start()
    for length in (short, long):
        cached, distance = bench.ask(length)
        assert distance <= ROUNDING
        assert cached >= 2 * size, "what the engine before has stored is not found"
    cached, distance = bench.ask(short, user="somebody else")
    assert (cached, distance <= ROUNDING) == (0, True)
    for group in (0, 1):  # full attention, and one of the others, which are alike
        bench.start()
        bench.forget(f"group {group}")
        cached, distance = bench.ask(short)
        assert cached == 2 * size
        assert distance > WRONG, f"nothing is seen of group {group}"


def test_the_last_token_is_computed_with_all_that_it_attends_to(bench: Bench) -> None:
    size = bench.block_tokens
    bench.know(2 * size, 2 * size + 1)
    bench.start(max_num_batched_tokens=size)  # a step, and so a state, for every block
    bench.ask(2 * size + 1)
    bench.start(max_num_batched_tokens=size)
    assert bench.ask(2 * size + 1)[0] == 2 * size
    bench.start(max_num_batched_tokens=size)
    cached, distance = bench.ask(2 * size)
    assert (cached, distance <= ROUNDING) == (size, True)
    if bench.model.make is make_qwen:
        bench.start(max_num_batched_tokens=size)
        bench.forget("last token")
        cached, distance = bench.ask(2 * size)
        assert distance > WRONG, "a state that has taken in the last token takes it in once more, and nothing is seen"


def test_what_vllms_own_cache_lacks_is_loaded_behind_what_it_has(bench: Bench) -> None:
    size = bench.block_tokens
    short, long = size + 30, 2 * size + 60
    bench.know(short, long)
    bench.start(max_num_batched_tokens=size, enable_prefix_caching=True)
    assert bench.ask(long)[0] == 0
    bench.start(max_num_batched_tokens=size, enable_prefix_caching=True)
    assert bench.ask(short, user="somebody new")[0] == 0
    for length in (short, long, long):
        cached, distance = bench.ask(length)
        assert distance <= ROUNDING
        assert cached == length // size * size
