"""Tenants and users: who owns blocks, who is charged for them, and who goes first when room is needed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Any, Generic, Protocol, TypeVar

from msgspec import Struct

from saltern.core.census import Census
from saltern.core.keys import Key, UserId
from saltern.core.order import EvictionOrder, Stamp


class Evictable(Protocol):
    """What a tier keeps of a block, and may let go."""

    touched_at: float

    @property
    def user(self) -> "User[Any]":
        """Return whose it is."""

    @property
    def pages(self) -> int:
        """Return what the tenant is charged for it."""

    @property
    def stamp(self) -> Stamp | None:
        """Return when this may be evicted, or None while it may not: see `EvictionOrder`."""


B = TypeVar("B", bound=Evictable)


class Limits(Struct, frozen=True):
    """What a tenant is promised in one tier, and the most that it may do there.

    It can always hold `guarantee_bytes`. It never holds more than `limit_bytes`, and each of its users never more
    than `user_limit_bytes`; None is no limit. Blocks that nobody has used for `ttl_seconds` are not found any more;
    None keeps them. What is borrowed above guarantees is shared out by `weight`.
    """

    guarantee_bytes: int = 0
    limit_bytes: int | None = None
    user_limit_bytes: int | None = None
    ttl_seconds: float | None = None
    weight: float = 1.0


NO_LIMITS = Limits()

TENANT_NAME = r"[a-z0-9][a-z0-9._-]{0,39}"
"""What a tenant may be called, as a pattern: what fits a salt, a file's line and a metric's label as it is."""


def is_tenant_name(text: str) -> bool:
    """Return whether a tenant may be called so."""
    return re.fullmatch(TENANT_NAME, text) is not None


def why_not(limits: Limits) -> str | None:
    """Return what is wrong with one tenant's limits by themselves, for a person, or None."""
    for name, value in (("limit", limits.limit_bytes), ("user_limit", limits.user_limit_bytes)):
        if value is not None and value < 0:
            return f"{name} is {value} bytes; it must be 0 or more"
    if limits.guarantee_bytes < 0:
        return f"guarantee is {limits.guarantee_bytes} bytes; it must be 0 or more"
    if limits.limit_bytes is not None and limits.limit_bytes < limits.guarantee_bytes:
        return f"guarantee ({limits.guarantee_bytes} bytes) is above limit ({limits.limit_bytes} bytes)"
    if limits.ttl_seconds is not None and not 0 < limits.ttl_seconds < inf:
        return f"ttl is {limits.ttl_seconds} seconds; it must be more than 0"
    if not 0 < limits.weight < inf:
        return f"weight is {limits.weight}; it must be more than 0"
    return None


def exceeds(pages: int, limit_pages: int | None) -> bool:
    """Return whether pages are more than a limit; None is no limit."""
    return limit_pages is not None and pages > limit_pages


class User(Generic[B]):
    """One isolation domain. Its dictionary is the only way to its blocks."""

    def __init__(self, user_id: UserId, tenant: "Tenant[B]") -> None:
        self.id = user_id
        self.tenant = tenant
        self.block_by_key: dict[Key, B] = {}
        self.used_pages = 0  # doomed blocks included, until their pages are free
        self.held_pages = 0  # of them pinned
        self.order: EvictionOrder[B] = EvictionOrder()
        self.is_erased = False  # then nobody finds it, and its blocks go as soon as they can

    def link(self, key: Key, block: B) -> None:
        """Let a block be found."""
        self.block_by_key[key] = block
        self.tenant.blocks += not self.is_erased

    def unlink(self, key: Key) -> None:
        """Let a block be found no more; it is charged for until its pages are free."""
        del self.block_by_key[key]
        self.tenant.blocks -= not self.is_erased

    def charge(self, pages: int) -> None:
        """Charge for pages, or with less than none for fewer."""
        before = self.used_pages.bit_length()
        self.used_pages += pages
        self.tenant.used_pages += pages
        if self.used_pages.bit_length() != before and not self.is_erased:
            self.tenant.rank(self, before, self.used_pages.bit_length())

    @property
    def stamp(self) -> Stamp | None:
        """Return when this user's next victim goes: users stand in their tenant's order by it."""
        first = self.order.first()
        return first.stamp if first is not None else None


@dataclass
class Tally:
    """Running counts of decisions; `Counts` in `snapshot` says what each one means."""

    acquires: int = 0
    hit_blocks: int = 0
    missed_blocks: int = 0
    stored: int = 0
    stored_after_evicting: int = 0
    aborted: int = 0
    evicted: int = 0
    discarded: int = 0
    expired: int = 0
    shortened: int = 0
    public_blocks: int = 0
    skipped: int = 0  # these three on the disk alone
    loaded: int = 0
    lost: int = 0
    refusals: dict[str, int] = field(default_factory=dict)


