"""An engine of a simulation: a scheduler and its workers, which behave as the connector does.

    ask      Lookup? → Acquire (→ Loading …) → read → Release (and Discard, if a block was bad) → Reserve → write → end
    end      Commit | Abort
    worker   WorkerHello → Welcome → Attached → copies … SessionEnded → drains → closes → WorkerHello

An ask may be given up at any time, and one that waits for the disk goes on without it when its patience ends; what is
answered later is released or aborted at once. A lease is given
back only when every worker has reported; a lost worker's report never comes, and then the lease falls with
the session. Workers copy only for the incarnation that they are attached to.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from math import inf, nan
from typing import Protocol

from saltern.core.extents import Extent
from saltern.core.keys import Content, Key, UserId, UserKey, block_key, namespace_content, next_content, state_key
from saltern.core.messages import (
    Abort,
    Acquire,
    Acquired,
    Attached,
    Commit,
    Discard,
    LeaseId,
    Loading,
    LookedUp,
    Lookup,
    Refused,
    Release,
    Reply,
    Request,
    Reserve,
    Reserved,
    SchedulerHello,
    SessionEnded,
    Welcome,
    WorkerHello,
)
from tests.simulator.arena import CELL_BYTES, Arena
from tests.simulator.claims import Invariant, violated
from tests.simulator.server import Process, Server
from tests.simulator.world import Link, World


@dataclass(frozen=True)
class Namespace:
    """One model and layout; engines of the same namespace share blocks, and states if the model has any."""

    name: bytes
    world_size: int
    shard_bytes: int
    state_shard_bytes: int = 0

    @property
    def block_bytes(self) -> int:
        """Return the size of a block with the shards of all ranks."""
        return self.world_size * self.shard_bytes

    @property
    def state_bytes(self) -> int:
        """Return the size of a state with the shards of all ranks, 0 for a model without."""
        return self.world_size * self.state_shard_bytes


@dataclass(frozen=True)
class User:
    """A user as engines know it. Users may have equal keys: isolation must not hang on keys alone."""

    id: UserId
    key: UserKey
    tenant: str

    def keys(self, namespace: Namespace, prompt: tuple[int, ...]) -> tuple[Key, ...]:
        """Name the blocks of a prompt, one token a block."""
        return tuple(block_key(self.key, content) for content in _contents(namespace, prompt))

    def states(self, namespace: Namespace, prompt: tuple[int, ...]) -> tuple[Key, ...]:
        """Name the states after the blocks of a prompt, of a model that has any."""
        if not namespace.state_bytes:
            return ()
        return tuple(state_key(self.key, content) for content in _contents(namespace, prompt))


def _contents(namespace: Namespace, prompt: tuple[int, ...]) -> Iterator[Content]:
    content = namespace_content(namespace.name)
    for token in prompt:
        content = next_content(content, token.to_bytes(4, "little"))
        yield content


class Site(Protocol):
    """What engines share: the users and prompts, the habits of this run, and the server, if it is up."""

    world: World
    server: Server | None
    users: list[User]
    is_calm: bool
    block_seconds: float
    copy_delay: float
    retry_delay: float
    failure_rate: float
    give_up_rate: float
    prompts: list[tuple[int, ...]]

    def server_time(self, time: float) -> float:
        """Return what a time is by the clock of the server, if it is up."""

    def is_rival_alive(self, engine: "Engine") -> bool:
        """Return whether another living engine goes by the same name."""

    def process_ended(self, process: Process) -> None:
        """Tell the server, if it is up, that a process has ended."""


@dataclass
class Ask:
    """One request of one user, on its way through the verbs."""

    number: int
    user: User
    keys: tuple[Key, ...]
    states: tuple[Key, ...]
    start: int
    began_at: float  # by the world's clock
    is_given_up: bool = False
    acquired_at: float = inf  # until the server has named a time


@dataclass(frozen=True)
class Piece:
    """One block, or state, of an operation."""

    key: Key
    extent: Extent
    length: int  # bytes, with the shards of all ranks

    def shard(self, rank: int, world_size: int) -> range:
        """Return which of its cells a rank holds."""
        size = self.length // world_size // CELL_BYTES
        return range(rank * size, (rank + 1) * size)


@dataclass(eq=False)
class Operation:
    """The copies of one lease on all ranks."""

    ask: Ask
    incarnation: bytes
    lease: LeaseId
    is_write: bool
    pieces: list[Piece]
    ok_by_rank: dict[int, bool] = field(default_factory=dict)


class Worker(Process):
    """One rank: a lifeline, a mapping of the arena, and copies in flight."""

    def __init__(self, engine: "Engine", rank: int, *, outlives_socket: bool) -> None:
        super().__init__(outlives_socket=outlives_socket)
        self.engine = engine
        self.rank = rank
        self.name = engine.site.world.random.randbytes(16)
        self.is_alive = True
        self.link: Link | None = None
        self.arena: Arena | None = None
        self.incarnation: bytes | None = None
        self.is_draining = False
        self.copies: list[Copy] = []

    def connect(self) -> None:
        """Open the lifeline, as soon as there is a server and nothing left to drain."""
        if not self.is_alive or self.engine.is_stopping or self.link is not None:
            return
        site = self.engine.site
        if site.server is None:
            site.world.after(site.retry_delay, self.connect)
            return
        self.is_draining = False
        self.link = site.server.connect(self, self)
        hello = WorkerHello(
            engine=self.engine.name,
            name=self.name,
            rank=self.rank,
            world_size=len(self.engine.workers),
            outlives_socket=self.outlives_socket,
        )
        self.link.to_server.send(hello)

    def receive(self, link: Link, message: Reply) -> None:
        """Take a message from the lifeline."""
        match message:
            case Welcome() if isinstance(link.server, Server):
                self.arena = link.server.arena
            case Attached(incarnation):
                self.incarnation = incarnation
            case SessionEnded():
                self.drain()
            case _:
                violated(Invariant.ANSWERS, f"a worker received {message}")

    def end(self, link: Link) -> None:
        """The server closed the lifeline."""
        if link is self.link:
            self.link = None
            self.drain()

    def drain(self) -> None:
        """Take nothing on, and say hello anew once the last copy is done."""
        self.is_draining = True
        self.incarnation = None
        if self.copies:
            return
        if self.link is not None:
            self.link.close_by_client()
            self.link = None
        self.arena = None
        if self.engine.is_stopping:
            self.die()
        else:
            self.engine.site.world.after(self.engine.site.retry_delay, self.connect)

    def perform(self, operation: Operation) -> None:
        """Copy this rank's shard of every block of an operation, one block after the other."""
        if not self.is_alive:
            return
        if self.arena is None or self.incarnation != operation.incarnation:
            self.report(operation, ok=False)
            return
        copy = Copy(self, operation, self.arena)
        self.copies.append(copy)
        copy.step()

    def report(self, operation: Operation, *, ok: bool) -> None:
        """Tell the scheduler how the operation went."""
        if self.is_alive:
            engine = self.engine
            engine.site.world.after(1.0, lambda: engine.reported(operation, self.rank, ok=ok))

    def finished(self, copy: "Copy", *, ok: bool) -> None:
        """A copy has stopped touching the arena."""
        self.copies.remove(copy)
        self.report(copy.operation, ok=ok)
        if self.is_draining:
            self.drain()

    def die(self) -> None:
        """End the process. Its socket closes at once; a device may go on writing for a while."""
        if not self.is_alive:
            return
        self.is_alive = False
        world = self.engine.site.world
        if self.link is not None:
            self.link.close_by_client(losing=world.chance(0.3))
            self.link = None
        if self.outlives_socket:
            world.after(8 * self.engine.site.copy_delay, self._vanish)
        else:
            self._vanish()

    def _vanish(self) -> None:
        self.is_gone = True
        for copy in self.copies:
            copy.stop()
        self.copies.clear()
        self.engine.site.process_ended(self)


