"""Tests of the planner with a server that answers what can't be: the engine goes on without it, and keeps nothing."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from saltern.core.messages import Acquired, Grant, LookedUp, Reply, Reserved
from tests.vllm.engine import Engine

PROMPT = [0, 1, 2, 3, 0, 2, 1, 3]  # two blocks of the cache, four of the engine

Strange = Callable[[Reply], list[Reply]]


def answer_strangely(engine: Engine, strange: Strange, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `strange` change each answer on its way, into one or several."""
    line, deliver = engine.lines[-1], engine.lines[-1].deliver
    monkeypatch.setattr(line, "deliver", lambda reply: [deliver(changed) for changed in strange(reply)])


def regrant(change: Callable[[tuple[Grant, ...]], tuple[Grant, ...]]) -> Strange:
    return lambda reply: [replace(reply, grants=change(reply.grants)) if isinstance(reply, Reserved) else reply]


def bad_reservations() -> dict[str, Strange]:
    return {
        "a block beyond those asked for": regrant(lambda grants: (*grants, replace(grants[0], index=2))),
        "a block that no number has": regrant(lambda grants: (replace(grants[0], index=2**63),)),
        "a block before the first": regrant(lambda grants: (replace(grants[0], index=-1), *grants[1:])),
        "one block twice": regrant(lambda grants: (*grants, grants[0])),
        "less than nothing": lambda reply: [replace(reply, upto=-7) if isinstance(reply, Reserved) else reply],
        "the answer to a lookup, too": lambda reply: (
            [LookedUp(reply.request, ready=2), reply] if isinstance(reply, Reserved) else [reply]
        ),
        "the answer to an acquire, too": lambda reply: (
            [Acquired(reply.request, 0, 1.0, 0, ()), reply] if isinstance(reply, Reserved) else [reply]
        ),
    }


@pytest.mark.parametrize("name", bad_reservations())
def test_a_reservation_that_does_not_fit_stores_nothing(
    engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_strangely(engine, bad_reservations()[name], monkeypatch)
    request = engine.arrive(PROMPT, "alice")
    engine.settle()
    assert request in engine.finished
    assert engine.ready_blocks("alice") == 0


@pytest.mark.parametrize("ready", [3, 2**40, -1])
def test_a_prefix_that_the_request_does_not_have_is_a_miss(
    engine: Engine, ready: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.arrive(PROMPT, "alice")
    engine.settle()

    def strange(reply: Reply) -> list[Reply]:
        if not isinstance(reply, Acquired):
            return [reply]
        return [replace(reply, ready=ready, extents=reply.extents[:1] * min(max(ready, 0), 3))]

    answer_strangely(engine, strange, monkeypatch)
    request = engine.arrive(PROMPT, "alice")
    engine.settle()
    assert request in engine.finished
    assert request.loaded_tokens == 0
