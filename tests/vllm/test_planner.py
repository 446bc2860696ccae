"""Tests of the planner, against the real cache: what it asks, holds, stores and gives back."""

from collections.abc import Callable
from typing import Any

import pytest

from saltern.core.messages import KEYS_MAX, Abort, Acquire, Commit, Discard, Lookup, Release, Reserve
from saltern.core.tenants import Limits
from saltern.vllm.copies import Reports
from saltern.vllm.planner import ASKING_SECONDS_MAX, ASKING_SECONDS_MIN, ASKING_SHARE, HELD_SHARE_MAX
from saltern.vllm.settings import StoreMode
from tests.vllm.engine import PATIENCE_SECONDS, STEP_SECONDS, Engine, EngineMaker, FakeRequest

PROMPT = [0, 1, 2, 3, 0, 2, 1, 3]  # two blocks of the cache, four of the engine


def stored(engine: Engine, tokens: list[int], salt: str = "alice") -> None:
    """Have a request compute and store a prompt, and end."""
    engine.arrive(tokens, salt)
    engine.settle()
    assert engine.ready_blocks(salt) == len(tokens) // engine.block_tokens, "the prompt was not stored"


def computing(engine: Engine, tokens: list[int], salt: str = "alice", *, outputs: int = 1) -> FakeRequest:
    """Add a request whose lookup is answered, so that the next step computes what it doesn't find."""
    request = engine.arrive(tokens, salt, outputs=outputs)
    engine.clock.advance(0.001)
    return request


def reconnect(engine: Engine, lost: bytes) -> None:
    """Take steps until there is another session than the lost one."""
    for _ in range(200):
        if engine.session.is_open and engine.session.incarnation != lost:
            return
        engine.step()
    raise AssertionError("the engine doesn't find its server again")


def match(engine: Engine, request: FakeRequest, local_tokens: int = 0) -> int | None:
    """Ask what can be loaded, outside of a step."""
    return engine.planner.match(request.request_id, local_tokens)


class TestHits:
    """What is loaded: the longest prefix beyond what the engine has, asked for once and early."""

    def test_a_stored_prompt_is_loaded_again(self, engine: Engine) -> None:
        stored(engine, PROMPT)
        request = engine.arrive([*PROMPT, 1], "alice")
        engine.settle()
        assert request.loaded_tokens == 8

    def test_a_shared_beginning_is_loaded_as_far_as_it_goes(self, engine: Engine) -> None:
        stored(engine, PROMPT)
        request = engine.arrive([*PROMPT[:4], 3, 3, 3, 3], "alice")
        engine.settle()
        assert request.loaded_tokens == 4

    def test_the_early_lookup_spares_the_wait_for_a_miss(self, engine: Engine) -> None:
        request = engine.arrive(PROMPT)
        engine.clock.advance(0.001)
        before = engine.clock()
        assert match(engine, request) == 0
        assert engine.clock() == before

    def test_a_request_that_queued_finds_what_was_stored_meanwhile(self, engine: Engine) -> None:
        queued = engine.arrive(PROMPT, "alice")
        engine.waiting.remove(queued)  # as for a request that vLLM has no place for
        engine.arrive(PROMPT, "alice", outputs=2 * int(PATIENCE_SECONDS / STEP_SECONDS))
        for _ in range(2 * int(PATIENCE_SECONDS / STEP_SECONDS)):
            engine.step()
            engine.work()
            engine.report()
        assert match(engine, queued) == 8
        engine.waiting.append(queued)

    def test_a_first_ask_waits_for_an_answer_that_is_near(self, engine: Engine) -> None:
        stored(engine, PROMPT)
        assert match(engine, engine.arrive(PROMPT, "alice")) == 8

    def test_a_prefix_that_need_not_be_loaded_is_marked_as_used(self, make_engine: EngineMaker) -> None:
        engine = make_engine(local_hits=True)
        stored(engine, PROMPT)
        request = engine.arrive(PROMPT, "alice")
        engine.clock.advance(0.001)
        assert match(engine, request, local_tokens=8) == 0
        block = next(iter(next(iter(engine.server.cache.default_tenant.user_by_id.values())).block_by_key.values()))
        assert block.touched_at == engine.clock()

    def test_asking_again_after_a_failed_allocation_asks_the_server_once(self, engine: Engine) -> None:
        stored(engine, PROMPT)
        asked = len(engine.sent_of(Acquire))
        request = engine.arrive(PROMPT, "alice")
        assert [match(engine, request) for _ in range(3)] == [8, 8, 8]
        assert len(engine.sent_of(Acquire)) == asked + 1
        assert engine.server.leases() == 1

    def test_a_local_hit_may_end_inside_a_block(self, make_engine: EngineMaker) -> None:
        engine = make_engine(local_hits=True)
        stored(engine, PROMPT)
        engine.arrive(PROMPT[:6], "alice", outputs=50)
        for _ in range(3):
            engine.step()
            engine.work()
            engine.report()
        request = engine.arrive(PROMPT, "alice")
        (load,) = engine.step().loads
        (piece,) = load.pieces
        assert (piece.first_slot, piece.engine_blocks) == (1, tuple(request.block_ids[3:4]))
        engine.settle()
        assert request.loaded_tokens == 2

    def test_blocks_that_the_engine_lost_since_the_last_ask_are_asked_for_again(self, engine: Engine) -> None:
        stored(engine, PROMPT)
        request = engine.arrive(PROMPT, "alice")
        assert match(engine, request, local_tokens=4) == 4
        assert match(engine, request, local_tokens=0) == 8
        assert engine.server.leases() == 1

    def test_a_preempted_request_is_matched_anew(self, engine: Engine) -> None:
        request = engine.arrive(PROMPT, "alice", outputs=20)
        for _ in range(3):
            engine.step()
            engine.work()
            engine.report()
        engine.preempt(request)
        engine.settle()
        assert request.loaded_tokens == 8

    def test_a_request_shorter_than_a_block_asks_for_nothing(self, engine: Engine) -> None:
        before = len(engine.sent_of(Acquire))
        assert match(engine, engine.arrive(PROMPT[:3])) == 0
        assert len(engine.sent_of(Acquire)) == before


