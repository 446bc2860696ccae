"""A life: an engine and its server under any sequence of requests, delays, failures and deaths.

The engine checks every slot that a request attends to and every byte that is published; at the end of each life
nothing may be left anywhere.
"""

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from saltern.core.tenants import Limits
from saltern.vllm.planner import HELD_SHARE_MAX
from saltern.vllm.settings import StoreMode
from tests.vllm.engine import VOCABULARY, Engine

SALTS = ("", "alice", "bob")
LONGEST = 24  # tokens of a prompt; with its outputs it fits the smallest pool below
PREFIXES = tuple(tuple((index * step + index // 3) % VOCABULARY for index in range(LONGEST)) for step in (1, 3))


class Life(RuleBasedStateMachine):
    """Rules are what may happen; `engine` checks what it does by itself."""

    engine: Engine

    @initialize(
        slots=st.sampled_from([1, 2, 3]),
        ranks=st.sampled_from([1, 2]),
        blocks=st.sampled_from([18, 24, 64]),
        pages=st.sampled_from([8, 24, 256]),
        store=st.sampled_from(StoreMode),
        local_hits=st.booleans(),
        user_limit_bytes=st.sampled_from([None, 16]),
    )
    def start(self, user_limit_bytes: int | None, **options: Any) -> None:
        """Start an engine of some shape."""
        self.engine = Engine(limits=Limits(user_limit_bytes=user_limit_bytes), **options)

    @rule(
        salt=st.sampled_from(SALTS),
        prefix=st.sampled_from(PREFIXES),
        shared=st.integers(1, LONGEST),
        tail=st.lists(st.integers(0, VOCABULARY - 1), max_size=4),
        outputs=st.integers(1, 8),
    )
    def arrive(self, salt: str, prefix: tuple[int, ...], shared: int, tail: list[int], outputs: int) -> None:
        """A request comes in, with a beginning that others have too."""
        self.engine.arrive([*prefix[:shared], *tail][:LONGEST], salt, outputs=outputs)

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data(), shared=st.integers(1, LONGEST), tail=st.lists(st.integers(0, VOCABULARY - 1), max_size=4))
    def ask_on(self, data: st.DataObject, shared: int, tail: list[int]) -> None:
        """A user comes back with the beginning of an earlier request, answer included."""
        earlier = data.draw(st.sampled_from(self.engine.requests))
        self.engine.arrive([*earlier.all_token_ids[:shared], *tail][:LONGEST], earlier.salt)

    @rule(budget=st.sampled_from([1, 4, 7, 1000]))
    def step(self, budget: int) -> None:
        """The engine takes a step."""
        self.engine.step(budget)

    @rule(rank=st.sampled_from([0, 1, None]), loads=st.booleans(), stores=st.booleans())
    def work(self, rank: int | None, loads: bool, stores: bool) -> None:
        """Workers copy."""
        self.engine.work(rank=rank, loads=loads, stores=stores)

    @rule(rank=st.sampled_from([0, 1, None]))
    def fail(self, rank: int | None) -> None:
        """Workers fail to copy."""
        self.engine.work(rank=rank, fail=True)

    @rule(rank=st.sampled_from([0, 1, None]))
    def report(self, rank: int | None) -> None:
        """Workers report."""
        self.engine.report(rank=rank)

    @rule(steps=st.integers(1, 6))
    def run(self, steps: int) -> None:
        """All goes well for a while."""
        for _ in range(steps):
            self.engine.step()
            self.engine.work()
            self.engine.report()

    @rule(steps=st.integers(1, 3), rank=st.sampled_from([0, 1, None]))
    def run_badly(self, steps: int, rank: int | None) -> None:
        """One rank, or each, fails in whatever it is asked to copy for a while."""
        for _ in range(steps):
            self.engine.step()
            self.engine.work(rank=rank, fail=True)
            self.engine.work()
            self.engine.report()

    @precondition(lambda self: self.engine.waiting or self.engine.running)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """A client goes away."""
        self.engine.abort(data.draw(st.sampled_from(self.engine.waiting + self.engine.running)))

    @precondition(lambda self: self.engine.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        """A request has to give its blocks to others."""
        self.engine.preempt(data.draw(st.sampled_from(self.engine.running)))

    @rule(seconds=st.sampled_from([0.0002, 0.03, 0.2, 2.0]))
    def pass_time(self, seconds: float) -> None:
        """Time passes between two steps."""
        self.engine.clock.advance(seconds)

    @rule(seconds=st.sampled_from([0.0, 0.0001, 0.02, 0.2]))
    def delay_replies(self, seconds: float) -> None:
        """The server becomes faster or slower."""
        self.engine.server.reply_seconds = seconds

    @rule(is_frozen=st.booleans())
    def freeze(self, is_frozen: bool) -> None:
        """The server stops, or goes on."""
        if is_frozen:
            self.engine.server.is_frozen = True
        else:
            self.engine.server.thaw()

    @rule()
    def kill_server(self) -> None:
        """The server dies."""
        self.engine.server.kill()

    @rule()
    def restart_server(self) -> None:
        """The server dies, and another takes its place."""
        self.engine.server.restart()

    @rule()
    def lose_workers(self) -> None:
        """The lifelines break, and come back."""
        self.engine.server.lose_workers()
        if self.engine.server.is_listening:
            self.engine.server.attach_workers()

    @invariant()
    def holds_a_bounded_share(self) -> None:
        """Stores never take more of the engine's blocks than was promised."""
        if hasattr(self, "engine"):
            assert self.engine.held() <= HELD_SHARE_MAX * self.engine.blocks.total

    def teardown(self) -> None:
        """Let everything end well, and see that nothing is left."""
        if hasattr(self, "engine"):
            server = self.engine.server
            if not server.is_listening:
                server.restart()
            server.thaw()
            server.attach_workers()
            server.reply_seconds = 0.0001
            self.engine.check_drained()
