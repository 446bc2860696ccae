"""Tests of Saltern on vLLM's real scheduler: its promises, seeded lives, and mutants of it that these catch."""

from collections import Counter
from collections.abc import Callable, Iterable

import msgspec
import pytest

pytest.importorskip("vllm", reason="the harness runs vLLM's own scheduler")

from msgspec.structs import replace

from saltern.vllm.connector import SalternConnector
from saltern.vllm.copier import Shard
from saltern.vllm.copies import Copy, Piece
from saltern.vllm.settings import PATIENCE_MS
from tests.test_docs import rows_headed

from . import hostile
from . import saltern_mutants as mutants
from .architectures import ARCHITECTURES
from .engine import Engine
from .findings import EngineDied, Finding
from .options import Options
from .pages import NULL_BLOCK
from .promises import ENGINES, PROMISES
from .saltern_harness import IDLE_SECONDS, saltern
from .saltern_lives import life, live, stepped
from .saltern_world import Greedy, SteppedCopier, Weather, World
from .shrink import shrink
from .sweeps import ENGINES as SWEPT_ENGINES
from .sweeps import STEPS, SWEEPS, base

SEEDS = (*range(40), 139, 227, 245)  # the last ones lose much of what is on the disk
HUNT = range(120)

REGRESSIONS = {
    57: "a load that only vLLM knew to have failed was promised again, for ever",
    2242: "vLLM handed out blocks that a request preempted in its own step had named and not computed",
    8392: "a request waited for the disk as long as the engine believed to compute, which knew better a step later",
    5594: "weights changed after a load had failed, and another was promised the room that vLLM kept for its request",
    5524: "an engine died in a store of a user erased meanwhile, and what was about to be wiped was taken for lost",
}
"""Seeds that found something, and what."""

SWEPT_HERE = ("two late ranks, two batches in flight, drafts", "windows", "states")
"""Engines whose sweeps are part of the tests; `python -m tests.harness --sweep` has the others as well."""

LAST_STEPS = 12
"""Steps that a life takes when all is over, to see that the cache is still in service."""

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


@pytest.mark.parametrize("batch_tokens", [24, 512])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("model", ARCHITECTURES)
def test_every_model_hits_for_its_user_alone(model: str, ranks: int, batch_tokens: int) -> None:
    options = Options(
        tag_users=True, model=model, blocks=160, ranks=ranks, batch_tokens=batch_tokens, prefix_caching=True
    )
    prompt = [(7 * position) % 251 for position in range(int(4.5 * options.unit_tokens))]
    with stepped(options) as subject:
        with subject.engine(options) as engine:
            cold = engine.ask("store", prompt, "alice", max_tokens=3).tokens
            engine.check_drained()
        with subject.engine(options) as engine:
            assert engine.ask("other", prompt, "bob").external_tokens == 0
            answer = engine.ask("hit", prompt, "alice", max_tokens=3)
            assert (answer.external_tokens, answer.tokens) == (4 * options.unit_tokens, cold)
            engine.check_drained()


def test_of_a_window_only_what_it_needs_is_copied_in(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Piece] = []
    submit = SteppedCopier.submit

    def submit_noted(self: SteppedCopier, copy: Copy, shard: Shard, *, is_store: bool) -> None:
        copied.extend(() if is_store else copy.pieces)
        submit(self, copy, shard, is_store=is_store)

    monkeypatch.setattr(SteppedCopier, "submit", submit_noted)
    options = Options(tag_users=True, model="a window in every second layer", blocks=160, window_tokens=20)
    prompt = [1] * 10 * options.block_tokens
    with stepped(options) as subject:
        with subject.engine(options) as engine:
            engine.ask("store", prompt, "alice")
        with subject.engine(options) as engine:
            assert engine.ask("hit", prompt, "alice").external_tokens == 9 * options.block_tokens
    blocks_by_group = Counter(dict.fromkeys(range(2), 0))
    for piece in copied:
        blocks_by_group[piece.group] += sum(block != NULL_BLOCK for block in piece.engine_blocks)
    assert sorted(blocks_by_group.values()) == [2, 9], "the window's 19 tokens before the next lie in two blocks"


