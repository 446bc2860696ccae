"""Tests of Saltern on vLLM's real scheduler: its promises, seeded lives, and mutants of it that these catch."""

from collections import Counter
from collections.abc import Callable, Iterable

import msgspec
import pytest

pytest.importorskip("vllm", reason="the harness runs vLLM's own scheduler")

from msgspec.structs import replace

from saltern.vllm.connector import SalternConnector
from saltern.vllm.settings import PATIENCE_MS

from . import saltern_mutants as mutants
from .engine import Engine
from .findings import EngineDied, Finding
from .options import Options
from .promises import ENGINES, PROMISES
from .saltern_harness import IDLE_SECONDS, saltern
from .saltern_lives import live, stepped
from .saltern_world import Weather, World

SEEDS = range(40)
HUNT = range(120)

REGRESSIONS = {
    57: "a load that only vLLM knew to have failed was promised again, for ever",
}
"""Seeds that found something, and what."""

REAL_ENGINES = ("one rank in process", "second runner, two batches in flight, late workers")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("promise", PROMISES)
def test_saltern_keeps(promise: str, engine: str) -> None:
    with stepped(ENGINES[engine]) as subject:
        PROMISES[promise](subject, ENGINES[engine])


@pytest.mark.parametrize("engine", REAL_ENGINES)
@pytest.mark.parametrize("promise", PROMISES)
def test_saltern_with_a_real_server_keeps(promise: str, engine: str) -> None:
    options = replace(ENGINES[engine], idle_seconds=IDLE_SECONDS, idle_steps_max=20_000, steps_max=50_000)
    with saltern(options) as subject:
        PROMISES[promise](subject, options)


def test_lives_end_well_and_go_through_everything() -> None:
    total: Counter[str] = Counter()
    for seed in SEEDS:
        total.update(msgspec.structs.asdict(live(seed)))
    for event, count in total.items():
        assert count > 5, f"these lives hardly ever lead to {event}"


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_found_once_and_never_again(seed: int) -> None:
    live(seed)


def test_an_engine_that_falls_idle_keeps_no_block_for_a_late_reservation() -> None:
    options = Options(tag_users=True)
    world = World(Weather())
    settings = {"saltern.socket": "in this process", "saltern.block_tokens": options.block_tokens}
    with world.around(), Engine(options, SalternConnector, settings, on_step=world.tick) as engine:
        engine.add("late", [1] * 40, "alice")
        world.freeze_server()
        engine.run(until=lambda: bool(engine.connector._planner.leftovers["held blocks"]))
        engine.step()
        world.clock.advance(PATIENCE_MS / 1000)  # during a step: the next one would have freed them
        engine.run()
        assert engine.connector._planner.leftovers["held blocks"] == 0


def test_a_seed_decides_a_life() -> None:
    assert live(3) == live(3)


HOSTILE_REQUESTS: dict[str, tuple[str | None, list[int], object]] = {
    "a salt like a path": ("../../../etc/shadow\0", [1] * 40, None),
    "a salt that is no text": ("\ud800", [1] * 40, None),
    "an endless salt": ("a" * 100_000, [1] * 40, None),
    "token ids beyond 32 bits": ("alice", [2**31 + 5] * 40, None),
    "negative token ids": ("alice", [-7] * 40, None),
    "transfer parameters of another connector": ("alice", [1] * 40, {"do_remote_prefill": True, "remote_block_ids": 3}),
    "transfer parameters that are nonsense": ("alice", [1] * 40, {"tenant": 7, "user": None, "": {"": []}}),
}


def ask_hostile_things() -> None:
    options = Options(tag_users=True)
    with stepped(options) as subject, subject.engine(options) as engine:
        for name, (salt, prompt, parameters) in HOSTILE_REQUESTS.items():
            extra = {"extra_args": {"kv_transfer_params": parameters}} if parameters is not None else {}
            engine.add(name, prompt, salt, max_tokens=2, **extra)
        engine.run()
        engine.check_drained()
        assert {answer.finish_reason for answer in engine.answers.values()} == {"length"}


def test_hostile_requests_are_answered() -> None:
    ask_hostile_things()


