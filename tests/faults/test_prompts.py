"""What a prompt comes to without a cache is measured as it will be with one."""

from __future__ import annotations

from typing import cast

import pytest

from demo.engine import Completion, Engine
from faults.prompts import CHUNK_TOKENS, GREETING, PROMPTS, References, timed_completion

TTFT_MS_BY_CHUNKS = {1: 500.0, 2: 1600.0}


class FakeEngine:
    """An engine that counts a request only when it is asked for the second time after it."""

    def __init__(self, *, answers: tuple[int, ...] = (7,)) -> None:
        self._answers = answers
        self._requests = 0
        self._counted = 0

    def get(self, path: str) -> str:
        assert path == "/metrics"
        page = "".join(
            f'vllm:request_{what}_time_seconds_{part}{{engine="0",model_name="m"}} {value}\n'
            for what in ("queue", "prefill")
            for part, value in (("count", float(self._counted)), ("sum", self._counted / (4 if what == "queue" else 1)))
        )
        self._counted = self._requests
        return page

    def complete(self, prompt: str, *, salt: str | None, max_tokens: int) -> Completion:
        self._requests += 1
        chunks = 1 if len(prompt) < 4 * CHUNK_TOKENS else 2  # there are some four characters in a token
        return Completion(
            text="",
            token_ids=(self._answers[self._requests % len(self._answers)],),
            prompt_tokens=chunks * CHUNK_TOKENS - 9,
            cached_tokens=0,
            ttft_ms=TTFT_MS_BY_CHUNKS[chunks],
        )


def test_the_wait_of_a_request_is_the_one_that_it_was_counted_with() -> None:
    engine = FakeEngine()
    for _ in range(3):
        timed = timed_completion(cast(Engine, engine), GREETING, salt="a")
        assert timed.queued_seconds == 0.25


def test_a_step_is_the_longest_share_of_a_chunk() -> None:
    references = References(cast(Engine, FakeEngine()))
    assert {references[prompt].token_ids for prompt in PROMPTS} == {(7,)}
    assert references.step_seconds == 0.8


def test_a_prompt_of_two_answers_judges_nobody() -> None:
    with pytest.raises(AssertionError, match="without one certain answer"):
        References(cast(Engine, FakeEngine(answers=(7, 8))))
