"""A server among strangers: the real loop and cache behind a real socket, and peers that send whatever a script says.

    script ──► peers ──► socket ──► Loop ──► wire ──► Cache.handle ──► the simulator's invariants, after every event

Among the peers is one engine that behaves. It must get its right answer after everything that the others do, on the
connection that it had from the beginning. At the end all hang up, and nothing may be left.
"""

import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from struct import Struct as Layout
from typing import Any

import msgspec

from fuzz.script import Script
from saltern.core.cache import Cache
from saltern.core.effects import Effect, Event
from saltern.core.extents import Extent
from saltern.core.keys import KEY_BYTES, USER_ID_BYTES, Key, UserId
from saltern.core.messages import (
    DEFAULT_TENANT,
    NAME_BYTES,
    Abort,
    Acquire,
    Acquired,
    Commit,
    Discard,
    GetStats,
    LookedUp,
    Lookup,
    Release,
    Reply,
    Request,
    Reserve,
    Reserved,
    SchedulerHello,
    WorkerHello,
)
from saltern.core.tenants import Limits
from saltern.server.arena import Arena
from saltern.server.listener import Listener
from saltern.server.logs import _Json, _Plain
from saltern.server.loop import Loop
from saltern.wire import client_wire, encode
from tests.simulator import arena as simulated
from tests.simulator.erasures import Erasures
from tests.simulator.invariants import Checker

PAGE = 4096
PAGES = 16
LIMITS = Limits(limit_bytes=14 * PAGE, user_limit_bytes=6 * PAGE)
PEERS_MAX = 8
CONNECTIONS_MAX = 9  # the neighbour's two among them, so that a peer can be one too many
TURNS = 6  # of the loop after each act: a connection is accepted in one, read and answered in the next

USERS = tuple(UserId(bytes([number]) * USER_ID_BYTES) for number in range(3))
KEYS = tuple(Key(bytes([number]) * KEY_BYTES) for number in range(6))
STATES = (*(Key(bytes([number + 99]) * KEY_BYTES) for number in range(5)), KEYS[0])
NAMES = tuple(bytes([number]) * NAME_BYTES for number in range(4))

VERBS: tuple[type[Request], ...] = (Reserve, Commit, Acquire, Reserve, Commit, Release, Lookup, Abort, Discard)
REQUESTS: tuple[type[Request], ...] = (*VERBS, GetStats, SchedulerHello, WorkerHello)

POOL_BY_FIELD: dict[str, tuple[Any, ...]] = {
    "engine": ("a", "b", "", 'a" level=\x1b[2J\nforged: line', "\u2028\x85𝄞" * 60),
    "incarnation": NAMES,
    "name": NAMES,
    "block_bytes": (PAGE, 2 * PAGE, 1, PAGE + 1, 7 * PAGE, (PAGES + 1) * PAGE, 2**63, 2**64 - 1),
    "state_bytes": (0, PAGE, 3 * PAGE, 2**64 - 1),
    "rank": (0, 1, 2**63),
    "world_size": (1, 2, 2**64 - 1),
    "outlives_socket": (False, True),
    "request": (1, 0, -1, -(2**63), 2**64 - 1),
    "user": USERS,
    "start": (0, 0, 0, 1, 2, 5, 2**64 - 1),
    "acquired_at": (float("inf"), 0.0, 1.0, -1.0, 1e308, -1e308, float("nan"), float("-inf"), 7),
    "began_at": (float("inf"), 0.0, 1.0, -1.0, float("nan"), float("-inf"), 7),
    "block_seconds": (0.0, 0.0, 1.0, -1.0, 1e308, float("inf"), float("nan"), float("-inf"), 7),
    "ends_in_state": (False, False, True),
    "key": KEYS,
    "tenant": ("default", "default", "acme", "public", "", "x" * 64),
    "root": (b"", b"r" * KEY_BYTES),
    "block_tokens": (0, 16, 2**64 - 1),
}
"""Values of the right type for each field of a request, few enough that peers meet."""

