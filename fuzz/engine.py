"""An engine whose server is a stranger: the real planner, session and socket, and answers that a script makes up.

    script ──► vLLM's hooks, in an order that vLLM may choose ──► Planner ──► Session ──► Control ──► socket
           ──► answers: right ones, late ones, mad ones, bytes ────────────────────────────────────────┘

Whatever it is told, the planner may not raise, promise tokens that a request doesn't have, name blocks that aren't the
request's, or keep a block for ever. That it loads what it is told to is no finding: a server is trusted with bytes.
"""

import logging
import shutil
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from struct import Struct as Layout
from typing import Any

import msgspec

from fuzz.script import Script
from saltern.core.extents import Run
from saltern.core.messages import (
    NAME_BYTES,
    Acquire,
    Acquired,
    Attached,
    Grant,
    Loading,
    LookedUp,
    Lookup,
    Refusal,
    Refused,
    Reply,
    Request,
    Reserve,
    Reserved,
    SchedulerHello,
    SessionEnded,
    Stats,
    Welcome,
)
from saltern.vllm.copies import Copies, Reports
from saltern.vllm.geometry import Geometry, Group
from saltern.vllm.planner import Planner
from saltern.vllm.session import RETRY_SECONDS_MAX, Session
from saltern.vllm.settings import StoreMode
from saltern.wire import ProtocolError, encode, server_wire
from tests.vllm.engine import ENGINE_BLOCK_TOKENS, PATIENCE_SECONDS, FakeBlocks, FakeRequest
from tests.vllm.server import Clock

BLOCKS = 64
SLOTS = 2
RANKS = 2
REQUESTS_MAX = 4

NUMBERS = (0, 1, 2, 3, 5, -1, 2**31, 2**63, -(2**63), 2**64 - 1)
ODDITIES: tuple[Any, ...] = (None, True, 1.5, "", b"", "x" * 300, [], [[]], {}, [1] * 40, float("nan"))

TIMES = (1.0, 0.0, -1.0, 1e308, float("inf"), float("nan"))

_EXTENT = (Run(start=0, count=1),)
_LENGTH = Layout("<I")


def play(data: bytes) -> None:
    """Do what a script says. Raises if the planner does, or claims or keeps what it shouldn't."""
    script = Script(data)
    was_disabled = logging.root.manager.disable
    logging.disable()  # what the engine says of such a server is no finding
    folder = Path(tempfile.mkdtemp(prefix="saltern-"))
    stage = _Stage(folder / "s.sock")
    try:
        while not script.is_over:
            script.choice(ACTS)(stage, script)
        stage.clear()
    finally:
        stage.close()
        logging.disable(was_disabled)
        shutil.rmtree(folder)


class _Ticking(Clock):
    """A clock that passes as it is looked at, so that who waits for an answer comes to an end."""

    def __call__(self) -> float:
        self.now += 1e-4
        return self.now