class TestLeases:
    """What is pinned is given back, exactly once, whatever becomes of the request."""

    def test_the_second_admission_of_a_load_keeps_its_lease(self, make_engine: EngineMaker) -> None:
        engine = make_engine()
        stored(engine, PROMPT)
        request = engine.arrive(PROMPT, "alice")
        engine.step()
        engine.planner.admit(request.request_id, (request.block_ids,), 0)
        assert engine.server.leases() == 1
        engine.settle()
        assert len(engine.sent_of(Release)) == 1

    def test_a_hit_that_is_admitted_without_a_load_is_released(self, engine: Engine) -> None:
        stored(engine, PROMPT)
        request = engine.arrive(PROMPT, "alice")
        assert match(engine, request) == 8
        engine.planner.admit(request.request_id, (), 0)
        assert engine.server.leases() == 0

    def test_a_request_that_waits_past_its_patience_misses_and_its_late_answer_is_released(
        self, engine: Engine
    ) -> None:
        stored(engine, PROMPT)
        engine.server.reply_seconds = 2 * PATIENCE_SECONDS
        request = engine.arrive(PROMPT, "alice")
        assert match(engine, request) is None
        engine.clock.advance(PATIENCE_SECONDS)
        assert match(engine, request) == 0
        assert engine.server.leases() == 1, "the server has pinned by now"
        engine.clock.advance(PATIENCE_SECONDS)
        engine.step()
        assert engine.server.leases() == 0

    def test_patience_lasts_at_least_one_engine_step(self, engine: Engine) -> None:
        stored(engine, PROMPT)
        engine.server.reply_seconds = 0.001
        request = engine.arrive(PROMPT, "alice")
        assert match(engine, request) is None
        engine.clock.advance(10 * PATIENCE_SECONDS)  # a long step
        assert match(engine, request) == 8

    def test_an_aborted_requests_late_answer_is_released(self, make_engine: EngineMaker) -> None:
        engine = make_engine()
        stored(engine, PROMPT)
        engine.server.reply_seconds = 0.02
        request = engine.arrive(PROMPT, "alice")
        assert match(engine, request) is None
        engine.abort(request)
        assert engine.server.leases() == 1
        engine.settle()
        assert engine.server.leases() == 0

    @pytest.mark.parametrize("phase", ["answered", "loading", "copied"])
    def test_a_request_aborted_while(self, engine: Engine, phase: str) -> None:
        stored(engine, PROMPT)
        request = engine.arrive(PROMPT, "alice")
        if phase == "answered":
            assert match(engine, request) == 8
        else:
            engine.step()
            assert request.is_loading
        if phase == "copied":
            engine.work()
        engine.abort(request)
        engine.settle()
        assert engine.server.leases() == 0
        assert engine.blocks.available == engine.blocks.total - 1


