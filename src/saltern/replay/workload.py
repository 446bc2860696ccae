"""A workload: a trace's requests with the tenants and users that they are charged to, and those of one who floods.

A trace seldom says who its tenants are. Users are therefore hashed onto tenants of skewed size: the k-th of them is
1/k^skew as large as the first, so that with a skew of 0 all are alike.
"""

from bisect import bisect_right
from collections.abc import Iterator
from functools import cache
from hashlib import blake2b
from itertools import accumulate, chain
from typing import NamedTuple

from saltern.core.keys import KEY_BYTES, USER_ID_BYTES, Key, UserId
from saltern.replay.traces import Trace

FLOOD = "flood"
"""The tenant that asks for ever new blocks, none of them twice."""

_FLOOD_BIT = 1 << 63  # no trace has as many blocks, so that none of a flood's is one of its


class Ask(NamedTuple):
    """What one request asks of the cache, on whose account."""

    at: float  # seconds
    tenant: str
    user: UserId
    keys: tuple[Key, ...]


class Workload(NamedTuple):
    """Requests in order of time, and how many leading blocks of each of the trace's are published.

    `tenants` are those of the trace, `flooded` says that a further one floods, of which nothing is published.
    """

    asks: tuple[Ask, ...]
    tenants: tuple[str, ...]
    flooded: bool
    public_blocks: int

    @property
    def published(self) -> tuple[tuple[Key, ...], ...]:
        """Return each prefix that requests begin with and that is published, once; maybe shorter than the others."""
        prefixes = dict.fromkeys(ask.keys[: self.public_blocks] for ask in self.asks if ask.tenant != FLOOD)
        return tuple(filter(None, prefixes))

    @property
    def published_blocks(self) -> int:
        """Return how many different blocks these prefixes have."""
        return len(set(chain.from_iterable(self.published)))


def make_workload(
    trace: Trace, *, tenants: int = 1, skew: float = 0.0, salted: bool = False, published: int = 0, flood: float = 0.0
) -> Workload:
    """Hand a trace's requests to tenants.

    `salted` isolates each user, where otherwise a tenant's users share their blocks. The `published` first blocks of
    each are the operator's. `flood` is how many times the trace's blocks the flooding tenant asks
    for: one request of its after each of the trace's, as many times as long.
    """
    names = tuple(f"t{number}" for number in range(1, tenants + 1))
    bounds = tuple(accumulate(1 / number**skew for number in range(1, tenants + 1)))
    tenant_of = cache(lambda user: names[bisect_right(bounds, _part(user) * bounds[-1])])
    user_id_of = cache(_user_id)
    asks: list[Ask] = []
    fresh = _flood_keys()
    for request in trace.requests:
        tenant = tenant_of(request.user)
        keys = tuple(Key(block.to_bytes(KEY_BYTES, "little")) for block in request.blocks)
        asks.append(Ask(request.at, tenant, user_id_of(f"user {request.user}" if salted else tenant), keys))
        if flood:
            flood_keys = tuple(next(fresh) for _ in range(round(len(keys) * flood)))
            asks.append(Ask(request.at, FLOOD, user_id_of(FLOOD), flood_keys))
    return Workload(tuple(asks), names, flooded=bool(flood), public_blocks=published)


def _flood_keys() -> Iterator[Key]:
    number = _FLOOD_BIT
    while True:
        yield Key(number.to_bytes(KEY_BYTES, "little"))
        number += 1


def _part(user: str) -> float:
    """Return a number in [0, 1) that stands for a user in every run."""
    return int.from_bytes(blake2b(user.encode(), digest_size=6, person=b"saltern.part").digest()) / 2**48


def _user_id(name: str) -> UserId:
    return UserId(blake2b(name.encode(), digest_size=USER_ID_BYTES, person=b"saltern.replay").digest())
