"""Loads: blocks on their way from the disk into the arena, and the requests that wait for them.

To the RAM tier a load is a store by the server itself: its blocks are WRITING, under all the rules for room, until each
is READY or lost. They stay pinned until the last of them has come, so that who waits finds all of them.
"""

from collections.abc import Collection

from saltern.core.blocks import Block
from saltern.core.leases import Session
from saltern.core.messages import Acquire

WAITING_MAX = 32
"""Requests of one session that may wait at one time; a further one is answered by what is in RAM.

All that wait for one load are answered at once, each in half a microsecond a block.
"""


class Load:
    """What one request has made come, each block the parent of the next."""

    __slots__ = ("blocks", "left", "waiting")

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self.left = len(blocks)
        self.waiting: list[Waiting] = []


class Waiting:
    """A request, and for how many loads it waits."""

    __slots__ = ("ask", "left", "session")

    def __init__(self, session: Session, ask: Acquire, left: int) -> None:
        self.session = session
        self.ask = ask
        self.left = left


class Loads:
    """All that are under way."""

    def __init__(self) -> None:
        self.load_by_block: dict[Block, Load] = {}

    def begin(self, blocks: list[Block]) -> Load:
        """Expect blocks."""
        load = Load(blocks)
        self.load_by_block.update(dict.fromkeys(blocks, load))
        return load

    def wait(self, session: Session, ask: Acquire, loads: Collection[Load]) -> None:
        """Have a request wait for all of these."""
        waiting = Waiting(session, ask, len(loads))
        session.waiting += 1
        for load in loads:
            load.waiting.append(waiting)

    def end(self, block: Block) -> Load | None:
        """Expect a block no longer, and return its load if it was the last of it."""
        load = self.load_by_block.pop(block)
        load.left -= 1
        return None if load.left else load

    def answerable(self, load: Load) -> list[Waiting]:
        """Return the requests that waited for this load last."""
        answerable: list[Waiting] = []
        for waiting in load.waiting:
            waiting.left -= 1
            if not waiting.left:
                waiting.session.waiting -= 1
                answerable.append(waiting)
        return answerable