class TestTime:
    """A slow server costs a small share of a step, and a dead or frozen one soon nothing."""

    @pytest.mark.parametrize(
        ("step_seconds", "may_wait"),
        [(0.001, ASKING_SECONDS_MIN), (0.1, ASKING_SHARE * 0.1), (100, ASKING_SECONDS_MAX)],
        ids=["short steps", "long steps", "an idle engine"],
    )
    def test_all_asks_of_one_schedule_share_one_wait(
        self, engine: Engine, step_seconds: float, may_wait: float
    ) -> None:
        engine.server.is_frozen = True
        engine.planner.plan({}, lambda _: None)
        engine.clock.advance(step_seconds)
        before = engine.clock()
        requests = [engine.arrive(PROMPT, f"user {number}") for number in range(20)]
        assert [match(engine, request) for request in requests] == [None] * 20
        assert engine.clock() - before == pytest.approx(may_wait, abs=20e-6)
        engine.server.thaw()

    def test_the_next_schedule_may_wait_anew(self, engine: Engine) -> None:
        engine.server.is_frozen = True
        requests = [engine.arrive(PROMPT, f"user {number}") for number in range(20)]
        for _ in range(2):
            engine.planner.plan({}, lambda _: None)
            before = engine.clock()
            assert [match(engine, request) for request in requests] == [None] * 20
            assert 0 < engine.clock() - before < ASKING_SECONDS_MIN + 20e-6
        engine.server.thaw()

    def test_a_step_is_worth_waiting_for_an_answer(self, engine: Engine) -> None:
        """On busy processors an answer takes milliseconds, and a step so long that asking again costs far more."""
        engine.server.reply_seconds = 0.01
        engine.planner.plan({}, lambda _: None)
        engine.clock.advance(1.0)
        assert match(engine, engine.arrive(PROMPT)) == 0

    def test_while_an_answer_is_overdue_nothing_more_is_asked_and_nobody_waits(self, engine: Engine) -> None:
        stored(engine, PROMPT)
        engine.server.is_frozen = True
        first = engine.arrive([1] * 8, outputs=100)
        for _ in range(10):
            engine.step()
        sent, later = len(engine.sent), engine.arrive(PROMPT, "alice", outputs=3)
        before = engine.clock()
        assert match(engine, later) == 0
        assert engine.clock() == before
        engine.step()
        assert len(engine.sent) == sent
        assert not engine.planner.has_unfinished_work, "an idle engine would spin until the server thaws"
        engine.server.thaw()
        engine.step()
        again = engine.arrive(PROMPT, "alice")
        engine.settle()
        assert again.loaded_tokens == 8
        assert first.loaded_tokens == 0

    def test_without_a_server_requests_are_computed_as_if_there_was_no_cache(self, engine: Engine) -> None:
        engine.server.kill()
        request = engine.arrive(PROMPT, "alice", outputs=3)
        before = engine.clock()
        engine.step()
        assert engine.clock() == before + STEP_SECONDS
        engine.settle()
        assert request in engine.finished

    def test_an_engine_that_idles_is_stepped_until_its_stores_have_ended(self, engine: Engine) -> None:
        engine.arrive(PROMPT, "alice")
        seen = []
        for _ in range(3):  # reserves; has the workers copy; ends
            engine.step()
            seen.append((engine.planner.has_unfinished_work, engine.planner.has_stores_in_flight))
            engine.work()
            engine.report()
        assert seen == [(True, False), (True, True), (False, False)]


