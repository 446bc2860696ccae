"""The pace is what steps take that compute prompts, and neither naps nor answers are taken for it."""

import pytest

from saltern.vllm.pace import NEW_SHARE, STEPS_MAX, Pace
from tests.vllm.server import Clock

BLOCK_TOKENS = 16


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> Pace:
    return Pace(block_tokens=BLOCK_TOKENS, clock=clock)


def step(pace: Pace, clock: Clock, *tokens: int, seconds: float) -> None:
    """Take a step in which each request computes so many tokens."""
    pace.begin(tokens)
    clock.advance(seconds)
    pace.end()


def test_nothing_is_known_before_the_first_prompt(pace: Pace, clock: Clock) -> None:
    step(pace, clock, 1, 1, 1, seconds=0.01)
    assert pace.block_seconds == 0.0


def test_a_block_takes_its_share_of_a_step(pace: Pace, clock: Clock) -> None:
    step(pace, clock, 100, 60, seconds=1.6)
    assert pace.block_seconds == pytest.approx(0.01 * BLOCK_TOKENS)


def test_requests_that_answer_meanwhile_are_none_of_the_prompts(pace: Pace, clock: Clock) -> None:
    step(pace, clock, *[1] * 100, 100, seconds=1.0)
    assert pace.seconds_per_token == pytest.approx(0.01)


def test_less_than_a_block_tells_nothing_of_a_block(pace: Pace, clock: Clock) -> None:
    step(pace, clock, 160, seconds=1.6)
    for _ in range(20):  # of prompts that were loaded but for their ends
        step(pace, clock, 2, seconds=1.0)
    assert pace.seconds_per_token == pytest.approx(0.01)


def test_a_nap_between_steps_is_in_none(pace: Pace, clock: Clock) -> None:
    for _ in range(3):
        step(pace, clock, 160, seconds=1.6)
        clock.advance(3600.0)
    assert pace.seconds_per_token == pytest.approx(0.01)


def test_a_step_scheduled_ahead_begins_when_the_one_before_ends(pace: Pace, clock: Clock) -> None:
    pace.begin([160])
    for _ in range(5):
        pace.begin([160])  # while the one before is computed
        clock.advance(1.6)
        pace.end()
    assert pace.seconds_per_token == pytest.approx(0.01)


def test_empty_steps_in_between_keep_the_order(pace: Pace, clock: Clock) -> None:
    pace.begin([])
    pace.begin([160])
    pace.end()
    clock.advance(1.6)
    pace.end()
    assert pace.seconds_per_token == pytest.approx(0.01)


def test_it_follows_a_change_of_load_and_one_step_changes_little(pace: Pace, clock: Clock) -> None:
    step(pace, clock, 100, seconds=1.0)
    step(pace, clock, 100, seconds=2.0)
    assert pace.seconds_per_token == pytest.approx(0.01 * (1 + NEW_SHARE))
    for _ in range(20):
        step(pace, clock, 100, seconds=2.0)
    assert pace.seconds_per_token == pytest.approx(0.02, rel=0.02)


def test_steps_that_never_end_are_forgotten(pace: Pace, clock: Clock) -> None:
    for _ in range(10 * STEPS_MAX):
        pace.begin([160])
    assert len(pace._steps) == STEPS_MAX


def test_an_end_without_a_step_is_none(pace: Pace) -> None:
    pace.end()
    assert pace.block_seconds == 0.0
