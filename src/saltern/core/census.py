"""A census: who has something in any tier, so that a user of several counts once."""

from saltern.core.keys import UserId


class Census:
    """How many users of each tenant hold pages, kept as they come and go: a scrape must not count them."""

    def __init__(self) -> None:
        self._tiers_by_user: dict[str, dict[UserId, int]] = {}

    def enter(self, tenant: str, user: UserId) -> None:
        """Know that a user has its first pages in a tier."""
        tiers_by_user = self._tiers_by_user.setdefault(tenant, {})
        tiers_by_user[user] = tiers_by_user.get(user, 0) + 1

    def leave(self, tenant: str, user: UserId) -> None:
        """Know that a user has none in a tier any more."""
        tiers_by_user = self._tiers_by_user[tenant]
        tiers_by_user[user] -= 1
        if not tiers_by_user[user]:
            del tiers_by_user[user]
        if not tiers_by_user:
            del self._tiers_by_user[tenant]

    def users(self, tenant: str) -> int:
        """Return how many users of a tenant have something."""
        return len(self._tiers_by_user.get(tenant, ()))
