"""Whatever adapter a request names, vLLM with Saltern answers as without, and an adapter hits its own KV alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.engine import Completion
from tests.e2e.conftest import NewSalt, Stack, Story
from tests.e2e.corpus import ADAPTER, adapter_args, adapters
from tests.e2e.test_hostile_corpus import Compared, bystander, compared, differences, has_no_lease

pytestmark = pytest.mark.e2e

REST = 9  # tokens of a prompt that fill no block
ASKS_MAX = 20


@pytest.fixture(scope="module")
def both(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compared]:
    with compared(model, adapters(), adapter_args(tmp_path_factory.mktemp("adapter"))) as both:
        yield both


@pytest.fixture(scope="module")
def stack(both: Compared) -> Stack:
    return both[1]


def test_every_request_is_answered_as_without_saltern(both: Compared, new_salt: NewSalt, story: Story) -> None:
    plain_outcomes, stack = both
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
