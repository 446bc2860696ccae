"""The isolation guarantee: whatever others do, a tenant hits as often as in a private cache, request by request."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saltern.core.effects import Received, RecordWritten, TenantSet, WriteRecord
from saltern.core.keys import UserId
from saltern.core.leases import ConnectionId
from saltern.core.messages import Acquire, Acquired, Commit, Refusal, Release, Request, Reserve, Reserved
from saltern.core.tenants import NO_LIMITS, Limits
from tests.core.rig import ALICE, BOB, CAROL, PAGE_BYTES, Rig, keys
from tests.simulator.claims import ViolationError
from tests.simulator.invariants import State
from tests.simulator.isolation import Witness, steal_a_block, withhold_the_guarantee

PAGES = 32
TENANTS = {
    "acme": Limits(guarantee_bytes=12 * PAGE_BYTES),
    "zeta": Limits(guarantee_bytes=9 * PAGE_BYTES, limit_bytes=20 * PAGE_BYTES, weight=3.0),
}
CROWD = [f"flood {number}" for number in range(8)]
PROMPTS = ("abc", "abx", "ay", "bcd", "q", "rs", "tuvw")

Step = tuple[str, int, int, bool]
"""A request: whose, by which of its users, which prompt, and whether others come before it is stored."""

steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["acme", "zeta"]), st.integers(0, 1), st.integers(0, 2), st.booleans()),
        st.tuples(st.sampled_from(CROWD), st.integers(0, 20), st.integers(3, len(PROMPTS) - 1), st.booleans()),
    ),
    min_size=60,
    max_size=120,
)


class Watched:
    """A cache of 32 pages with an engine, whose every event a witness sees."""

    def __init__(self) -> None:
        self._rig = Rig(pages=PAGES, tenants=TENANTS)
        self._small = self._rig.engine("small")
        self._large = self._rig.engine("large", block_bytes=2 * PAGE_BYTES)
        self.witness = Witness(TENANTS, PAGE_BYTES)
        self._waiting: list[Callable[[], None]] = []

    def request(self, tenant: str, user: int, prompt: int, *, is_late: bool) -> None:
        """Use a prompt and store it, perhaps not before other requests have come."""
        user_id = UserId(f"{tenant} {user}".encode().ljust(16))
        engine = self._large if PROMPTS[prompt] == "rs" else self._small
        ask = Acquire(1, user_id, keys(PROMPTS[prompt]), 0, (), tenant)
        self._say(engine, ask)
        (acquired,) = self._rig.sent(Acquired)
        self.witness.acquired(ask, acquired, acquired.ready, self._state(), self._rig.now)
        self._seen()
        if acquired.lease:
            self._say(engine, Release(acquired.lease))

        def store() -> None:
            self._store(engine, ask, acquired)

        if is_late:
            self._waiting.append(store)
        else:
            store()
            while len(self._waiting) > 2:
                self._waiting.pop(0)()

    def end(self) -> None:
        """Store what waits, and compare."""
        for store in self._waiting:
            store()
        self.witness.verify()

    def _store(self, engine: ConnectionId, asked: Acquire, acquired: Acquired) -> None:
        ask = Reserve(2, asked.user, asked.keys, 0, acquired.acquired_at, tenant=asked.tenant)
        self._say(engine, ask)
        (reserved,) = self._rig.sent(Reserved)
        pages = 2 if engine == self._large else 1
        self.witness.reserved(ask, reserved, pages, self._state(), self._rig.now)
        self._seen()
        if reserved.lease:
            self._say(engine, Commit(reserved.lease))

    def _say(self, engine: ConnectionId, message: Request) -> None:
        self._rig.say(engine, message)
        self.witness.check(Received(engine, message), self._rig.effects, self._state(), self._rig.now)
        self._seen()

    def _seen(self) -> None:
        self.witness.count_in_flight(self._state())

    def _state(self) -> State:
        return State(self._rig.cache, TENANTS, None)


def play(script: list[Step]) -> Witness:
    """Let all requests come, and compare each tenant's with its private cache."""
    watched = Watched()
    for tenant, user, prompt, is_late in script:
        watched.request(tenant, user, prompt, is_late=is_late)
    watched.end()
    return watched.witness


