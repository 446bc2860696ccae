"""Tests of publication marks: nobody but who holds the secret can make one, for anything else."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saltern.core.keys import Content
from saltern.core.messages import PublicationId
from saltern.publishing import Mark, parse_mark, sign_mark

SECRET, OLDER = b"s" * 32, b"o" * 32
PUBLICATION = PublicationId(b"\xfb\xff" * 8)
ROOT, CONTENT = Content(b"r" * 32), Content(b"c" * 32)
EXPIRES_AT = 1_800_000_000
BEFORE = EXPIRES_AT - 1.0


def signed(secret: bytes = SECRET) -> str:
    return sign_mark(PUBLICATION, EXPIRES_AT, root=ROOT, content=CONTENT, secret=secret)


def read(text: str) -> Mark:
    mark = parse_mark(text)
    assert mark is not None
    return mark


def test_what_was_signed_holds_and_names_the_publication() -> None:
    mark = read(signed())
    assert mark.publication == PUBLICATION
    assert mark.holds(root=ROOT, content=CONTENT, secrets=[SECRET], now=BEFORE)


def test_the_secret_before_a_rotation_is_still_good() -> None:
    assert read(signed(OLDER)).holds(root=ROOT, content=CONTENT, secrets=[SECRET, OLDER], now=BEFORE)


@pytest.mark.parametrize(
    "other",
    [
        {"root": Content(b"R" * 32)},
        {"content": Content(b"C" * 32)},
        {"secrets": [OLDER]},
        {"secrets": []},
        {"now": float(EXPIRES_AT)},
        {"now": float("nan")},
    ],
    ids=["namespace", "tokens", "secret", "no secret", "expired", "no time"],
)
def test_it_holds_for_nothing_else(other: dict[str, Any]) -> None:
    fits: dict[str, Any] = {"root": ROOT, "content": CONTENT, "secrets": [SECRET], "now": BEFORE}
    assert not read(signed()).holds(**{**fits, **other})


def test_no_part_can_be_exchanged() -> None:
    _, publication, expiry, mac = signed().split(".")
    other = sign_mark(PublicationId(b"x" * 16), EXPIRES_AT + 1, root=ROOT, content=CONTENT, secret=SECRET).split(".")
    for forged in (f"p1.{other[1]}.{expiry}.{mac}", f"p1.{publication}.{other[2]}.{mac}"):
        assert not read(forged).holds(root=ROOT, content=CONTENT, secrets=[SECRET], now=BEFORE)


@given(
    st.one_of(
        st.text(), st.none(), st.integers(), st.binary(), st.lists(st.text()), st.dictionaries(st.text(), st.text())
    )
)
def test_whatever_isnt_one_is_none(value: object) -> None:
    assert parse_mark(value) is None


@given(st.integers(0, 90), st.characters())
def test_no_other_spelling_is_the_same_mark(at: int, character: str) -> None:
    text = signed()
    changed = text[:at] + character + text[at + 1 :]
    mark = parse_mark(changed)
    assert changed == text or mark is None or not mark.holds(root=ROOT, content=CONTENT, secrets=[SECRET], now=BEFORE)
