"""Fixtures: engines in memory, each of which must leave nothing behind when its test ends."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.vllm.engine import Engine, EngineMaker


@pytest.fixture
def make_engine() -> Iterator[EngineMaker]:
    """Return a maker of engines. After the test each is run until it is idle, and checked to be empty."""
    engines: list[Engine] = []

    def make(**options: Any) -> Engine:
        engines.append(Engine(**options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.check_drained()


@pytest.fixture
def engine(make_engine: EngineMaker) -> Engine:
    """Return an engine of one rank whose cache blocks are two engine blocks, four tokens."""
    return make_engine()
