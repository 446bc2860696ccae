"""Signed salts: what is believed, and everything near it that is not; and the files of signing secrets."""

import os
import stat
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saltern.core.keys import signed_user_key, unsigned_user_key
from saltern.secret import (
    make_signing_secrets,
    read_signing_secrets,
)
from saltern.signing import PREFIX, Signed, is_signable, sign, user_tag, verify
from tests.support import rotate_signing_secrets

SECRET, OTHER = b"s" * 32, b"o" * 32
ALICE = Signed("acme", user_tag("acme", "alice"))

TENANTS = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,39}", fullmatch=True).filter(lambda name: name != "public")
USERS = st.text(max_size=300)
EPOCHS = st.integers(min_value=0, max_value=2**32 - 1)


@given(TENANTS, USERS, EPOCHS)
def test_a_salt_stands_for_whom_it_was_signed_and_fits_vllm(tenant: str, user: str, epoch: int) -> None:
    signed = Signed(tenant, user_tag(tenant, user), epoch)
    salt = sign(signed, SECRET)
    assert verify(salt, [SECRET]) == signed
    assert 1 <= len(salt) <= 128
    assert not set(salt) & set("@/\\\0")
    assert set(salt) <= set(string.ascii_letters + string.digits + "._-")


@given(st.text(max_size=200))
def test_no_text_is_believed_and_none_raises(text: str) -> None:
    assert verify(text, [SECRET]) is None
    assert verify(PREFIX + text, [SECRET]) is None


@given(st.data())
def test_a_salt_of_which_one_character_is_another_is_not_believed(data: st.DataObject) -> None:
    salt = sign(Signed("a.c-m_e", user_tag("a.c-m_e", "alice"), 7), SECRET)
    place = data.draw(st.integers(0, len(salt) - 1))
    other = data.draw(st.characters().filter(lambda character: character != salt[place]))
    assert verify(salt[:place] + other + salt[place + 1 :], [SECRET]) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda salt: salt + "\n",
        lambda salt: " " + salt,
        lambda salt: salt[:-1],
        lambda salt: salt + "A",
        lambda salt: salt.replace(".0.", ".00."),
        lambda salt: salt.replace(".0.", ".٠."),  # a zero, in Arabic
        lambda salt: salt.replace(".0.", ".4294967296."),
        lambda salt: salt.replace("acme", "acme.x"),
        lambda salt: salt.replace("acme", "public"),
        lambda salt: salt.replace("acme", "ACME"),
        lambda salt: salt.upper(),
        lambda salt: salt.replace("st1", "st2"),
        lambda salt: salt + "=",
    ],
)
def test_another_spelling_is_not_believed(change: Callable[[str], str]) -> None:
    assert verify(change(sign(ALICE, SECRET)), [SECRET]) is None


def test_the_mac_binds_every_field() -> None:
    mac = sign(ALICE, SECRET).rpartition(".")[2]
    for other in (
        Signed("acne", ALICE.user),
        Signed("acme", user_tag("acme", "bob")),
        Signed("acme", ALICE.user, 1),
    ):
        assert verify(f"{PREFIX}{other.tenant}.{other.user}.{other.epoch}.{mac}", [SECRET]) is None


def test_two_secrets_are_valid_at_once_and_an_older_one_is_not() -> None:
    salt = sign(ALICE, SECRET)
    assert verify(salt, [OTHER, SECRET]) == ALICE
    assert verify(salt, [OTHER]) is None
    assert verify(salt, []) is None


def test_a_user_is_one_of_its_tenant() -> None:
    assert user_tag("acme", "alice") != user_tag("umbrella", "alice")
    assert user_tag("a", "bc") != user_tag("ab", "c"), "the boundary between the fields moved"
    assert signed_user_key(SECRET, "a", "bc", 0) != signed_user_key(SECRET, "ab", "c", 0)


def test_no_salt_that_nobody_signed_has_a_signed_users_key() -> None:
    key = signed_user_key(SECRET, ALICE.tenant, ALICE.user, ALICE.epoch)
    assert key != signed_user_key(SECRET, ALICE.tenant, ALICE.user, 1)
    assert key != signed_user_key(OTHER, ALICE.tenant, ALICE.user, ALICE.epoch)
    assert key != unsigned_user_key(SECRET, sign(ALICE, SECRET))


@pytest.mark.parametrize("name", ["", "public", "Acme", "-acme", ".acme", "a" * 41, "a/b", "a@b", "a b", "ä", "acme\n"])
def test_a_name_that_is_no_tenants_is_not_signed_for(name: str) -> None:
    assert not is_signable(name)
    with pytest.raises(AssertionError, match="nobody could verify"):
        sign(Signed(name, ALICE.user), SECRET)


# Files


def test_signing_secrets_are_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "signing.keys"
    (secret,) = make_signing_secrets(path)
    assert make_signing_secrets(path) == (secret,)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == secret.hex() + "\n"


def test_rotation_keeps_the_secret_before_it_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "signing.keys"
    (first,) = make_signing_secrets(path)
    second, kept = rotate_signing_secrets(path)
    assert kept == first
    third, kept = rotate_signing_secrets(path)
    assert kept == second
    assert read_signing_secrets(path) == (third, second)
    assert len({first, second, third}) == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"zz", b"ab" * 31, b"ab" * 33, b"\xff" * 64, b"\n".join([b"ab" * 32] * 3), b"ab " * 32]
)
def test_a_file_that_holds_no_secrets_says_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "signing.keys"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ValueError, match=r"signing\.keys"):
        read_signing_secrets(path)


def test_a_file_that_others_may_read_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "signing.keys"
    make_signing_secrets(path)
    path.chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        read_signing_secrets(path)