class TestFailedLoads:
    """A block that can't be loaded is reported, and its request never asks again."""

    def test_a_failed_load_is_the_last(self, make_engine: EngineMaker) -> None:
        engine = make_engine()
        stored(engine, PROMPT)
        request = engine.arrive(PROMPT, "alice", outputs=30)
        engine.step()
        engine.work(fail=True)
        engine.report()
        for _ in range(5):  # computes the prompt itself, and stores it anew
            engine.step()
            engine.work()
            engine.report()
        assert engine.ready_blocks("alice") == 2
        engine.preempt(request)
        assert match(engine, request) == 0
        engine.settle()
        assert request.loaded_tokens == 0

    def test_after_a_failed_load_others_are_looked_at_first(self, make_engine: EngineMaker) -> None:
        engine = make_engine()
        stored(engine, PROMPT)
        request = engine.arrive(PROMPT, "alice")
        engine.step()
        engine.work(fail=True)
        engine.report()
        assert [engine.planner.match(request.request_id, 0) for _ in range(3)] == [None, 0, 0]

    def test_until_its_request_starts_anew_nobody_is_promised_blocks(self, make_engine: EngineMaker) -> None:
        engine = make_engine()
        stored(engine, PROMPT)
        stored(engine, PROMPT, "bob")
        failed = engine.arrive(PROMPT, "alice")
        engine.step()
        engine.work(fail=True)
        engine.report()
        other = computing(engine, PROMPT, "bob")
        assert match(engine, other) == 0, "vLLM has reserved room for the other and would let this one wait behind it"
        engine.planner.admit(failed.request_id, ((0,),), 0)
        assert match(engine, other) == len(PROMPT)
        engine.abort(other)

    @pytest.mark.parametrize("failure", ["before", "after"])
    def test_nor_when_the_weights_change_meanwhile(self, make_engine: EngineMaker, failure: str) -> None:
        engine = make_engine()
        for weights, user in ((b"other weights", "bob"), (b"weights", "alice")):
            engine.reset(weights)
            stored(engine, PROMPT, user)
        failed = engine.arrive(PROMPT, "alice")
        engine.step()
        if failure == "after":
            engine.reset(b"other weights")
        engine.work(fail=True)
        engine.report()
        if failure == "before":
            engine.reset(b"other weights")
        other = computing(engine, PROMPT, "bob")
        assert match(engine, other) == 0
        assert [match(engine, failed), match(engine, failed)] == [None, 0], "vLLM keeps it in front of all others"
        engine.planner.admit(failed.request_id, ((0,),), 0)
        assert match(engine, other) == len(PROMPT)
        engine.abort(other)

    def test_the_bad_block_and_what_continues_it_are_discarded(self, make_engine: EngineMaker) -> None:
        engine = make_engine(store=StoreMode.PROMPT)
        stored(engine, [*PROMPT, 3, 3, 3, 3])
        request = engine.arrive(PROMPT, "alice")
        engine.step()
        engine.work(fail=True)
        engine.report()
        assert len(engine.sent_of(Discard)) == 1
        assert engine.ready_blocks("alice") == 0
        assert engine.server.leases() == 0
        engine.abort(request)

    def test_a_rank_without_an_arena_says_nothing_of_the_blocks_in_it(self, make_engine: EngineMaker) -> None:
        engine = make_engine()
        stored(engine, PROMPT)
        engine.arrive(PROMPT, "alice")
        (load,) = engine.step().loads
        engine.ranks[0].pending.clear()
        engine.planner.report(Reports(failed={load.op_id: 1}, untouched={load.op_id: 1}))
        engine._loaded(load.request_id, is_failed=True)
        engine.settle()
        assert not engine.sent_of(Discard)
        assert engine.ready_blocks("alice") == 2

    def test_one_rank_that_fails_fails_the_load(self, make_engine: EngineMaker) -> None:
        engine = make_engine(ranks=2)
        stored(engine, PROMPT)
        request = engine.arrive(PROMPT, "alice", outputs=2)
        engine.step()
        engine.work(rank=0)
        engine.work(rank=1, fail=True)
        engine.report(rank=1)
        assert engine.server.leases() == 1, "rank 0 may still read"
        engine.report(rank=0)
        assert engine.server.leases() == 0
        engine.settle()
        assert request.loaded_tokens == 0


