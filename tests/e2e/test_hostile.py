"""Requests that are broken off, odd or malformed: answered as vLLM alone would, and the engine lives on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from demo.engine import Engine, RequestError
from demo.model import MODEL_NAME
from saltern.core.snapshot import Snapshot
from tests.e2e.conftest import SALT_MARK, NewSalt, Stack, Story

pytestmark = pytest.mark.e2e

REST = 9  # tokens of a prompt that fill no block


def test_a_request_broken_off_leaves_no_lease(stack: Stack, new_salt: NewSalt, story: Story) -> None:
    salt, cached = new_salt(), 5 * stack.block_tokens
    stored, unknown = story.told(cached + REST), story.told(cached + REST, chapter=5)
    cold = stack.store(stored, salt)
    for tokens_read in (0, 0, 0, 1):
        # Those without a token read are broken off while they are queued, loaded, computed or stored.
        _break_off(stack.engine, stored, salt=salt, tokens_read=tokens_read)
        _break_off(stack.engine, unknown, salt=new_salt(), tokens_read=tokens_read)
    stack.server.wait_for("all leases to end", _has_no_lease)

    hit = stack.engine.complete(stored, salt=salt)
    assert hit.cached_tokens == cached
    assert hit.token_ids == cold.token_ids
    stack.server.wait_for("all leases to end", _has_no_lease)


def test_prompt_log_probabilities_are_computed_although_the_prompt_is_cached(
    stack: Stack, new_salt: NewSalt, story: Story
) -> None:
    salt, prompt = new_salt(), story.told(stack.block_tokens + REST)
    cold = stack.store(prompt, salt)
    answer = _complete(stack.engine, prompt, cache_salt=salt, prompt_logprobs=1)

    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert len(answer.choices[0].prompt_logprobs or ()) == len(prompt)
    assert answer.choices[0].text == cold.text


def test_several_choices_are_all_answered_from_the_cache(stack: Stack, new_salt: NewSalt, story: Story) -> None:
    salt, prompt = new_salt(), story.told(2 * stack.block_tokens + REST)
    cold = stack.store(prompt, salt)
    answer = _complete(stack.engine, prompt, cache_salt=salt, n=3, temperature=0.01, seed=1)

    assert answer.usage.prompt_tokens_details.cached_tokens == 2 * stack.block_tokens
    assert [choice.text for choice in answer.choices] == [cold.text] * 3


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"do_remote_prefill": True},
        {"do_remote_decode": True, "remote_engine_id": 7, "remote_block_ids": "none"},
        {"saltern.socket": "/dev/null", "cache_salt": "", "tenant": ["default"]},
        {"": {"": [None, 1e308, -1, "\0", "🧂"]}},
        {str(number): number for number in range(1000)},
    ],
    ids=["empty", "prefill", "decode", "settings", "nested", "many"],
)
def test_transfer_parameters_change_nothing(
    stack: Stack, new_salt: NewSalt, story: Story, parameters: dict[str, object]
) -> None:
    salt, prompt = new_salt(), story.told(stack.block_tokens + REST)
    cold = stack.store(prompt, salt)
    hit = stack.engine.complete(prompt, salt=salt, fields={"kv_transfer_params": parameters})

    assert hit.cached_tokens == stack.block_tokens
    assert hit.token_ids == cold.token_ids


@pytest.mark.parametrize("parameters", ["text", 7, ["list"], True], ids=repr)
def test_transfer_parameters_that_are_none_are_refused_by_vllm(stack: Stack, parameters: object) -> None:
    with pytest.raises(RequestError) as refusal:
        stack.engine.complete("Good morning", fields={"kv_transfer_params": parameters})

    assert refusal.value.status == 400
    assert stack.engine.complete("Good morning", max_tokens=1).token_ids


def test_odd_salts_are_users_of_their_own(stack: Stack, story: Story) -> None:
    prompt = story.told(stack.block_tokens + REST)
    names = ["", " ", "  ", "'; --", "é", "e\u0301", "🧂", "a" * (128 - len(SALT_MARK)), "%00", "${HOME}", "..", "\n"]
    salts = [SALT_MARK + name for name in names]
    with ThreadPoolExecutor(len(salts)) as pool:
        colds = list(pool.map(lambda salt: stack.store(prompt, salt, max_tokens=1), salts))
        hits = list(pool.map(lambda salt: stack.engine.complete(prompt, salt=salt, max_tokens=1), salts))

    assert [cold.cached_tokens for cold in colds] == [0] * len(salts)
    assert [hit.cached_tokens for hit in hits] == [stack.block_tokens] * len(salts)
    assert len({answer.token_ids for answer in (*colds, *hits)}) == 1


def _has_no_lease(snapshot: Snapshot) -> bool:
    leases = sum(session.read_leases + session.write_leases for session in snapshot.sessions)
    return not leases and not snapshot.arena.pinned_blocks and not snapshot.arena.writing_blocks


def _break_off(engine: Engine, prompt: list[int], *, salt: str, tokens_read: int) -> None:
    """Send a request and hang up after some tokens; with none, as soon as it is sent."""
    body = {"model": MODEL_NAME, "prompt": prompt, "cache_salt": salt, "stream": True, "max_tokens": 200}
    connection = engine.connect()
    try:
        connection.request("POST", "/v1/completions", msgspec.json.encode(body), {"Content-Type": "application/json"})
        if tokens_read:
            response = connection.getresponse()
            for _ in range(tokens_read):
                response.readline()
    finally:
        connection.close()


class _Details(msgspec.Struct):
    cached_tokens: int


class _Usage(msgspec.Struct):
    prompt_tokens_details: _Details


class _Choice(msgspec.Struct):
    text: str
    prompt_logprobs: list[object] | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage


def _complete(engine: Engine, prompt: list[int], **fields: object) -> _Answer:
    """Complete a prompt without streaming, which some of vLLM's features don't come with."""
    body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": 16, "temperature": 0.0, **fields}
    return msgspec.json.decode(engine.post("/v1/completions", body), type=_Answer)
