"""The private cache: what a tenant would hold if its guarantee were a cache of its own, run in the same order.

The isolation guarantee (`docs/quotas.md`) compares with it: whatever all others do, a tenant hits at least as
often, request by request, as in a private cache of its guarantee less what it has in flight. It is told each
request as it comes (`acquire`) and each prompt whose store is done (`store`), and keeps the blocks used last:
oldest first, then the deepest, as the core does.

It keeps a *mark*, the most recent rank (time of use, −depth) that it has evicted or refused, and holds nothing
at or below it. Where all blocks are of one size and are stored in the order of their requests, that is what any
cache in this order does. Otherwise it holds a little less: room that a large block left is not filled with a block
older than that one, and of blocks of one rank all go or none.
"""

from collections.abc import Sequence

from saltern.core.keys import Key, UserId
from saltern.core.order import EvictionOrder, Stamp

Rank = tuple[float, int]
"""(time of the last use, −depth)."""

Piece = tuple[Key, int]
"""A block or a state by its key, and how many pages it takes."""


class _Node:
    """A block of the private cache, or a state."""

    __slots__ = ("children", "depth", "key", "pages", "parent", "serial", "touched_at", "user")

    def __init__(
        self, user: UserId, key: Key, *, parent: "_Node | None", pages: int, touched_at: float, serial: int
    ) -> None:
        self.user = user
        self.key = key
        self.parent = parent
        self.depth: int = parent.depth + 1 if parent else 0
        self.pages = pages
        self.touched_at = touched_at
        self.serial = serial
        self.children = 0

    @property
    def rank(self) -> Rank:
        return (self.touched_at, -self.depth)

    @property
    def stamp(self) -> Stamp | None:
        return None if self.children else (self.touched_at, -self.depth, self.serial)


class PrivateCache:
    """A cache of `pages` pages for one tenant. Times are those of the real cache, which must not go back."""

    def __init__(self, pages: int, *, ttl_seconds: float | None = None) -> None:
        self.pages = pages
        self.used_pages = 0
        self._ttl_seconds = ttl_seconds
        self._node_by_name: dict[tuple[UserId, Key], _Node] = {}
        self._order: EvictionOrder[_Node] = EvictionOrder()
        self._mark: Rank = (float("-inf"), 0)
        self._serial = 0

    def acquire(self, user: UserId, keys: Sequence[Key], now: float, *, states: Sequence[Key] = ()) -> int:
        """Use the longest prefix that is here (with `states`: that ends in one) and return its length."""
        prefix: list[_Node] = []
        for key in keys:
            node = self._find(user, key, now)
            if node is None or node.parent is not (prefix[-1] if prefix else None):
                break
            prefix.append(node)
        if states:
            prefix = self._up_to_a_state(user, prefix, states, now)
        for node in prefix:
            node.touched_at = now
        return len(prefix) - bool(prefix and states)

    def store(self, user: UserId, pieces: Sequence[Piece], at: float, now: float) -> None:
        """Keep as much of a prompt as the order allows; it was asked for `at` that time, and its store is done."""
        parent: _Node | None = None
        for key, pages in pieces:
            node = self._find(user, key, now)
            if node is None:
                self.discard(user, key)  # if it is there, it has expired
                node = self._admit(user, key, parent=parent, pages=pages, at=at)
            if node is None or node.parent is not parent:
                return
            node.touched_at = max(node.touched_at, at)
            parent = node

    def discard(self, user: UserId, key: Key) -> None:
        """Forget a block and what continues it."""
        root = self._node_by_name.get((user, key))
        if root is not None:
            for node in reversed([root, *self._descendants(root)] if root.children else [root]):
                self._remove(node)

    def erase(self, user: UserId | None) -> None:
        """Forget all of a user, or with None of everybody."""
        nodes = sorted(self._node_by_name.values(), key=lambda node: -node.depth)
        for node in nodes:
            if user in (None, node.user):
                self._remove(node)

    def _find(self, user: UserId, key: Key, now: float) -> _Node | None:
        node = self._node_by_name.get((user, key))
        if node is None or (self._ttl_seconds is not None and node.touched_at + self._ttl_seconds <= now):
            return None
        return node

    def _up_to_a_state(self, user: UserId, prefix: list[_Node], states: Sequence[Key], now: float) -> list[_Node]:
        """Return the longest part of a prefix that ends in a state, with that state."""
        for ready in range(len(prefix), 0, -1):
            state = self._find(user, states[ready - 1], now)
            if state is not None and state.parent is prefix[ready - 1]:
                return [*prefix[:ready], state]
        return []

    def _admit(self, user: UserId, key: Key, *, parent: _Node | None, pages: int, at: float) -> _Node | None:
        """Make room for one block and keep it, unless older ones don't make enough."""
        rank = (at, -(parent.depth + 1) if parent else 0)
        while rank > self._mark and self.used_pages + pages > self.pages:
            first = self._order.first()
            # Once the block itself would go first, it is as though it had come and gone.
            self._evict_up_to(rank if first is None else min(rank, first.rank))
        if rank <= self._mark:
            return None
        self._serial += 1
        node = _Node(user, key, parent=parent, pages=pages, touched_at=at, serial=self._serial)
        self._node_by_name[user, key] = node
        self.used_pages += pages
        if parent is not None:
            parent.children += 1
        self._order.offer(node)
        return node

    def _evict_up_to(self, rank: Rank) -> None:
        self._mark = rank
        while (first := self._order.first()) is not None and first.rank <= rank:
            self._remove(first)

    def _remove(self, node: _Node) -> None:
        del self._node_by_name[node.user, node.key]
        self._order.withdraw(node)
        self.used_pages -= node.pages
        if node.parent is not None:
            node.parent.children -= 1
            self._order.offer(node.parent)

    def _descendants(self, root: _Node) -> list[_Node]:
        """Return all that continues a block, by a look at everything: discards are rare."""
        below = {root}
        nodes = sorted(self._node_by_name.values(), key=lambda node: node.depth)
        for node in nodes:
            if node.parent in below:
                below.add(node)
        return [node for node in nodes if node in below and node is not root]