class TestHolding:
    """Blocks are held from the step that fills them to the end of their store, whatever ends it."""

    def test_until_every_rank_has_reported(self, make_engine: EngineMaker) -> None:
        engine = make_engine(ranks=2)
        engine.arrive(PROMPT, "alice")
        engine.step()
        assert engine.held() == 4
        engine.step()
        engine.work()
        engine.report(rank=1)
        assert engine.held() == 4
        engine.report(rank=0)
        assert engine.held() == 0

    def test_until_the_server_refuses(self, make_engine: EngineMaker) -> None:
        engine = make_engine(limits=Limits(user_limit_bytes=1))
        engine.arrive(PROMPT, "alice")
        engine.step()
        assert engine.held() == 4
        engine.step()
        assert engine.held() == 0
        assert not engine.sent_of(Commit)

    def test_until_the_answer_is_overdue_and_then_a_late_one_is_aborted(self, engine: Engine) -> None:
        computing(engine, PROMPT)
        engine.server.is_frozen = True
        engine.step()
        assert engine.held() == 4
        for _ in range(int(PATIENCE_SECONDS / STEP_SECONDS) + 1):
            engine.step()
        assert engine.held() == 0
        engine.server.thaw()
        engine.settle()
        assert len(engine.sent_of(Abort)) == 1
        assert not engine.sent_of(Commit)
        assert engine.ready_blocks("alice") == 0

    @pytest.mark.parametrize("loss", ["server", "lifelines"])
    def test_until_the_session_is_lost_before_a_worker_knows_of_it(self, engine: Engine, loss: str) -> None:
        engine.arrive(PROMPT, "alice")
        engine.step()
        assert engine.held() == 4
        engine.server.restart() if loss == "server" else engine.server.lose_workers()
        engine.step()
        assert engine.held() == 0
        engine.server.attach_workers()

    def test_a_worker_that_copies_keeps_its_blocks_when_the_session_is_lost(self, engine: Engine) -> None:
        engine.arrive(PROMPT, "alice")
        engine.step()
        engine.step()
        engine.server.restart()
        engine.step()
        assert engine.held() == 4
        engine.work()
        engine.report()
        assert engine.held() == 0

    def test_a_preempted_requests_blocks_are_stored_although_another_wants_them(self, make_engine: EngineMaker) -> None:
        engine = make_engine(blocks=18)
        request = engine.arrive(PROMPT, "alice", outputs=10)
        engine.step()
        engine.preempt(request)
        engine.abort(request)
        other = engine.arrive([3] * 20, "bob")  # takes whatever is free
        engine.settle()
        assert other in engine.finished
        assert engine.ready_blocks("alice") == 2

    def test_a_finished_requests_blocks_are_not_reused_before_the_copy(self, make_engine: EngineMaker) -> None:
        engine = make_engine(blocks=18)
        engine.arrive(PROMPT, "alice")
        engine.step()
        engine.arrive([3] * 24, "bob")  # takes nearly all there is
        for _ in range(2):
            engine.step()
        engine.work()
        engine.report()
        assert engine.ready_blocks("alice") == 2

    def test_a_finished_requests_blocks_are_stored(self, engine: Engine) -> None:
        request = engine.arrive(PROMPT, "alice", outputs=1)
        engine.step()
        assert request in engine.finished
        engine.settle()
        assert engine.ready_blocks("alice") == 2

    def test_a_bounded_share_is_held_and_the_rest_is_offered_later(self, make_engine: EngineMaker) -> None:
        engine = make_engine(blocks=24)
        engine.arrive([*PROMPT, *PROMPT, *PROMPT], "alice", outputs=20)
        engine.settle()
        assert engine.blocks.held_max == 6 == HELD_SHARE_MAX * engine.blocks.total
        assert engine.ready_blocks("alice") == 6

    def test_the_bound_holds_in_a_new_session_too(self, make_engine: EngineMaker) -> None:
        engine = make_engine(blocks=32, store=StoreMode.ALL)
        engine.arrive([*PROMPT, *PROMPT, *PROMPT], "alice", outputs=30)
        for _ in range(12):
            engine.step()
            engine.work()
            engine.report()
        engine.server.restart()
        engine.settle()
        assert engine.blocks.held_max <= HELD_SHARE_MAX * engine.blocks.total


