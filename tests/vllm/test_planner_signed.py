"""Signed salts in the planner: whose cache a request finds, who is charged, and what a rotation changes."""

from __future__ import annotations

import pytest

from saltern.core.blocks import BlockState
from saltern.core.keys import signed_user_key, user_id
from saltern.core.messages import DEFAULT_TENANT, Acquire, Discard, Lookup, Reserve
from saltern.signing import Signed, sign, user_tag
from saltern.vllm.names import SaltCounts
from tests.vllm.engine import Engine, EngineMaker, FakeRequest

PROMPT = [*range(100, 108)]
FIRST, SECOND, THIRD = b"1" * 32, b"2" * 32, b"3" * 32
ALICE, BOB = (Signed("acme", user_tag("acme", name)) for name in ("alice", "bob"))
NAMESAKE = Signed("umbrella", user_tag("umbrella", "alice"))


@pytest.fixture
def signing(make_engine: EngineMaker) -> Engine:
    return make_engine(signing_secrets=(FIRST,))


def ask(engine: Engine, salt: str) -> FakeRequest:
    """Send the prompt and one token more, and let the engine come to rest."""
    request = engine.arrive([*PROMPT, 1], salt)
    engine.settle()
    return request


def charged(engine: Engine) -> dict[str, int]:
    """Return how many READY blocks each tenant has."""
    return {
        name: sum(block.state is BlockState.READY for user in users for block in user.block_by_key.values())
        for name, tenant in engine.server.cache.tenant_by_name.items()
        if (users := tenant.user_by_id.values())
    }


def test_a_signed_user_finds_its_own_and_its_tenant_is_charged(signing: Engine) -> None:
    assert [ask(signing, sign(ALICE, FIRST)).loaded_tokens for _ in range(2)] == [0, 8]
    assert charged(signing) == {"acme": 2}
    for kind in (Lookup, Acquire, Reserve):
        sent = signing.sent_of(kind)
        assert sent
        assert {message.tenant for message in sent} == {"acme"}
        assert {message.user for message in sent} == {
            user_id(signed_user_key(signing.server.secret, "acme", ALICE.user, 0))
        }


def test_no_two_users_share_whatever_they_have_in_common(signing: Engine) -> None:
    mac = sign(ALICE, FIRST).rpartition(".")[2]
    salts = [
        sign(ALICE, FIRST),
        sign(BOB, FIRST),
        sign(NAMESAKE, FIRST),
        sign(Signed("acme", ALICE.user, 1), FIRST),
        sign(ALICE, SECOND),
        f"st1.acme.{BOB.user}.0.{mac}",
        "alice",
        "",
        ALICE.user,
    ]
    for salt in salts:
        assert ask(signing, salt).loaded_tokens == 0
    for salt in salts:
        assert ask(signing, salt).loaded_tokens == 8
    assert charged(signing) == {"acme": 6, "umbrella": 2, DEFAULT_TENANT: 10}


def test_who_forges_is_a_stranger_of_the_default_tenant(signing: Engine) -> None:
    ask(signing, sign(ALICE, FIRST))
    assert ask(signing, sign(ALICE, THIRD)).loaded_tokens == 0
    assert charged(signing) == {"acme": 2, DEFAULT_TENANT: 2}


def test_a_rotation_loses_no_hit(signing: Engine) -> None:
    before = ask(signing, sign(ALICE, FIRST))
    signing.rotate((SECOND, FIRST))
    sent_before = len(signing.sent)
    assert ask(signing, sign(ALICE, SECOND)).loaded_tokens == 8, "the new secret found nothing"
    assert ask(signing, sign(ALICE, FIRST)).loaded_tokens == 8, "the old secret is not valid any more"
    keys = {message.keys for message in signing.sent if isinstance(message, Acquire | Reserve)}
    assert len(keys) == 1, "a key changed"
    assert sent_before < len(signing.sent)
    assert before.loaded_tokens == 0
    signing.rotate((THIRD, SECOND))
    assert ask(signing, sign(ALICE, FIRST)).loaded_tokens == 0, "a secret of two rotations ago still signs"
    assert ask(signing, sign(ALICE, THIRD)).loaded_tokens == 8


def test_a_request_under_way_stays_whose_it_was(signing: Engine) -> None:
    request = signing.arrive(PROMPT, sign(ALICE, FIRST), outputs=3)
    signing.step()
    signing.rotate((THIRD, SECOND))
    signing.settle()
    assert request.loaded_tokens == 0
    assert charged(signing) == {"acme": 2}


def test_a_new_session_comes_with_the_secrets_of_now(signing: Engine) -> None:
    ask(signing, sign(ALICE, FIRST))
    lost = signing.session.incarnation
    signing.rotate((SECOND, FIRST))
    signing.server.restart()
    for _ in range(200):
        if signing.session.is_open and signing.session.incarnation != lost:
            break
        signing.step()
    assert [ask(signing, sign(ALICE, SECOND)).loaded_tokens for _ in range(2)] == [0, 8]
    assert charged(signing) == {"acme": 2}


def test_strictly_only_what_is_signed_is_cached(make_engine: EngineMaker) -> None:
    engine = make_engine(signing_secrets=(FIRST,), strict=True)
    for salt in ("", "alice", sign(ALICE, SECOND), "st1.", ALICE.user):
        assert [ask(engine, salt).loaded_tokens for _ in range(2)] == [0, 0]
    assert not engine.sent_of(Lookup) + engine.sent_of(Acquire) + engine.sent_of(Reserve)
    assert [ask(engine, sign(ALICE, FIRST)).loaded_tokens for _ in range(2)] == [0, 8]
    assert charged(engine) == {"acme": 2}


def test_strictly_nothing_is_cached_where_nobody_signs(make_engine: EngineMaker) -> None:
    engine = make_engine(strict=True)
    assert [ask(engine, sign(ALICE, FIRST)).loaded_tokens for _ in range(2)] == [0, 0]
    assert charged(engine) == {}


def test_salts_are_counted_once_a_request(signing: Engine) -> None:
    for salt in (sign(ALICE, FIRST), sign(ALICE, SECOND), "st1.x", "alice", ""):
        ask(signing, salt)
    assert signing.planner.take_salt_counts() == SaltCounts(signed=1, unsigned=2, bad_signature=2)
    assert signing.planner.take_salt_counts() == SaltCounts()


def test_a_bad_block_is_discarded_from_its_own_tenant(signing: Engine) -> None:
    ask(signing, sign(ALICE, FIRST))
    request = signing.arrive([*PROMPT, 1], sign(ALICE, FIRST))
    while not request.is_loading:
        signing.step()
    signing.work(fail=True)
    signing.report()
    signing.settle()
    assert [message.tenant for message in signing.sent_of(Discard)] == ["acme"]


@pytest.mark.parametrize("salt", ["st1." + "\ud800" * 20, "st1.\0", "st1." + "9" * 10_000, "st1.acme." + "\u0661" * 80])
def test_no_salt_raises(signing: Engine, salt: str) -> None:
    assert [ask(signing, salt).loaded_tokens for _ in range(2)] == [0, 8]
    assert charged(signing) == {DEFAULT_TENANT: 2}
