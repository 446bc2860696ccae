"""Saltern's world in one process: its real server core, lifelines and copies, on a clock of the engine's steps.

`SalternConnector` runs as it is, in both roles. Replaced is what would make two runs differ: the socket by calls, the
threads of lifelines and copiers by objects that move once a step, and the clock by one that passes 10 ms a step. How
late each of them is, what fails and who dies follows from a `Weather` and a seed. Copies move half of their bytes
when they begin and half when they end, and freed pages are overwritten, so whoever lets go of either too early is
seen in what some request reads.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
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
from saltern.core.effects import Disconnected, Effect, Erased, Gone, Received, TenantSet, Tick, Work
from saltern.core.extents import Extent, PagePool, extent_pages
from saltern.core.keys import (
    Content,
    Key,
    UserId,
    block_key,
    next_content,
    state_key,
    unsigned_user_key,
    user_id,
)
from saltern.core.leases import ConnectionId
from saltern.core.messages import (
    DEFAULT_TENANT,
    Acquire,
    Acquired,
    Attached,
    Loading,
    LookedUp,
    Lookup,
    Reply,
    Request,
    Reserve,
    Reserved,
    SessionEnded,
    Welcome,
    WorkerHello,
)
from saltern.core.tenants import NO_LIMITS, Limits
from saltern.vllm import connector as connector_module
from saltern.vllm.copier import CpuCopier, Finished, Shard, check_bounds
from saltern.vllm.copies import Copies, Copy, Piece
from saltern.vllm.geometry import NULL_BLOCK
from saltern.vllm.layout import Layout
from saltern.vllm.pace import Pace
from saltern.vllm.planner import Planner
from saltern.vllm.session import Session
from saltern.vllm.settings import PATIENCE_MS
from saltern.vllm.track import Phase
from tests.vllm.server import Clock, Line, Server

from .engine import Engine
from .findings import Finding, NotDrained
from .model import Sequence
from .saltern_disk import Owner, SteppedDisk

# A world in which servers die all the time would say so all the time.
logging.getLogger("saltern").setLevel(logging.CRITICAL)

Bytes = NDArray[np.uint8]

STEP_SECONDS = 0.01
SLOW_STEP_SECONDS = 0.4  # longer than a request's patience
LOAD_PATIENCE_SECONDS = 1.0  # of steps that do nothing, fewer than an engine is given
LATE_SECONDS = 10.0  # later than any answer
WAIT_SHARE, WAIT_SECONDS_MIN, WAIT_SECONDS_MAX = 0.02, 300e-6, 25e-3  # of a step, for all its questions together
HELD_SHARE_MAX = 0.25  # of the engine's blocks, as promised
ATTACH_STEPS_MAX = 10  # as long as `CpuCopier` waits for its session
OLD = 0xA5  # what the arena holds where nobody has written, or all is freed
SPOILED = 0xEE  # what a failed load leaves


class Crossed(Finding):
    """A block was named, asked for or kept under another user than the one whose request it stems from."""


class Greedy(Finding):
    """Saltern took more of the engine's time or of its blocks than it says it ever does."""


class Tainted(Finding):
    """The server kept a block that could not be loaded, or lost one for no reason."""


class Resurrected(Finding):
    """Something was found, or stored, that had been computed before its user was erased."""


class NotWiped(Finding):
    """What an erased user had was left in the arena for whoever gets the pages next."""


