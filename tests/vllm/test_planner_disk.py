"""Tests of the planner with a server that has to load what it is asked for: who waits, for how long, and what is left.

The server is the real one but for its answers on their way: what it pins is said to be on its disk, and is handed over
when a test says so.
"""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from saltern.core.messages import (
    Acquire,
    Acquired,
    Loading,
    LookedUp,
    Lookup,
    Refusal,
    Release,
    Reply,
    Reserve,
    Reserved,
)
from saltern.vllm.planner import NO_DISK_SECONDS
from tests.vllm.engine import LOAD_PATIENCE_SECONDS, PATIENCE_SECONDS, STEP_SECONDS, Engine, EngineMaker, FakeRequest

PROMPT = [0, 1, 2, 3, 0, 2, 1, 3]  # two blocks of the cache, four of the engine

Told = Callable[[Acquired], list[Reply]]
"""What a server says at once to what it would have answered."""


class Disk:
    """Holds back what is pinned from now on, as a server would that has to load all but the first `in_ram` blocks."""

    def __init__(self, engine: Engine, *, seconds: float = 0.1, in_ram: int = 0, told: Told | None = None) -> None:
        self._line, self._deliver = engine.lines[-1], engine.lines[-1].deliver
        self._in_ram = in_ram
        self._told = told or (lambda reply: [Loading(reply.request, len(reply.extents), seconds)])
        self._held_back: list[Acquired] = []
        engine.lines[-1].deliver = self._take  # type: ignore[method-assign]

    def _take(self, reply: Reply) -> None:
        if not isinstance(reply, Acquired) or not reply.extents:
            self._deliver(reply)
            return
        asked = [message for message in self._line.sent if isinstance(message, Acquire)][-1]
        if asked.block_seconds == NO_DISK_SECONDS:
            self._deliver(replace(reply, ready=self._in_ram, extents=reply.extents[: self._in_ram]))
            return
        self._held_back.append(reply)
        for said in self._told(reply):
            self._deliver(said)

    def load(self) -> None:
        """Have everything there, the last first."""
        while self._held_back:
            self._deliver(self._held_back.pop())


def stored(engine: Engine, *salts: str) -> None:
    """Have a prompt stored for each user; the engine has learned by then how fast it is."""
    for salt in salts or ("alice",):
        engine.arrive(PROMPT, salt)
        engine.settle()


def match(engine: Engine, request: FakeRequest) -> int | None:
    return engine.planner.match(request.request_id, 0)


def forget_pace(engine: Engine) -> None:
    """Have the engine not know how fast it is: then only its patience bounds what it waits."""
    engine.planner._pace.seconds_per_token = 0.0


def slow_down(engine: Engine) -> None:
    """Have the engine compute a block no faster than any disk."""
    engine.planner._pace.seconds_per_token = 100.0


def step(engine: Engine, steps: int = 1) -> None:
    for _ in range(steps):
        engine.step()
        engine.work()
        engine.report()


@pytest.fixture
def slow(engine: Engine) -> Engine:
    """Return an engine that has stored a prompt of alice's, and for which all waiting is worth it."""
    stored(engine)
    slow_down(engine)
    return engine