@pytest.mark.parametrize("model", ARCHITECTURES)
def test_every_model_computes_what_failed_to_load(model: str) -> None:
    options = Options(tag_users=True, model=model, blocks=160, ranks=2, prefix_caching=True)
    prompt = [(7 * position) % 251 for position in range(int(4.5 * options.unit_tokens))]
    with stepped(options) as subject:
        with subject.engine(options) as engine:
            cold = engine.ask("store", prompt, "alice", max_tokens=3).tokens
        with subject.engine(options, load_fault=lambda rank, request_id, block_ids: set(block_ids[:1])) as engine:
            assert engine.ask("fail", prompt, "alice", max_tokens=3).tokens == cold
            assert engine.counts.loads_failed == options.ranks
            engine.check_drained()


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
        world.sleep(PATIENCE_MS / 1000)  # during a step: the next one would have freed them
        engine.run()
        assert engine.connector._planner.leftovers["held blocks"] == 0


@pytest.mark.parametrize("engine", SWEPT_HERE)
@pytest.mark.parametrize("sweep", SWEEPS)
def test_nothing_at_any_step_does_harm(sweep: str, engine: str) -> None:
    for blow in SWEEPS[sweep](base(SWEPT_ENGINES[engine])):
        live(blow.seed, blow)


@pytest.mark.parametrize("engine", SWEPT_ENGINES)
def test_the_swept_life_has_what_can_be_hit(engine: str) -> None:
    what = base(SWEPT_ENGINES[engine])
    counts = live(what.seed, what)
    assert counts.loads, "nothing was loaded"
    assert counts.steps <= STEPS + LAST_STEPS, "it takes more steps than are swept"


def test_a_session_is_not_cached_though_its_prompt_is() -> None:
    options = Options(tag_users=True, asynchronous=True)
    prompt, more = [1] * 4 * options.block_tokens, [2] * 3 * options.block_tokens
    with stepped(options) as subject, subject.engine(options) as engine:
        engine.add("session", prompt, "alice", max_tokens=3, is_session=True)
        engine.go_on("session", more, max_tokens=3)
        engine.go_on("session", [])
        engine.run()
        assert engine.counts.turns == 1
        assert engine.ask("prompt", prompt, "alice").external_tokens == 0
        assert engine.ask("again", prompt, "alice").external_tokens == len(prompt)
        engine.check_drained()


def reset_one_of_two_engines() -> None:
    """Have an engine store, lose its own namespace and miss; another engine after it must still hit."""
    options = Options(tag_users=True)
    prompt = [1] * 4 * options.block_tokens
    with stepped(options) as subject:
        with subject.engine(options) as engine:
            engine.ask("store", prompt, "alice")
            engine.add("running", prompt, "alice", max_tokens=20)
            engine.run(until=lambda: bool(engine.answers["running"].tokens))
            engine.reset_prefix_cache(with_connector=True)
            engine.run()
            assert engine.ask("miss", prompt, "alice").external_tokens == 0
            engine.check_drained()
        with subject.engine(options) as engine:
            assert engine.ask("hit", prompt, "alice").external_tokens == len(prompt)


def test_a_reset_wipes_nobody_elses_blocks() -> None:
    reset_one_of_two_engines()


def test_mutant_wipes_the_server_at_a_reset_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    mutants.wipes_the_server_at_a_reset(monkeypatch)
    with pytest.raises(AssertionError):
        reset_one_of_two_engines()


def test_shrinking_keeps_the_kind_of_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    mutants.holds_without_bound(monkeypatch)
    large = life(KNOWN_SEEDS[mutants.holds_without_bound][0])
    small, finding = shrink(large)
    assert isinstance(finding, Greedy)
    assert len(small.plans) == 1
    assert sum(len(plan.arrivals) for plan in small.plans) < sum(len(plan.arrivals) for plan in large.plans)


def test_a_seed_decides_a_life() -> None:
    assert live(3) == live(3)


def ask_hostile_things() -> None:
    options = Options(tag_users=True)
    with stepped(options) as subject, subject.engine(options) as engine:
        for name, salt in hostile.SALTS.items():
            engine.add(f"a salt {name}", [1] * 40, salt, max_tokens=2)
        for name, token in hostile.TOKENS.items():
            engine.add(f"token ids {name}", [token] * 40, "alice", max_tokens=2)
        for name, parameters in hostile.PARAMETERS.items():
            extra = {"kv_transfer_params": parameters}
            engine.add(f"parameters {name}", [1] * 40, "alice", max_tokens=2, extra_args=extra)
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


# The mutants