class FreedTooEarly(Finding):
    """Pages were given back that a worker was still copying, or was about to."""


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

    `block_seconds` is how long the engine believes that a block takes to compute, None what it learns. `faulty_rank` is
    the one rank whose copies fail; None is any. `events` name a method of `World` and the step before which it is
    called.
    """

    step_seconds: float = STEP_SECONDS
    reply_steps_max: int = 0
    copy_steps_max: int = 0
    lifeline_steps_max: int = 0
    load_fault_share: float = 0.0
    store_fault_share: float = 0.0
    disk_steps_max: int = 0
    read_fault_share: float = 0.0
    write_fault_share: float = 0.0
    block_seconds: float | None = None
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
        disk_pages: int = 0,
        disk_limits: Limits = NO_LIMITS,
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
        self.arrivals: set[float] = set()  # when requests came
        self.told_of_loads: dict[int, tuple[float, int]] = {}  # by question: when an engine hears of how many blocks
        self._block_seconds: list[tuple[float, float]] = []  # when the engine believed that a block takes so long
        self._ticked_at: float | None = None  # None until an engine has started
        self._planned_at = 0.0
        self._may_wait_seconds = WAIT_SECONDS_MIN  # in this step
        self.tainted: list[tuple[bytes, Block]] = []  # blocks that could not be loaded, in which session
        self._known: dict[Key, Place] = {}  # all that requests of this engine and of those before have
        self.disk = SteppedDisk(disk_pages, Random(f"disk {seed}"))
        self.erasures = Erasures()
        self.erasing: set[Owner] = set()  # whose data keys are gone, and of whom the server has not been told
        self._due: list[tuple[int, Callable[[], None]]] = []  # what goes on at the server, and before which step
        self.server = HarnessServer(
            self,
            self.clock,
            pages=pages,
            page_bytes=page_bytes,
            ranks=0,
            limits=limits,
            disk_pages=disk_pages,
            disk_limits=disk_limits,
        )
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
        self._ticked_at = None  # the start may wait for long
        self._planned_at = self.clock.now
        self.planner = Planner(**parts)
        if self.weather.block_seconds is not None:
            self.planner._pace = SetPace(self.weather.block_seconds, self.block_tokens, self.clock)
        self.told_of_loads = {}
        self._block_seconds = []
        add, match, plan = self.planner.add, self.planner.match, self.planner.plan

        def add_noted(*args: Any, **rest: Any) -> None:
            self.arrivals.add(self.clock())
            add(*args, **rest)

        self.planner.add = add_noted  # type: ignore[method-assign]
        self.planner.plan = functools.partial(self._plan, plan)  # type: ignore[method-assign]
        self.planner.match = functools.partial(self._match, self.planner, match)  # type: ignore[method-assign]
        return self.planner

    def _plan(self, plan: Callable[..., Copies], *args: Any) -> Copies:
        """Have the planner plan, and take note of how long it may have waited for answers in the step that it plans."""
        seconds = WAIT_SHARE * (self.clock.now - self._planned_at)
        self._may_wait_seconds = min(max(seconds, WAIT_SECONDS_MIN), WAIT_SECONDS_MAX)
        self._planned_at = self.clock.now
        return plan(*args)

    def _match(
        self, planner: Planner, match: Callable[[str, int], int | None], request_id: str, local_tokens: int
    ) -> int | None:
        """Have the planner answer; raise if it waits for the disk when computing would be over, or patience is."""
        matched = match(request_id, local_tokens)
        track = planner._track_by_id.get(request_id)
        if matched is None and track is not None and track.phase is Phase.COMING and track.asks > 1:
            told_at, blocks = self.told_of_loads[track.awaited]
            # As it believed then, when it may not have known yet.
            since = told_at - self.weather.step_seconds
            paces = [seconds or LOAD_PATIENCE_SECONDS for at, seconds in self._block_seconds if at >= since]
            computing_seconds = min(blocks, len(track.keys)) * max(paces) or LOAD_PATIENCE_SECONDS
            seconds = min(computing_seconds, LOAD_PATIENCE_SECONDS) + 2 * self.weather.step_seconds
            if self.clock() - told_at > seconds:
                raise Greedy(f"{request_id} waits for {blocks} blocks since {self.clock() - told_at:.2f} s")
        return matched

    def tick(self) -> None:
        """Let a step's time pass."""
        self._check_greed()
        self.step += 1
        self.clock.advance(self.weather.step_seconds)
        self._ticked_at = self.clock.now
        if self.planner is not None:
            self._block_seconds.append((self.clock.now, self.planner._pace.block_seconds))
        self.server.reply_seconds = self.delay(self.weather.reply_steps_max) * self.weather.step_seconds
        self.disk.steps_max = self.weather.disk_steps_max
        self.disk.read_fault_share = self.weather.read_fault_share
        self.disk.write_fault_share = self.weather.write_fault_share
        while self._events and self._events[0][0] <= self.step:
            getattr(self, self._events.pop(0)[1])()
        for lifeline in self.lifelines:
            lifeline.tick()
        self.server.tick()

    def sleep(self, seconds: float) -> None:
        """Let time pass in the middle of a step, for which nobody in it is to blame."""
        self.clock.advance(seconds)
        if self._ticked_at is not None:
            self._ticked_at += seconds

    def _check_greed(self) -> None:
        """Raise if the step that ends took more than it may."""
        waited = self.clock.now - self._ticked_at if self._ticked_at is not None else 0.0
        if waited > 1.01 * self._may_wait_seconds:  # a simulated clock is exact but for its last digits
            raise Greedy(f"the scheduler waited {1e6 * waited:.0f} µs for answers in step {self.step}")
        self._may_wait_seconds = WAIT_SECONDS_MIN
        if self.planner is not None:
            held, total = self.planner.leftovers["held blocks"], self.planner._blocks.total
            if held > HELD_SHARE_MAX * total:
                raise Greedy(f"{held} of {total} engine blocks are held")

    def delay(self, steps_max: int) -> int:
        """Draw a delay."""
        return self.random.randint(0, steps_max)

    # Events

    def kill_server(self) -> None:
        """The server dies with all that it held but what is on the disk, and none comes in its place."""
        self.server.kill()
        self.disk.crash()
        self._due = []
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

    def erase_alice(self) -> None:
        """A user is erased, and may come back."""
        self._erase("alice")

    def erase_alice_for_good(self) -> None:
        """A user is erased, and is not stored any more."""
        self._erase("alice", for_good=True)

    def erase_all(self) -> None:
        """All users are erased."""
        self._erase(None)

    def crowd_out(self) -> None:
        """Others need the RAM for a moment."""
        self.server.crowd_out()

    def stall_disk(self) -> None:
        """Nothing that is asked of the disk ends."""
        self.disk.is_stalled = True

    def resume_disk(self) -> None:
        """The disk goes on."""
        self.disk.is_stalled = False

    def rot(self) -> None:
        """A record on the disk is not what was written."""
        self.disk.rot()

    def _erase(self, salt: str | None, *, for_good: bool = False) -> None:
        """Do what an operator's command does, one thing after the other, and other things in between.

        The data keys go first; what the cache is told then holds for all that was asked of the disk before.
        """
        server = self.server
        if not server.is_listening or server.is_frozen or not self.disk.pages:
            return
        user = None if salt is None else user_id(unsigned_user_key(server.secret, salt))
        owner = (DEFAULT_TENANT, user)
        self.disk.destroy_keys(owner, for_good=for_good)
        self.erasing.add(owner)

        def erase() -> None:
            if not server.is_frozen:
                server.erase(Erased(*owner, for_good))
                self.erasures.promise(user, self.clock(), for_good=for_good)
                self.erasing.discard(owner)
                after = server.cache.last_op
                self._later(lambda: self.disk.allow(owner, after=after))
            else:
                self._later(erase)

        self._later(erase)

    def _later(self, act: Callable[[], None]) -> None:
        self._due.append((self.step + self.delay(2), act))

    def act(self) -> None:
        """Do what is due at the server."""
        while (due := next((due for due in self._due if due[0] <= self.step), None)) is not None:
            self._due.remove(due)
            due[1]()

    def heal(self) -> None:
        """From now on all goes well."""
        self.sleep(LATE_SECONDS)  # what was on its way arrives
        self.weather = Weather()
        self._events = []
        self.server.reply_seconds = 0.0
        self.start_server()
        self.thaw_server()
        self.disk.hurry(self.step)

    def check_idle(self) -> None:
        """Raise if an engine sleeps while it holds blocks, or waits for workers that nobody lets step."""
        assert self.planner is not None, "an engine without a planner"
        left = {name: count for name, count in self.planner.leftovers.items() if name in ("held blocks", "operations")}
        if any(left.values()):
            raise NotDrained(f"an idle engine has {left}")

    # The end

    def leftovers(self, engine: Engine) -> list[str]:
        """Return what the connector, in both roles, and its server still hold of an engine that has drained."""
        planner = engine.connector._planner
        self.server.come_to_rest()
        left = [f"{count} {what}" for what, count in planner.leftovers.items() if count]
        left += [f"rank {copier.rank} has copies under way" for copier in self.copiers if copier.is_busy]
        left += [f"rank {lifeline.rank} uses the arena" for lifeline in self.lifelines if lifeline.is_used]
        self.check_users(engine)
        self._check_tainted(planner)
        return left + list(self.server.faults(sessions=None))

    def check_users(self, engine: Engine) -> None:
        """Raise unless all that was asked and kept so far was so under the user of the request that it stems from.

        What that user and those keys are is derived here once more, from what the client sent.
        """
        places: dict[tuple[Content, bytes], dict[Key, Place]] = {}
        for naming in self.namings:
            basis = (naming.root, naming.secret)
            if basis not in places:
                cached = [engine.sequences[name] for name in engine.sequences.keys() - engine.uncached]
                places[basis] = self._places(*basis, cached)
                self._known |= places[basis]
            for key in naming.keys:
                place = places[basis].get(key)
                if place is None or place.user != naming.user:
                    raise Crossed(
                        f"user {naming.user.hex()} named a block of {place.user.hex() if place else 'nobody'}"
                    )
        self.namings = []
        for user in self.server.cache.default_tenant.user_by_id.values():
            for key, block in user.block_by_key.items():
                if self._known.get(key) != Place(user.id, block.depth):
                    raise Crossed(f"the server keeps {block} for user {user.id.hex()}, not as {self._known.get(key)}")
        for name, record in self.disk.records.items():
            if self._known.get(name.key) != Place(name.user, record.depth):
                raise Crossed(f"the disk has {record}, not {self._known.get(name.key)}")

    def check_free(self, arena: Bytes, extent: Extent) -> None:
        """Raise if a worker has a copy before it that moves to or from an extent, or the disk work."""
        if self.disk.may_touch(arena, extent):
            raise FreedTooEarly(f"the disk has work under way to or from {extent}, which is freed")
        for copier in self.copiers:
            if copier.may_touch(arena, extent):
                raise FreedTooEarly(f"rank {copier.rank} has a copy under way to or from {extent}, which is freed")

    def taint(self, copy: Copy) -> None:
        """Take note of the blocks of a load that fails."""
        extents = {piece.extent for piece in copy.pieces}
        for user in self.server.cache.default_tenant.user_by_id.values():
            blocks = [block for block in user.block_by_key.values() if block.extent in extents]
            self.tainted += [(copy.incarnation, block) for block in blocks]

    def _check_tainted(self, planner: Planner) -> None:
        """Raise if a block is still there that could not be loaded in the session that has not ended since."""
        for incarnation, block in self.tainted:
            is_there = block.user.block_by_key.get(block.key) is block
            is_there |= block.record is not None and block.record.is_kept
            if is_there and incarnation == planner._session.incarnation:
                raise Tainted(f"{block} could not be loaded, and is there still")

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
                place_by_key[state_key(user_key, content)] = Place(user_id(user_key), depth + 1)
        return place_by_key

    def counts(self) -> dict[str, int]:
        """Return what the disk went through."""
        disk = self.disk
        return {
            "records_written": disk.written,
            "records_read": disk.loaded,
            "records_lost": disk.lost,
            "erasures": self.erasures.count,
        }

    def check_deserted(self) -> None:
        """Raise unless an engine that is gone has left nothing at the server."""
        # Else blocks are pinned by what the disk does, or by what the server is about to wipe.
        is_still = self.server.is_listening and not self.disk.is_busy and not self.server.is_due
        if faults := list(self.server.faults(sessions=0)) if is_still else []:
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

    def _start(self) -> None:
        super()._start()
        disk = self._world.disk
        erased = [(*owner, for_good) for owner, for_good in disk.erased.items()]
        self._carry_out(self.cache.restore(disk.restore(), erased, self.clock()))
        for _, user in self._world.erasing:  # whom the server before had not been told of
            self._world.erasures.promise(user, self.clock(), for_good=disk.erased[DEFAULT_TENANT, user])
        self._world.erasing.clear()

    def _make_secret(self) -> bytes:
        # What is on the disk goes by names that depend on it.
        return self.secret if self.lives and self._world.disk.pages else super()._make_secret()

    def tick(self) -> None:
        """Let happen what happens at a server in a step without being asked."""
        if self.is_frozen or not self.is_listening:
            return
        self._world.act()
        if self.is_due:
            self._handle(Tick())
        for name, touched_at in self.cache.disk.take_touched():
            self._world.disk.touch(name, touched_at)
        self._pump()

    @property
    def is_due(self) -> bool:
        """Return whether the cache has something to do now that nobody asks for."""
        return self.cache.due_at is not None and self.cache.due_at <= self.clock()

    def crowd_out(self) -> None:
        """Evict from RAM all that may be evicted, by a limit that is lowered and raised again."""
        _, _, limits, _, disk_limits = self._shape
        if self.is_listening and not self.is_frozen:
            self.tell(TenantSet(DEFAULT_TENANT, Limits(limit_bytes=1), disk_limits))
            while self.cache.default_tenant.first_victim() is not None:
                self.tell(Tick())
            self.tell(TenantSet(DEFAULT_TENANT, limits, disk_limits))

    def erase(self, erased: Erased) -> None:
        """Tell the cache whom to forget, and expect all pages of these users to be wiped as they are given back."""
        users = self.cache.shares.tenant(erased.tenant).user_by_id
        gone = [user for id_, user in users.items() if erased.user in (None, id_)]
        self._to_wipe.update(block.extent for user in gone for block in user.block_by_key.values())
        self.tell(erased)

    def _carry_out(self, asked: Iterable[Effect]) -> None:
        super()._carry_out(asked)
        if self._unwiped:
            raise NotWiped(f"{len(self._unwiped)} blocks of erased users were given back as they are")

    def come_to_rest(self) -> None:
        """Let all happen that happens without being asked."""
        for _ in range(1000):
            self._world.disk.hurry(self._world.step)
            self.tick()
            if not self.is_due and not self._world.disk.is_busy:
                return
        raise NotDrained("the server does not come to rest")

    def perform(self, work: Work) -> None:
        """Ask the disk."""
        self._world.disk.perform(work, self.arena, self.cache.page_bytes, self._world.step)

    def wipe(self, extent: Extent) -> None:
        """Overwrite what an erased user had."""
        page_bytes = self.cache.page_bytes
        for run in extent:
            self.arena[run.start * page_bytes : (run.start + run.count) * page_bytes] = 0
        self._unwiped.discard(extent)

    def serve(self, line: Line) -> None:
        """Take in what a line has sent, and what the disk has done meanwhile."""
        super().serve(line)
        if not self.is_frozen and self.is_listening:
            self._pump()

    def _pump(self) -> None:
        while answers := list(self._world.disk.advance(self._world.step)):
            for answer in answers:
                self._handle(answer)

    def _empty(self) -> Cache:
        cache = super()._empty()
        self._to_wipe: set[Extent] = set()
        self._unwiped: set[Extent] = set()
        self.arena = np.full(cache.pool.pages * cache.page_bytes, OLD, dtype=np.uint8)
        cache.pool.free = functools.partial(self._free_and_overwrite, cache.pool, self.arena)  # type: ignore[method-assign]
        return cache

    def _free_and_overwrite(self, pool: PagePool, arena: Bytes, extent: Extent) -> None:
        self._world.check_free(arena, extent)
        PagePool.free(pool, extent)
        if extent in self._to_wipe:
            self._to_wipe.discard(extent)
            self._unwiped.add(extent)
        page_bytes = len(arena) // pool.pages
        for run in extent:
            arena[run.start * page_bytes : (run.start + run.count) * page_bytes] = OLD

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
        blocks = [block for user in cache.default_tenant.user_by_id.values() for block in user.block_by_key.values()]
        yield from (f"{block} is left" for block in blocks if block.pins or block.state is not BlockState.READY)
        yield from (f"{block} hangs on nothing" for block in blocks if not _is_reachable(block))
        pages = sum(extent_pages(block.extent) for block in blocks)
        if not pages == cache.pool.pages - cache.pool.free_pages == cache.default_tenant.used_pages:
            yield f"{cache.pool.pages - cache.pool.free_pages} pages are taken by blocks of {pages}"
        yield from self._disk_faults()

    def _disk_faults(self) -> Iterator[str]:
        """Yield in what the cache and the disk differ."""
        disk = self.cache.disk
        if disk.writes or disk.reads or disk.forgetting or self.cache.loads.load_by_block:
            yield f"the server waits for {len(disk.writes)} writes, {len(disk.reads)} reads, {len(disk.forgetting)}"
        kept = [
            record
            for tenant in disk.shares.tenant_by_name.values()
            for user in tenant.user_by_id.values()
            for record in user.block_by_key.values()
        ]
        there = {name: (record.slot, record.length) for name, record in self._world.disk.records.items()}
        if {record.name: (record.slot, record.length) for record in kept} != there:
            yield f"the server knows of {len(kept)} records, and the disk of {len(there)} or of others"
        pages = sum(record.pages for record in kept)
        charged = sum(tenant.used_pages for tenant in disk.shares.tenant_by_name.values())
        if not pages == charged == disk.pool.pages - disk.pool.free_pages:
            yield f"{disk.pool.pages - disk.pool.free_pages} pages of the slab are taken by {pages}, {charged} charged"