class TestWaiting:
    """A request waits for the disk while that is expected to be faster than computing, and others don't wait for it."""

    def test_a_request_waits_and_is_loaded(self, slow: Engine) -> None:
        disk = Disk(slow)
        request = slow.arrive(PROMPT, "alice")
        step(slow, 5)
        assert request in slow.waiting
        assert not request.is_loading
        disk.load()
        slow.settle()
        assert request.loaded_tokens == 8

    def test_it_may_take_longer_than_the_servers_answers(self, slow: Engine) -> None:
        disk = Disk(slow, seconds=2 * PATIENCE_SECONDS)
        request = slow.arrive(PROMPT, "alice")
        step(slow, int(3 * PATIENCE_SECONDS / STEP_SECONDS))
        other = slow.arrive([3] * 8, "bob", outputs=2)
        asked = len(slow.sent_of(Acquire))
        step(slow)
        assert len(slow.sent_of(Acquire)) == asked + 1, "the server was left alone, as if it didn't answer"
        disk.load()
        slow.settle()
        assert request.loaded_tokens == 8
        assert other in slow.finished

    def test_who_waits_asks_the_server_once_and_holds_up_no_step(self, slow: Engine) -> None:
        disk = Disk(slow)
        request = slow.arrive(PROMPT, "alice")
        step(slow)
        asked, before = len(slow.sent), slow.clock()
        assert [match(slow, request) for _ in range(5)] == [None] * 5
        assert (len(slow.sent), slow.clock()) == (asked, before)
        disk.load()
        slow.settle()

    def test_answers_come_in_any_order(self, engine: Engine) -> None:
        stored(engine, "alice", "bob", "carol")
        slow_down(engine)
        disk = Disk(engine)
        requests = [engine.arrive(PROMPT, salt) for salt in ("alice", "bob", "carol")]
        step(engine, 3)
        disk.load()
        engine.settle()
        assert [request.loaded_tokens for request in requests] == [8, 8, 8]

    def test_patience_has_an_end_and_what_comes_then_is_given_back(self, slow: Engine) -> None:
        forget_pace(slow)
        disk = Disk(slow)
        request = slow.arrive(PROMPT, "alice", outputs=3)
        step(slow, int(LOAD_PATIENCE_SECONDS / STEP_SECONDS))
        assert request in slow.waiting
        step(slow, 3)
        assert request not in slow.waiting
        assert slow.server.leases() == 1
        disk.load()
        slow.settle()
        assert request.loaded_tokens == 0
        assert slow.server.leases() == 0
        assert slow.planner.take_disk_counts().misses == 1

    def test_nobody_waits_longer_than_computing_takes(self, slow: Engine) -> None:
        slow.planner._pace.seconds_per_token = 0.1 / 8  # the prompt takes 0.1 s
        disk = Disk(slow, seconds=0.05)
        request = slow.arrive(PROMPT, "alice")
        step(slow, 9)
        assert request in slow.waiting
        step(slow, 4)
        assert request in slow.finished
        assert request.loaded_tokens == 0
        disk.load()

    @pytest.mark.parametrize("seconds", [0.05, 0.5], ids=["which is late", "which would take too long"])
    def test_without_the_disk(self, slow: Engine, seconds: float) -> None:
        slow.planner._pace.seconds_per_token = 0.1 / 8
        disk = Disk(slow, seconds=seconds, in_ram=1)
        request = slow.arrive([*PROMPT, 1], "alice")
        step(slow, 14)
        assert request in slow.finished
        assert request.loaded_tokens == 4
        disk.load()

    @pytest.mark.parametrize("seconds", [0.11, 1e300, float("inf"), float("nan")])
    def test_what_takes_longer_than_computing_is_not_waited_for(self, slow: Engine, seconds: float) -> None:
        slow.planner._pace.seconds_per_token = 0.1 / 8
        disk = Disk(slow, seconds=seconds)
        request = slow.arrive(PROMPT, "alice")
        assert match(slow, request) == 0
        assert slow.planner.take_disk_counts().misses == 1
        disk.load()
        slow.settle()

    def test_a_long_step_does_not_lose_what_was_there_in_time(self, slow: Engine) -> None:
        disk = Disk(slow)
        request = slow.arrive(PROMPT, "alice")
        step(slow)
        disk.load()
        slow.clock.advance(10 * LOAD_PATIENCE_SECONDS)
        assert match(slow, request) == 8

    def test_a_lookup_may_count_what_is_still_on_its_way(self, slow: Engine) -> None:
        disk = Disk(slow)
        request = slow.arrive(PROMPT, "alice")
        slow.clock.advance(0.001)  # the lookup is answered: both blocks are there, or will be
        assert match(slow, request) is None
        disk.load()
        slow.clock.advance(0.001)
        assert match(slow, request) == 8

    def test_what_was_lost_on_the_disk_makes_the_prefix_shorter(self, slow: Engine) -> None:
        disk = Disk(slow)
        request = slow.arrive(PROMPT, "alice")
        step(slow)
        disk._held_back = [replace(reply, ready=1, extents=reply.extents[:1]) for reply in disk._held_back]
        disk.load()
        slow.settle()
        assert request.loaded_tokens == 4

    def test_it_is_counted_what_came_from_the_disk(self, slow: Engine) -> None:
        disk = Disk(slow)
        request = slow.arrive(PROMPT, "alice")
        began = slow.clock()
        step(slow, 4)
        disk.load()
        step(slow)
        assert slow.planner.disk_tokens(request.request_id, 8) == 8
        assert slow.planner.disk_tokens(request.request_id, 4) == 4
        slow.settle()
        counts = slow.planner.take_disk_counts()
        assert (counts.loads, counts.blocks, counts.misses) == (1, 2, 0)
        assert 0 < counts.seconds <= slow.clock() - began
        again = slow.arrive([3] * 8, "bob")
        assert slow.planner.disk_tokens(again.request_id, 8) == 0
        assert slow.planner.disk_tokens("unheard of", 8) == 0