ODDITIES: tuple[Any, ...] = (
    None, True, -1, 0, 2**64 - 1, 1.5, "", b"", b"short", "x" * 300, [], [b"short"], [[[]]], {}, {"a": 1}, [1] * 40,
)  # fmt: skip
"""Values of the wrong type, at least for most fields."""

_LENGTH = Layout("<I")


def play(data: bytes) -> None:
    """Do what a script says. Raises if the server breaks, a claim of the simulator does, or its neighbour notices."""
    script = Script(data)
    with _stage() as stage:
        neighbour = _Neighbour(stage)
        while not script.is_over:
            script.choice(ACTS)(stage, script)
            stage.turn()
            neighbour.check()
        neighbour.leave()
        stage.clear()


class _Checked(Cache):
    """The cache, held to the simulator's invariants after every event."""

    def __init__(self) -> None:
        tenants = {DEFAULT_TENANT: LIMITS}
        super().__init__(pages=PAGES, page_bytes=PAGE, tenants=tenants, naming_secret=bytes(32))
        erasures = Erasures({}, 0.0)  # there are none
        arena = _Unwritten(pages=PAGES, page_bytes=1, erasures=erasures)
        self.checker = Checker(self, arena, None, erasures, tenants=tenants, disk_tenants={}, in_flight_max_bytes=None)

    def handle(self, event: Event, now: float) -> list[Effect]:
        effects = super().handle(event, now)
        self.checker.check(event, effects, self._now)
        return effects


class _Unwritten(simulated.Arena):
    """An arena that nobody writes to, since peers here only talk: what a block holds says nothing."""

    def check_content(self, user: UserId, key: Key, extent: Extent) -> None:
        """Take any content for right."""


class _Peer:
    """One connection, and the leases that came in on it."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.socket.setblocking(False)
        self.wire = client_wire()
        self.leases: list[int] = []

    def send(self, data: bytes) -> None:
        """Send, unless the server has closed."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.socket.send(data)

    def receive(self) -> list[Reply]:
        """Return what is there. Raises `ProtocolError` if the server sends what nobody could read."""
        replies: list[Reply] = []
        with suppress(BlockingIOError, ConnectionResetError):
            replies = self.wire.feed(self.socket.recv(1 << 20))  # the arena's descriptor is dropped by the kernel
        self.leases += [reply.lease for reply in replies if isinstance(reply, Acquired | Reserved) and reply.lease]
        return replies


class _Stage:
    """The server, in whose loop everybody waits for a turn, and the peers that behave badly."""

    def __init__(self, folder: Path, arena: Arena) -> None:
        self.path = folder / "s.sock"
        self.cache = _Checked()
        self.loop = Loop(
            self.cache, arena, Listener(self.path), uids=frozenset({os.getuid()}), connections_max=CONNECTIONS_MAX
        )
        self.loop.stop()  # so that a turn never waits; we take them one by one
        self.peers: list[_Peer] = []
        self.engines: list[_Peer] = []  # those of them that opened a session

    def turn(self) -> None:
        """Let the loop do all that there is to do."""
        for _ in range(TURNS):
            self.loop._turn()
        while self.loop._unhandled:
            self.loop._turn()
        for peer in self.peers:
            peer.receive()

    def clear(self) -> None:
        """Have all hang up, and check that nothing is left."""
        for peer in self.peers:
            peer.socket.close()
        while self.loop._connection_by_fd:
            self.loop._turn()
        for pidfd in list(self.loop._ended_by_pidfd):
            self.loop._process_ended(pidfd)  # of this process, which here stands for all engines
        self.cache.checker.check_drained()

    def close(self) -> None:
        """Let go of everything, also after a finding."""
        for peer in self.peers:
            peer.socket.close()
        self.loop._close()