@given(steps)
def test_a_tenant_hits_at_least_as_often_as_alone(script: list[Step]) -> None:
    play(script)


FLOOD: list[Step] = [
    step
    for turn in range(60)
    for step in (("acme", turn % 2, turn // 2 % 2, False), (CROWD[turn % 8], turn, 6, turn % 5 == 0))
]
"""Two users of acme ask for eight blocks in turns, and a crowd sends something new each time."""


def test_the_comparison_is_not_an_empty_one() -> None:
    assert play(FLOOD).hits > 100


def test_one_stolen_block_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    steal_a_block(monkeypatch)
    with pytest.raises(ViolationError, match="HITS"):
        play(FLOOD)


@pytest.mark.parametrize("refusal", [Refusal.ALL_PINNED, Refusal.NO_ROOM, Refusal.OVER_LIMIT, Refusal.IN_FLIGHT])
def test_a_withheld_guarantee_is_noticed(monkeypatch: pytest.MonkeyPatch, refusal: Refusal) -> None:
    withhold_the_guarantee(monkeypatch, refusal)
    crowd: list[Step] = [(CROWD[turn % 8], turn, 6, False) for turn in range(40)]
    with pytest.raises(ViolationError, match="HITS"):
        play([*crowd, *FLOOD])


def test_a_raised_guarantee_waits_for_what_was_pinned_before() -> None:
    rig = Rig(pages=64, tenants={"t": Limits(guarantee_bytes=4 * PAGE_BYTES)})
    engine = rig.engine()
    pinned = rig.reserve(engine, BOB, "abcdefghijklmnopqr", tenant="others")
    for user in (ALICE, BOB):
        rig.store(engine, user, "abcdefghijklmnopqrstuv", tenant="b")
    rig.handle(TenantSet("b", Limits(guarantee_bytes=44 * PAGE_BYTES), NO_LIMITS))

    def refusals(prompts: str) -> list[Refusal | None]:
        return [rig.store(engine, ALICE, prompt, tenant="t").refusal for prompt in prompts]

    assert refusals("wxy") == [None, None, Refusal.ALL_PINNED]
    rig.say(engine, Commit(pinned.lease))
    assert refusals("yz") == [None, None]


def test_a_copy_to_the_disk_takes_some_of_what_its_tenant_may_pin() -> None:
    rig = Rig(pages=32, tenants={"t": Limits(guarantee_bytes=16 * PAGE_BYTES)}, disk_pages=64)
    engine = rig.engine()
    copies: list[WriteRecord] = []

    def store(user: UserId, prompt: str) -> None:
        rig.store(engine, user, prompt, tenant="t")
        copies.extend(effect for effect in rig.effects if isinstance(effect, WriteRecord))

    def found() -> int:
        rig.say(engine, Acquire(1, BOB, keys("uvw"), 0, (), "t"))
        (answer,) = rig.sent(Acquired)
        if answer.lease:
            rig.say(engine, Release(answer.lease))
        return answer.ready

    store(ALICE, "abcdefgh")
    store(BOB, "uvw")
    while others := [copy for copy in copies if (copy.name.user, copy.depth) != (ALICE, 7)]:
        copies.remove(others[0])
        rig.handle(RecordWritten(others[0].op))
        copies.extend(effect for effect in rig.effects if isinstance(effect, WriteRecord))
    rig.reserve(engine, CAROL, "abcdefgh", tenant="flood")
    assert (len(copies), found()) == (1, 0), "the last block of eight is being copied, and eight pages are t's part"
    rig.handle(RecordWritten(copies[0].op))
    assert found() == 3
