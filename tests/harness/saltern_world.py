"""Saltern's world in one process: its real server core, lifelines and copies, on a clock of the engine's steps.

`SalternConnector` runs as it is, in both roles. Replaced is what would make two runs differ: the socket by calls, the
threads of lifelines and copiers by objects that move once a step, and the clock by one that passes 10 ms a step. How
late each of them is, what fails and who dies follows from a `Weather` and a seed. Copies move half of their bytes
when they begin and half when they end, and freed pages are overwritten, so whoever lets go of either too early is
seen in what some request reads.
"""

import functools
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from saltern.core.blocks import Block, BlockState
from saltern.core.cache import Cache
from saltern.core.effects import Disconnected, Gone, Received
from saltern.core.extents import Extent, PagePool, extent_pages
from saltern.core.keys import (
    Content,
    Key,
    UserId,
    block_key,
    next_content,
    unsigned_user_key,
    user_id,
)
from saltern.core.leases import ConnectionId
from saltern.core.messages import (
    Acquire,
    Attached,
    Lookup,
    Reply,
    Request,
    Reserve,
    SessionEnded,
    Welcome,
    WorkerHello,
)
from saltern.core.tenants import NO_LIMITS, Limits
from saltern.vllm import connector as connector_module
from saltern.vllm.copier import CpuCopier, Finished, Shard, check_bounds
from saltern.vllm.copies import Copy, Piece
from saltern.vllm.layout import Layout
from saltern.vllm.planner import Planner
from saltern.vllm.session import Session
from tests.vllm.server import Clock, Line, Server

from .engine import Engine
from .findings import Finding, NotDrained
from .model import Sequence

# A world in which servers die all the time would say so all the time.
logging.getLogger("saltern").setLevel(logging.CRITICAL)

Bytes = NDArray[np.uint8]

STEP_SECONDS = 0.01
ATTACH_STEPS_MAX = 10  # as long as `CpuCopier` waits for its session
OLD = 0xA5  # what the arena holds where nobody has written, or all is freed
SPOILED = 0xEE  # what a failed load leaves


class Crossed(Finding):
    """A block was named, asked for or kept under another user than the one whose request it stems from."""


class Naming(msgspec.Struct, frozen=True):
    """A message that named blocks of a user. `root` and `secret` are those that keys were made with at the time."""

    user: UserId
    keys: tuple[Key, ...]
    root: Content
    secret: bytes


class Place(msgspec.Struct, frozen=True):
    """Where a block belongs: its user, and how many blocks come before it."""

    user: UserId
    depth: int


class Weather(msgspec.Struct, frozen=True, kw_only=True):
    """How late everything is and what goes wrong. Delays are in steps and drawn up to the number given.

    `faulty_rank` is the one rank whose copies fail; None is any. `events` name a method of `World` and the step
    before which it is called.
    """

    reply_steps_max: int = 0
    copy_steps_max: int = 0
    lifeline_steps_max: int = 0
    load_fault_share: float = 0.0
    store_fault_share: float = 0.0
    faulty_rank: int | None = None
    events: tuple[tuple[int, str], ...] = ()


FAIR = Weather(reply_steps_max=2, copy_steps_max=2)
"""Weather in which nothing fails and nothing is too late."""


