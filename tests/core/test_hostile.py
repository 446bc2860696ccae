"""What holds for an engine that sends well-formed nonsense: it gets less, and nobody else notices."""

import pytest

from saltern.core import cache
from saltern.core.keys import Key
from saltern.core.messages import KEYS_MAX, Acquire, Acquired, Refusal, Release, Reserve, Reserved
from tests.core.rig import ALICE, Rig, keys

A, AB, ABC = keys("abc")


@pytest.mark.parametrize("named", [(AB,), (ABC, A), (A, ABC), (AB, ABC)], ids=["tail", "backwards", "gap", "headless"])
def test_keys_that_do_not_continue_one_another_are_no_prefix(named: tuple[Key, ...]) -> None:
    rig = Rig()
    engine = rig.engine()
    rig.store(engine, ALICE, "abc")
    touched = [block.touched_at for block in rig.cache.default_tenant.user_by_id[ALICE].block_by_key.values()]
    rig.say(engine, Acquire(request=1, user=ALICE, keys=named, start=0))
    (answer,) = rig.sent(Acquired, engine)
    assert answer.ready == (named[0] == A)
    after = [block.touched_at for block in rig.cache.default_tenant.user_by_id[ALICE].block_by_key.values()]
    assert after[1:] == touched[1:], "a block was touched without its parent"


def test_a_block_that_is_named_again_and_again_is_answered_once() -> None:
    rig = Rig()
    engine = rig.engine()
    rig.store(engine, ALICE, "a")
    rig.say(engine, Acquire(request=1, user=ALICE, keys=(A,) * KEYS_MAX, start=0))
    (answer,) = rig.sent(Acquired, engine)
    assert (answer.ready, len(answer.extents)) == (1, 1), "a few bytes of question made a large answer"


def test_nothing_is_stored_behind_a_block_that_continues_another() -> None:
    rig = Rig()
    engine = rig.engine()
    rig.store(engine, ALICE, "ab")
    rig.say(engine, Reserve(request=1, user=ALICE, keys=(A, A, ABC), start=0, acquired_at=rig.now))
    (answer,) = rig.sent(Reserved, engine)
    assert (answer.upto, answer.refusal, answer.grants) == (1, Refusal.NO_PARENT, ())


def test_an_engine_that_gives_no_lease_back_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LEASED_BLOCKS_MAX", 6)
    rig = Rig()
    greedy, modest = rig.engine("greedy"), rig.engine("modest")
    rig.store(greedy, ALICE, "abc")
    for _ in range(10):
        rig.say(modest, Release(rig.acquire(modest, ALICE, "abc").lease))
    for _ in range(2):
        rig.acquire(greedy, ALICE, "abc")
    rig.say(greedy, Acquire(request=1, user=ALICE, keys=(A,), start=0))
    assert [close.reason for close in rig.closed] == ["the session holds leases of 6 blocks, and asked for more"]
    rig.acquire(modest, ALICE, "abc")
    assert not rig.closed
