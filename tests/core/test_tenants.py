"""Tenants, a claim each: guarantees, borrowing, what may be pinned, expiry, and limits that change."""

import gc

import pytest

from saltern.core.cache import TICK_BLOCKS, Cache
from saltern.core.effects import TenantRemoved, TenantSet, Tick
from saltern.core.keys import Key, UserId
from saltern.core.leases import ConnectionId
from saltern.core.messages import (
    Acquire,
    Acquired,
    Commit,
    Discard,
    LookedUp,
    Lookup,
    Refusal,
    Release,
    Reserve,
    Reserved,
)
from saltern.core.tenants import Limits, is_tenant_name
from tests.core.rig import ALICE, PAGE_BYTES, Rig, keys, states


def pages(count: int) -> int:
    """Return how many bytes so many pages are."""
    return count * PAGE_BYTES


def reserve(
    rig: Rig, engine: ConnectionId, tenant: str, prompt: str, *, user: UserId = ALICE, at: float | None = None
) -> Reserved:
    """Reserve room for a prompt of a tenant, acquired `at` (now by default)."""
    rig.say(engine, Reserve(1, user, keys(prompt), 0, rig.now + 1.0 if at is None else at, tenant=tenant))
    (answer,) = rig.sent(Reserved)
    return answer


def store(rig: Rig, engine: ConnectionId, tenant: str, *prompts: str, user: UserId = ALICE) -> list[Reserved]:
    """Store prompts of a tenant one after the other; return what came of each."""
    answers = []
    for prompt in prompts:
        answers.append(reserve(rig, engine, tenant, prompt, user=user))
        if answers[-1].lease:
            rig.say(engine, Commit(answers[-1].lease))
    return answers


def found(rig: Rig, engine: ConnectionId, tenant: str, prompt: str, *, user: UserId = ALICE) -> int:
    """Return how many blocks of a prompt are there."""
    rig.say(engine, Lookup(1, user, keys(prompt), tenant=tenant))
    (answer,) = rig.sent(LookedUp)
    return answer.ready


def acquire(rig: Rig, engine: ConnectionId, tenant: str, prompt: str, start: int = 0) -> Acquired:
    """Pin a prompt of a tenant."""
    rig.say(engine, Acquire(1, ALICE, keys(prompt), start, tenant=tenant))
    (answer,) = rig.sent(Acquired)
    return answer


def used(rig: Rig) -> dict[str, int]:
    """Return how many pages each tenant holds."""
    return {name: tenant.used_pages for name, tenant in rig.cache.tenant_by_name.items() if tenant.used_pages}


# Guarantees and borrowing


@pytest.mark.parametrize("name", ["a", "acme", "0.x_y-z", "a" * 40])
def test_these_are_names_of_tenants(name: str) -> None:
    assert is_tenant_name(name)


@pytest.mark.parametrize("name", ["", "A", "-a", ".a", "a b", "a/b", "ä", "a" * 41, "a\n"])
def test_these_are_not(name: str) -> None:
    assert not is_tenant_name(name)


def test_guarantees_that_do_not_fit_are_refused_with_their_sum() -> None:
    tenants = {"a": Limits(guarantee_bytes=pages(50)), "b": Limits(guarantee_bytes=pages(40))}
    with pytest.raises(ValueError, match=r"900 bytes; the arena of 1000 bytes has room for 870, since 130"):
        Cache(pages=100, page_bytes=PAGE_BYTES, tenants=tenants)
    cache = Cache(pages=100, page_bytes=PAGE_BYTES, tenants=tenants, in_flight_max_bytes=pages(10))
    assert cache.check_tenants(tenants) is None


@pytest.mark.parametrize(
    "limits",
    [
        Limits(guarantee_bytes=20, limit_bytes=10),
        Limits(guarantee_bytes=-1),
        Limits(limit_bytes=-1),
        Limits(user_limit_bytes=-1),
        Limits(ttl_seconds=0.0),
        Limits(ttl_seconds=float("nan")),
        Limits(weight=0.0),
        Limits(weight=float("inf")),
    ],
)
def test_limits_that_cannot_be_meant_are_named(limits: Limits) -> None:
    reason = Cache(pages=8, page_bytes=PAGE_BYTES).check_tenants({"acme": limits})
    assert reason is not None and reason.startswith("tenant acme: ")