class TestStoring:
    """A block is published when every rank has written it, and only then."""

    def test_an_unfinished_write_is_not_committed(self, make_engine: EngineMaker) -> None:
        engine = make_engine(ranks=2)
        engine.arrive(PROMPT, "alice")
        engine.step()
        engine.step()
        engine.work(rank=0)
        engine.report()
        assert not engine.sent_of(Commit)
        assert engine.ready_blocks("alice") == 0

    def test_a_rank_that_fails_aborts_once_all_have_reported(self, make_engine: EngineMaker) -> None:
        engine = make_engine(ranks=2)
        engine.arrive(PROMPT, "alice")
        engine.step()
        engine.step()
        engine.work(rank=0, fail=True)
        engine.report()
        assert not engine.sent_of(Abort), "rank 1 may still write"
        engine.work(rank=1)
        engine.report()
        assert len(engine.sent_of(Abort)) == 1
        assert not engine.sent_of(Commit)

    def test_chunks_of_a_prompt_are_reserved_while_the_first_answer_is_outstanding(self, engine: Engine) -> None:
        computing(engine, PROMPT)
        engine.server.reply_seconds = 3 * STEP_SECONDS
        engine.step(budget=4)
        engine.step(budget=4)
        assert [(ask.start, len(ask.keys)) for ask in engine.sent_of(Reserve)] == [(0, 1), (1, 2)]
        engine.settle()
        assert engine.ready_blocks("alice") == 2

    def test_after_a_refusal_the_next_offer_starts_where_the_server_stopped(self, make_engine: EngineMaker) -> None:
        engine = make_engine(limits=Limits(user_limit_bytes=2))  # a page, which is a block
        engine.arrive(PROMPT, "alice", outputs=5)
        engine.step()
        engine.step()
        engine.step()
        assert [ask.start for ask in engine.sent_of(Reserve)] == [0]
        engine.settle()
        assert engine.ready_blocks("alice") == 1

    def test_what_was_refused_is_offered_again_with_the_next_block_and_not_at_every_step(
        self, make_engine: EngineMaker
    ) -> None:
        engine = make_engine(limits=Limits(user_limit_bytes=2), store=StoreMode.ALL)  # a page, which is a block
        engine.arrive(PROMPT, "alice", outputs=8)
        engine.settle()
        asked = [(ask.start, len(ask.keys)) for ask in engine.sent_of(Reserve)]
        assert asked == [(0, 2), (1, 3)] + [(1, 4)] * (len(asked) - 2)
        assert len(asked) <= 3

    def test_what_a_rank_failed_to_store_is_offered_again_with_the_next_block(self, make_engine: EngineMaker) -> None:
        engine = make_engine(store=StoreMode.ALL)
        engine.arrive(PROMPT, "alice", outputs=6)
        engine.step()
        engine.step()
        engine.work(fail=True)
        engine.report()
        engine.settle()
        assert [(ask.start, len(ask.keys)) for ask in engine.sent_of(Reserve)] == [(0, 2), (0, 3)]
        assert engine.ready_blocks("alice") == 3

    def test_what_was_given_up_as_overdue_is_offered_again(self, engine: Engine) -> None:
        computing(engine, PROMPT, outputs=4 * int(PATIENCE_SECONDS / STEP_SECONDS))
        engine.server.is_frozen = True
        for _ in range(int(PATIENCE_SECONDS / STEP_SECONDS) + 2):
            engine.step()
        engine.server.thaw()
        engine.settle()
        assert engine.ready_blocks("alice") == 2

    def test_a_pool_too_small_to_hold_a_block_is_told_at_start(
        self, make_engine: EngineMaker, caplog: pytest.LogCaptureFixture
    ) -> None:
        make_engine(blocks=4)
        assert "nothing will be stored" in caplog.text

    def test_a_parent_that_is_gone_is_offered_again(self, engine: Engine) -> None:
        computing(engine, PROMPT, outputs=5)
        engine.step(budget=4)
        (reserve,) = engine.sent_of(Reserve)
        engine.session.send(Discard(reserve.user, reserve.keys[0]))
        engine.settle()
        assert [ask.start for ask in engine.sent_of(Reserve)] == [0, 1, 0]
        assert engine.ready_blocks("alice") == 2

    @pytest.mark.parametrize(("store", "blocks"), [(StoreMode.PROMPT, 1), (StoreMode.ALL, 3)])
    def test_generated_tokens_are_stored_if_asked_for(
        self, make_engine: EngineMaker, store: StoreMode, blocks: int
    ) -> None:
        engine = make_engine(store=store)
        engine.arrive(PROMPT[:6], "alice", outputs=7)  # the last token is never computed
        engine.settle()
        assert engine.ready_blocks("alice") == blocks

    @pytest.mark.parametrize(
        ("computed", "scheduled", "placeholders", "known", "blocks"),
        [
            (7, 1, 0, 8, 2),
            (6, 1, 0, 8, 1),  # one token short
            (7, 1, 1, 8, 1),  # the step before has not returned: its token may be another
            (8, 1, 1, 8, 2),
            (7, 4, 0, 7, 1),  # computed ahead of what is known
            (8, 3, 3, 8, 2),
        ],
    )
    def test_only_confirmed_tokens_make_a_full_block(
        self, make_engine: EngineMaker, computed: int, scheduled: int, placeholders: int, known: int, blocks: int
    ) -> None:
        engine = make_engine(store=StoreMode.ALL)
        request = engine.arrive(PROMPT[:known], "alice")
        request.num_prompt_tokens = 2
        request.num_computed_tokens, request.num_output_placeholders = computed, placeholders
        request.block_ids = engine.blocks.allocate(6) or []
        engine.planner.plan({request.request_id: scheduled}, {request.request_id: (request.block_ids,)}.get)
        assert [len(ask.keys) for ask in engine.sent_of(Reserve)] == [blocks]
        assert engine.held() == 2 * blocks
        engine.planner.remove(request.request_id)
        engine.waiting.clear()
        for rank in engine.ranks:  # as if computed
            rank.kv = {
                block_id: ("alice", tuple(PROMPT[: 2 * index + 2]), 0)
                for index, block_id in enumerate(request.block_ids)
            }
        engine.blocks.give_back(request.block_ids)
        engine.settle()

    def test_a_block_short_of_one_token_is_not_offered(self, make_engine: EngineMaker) -> None:
        engine = make_engine()
        computing(engine, PROMPT)
        engine.step(budget=7)
        assert [len(ask.keys) for ask in engine.sent_of(Reserve)] == [1]
        engine.settle()

    def test_a_request_that_is_not_in_the_step_is_not_offered(self, engine: Engine) -> None:
        request = engine.arrive(PROMPT, "alice")
        engine.planner.plan({request.request_id: 8, "unheard of": 8}, lambda _: None)
        assert not engine.sent_of(Reserve)

    def test_a_report_of_an_unknown_operation_is_ignored(self, engine: Engine) -> None:
        engine.planner.report(Reports(done={4711: 1}, failed={4712: 1}))
        assert not any(engine.planner.leftovers.values())


