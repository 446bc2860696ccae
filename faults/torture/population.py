"""The population: users, the prompts that they send, and what each block of theirs holds, to the last byte.

A block's bytes are a function of its user, its key and its *generation*: how often the user had been erased when the
request began that stored it. So whoever finds a block can tell, from the block alone, whether it is the right one and
whether it should be there at all. Every 4,096 bytes carry all of that, behind a mark that is looked for where nothing
may be: in what was freed, and on the disk.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from hashlib import blake2b, shake_128
from struct import Struct
from typing import NamedTuple

from saltern.core.extents import Extent
from saltern.core.keys import (
    Content,
    Key,
    UserId,
    UserKey,
    block_key,
    namespace_content,
    next_content,
    signed_user_key,
    unsigned_user_key,
    user_id,
)
from saltern.core.messages import DEFAULT_TENANT
from saltern.signing import user_tag

BLOCK_BYTES = 40_000
"""Three pages of the arena and ten of the slab, the last of each not full."""

PART_BYTES = 4096  # pages of arena and slab are whole numbers of them
BLOCK_TOKENS = 16
FAMILIES, BRANCHES, SHARED_BLOCKS, OWN_BLOCKS = 4, 4, 3, 3
PROMPTS = FAMILIES * BRANCHES

ROOT = namespace_content(b"torture")
PLAIN = b"saltern.torture!"
"""Stands in every part of every block, so that unencrypted bytes are found wherever they are."""

_PART = Struct("<16s16sQQ")  # PLAIN, whose and when, the generation, the part's number


class User(NamedTuple):
    """A user of the cache. `name` is a salt where nobody signs for the user."""

    number: int
    tenant: str
    name: str

    @property
    def is_signed(self) -> bool:
        """Whether the user's salt names tenant and user, and an epoch that grows with every erasure."""
        return self.tenant != DEFAULT_TENANT

    @property
    def tag(self) -> str:
        """What stands for the user's name in a signed salt."""
        return user_tag(self.tenant, self.name)

    def identity(self, naming_secret: bytes, generation: int) -> Identity:
        """Return under which names a generation of the user is known: of an unsigned one, all under the same."""
        if self.is_signed:
            key = signed_user_key(naming_secret, self.tenant, self.tag, generation)
        else:
            key = unsigned_user_key(naming_secret, self.name)
        return Identity(key, user_id(key))


class Identity(NamedTuple):
    """What an engine derives of a user."""

    key: UserKey
    id: UserId


USERS_BY_TENANT = {DEFAULT_TENANT: 6, "acme": 5, "bolt": 5, "calm": 2}
STEADY_TENANT = "calm"
"""Never erased, and guaranteed more than it can store: what it has on the disk has to stay there."""

USERS = tuple(
    User(number, tenant, f"{tenant}-{index}")
    for number, (tenant, index) in enumerate(
        (tenant, index) for tenant, count in USERS_BY_TENANT.items() for index in range(count)
    )
)


def prompt_contents(number: int) -> list[Content]:
    """Return the contents of a prompt's blocks: those of one family begin with the same ones, for all users."""
    family, branch = divmod(number, BRANCHES)
    contents = []
    content = ROOT
    for depth in range(SHARED_BLOCKS + OWN_BLOCKS):
        seed = (family, 0 if depth < SHARED_BLOCKS else 1 + branch, depth)
        content = next_content(content, array("i", [*seed, *range(BLOCK_TOKENS - len(seed))]).tobytes())
        contents.append(content)
    return contents


def prompt_keys(identity: Identity, number: int) -> tuple[Key, ...]:
    """Return the keys of a prompt's blocks as a user's."""
    return tuple(block_key(identity.key, content) for content in prompt_contents(number))


def block_bytes(user: UserId, key: Key, generation: int) -> bytes:
    """Return what a block holds."""
    parts = -(-BLOCK_BYTES // PART_BYTES)
    size = PART_BYTES - _PART.size
    noise = shake_128(user + key + generation.to_bytes(8, "little")).digest(parts * size)
    mark = generation_mark(user, generation)
    pieces = (
        _PART.pack(PLAIN, mark, generation, part) + noise[part * size : (part + 1) * size] for part in range(parts)
    )
    return b"".join(pieces)[:BLOCK_BYTES]


def generation_of(block: bytes) -> int:
    """Return which generation a block says it is of."""
    return int(_PART.unpack_from(block)[2])


def generation_mark(user: UserId, generation: int) -> bytes:
    """Return what stands behind PLAIN in every part of a user's blocks of one generation."""
    return blake2b(user + generation.to_bytes(8, "little"), digest_size=16, person=b"torture.mark").digest()


def marks_in(memory: bytes | memoryview) -> Iterator[bytes]:
    """Yield whose blocks, of which generation, have parts in the pages of an arena."""
    for place in range(0, len(memory), PART_BYTES):
        plain, mark, _, _ = _PART.unpack_from(memory, place)
        if plain == PLAIN:
            yield bytes(mark)


def read_extent(buffer: memoryview, extent: Extent, page_bytes: int) -> bytes:
    """Return the block in an extent of the arena."""
    runs = (bytes(buffer[run.start * page_bytes : (run.start + run.count) * page_bytes]) for run in extent)
    return b"".join(runs)[:BLOCK_BYTES]


def write_extent(buffer: memoryview, extent: Extent, page_bytes: int, block: bytes, start: int, end: int) -> None:
    """Write the bytes `[start, end)` of a block where they belong in its extent."""
    place = 0  # of the run in the block
    for run in extent:
        size = run.count * page_bytes
        first, last = max(start, place), min(end, place + size)
        if first < last:
            offset = run.start * page_bytes - place
            buffer[offset + first : offset + last] = block[first:last]
        place += size
