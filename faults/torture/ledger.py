"""The ledger: what the processes of the torture know together, in memory that they share.

For every user it holds how often an erasure was *begun*, and below which generation everything is *dead*, because an
erasure of it was confirmed. What began before an erasure was begun and is found after it was confirmed, is resurrected.
What lies between may be either.
"""

from __future__ import annotations

import time
from ctypes import c_uint64
from enum import IntEnum
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from typing import NamedTuple

from faults.torture.population import USERS, User

CONTEXT = get_context("spawn")
IDLE_SECONDS_MAX = 60.0
FINDINGS_MAX = 20
"""As many of an engine's are kept: what is broken is usually broken more than once."""


class Count(IntEnum):
    """What an engine counts."""

    REQUESTS = 0
    CHECKED_BLOCKS = 1
    WAITS_FOR_DISK = 2  # requests that were told to wait for it
    STORED_BLOCKS = 3
    LATE_REFUSED = 4  # stores that began before their user was erased, and were refused for that
    CUT_SHORT = 5  # requests during which the server was lost
    WRONG_BYTES = 6
    RESURRECTED = 7
    OTHER_FAILURES = 8


class Begun(NamedTuple):
    """When a request began, by the machine's monotonic clock, and of which generation its user was then."""

    generation: int
    at: float


class Finding(NamedTuple):
    """Something that may not be. `engine` is -1 for what was not seen by one."""

    engine: int
    what: str


class Ledger:
    """Shared by spawned processes. Only the torture's own process writes what is said of users."""

    def __init__(self, engines: int) -> None:
        self._begun = CONTEXT.RawArray(c_uint64, len(USERS))
        self._dead_below = CONTEXT.RawArray(c_uint64, len(USERS))
        self._pauses = CONTEXT.RawValue(c_uint64, 1)  # odd: nobody may ask anything
        self._idle = CONTEXT.RawArray(c_uint64, engines)
        self._over = CONTEXT.RawValue(c_uint64, 0)
        self._counts = CONTEXT.RawArray(c_uint64, engines * len(Count))
        self.findings: SimpleQueue[Finding] = CONTEXT.SimpleQueue()

    # Of users

    def begin_erasing(self, user: User) -> int:
        """Note that an erasure is asked for, and return the generation that begins with it."""
        self._begun[user.number] += 1
        return self._begun[user.number]

    def confirm_erased(self, user: User, generation: int) -> None:
        """Note that nothing older than this generation may be found from now on."""
        self._dead_below[user.number] = generation

    def dead_below(self, user: User) -> int:
        """Return below which generation nothing of a user may be found."""
        return self._dead_below[user.number]

    def begin(self, user: User) -> Begun:
        """Return the present moment, and the generation of an unsigned user in it."""
        while True:
            before, now, after = self._begun[user.number], time.monotonic(), self._begun[user.number]
            if before == after:
                return Begun(before, now)

    # Of engines

    def count(self, engine: int, what: Count, by: int = 1) -> None:
        """Add to what an engine counts; each engine its own."""
        self._counts[engine * len(Count) + what] += by

    def counted(self, what: Count) -> int:
        """Return what all engines have counted."""
        return sum(self._counts[what :: len(Count)])

    @property
    def is_paused(self) -> bool:
        """Whether nobody may begin a request."""
        return self._pauses.value % 2 == 1

    @property
    def is_over(self) -> bool:
        """Whether the engines shall end."""
        return bool(self._over.value)

    def note_idle(self, engine: int) -> None:
        """Note that an engine has seen the pause and holds no lease."""
        self._idle[engine] = self._pauses.value

    def resume(self) -> None:
        """Let the engines ask."""
        assert self.is_paused, "the engines are at work already"
        self._pauses.value += 1

    def pause(self) -> None:
        """Have the engines finish what they are at, and wait until they have."""
        assert not self.is_paused, "the engines are idle already"
        self._pauses.value += 1
        deadline = time.monotonic() + IDLE_SECONDS_MAX
        while any(idle != self._pauses.value for idle in self._idle):
            if time.monotonic() > deadline:
                raise TimeoutError("an engine doesn't come to an end with its request")
            time.sleep(0.002)

    def end(self) -> None:
        """Have the engines end."""
        self._over.value = 1
