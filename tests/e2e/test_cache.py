"""What is stored, what comes back, and to whom."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import NewSalt, Stack, Story

pytestmark = pytest.mark.e2e

REST = 9  # tokens of a prompt that fill no block


def test_a_prompt_comes_back_to_its_user(stack: Stack, new_salt: NewSalt, story: Story) -> None:
    salt, cached = new_salt(), 5 * stack.block_tokens
    prompt = story.told(cached + REST)
    cold = stack.store(prompt, salt)
    before = stack.counts
    hit = stack.engine.complete(prompt, salt=salt)

    assert cold.cached_tokens == 0
    assert hit.cached_tokens == cached
    assert hit.token_ids == cold.token_ids
    assert stack.counts.hit_blocks - before.hit_blocks == 5


def test_a_prompt_of_whole_blocks_comes_back_as_well(stack: Stack, new_salt: NewSalt, story: Story) -> None:
    salt, prompt = new_salt(), story.told(2 * stack.block_tokens)
    cold = stack.store(prompt, salt)
    hit = stack.engine.complete(prompt, salt=salt)

    assert hit.cached_tokens >= 2 * stack.block_tokens - 1, "only the last token is computed again, for its output"
    assert hit.token_ids == cold.token_ids


@pytest.mark.parametrize("other", ["salted", "unsalted"])
def test_a_prompt_comes_back_to_nobody_else(stack: Stack, new_salt: NewSalt, story: Story, other: str) -> None:
    prompt = story.told(3 * stack.block_tokens + REST, chapter=2)
    cold = stack.store(prompt, new_salt())
    before = stack.counts
    foreign = stack.store(prompt, new_salt() if other == "salted" else None)

    assert foreign.cached_tokens == 0
    assert foreign.token_ids == cold.token_ids
    assert stack.counts.hit_blocks == before.hit_blocks
    assert stack.counts.missed_blocks > before.missed_blocks, "the server was not even asked"


def test_requests_without_a_salt_are_one_user(stack: Stack, story: Story) -> None:
    cached = 3 * stack.block_tokens
    prompt = story.told(cached + REST, chapter=3)  # which no other test has left with them
    cold = stack.store(prompt, None)
    hit = stack.engine.complete(prompt)

    assert cold.cached_tokens == 0
    assert hit.cached_tokens == cached
    assert hit.token_ids == cold.token_ids


def test_a_prompt_is_hit_as_far_as_it_is_the_same(stack: Stack, new_salt: NewSalt, story: Story) -> None:
    salt, block = new_salt(), stack.block_tokens
    prompt = story.told(4 * block + REST)
    stack.store(prompt, salt)
    forked = prompt[: 2 * block + block // 2] + prompt[3 * block :]
    hit = stack.engine.complete(forked, salt=salt)

    assert hit.cached_tokens == 2 * block
    assert hit.token_ids == stack.engine.complete(forked, salt=new_salt()).token_ids


def test_a_prompt_shorter_than_a_block_is_answered_and_not_stored(
    stack: Stack, new_salt: NewSalt, story: Story
) -> None:
    salt, short = new_salt(), story.told(stack.block_tokens - 1)
    answers = [stack.engine.complete(short, salt=salt) for _ in range(2)]
    _store_something_else(stack, new_salt, story)

    assert [answer.cached_tokens for answer in answers] == [0, 0]
    assert answers[0].token_ids == answers[1].token_ids
    assert stack.blocks(salt) == 0


def test_what_the_model_says_is_not_stored(stack: Stack, new_salt: NewSalt, story: Story) -> None:
    salt, block = new_salt(), stack.block_tokens
    said = stack.store(story.told(2 * block - REST), salt)  # the prompt and its answer fill a second block
    _store_something_else(stack, new_salt, story)

    assert len(said.token_ids) > REST
    assert stack.blocks(salt) == 1


def test_users_who_send_one_prompt_at_once_get_their_own(stack: Stack, new_salt: NewSalt, story: Story) -> None:
    cached = 3 * stack.block_tokens
    prompt = story.told(cached + REST, chapter=4)
    old, new = [new_salt() for _ in range(3)], [new_salt() for _ in range(3)]
    colds = [stack.store(prompt, salt) for salt in old]
    before = stack.counts
    salts = [salt for pair in zip(old, new, strict=True) for salt in pair]  # neighbours in a batch are of either kind
    with ThreadPoolExecutor(len(salts)) as pool:
        answers = list(pool.map(lambda salt: stack.engine.complete(prompt, salt=salt), salts))

    assert [answer.cached_tokens for answer in answers] == [cached, 0] * 3
    assert {answer.token_ids for answer in (*colds, *answers)} == {colds[0].token_ids}
    assert stack.counts.hit_blocks - before.hit_blocks == 3 * len(old)
    for salt in new:
        stack.server.wait_for_blocks(salt, 3)


def _store_something_else(stack: Stack, new_salt: NewSalt, story: Story) -> None:
    """Store one more prompt: whatever the requests before it store is then stored, since all take the same way."""
    stack.store(story.told(stack.block_tokens + REST, chapter=9), new_salt())