class TestEnds:
    """Whatever ends the wait, what the disk brings afterwards is pinned for nobody."""

    @pytest.mark.parametrize("end", ["abort", "reset"])
    def test_a_request_that_ends_meanwhile(self, slow: Engine, end: str) -> None:
        disk = Disk(slow)
        request = slow.arrive(PROMPT, "alice", outputs=2)
        step(slow, 2)
        slow.abort(request) if end == "abort" else slow.reset(b"other weights")
        assert slow.planner.has_unfinished_work, "an engine that sleeps now leaves blocks pinned for nobody"
        disk.load()
        slow.settle()
        assert slow.server.leases() == 0
        assert request.loaded_tokens == 0

    @pytest.mark.parametrize("loss", ["control", "lifelines", "server"])
    def test_a_session_that_ends_meanwhile(self, slow: Engine, loss: str) -> None:
        Disk(slow)
        request = slow.arrive(PROMPT, "alice", outputs=2)
        step(slow, 2)
        if loss == "control":
            slow.server.disconnect(slow.lines[-1])
        elif loss == "lifelines":
            slow.server.lose_workers()
            slow.server.attach_workers()
        else:
            slow.server.restart()
        slow.settle()
        assert request in slow.finished
        assert request.loaded_tokens == 0
        assert slow.server.leases() == 0

    def test_an_idle_engine_waits_for_what_it_has_to_give_back_and_not_for_ever(self, slow: Engine) -> None:
        Disk(slow)
        request = slow.arrive(PROMPT, "alice")
        step(slow, 2)
        slow.abort(request)
        steps = 0
        while slow.planner.has_unfinished_work:
            step(slow)
            steps += 1
            assert steps <= LOAD_PATIENCE_SECONDS / STEP_SECONDS + 1, "an engine without requests spins"
        waited = 3  # steps at most, until the abort
        assert steps >= LOAD_PATIENCE_SECONDS / STEP_SECONDS - waited, "what the disk brings now stays pinned"
        slow.server.disconnect(slow.lines[-1])  # which never brings it

    def test_a_request_that_gave_up_and_was_preempted_asks_anew(self, slow: Engine) -> None:
        forget_pace(slow)
        disk = Disk(slow)
        request = slow.arrive(PROMPT, "alice", outputs=30)
        step(slow, int(LOAD_PATIENCE_SECONDS / STEP_SECONDS) + 4)
        assert request in slow.running
        slow.preempt(request)
        slow_down(slow)
        disk.load()  # the first answer, which nobody waits for, comes before the second
        step(slow)
        disk.load()
        slow.settle()
        assert request.loaded_tokens == 8
        assert len(slow.sent_of(Release)) == 3  # with that of what was there without the disk


def once(said: Loading) -> Told:
    return lambda reply: [replace(said, request=reply.request)]


STRANGE: dict[str, Told] = {
    "twice": lambda reply: [Loading(reply.request, 2, 0.1), Loading(reply.request, 2, 0.1)],
    "for a request that nobody made": lambda reply: [Loading(2**40, 2, 0.1), Loading(reply.request, 2, 0.1)],
    "for a lookup": lambda reply: [Loading(reply.request - 1, 2, 0.1), Loading(reply.request, 2, 0.1)],
    "of less than nothing": once(Loading(0, -1, 0.1)),
    "of more than there is": once(Loading(0, 2**63, 0.1)),
    "of nothing": once(Loading(0, 0, 0.1)),
    "from before now": once(Loading(0, 2, -1e300)),
    "for ever": once(Loading(0, 2, 1e300)),
    "for a time that is no number": once(Loading(0, 2, float("nan"))),
    "and is not answered in its turn": lambda reply: [],
    "and looks up": lambda reply: [LookedUp(reply.request, 2)],
    "and reserves": lambda reply: [Reserved(reply.request, 0, (), 0, None)],
    "and then reserves": lambda reply: [Loading(reply.request, 2, 0.1), Reserved(reply.request, 0, (), 0, None)],
}


