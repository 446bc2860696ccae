"""Shares: how the arena is divided among tenants: who pays when it is full, and how much each may pin.

When the arena is full, the tenant pays whose *surplus* (usage above its guarantee) over its weight is largest; one at
or below its guarantee never does. Pinned pages can't be given back, so all tenants together pin no more than what
nobody is guaranteed. Hence somebody who is above his guarantee has a page that can go whenever one below hers asks:

    guarantees ≤ arena − P   and   pinned ≤ P   and   full   ⟹   the surpluses of the others > P ≥ pinned

A tenant's own part of P is proportional to its guarantee and reserved for it; what is nobody's part is for all.
"""

from collections.abc import Callable, Mapping
from itertools import count
from typing import Generic

from saltern.core.census import Census
from saltern.core.keys import UserId
from saltern.core.messages import DEFAULT_TENANT, PUBLIC_TENANT, Refusal
from saltern.core.order import EvictionOrder, Stamp
from saltern.core.tenants import NO_LIMITS, B, Limits, Tenant, User, exceeds, why_not


class Shares(Generic[B]):
    """All tenants of one tier. One without settings lives as long as it holds something, except for the default one.

    `in_flight_max_pages` is P. None: all that is not guaranteed, and at least an eighth of the arena; without
    any guarantee there is nothing to protect, and no bound. `census` is of all tiers; `place` is what this one is
    called; where it `has_pool`, the public tenant is one: see `Tenant.set_limits`.
    """

    def __init__(
        self,
        limits_by_name: Mapping[str, Limits],
        *,
        pages: int,
        page_bytes: int,
        in_flight_max_pages: int | None,
        census: Census,
        place: str = "arena",
        has_pool: bool = True,
    ) -> None:
        self.tenant_by_name: dict[str, Tenant[B]] = {}
        self._census = census
        self._place = place
        self._has_pool = has_pool
        self.held_pages_max: int | None = None
        self._pages = pages
        self._page_bytes = page_bytes
        self._in_flight_max_pages = in_flight_max_pages
        self._spoken_for = 0  # pages that are pinned, or reserved for a tenant's pins
        self._by_surplus: EvictionOrder[Tenant[B]] = EvictionOrder()
        self._by_due: EvictionOrder[Tenant[B]] = EvictionOrder("due")
        self._grown: list[Tenant[B]] = []  # since `_by_surplus` was last asked; once it is, it has to know
        self._serials = count(1)
        reason = self.why_not(limits_by_name)
        if reason is not None:
            raise ValueError(reason)
        for name, limits in {DEFAULT_TENANT: NO_LIMITS, **limits_by_name}.items():
            self.tenant_by_name[name] = self._new(name, limits, is_configured=True)
        self._divide_in_flight()

    def why_not(self, limits_by_name: Mapping[str, Limits]) -> str | None:
        """Return why these can't be the limits of all tenants, for a person, or None if they can."""
        for name, limits in limits_by_name.items():
            reason = why_not(limits)
            if reason is not None:
                return f"tenant {name}: {reason}"
        public = self.tenant_by_name.get(PUBLIC_TENANT)
        guarantee_bytes = limits_by_name.get(PUBLIC_TENANT, NO_LIMITS).guarantee_bytes
        if public is not None and public.is_pool and public.used_pages * self._page_bytes > guarantee_bytes:
            return (
                f"tenant {PUBLIC_TENANT}: {public.used_pages * self._page_bytes} bytes are published, more than a"
                f" guarantee of {guarantee_bytes}: remove a publication first"
            )
        kept = -(-self._pages // 8) if self._in_flight_max_pages is None else self._in_flight_max_pages
        guaranteed = sum(limits.guarantee_bytes // self._page_bytes for limits in limits_by_name.values())
        if guaranteed > max(self._pages - kept, 0):
            room = max(self._pages - kept, 0) * self._page_bytes
            kept_for = f", since {kept * self._page_bytes} are kept for blocks that are being read or written"
            return (
                f"the guarantees add up to {guaranteed * self._page_bytes} bytes; the {self._place} of"
                f" {self._pages * self._page_bytes} bytes has room for {room}{kept_for if kept else ''}"
            )
        return None

    # Tenants

    def tenant(self, name: str) -> Tenant[B]:
        """Return a tenant; one that holds nothing and has no settings is made for the occasion."""
        return self.tenant_by_name.get(name) or self._new(name, NO_LIMITS, is_configured=False)

    def keep(self, tenant: Tenant[B]) -> None:
        """Know a tenant from its first block on."""
        self.tenant_by_name.setdefault(tenant.name, tenant)

    def forget_if_empty(self, tenant: Tenant[B]) -> None:
        """Drop a tenant without settings that holds nothing."""
        if not tenant.is_configured and not tenant.used_pages:
            if self.tenant_by_name.get(tenant.name) is tenant:  # or one of that name has begun anew
                del self.tenant_by_name[tenant.name]
            self._by_surplus.withdraw(tenant)
            self._by_due.withdraw(tenant)

    def set_limits(self, name: str, limits: Limits | None) -> None:
        """Give a tenant other limits, or with None its settings back."""
        tenant = self.tenant(name)
        self.keep(tenant)
        tenant.is_configured = limits is not None or name == DEFAULT_TENANT
        tenant.set_limits(NO_LIMITS if limits is None else limits)
        self.note_growth(tenant)
        self._by_due.offer(tenant)
        self.forget_if_empty(tenant)
        self._divide_in_flight()

    def _new(self, name: str, limits: Limits, *, is_configured: bool) -> Tenant[B]:
        return Tenant(
            name,
            limits,
            self._census,
            page_bytes=self._page_bytes,
            serial=next(self._serials),
            is_configured=is_configured,
            is_pool=self._has_pool and name == PUBLIC_TENANT,
        )

    # Who pays

    def note_growth(self, tenant: Tenant[B]) -> None:
        """Know that a tenant's surplus has grown, or that it has something to give again."""
        if not tenant.has_grown:
            tenant.has_grown = True
            self._grown.append(tenant)

    def payer(self, asker: Tenant[B], pages: int) -> Tenant[B] | None:
        """Return whose block goes so that `asker` has `pages` more: its own, if it would then be the one to pay."""
        if len(self.tenant_by_name) == 1 and asker.name in self.tenant_by_name:  # by far the most common case
            return asker if asker.used_pages + pages > asker.guarantee_pages else None
        largest = self._largest_surplus()
        own = asker.pressure(pages)
        if own > 0 and (largest is None or own >= largest.pressure()):
            return asker
        return largest

    def why_never(self, tenant: Tenant[B], pages: int) -> Refusal | None:
        """Return why so many pages of a tenant can't be, however much goes for them, or None."""
        if exceeds(pages, tenant.user_limit_pages) or exceeds(pages, tenant.limit_pages):
            return Refusal.OVER_LIMIT
        return Refusal.NO_ROOM if pages > self._pages else None

    def choose_victims(
        self,
        tenant: Tenant[B],
        user_id: UserId,
        pages: int,
        stamp: Stamp,
        *,
        free_pages: int,
        take: Callable[[B], None],
    ) -> Refusal | None:
        """Let `take` have blocks, until `pages` more would fit without them; it sees that nobody is charged for them.

        Whoever is over a limit pays with its own oldest; when nothing is free, `payer` says who. A block with a
        smaller `stamp` than what its own tenant would pay with would be the next to go, and is refused instead.
        """
        user = tenant.user_by_id.get(user_id)
        while True:
            payer: Tenant[B] | None = tenant
            if user is not None and exceeds(user.used_pages + pages, tenant.user_limit_pages):
                victim = user.order.first()
            elif exceeds(tenant.used_pages + pages, tenant.limit_pages):
                victim = tenant.first_victim()
            elif free_pages < pages:
                payer = self.payer(tenant, pages)
                victim = payer.first_victim() if payer is not None else None
            else:
                return None
            if victim is None:
                return Refusal.ALL_PINNED
            victim_stamp = victim.stamp
            assert victim_stamp is not None, "the first of an order may not be evicted"
            if payer is tenant and victim_stamp > stamp:
                return Refusal.NEXT_VICTIM
            free_pages += victim.pages
            take(victim)

    def _largest_surplus(self) -> Tenant[B] | None:
        """Return the tenant with the largest surplus over its weight, of those with a block that may go."""
        for grown in self._grown:
            grown.has_grown = False
            self._by_surplus.offer(grown)
        self._grown.clear()
        while (tenant := self._by_surplus.first()) is not None:
            if tenant.first_victim() is not None:
                return tenant
            self._by_surplus.withdraw(tenant)  # `note_growth` brings it back
        return None

    # What falls due

    def note_due(self, tenant: Tenant[B]) -> None:
        """Know that something may fall due for a tenant, perhaps earlier than before."""
        self._by_due.offer(tenant)

    def offer(self, block: B) -> None:
        """Let a block stand in the orders of those that may go, if it may."""
        if block.stamp is None:
            return
        user, tenant = block.user, block.user.tenant
        user.order.offer(block)
        tenant.order.offer(user)
        self.note_growth(tenant)
        if tenant.is_watched:
            if exceeds(user.used_pages, tenant.user_limit_pages):
                tenant.users_to_check[user] = None
            self.note_due(tenant)

    def due_victim(self, tenant: Tenant[B]) -> tuple[B, bool] | None:
        """Return which block of a tenant that is due has to go, and whether it has expired or is above a lowered limit.

        None if the next user to check is not above its own after all.
        """
        victim = tenant.first_victim()
        if tenant.is_over_limit and victim is not None:
            return victim, False
        if tenant.users_to_check:
            user = next(iter(tenant.users_to_check))
            victim = user.order.first() if exceeds(user.used_pages, tenant.user_limit_pages) else None
            if victim is None:  # as long as all of it is pinned: `offer` says when it no longer is
                del tenant.users_to_check[user]
                return None
            return victim, False
        assert victim is not None, "something was due, and nothing is"
        return victim, True

    def first_due(self, now: float) -> Tenant[B] | None:
        """Return a tenant that has to give up a block by now though nobody needs its room."""
        due_at = self.due_at
        return self._by_due.first() if due_at is not None and due_at <= now else None

    @property
    def due_at(self) -> float | None:
        """Return when that is next so; -inf is now."""
        tenant = self._by_due.first()
        due = tenant.due if tenant is not None else None
        return due[0] if due is not None else None

    # What is pinned

    def count_held(self, user: User[B], *, pages: int, blocks: int) -> None:
        """Count pages that are pinned from now on, and whose they are, or fewer that are.

        What is published is pinned for good, and always part of a guarantee.
        """
        tenant = user.tenant
        if tenant.is_pool:
            return
        before = max(tenant.held_pages, tenant.held_share_pages)
        user.held_pages += pages
        tenant.held_pages += pages
        tenant.held_blocks += blocks
        self._spoken_for += max(tenant.held_pages, tenant.held_share_pages) - before

    def may_hold(self, tenant: Tenant[B]) -> int | None:
        """Return how many pages more the tenant may pin; None is no bound."""
        if self.held_pages_max is None or tenant.is_pool:
            return None
        own = max(tenant.held_share_pages - tenant.held_pages, 0)
        return own + max(self.held_pages_max - self._spoken_for, 0)

    def _divide_in_flight(self) -> None:
        tenants = self.tenant_by_name.values()
        guaranteed = sum(tenant.guarantee_pages for tenant in tenants)
        self.held_pages_max = self._in_flight_max_pages
        if guaranteed and self.held_pages_max is None:
            self.held_pages_max = self._pages - guaranteed
        for tenant in tenants:
            if tenant.is_pool:
                continue
            tenant.held_share_pages = (self.held_pages_max or 0) * tenant.guarantee_pages // max(self._pages, 1)
        self._spoken_for = sum(max(tenant.held_pages, tenant.held_share_pages) for tenant in tenants)
