"""Whatever adapter a request names, vLLM with Saltern answers as without, and an adapter hits its own KV alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.engine import Completion, Engine
from demo.model import room_for
from demo.server import Server, connector_config
from tests.e2e.conftest import PATIENCE_MS, NewSalt, Stack, Story, running
from tests.e2e.corpus import ADAPTER, adapter_args, adapters
from tests.e2e.test_hostile_corpus import Outcome, bystander, differences, has_no_lease, outcomes

pytestmark = pytest.mark.e2e

REST = 9  # tokens of a prompt that fill no block
ASKS_MAX = 20


@pytest.fixture(scope="module")
def plain_outcomes(model: Path) -> dict[str, Outcome]:
    """What a vLLM without a connector answers."""
    with tempfile.TemporaryDirectory(prefix="saltern-e2e-") as name:
        folder = Path(name)
        extra_args = adapter_args(folder / "adapter")
        with Engine(model, log_path=folder / "vllm.log", prefix_caching=False, extra_args=extra_args) as engine:
            return outcomes(engine, adapters())


@pytest.fixture(scope="module")
def stack(model: Path) -> Iterator[Stack]:
    """The same with Saltern."""
    with tempfile.TemporaryDirectory(prefix="saltern-e2e-") as name:
        folder = Path(name)
        server = Server(folder, arena=room_for(90))
        engine = Engine(
            model,
            log_path=folder / "vllm.log",
            kv_transfer_config=connector_config(server.socket_path, patience_ms=PATIENCE_MS),
            prefix_caching=False,
            extra_args=adapter_args(folder / "adapter"),
        )
        with running(server, engine) as stack:
            yield stack


def test_every_request_is_answered_as_without_saltern(
    plain_outcomes: dict[str, Outcome], stack: Stack, new_salt: NewSalt, story: Story
) -> None:  # in this order: the engine without Saltern is gone when the one with it starts
    with bystander(stack, new_salt(), story):
        assert differences(stack.engine, adapters(), plain_outcomes) == {}
    stack.server.wait_for("all leases to end", has_no_lease)


def test_an_adapter_hits_what_it_has_computed_itself(stack: Stack, new_salt: NewSalt, story: Story) -> None:
    prompt, salt = story.told(stack.block_tokens + REST), new_salt()
    own = stack.store(prompt, salt)

    def ask(salt: str) -> Completion:
        return stack.engine.complete(prompt, salt=salt, fields={"model": ADAPTER})

    right = ask(new_salt())
    answers = [ask(salt)]
    while not answers[-1].cached_tokens and len(answers) < ASKS_MAX:  # until its files are read none is cached
        answers.append(ask(salt))
    assert answers[-1].cached_tokens == stack.block_tokens
    assert {answer.text for answer in answers} == {right.text} != {own.text}
    assert stack.engine.complete(prompt, salt=salt).text == own.text