class World:
    """All that is around the connector of one engine at a time. It outlives the engines."""

    def __init__(
        self,
        weather: Weather = FAIR,
        *,
        seed: int = 0,
        pages: int = 4096,
        page_bytes: int = 4096,
        limits: Limits = NO_LIMITS,
    ) -> None:
        self.weather = weather
        self.random = Random(seed)
        self.clock = Clock()
        self.step = 0
        self.lifelines: list[SteppedLifeline] = []
        self.copiers: list[SteppedCopier] = []
        self.namings: list[Naming] = []
        self.block_tokens = 0
        self.planner: Planner | None = None
        self._known: dict[Key, Place] = {}  # all that requests of this engine and of those before have
        self.server = HarnessServer(self, self.clock, pages=pages, page_bytes=page_bytes, ranks=0, limits=limits)
        self._events = sorted(weather.events)

    @contextmanager
    def around(self) -> Iterator[None]:
        """Be what the connector finds when it looks for a server, a thread or the time."""
        with mock.patch.multiple(
            connector_module,
            Session=functools.partial(Session, connect=self.server.connect),
            Lifeline=functools.partial(SteppedLifeline, self),
            make_copier=functools.partial(_make_copier, self),
            Planner=self._make_planner,
            time=SimpleNamespace(monotonic=self.clock),
        ):
            yield

    def _make_planner(self, **parts: Any) -> Planner:
        self.block_tokens = parts["geometry"].block_tokens
        self.planner = Planner(**parts)
        return self.planner

    def tick(self) -> None:
        """Let a step's time pass."""
        self.step += 1
        self.clock.advance(STEP_SECONDS)
        self.server.reply_seconds = self.delay(self.weather.reply_steps_max) * STEP_SECONDS
        while self._events and self._events[0][0] <= self.step:
            getattr(self, self._events.pop(0)[1])()
        for lifeline in self.lifelines:
            lifeline.tick()

    def delay(self, steps_max: int) -> int:
        """Draw a delay."""
        return self.random.randint(0, steps_max)

    # Events

    def kill_server(self) -> None:
        """The server dies with all that it held, and none comes in its place."""
        self.server.kill()
        for lifeline in self.lifelines:
            lifeline.lose_connection()

    def start_server(self) -> None:
        """Another server starts, if none runs."""
        if not self.server.is_listening:
            self.server.restart()

    def restart_server(self) -> None:
        """The server dies, and another one with nothing takes its place before anybody looks."""
        self.kill_server()
        self.start_server()

    def freeze_server(self) -> None:
        """The server is there and answers nothing."""
        self.server.is_frozen = True

    def thaw_server(self) -> None:
        """The server goes on with all that has come in."""
        self.server.thaw()

    def lose_control(self) -> None:
        """The scheduler's connection breaks."""
        self.server.lose_control()

    def lose_lifeline(self) -> None:
        """One worker's connection breaks."""
        if self.lifelines and not self.server.is_frozen:
            self.random.choice(self.lifelines).break_connection()

    def heal(self) -> None:
        """From now on all goes well."""
        self.weather = Weather()
        self._events = []
        self.start_server()
        self.thaw_server()

    # The end

    def leftovers(self, engine: Engine) -> list[str]:
        """Return what the connector, in both roles, and its server still hold of an engine that has drained."""
        planner = engine.connector._planner
        left = [f"{count} {what}" for what, count in planner.leftovers.items() if count]
        left += [f"rank {copier.rank} has copies under way" for copier in self.copiers if copier.is_busy]
        left += [f"rank {lifeline.rank} uses the arena" for lifeline in self.lifelines if lifeline.is_used]
        self.check_users(engine)
        return left + list(self.server.faults(sessions=None))

    def check_users(self, engine: Engine) -> None:
        """Raise unless all that was asked and kept so far was so under the user of the request that it stems from.

        What that user and those keys are is derived here once more, from what the client sent.
        """
        places: dict[tuple[Content, bytes], dict[Key, Place]] = {}
        for naming in self.namings:
            basis = (naming.root, naming.secret)
            if basis not in places:
                places[basis] = self._places(*basis, engine.sequences.values())
                self._known |= places[basis]
            for key in naming.keys:
                place = places[basis].get(key)
                if place is None or place.user != naming.user:
                    raise Crossed(
                        f"user {naming.user.hex()} named a block of {place.user.hex() if place else 'nobody'}"
                    )
        self.namings = []
        for user in self.server.cache.tenant.user_by_id.values():
            for key, block in user.block_by_key.items():
                if self._known.get(key) != Place(user.id, block.depth):
                    raise Crossed(f"the server keeps {block} for user {user.id.hex()}, not as {self._known.get(key)}")

    def _places(self, root: Content, secret: bytes, sequences: Iterable[Sequence]) -> dict[Key, "Place"]:
        place_by_key: dict[Key, Place] = {}
        size = self.block_tokens
        for sequence in sequences:
            tokens = np.array(sequence.known)
            if (tokens != tokens.astype(np.int32)).any():
                continue  # ids that are none have no keys
            content, tokens = root, tokens.astype(np.int32)
            user_key = unsigned_user_key(secret, sequence.tag)
            for depth, start in enumerate(range(0, len(tokens) - size + 1, size)):
                content = next_content(content, tokens[start : start + size].tobytes(), b"")
                place_by_key[block_key(user_key, content)] = Place(user_id(user_key), depth)
        return place_by_key

    def check_deserted(self) -> None:
        """Raise unless an engine that is gone has left nothing at the server."""
        if faults := list(self.server.faults(sessions=0)):
            raise NotDrained("; ".join(faults))