class _Stage:
    """The engine's side, and the socket that a stranger listens on."""

    def __init__(self, path: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.listener.bind(str(path))
        self.listener.listen()
        self.line: socket.socket | None = None
        self.wire = server_wire()
        self.asked: list[Request] = []  # and not answered
        self.clock = _Ticking()
        self.blocks = FakeBlocks(BLOCKS)
        self.session = Session(
            str(path),
            engine="engine",
            workers=tuple(bytes([rank]) * NAME_BYTES for rank in range(RANKS)),
            block_bytes=4096,
            clock=self.clock,
        )
        self.planner = Planner(
            session=self.session,
            blocks=self.blocks,
            geometry=Geometry(SLOTS * ENGINE_BLOCK_TOKENS, (Group(ENGINE_BLOCK_TOKENS),)),
            namespace=b"model",
            ranks=RANKS,
            store=StoreMode.ALL,
            naming_secret=None,
            patience_seconds=PATIENCE_SECONDS,
            clock=self.clock,
        )
        self.requests: list[FakeRequest] = []
        self.operations: list[tuple[int, int]] = []  # under way, each with the ranks that have not reported
        self.arrived = 0

    def listen(self) -> None:
        """Take the engine's connection and what it has sent."""
        with suppress(BlockingIOError):
            accepted, _ = self.listener.accept()
            if self.line is not None:
                self.line.close()
            self.line, self.wire = accepted, server_wire()
            self.line.setblocking(False)
            self.say(self.wire.preamble)
        if self.line is not None:
            with suppress(BlockingIOError, ConnectionResetError):
                self.asked += self.wire.feed(self.line.recv(1 << 20))

    def say(self, data: bytes) -> None:
        """Send bytes to the engine, if it is connected."""
        if self.line is not None:
            with suppress(BrokenPipeError, ConnectionResetError, BlockingIOError):
                self.line.send(data)

    def begin(self, copies: Copies) -> None:
        """Hand copies to the workers, who check what they may touch."""
        for copy in copies.stores:
            for piece in copy.pieces:
                assert all(self.blocks.held[block] for block in piece.engine_blocks), f"{piece} is not held"
        for copy in (*copies.loads, *copies.stores):
            self.operations.append((copy.op_id, RANKS))

    def clear(self) -> None:
        """End all, and check that nothing is kept."""
        for request in list(self.requests):
            _end(self, request)
        if self.line is not None:
            self.line.close()
            self.line = None
        self.listener.close()
        for _ in range(4):
            self.clock.advance(PATIENCE_SECONDS + RETRY_SECONDS_MAX)
            self.begin(self.planner.plan({}, lambda _: None))
            for op_id, ranks in self.operations:
                self.planner.report(Reports(failed={op_id: ranks}))
            self.operations.clear()
        left = {name: count for name, count in self.planner.leftovers.items() if count}
        assert not left, f"the engine keeps {left}"
        assert not self.blocks.held.total(), "blocks are held that nobody counts"
        assert self.blocks.available == BLOCKS - 1, "blocks are lost"

    def close(self) -> None:
        """Let go of everything, also after a finding."""
        self.session.close()
        self.listener.close()
        if self.line is not None:
            self.line.close()


# What vLLM does


def _arrive(stage: _Stage, script: Script) -> None:
    if len(stage.requests) < REQUESTS_MAX:
        tokens = [script.number(2)] * script.choice((4, 8, 12, 9, 3, 16))
        stage.arrived += 1
        request = FakeRequest(f"request-{stage.arrived}", script.choice(("", "alice")), tokens, len(tokens))
        stage.requests.append(request)
        stage.planner.add(request, request.salt)


def _schedule(stage: _Stage, script: Script) -> None:
    """Do what one `schedule()` does for the requests, and hand on the copies."""
    scheduled: dict[str, int] = {}
    for request in stage.requests:
        if request.is_loading:
            continue
        if request.num_computed_tokens == 0 and not _admit(stage, script, request):
            continue
        tokens = request.num_tokens - request.num_computed_tokens
        scheduled[request.request_id] = min(tokens, script.choice((64, 4, 3)))
    by_id = {request.request_id: request for request in stage.requests}
    stage.begin(stage.planner.plan(scheduled, lambda request_id: (by_id[request_id].block_ids,)))
    for request_id, tokens in scheduled.items():
        request = by_id[request_id]
        request.num_computed_tokens += tokens
        if request.num_computed_tokens == request.num_tokens < 24:
            request.all_token_ids.append(script.number(2))
    stage.clock.advance(script.choice((0.001, 0.01, PATIENCE_SECONDS, RETRY_SECONDS_MAX)))


def _admit(stage: _Stage, script: Script, request: FakeRequest) -> bool:
    """Ask what can be loaded, and give the request blocks."""
    local = script.choice((0, 0, 0, 2, 4))
    local = min(local, (request.num_tokens - 1) // ENGINE_BLOCK_TOKENS * ENGINE_BLOCK_TOKENS)
    matched = stage.planner.match(request.request_id, local)
    if matched is None:
        return False
    assert 0 <= matched <= request.num_tokens - local, f"{matched} of {request.num_tokens - local} tokens were promised"
    assert not matched % ENGINE_BLOCK_TOKENS, f"{matched} tokens are no whole blocks"
    wanted = -(-24 // ENGINE_BLOCK_TOKENS) - len(request.block_ids)
    if script.number(8) == 7 or (blocks := stage.blocks.allocate(wanted)) is None:
        return False  # asked again later, with nothing said in between
    request.block_ids += blocks
    request.num_computed_tokens = local + matched
    stage.planner.admit(request.request_id, (request.block_ids,), matched)
    request.is_loading = matched > 0
    return not request.is_loading


def _report(stage: _Stage, script: Script) -> None:
    """Have ranks end copies, well or badly."""
    if stage.operations:
        op_id, ranks = stage.operations.pop(script.number(len(stage.operations)))
        if ranks > 1:
            stage.operations.append((op_id, ranks - 1))
        failed = script.number(4) == 3
        untouched = {op_id: 1} if failed and script.number(2) else {}
        stage.planner.report(
            Reports(done={} if failed else {op_id: 1}, failed={op_id: 1} if failed else {}, untouched=untouched)
        )


def _loaded(stage: _Stage, script: Script) -> None:
    """Let a request run whose load is over, or compute all itself."""
    loading = [request for request in stage.requests if request.is_loading]
    if loading and not stage.operations:
        request = script.choice(loading)
        request.is_loading = False
        stage.planner.admit(request.request_id, (), 0)


def _preempt(stage: _Stage, script: Script) -> None:
    running = [request for request in stage.requests if request.block_ids and not request.is_loading]
    if running:
        request = script.choice(running)
        stage.blocks.give_back(request.block_ids)
        request.block_ids.clear()
        request.num_computed_tokens = 0


def _finish(stage: _Stage, script: Script) -> None:
    if stage.requests:
        _end(stage, script.choice(stage.requests))


def _end(stage: _Stage, request: FakeRequest) -> None:
    stage.requests.remove(request)
    stage.planner.remove(request.request_id)
    stage.blocks.give_back(request.block_ids)


def _reset(stage: _Stage, script: Script) -> None:
    stage.planner.reset(script.take(1))


# What the stranger does


def _serve(stage: _Stage, script: Script) -> None:
    """Answer as a server would, but for a number here and there."""
    with suppress(ProtocolError):
        stage.listen()
    asked, stage.asked = stage.asked, []
    for ask in asked:
        for reply in _answers(ask, script):
            stage.say(encode(reply))


def _answers(ask: Request, script: Script) -> list[Reply]:
    match ask:
        case SchedulerHello():
            return [Welcome(4096, 4096, script.take(script.number(3))), Attached(ask.incarnation)]
        case Lookup():
            return [LookedUp(_twisted(ask.request, script), ready=_twisted(len(ask.keys), script))]
        case Acquire():
            ready = _twisted(script.number(len(ask.keys) + 1), script)
            extents = (_EXTENT,) * min(_twisted(max(ready - ask.start, 0), script), 64)
            lease = _twisted(int(ready > ask.start), script)
            acquired = Acquired(_twisted(ask.request, script), lease, script.choice(TIMES), ready, extents)
            blocks = _twisted(len(ask.keys), script)
            loading = Loading(_twisted(ask.request, script), blocks, script.choice((0.1, *TIMES)))
            return script.choice(([acquired], [acquired], [loading], [loading, acquired], [loading, loading]))
        case Reserve():
            indices = [index for index in range(ask.start, len(ask.keys)) if script.number(4)]
            grants = tuple(Grant(_twisted(index, script), _EXTENT) for index in indices)
            refusal = script.choice((None, None, *Refusal))
            upto = _twisted(len(ask.keys), script)
            return [Reserved(_twisted(ask.request, script), int(bool(grants)), grants, upto, refusal)]
        case _:
            return []


def _twisted(number: int, script: Script) -> int:
    """Return a number, or sometimes another."""
    return script.choice(NUMBERS) if script.number(16) == 15 else number


def _serve_nonsense(stage: _Stage, script: Script) -> None:
    """Send a reply that nobody asked for, or one that none is."""
    kind = script.choice((LookedUp, Loading, Acquired, Reserved, Refused, SessionEnded, Attached, Welcome, Stats))
    values = [script.choice((script.number(30), *NUMBERS, *ODDITIES)) for _ in range(script.number(6))]
    payload = msgspec.msgpack.encode([kind.__struct_config__.tag, *values])
    stage.say(_LENGTH.pack(len(payload)) + payload)


def _serve_bytes(stage: _Stage, script: Script) -> None:
    stage.say(script.take(script.number(40)))


def _hang_up(stage: _Stage, script: Script) -> None:
    if stage.line is not None:
        stage.line.close()
        stage.line = None


ACTS: tuple[Callable[[_Stage, Script], None], ...] = (
    _arrive, _serve, _schedule, _serve, _schedule, _report, _schedule, _report, _loaded, _serve, _arrive, _finish,
    _preempt, _reset, _serve_nonsense, _serve_bytes, _hang_up, _serve, _schedule, _report, _report, _loaded, _serve,
)  # fmt: skip
