"""What is published, in the planner: which requests become public, and how others name what is."""

from __future__ import annotations

from array import array

import pytest

from saltern.core.effects import PublicationAdded
from saltern.core.keys import Content, UserId, block_key, next_content, public_user_key
from saltern.core.messages import PUBLIC_TENANT, Lookup, PublicationId, Reserve
from saltern.publishing import Mark, parse_mark, sign_mark
from tests.vllm.engine import Engine, EngineMaker, FakeRequest

SECRET = b"1" * 32
PUBLICATION = PublicationId(b"p" * 16)
PROMPT = [*range(100, 108)]  # two blocks
LATER = 4_000_000_000


@pytest.fixture
def engine(make_engine: EngineMaker) -> Engine:
    return make_engine(signing_secrets=(SECRET,))


def content_of(engine: Engine, tokens: list[int]) -> Content:
    content = engine.session.root
    for start in range(0, len(tokens), engine.block_tokens):
        content = next_content(content, array("i", tokens[start : start + engine.block_tokens]).tobytes())
    return content


def mark(engine: Engine, tokens: list[int], *, secret: bytes = SECRET, expires_at: int = LATER) -> Mark:
    content = content_of(engine, tokens)
    made = parse_mark(sign_mark(PUBLICATION, expires_at, root=engine.session.root, content=content, secret=secret))
    assert made is not None
    return made


def add(engine: Engine, tokens: list[int], mark: Mark | None, *, only_published: bool = False) -> list[Lookup]:
    """Add a request of alice's with a mark, and return the lookups that it sends."""
    sent = len(engine.sent_of(Lookup))
    request = FakeRequest("marked", "alice", list(tokens), len(tokens), outputs_left=1)
    engine.planner.add(request, "alice", mark=mark, only_published=only_published)
    engine.planner.remove("marked")
    return engine.sent_of(Lookup)[sent:]


def test_a_mark_that_holds_makes_the_prompt_public(engine: Engine) -> None:
    (lookup,) = add(engine, PROMPT, mark(engine, PROMPT))
    assert (lookup.tenant, lookup.user) == (PUBLIC_TENANT, UserId(PUBLICATION))
    assert engine.planner.take_salt_counts().bad_mark == 0


@pytest.mark.parametrize("why", ["other tokens", "other secret", "too old", "more than whole blocks"])
def test_any_other_is_counted_and_changes_nothing(engine: Engine, why: str) -> None:
    made = {
        "other tokens": mark(engine, PROMPT[::-1]),
        "other secret": mark(engine, PROMPT, secret=b"2" * 32),
        "too old": mark(engine, PROMPT, expires_at=1),
        "more than whole blocks": mark(engine, PROMPT),
    }[why]
    tokens = [*PROMPT, 1] if why == "more than whole blocks" else PROMPT
    (lookup,) = add(engine, tokens, made)
    (plain,) = add(engine, tokens, None)
    assert (lookup.tenant, lookup.user, lookup.keys) == (plain.tenant, plain.user, plain.keys)
    assert engine.planner.take_salt_counts().bad_mark == 1


def test_what_is_no_mark_at_all_is_counted_with_them(engine: Engine) -> None:
    engine.planner.count_bad_mark()
    assert engine.planner.take_salt_counts().bad_mark == 1
    assert engine.planner.take_salt_counts().bad_mark == 0


def test_a_mark_that_does_not_hold_is_no_salt(engine: Engine) -> None:
    assert add(engine, PROMPT, mark(engine, PROMPT, secret=b"2" * 32), only_published=True) == []
    assert len(add(engine, PROMPT, mark(engine, PROMPT), only_published=True)) == 1


def test_a_prompt_names_as_many_public_blocks_as_are_published(engine: Engine) -> None:
    (before,) = add(engine, PROMPT, None)
    engine.server.tell(PublicationAdded(PUBLICATION, root=engine.session.root, blocks=1))
    engine.clock.advance(1.0)
    (after,) = add(engine, PROMPT, None)
    assert before.public == ()
    content = content_of(engine, PROMPT[: engine.block_tokens])
    assert after.public == (block_key(public_user_key(engine.server.secret), content),)
    assert after.public[0] not in after.keys


def test_another_server_has_published_nothing(engine: Engine) -> None:
    engine.server.tell(PublicationAdded(PUBLICATION, root=engine.session.root, blocks=2))
    engine.clock.advance(1.0)
    assert len(add(engine, PROMPT, None)[0].public) == 2
    engine.server.kill()
    engine.server.restart()
    for _ in range(20):
        engine.clock.advance(1.0)
        engine.step()
    assert add(engine, PROMPT, None)[0].public == ()


def test_a_reservation_names_them_too(engine: Engine) -> None:
    engine.server.tell(PublicationAdded(PUBLICATION, root=engine.session.root, blocks=1))
    engine.clock.advance(1.0)
    engine.arrive([*PROMPT, 1], "alice")
    engine.settle()
    (reserve,) = engine.sent_of(Reserve)
    assert (len(reserve.keys), len(reserve.public)) == (2, 1)