class HarnessServer(Server):
    """The server, with an arena that has bytes and lifelines that a worker opens itself."""

    arena: Bytes

    def __init__(self, world: World, clock: Clock, **shape: Any) -> None:
        self._world = world
        super().__init__(clock, **shape)

    def connect(self, path: str) -> Any:
        """Take a scheduler's connection."""
        super().connect(path)
        line = self._lines[self._connections] = NotedLine(self, self._connections, self._world)
        return line

    def connect_lifeline(self, lifeline: "SteppedLifeline", hello: WorkerHello) -> ConnectionId:
        """Take a worker's connection."""
        self._connections += 1
        self._lifelines.add(self._connections)
        self._lifeline_by_connection[self._connections] = lifeline
        self._handle(Received(self._connections, hello))
        return self._connections

    def disconnect_lifeline(self, connection: ConnectionId) -> None:
        """Close a worker's connection."""
        if connection in self._lifelines:
            self._lifelines.discard(connection)
            self._handle(Disconnected(connection))
            self._handle(Gone(connection))

    def lose_control(self) -> None:
        """Break every scheduler's connection."""
        for line in list(self._lines.values()):
            line.coming.clear()
            self.disconnect(line)

    def attach_workers(self) -> None:
        """Wait for them to come."""
        self._lifeline_by_connection: dict[ConnectionId, SteppedLifeline] = {}

    def _empty(self) -> Cache:
        cache = super()._empty()
        self.arena = np.full(cache.pool.pages * cache.page_bytes, OLD, dtype=np.uint8)
        cache.pool.free = functools.partial(_free_and_overwrite, cache.pool, self.arena)  # type: ignore[method-assign]
        return cache

    def _tell_worker(self, connection: ConnectionId, message: Reply) -> None:
        self._lifeline_by_connection[connection].hear(message)

    # The end

    def faults(self, *, sessions: int | None) -> Iterator[str]:
        """Yield what is wrong with a cache that nobody uses, `sessions` of whose engines are there (None is any)."""
        cache = self.cache
        if sessions is not None and len(cache.sessions) != sessions:
            yield f"the server has {len(cache.sessions)} sessions, not {sessions}"
        leases = sum(len(session.lease_by_id) for session in cache.sessions)
        if leases:
            yield f"the server has given {leases} leases"
        blocks = [block for user in cache.tenant.user_by_id.values() for block in user.block_by_key.values()]
        yield from (f"{block} is left" for block in blocks if block.pins or block.state is not BlockState.READY)
        yield from (f"{block} hangs on nothing" for block in blocks if not _is_reachable(block))
        pages = sum(extent_pages(block.extent) for block in blocks)
        if not pages == cache.pool.pages - cache.pool.free_pages == cache.tenant.used_pages:
            yield f"{cache.pool.pages - cache.pool.free_pages} pages are taken by blocks of {pages}"


class NotedLine(Line):
    """A line on which it is noted who names which blocks, with the keys' basis at that moment."""

    def __init__(self, server: HarnessServer, connection: ConnectionId, world: World) -> None:
        super().__init__(server, connection)
        self._world = world

    def send(self, message: Request) -> None:
        """Take note, and send."""
        match message:
            case Lookup(_, user, keys) | Acquire(_, user, keys) | Reserve(_, user, keys):
                assert self._world.planner is not None, "blocks were named before there was a planner"
                self._world.namings.append(Naming(user, keys, self._world.planner._root, self._server.secret))
            case _:
                pass
        super().send(message)