class TestStrangeServers:
    """Whatever a server says of its disk, requests are answered, nothing raises, and nothing is kept."""

    @pytest.mark.parametrize("is_loaded", [True, False])
    @pytest.mark.parametrize("name", STRANGE)
    def test_a_server_that_loads(self, make_engine: EngineMaker, name: str, is_loaded: bool) -> None:
        engine = make_engine()
        stored(engine)
        slow_down(engine)
        disk = Disk(engine, told=STRANGE[name])
        request = engine.arrive(PROMPT, "alice", outputs=2)
        step(engine, 3)
        if is_loaded:
            disk.load()
        step(engine, int(LOAD_PATIENCE_SECONDS / STEP_SECONDS) + 5)
        assert request in engine.finished
        disk.load()  # what nobody waits for
        step(engine)
        engine.settle()
        assert engine.server.leases() == 0

    def test_a_reservation_that_loads_stores_nothing(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        line, deliver = engine.lines[-1], engine.lines[-1].deliver

        def load(reply: Reply) -> None:
            if isinstance(reply, Reserved):
                deliver(Loading(reply.request, 1, 0.1))
            deliver(reply)

        monkeypatch.setattr(line, "deliver", load)
        request = engine.arrive(PROMPT, "alice")
        engine.settle()
        assert request in engine.finished
        assert engine.ready_blocks("alice") == 0

    def test_a_server_that_only_ever_loads_fills_no_memory(self, slow: Engine) -> None:
        Disk(slow)
        for _ in range(30):
            slow.abort(slow.arrive(PROMPT, "alice"))
            step(slow, 3)
            left = slow.planner.leftovers["questions"]
            assert left <= LOAD_PATIENCE_SECONDS / STEP_SECONDS + 3
        slow.server.disconnect(slow.lines[-1])


class TestPace:
    """The server is told how long the engine would take itself, and when a request began."""

    def test_it_is_told_with_every_question(self, engine: Engine) -> None:
        stored(engine)
        engine.arrive(PROMPT, "bob")
        engine.settle()
        assert engine.sent_of(Lookup)[0].block_seconds == 0.0, "nobody knows yet"
        seconds = STEP_SECONDS / len(PROMPT) * engine.block_tokens  # a step computed the whole prompt
        for kind in (Lookup, Acquire):
            assert engine.sent_of(kind)[-1].block_seconds == pytest.approx(seconds)

    def test_what_is_loaded_is_not_computed(self, engine: Engine) -> None:
        stored(engine)
        known = engine.planner._pace.block_seconds
        request = engine.arrive(PROMPT, "alice", outputs=5)
        engine.settle()
        assert request.loaded_tokens == 8
        assert engine.planner._pace.block_seconds == known

    def test_a_reservation_says_when_its_request_came(self, engine: Engine) -> None:
        came = engine.clock()
        request = engine.arrive(PROMPT, "alice", outputs=20)
        step(engine, 3)
        engine.preempt(request)
        engine.server.restart()
        engine.settle()
        assert {message.began_at for message in engine.sent_of(Reserve)} == {came}

    def test_what_began_before_its_user_was_erased_is_offered_no_more(self, engine: Engine) -> None:
        line, deliver = engine.lines[-1], engine.lines[-1].deliver

        def refuse(reply: Reply) -> None:
            deliver(Reserved(reply.request, 0, (), 0, Refusal.ERASED) if isinstance(reply, Reserved) else reply)

        line.deliver = refuse  # type: ignore[method-assign]
        engine.arrive([*PROMPT, *PROMPT], "alice")
        for _ in range(8):
            engine.step(budget=4)
            engine.work()
            engine.report()
        assert len(engine.sent_of(Reserve)) == 1
        assert engine.held() == 0
        line.deliver = deliver  # type: ignore[method-assign]
        engine.server.disconnect(line)  # with a lease that nobody was told of