@contextmanager
def _stage() -> Iterator[_Stage]:
    folder = Path(tempfile.mkdtemp(prefix="saltern-"))
    arena = Arena(total_bytes=PAGES * PAGE, huge_pages=False)
    log = logging.getLogger("saltern")
    kept = log.handlers[:], log.propagate, log.level
    log.handlers[:], log.propagate = [_Reader()], False
    log.setLevel(logging.DEBUG)
    try:
        stage = _Stage(folder, arena)
        try:
            yield stage
        finally:
            stage.close()
    finally:
        log.handlers[:], log.propagate = kept[:2]
        log.setLevel(kept[2])
        arena.close()
        shutil.rmtree(folder)


class _Reader(logging.Handler):
    """Reads the log as an operator's tools do: a record is one line, whatever name a peer has chosen."""

    def __init__(self) -> None:
        super().__init__()
        self._plain = _Plain()
        self._json = _Json()

    def emit(self, record: logging.LogRecord) -> None:
        plain = self._plain.format(record)
        assert plain.isprintable(), f"a peer writes the log: {plain!r}"
        json.loads(self._json.format(record))


class _Neighbour:
    """An engine that behaves: it stores two blocks, pins them, and finds them until it leaves."""

    USER = UserId(b"n" * USER_ID_BYTES)
    CHAIN = (Key(b"n" * KEY_BYTES), Key(b"m" * KEY_BYTES))

    def __init__(self, stage: _Stage) -> None:
        self._stage = stage
        self._numbers = 0
        self._lifeline, self._control = _Peer(stage.path), _Peer(stage.path)
        worker = WorkerHello("neighbour", b"n" * NAME_BYTES, rank=0, world_size=1, outlives_socket=False)
        self._lifeline.send(self._lifeline.wire.preamble + encode(worker))
        hello = SchedulerHello("neighbour", b"n" * NAME_BYTES, (b"n" * NAME_BYTES,), block_bytes=PAGE)
        self._control.send(self._control.wire.preamble + encode(hello))
        stage.turn()
        self._control.receive()
        reserved = self._ask(Reserve(0, self.USER, self.CHAIN, start=0, acquired_at=float("inf")))
        assert isinstance(reserved, Reserved), reserved
        self._control.send(encode(Commit(reserved.lease)))
        acquired = self._ask(Acquire(0, self.USER, self.CHAIN, start=0))
        assert isinstance(acquired, Acquired), acquired
        self._lease = acquired.lease

    def check(self) -> None:
        """Ask for what is there, and get exactly that."""
        self._numbers += 1
        answer = self._ask(Lookup(self._numbers, self.USER, self.CHAIN))
        assert answer == LookedUp(self._numbers, ready=2), f"the neighbour was answered {answer}"

    def leave(self) -> None:
        """Give everything back and hang up."""
        self._control.send(encode(Release(self._lease)))
        self.check()
        for peer in (self._control, self._lifeline):
            peer.socket.close()

    def _ask(self, message: Lookup | Acquire | Reserve) -> Reply:
        self._control.send(encode(message))
        self._stage.turn()
        (reply,) = self._control.receive()
        return reply


# What peers do


def _connect(stage: _Stage, preamble: bytes) -> _Peer:
    peer = _Peer(stage.path)
    peer.send(preamble)
    stage.peers.append(peer)
    return peer


def _greet(stage: _Stage, script: Script) -> None:
    """Open a session as an engine should: what comes after it can do more harm than without one."""
    if len(stage.peers) + 2 > PEERS_MAX:
        return
    name = script.choice(NAMES)
    lifeline = {"name": name, "rank": 0, "world_size": 1}
    control = {"workers": [name], "block_bytes": script.choice((PAGE, PAGE, 2 * PAGE, PAGE + 1))}
    worker, engine = (_connect(stage, client_wire().preamble) for _ in range(2))
    worker.send(_frame(WorkerHello, worker, script, lifeline))
    engine.send(_frame(SchedulerHello, engine, script, control))
    stage.engines.append(engine)


