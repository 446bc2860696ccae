"""Keys: how tokens, users and models become names that can't be confused.

    content[i] = H(content[i-1], tokens[i], extras[i])         content[-1] = H(namespace)
    key[i]     = keyed_H(user_key, content[i])                 what travels to the server
    state[i]   = keyed_H(user_key, content[i])                 the same for the state after block i, if there is one
    user_key   = keyed_H(naming secret, tag, fields)           never leaves the engine's process
    user id    = keyed_H(user_key, "")                         what the server and the operator see

Every hash is BLAKE2b at full width under a personalisation string of its own, and every input is a
sequence of length-framed fields, so that no two different inputs are the same bytes. A raw salt is an
input to `user_key` and to nothing else: neither a key nor a user id can be turned back into it without
the naming secret.
"""

from array import array
from collections.abc import Iterable
from hashlib import blake2b
from typing import NewType

Content = NewType("Content", bytes)
"""Identity of a prefix of tokens inside one namespace; the same for every user. 32 bytes."""

Key = NewType("Key", bytes)
"""Name of one block of one user. 32 bytes."""

UserKey = NewType("UserKey", bytes)
"""Secret from which all of a user's keys derive. 32 bytes."""

UserId = NewType("UserId", bytes)
"""Opaque name of a user, safe to show to an operator. 16 bytes."""

KEY_BYTES = 32
USER_ID_BYTES = 16
SECRET_BYTES = 32


def frame(fields: Iterable[bytes]) -> bytes:
    """Join fields so that the boundaries can't move: each is preceded by its length as 8 bytes."""
    return b"".join(len(field).to_bytes(8, "little") + field for field in fields)


def digest(purpose: bytes, fields: Iterable[bytes], *, key: bytes = b"", size: int = 32) -> bytes:
    """Hash length-framed `fields` for one `purpose` (at most 16 bytes), keyed where `key` is given."""
    return blake2b(frame(fields), digest_size=size, key=key, person=purpose).digest()


def namespace_content(namespace: bytes) -> Content:
    """Return the content of the empty prefix in a namespace: the root of every chain."""
    return Content(digest(b"saltern.root", [namespace]))


def next_content(parent: Content, tokens: bytes, extras: bytes = b"") -> Content:
    """Extend a prefix by one block.

    `tokens` are the block's token ids as little-endian int32; `extras` is whatever else decides the
    block's bytes (adapters, images, embeddings), framed by the caller, empty for plain text.
    """
    # Written out rather than through `digest`: this runs once a block of every prompt.
    framed = parent + len(tokens).to_bytes(8, "little") + tokens + extras
    return Content(blake2b(framed, digest_size=32, person=b"saltern.content").digest())


def content_of(root: Content, tokens: "array[int]", block_tokens: int, extras: bytes = b"") -> Content:
    """Return the content of all whole blocks of `tokens` (int32) behind `root`, with the same `extras` in each."""
    content = root
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        content = next_content(content, tokens[start : start + block_tokens].tobytes(), extras)
    return content


def unsigned_user_key(naming_secret: bytes, salt: str) -> UserKey:
    """Derive the key of a user known by a bare `cache_salt`; requests without a salt are the user ``""``."""
    fields = [b"unsigned", salt.encode("utf-8", "surrogatepass")]
    return UserKey(digest(b"saltern.user", fields, key=naming_secret))


def signed_user_key(naming_secret: bytes, tenant: str, user_tag: str, epoch: int) -> UserKey:
    """Derive the key of a user whom a signed salt names; who signed has no part in it."""
    fields = [b"signed", tenant.encode(), user_tag.encode(), epoch.to_bytes(8, "little")]
    return UserKey(digest(b"saltern.user", fields, key=naming_secret))


def public_user_key(naming_secret: bytes) -> UserKey:
    """Derive the key under which blocks are named that all users may read: no user's, whatever its salt."""
    return UserKey(digest(b"saltern.user", [b"public"], key=naming_secret))


def user_id(key: UserKey) -> UserId:
    """Return the opaque id that the server and the operator know the user by."""
    return UserId(digest(b"saltern.userid", [], key=key, size=USER_ID_BYTES))


def block_key(key: UserKey, content: Content) -> Key:
    """Name a block: equal only for the same user, namespace and prefix."""
    return Key(blake2b(content, digest_size=KEY_BYTES, key=key, person=b"saltern.key").digest())


def state_key(key: UserKey, content: Content) -> Key:
    """Name the state after a block: never the name of a block, of this user or of any other."""
    return Key(blake2b(content, digest_size=KEY_BYTES, key=key, person=b"saltern.state").digest())
