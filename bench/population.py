"""A population: users and the prompts they have stored, the same ones wherever the numbers are the same."""

from hashlib import blake2b

from bench.serving import Asks
from saltern.core.keys import KEY_BYTES, USER_ID_BYTES, Key, UserId
from saltern.core.messages import Commit, Reserve, Reserved

PROMPT_TOKENS = 32_768


def user_id(user: int) -> UserId:
    """Return the id of the user of that number."""
    return UserId(blake2b(b"user %d" % user, digest_size=USER_ID_BYTES).digest())


def prompt_keys(user: int, blocks: int) -> tuple[Key, ...]:
    """Return the keys of the user's only prompt. Random bytes, as real ones are."""
    return tuple(Key(blake2b(b"%d %d" % (user, block), digest_size=KEY_BYTES).digest()) for block in range(blocks))


def store(cache: Asks, user: int, blocks: int) -> None:
    """Reserve and commit a user's prompt, without bytes."""
    keys = prompt_keys(user, blocks)
    reserved = cache.ask(Reserve(1, user_id(user), keys, start=0, acquired_at=float("inf")))
    assert isinstance(reserved, Reserved) and len(reserved.grants) == blocks, f"not stored: {reserved}"
    cache.tell(Commit(reserved.lease))


def populate(cache: Asks, *, users: int, blocks: int, prompt_blocks: int) -> int:
    """Store `blocks` blocks of `users` users; return how many of them, the first ones, have a whole prompt.

    The others have one block each: most users of a large service have little in the cache at any moment.
    """
    assert blocks >= users, "every user has a block"
    prompts = (blocks - users) // (prompt_blocks - 1)
    for user in range(users):
        store(cache, user, prompt_blocks if user < prompts else 1)
    return prompts