def test_the_same_user_of_two_tenants_is_two_users() -> None:
    rig = Rig()
    engine = rig.engine()
    store(rig, engine, "acme", "ab")
    assert (found(rig, engine, "acme", "ab"), found(rig, engine, "zeta", "ab")) == (2, 0)
    store(rig, engine, "zeta", "ab")
    rig.say(engine, Discard(ALICE, keys("a")[0], "zeta"))
    assert (found(rig, engine, "acme", "ab"), found(rig, engine, "zeta", "ab")) == (2, 0)


def test_what_is_not_used_is_lent() -> None:
    rig = Rig(pages=8, tenants={"acme": Limits(guarantee_bytes=pages(6))})
    engine = rig.engine()
    store(rig, engine, "zeta", "a", "b", "c", "d", "e", "f", "g", "h")
    assert used(rig) == {"zeta": 8}


def test_whoever_borrowed_gives_back_and_no_more() -> None:
    rig = Rig(pages=8, tenants={"acme": Limits(guarantee_bytes=pages(6))})
    engine = rig.engine()
    store(rig, engine, "zeta", *"abcdefgh")
    store(rig, engine, "acme", *"abcdef")
    assert used(rig) == {"zeta": 2, "acme": 6}
    store(rig, engine, "zeta", *"ijklmnop")
    assert used(rig) == {"zeta": 2, "acme": 6}
    assert [found(rig, engine, "acme", prompt) for prompt in "abcdef"] == [1] * 6


def test_what_is_borrowed_is_shared_by_weight() -> None:
    rig = Rig(pages=12, tenants={"acme": Limits(weight=2.0), "zeta": Limits()})
    engine = rig.engine()
    for prompt in "abcdefghijklmnopqrst":
        store(rig, engine, "zeta", prompt)
        store(rig, engine, "acme", prompt)
    assert used(rig) == {"zeta": 4, "acme": 8}


def test_a_block_that_would_be_the_next_to_go_is_refused() -> None:
    """Its own tenant would pay for it, and with nothing older than it is."""
    rig = Rig(pages=4, tenants={"acme": Limits(guarantee_bytes=pages(2))})
    engine = rig.engine()
    store(rig, engine, "acme", "a", "b")
    began = rig.now
    store(rig, engine, "zeta", "x", "y")
    assert reserve(rig, engine, "zeta", "z", at=began).refusal is Refusal.NEXT_VICTIM
    assert used(rig) == {"acme": 2, "zeta": 2}


def test_a_refusal_leaves_all_as_it_was() -> None:
    rig = Rig(pages=8, tenants={"acme": Limits(guarantee_bytes=pages(2))})
    small, large = rig.engine("small"), rig.engine("large", block_bytes=pages(7))
    store(rig, small, "zeta", "ab", "c", "d")
    store(rig, small, "acme", "a", "bc", "d")
    before = rig.cache.snapshot(), [t.first_victim() for t in rig.cache.tenant_by_name.values()]
    assert reserve(rig, large, "new", "x").refusal is not None
    assert rig.cache.tenant_by_name.keys() == {"default", "acme", "zeta"}
    assert (rig.cache.snapshot(), [t.first_victim() for t in rig.cache.tenant_by_name.values()]) == before