def _free_and_overwrite(pool: PagePool, arena: Bytes, extent: Extent) -> None:
    PagePool.free(pool, extent)
    page_bytes = len(arena) // pool.pages
    for run in extent:
        arena[run.start * page_bytes : (run.start + run.count) * page_bytes] = OLD


def _is_reachable(block: Block) -> bool:
    parent = block.parent
    return parent is None or parent.user.block_by_key.get(parent.key) is parent


class SteppedMapping:
    """One use of the arena, as `saltern.client.lifeline.Mapping`."""

    def __init__(self, lifeline: "SteppedLifeline", arena: Bytes, page_bytes: int) -> None:
        self.buffer = arena
        self.page_bytes = page_bytes
        self._lifeline = lifeline
        lifeline.uses += 1

    def release(self) -> None:
        """End the use."""
        self._lifeline.uses -= 1


class SteppedLifeline:
    """A lifeline that moves once a step, and otherwise lives like `saltern.client.lifeline.Lifeline`.

    What else that one is told is about its socket.
    """

    def __init__(
        self,
        world: World,
        path: str,
        *,
        engine: str,
        name: bytes,
        rank: int,
        world_size: int,
        outlives_socket: bool,
        **of_the_socket: object,
    ) -> None:
        self.rank = rank
        self.uses = 0
        self._world = world
        self._hello = WorkerHello(engine, name, rank, world_size, outlives_socket)
        self._connection: ConnectionId | None = None
        self._retry_at = 0
        self._heard: list[tuple[int, Reply]] = []
        self._incarnation: bytes | None = None
        self._arena: Bytes | None = None
        self._is_ending = False  # uses drain, then the connection is closed
        self._is_closed = False

    @property
    def is_used(self) -> bool:
        """Return whether somebody uses the arena."""
        return bool(self.uses)

    def start(self) -> None:
        """Begin to connect."""
        self._world.lifelines.append(self)
        self._retry_at = self._world.step + self._world.delay(self._world.weather.lifeline_steps_max)
        self.tick()

    def tick(self) -> None:
        """Hear what has come, and connect or close where that is due."""
        server = self._world.server
        while self._heard and self._heard[0][0] <= self._world.step:
            self._take(self._heard.pop(0)[1])
        if server.is_frozen:
            return
        if self._is_ending and not self.uses:
            self._disconnect()
        is_due = not self._is_closed and self._world.step >= self._retry_at
        if self._arena is None and is_due and server.is_listening:
            self._arena = server.arena
            self._connection = server.connect_lifeline(self, self._hello)

    def hear(self, message: Reply) -> None:
        """Take a message of the server's, at once or some steps later; none overtakes another."""
        due = self._world.step + self._world.delay(self._world.weather.lifeline_steps_max)
        self._heard.append((max(due, self._heard[-1][0]) if self._heard else due, message))
        if due <= self._world.step and len(self._heard) == 1:
            self._take(self._heard.pop(0)[1])

    def hold(self, incarnation: bytes, timeout: float = 0.0) -> SteppedMapping | None:
        """Return a use of the arena that a session has leases in, None if this worker isn't part of it now."""
        if self._incarnation != incarnation:
            return None
        assert self._arena is not None, "attached without an arena"
        return SteppedMapping(self, self._arena, self._world.server.cache.page_bytes)

    def lose_connection(self) -> None:
        """Notice that the server is dead."""
        self._connection = None
        self._heard.clear()
        self._end()

    def break_connection(self) -> None:
        """Lose the connection to a server that lives: it counts on no more than what the kernel tells it."""
        if self._connection is not None and not self.uses:
            self._disconnect()

    def close(self) -> None:
        """End the connection."""
        assert not self.uses, "a worker closes while it copies"
        self._is_closed = True
        self._disconnect()
        self._world.lifelines.remove(self)

    def _take(self, message: Reply) -> None:
        match message:
            case Attached(incarnation):
                self._incarnation = incarnation
            case SessionEnded():
                self._end()
            case Welcome():
                pass
            case _:
                raise AssertionError(f"a lifeline was sent {message}")

    def _end(self) -> None:
        self._incarnation = None
        self._is_ending = True

    def _disconnect(self) -> None:
        self._incarnation = self._arena = None
        self._is_ending = False
        self._heard.clear()
        self._retry_at = self._world.step + self._world.delay(self._world.weather.lifeline_steps_max)
        connection, self._connection = self._connection, None
        if connection is not None:
            self._world.server.disconnect_lifeline(connection)