KNOWN_SEEDS: dict[Callable[[pytest.MonkeyPatch], None], tuple[int, ...]] = {
    mutants.holds_no_blocks: (1, 20),
    mutants.never_frees_what_was_refused: (1, 4),
    mutants.never_frees_what_is_overdue: (1, 34),
    mutants.holds_without_bound: (1, 4),
    mutants.delays_the_free: (5, 10),
    mutants.lets_the_engine_sleep: (4, 24),
    mutants.promises_blocks_for_ever: (5, 18),
    mutants.names_operations_by_request: (1, 5),
    mutants.forgets_reports_between_steps: (7, 8),
    mutants.aborts_at_the_first_failure: (9, 17),
    mutants.commits_after_the_first_rank: (9, 17),
    mutants.commits_what_failed: (5, 63),
    mutants.publishes_aborted_writes: (5, 42),
    mutants.reads_unfinished_writes: (17, 63),
    mutants.keeps_the_children_of_a_lost_parent: (4, 5),
    mutants.asks_again_after_a_failed_load: (4, 21),
    mutants.keeps_bad_blocks: (21, 45),
    mutants.overlooks_what_vllm_says_failed: (4, 36),
    mutants.hides_failed_loads: (21, 45),
    mutants.stays_in_an_ended_session: (64, 101),
    mutants.forgets_late_answers: (1, 4),
    mutants.reserves_without_parents: (1, 7),
    mutants.counts_tokens_not_computed: (17, 29),
    mutants.counts_drafted_tokens: (7, 16),
    mutants.counts_placeholders: (5, 7),
    mutants.caches_sessions: (2, 5),
    mutants.waits_without_bound: (1, 16),
    mutants.waits_for_each_question: (1, 2),
    mutants.asks_anew_every_time: (5, 10),
    mutants.keeps_what_was_not_wanted: (68, 118),
    mutants.releases_on_the_second_admission: (1, 4),
    mutants.releases_before_the_copy_is_done: (4, 21),
    mutants.loads_synchronously: (1, 4),
    mutants.loads_from_the_first_slot: (12, 117),
    mutants.copies_one_group_only: (1, 7),
    mutants.confuses_groups: (1, 10),
    mutants.stores_what_a_window_forgot: (20, 76),
    mutants.copies_the_null_block: (62,),
    mutants.loads_without_the_state: (15, 23),
    mutants.goes_back_where_nothing_can: (10, 16),
    mutants.names_bad_blocks_in_groups: (7, 78),
    mutants.keeps_its_namespace_after_a_reset: (49, 58),
    mutants.goes_on_with_old_requests_after_a_reset: (14, 24),
    mutants.caches_for_prompt_logprobs: (1, 4),
    mutants.keeps_asking_a_frozen_server: (16, 28),
    mutants.waits_for_the_disk_for_ever: (118, 119),
    mutants.waits_longer_than_computing_takes: (58, 119),
    mutants.keeps_what_the_disk_brings_late: (62, 118),
    mutants.publishes_what_was_lost: (89, 139),
    mutants.frees_what_the_disk_reads_into: (139, 227),
    mutants.writes_what_nobody_holds: (4, 21),
    mutants.gives_slots_away_at_once: (139, 175),
    mutants.never_forgets_a_record: (4, 8),
    mutants.keeps_the_record_of_a_bad_block: (21, 27),
    mutants.keeps_the_records_of_the_erased: (8, 27),
    mutants.leaves_what_was_erased_in_the_arena: (21, 27),
    mutants.stores_what_began_before_an_erasure: (8, 21),
    mutants.forgets_when_a_request_came: (8, 10),
    mutants.forgets_erasures_at_a_restart: (42, 131),
}
"""Seeds whose lives show a mutant, so that nobody has to search. Where they no longer do, others are tried."""


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_caught(mutant: Callable[[pytest.MonkeyPatch], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch)
        with pytest.raises(mutants.MUTANTS[mutant]):
            hunt((*KNOWN_SEEDS.get(mutant, ()), *HUNT))


def test_the_page_has_every_mutant_and_how_it_is_found() -> None:
    expected = {
        mutant.__name__: ", ".join(finding.__name__ for finding in findings)
        for mutant, findings in mutants.MUTANTS.items()
    }
    expected |= dict.fromkeys((mutant.__name__ for mutant in mutants.HOSTILE), EngineDied.__name__)
    expected[mutants.wipes_the_server_at_a_reset.__name__] = AssertionError.__name__
    rows = rows_headed("docs/correctness.md", "rule", "mutant", "found as")
    assert {mutant.strip("`"): found_as for _, mutant, found_as in rows} == expected


def hunt(seeds: Iterable[int]) -> None:
    for seed in seeds:
        live(seed)
