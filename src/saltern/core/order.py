"""The order in which things are evicted: a heap that is corrected only where it is looked at.

Items carry a `stamp`: who goes first, smallest first, or None while the item may not go at all. Touching
an item only ever raises its stamp, and happens far more often than eviction, so a touch costs nothing
here: the heap keeps the stamp it last saw, which is at most the true one, and `first()` corrects the top
until it is exact. Whoever lets an item go earlier than it was (unpinned, childless again) says so with
`offer()`. Finding the victim is thus O(log n) amortised, never a scan.
"""

from collections.abc import Callable
from heapq import heapify, heappop, heappush, heapreplace
from operator import attrgetter
from typing import Generic, TypeVar

Stamp = tuple[float, int, int]
"""(time of the request's Acquire, −depth, serial): oldest first, then the deepest of a prefix."""


T = TypeVar("T")


class EvictionOrder(Generic[T]):
    """Items by stamp, each known by a stamp that is never above its true one.

    `stamp` is the attribute that says when an item may go, or None while it may not.
    """

    def __init__(self, stamp: str = "stamp") -> None:
        self._stamp_of: Callable[[T], Stamp | None] = attrgetter(stamp)
        self._heap: list[tuple[Stamp, int, T]] = []
        self._stamp_by_id: dict[int, Stamp] = {}
        self._pushes = 0  # breaks ties between equal stamps so that items are never compared

    def offer(self, item: T) -> None:
        """Say that `item` may now go, perhaps earlier than when it was last seen."""
        stamp = self._stamp_of(item)
        if stamp is None:
            return
        known = self._stamp_by_id.get(id(item))
        if known is None or stamp < known:
            self._push(stamp, item)

    def withdraw(self, item: T) -> None:
        """Forget `item`; it is about to cease to exist."""
        self._stamp_by_id.pop(id(item), None)
        if len(self._heap) > 2 * len(self._stamp_by_id) + 64:
            self._trim()

    def first(self) -> T | None:
        """Return the item that goes next, or None if none may."""
        while self._heap:
            stamp, _, item = self._heap[0]
            if self._stamp_by_id.get(id(item)) != stamp:
                heappop(self._heap)  # superseded by an earlier stamp, or withdrawn
                continue
            now = self._stamp_of(item)
            if now == stamp:
                return item
            if now is None:
                heappop(self._heap)
                del self._stamp_by_id[id(item)]
            else:
                self._pushes += 1
                self._stamp_by_id[id(item)] = now
                heapreplace(self._heap, (now, self._pushes, item))
        return None

    def _push(self, stamp: Stamp, item: T) -> None:
        self._pushes += 1
        self._stamp_by_id[id(item)] = stamp
        heappush(self._heap, (stamp, self._pushes, item))
        if len(self._heap) > 2 * len(self._stamp_by_id) + 64:
            self._trim()

    def _trim(self) -> None:
        """Let superseded entries go, now that they are the most."""
        self._heap = [entry for entry in self._heap if self._stamp_by_id.get(id(entry[2])) == entry[0]]
        heapify(self._heap)
