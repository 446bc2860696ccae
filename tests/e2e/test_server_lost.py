"""A server that dies under a running engine, and one that takes its place."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import NewSalt, Stack, Story

pytestmark = pytest.mark.e2e

REATTACH_SECONDS_MAX = 60.0


def test_requests_go_on_without_the_server_and_are_cached_again_with_the_next(
    stack: Stack, new_salt: NewSalt, story: Story
) -> None:
    salt, cached = new_salt(), 4 * stack.block_tokens
    prompt = story.told(cached + 9)
    cold = stack.store(prompt, salt)
    asked = stack.counts.acquires
    with ThreadPoolExecutor(2) as pool:
        # One is being loaded and one computed when the server dies.
        under_way = [pool.submit(stack.engine.complete, prompt, salt=user) for user in (salt, new_salt())]
        stack.server.wait_for("a request", lambda snapshot: snapshot.tenants[0].counts.acquires > asked)
        stack.server.kill()
        answers = [future.result() for future in under_way]
    answers += [stack.engine.complete(prompt, salt=user) for user in (salt, new_salt(), None)]

    assert {answer.token_ids for answer in answers} == {cold.token_ids}
    assert [answer.cached_tokens for answer in answers[2:]] == [0, 0, 0]

    stack.server.start()
    _send_until_attached(stack)
    again = stack.store(prompt, salt)
    hit = stack.engine.complete(prompt, salt=salt)
    assert again.cached_tokens == 0
    assert hit.cached_tokens == cached
    assert again.token_ids == hit.token_ids == cold.token_ids


def _send_until_attached(stack: Stack) -> None:
    """Keep the engine going, since an idle one does not look for a server."""
    deadline = time.monotonic() + REATTACH_SECONDS_MAX
    while not any(session.state == "open" for session in stack.server.stats().sessions):
        assert time.monotonic() < deadline, "the engine did not come back to the server"
        stack.engine.complete("Good morning", max_tokens=1)