class Copy:
    """One rank's part of an operation. Blocks are read at the start and at the end, and written in two halves."""

    def __init__(self, worker: Worker, operation: Operation, arena: Arena) -> None:
        self.operation = operation
        self._worker = worker
        self._arena = arena
        self._position = 0
        self._is_half_done = False
        self._shards = [piece.shard(worker.rank, len(worker.engine.workers)) for piece in operation.pieces]
        self._cells = [
            arena.cells(piece.extent, piece.length)[shard.start : shard.stop]
            for piece, shard in zip(operation.pieces, self._shards, strict=True)
        ]
        for cells in self._cells:
            arena.begin(cells, is_write=operation.is_write)

    def step(self) -> None:
        """Begin the block at `position`, or end it."""
        worker = self._worker
        if worker.is_gone:
            return
        site = worker.engine.site
        piece, cells = self.operation.pieces[self._position], self._cells[self._position]
        first = self._shards[self._position].start
        if self.operation.is_write:
            half = len(cells) // 2
            done, offset = (cells[half:], half) if self._is_half_done else (cells[:half], 0)
            ask = self.operation.ask
            self._arena.write(done, ask.user.id, piece.key, first + offset, ask.began_at)
        else:
            self._arena.check_read(cells, self.operation.ask.user.id, piece.key, first)
        if site.world.chance(site.failure_rate):
            self.stop()
            worker.finished(self, ok=False)
            return
        if self._is_half_done:
            self._position += 1
        self._is_half_done = not self._is_half_done
        if self._position < len(self._cells):
            site.world.after(site.copy_delay, self.step)
        else:
            self.stop()
            worker.finished(self, ok=True)

    def stop(self) -> None:
        """Touch nothing any more."""
        for cells in self._cells:
            self._arena.end(cells, is_write=self.operation.is_write)
        self._cells = []


