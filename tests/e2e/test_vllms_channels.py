"""What vLLM itself shows of the cache: counters, a line in its log, events; and its route that leaves all KV behind."""

from __future__ import annotations

import functools
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from demo.engine import Engine
from demo.model import KV_BYTES_PER_TOKEN, room_for
from demo.server import Server, connector_config
from tests.e2e.conftest import PATIENCE_MS, NewSalt, Stack, Story, running

pytestmark = pytest.mark.e2e

WAIT_SECONDS_MAX = 60.0
REST = 9  # tokens of a prompt that fill no block


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="saltern-e2e-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def stack(model: Path, folder: Path) -> Iterator[Stack]:
    server = Server(folder, arena=room_for(180))
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": _endpoint(folder)}
    engine = Engine(
        model,
        log_path=folder / "vllm.log",
        kv_transfer_config=connector_config(server.socket_path, patience_ms=PATIENCE_MS),
        prefix_caching=True,  # without it vLLM has no events
        extra_args=["--kv-events-config", msgspec.json.encode(events).decode()],
        env={
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_LOG_STATS_INTERVAL": "1",
            "VLLM_LOGGING_LEVEL": "DEBUG",  # the level of an interval without tokens, in which a slow copy may end
        },
    )
    with running(server, engine) as stack:
        yield stack


def test_metrics_and_log_count_what_was_stored_and_loaded(stack: Stack, new_salt: NewSalt, story: Story) -> None:
    salt, cached = new_salt(), 3 * stack.block_tokens
    prompt = story.told(cached + REST)
    before = _counters(stack.engine)
    stack.store(prompt, salt)
    _reset(stack.engine)
    hit = stack.engine.complete(prompt, salt=salt)
    assert hit.cached_tokens == cached

    after = _until(lambda: _counters(stack.engine), lambda counts: _grown(before, counts, "saltern_copies", "load") > 0)
    assert _grown(before, after, "external_prefix_cache_hits") == cached
    assert _grown(before, after, "saltern_bytes", "store") == cached * KV_BYTES_PER_TOKEN
    assert _grown(before, after, "saltern_bytes", "load") == cached * KV_BYTES_PER_TOKEN
    for direction in ("store", "load"):
        assert _grown(before, after, "saltern_copies", direction) > 0
        assert _grown(before, after, "saltern_seconds", direction) > 0
        assert _grown(before, after, "saltern_failed", direction) == 0
    if "prompt_tokens_cached_by_source host" in after:  # where vLLM tells sources apart
        assert _grown(before, after, "prompt_tokens_cached_by_source", "host") == cached

    megabytes = cached * KV_BYTES_PER_TOKEN / 1e6
    for direction in ("store", "load"):
        # A slow step may end in another of the log's intervals: what they show adds up, rounded to a tenth in each.
        _until(
            functools.partial(_shown, stack.engine, direction),
            lambda amounts: abs(sum(amounts) - megabytes) <= 0.1 * len(amounts),
        )


def test_only_vllms_own_events_name_a_salt(stack: Stack, folder: Path, new_salt: NewSalt, story: Story) -> None:
    zmq = pytest.importorskip("zmq")
    salt, cached = new_salt(), 3 * stack.block_tokens
    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        subscriber.connect(_endpoint(folder))
        subscriber.subscribe(b"")
        received: list[dict[str, Any]] = []

        def receive() -> list[dict[str, Any]]:
            while subscriber.poll(0):
                *_, payload = subscriber.recv_multipart()
                received.extend(msgspec.msgpack.decode(payload)[1])
            return received

        def provoke() -> list[dict[str, Any]]:
            stack.engine.complete(story.told(cached), salt=new_salt(), max_tokens=1)
            return receive()

        _until(provoke, bool)  # a subscription is known to the publisher only some time after it was made
        prompt = story.told(cached + REST, chapter=2)
        stack.store(prompt, salt)
        _reset(stack.engine)
        assert stack.engine.complete(prompt, salt=salt).cached_tokens == cached
        events = _until(receive, lambda events: any(salt in repr(event) for event in events))

    assert {event["medium"] for event in events if "medium" in event} == {"GPU"}, "not the engine's own memory"
    for event in events:
        event.pop("extra_keys", None)  # where vLLM says what a hash is made of
        assert salt not in repr(event)


def test_what_was_left_behind_is_missed_by_this_engine_and_kept_for_others(
    stack: Stack, new_salt: NewSalt, story: Story
) -> None:
    alice, bob, cached = new_salt(), new_salt(), 2 * stack.block_tokens
    prompt = story.told(cached + REST, chapter=3)
    cold = stack.store(prompt, alice)
    stack.store(prompt, bob)
    _reset(stack.engine, external=True)
    missed = stack.engine.complete(prompt, salt=alice)
    stack.server.wait_for_blocks(alice, 4)  # hers of before, and those that she has computed since
    _reset(stack.engine)
    again = stack.engine.complete(prompt, salt=alice)

    assert [missed.cached_tokens, again.cached_tokens] == [0, cached]
    assert stack.blocks(bob) == 2

    stack.engine.stop()
    stack.engine.start()  # what it has by itself is what all others have
    hits = [stack.engine.complete(prompt, salt=salt) for salt in (alice, bob)]
    assert [hit.cached_tokens for hit in hits] == [cached, cached]
    assert {answer.token_ids for answer in (missed, again, *hits)} == {cold.token_ids}


def _endpoint(folder: Path) -> str:
    return f"ipc://{folder}/events"


def _reset(engine: Engine, *, external: bool = False) -> None:
    """Empty vLLM's own cache, which it refuses while blocks are in use, and with `external` leave ours behind."""
    path = "/reset_prefix_cache" + ("?reset_external=true" if external else "")
    _until(lambda: msgspec.json.decode(engine.post(path, {}))["success"], bool)


def _counters(engine: Engine) -> dict[str, float]:
    """Return vLLM's counters by name, followed by the value of what label they have beside the engine's."""
    values: dict[str, float] = {}
    for name, labels, value in re.findall(r"^vllm:(\w+)_total\{(.*)\} (\S+)$", engine.get("/metrics"), re.MULTILINE):
        label = re.search(r'(?:direction|source)="(\w+)"', labels)
        values[f"{name} {label[1]}" if label else name] = float(value)
    return values


def _shown(engine: Engine, direction: str) -> list[float]:
    """Return the megabytes that the log shows of a direction, by interval, where there were any."""
    amounts = re.findall(rf"{direction} MB=([\d.]+)", engine.log_path.read_text())
    return [float(amount) for amount in amounts if float(amount)]


def _grown(before: dict[str, float], after: dict[str, float], name: str, label: str = "") -> float:
    key = f"{name} {label}".strip()
    return after[key] - before.get(key, 0)  # a counter with a label of ours is there from its first count on


def _until(look: Callable[[], Any], condition: Callable[[Any], bool]) -> Any:
    """Return the first of what `look` returns that meets a condition."""
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while not condition(seen := look()):
        assert time.monotonic() < deadline, f"waited in vain, and last saw {seen}"
        time.sleep(0.1)
    return seen