class Tenant(Generic[B]):
    """Who is charged, and the limits that hold for it in one tier."""

    def __init__(
        self,
        name: str,
        limits: Limits,
        census: Census,
        *,
        page_bytes: int,
        serial: int,
        is_configured: bool,
        is_pool: bool = False,
    ) -> None:
        self.name = name
        self._census = census
        self.is_pool = is_pool  # the public one, in RAM
        self.serial = serial
        self.is_configured = is_configured  # otherwise it lives as long as it holds something
        self.user_by_id: dict[UserId, User[B]] = {}
        self.users_by_size: dict[int, dict[User[B], None]] = {}  # by the bits of how many pages each holds
        self.blocks = 0  # that are found
        self.used_pages = 0
        self.held_pages = 0  # of those, the pinned ones
        self.held_blocks = 0
        self.leased_to_write = 0  # blocks
        self.held_share_pages = 0  # so many it may pin whatever others do
        self.order: EvictionOrder[User[B]] = EvictionOrder()
        self.users_to_check: dict[User[B], None] = {}  # perhaps above a limit that was lowered
        self.is_watched = False  # something may fall due for it: see `due`
        self.has_grown = False  # since its place among tenants was last seen
        self.tally = Tally()
        self._page_bytes = page_bytes
        self.set_limits(limits)

    def set_limits(self, limits: Limits) -> None:
        """Be subject to other limits from now on. What is above them is given up bit by bit: see `due`.

        What is published never goes by itself, and users' blocks hang on it: the public pool has what it is guaranteed
        and borrows nothing, not even when less is guaranteed while it grows.
        """
        if self.is_pool:
            size = max(limits.guarantee_bytes, self.used_pages * self._page_bytes)
            limits = Limits(guarantee_bytes=size, limit_bytes=size)
        self.limits = limits
        self.guarantee_pages = limits.guarantee_bytes // self._page_bytes
        self.limit_pages = _whole_pages(limits.limit_bytes, self._page_bytes)
        self.user_limit_pages = _whole_pages(limits.user_limit_bytes, self._page_bytes)
        self.ttl_seconds = limits.ttl_seconds
        self.users_to_check = {} if self.user_limit_pages is None else dict.fromkeys(self.user_by_id.values())
        self.is_watched = self.ttl_seconds is not None or bool(self.users_to_check) or self.is_over_limit

    def user(self, user_id: UserId) -> User[B]:
        """Return the user, making it on its first block."""
        user = self.user_by_id.get(user_id)
        if user is None:
            user = self.user_by_id[user_id] = User(user_id, self)
        return user

    def erase(self, user_id: UserId) -> User[B] | None:
        """Forget a user at once; what it holds is let go as fast as it may be, and one of that id begins anew."""
        user = self.user_by_id.pop(user_id, None)
        if user is not None:
            self.rank(user, user.used_pages.bit_length(), 0)
            self.blocks -= len(user.block_by_key)
            user.is_erased = True
            self.users_to_check.pop(user, None)
        return user

    def forget_if_empty(self, user: User[B]) -> None:
        """Drop a user that holds nothing, so that random salts leave nothing behind."""
        if not user.used_pages:
            if self.user_by_id.get(user.id) is user:  # one of that id may have begun anew
                del self.user_by_id[user.id]
            self.users_to_check.pop(user, None)
            self.order.withdraw(user)
            # Its order still knows blocks that know their user. Without this cycle no collector needs to run.
            user.order = EvictionOrder()

    def rank(self, user: User[B], before: int, after: int) -> None:
        """Move a user among those of its size: numbers of bits, 0 is who holds nothing."""
        if before:
            users = self.users_by_size[before]
            del users[user]
            if not users:
                del self.users_by_size[before]
        else:
            self._census.enter(self.name, user.id)
        if after:
            self.users_by_size.setdefault(after, {})[user] = None
        else:
            self._census.leave(self.name, user.id)

    def largest_users(self) -> Iterator[User[B]]:
        """Yield the users, the larger first to a factor of two."""
        for size in sorted(self.users_by_size, reverse=True):
            yield from self.users_by_size[size]

    def first_victim(self) -> B | None:
        """Return the tenant's block that is evicted next."""
        user = self.order.first()
        return user.order.first() if user is not None else None

    def pressure(self, more_pages: int = 0) -> float:
        """Return the surplus over the weight, in pages: how far above its guarantee the tenant would be with more."""
        return (self.used_pages + more_pages - self.guarantee_pages) / self.limits.weight

    @property
    def stamp(self) -> Stamp | None:
        """Return the tenant's place among those that pay when the arena is full: the most above its guarantee first."""
        return (-self.pressure(), 0, self.serial) if self.used_pages > self.guarantee_pages else None

    @property
    def is_over_limit(self) -> bool:
        """Return whether the tenant holds more than its limit, which was lowered then."""
        return self.limit_pages is not None and self.used_pages > self.limit_pages

    @property
    def due(self) -> Stamp | None:
        """Return when a block has to go though nobody needs its room: at once above a lowered limit, else by expiry."""
        if self.users_to_check or (self.is_over_limit and self.first_victim() is not None):
            return (-inf, 0, self.serial)
        first = self.first_victim() if self.ttl_seconds is not None else None
        return None if first is None else (self.expires_at(first), 0, self.serial)

    def expires_at(self, block: B) -> float:
        """Return from when on a block isn't found any more, unless it is used again."""
        return block.touched_at + (inf if self.ttl_seconds is None else self.ttl_seconds)


def _whole_pages(limit_bytes: int | None, page_bytes: int) -> int | None:
    return None if limit_bytes is None else limit_bytes // page_bytes
