"""An engine of a simulation: a scheduler and its workers, which behave as the connector does.

    ask      Lookup? → Acquire → read → Release (and Discard, if a block was bad) → Reserve → write → Commit | Abort
    worker   WorkerHello → Welcome → Attached → copies … SessionEnded → drains → closes → WorkerHello

An ask may be given up at any time; what is answered later is released or aborted at once. A lease is given
back only when every worker has reported; a lost worker's report never comes, and then the lease falls with
the session. Workers copy only for the incarnation that they are attached to.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from math import inf, nan
from typing import Protocol

from saltern.core.extents import Extent
from saltern.core.keys import Content, Key, UserId, UserKey, block_key, namespace_content, next_content
from saltern.core.messages import (
    Abort,
    Acquire,
    Acquired,
    Attached,
    Commit,
    Discard,
    LeaseId,
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
from tests.simulator.arena import Arena
from tests.simulator.claims import Invariant, violated
from tests.simulator.server import Process, Server
from tests.simulator.world import Link, World


@dataclass(frozen=True)
class Namespace:
    """One model and layout; engines of the same namespace share blocks."""

    name: bytes
    world_size: int
    shard_bytes: int

    @property
    def block_bytes(self) -> int:
        """Return the size of a block with the shards of all ranks."""
        return self.world_size * self.shard_bytes


@dataclass(frozen=True)
class User:
    """A user as engines know it. Users may have equal keys: isolation must not hang on keys alone."""

    id: UserId
    key: UserKey

    def keys(self, namespace: Namespace, prompt: tuple[int, ...]) -> tuple[Key, ...]:
        """Name the blocks of a prompt, one token a block."""
        content: Content = namespace_content(namespace.name)
        keys = []
        for token in prompt:
            content = next_content(content, token.to_bytes(4, "little"))
            keys.append(block_key(self.key, content))
        return tuple(keys)


class Site(Protocol):
    """What engines share: the users and prompts, the habits of this run, and the server, if it is up."""

    world: World
    server: Server | None
    users: list[User]
    is_calm: bool
    copy_delay: float
    retry_delay: float
    failure_rate: float
    give_up_rate: float
    prompts: list[tuple[int, ...]]

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
    start: int
    is_given_up: bool = False
    acquired_at: float = 0.0


@dataclass(frozen=True)
class Piece:
    """One block of an operation."""

    key: Key
    extent: Extent


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
        namespace = worker.engine.namespace
        self._offset = worker.rank * namespace.shard_bytes
        end = self._offset + namespace.shard_bytes
        self._cells = [
            arena.cells(piece.extent, namespace.block_bytes)[self._offset : end] for piece in operation.pieces
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
        if self.operation.is_write:
            half = len(cells) // 2
            done, offset = (cells[half:], half) if self._is_half_done else (cells[:half], 0)
            self._arena.write(done, self.operation.ask.user.id, piece.key, self._offset + offset)
        else:
            self._arena.check_read(cells, self.operation.ask.user.id, piece.key, self._offset)
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
        self.pending: deque[tuple[type[Reply], Ask | None]] = deque()  # what awaits an answer, in order
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
        self.pending.append((Welcome, None))
        self.link.to_server.send(self.hello())

    def hello(self) -> SchedulerHello:
        """Return what opens the session of this incarnation."""
        return SchedulerHello(
            engine=self.name,
            incarnation=self.incarnation,
            workers=tuple(worker.name for worker in self.workers),
            block_bytes=self.namespace.block_bytes,
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
            case Welcome() | LookedUp() | Acquired() | Reserved():
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
        self.operations.clear()
        self.site.world.after(self.site.retry_delay, self.connect)

    def _send(self, message: Request) -> None:
        if self.link is not None:
            self.link.to_server.send(message)

    def _ask(self, message: Request, kind: type[Reply], ask: Ask) -> None:
        self.pending.append((kind, ask))
        self._send(message)

    # Requests

    def begin_request(self) -> None:
        """Take a request of one of the users for one of the prompts."""
        random = self.site.world.random
        if self.link is None or not self.is_alive or self.is_stopping or self._is_frozen:
            return
        user = random.choice(self.site.users)
        prompt = random.choice(self.site.prompts)
        keys = user.keys(self.namespace, prompt[: random.randint(1, len(prompt))])
        start = random.choice((0, 0, random.randint(0, len(keys))))
        ask = Ask(next(self._numbers), user, keys, start)
        if self.site.world.chance(self.site.give_up_rate):
            self.site.world.after(10.0, lambda: self.give_up(ask))
        if random.random() < 0.5:
            self._ask(Lookup(ask.number, user.id, keys), LookedUp, ask)
        else:
            self._acquire(ask)

    def give_up(self, ask: Ask) -> None:
        """The client went away; nothing that comes later is of use."""
        ask.is_given_up = True

    def _acquire(self, ask: Ask) -> None:
        self._ask(Acquire(ask.number, ask.user.id, ask.keys, ask.start), Acquired, ask)

    def _reserve(self, ask: Ask, start: int) -> None:
        if self.link is not None and not ask.is_given_up:
            self._ask(Reserve(ask.number, ask.user.id, ask.keys, start, ask.acquired_at), Reserved, ask)

    def _answered(self, message: Reply) -> None:
        if not self.pending:
            violated(Invariant.ANSWERS, f"nobody asked for {message}")
        kind, ask = self.pending.popleft()
        if type(message) is not kind:
            violated(Invariant.ANSWERS, f"{message} came for a {kind.__name__}")
        if isinstance(message, LookedUp | Acquired | Reserved) and ask is not None:
            if message.request != ask.number:
                violated(Invariant.ANSWERS, f"{message} came for {ask}")
            match message:
                case LookedUp():
                    if not ask.is_given_up:
                        self._acquire(ask)
                case Acquired():
                    self._acquired(ask, message)
                case Reserved():
                    self._reserved(ask, message)

    def _acquired(self, ask: Ask, answer: Acquired) -> None:
        random = self.site.world.random
        odd = self.site.world.chance(0.02)  # the time of another server's clock, or nonsense
        ask.acquired_at = random.choice((nan, inf, -inf, 5e5, 1e7)) if odd else answer.acquired_at
        if answer.lease and (ask.is_given_up or random.random() < 0.1):
            self._send(Release(answer.lease))  # never became a load
        elif answer.lease:
            keys = ask.keys[ask.start : answer.ready]
            pieces = [Piece(key, extent) for key, extent in zip(keys, answer.extents, strict=True)]
            self._start(Operation(ask, self.incarnation, answer.lease, is_write=False, pieces=pieces))
        start = random.choice((0, 0, 0, min(answer.ready, len(ask.keys)), random.randint(0, len(ask.keys))))
        self.site.world.after(random.choice((1.0, 20.0)), lambda: self._reserve(ask, start))

    def _reserved(self, ask: Ask, answer: Reserved) -> None:
        if not answer.lease:
            return
        if ask.is_given_up:
            self._send(Abort(answer.lease))  # nothing was written yet
            return
        pieces = [Piece(ask.keys[grant.index], grant.extent) for grant in answer.grants]
        self._start(Operation(ask, self.incarnation, answer.lease, is_write=True, pieces=pieces))

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
            self._send(Discard(operation.ask.user.id, bad.key))
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
