"""The prompts that are sent, and what each comes to without a cache."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from statistics import median
from typing import NamedTuple

from msgspec import Struct

from demo.engine import Completion, Engine
from demo.prompts import PARAGRAPHS, STORY

MAX_TOKENS = 8
CHUNK_TOKENS = 2048  # of a prompt are computed in one engine step
ROUNDS = 3
COUNTED_SECONDS_MAX = 60.0
POLL_SECONDS = 0.005


def _saga(first: int) -> str:
    """Tell all paragraphs from `first` on, almost four times, and begin the third once more, as a story does."""
    told = [*PARAGRAPHS[first:], *PARAGRAPHS[:first]] * 4
    return "\n\n".join([*told[:-3], " ".join(told[2].split()[:12])])


SAGA, OTHER_SAGA = _saga(0), _saga(3)
"""Two prompts of almost 4,000 tokens, two chunks each, that share no block."""

GREETING = "Good morning"
"""A prompt of less than a block: nothing of it is stored, and it keeps an engine going."""

PROMPTS = (STORY, SAGA, OTHER_SAGA)


class Reference(Struct, frozen=True):
    """A prompt's answer without a cache, and the medians of how long it took."""

    token_ids: tuple[int, ...]
    seconds: float
    step_seconds: float  # a chunk's share of the time to the first token


class References:
    """What every prompt comes to on an engine without a connector."""

    def __init__(self, engine: Engine, prompts: Iterable[str] = PROMPTS) -> None:
        timed_completion(engine, GREETING)  # whatever an engine does at its first request only
        self._reference_by_prompt = {prompt: _measure(engine, prompt) for prompt in prompts}

    def __getitem__(self, prompt: str) -> Reference:
        return self._reference_by_prompt[prompt]

    @property
    def step_seconds(self) -> float:
        """How long the engine takes for a chunk of a prompt, at the longest: its longest step."""
        return max(reference.step_seconds for reference in self._reference_by_prompt.values())


class Timed(NamedTuple):
    """A completion, the seconds until its last token, and those of them before vLLM began to compute it."""

    completion: Completion
    seconds: float
    queued_seconds: float


def timed_completion(engine: Engine, prompt: str, *, salt: str | None = None) -> Timed:
    """Complete a prompt on an engine that has nothing else to do, and see it counted."""
    before = _queued(engine)
    began = time.monotonic()
    completion = engine.complete(prompt, salt=salt, max_tokens=MAX_TOKENS)
    seconds = time.monotonic() - began
    # The last token may be here before vLLM has counted the request.
    while (after := _queued(engine)).requests == before.requests and time.monotonic() - began < COUNTED_SECONDS_MAX:
        time.sleep(POLL_SECONDS)
    assert after.requests == before.requests + 1, f"vLLM counted {after.requests - before.requests} requests for one"
    return Timed(completion, seconds, after.seconds - before.seconds)


class _Queued(NamedTuple):
    """How many requests vLLM has answered, and how long all of them together waited to be computed."""

    requests: int
    seconds: float


def _queued(engine: Engine) -> _Queued:
    page = engine.get("/metrics")
    values = dict(re.findall(r"^vllm:request_queue_time_seconds_(count|sum)\{[^}]*\} (\S+)$", page, re.MULTILINE))
    return _Queued(requests=int(float(values.get("count", 0))), seconds=float(values.get("sum", 0)))


def _measure(engine: Engine, prompt: str) -> Reference:
    timed = [timed_completion(engine, prompt) for _ in range(ROUNDS)]
    completions = [one.completion for one in timed]
    token_ids = completions[0].token_ids
    assert {one.token_ids for one in completions} == {token_ids}, "a prompt without one certain answer"
    chunks = -(-completions[0].prompt_tokens // CHUNK_TOKENS)
    return Reference(
        token_ids=token_ids,
        seconds=median(one.seconds for one in timed),
        step_seconds=median(one.ttft_ms / 1e3 for one in completions) / chunks,
    )
