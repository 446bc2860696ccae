"""A vLLM with Saltern answers whatever it is sent as one without does, and a bystander notices nothing."""

from __future__ import annotations

import json
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings

from demo.engine import REQUEST_SECONDS_MAX, Completion, Engine, EngineError
from demo.model import MODEL_NAME, room_for
from demo.server import Server, connector_config
from saltern.core.snapshot import Snapshot
from tests.e2e.conftest import PATIENCE_MS, SALT_MARK, NewSalt, Stack, Story, running
from tests.e2e.corpus import ENGINE_ARGS, Case, case, corpus

pytestmark = pytest.mark.e2e

REST = 9  # tokens of a prompt that fill no block
BROKEN_OFF = 60
SCHEMA_EXAMPLES = 40  # a route
FIELDS_MAX = 3
AGAIN = 3
TELLING_ANSWERS = 8  # of fewer, most may be toss-ups
QUIET_SECONDS_MAX = 60.0
POLL_SECONDS = 0.1
TOSS_UP = "Out of range float values"  # vLLM's error for log probabilities of minus infinity, which it has or has not

Outcome = tuple[int, object]
"""The status and, line by line, the errors or the shape of what was answered."""


Compared = tuple[dict[str, Outcome], Stack]
"""What a vLLM without a connector answered, and one with Saltern."""


@contextmanager
def compared(model: Path, requests: dict[str, Case], extra_args: Sequence[str]) -> Iterator[Compared]:
    """Start both kinds of vLLM, ask the one without Saltern, and end it before the other is asked anything."""
    with tempfile.TemporaryDirectory(prefix="saltern-e2e-") as name:
        folder = Path(name)
        server = Server(folder, arena=room_for(90), log_level="debug")
        plain = Engine(model, log_path=folder / "plain.log", prefix_caching=False, extra_args=extra_args)
        engine = Engine(
            model,
            log_path=folder / "vllm.log",
            kv_transfer_config=connector_config(server.socket_path, patience_ms=PATIENCE_MS),
            prefix_caching=False,
            extra_args=extra_args,
        )
        with running(server, engine, beside=plain) as stack:
            answered = outcomes(plain, requests)
            plain.stop()
            yield answered, stack


@pytest.fixture(scope="module")
def both(model: Path) -> Iterator[Compared]:
    with compared(model, corpus(), ENGINE_ARGS) as both:
        yield both


@pytest.fixture(scope="module")
def hostile_stack(both: Compared) -> Stack:
    return both[1]


def test_every_request_is_answered_as_without_saltern(both: Compared, new_salt: NewSalt, story: Story) -> None:
    plain_outcomes, stack = both
    with bystander(stack, new_salt(), story):
        pairs = differences(stack.engine, corpus(), plain_outcomes)
    assert {name: pair for name, pair in pairs.items() if TOSS_UP not in repr(pair)} == {}
    stack.server.wait_for("all leases to end", has_no_lease)


def test_requests_with_one_id_do_not_meet(hostile_stack: Stack, new_salt: NewSalt, story: Story) -> None:
    salt = new_salt()
    prompt = story.told(hostile_stack.block_tokens + REST)
    hostile_stack.store(prompt, salt)
    same = Case(case(prompt=prompt, cache_salt=salt).body, headers={"X-Request-Id": "one and the same"})
    with bystander(hostile_stack, new_salt(), story), ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: outcome(hostile_stack.engine, same), range(24)))
    assert {status for status, _ in answers} == {200}
    hostile_stack.server.wait_for("all leases to end", has_no_lease)


def test_many_that_hang_up_leave_nothing(hostile_stack: Stack, new_salt: NewSalt, story: Story) -> None:
    salt, random = new_salt(), Random(7)
    prompts = [story.told(tokens * hostile_stack.block_tokens + REST, chapter=tokens) for tokens in (1, 2, 3)]
    for prompt in prompts:
        hostile_stack.store(prompt, salt, max_tokens=1)
    requests = []
    for _ in range(BROKEN_OFF):
        body = case(
            prompt=random.choice(prompts),
            cache_salt=random.choice((salt, new_salt())),
            max_tokens=random.choice((1, 60)),
            n=random.choice((1, 1, 3)),
            priority=random.choice((-1, 0, 2**31)),
            **random.choice(({"stream": True}, {"stream": True}, {"prompt_logprobs": 1})),
        )
        requests.append((body, random.choice((0, 0, 1, 30, 400, 4000))))
    with bystander(hostile_stack, new_salt(), story), ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda request: hang_up(hostile_stack.engine, *request), requests))
    hostile_stack.server.wait_for("all leases to end", has_no_lease)


ROUTES = ("/v1/completions", "/v1/chat/completions", "/inference/v1/generate", "/v1/responses")
UNSUPPORTED = ("/v1/responses", "forbids")  # by schemathesis: that schema has a `not` whose contrary it can't make