class TestSessions:
    """A lost session takes its keys, leases and questions with it, and nothing else."""

    def test_keys_change_with_the_servers_secret(self, engine: Engine) -> None:
        stored(engine, PROMPT)
        engine.server.restart()
        reconnect(engine, lost=engine.session.incarnation)
        stored(engine, PROMPT)
        first, second = (ask.keys for ask in engine.sent_of(Reserve))
        assert not {*first} & {*second}

    def test_keys_stay_with_a_secret_of_the_engines_own(self, make_engine: EngineMaker) -> None:
        engine = make_engine(naming_secret=b"s" * 32)
        stored(engine, PROMPT)
        engine.server.restart()
        reconnect(engine, lost=engine.session.incarnation)
        stored(engine, PROMPT)
        first, second = (ask.keys for ask in engine.sent_of(Reserve))
        assert first == second

    def test_what_was_offered_to_a_lost_session_is_offered_to_the_next(self, make_engine: EngineMaker) -> None:
        engine = make_engine()
        engine.arrive(PROMPT, "alice", outputs=30)
        for _ in range(4):
            engine.step()
            engine.work()
            engine.report()
        assert engine.ready_blocks("alice") == 2
        engine.server.restart()
        engine.settle()
        assert engine.ready_blocks("alice") == 2

    @pytest.mark.parametrize("loss", ["server", "lifelines"])
    def test_copies_of_a_lost_session_are_reported_but_neither_committed_nor_released(
        self, engine: Engine, loss: str
    ) -> None:
        stored(engine, PROMPT)
        loading = engine.arrive(PROMPT, "alice")
        engine.arrive([2] * 8, "bob")
        engine.step()
        engine.step()
        assert {is_store for _, is_store in engine.ranks[0].pending} == {True, False}
        sent, lost = len(engine.sent), engine.session.incarnation
        if loss == "server":
            engine.server.restart()
        else:
            engine.server.lose_workers()
            engine.server.attach_workers()
        engine.settle()
        assert loading in engine.finished
        assert loading.loaded_tokens == 0
        reconnect(engine, lost)
        assert not [m for m in engine.sent[sent:] if isinstance(m, Commit | Abort | Release | Discard)]

    def test_a_request_whose_question_was_lost_misses(self, engine: Engine) -> None:
        stored(engine, PROMPT)
        engine.server.reply_seconds = 0.02
        request = engine.arrive(PROMPT, "alice")
        assert match(engine, request) is None
        engine.server.kill()
        assert match(engine, request) == 0

    def test_a_hit_of_a_lost_session_is_not_admitted(self, engine: Engine) -> None:
        stored(engine, PROMPT)
        request = engine.arrive(PROMPT, "alice")
        assert match(engine, request) == 8
        engine.server.restart()
        assert match(engine, request) == 0

    def test_a_reset_publishes_nothing_that_was_being_stored(self, engine: Engine) -> None:
        computing(engine, PROMPT, outputs=5)
        engine.step()
        engine.step()  # the workers have it
        computing(engine, [3, 3, 3, 3], outputs=5)
        engine.step()  # this one is only reserved
        engine.reset(b"other weights")
        assert engine.held() == 4, "only what workers copy from is still held"
        engine.settle()
        assert not engine.sent_of(Commit)
        assert len(engine.sent_of(Abort)) == 2
        assert engine.server.cache.default_tenant.used_pages == 0

    def test_a_reset_leaves_what_was_computed_behind(self, engine: Engine) -> None:
        stored(engine, PROMPT)
        running = engine.arrive(PROMPT, "bob", outputs=10)
        engine.step()
        engine.reset(b"other weights")
        request = engine.arrive(PROMPT, "alice")
        engine.settle()
        assert request.loaded_tokens == 0
        assert running in engine.finished
        assert engine.ready_blocks("alice") == 4  # of either namespace
        again = engine.arrive(PROMPT, "alice")
        engine.settle()
        assert again.loaded_tokens == 8