class NotedLine(Line):
    """A line on which it is noted who names which blocks, with the keys' basis at that moment."""

    def __init__(self, server: HarnessServer, connection: ConnectionId, world: World) -> None:
        super().__init__(server, connection)
        self._world = world
        self._asked: dict[int, Lookup | Acquire | Reserve] = {}
        self._unanswered_since = 0.0
        self._handled = -1  # messages, at that time

    def send(self, message: Request) -> None:
        """Take note, and send."""
        if self._server.is_frozen and isinstance(message, Lookup | Acquire | Reserve):
            self._check_patience()
        if isinstance(message, Reserve) and message.began_at not in self._world.arrivals:
            raise Resurrected(f"blocks are offered of a request that came at {message.began_at}, when none came")
        match message:
            case Lookup(number, user, keys) | Acquire(number, user, keys) | Reserve(number, user, keys):
                assert self._world.planner is not None, "blocks were named before there was a planner"
                self._asked[number] = message
                self._world.namings.append(Naming(user, keys, self._world.planner._names.root, self._server.secret))
            case _:
                pass
        super().send(message)

    def deliver(self, reply: Reply) -> None:
        """Check whether what is told and given was computed since its user was erased, and put it on its way."""
        match reply:
            case LookedUp(number, ready) | Acquired(number, _, _, ready):
                self._world.erasures.check_found(self._asked.pop(number), ready)
            case Reserved(number, _, grants):
                ask = self._asked.pop(number)
                assert isinstance(ask, Reserve), "an answer to another question"
                self._world.erasures.check_granted(ask, [grant.index for grant in grants])
            case _:
                pass
        super().deliver(reply)
        if isinstance(reply, Loading):
            self._world.told_of_loads[reply.request] = (self.coming[-1][0], reply.blocks)

    def _check_patience(self) -> None:
        """Raise if a server is asked that has left something unanswered for longer than a patient engine waits."""
        clock, handled = self._server.clock(), len(self.sent) - len(self.backlog)
        if handled != self._handled:
            self._unanswered_since, self._handled = clock, handled
        elif clock - self._unanswered_since > 2 * (PATIENCE_MS / 1000 + self._world.weather.step_seconds):
            raise Greedy(f"a server was asked that has not answered for {clock - self._unanswered_since:.2f} s")