class Engine:
    """One process tree: its scheduler's connection, its workers, and the requests that they serve."""

    def __init__(self, site: Site, name: str, namespace: Namespace, *, outlives_socket: bool) -> None:
        self.site = site
        self.name = name
        self.namespace = namespace
        self.is_alive = True
        self.is_stopping = False
        self.link: Link | None = None
        self.incarnation = b""
        self.is_attached = False
        self.pending: deque[tuple[type[Reply], Request, Ask | None]] = deque()  # what awaits an answer, in order
        self.awaited: dict[int, Ask] = {}  # by number: what is on its way from the disk
        self.operations: list[Operation] = []
        self.workers = [Worker(self, rank, outlives_socket=outlives_socket) for rank in range(namespace.world_size)]
        self._is_frozen = False
        self._thawed: list[Callable[[], None]] = []
        self._numbers = count(1)
        hellos = [self.connect, *(worker.connect for worker in self.workers)]
        site.world.random.shuffle(hellos)
        for hello in hellos:
            site.world.after(site.retry_delay, hello)

    # The connection

    def connect(self) -> None:
        """Open the session, as soon as there is a server."""
        if not self.is_alive or self.is_stopping or self.link is not None:
            return
        if self.site.is_calm and self.site.is_rival_alive(self):
            return  # it would be refused for ever
        if self.site.server is None:
            self.site.world.after(self.site.retry_delay, self.connect)
            return
        self.link = self.site.server.connect(self)
        self.incarnation = self.site.world.random.randbytes(16)
        self.pending.append((Welcome, self.hello(), None))
        self.link.to_server.send(self.hello())

    def hello(self) -> SchedulerHello:
        """Return what opens the session of this incarnation."""
        return SchedulerHello(
            engine=self.name,
            incarnation=self.incarnation,
            workers=tuple(worker.name for worker in self.workers),
            block_bytes=self.namespace.block_bytes,
            state_bytes=self.namespace.state_bytes,
            root=namespace_content(self.namespace.name),
        )

    def receive(self, link: Link, message: Reply) -> None:
        """Take a message from the control connection."""
        match message:
            case Attached(incarnation):
                self.is_attached = incarnation == self.incarnation
                if not self.is_attached:
                    violated(Invariant.SESSIONS, f"{self.name} was attached to another incarnation")
            case SessionEnded():
                self.is_attached = False
                self.site.world.after(self.site.retry_delay, lambda: self.leave(link))
            case Refused():  # the hello, or what was sent before it was read that the hello was refused
                self.pending.clear()
                self.awaited.clear()
            case Welcome() | LookedUp() | Loading() | Acquired() | Reserved():
                self._answered(message)
            case _:
                violated(Invariant.ANSWERS, f"a scheduler received {message}")

    def end(self, link: Link) -> None:
        """The server closed the connection."""
        if link is self.link:
            self._lose()

    def leave(self, link: Link | None = None) -> None:
        """Close the connection (if it is still that one): all leases that aren't given back stay with the workers."""
        if self.link is not None and link in (None, self.link):
            self.link.close_by_client()
            self._lose()

    def _lose(self) -> None:
        self.link = None
        self.is_attached = False
        self.pending.clear()
        self.awaited.clear()
        self.operations.clear()
        self.site.world.after(self.site.retry_delay, self.connect)

    def _send(self, message: Request) -> None:
        if self.link is not None:
            self.link.to_server.send(message)

    def _ask(self, message: Request, kind: type[Reply], ask: Ask) -> None:
        self.pending.append((kind, message, ask))
        self._send(message)

    # Requests

    def begin_request(self) -> None:
        """Take a request of one of the users for one of the prompts."""
        random = self.site.world.random
        if self.link is None or not self.is_alive or self.is_stopping or self._is_frozen:
            return
        user = random.choice(self.site.users)
        prompt = random.choice(self.site.prompts)
        prompt = prompt[: random.randint(1, len(prompt))]
        keys = user.keys(self.namespace, prompt)
        states = () if random.random() < 0.1 else user.states(self.namespace, prompt)
        start = random.choice((0, 0, random.randint(0, len(keys))))
        ask = Ask(next(self._numbers), user, keys, states, start, began_at=self.site.world.now)
        if self.site.world.chance(self.site.give_up_rate):
            self.site.world.after(10.0, lambda: self.give_up(ask))
        if random.random() < 0.5:
            lookup = Lookup(ask.number, user.id, keys, states, user.tenant, block_seconds=self.site.block_seconds)
            self._ask(lookup, LookedUp, ask)
        else:
            self._acquire(ask)

    def give_up(self, ask: Ask) -> None:
        """The client went away; nothing that comes later is of use."""
        ask.is_given_up = True

    def _acquire(self, ask: Ask) -> None:
        user, seconds = ask.user, self.site.block_seconds
        acquire = Acquire(ask.number, user.id, ask.keys, ask.start, ask.states, user.tenant, block_seconds=seconds)
        self._ask(acquire, Acquired, ask)

    def _reserve(self, ask: Ask, start: int) -> None:
        """Reserve all blocks, or up to where a step of the model ended, with the state or for the state alone."""
        if self.link is None or ask.is_given_up:
            return
        random = self.site.world.random
        keys, ends_in_state = ask.keys, bool(ask.states) and random.random() < 0.8
        if ends_in_state:
            end = random.choice((len(keys), random.randint(1, len(keys))))
            keys = keys[:end] + ask.states[end - 1 : end]
            start = random.choice((start, start, end))
        message = Reserve(
            ask.number,
            ask.user.id,
            keys,
            start,
            ask.acquired_at,
            ends_in_state,
            ask.user.tenant,
            began_at=0.0 if self.site.world.chance(0.02) else self.site.server_time(ask.began_at),
        )
        self._ask(message, Reserved, ask)

    def _answered(self, message: Reply) -> None:
        if isinstance(message, Acquired) and (late := self.awaited.pop(message.request, None)) is not None:
            self._acquired(late, message)
            return
        if not self.pending:
            violated(Invariant.ANSWERS, f"nobody asked for {message}")
        kind, asked, ask = self.pending.popleft()
        if type(message) is not (Loading if isinstance(asked, Acquire) and isinstance(message, Loading) else kind):
            violated(Invariant.ANSWERS, f"{message} came for a {kind.__name__}")
        if isinstance(message, LookedUp | Loading | Acquired | Reserved) and ask is not None:
            if message.request != ask.number:
                violated(Invariant.ANSWERS, f"{message} came for {ask}")
            match message:
                case Loading():
                    self.awaited[ask.number] = ask
                    if self.site.world.chance(0.3):
                        self.site.world.after(5.0, lambda: self._lose_patience(ask))
                case LookedUp():
                    if not ask.is_given_up:
                        self._acquire(ask)
                case Acquired():
                    self._acquired(ask, message)
                case Reserved() if isinstance(asked, Reserve):
                    self._reserved(ask, asked, message)

    def _lose_patience(self, ask: Ask) -> None:
        """Go on without what still hasn't come from the disk."""
        if self.awaited.get(ask.number) is ask:
            self.awaited[ask.number] = replace(ask, is_given_up=True)
            self._reserve(ask, 0)

    def _acquired(self, ask: Ask, answer: Acquired) -> None:
        random = self.site.world.random
        odd = self.site.world.chance(0.02)  # the time of another server's clock, or nonsense
        ask.acquired_at = random.choice((nan, inf, -inf, 5e5, 1e7)) if odd else answer.acquired_at
        if answer.lease and (ask.is_given_up or random.random() < 0.1):
            self._send(Release(answer.lease))  # never became a load
        elif answer.lease:
            keys = ask.keys[ask.start : answer.ready] + ask.states[answer.ready - 1 : answer.ready]
            pieces = [self._piece(ask, key, extent) for key, extent in zip(keys, answer.extents, strict=True)]
            self._start(Operation(ask, self.incarnation, answer.lease, is_write=False, pieces=pieces))
        for _ in range(2 if ask.states else 1):  # states come to be in one step after the other
            start = random.choice((0, 0, 0, min(answer.ready, len(ask.keys)), random.randint(0, len(ask.keys))))
            self.site.world.after(random.choice((1.0, 20.0)), partial(self._reserve, ask, start))

    def _reserved(self, ask: Ask, asked: Reserve, answer: Reserved) -> None:
        if not answer.lease:
            return
        if ask.is_given_up:
            self._send(Abort(answer.lease))  # nothing was written yet
            return
        pieces = [self._piece(ask, asked.keys[grant.index], grant.extent) for grant in answer.grants]
        self._start(Operation(ask, self.incarnation, answer.lease, is_write=True, pieces=pieces))

    def _piece(self, ask: Ask, key: Key, extent: Extent) -> Piece:
        is_state = key in ask.states
        return Piece(key, extent, self.namespace.state_bytes if is_state else self.namespace.block_bytes)

    # Operations

    def _start(self, operation: Operation) -> None:
        self.operations.append(operation)
        for worker in self.workers:
            self.site.world.after(1.0, lambda worker=worker: worker.perform(operation))  # type: ignore[misc]

    def reported(self, operation: Operation, rank: int, *, ok: bool) -> None:
        """Take a worker's report; with the last of them the lease goes back."""
        if not self.is_alive or operation not in self.operations:
            return  # of an earlier incarnation: its leases fell, or fall, with its connections
        if self._is_frozen:
            self._thawed.append(lambda: self.reported(operation, rank, ok=ok))
            return
        operation.ok_by_rank[rank] = ok
        if self.is_complete(operation):
            self.operations.remove(operation)
            self._finish(operation)

    def is_complete(self, operation: Operation) -> bool:
        """Return whether every rank has stopped touching the arena for an operation."""
        return len(operation.ok_by_rank) == len(self.workers)

    def _finish(self, operation: Operation) -> None:
        ok = all(operation.ok_by_rank.values())
        if operation.is_write:
            self._send(Commit(operation.lease) if ok else Abort(operation.lease))
            return
        if not ok:
            bad = self.site.world.random.choice(operation.pieces)
            self._send(Discard(operation.ask.user.id, bad.key, operation.ask.user.tenant))
        self._send(Release(operation.lease))

    # Faults

    def freeze(self, duration: float) -> None:
        """Do nothing for a while; what comes in piles up. Workers go on."""
        if not self._is_frozen:
            self._is_frozen = True
            link = self.link
            if link is not None:
                link.to_client.freeze()
            self.site.world.after(duration, lambda: self._thaw(link))

    def _thaw(self, link: Link | None) -> None:
        self._is_frozen = False
        if link is not None:
            link.to_client.thaw()
        thawed, self._thawed = self._thawed, []
        for report in thawed:
            report()

    def die_scheduler_first(self) -> None:
        """Lose the scheduler; the workers copy on until they notice, or are told, or die."""
        if self.is_alive:
            self.is_alive = False
            if self.link is not None:
                self.link.close_by_client(losing=self.site.world.chance(0.5))
                self.link = None
            for worker in self.workers:
                self.site.world.after(5 * self.site.copy_delay, worker.die)

    def die_at_once(self) -> None:
        """Lose the whole process tree."""
        self.die_scheduler_first()
        for worker in self.workers:
            worker.die()

    def stop(self) -> None:
        """Go in good order: the session is closed, and every worker ends when it has drained."""
        self.is_stopping = True
        self.leave()
        self.is_alive = False
        for worker in self.workers:
            worker.drain()