class Pending(msgspec.Struct, eq=False):
    """A copy that has not ended: it begins before step `begins_at` and ends with step `ends_at`."""

    copy: Copy
    shard: Shard
    is_store: bool
    begins_at: int
    ends_at: int
    mapping: SteppedMapping | None = None


class SteppedCopier(CpuCopier):
    """A copier that moves what `CpuCopier` moves, when the world says so instead of on threads."""

    def __init__(self, world: World, kv: Bytes, layout: Layout, lifeline: SteppedLifeline) -> None:
        super().__init__(kv, layout, lifeline)  # type: ignore[arg-type]
        self.rank = lifeline.rank
        self._world = world
        self._line = lifeline
        self._pending: list[Pending] = []
        world.copiers.append(self)

    @property
    def is_busy(self) -> bool:
        """Return whether a copy has not ended or not been asked about."""
        return bool(self._pending)

    def submit(self, copy: Copy, shard: Shard, *, is_store: bool) -> None:
        """Begin a copy, or put it off."""
        begins_at = self._world.step + self._world.delay(self._world.weather.copy_steps_max)
        ends_at = begins_at + self._world.delay(self._world.weather.copy_steps_max)
        self._pending.append(Pending(copy, shard, is_store, begins_at, ends_at))
        self._begin_due()

    def finished(self) -> list[Finished]:
        """Move what is due and return the copies that ended, in any order."""
        self._begin_due()
        ended = [pending for pending in self._pending if self._is_over(pending)]
        self._pending = [pending for pending in self._pending if pending not in ended]
        self._world.random.shuffle(ended)
        return [Finished(pending.copy, pending.is_store, is_failed=self._end(pending)) for pending in ended]

    def close(self) -> None:
        """End all copies where they stand."""
        for pending in self._pending:
            if pending.mapping is not None:
                pending.mapping.release()
        self._pending = []
        self._world.copiers.remove(self)

    def _begin_due(self) -> None:
        for pending in self._pending:
            if pending.mapping is None and pending.begins_at <= self._world.step:
                pending.mapping = self._line.hold(pending.copy.incarnation)
                if pending.mapping is not None:
                    self._move_part(pending, pending.mapping, slice(None, None, 2))

    def _is_over(self, pending: Pending) -> bool:
        if pending.mapping is None:
            return self._world.step >= pending.begins_at + ATTACH_STEPS_MAX
        return self._world.step >= pending.ends_at

    def _end(self, pending: Pending) -> bool:
        """Move the other half and return whether that failed, or nothing could be moved at all."""
        mapping, weather = pending.mapping, self._world.weather
        if mapping is None:
            return True
        share = weather.store_fault_share if pending.is_store else weather.load_fault_share
        is_failed = weather.faulty_rank in (None, self.rank) and self._world.random.random() < share
        if not is_failed:
            self._move_part(pending, mapping, slice(1, None, 2))
        elif not pending.is_store:
            for piece in pending.copy.pieces:
                for pages in self._pages:
                    pages[list(piece.engine_blocks)] = SPOILED
        mapping.release()
        return is_failed

    def _move_part(self, pending: Pending, mapping: SteppedMapping, part: slice) -> None:
        check_bounds(pending.copy, pending.shard, self._layout, mapping)  # type: ignore[arg-type]
        slots = [
            Piece(piece.extent, piece.first_slot + index, (engine_block,))
            for piece in pending.copy.pieces
            for index, engine_block in enumerate(piece.engine_blocks)
        ]
        self._move_pieces(slots[part], pending.shard, mapping, pending.is_store)  # type: ignore[arg-type]


def _make_copier(world: World, kv_cache: torch.Tensor, layout: Layout, lifeline: SteppedLifeline) -> SteppedCopier:
    kv = torch.empty(0, dtype=torch.uint8).set_(kv_cache.untyped_storage())
    return SteppedCopier(world, kv.numpy(), layout, lifeline)