class Erasures:
    """Who was erased and when, and what was stored for them since: nothing else may be found."""

    def __init__(self) -> None:
        self._erased_at: dict[UserId | None, float] = {}  # None: everybody
        self._stored: dict[UserId, set[Key]] = {}  # since the last time
        self.count = 0

    def promise(self, user: UserId | None, now: float, *, for_good: bool) -> None:
        """Find nothing any more of what was begun before now."""
        self._erased_at[user] = max(math.inf if for_good else now, self._erased_at.get(user, 0.0))
        for erased in list(self._stored) if user is None else [user]:
            self._stored.pop(erased, None)
        self.count += 1

    def check_found(self, ask: Lookup | Acquire | Reserve, ready: int) -> None:
        """Raise if something is there of before."""
        if not {ask.user, None}.isdisjoint(self._erased_at):
            before = set(ask.keys[:ready]) - self._stored.get(ask.user, set())
            if before:
                raise Resurrected(f"{len(before)} blocks of user {ask.user.hex()} are found that were erased")

    def check_granted(self, ask: Reserve, indices: Iterable[int]) -> None:
        """Take note of what is stored from now on; raise if it may not be."""
        keys = {ask.keys[index] for index in indices}
        erased_at = max(self._erased_at.get(user, -math.inf) for user in (ask.user, None))
        if keys and ask.began_at <= erased_at:
            raise Resurrected(f"{len(keys)} blocks are stored of a request that began before its user was erased")
        self._stored.setdefault(ask.user, set()).update(keys)


