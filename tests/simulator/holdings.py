"""Holdings: what tenants have in one tier, counted from scratch, and who of them goes next by the rules."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic

from saltern.core.keys import UserId
from saltern.core.order import Stamp
from saltern.core.shares import Shares
from saltern.core.tenants import NO_LIMITS, B, Limits, Tenant, User
from tests.simulator.claims import Invariant, violated


class Holdings(Generic[B]):
    """One tier as it is at one time. Whoever counts says so with `count`, and with `see` what may be evicted.

    Erased users are counted with their tenant until the last of theirs has gone, but by their name no more.
    """

    def __init__(self, shares: Shares[B], settings: Mapping[str, Limits], *, pages: int, page_bytes: int) -> None:
        self.shares = shares
        self.pages = pages
        self.page_bytes = page_bytes
        self._settings = dict(settings)
        self._pages_by_user: dict[User[B], int] = {}
        self._pages_by_name: dict[tuple[str, UserId], int] = {}
        self._pages_by_tenant: dict[str, int] = {}
        self._evictable: list[B] = []
        self._evictable_tenants: dict[str, Tenant[B]] = {}

    def count(self, user: User[B], pages: int) -> None:
        """Count pages that a user holds."""
        tenant, name = user.tenant.name, (user.tenant.name, user.id)
        self._pages_by_user[user] = self._pages_by_user.get(user, 0) + pages
        self._pages_by_tenant[tenant] = self._pages_by_tenant.get(tenant, 0) + pages
        if not user.is_erased:
            self._pages_by_name[name] = self._pages_by_name.get(name, 0) + pages

    def see(self, evictable: list[B]) -> None:
        """Know all that may be evicted now."""
        self._evictable = evictable
        self._evictable_tenants = {owner_of(item).tenant.name: owner_of(item).tenant for item in evictable}

    # What each has

    def limits(self, tenant: str) -> Limits:
        """Return what is set for a tenant."""
        return self._settings.get(tenant, NO_LIMITS)

    def guarantee(self, tenant: str) -> int:
        """Return how many pages a tenant is guaranteed."""
        return self.limits(tenant).guarantee_bytes // self.page_bytes

    def user(self, tenant: str, user_id: UserId) -> User[B] | None:
        """Return the user of a tenant that has something."""
        known = self.shares.tenant_by_name.get(tenant)
        return known.user_by_id.get(user_id) if known is not None else None

    def used(self, tenant: str, user: UserId | None = None) -> int:
        """Return how many pages a tenant holds, or one of its users."""
        return self._pages_by_tenant.get(tenant, 0) if user is None else self._pages_by_name.get((tenant, user), 0)

    def usage(self) -> dict[tuple[str, UserId], int]:
        """Return how many pages each user holds."""
        return dict(self._pages_by_name)

    def is_above_limits(self, user: User[B]) -> bool:
        """Return whether a user or its tenant holds more than it may, since it may less than before."""
        limits, size = self.limits(user.tenant.name), self.page_bytes
        above = over(self.used(user.tenant.name) * size, limits.limit_bytes)
        return above or over(self._pages_by_user.get(user, 0) * size, limits.user_limit_bytes)

    # What goes next

    def evictable(self, *, without: frozenset[B] = frozenset()) -> list[B]:
        """Return all that may be evicted, or could be if those `without` were gone."""
        return [item for item in self._evictable if item not in without] if without else self._evictable

    def payer(self, tenant: str, pages: int, *, without: frozenset[B] = frozenset()) -> str | None:
        """Return by the rules who gives something up so that a tenant has `pages` more, one scan."""
        others, freed = self._evictable_tenants, dict[str, int]()
        if without:
            others = {owner_of(item).tenant.name: owner_of(item).tenant for item in self.evictable(without=without)}
            for item in without:
                name = owner_of(item).tenant.name
                freed[name] = freed.get(name, 0) + item.pages

        def pressure(name: str, more: int = 0) -> float:
            used = self.used(name) - freed.get(name, 0) + more
            return (used - self.guarantee(name)) / self.limits(name).weight

        ranked = sorted((-pressure(name), other.serial, name) for name, other in others.items())
        own = pressure(tenant, pages)
        largest = -ranked[0][0] if ranked else 0.0
        if own > 0 and own >= largest:
            return tenant
        return ranked[0][2] if largest > 0 else None

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Leave all orders as lazy as they were, whatever is asked of them meanwhile."""
        shares = self.shares
        orders: list[Any] = [shares._by_surplus, shares._by_due]
        orders += [tenant.order for tenant in shares.tenant_by_name.values()]
        orders += [user.order for user in self._pages_by_user]
        kept = [(order, list(order._heap), dict(order._stamp_by_id), order._pushes) for order in orders]
        grown = list(shares._grown)
        yield
        for order, heap, stamp_by_id, pushes in kept:
            order._heap, order._stamp_by_id, order._pushes = heap, stamp_by_id, pushes
        shares._grown = grown
        for tenant in grown:
            tenant.has_grown = True

    def check_order(self) -> None:
        """Compare the idea of who goes first with a scan."""
        stamps_by_owner: dict[User[B] | Tenant[B], list[Stamp]] = {}
        for item in self._evictable:
            user = owner_of(item)
            for owner in (user, user.tenant):
                stamps_by_owner.setdefault(owner, []).append(stamp_of(item))
        for user in self._pages_by_user:
            _check_first(user.order.first(), stamps_by_owner.get(user, []))
        for tenant in self.shares.tenant_by_name.values():
            _check_first(tenant.first_victim(), stamps_by_owner.get(tenant, []))

    def check_payers(self) -> None:
        """Compare the idea of who pays with a scan."""
        for tenant in self.shares.tenant_by_name.values():
            for pages in (1, 3):
                payer = self.shares.payer(tenant, pages)
                expected = self.payer(tenant.name, pages)
                if (None if payer is None else payer.name) != expected:
                    violated(Invariant.PAYER, f"{payer and payer.name} pays for {tenant.name}, and {expected} should")

    def check_due(self, due_at: float | None, now: float) -> None:
        """Check that a tick comes in time for whatever has to go by itself."""
        for item in self._evictable:
            user = owner_of(item)
            ttl = self.limits(user.tenant.name).ttl_seconds
            wanted = None if ttl is None else max(item.touched_at + ttl, now)
            if user.is_erased or self.is_above_limits(user):
                wanted = now
            if wanted is not None and (due_at is None or due_at > wanted):
                violated(Invariant.DUE, f"{item} has to go at {wanted}, and the next tick is at {due_at}")

    # What must hold

    def check_tiles(self, taken: Iterable[tuple[int, int]], free: Iterable[tuple[int, int]], free_pages: int) -> None:
        """Check that runs taken and runs free tile the tier."""
        runs = sorted([*taken, *free])
        position = 0
        for start, count in runs:
            if start != position or count <= 0:
                violated(Invariant.TILES, f"runs {runs} don't tile {self.pages} pages at page {position}")
            position += count
        if position != self.pages or sum(count for _, count in free) != free_pages:
            violated(Invariant.TILES, f"runs {runs} with {free_pages} free don't make {self.pages} pages")

    def check_charges(self, always: Iterable[str]) -> None:
        """Check that everybody is charged for what it holds, and that who holds nothing is forgotten."""
        for user, pages in self._pages_by_user.items():
            if user.used_pages != pages:
                violated(Invariant.CHARGES, f"{user.id.hex()} is charged {user.used_pages}, not {pages}")
        for tenant in self.shares.tenant_by_name.values():
            if tenant.used_pages != self.used(tenant.name):
                violated(Invariant.CHARGES, f"{tenant.name} is charged {tenant.used_pages}, not {self._pages_by_user}")
            known = tenant.user_by_id.values()
            if tenant.blocks != sum(len(user.block_by_key) for user in known):
                violated(Invariant.STATS, f"{tenant.blocks} blocks of {tenant.name} are said to be found")
            ranked = [(size, user) for size, users in tenant.users_by_size.items() for user in users]
            if {*ranked} != {(self._pages_by_user.get(user, 0).bit_length(), user) for user in known}:
                violated(Invariant.STATS, f"{ranked} are said to be the users of {tenant.name}")
            for user in tenant.user_by_id.values():
                if user.is_erased:
                    violated(Invariant.ERASED, f"{user.id.hex()} of {tenant.name} is erased, and found")
                if user not in self._pages_by_user:
                    violated(Invariant.FORGOTTEN, f"{user.id.hex()} is remembered without a page")
            owners = {user for user in self._pages_by_user if user.tenant is tenant}
            if len(tenant.order._stamp_by_id) > len(owners):
                violated(Invariant.FORGOTTEN, "a user without a page stands in the order of users")
            if not tenant.used_pages and tenant.name not in always:
                violated(Invariant.FORGOTTEN, f"{tenant.name} is remembered without a page")
        for user in self._pages_by_user:
            is_known = self.user(user.tenant.name, user.id) is user
            if self.shares.tenant_by_name.get(user.tenant.name) is not user.tenant or is_known is user.is_erased:
                violated(Invariant.CHARGES, f"{user.id.hex()} has pages and is {'' if is_known else 'not '}known")

    def check_limits(self, before: "Holdings[B]") -> None:
        """Check the limits against pages that were counted. Above a limit that was lowered nobody grows."""
        size = self.page_bytes
        for (name, user), pages in self._pages_by_name.items():
            limits = self.limits(name)
            if over(pages * size, limits.user_limit_bytes) and pages > before.used(name, user):
                violated(Invariant.LIMITS, f"{user.hex()} of {name} holds {pages} pages of {limits}")
            if over(self.used(name) * size, limits.limit_bytes) and self.used(name) > before.used(name):
                violated(Invariant.LIMITS, f"{name} holds {self.used(name)} pages of {limits}")


def over(used: int, limit: int | None) -> bool:
    """Return whether bytes are more than a limit."""
    return limit is not None and used > limit


def owner_of(item: Any) -> User[Any]:
    """Return whose a block or record is."""
    user: User[Any] = item.user
    return user


def stamp_of(item: Any) -> Stamp:
    """Return the place of a block or record in the order of those that go."""
    return (item.touched_at, -item.depth, item.serial)


def _check_first(first: object, candidates: list[Stamp]) -> None:
    """Compare the idea of who goes first with a scan."""
    stamp = None if first is None else stamp_of(first)
    if stamp != min(candidates, default=None):
        violated(Invariant.ORDER, f"{first} goes first, and the oldest is {min(candidates, default=None)}")