def test_no_heap_grows_with_what_is_borrowed_and_given_back() -> None:
    rig = Rig(pages=8, tenants={"acme": Limits(guarantee_bytes=pages(3))})
    engine = rig.engine()
    for turn in range(2_000):
        store(rig, engine, ("acme", "zeta")[turn // 3 % 2], "ab", user=UserId(turn.to_bytes(16, "big")))
    assert len(rig.cache.shares._by_surplus._heap) <= 128


# Pins


def test_pins_stay_within_what_is_not_guaranteed() -> None:
    rig = Rig(pages=8, tenants={"acme": Limits(guarantee_bytes=pages(6))})
    answer = reserve(rig, rig.engine(), "zeta", "abc")
    assert (answer.upto, answer.refusal) == (1, Refusal.IN_FLIGHT), "of the two pages, one is kept for acme's pins"
    assert rig.cache.tenant_by_name["zeta"].tally.refusals == {"in-flight": 1}


def test_a_tenants_pins_are_not_refused_for_anothers() -> None:
    rig = Rig(pages=16, tenants={"acme": Limits(guarantee_bytes=pages(8))})
    engine = rig.engine()
    store(rig, engine, "acme", "abcd")
    assert reserve(rig, engine, "zeta", "tuvwxyz").refusal is Refusal.IN_FLIGHT
    assert acquire(rig, engine, "acme", "abcd").ready == 4


def test_an_acquire_beyond_what_may_be_pinned_is_shortened() -> None:
    rig = Rig(pages=16, in_flight_max_bytes=pages(3))
    engine = rig.engine()
    store(rig, engine, "zeta", "abc", "abcde")
    assert found(rig, engine, "zeta", "abcde") == 3, "a block pins what it continues"
    store(rig, engine, "zeta", "x")
    other = reserve(rig, engine, "acme", "x")
    held = acquire(rig, engine, "zeta", "abc", start=1)
    assert (held.ready, len(held.extents)) == (2, 1), "it pins a and b, and acme pins x"
    assert acquire(rig, engine, "zeta", "abc").ready == 2, "those two are pinned already"
    assert acquire(rig, engine, "zeta", "x").ready == 0
    rig.say(engine, Commit(other.lease))
    assert acquire(rig, engine, "zeta", "abc").ready == 3
    assert rig.cache.tenant_by_name["zeta"].tally.shortened == 3


def test_a_prefix_is_shortened_to_a_state() -> None:
    rig = Rig(pages=16)
    engine = rig.engine(state_bytes=PAGE_BYTES)
    for prompt in ("a", "abc"):
        rig.store(engine, ALICE, prompt, in_state=True)
    assert rig.acquire(engine, ALICE, "abc", in_state=True).ready == 3
    rig = Rig(pages=16, in_flight_max_bytes=pages(4))
    engine = rig.engine(state_bytes=PAGE_BYTES)
    rig.store(engine, ALICE, "a", in_state=True)
    rig.store(engine, ALICE, "abc", in_state=True)
    other = rig.reserve(engine, UserId(bytes(16)), "x")
    answer = rig.acquire(engine, ALICE, "abc", in_state=True)
    assert (answer.ready, len(answer.extents)) == (1, 2), "three blocks and a state are four pages, and one is written"
    assert rig.cache.default_tenant.tally.shortened == 1
    assert other.lease and states("a")


# Expiry


def test_what_nobody_used_for_the_ttl_is_not_found() -> None:
    rig = Rig(tenants={"acme": Limits(ttl_seconds=100.0)})
    engine = rig.engine()
    store(rig, engine, "acme", "ab")
    rig.now += 60.0
    assert acquire(rig, engine, "acme", "a").ready == 1
    rig.now += 60.0
    assert found(rig, engine, "acme", "ab") == 1, "b was not used again"
    rig.now += 60.0
    assert found(rig, engine, "acme", "ab") == 0
    assert used(rig) == {"acme": 2}, "nobody has looked for room"


def test_what_has_expired_is_stored_anew() -> None:
    rig = Rig(tenants={"acme": Limits(ttl_seconds=100.0)})
    engine = rig.engine()
    store(rig, engine, "acme", "ab")
    rig.now += 200.0
    (again,) = store(rig, engine, "acme", "abc")
    assert len(again.grants) == 3
    assert (found(rig, engine, "acme", "abc"), used(rig)) == (3, {"acme": 3})
    assert rig.cache.tenant_by_name["acme"].tally.expired == 2


def test_a_tick_lets_go_what_has_expired() -> None:
    rig = Rig(tenants={"acme": Limits(ttl_seconds=100.0)})
    engine = rig.engine()
    store(rig, engine, "acme", "ab")
    store(rig, engine, "zeta", "ab")
    assert (
        rig.cache.due_at
        == rig.cache.tenant_by_name["acme"].user_by_id[ALICE].block_by_key[keys("a")[0]].touched_at + 100
    )
    rig.handle(Tick())
    assert used(rig) == {"acme": 2, "zeta": 2}
    rig.now = rig.cache.due_at or 0.0
    rig.handle(Tick())
    assert used(rig) == {"zeta": 2}
    assert [(logged.event, logged.tenant, logged.blocks) for logged in rig.logged] == [("given-up", "acme", 2)]


# Settings that change


def many(count: int) -> tuple[Key, ...]:
    """Name so many blocks of one prompt."""
    return tuple(Key(block.to_bytes(32, "big")) for block in range(count))


def test_a_lowered_limit_is_met_in_bounded_steps() -> None:
    rig = Rig(pages=400)
    engine = rig.engine()
    rig.say(engine, Reserve(1, ALICE, many(300), 0, rig.now, tenant="acme"))
    rig.say(engine, Commit(rig.sent(Reserved)[0].lease))
    rig.handle(TenantSet("acme", Limits(limit_bytes=pages(100))))
    left = [used(rig)["acme"]]
    while rig.cache.due_at is not None:
        assert rig.cache.due_at <= rig.now
        rig.handle(Tick())
        left.append(used(rig)["acme"])
    assert left == [300, 300 - TICK_BLOCKS, 300 - 2 * TICK_BLOCKS, 300 - 3 * TICK_BLOCKS, 100]


def test_a_lowered_limit_of_users_is_met() -> None:
    rig = Rig(pages=40)
    engine = rig.engine()
    for number in range(4):
        store(rig, engine, "acme", *"abcdefgh"[: 2 * number + 1], user=UserId(bytes([number] * 16)))
    rig.handle(TenantSet("acme", Limits(user_limit_bytes=pages(3))))
    while rig.cache.due_at is not None:
        rig.handle(Tick())
    assert [user.used_pages for user in rig.cache.tenant_by_name["acme"].user_by_id.values()] == [1, 3, 3, 3]


def test_what_is_pinned_above_a_lowered_limit_goes_once_it_is_not() -> None:
    rig = Rig()
    engine = rig.engine()
    store(rig, engine, "acme", "abc")
    held = acquire(rig, engine, "acme", "abc")
    rig.handle(TenantSet("acme", Limits(limit_bytes=pages(1), user_limit_bytes=pages(1))))
    rig.handle(Tick())
    assert (used(rig), rig.cache.due_at) == ({"acme": 3}, None), "there is nothing to do before it is released"
    rig.say(engine, Release(held.lease))
    assert rig.cache.due_at == rig.now
    rig.handle(Tick())
    assert used(rig) == {"acme": 1}


def test_a_removed_tenant_keeps_its_blocks_until_room_is_needed() -> None:
    rig = Rig(pages=8, tenants={"acme": Limits(guarantee_bytes=pages(6))})
    engine = rig.engine()
    store(rig, engine, "acme", *"abcdef")
    rig.handle(TenantRemoved("acme"))
    assert used(rig) == {"acme": 6}
    store(rig, engine, "zeta", *"abcdefgh")
    assert used(rig) == {"acme": 4, "zeta": 4}


def test_tenants_without_settings_are_forgotten_with_their_last_block() -> None:
    rig = Rig(pages=4)
    engine = rig.engine()
    rig.handle(TenantSet("idle", Limits(weight=2.0)))
    gc.collect()
    gc.disable()
    try:
        for number in range(200):
            store(rig, engine, f"tenant-{number}", "ab")
            rig.say(engine, Discard(ALICE, keys("a")[0], f"tenant-{number}"))
            found(rig, engine, f"nobody-{number}", "ab")
        rig.effects = []
        assert gc.collect() == 0, "the server runs without a collector"
    finally:
        gc.enable()
    assert rig.cache.tenant_by_name.keys() == {"default", "idle"}
    rig.handle(TenantRemoved("idle"))
    assert "idle" not in rig.cache.tenant_by_name