@pytest.mark.parametrize("mutant", mutants.HOSTILE)
def test_hostile_requests_catch(mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises((EngineDied, Finding)):
        ask_hostile_things()


# The mutants, one a rule of the engine's side


def is_caught(mutant: Callable[[pytest.MonkeyPatch], None], *seeds: int) -> None:
    """See a mutant caught by what it must be caught by, in one of `seeds`, which are known to do so, or else in any."""
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch)
        with pytest.raises(mutants.MUTANTS[mutant]):
            hunt((*seeds, *HUNT))


def hunt(seeds: Iterable[int]) -> None:
    for seed in seeds:
        live(seed)


def test_every_mutant_has_its_test() -> None:
    tests = {name.removeprefix("test_mutant_").removesuffix("_is_caught") for name in globals()}
    assert {mutant.__name__ for mutant in mutants.MUTANTS} <= tests


def test_mutant_holds_no_blocks_is_caught() -> None:
    is_caught(mutants.holds_no_blocks, 1, 42)


def test_mutant_never_frees_what_was_refused_is_caught() -> None:
    is_caught(mutants.never_frees_what_was_refused, 0, 1)


def test_mutant_delays_the_free_is_caught() -> None:
    is_caught(mutants.delays_the_free, 4, 8)


def test_mutant_lets_the_engine_sleep_is_caught() -> None:
    is_caught(mutants.lets_the_engine_sleep, 63, 67, 74)


def test_mutant_promises_blocks_for_ever_is_caught() -> None:
    is_caught(mutants.promises_blocks_for_ever, 0, 6)


def test_mutant_commits_after_the_first_rank_is_caught() -> None:
    is_caught(mutants.commits_after_the_first_rank, 12, 64, 89)


def test_mutant_commits_what_failed_is_caught() -> None:
    is_caught(mutants.commits_what_failed, 12, 63, 72)


def test_mutant_publishes_aborted_writes_is_caught() -> None:
    is_caught(mutants.publishes_aborted_writes, 8, 12, 42)


def test_mutant_reads_unfinished_writes_is_caught() -> None:
    is_caught(mutants.reads_unfinished_writes, 1, 34)


def test_mutant_keeps_the_children_of_a_lost_parent_is_caught() -> None:
    is_caught(mutants.keeps_the_children_of_a_lost_parent, 7, 8)


def test_mutant_asks_again_after_a_failed_load_is_caught() -> None:
    is_caught(mutants.asks_again_after_a_failed_load, 22, 57, 62)


def test_mutant_overlooks_what_vllm_says_failed_is_caught() -> None:
    is_caught(mutants.overlooks_what_vllm_says_failed, 22, 57, 62)


def test_mutant_hides_failed_loads_is_caught() -> None:
    is_caught(mutants.hides_failed_loads, 7, 45, 48)


def test_mutant_stays_in_an_ended_session_is_caught() -> None:
    is_caught(mutants.stays_in_an_ended_session, 24, 110, 119)


def test_mutant_forgets_late_answers_is_caught() -> None:
    is_caught(mutants.forgets_late_answers, 6, 15, 22)


def test_mutant_reserves_without_parents_is_caught() -> None:
    is_caught(mutants.reserves_without_parents, 1, 4)


def test_mutant_counts_tokens_not_computed_is_caught() -> None:
    is_caught(mutants.counts_tokens_not_computed, 8, 27, 102)


def test_mutant_waits_without_bound_is_caught() -> None:
    is_caught(mutants.waits_without_bound, 17, 44, 84)


def test_mutant_releases_on_the_second_admission_is_caught() -> None:
    is_caught(mutants.releases_on_the_second_admission, 1, 4)


def test_mutant_releases_before_the_copy_is_done_is_caught() -> None:
    is_caught(mutants.releases_before_the_copy_is_done, 8, 34, 50)


def test_mutant_loads_synchronously_is_caught() -> None:
    is_caught(mutants.loads_synchronously, 1, 4)


def test_mutant_loads_from_the_first_slot_is_caught() -> None:
    is_caught(mutants.loads_from_the_first_slot, 12, 15)


def test_mutant_keeps_its_namespace_after_a_reset_is_caught() -> None:
    is_caught(mutants.keeps_its_namespace_after_a_reset, 45, 64, 65)


def test_mutant_goes_on_with_old_requests_after_a_reset_is_caught() -> None:
    is_caught(mutants.goes_on_with_old_requests_after_a_reset, 16, 18)