class TestUsers:
    """A salt is a user, and nobody gets what is another's."""

    @pytest.mark.parametrize(("owner", "other"), [("alice", "bob"), ("alice", ""), ("", "alice"), ("a", "a\0")])
    def test_equal_prompts_of_two_users_share_nothing(self, engine: Engine, owner: str, other: str) -> None:
        stored(engine, PROMPT, owner)
        request = engine.arrive(PROMPT, other)
        engine.settle()
        assert request.loaded_tokens == 0
        first, second = engine.sent_of(Reserve)
        assert first.user != second.user
        assert not {*first.keys} & {*second.keys}

    def test_neighbours_in_a_batch_keep_their_own_salts(self, make_engine: EngineMaker) -> None:
        engine = make_engine()
        salts = ["alice", "bob", "", "carol"]
        for hit in (0, 8):
            requests = [engine.arrive(PROMPT, salt) for salt in salts]
            engine.settle()
            assert [request.loaded_tokens for request in requests] == [hit] * 4
        users = engine.server.cache.default_tenant.user_by_id
        assert len(users) == 4
        assert {len(user.block_by_key) for user in users.values()} == {2}

    def test_a_salt_never_leaves_the_engine(self, engine: Engine) -> None:
        stored(engine, PROMPT, "a very secret salt")
        assert "a very secret salt" not in repr(engine.sent)
        assert b"a very secret salt".hex() not in repr(engine.sent)


class TestHostileRequests:
    """Nothing that a request carries raises: that would end the engine for everybody."""

    @pytest.mark.parametrize("token", [2**31, -(2**31) - 1, 2**63, 2**200, None, "7", 1.5, [1]])
    @pytest.mark.parametrize("position", [0, 5, 7])
    @pytest.mark.parametrize("served", [True, False], ids=["served", "unserved"])
    def test_token_ids_that_are_none(self, engine: Engine, token: Any, position: int, served: bool) -> None:
        if not served:
            engine.server.kill()
            engine.step()
        request = engine.arrive([*PROMPT[:position], token, *PROMPT[position + 1 :]], "alice", outputs=3)
        if not served:
            engine.server.restart()
            engine.clock.advance(1.0)
        engine.settle()
        assert request in engine.finished
        assert engine.ready_blocks("alice") == 0

    @pytest.mark.parametrize("token", [-1, -(2**31), 2**31 - 1])
    def test_token_ids_that_are_only_strange(self, engine: Engine, token: int) -> None:
        stored(engine, [token] * 4)
        request = engine.arrive([token] * 4, "alice")
        engine.settle()
        assert request.loaded_tokens == 4

    @pytest.mark.parametrize("salt", ["\0", "\udc80", "ä" * 10_000, "../../etc"])
    def test_salts_of_any_kind(self, engine: Engine, salt: str) -> None:
        stored(engine, PROMPT, salt)
        request = engine.arrive(PROMPT, salt)
        engine.settle()
        assert request.loaded_tokens == 8

    def test_a_prompt_of_more_blocks_than_a_message_holds_leaves_the_session_alone(
        self, make_engine: EngineMaker
    ) -> None:
        engine = make_engine(slots=1, blocks=8)
        request = engine.arrive([1] * (2 * KEYS_MAX + 4), "alice")
        assert match(engine, request) in (0, None)
        engine.abort(request)
        engine.settle()
        assert not engine.lines[0].is_closed, "the server hung up"

    @pytest.mark.parametrize(
        "call",
        [
            lambda engine: engine.planner.match("unknown", 0),
            lambda engine: engine.planner.admit("unknown", (), 0),
            lambda engine: engine.planner.remove("unknown"),
        ],
    )
    def test_requests_that_are_not_cached_pass(self, engine: Engine, call: Callable[[Engine], Any]) -> None:
        assert not call(engine)


def test_the_first_message_about_a_request_is_a_lookup(engine: Engine) -> None:
    engine.arrive(PROMPT, "alice")
    assert isinstance(engine.sent[-1], Lookup)