def _say(stage: _Stage, script: Script) -> None:
    """Have an engine send what is well formed, and be it mad."""
    if stage.engines:
        peer = script.choice(stage.engines)
        peer.send(_frame(script.choice(VERBS), peer, script, {}))


def _say_anything(stage: _Stage, script: Script) -> None:
    """Have anybody send anything, perhaps with a field or some bytes changed."""
    if stage.peers:
        peer = script.choice(stage.peers)
        kind = script.choice(REQUESTS)
        values = _values(kind, peer, script, {})
        if values and script.number(2):
            values[script.number(len(values))] = script.choice(ODDITIES)
        frame = bytearray(_packed(kind, values))
        for _ in range(script.number(3)):
            frame[script.number(min(len(frame), 256))] = script.number(256)
        peer.send(bytes(frame))


def _send_bytes(stage: _Stage, script: Script) -> None:
    if stage.peers:
        script.choice(stage.peers).send(script.take(script.number(40)))


def _send_payload(stage: _Stage, script: Script) -> None:
    """Send bytes under a length: the right one, or any other."""
    if stage.peers:
        payload = script.take(script.number(60))
        length = script.choice((len(payload), len(payload), len(payload), 0, 2**32 - 1, 8 * 2**20))
        script.choice(stage.peers).send(_LENGTH.pack(length) + payload)


def _intrude(stage: _Stage, script: Script) -> None:
    """Connect without a word, or with another than an engine's."""
    if len(stage.peers) < PEERS_MAX:
        ours = client_wire().preamble
        _connect(
            stage, script.choice((ours, ours, b"", b"S", b"SALT\0\0\0\0", b"SALT\1\0\xff\xff", b"GET / HTTP/1.1\r\n"))
        )


def _hang_up(stage: _Stage, script: Script) -> None:
    if stage.peers:
        peer = stage.peers.pop(script.number(len(stage.peers)))
        peer.socket.close()
        if peer in stage.engines:
            stage.engines.remove(peer)


def _half_close(stage: _Stage, script: Script) -> None:
    if stage.peers:
        with suppress(OSError):  # the server was faster
            script.choice(stage.peers).socket.shutdown(script.choice((socket.SHUT_WR, socket.SHUT_RD)))


ACTS: tuple[Callable[[_Stage, Script], None], ...] = (
    _greet, _say, _say, _say, _say, _say, _say, _say_anything, _greet, _say, _say, _say, _intrude, _hang_up,
    _send_bytes, _send_payload, _half_close,
)  # fmt: skip


def _frame(kind: type[Request], peer: _Peer, script: Script, fixed: dict[str, Any]) -> bytes:
    return _packed(kind, _values(kind, peer, script, fixed))


def _packed(kind: type[Request], values: list[Any]) -> bytes:
    """Encode a message by hand: ours would refuse to."""
    payload = msgspec.msgpack.encode([kind.__struct_config__.tag, *values])
    return _LENGTH.pack(len(payload)) + payload


def _values(kind: type[Request], peer: _Peer, script: Script, fixed: dict[str, Any]) -> list[Any]:
    names = [field.name for field in msgspec.structs.fields(kind)]
    return [fixed[name] if name in fixed else _value(name, peer, script) for name in names]


def _value(name: str, peer: _Peer, script: Script) -> Any:
    match name:
        case "workers":
            return [script.choice(NAMES), *script.several(NAMES, 2)]
        case "keys":
            chain = KEYS[: script.number(len(KEYS) + 1)]
            return script.several(KEYS, 5) if script.number(3) == 2 else chain  # else in any order, and again
        case "states" | "public":
            return script.several(STATES, 5) if script.number(2) else ()
        case "lease":
            return script.choice((*peer.leases[-3:], *range(4)))
        case _:
            return script.choice(POOL_BY_FIELD[name])
