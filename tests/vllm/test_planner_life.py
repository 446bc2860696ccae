"""Tests of the planner under chance: any life of an engine, and mutants that such lives and the claims catch."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.vllm import mutants
from tests.vllm import test_planner as claims
from tests.vllm.engine import Engine, EngineMaker
from tests.vllm.life import Life

LIVES = settings(max_examples=150, stateful_step_count=40, suppress_health_check=list(HealthCheck))
HUNT = settings(LIVES, max_examples=2000, phases=[Phase.generate], print_blob=False)
"""What is found of a mutant is not made smaller. Each shows within 200 lives on average, whatever the seed."""

Mutant = Callable[[pytest.MonkeyPatch], None]
Claim = Callable[[EngineMaker], None]


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Keep what the connector says of thousands of dying servers out of the report."""
    caplog.set_level(logging.CRITICAL, "saltern")


def test_in_every_life_of_an_engine_users_get_their_own_kv_and_nothing_is_left_behind() -> None:
    run_state_machine_as_test(Life, settings=LIVES)


@pytest.mark.parametrize(
    "mutant",
    [
        mutants.drops_the_salt,
        mutants.swaps_the_neighbours_salts,
        mutants.does_not_hold,
        mutants.commits_after_the_first_rank,
        mutants.releases_on_the_second_admission,
        mutants.commits_what_failed,
    ],
)
def test_a_life_shows_a_planner_that(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Life, settings=HUNT)


@pytest.mark.parametrize(
    ("mutant", "claim"),
    [
        (mutants.drops_the_salt, claims.TestUsers().test_neighbours_in_a_batch_keep_their_own_salts),
        (mutants.swaps_the_neighbours_salts, claims.TestUsers().test_neighbours_in_a_batch_keep_their_own_salts),
        (mutants.does_not_hold, claims.TestHolding().test_a_finished_requests_blocks_are_not_reused_before_the_copy),
        (mutants.commits_after_the_first_rank, claims.TestStoring().test_an_unfinished_write_is_not_committed),
        (
            mutants.releases_on_the_second_admission,
            claims.TestLeases().test_the_second_admission_of_a_load_keeps_its_lease,
        ),
        (mutants.forgets_late_answers, claims.TestLeases().test_an_aborted_requests_late_answer_is_released),
        (mutants.asks_again_after_a_failed_load, claims.TestFailedLoads().test_a_failed_load_is_the_last),
        (mutants.commits_what_failed, claims.TestStoring().test_a_rank_that_fails_aborts_once_all_have_reported),
        (mutants.loads_from_the_first_slot, claims.TestHits().test_a_local_hit_may_end_inside_a_block),
        (mutants.takes_speculation_for_truth, claims.TestStoring().test_a_block_short_of_one_token_is_not_offered),
        (
            mutants.keeps_the_keys_of_a_lost_session,
            claims.TestSessions().test_what_was_offered_to_a_lost_session_is_offered_to_the_next,
        ),
    ],
    ids=lambda value: value.__name__,
)
def test_a_claim_catches_a_planner_that(mutant: Mutant, claim: Claim, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[Engine] = []

    def make(**options: Any) -> Engine:
        engines.append(Engine(**options))
        return engines[-1]

    claim(make)  # which holds of the planner as it is
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        claim(make)
