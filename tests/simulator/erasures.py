"""Erasures: who was erased and when, as one server was told, so that what was begun before is known by its age."""

from collections.abc import Mapping
from math import inf

from saltern.core.keys import UserId


class Erasures:
    """Times are the world's; the server's clock is `clock_offset` ahead of it, and decides."""

    def __init__(self, tenant_by_user: Mapping[UserId, str], clock_offset: float) -> None:
        self._tenant_by_user = tenant_by_user
        self._clock_offset = clock_offset
        self._erased_at_by_user: dict[UserId, float] = {}  # by the server's clock
        self._refused_by_user: dict[UserId, float] = {}  # whose requests that began up to then

    def __bool__(self) -> bool:
        return bool(self._erased_at_by_user)

    def add(self, tenant: str, user: UserId | None, *, at: float, told_at: float, for_good: bool) -> None:
        """Know that a user was erased, or with None all users of a tenant, and when a server was told: by its clock.

        A server that is told as it starts refuses what began before.
        """
        for known in self.users(tenant) if user is None else {user}:
            for times, time in ((self._erased_at_by_user, at), (self._refused_by_user, told_at)):
                times[known] = inf if for_good else max(times.get(known, -inf), time)

    def users(self, tenant: str) -> set[UserId]:
        """Return who belongs to a tenant."""
        return {user for user, owner in self._tenant_by_user.items() if owner == tenant}

    def refuses(self, user: UserId, began_at: float) -> bool:
        """Return whether nothing may be stored of a request that began at that time of the server's."""
        return user in self._refused_by_user and not began_at > self._refused_by_user[user]

    def reaches(self, user: UserId, began_at: float) -> bool:
        """Return whether what was stored by a request is erased, which began at that time of the world's."""
        return began_at + self._clock_offset <= self._erased_at_by_user.get(user, -inf)
