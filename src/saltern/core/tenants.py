"""Tenants and users: who owns blocks, who is charged for them, and who goes first when room is needed."""

from dataclasses import dataclass, field

from msgspec import Struct

from saltern.core.blocks import Block
from saltern.core.keys import Key, UserId
from saltern.core.order import EvictionOrder, Stamp

DEFAULT_TENANT = "default"
"""Who is charged for users that nobody signed for."""


class Limits(Struct, frozen=True):
    """The most that a tenant, and each of its users, may ever hold. None is no limit."""

    limit_bytes: int | None = None
    user_limit_bytes: int | None = None


NO_LIMITS = Limits()


class User:
    """One isolation domain. Its dictionary is the only way to its blocks."""

    def __init__(self, user_id: UserId, tenant: "Tenant") -> None:
        self.id = user_id
        self.tenant = tenant
        self.block_by_key: dict[Key, Block] = {}
        self.used_pages = 0  # doomed blocks included, until their pages are free
        self.order: EvictionOrder[Block] = EvictionOrder()

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
    refusals: dict[str, int] = field(default_factory=dict)


class Tenant:
    """Who is charged, and the limits that hold for it."""

    def __init__(self, name: str, limits: Limits, *, page_bytes: int) -> None:
        self.name = name
        self.limits = limits
        self.limit_pages = _whole_pages(limits.limit_bytes, page_bytes)
        self.user_limit_pages = _whole_pages(limits.user_limit_bytes, page_bytes)
        self.user_by_id: dict[UserId, User] = {}
        self.used_pages = 0
        self.order: EvictionOrder[User] = EvictionOrder()
        self.tally = Tally()

    def user(self, user_id: UserId) -> User:
        """Return the user, making it on its first block."""
        user = self.user_by_id.get(user_id)
        if user is None:
            user = self.user_by_id[user_id] = User(user_id, self)
        return user

    def forget_if_empty(self, user: User) -> None:
        """Drop a user that holds nothing, so that random salts leave nothing behind."""
        if not user.used_pages:
            self.user_by_id.pop(user.id, None)
            self.order.withdraw(user)
            # Its order still knows blocks that know their user. Without this cycle no collector needs to run.
            user.order = EvictionOrder()

    def first_victim(self) -> Block | None:
        """Return the tenant's block that is evicted next."""
        user = self.order.first()
        return user.order.first() if user is not None else None


def _whole_pages(limit_bytes: int | None, page_bytes: int) -> int | None:
    return None if limit_bytes is None else limit_bytes // page_bytes