class SetPace(Pace):
    """A pace that is not learned."""

    def __init__(self, block_seconds: float, block_tokens: int, clock: Clock) -> None:
        super().__init__(block_tokens=block_tokens, clock=clock)
        self.seconds_per_token = block_seconds / block_tokens

    def end(self) -> None:
        """Learn nothing."""


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

    def has_mapped(self, arena: Bytes) -> bool:
        """Return whether it is this arena that the worker uses."""
        return self._arena is arena

    def is_attached(self, incarnation: bytes) -> bool:
        """Return whether copies of a session may begin."""
        return self._incarnation == incarnation

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

    def may_touch(self, arena: Bytes, extent: Extent) -> bool:
        """Return whether a copy that has not ended moves to or from an extent, as far as it still may."""
        return self._line.has_mapped(arena) and any(
            piece.extent == extent
            for pending in self._pending
            if pending.mapping is not None or self._line.is_attached(pending.copy.incarnation)
            for piece in pending.copy.pieces
        )

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
            self._world.taint(pending.copy)
            for piece in pending.copy.pieces:
                for pages in self._pages[piece.group]:
                    pages[[block for block in piece.engine_blocks if block != NULL_BLOCK]] = SPOILED
        mapping.release()
        return is_failed

    def _move_part(self, pending: Pending, mapping: SteppedMapping, part: slice) -> None:
        check_bounds(pending.copy, pending.shard, self._layout, mapping)  # type: ignore[arg-type]
        slots = [
            Piece(piece.extent, piece.first_slot + index, (engine_block,), piece.group)
            for piece in pending.copy.pieces
            for index, engine_block in enumerate(piece.engine_blocks)
        ]
        self._move_pieces(slots[part], pending.shard, mapping, pending.is_store)  # type: ignore[arg-type]


def _make_copier(world: World, kv_cache: torch.Tensor, layout: Layout, lifeline: SteppedLifeline) -> SteppedCopier:
    kv = torch.empty(0, dtype=torch.uint8).set_(kv_cache.untyped_storage())
    return SteppedCopier(world, kv.numpy(), layout, lifeline)
