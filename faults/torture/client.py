"""The client: an engine's ends without the engine: a scheduler's session, and of each rank a lifeline and an arena."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, TypeVar

from faults.torture.population import BLOCK_BYTES, ROOT, read_extent, write_extent
from saltern.client.lifeline import Lifeline, Mapping
from saltern.core.keys import Key, UserId
from saltern.core.messages import (
    NAME_BYTES,
    Abort,
    Acquire,
    Acquired,
    Commit,
    Discard,
    Loading,
    LookedUp,
    Lookup,
    Release,
    Reply,
    Request,
    Reserve,
    Reserved,
)
from saltern.vllm.session import Session

ANSWER_SECONDS_MAX = 60.0
HOLD_SECONDS_MAX = 1.0
BLOCK_SECONDS = 10.0
"""To compute a block, as is said: whatever is on the disk is worth waiting for."""

_Answer = TypeVar("_Answer", bound=Reply)


class ServerLostError(Exception):
    """The session has ended before the request had."""


class NoAnswerError(Exception):
    """The session lives, and the server doesn't answer."""


class Prompt(NamedTuple):
    """A user's blocks, as they are asked for."""

    tenant: str
    user: UserId
    keys: Sequence[Key]


class Client:
    """One engine of `ranks` workers, used from one thread. What it asks raises `ServerLostError` or `NoAnswerError`."""

    def __init__(self, socket: str, *, engine: str, ranks: int = 1) -> None:
        names = tuple(os.urandom(NAME_BYTES) for _ in range(ranks))
        self._lifelines = [
            Lifeline(socket, engine=engine, name=name, rank=rank, world_size=ranks) for rank, name in enumerate(names)
        ]
        for lifeline in self._lifelines:
            lifeline.start()
        self._session = Session(socket, engine=engine, workers=names, block_bytes=BLOCK_BYTES, clock=time.monotonic)
        self._session.root = ROOT
        self._uses: list[Mapping] = []
        self._asked = 0
        self.waits_for_disk = 0

    @property
    def naming_secret(self) -> bytes:
        """Return what users' names are derived from, once a server has said so."""
        return self._session.naming_secret

    def keep_up(self, seconds: float = 0.0) -> bool:
        """Connect where that is due, wait so long for the session to open, and tell whether it is."""
        self._session.connect_if_due()
        self._session.receive(0.0 if self._session.is_open else seconds)
        return self._session.is_open

    @contextmanager
    def request(self) -> Iterator[None]:
        """Use the arena for as long as one request takes."""
        with ExitStack() as stack:
            stack.callback(self._uses.clear)
            for lifeline in self._lifelines:
                use = lifeline.hold(self._session.incarnation, timeout=HOLD_SECONDS_MAX)
                if use is None:
                    raise ServerLostError
                stack.callback(use.release)
                self._uses.append(use)
            yield

    def close(self) -> None:
        """Leave the server."""
        self._session.close()
        for lifeline in self._lifelines:
            lifeline.close()

    # Inside of `request`

    def load(self, prompt: Prompt) -> list[bytes]:
        """Return the blocks that are there, from the first one on."""
        tenant, user, keys = prompt
        keys = tuple(keys)
        self._ask(Lookup(self._number(), user, keys, tenant=tenant, block_seconds=BLOCK_SECONDS), LookedUp)
        acquire = Acquire(self._number(), user, keys, start=0, tenant=tenant, block_seconds=BLOCK_SECONDS)
        acquired = self._ask(acquire, Acquired)
        use = self._uses[0]
        blocks = [read_extent(use.buffer, extent, use.page_bytes) for extent in acquired.extents]
        if acquired.lease:
            self._tell(Release(acquired.lease))
        return blocks

    def reserve(self, prompt: Prompt, began_at: float) -> Reserved:
        """Ask for room for what is missing of a prompt."""
        tenant, user, keys = prompt
        reserve = Reserve(
            self._number(), user, tuple(keys), start=0, acquired_at=began_at, tenant=tenant, began_at=began_at
        )
        return self._ask(reserve, Reserved)

    def store(self, reserved: Reserved, block_of: Callable[[int], bytes]) -> None:
        """Write what was granted, each rank its share of each block, and publish it."""
        for grant in reserved.grants:
            self.write(reserved, grant.index, block_of(grant.index))
        if reserved.lease:
            self._tell(Commit(reserved.lease))

    def write(self, reserved: Reserved, index: int, block: bytes) -> None:
        """Write one block of those that were granted."""
        extent = next(grant.extent for grant in reserved.grants if grant.index == index)
        for rank, use in enumerate(self._uses):
            start, end = (len(block) * shard // len(self._uses) for shard in (rank, rank + 1))
            write_extent(use.buffer, extent, use.page_bytes, block, start, end)

    def abort(self, reserved: Reserved) -> None:
        """Give up a store."""
        self._tell(Abort(reserved.lease))

    def discard(self, prompt: Prompt, index: int) -> None:
        """Say that a block is bad."""
        self._tell(Discard(prompt.user, prompt.keys[index], tenant=prompt.tenant))

    def _ask(self, message: Request, kind: type[_Answer]) -> _Answer:
        self._tell(message)
        deadline = time.monotonic() + ANSWER_SECONDS_MAX
        while self._session.is_open:
            for reply in self._session.receive(1.0):
                if isinstance(reply, kind):
                    return reply
                if isinstance(reply, Loading):
                    self.waits_for_disk += 1
            if time.monotonic() > deadline:
                raise NoAnswerError(f"no answer within {ANSWER_SECONDS_MAX:.0f} s to a {type(message).__name__}")
        raise ServerLostError

    def _tell(self, message: Request) -> None:
        if not self._session.send(message):
            raise ServerLostError

    def _number(self) -> int:
        self._asked += 1
        return self._asked