@pytest.mark.parametrize(
    ("route", "mode"), [pair for pair in product(ROUTES, ("allows", "forbids")) if pair != UNSUPPORTED]
)
def test_nothing_harms_anybody_that_the_schema(
    hostile_stack: Stack, new_salt: NewSalt, story: Story, route: str, mode: str
) -> None:
    """Requests by chance, as vLLM itself describes them."""
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{hostile_stack.engine.port}/openapi.json")
    modes = {"allows": schemathesis.GenerationMode.POSITIVE, "forbids": schemathesis.GenerationMode.NEGATIVE}
    honest = json.loads(case(route).body)
    if route == "/v1/responses":
        honest = {"model": MODEL_NAME, "input": "Good morning", "max_output_tokens": 2}
    short = {name: 2 for name in honest if name.startswith("max_")}
    statuses: Counter[int] = Counter()

    @seed(1)
    @settings(max_examples=SCHEMA_EXAMPLES, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(schema[route]["POST"].as_strategy(modes[mode]))
    def ask(made: Any) -> None:
        if isinstance(made.body, dict):
            # All fields at once are nearly always refused, so one that is honest gets a few of them.
            chosen = Random(statuses.total()).sample(sorted(made.body), k=min(FIELDS_MAX, len(made.body)))
            made.body = honest | {name: made.body[name] for name in chosen} | short
            if isinstance(made.body.get("sampling_params"), dict):
                made.body["sampling_params"] |= {"max_tokens": 2, "n": 1}
        statuses[made.call(timeout=REQUEST_SECONDS_MAX).status_code] += 1

    with bystander(hostile_stack, new_salt(), story):
        ask()
    print(statuses)
    assert statuses.total() >= SCHEMA_EXAMPLES
    hostile_stack.server.wait_for("all leases to end", has_no_lease)


def test_no_log_holds_a_salt_of_all_these(hostile_stack: Stack) -> None:
    """vLLM was not asked to log requests: what it would then write is its own choice."""
    for log_path in (hostile_stack.server.log_path, hostile_stack.engine.log_path):
        lines = [line for line in log_path.read_text(errors="replace").splitlines() if SALT_MARK in line]
        assert not lines, f"{log_path.name} holds a salt"


@contextmanager
def bystander(stack: Stack, salt: str, story: Story) -> Iterator[None]:
    """Have a client ask for what it has stored, again and again, and get its hit each time, and its answer.

    Where the next token is a toss-up it depends on who else is in the batch: its answer is what it gets alone, and most
    often beside others.
    """
    prompt = story.told(stack.block_tokens + REST, chapter=9)
    wait_until_quiet(stack.engine)
    cold = stack.store(prompt, salt)
    done = threading.Event()
    answers: list[Completion] = []

    def ask() -> None:
        while not done.is_set() or not answers:
            answers.append(stack.engine.complete(prompt, salt=salt))

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield
        finally:
            done.set()
        asking.result()
    wait_until_quiet(stack.engine)
    quiet = stack.engine.complete(prompt, salt=salt)
    assert {answer.cached_tokens for answer in (*answers, quiet)} == {stack.block_tokens}
    assert quiet.text == cold.text
    if len(answers) >= TELLING_ANSWERS:
        assert Counter(answer.text for answer in answers).most_common(1)[0][0] == cold.text


def wait_until_quiet(engine: Engine) -> None:
    """Wait until no request is running: some go on for a moment when their client has hung up."""
    deadline = time.monotonic() + QUIET_SECONDS_MAX
    while re.search(r"^vllm:num_requests_(running|waiting)\{.*\} [1-9]", engine.get("/metrics"), re.MULTILINE):
        assert time.monotonic() < deadline, "requests are running that nobody waits for"
        time.sleep(POLL_SECONDS)


def differences(
    engine: Engine, requests: dict[str, Case], plain_outcomes: dict[str, Outcome]
) -> dict[str, tuple[Outcome, Outcome]]:
    """Send requests, and return of those that don't come to what they came to elsewhere both outcomes."""
    got = outcomes(engine, requests)
    for name in [name for name in got if got[name] != plain_outcomes[name]]:
        # What a busy machine made of it is gone when it is sent again, what Saltern made of it is not.
        again = [outcome(engine, requests[name]) for _ in range(AGAIN)]
        got[name] = plain_outcomes[name] if plain_outcomes[name] in again else again[-1]
    return {name: (plain_outcomes[name], got[name]) for name in got if got[name] != plain_outcomes[name]}


def outcomes(engine: Engine, requests: dict[str, Case]) -> dict[str, Outcome]:
    """Send requests, a few at a time."""
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(requests, pool.map(lambda request: outcome(engine, request), requests.values()), strict=True))


def outcome(engine: Engine, request: Case) -> Outcome:
    """Send a request and return what came of it."""
    connection = engine.connect()
    try:
        headers = {"Content-Type": "application/json", **request.headers}
        connection.request("POST", request.path, request.body, headers)
        response = connection.getresponse()
        content = response.read().decode(errors="replace")
    except (OSError, HTTPException) as error:
        raise EngineError(f"vLLM broke off a request: {error!r}.\n{engine.log_tail()}") from error
    finally:
        connection.close()
    lines = content.replace("data: ", "").splitlines() if content.startswith("data: ") else [content]
    lasting = [_lasting(line) for line in lines if line.strip() not in {"", "[DONE]"}]
    # A stream has as many lines as the client was quick to read: equal ones are one.
    return response.status, [line for index, line in enumerate(lasting) if not index or line != lasting[index - 1]]


def _lasting(line: str) -> object:
    """Return what of an answer or an error doesn't change from one request to the next."""
    try:
        answer = json.loads(line)
    except ValueError:
        return line
    if isinstance(answer, dict) and "choices" in answer:
        # Not what was said: where the next token is a toss-up, it depends on who else is in the batch.
        return [[choice["index"], len(choice.get("prompt_logprobs") or ())] for choice in answer["choices"]]
    return re.sub(r"[0-9a-f]{8,}", "…", json.dumps(answer))


def hang_up(engine: Engine, request: Case, bytes_read: int) -> None:
    """Send a request and close the connection after some bytes of the answer; with none, as soon as it is sent."""
    connection = engine.connect()
    try:
        connection.request("POST", request.path, request.body, {"Content-Type": "application/json"})
        if bytes_read:
            connection.getresponse().read(bytes_read)
    finally:
        connection.close()


def has_no_lease(snapshot: Snapshot) -> bool:
    leases = sum(session.read_leases + session.write_leases for session in snapshot.sessions)
    return not leases and not snapshot.arena.pinned_blocks and not snapshot.arena.writing_blocks
