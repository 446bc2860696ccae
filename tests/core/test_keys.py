"""Keys: framing can't be confused, and whatever decides a block's bytes decides its key."""

from hypothesis import given
from hypothesis import strategies as st

from saltern.core.keys import (
    KEY_BYTES,
    SECRET_BYTES,
    USER_ID_BYTES,
    Content,
    Key,
    UserKey,
    block_key,
    digest,
    frame,
    namespace_content,
    next_content,
    state_key,
    unsigned_user_key,
    user_id,
)

SECRET = bytes(range(SECRET_BYTES))

fields = st.lists(st.binary(max_size=20), max_size=5)
tokens = st.binary(min_size=4, max_size=16)


def chain(namespace: bytes, blocks: list[tuple[bytes, bytes]]) -> Content:
    content = namespace_content(namespace)
    for block_tokens, extras in blocks:
        content = next_content(content, block_tokens, extras)
    return content


@given(fields, fields)
def test_framing_is_injective(one: list[bytes], other: list[bytes]) -> None:
    assert (frame(one) == frame(other)) == (one == other)


@given(fields)
def test_a_frame_can_be_read_back(written: list[bytes]) -> None:
    framed, read = frame(written), []
    while framed:
        length = int.from_bytes(framed[:8], "little")
        read.append(framed[8 : 8 + length])
        framed = framed[8 + length :]
    assert read == written


Blocks = list[tuple[bytes, bytes]]
blocks_of_a_prompt = st.lists(st.tuples(tokens, st.binary(max_size=8)), max_size=4)


@given(st.binary(max_size=8), blocks_of_a_prompt, st.binary(max_size=8), blocks_of_a_prompt)
def test_contents_are_equal_only_for_equal_inputs(
    namespace: bytes, blocks: Blocks, other_namespace: bytes, other_blocks: Blocks
) -> None:
    equal = (namespace, blocks) == (other_namespace, other_blocks)
    assert (chain(namespace, blocks) == chain(other_namespace, other_blocks)) == equal


@given(tokens, st.binary(min_size=1, max_size=8))
def test_extras_and_tokens_are_told_apart(block: bytes, extras: bytes) -> None:
    root = namespace_content(b"model")
    assert next_content(root, block, extras) != next_content(root, block + extras)
    assert next_content(root, block, extras) != next_content(root, block)


def test_the_same_tokens_at_another_position_are_another_block() -> None:
    first = next_content(namespace_content(b"model"), b"\1\0\0\0")
    assert next_content(first, b"\1\0\0\0") != first


@given(st.text(max_size=20), st.text(max_size=20))
def test_users_differ_by_salt(salt: str, other: str) -> None:
    user, other_user = unsigned_user_key(SECRET, salt), unsigned_user_key(SECRET, other)
    content = namespace_content(b"model")
    assert (user == other_user) == (salt == other)
    assert (user_id(user) == user_id(other_user)) == (salt == other)
    assert (block_key(user, content) == block_key(other_user, content)) == (salt == other)


def test_nobody_is_a_user_like_any_other() -> None:
    assert unsigned_user_key(SECRET, "") != unsigned_user_key(SECRET, "\0")
    assert len(user_id(unsigned_user_key(SECRET, ""))) == USER_ID_BYTES


def test_users_differ_by_secret() -> None:
    other = bytes(SECRET_BYTES)
    assert unsigned_user_key(SECRET, "alice") != unsigned_user_key(other, "alice")


def test_any_salt_makes_a_key() -> None:
    for salt in ("\ud800", "a" * 100_000, "\0", "ünï"):
        assert len(block_key(unsigned_user_key(SECRET, salt), namespace_content(b""))) == KEY_BYTES


@given(st.binary(min_size=6, max_size=30))
def test_no_byte_of_a_salt_is_in_what_travels(salt: bytes) -> None:
    text = salt.hex()
    key = unsigned_user_key(SECRET, text)
    for travels in (user_id(key), block_key(key, namespace_content(b"model"))):
        assert text.encode() not in bytes(travels)
        assert text not in travels.hex()


def test_what_travels_does_not_hold_the_user_key() -> None:
    key = unsigned_user_key(SECRET, "alice")
    assert bytes(user_id(key)) not in bytes(key)
    assert key[:8] not in bytes(block_key(key, namespace_content(b"model")) + user_id(key))


@given(blocks_of_a_prompt, blocks_of_a_prompt, st.text(max_size=3), st.text(max_size=3))
def test_a_state_is_named_like_nothing_else(blocks: Blocks, other_blocks: Blocks, salt: str, other_salt: str) -> None:
    content, other_content = chain(b"model", blocks), chain(b"model", other_blocks)
    user, other_user = unsigned_user_key(SECRET, salt), unsigned_user_key(SECRET, other_salt)
    equal = (blocks, salt) == (other_blocks, other_salt)
    assert (state_key(user, content) == state_key(other_user, other_content)) == equal
    assert state_key(user, content) != block_key(other_user, other_content)


def test_purposes_are_told_apart() -> None:
    assert digest(b"one", [b"field"]) != digest(b"other", [b"field"])
    assert digest(b"one", [b"field"], key=SECRET) != digest(b"one", [b"field"])


def test_keys_do_not_change_by_accident() -> None:
    """Whoever changes these makes every block stored so far unreachable."""
    root = namespace_content(b"model")
    first = next_content(root, (1).to_bytes(4, "little") + (2).to_bytes(4, "little"))
    second = next_content(first, (3).to_bytes(4, "little"), b"adapter")
    user: UserKey = unsigned_user_key(SECRET, "alice")
    key: Key = block_key(user, second)
    assert {
        "root": root.hex(),
        "first": first.hex(),
        "second": second.hex(),
        "user key": user.hex(),
        "user id": user_id(user).hex(),
        "nobody": user_id(unsigned_user_key(SECRET, "")).hex(),
        "key": key.hex(),
        "state": state_key(user, second).hex(),
    } == GOLDEN


GOLDEN = {
    "root": "c71b66cfbd512b95f2cc25b0a6a7ae89b42800640c3629afd9d6cfd33ebaddc3",
    "first": "6a3cc93a09ae1fad584c24ed831676c60d4475c940ed27408aab0874ec53191d",
    "second": "6e18ccf5081e829855d98f802fc2ded958495927f8f5d00b003253410e8570d9",
    "user key": "c4d755d1eb95b3ede2983a2aeabaf0fa5765062388d41345773c3de62eeff26e",
    "user id": "0e2ecc2639920d51255a39c32fcc0caf",
    "nobody": "d69fdc8f0cda6975e4de2f9ca2727a52",
    "key": "463f8cf3c60e9795906cff943d474aedfa68cf27da5bf38f4d35eb8aa461869c",
    "state": "ab4ce480c1b58c4e64f012492ef3ec8bc9fd0747e458ec1af8fa51265261fccc",
}
