"""Loads: blocks on their way from the disk into the arena, and the requests that wait for them.

To the RAM tier a load is a store by the server itself: its blocks are WRITING, under all the rules for room, until each
is READY or lost. They stay pinned until the last request that waits for them is answered, so that each finds all of
them. The first is answered as the last block comes, the others some at a time, in the order in which they could be.
"""

from collections import deque
from collections.abc import Collection

from saltern.core.blocks import Block
from saltern.core.leases import Session
from saltern.core.messages import Acquire

WAITING_MAX = 32
"""Requests of one tenant in one session that may wait at one time; a further one is answered by what is in RAM."""

WAITING_OF_ALL_MAX = 256
"""The same for all tenants of a session."""


class Load:
    """What one request has made come, each block the parent of the next."""

    __slots__ = ("blocks", "left", "pages", "waiting")

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self.left = len(blocks)
        self.pages = sum(block.pages for block in blocks)
        self.waiting: dict[Waiting, None] = {}  # requests that are not answered yet


class Waiting:
    """A request, and the loads that it waits for: `left` of them have not ended."""

    __slots__ = ("ask", "left", "loads", "session")

    def __init__(self, session: Session, ask: Acquire, loads: Collection[Load]) -> None:
        self.session = session
        self.ask = ask
        self.loads = loads
        self.left = len(loads)


class Loads:
    """All that are under way, and the requests that can be answered now."""

    def __init__(self) -> None:
        self.load_by_block: dict[Block, Load] = {}
        self.pages = 0  # of loads that have not ended, or that somebody still waits for
        self.answerable: deque[Waiting] = deque()  # at most `WAITING_OF_ALL_MAX` of each session

    def begin(self, blocks: list[Block]) -> Load:
        """Expect blocks."""
        load = Load(blocks)
        self.pages += load.pages
        self.load_by_block.update(dict.fromkeys(blocks, load))
        return load

    def may_wait(self, session: Session, tenant: str) -> bool:
        """Return whether one more request of a tenant may wait."""
        return session.waiting[tenant] < WAITING_MAX and session.waiting.total() < WAITING_OF_ALL_MAX

    def wait(self, session: Session, ask: Acquire, loads: Collection[Load]) -> None:
        """Have a request wait for all of these."""
        waiting = Waiting(session, ask, loads)
        session.waiting[ask.tenant] += 1
        for load in loads:
            load.waiting[waiting] = None

    def end(self, block: Block) -> Load | None:
        """Expect a block no longer; if it was the last of its load, whoever waited for that alone can be answered.

        Return a load that has ended if nobody waits for it.
        """
        load = self.load_by_block.pop(block)
        load.left -= 1
        if load.left:
            return None
        for waiting in load.waiting:
            waiting.left -= 1
            if not waiting.left:
                self.answerable.append(waiting)
        if load.waiting:
            return None
        self.pages -= load.pages
        return load

    def take(self) -> Waiting:
        """Take the request that could be answered first. Call `leave` once it is."""
        return self.answerable.popleft()

    def leave(self, waiting: Waiting) -> list[Load]:
        """Let a request wait no longer, and return the loads that nobody waits for any more."""
        of_session, tenant = waiting.session.waiting, waiting.ask.tenant
        of_session[tenant] -= 1
        if not of_session[tenant]:
            del of_session[tenant]
        for load in waiting.loads:
            del load.waiting[waiting]
        unawaited = [load for load in waiting.loads if not load.waiting]
        self.pages -= sum(load.pages for load in unawaited)
        return unawaited
