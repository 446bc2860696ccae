"""Lookups at the socket of a real server: how long the scheduler of an engine waits for an answer.

Beside each stands the bare round trip of the same bytes to a process that answers without looking at them: what
is above it is the server's own work and the client's encoding and decoding.
"""

import multiprocessing
import os
import select
import socket
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import cycle
from multiprocessing.connection import Connection
from typing import NamedTuple

from bench.population import PROMPT_TOKENS, populate, prompt_keys, user_id
from bench.report import Report, Table, Target, spread
from bench.rounds import interleaved, median, quantile
from bench.serving import WAIT_SECONDS_MAX, Peer, Server
from saltern.core.keys import Key, UserId
from saltern.core.messages import Acquire, Acquired, LookedUp, Lookup, Release
from saltern.wire import encode

BLOCK_BYTES = 4096  # one page: only the index is of interest here
TOKENS_PER_BLOCK = (256, 128)
USERS_PER_CLIENT = 32
"""Each client asks for so many prompts in turn, so that no lookup finds all it needs in the processor's caches."""


LABELS = {"echo": "bare round trip", "lookup": "Lookup", "acquire": "Acquire and Release"}


class Size(NamedTuple):
    """How much is measured."""

    clients: int
    rounds: int
    round_seconds: float
    blocks: int
    users: int


FULL = Size(clients=8, rounds=5, round_seconds=0.6, blocks=100_000, users=1_000)
SMOKE = Size(clients=2, rounds=2, round_seconds=0.02, blocks=2_000, users=16)


class _Asked(NamedTuple):
    """A client's task: what to do for how long."""

    what: str
    prompt_blocks: int
    seconds: float


def run(size: Size) -> Report:
    """Measure both block sizes against servers of their own."""
    tables, targets = [], []
    for block_tokens in TOKENS_PER_BLOCK:
        table, reached = _measure(size, prompt_blocks=PROMPT_TOKENS // block_tokens, block_tokens=block_tokens)
        tables.append(table)
        targets += reached
    return Report("lookup", tuple(tables), tuple(targets))


def _measure(size: Size, *, prompt_blocks: int, block_tokens: int) -> tuple[Table, list[Target]]:
    with ExitStack() as stack:
        server = stack.enter_context(
            Server(arena_bytes=size.blocks * BLOCK_BYTES, page_bytes=BLOCK_BYTES, prefault=False)
        )
        filler = Peer(server.socket, block_bytes=BLOCK_BYTES)
        prompts = populate(filler, users=size.users, blocks=size.blocks, prompt_blocks=prompt_blocks)
        filler.close()
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="saltern-bench-"))
        echo = stack.enter_context(_Child(_serve_echo, f"{folder}/echo"))
        echo.receive()
        clients = [
            stack.enter_context(_Child(_serve_client, server.socket, f"{folder}/echo", number, prompts))
            for number in range(size.clients)
        ]
        for client in clients:
            client.receive()
        what = {name: _Asked(name, prompt_blocks, size.round_seconds) for name in LABELS}
        alone = interleaved({name: _asking(clients[:1], asked) for name, asked in what.items()}, size.rounds)
        alone_times = {name: _times(clients[:1], name) for name in what}
        together = interleaved({name: _asking(clients, asked) for name, asked in what.items()}, size.rounds)
        together_times = {name: _times(clients, name) for name in what}
    echo_p50 = median(alone_times["echo"])
    table = Table(
        f"{PROMPT_TOKENS:,} tokens, {prompt_blocks} keys of {block_tokens}-token blocks; index of {size.blocks:,}",
        (
            "", "p50 µs", "p99 µs", "p50 / bare", "per s", f"{size.clients} clients: per s", "rounds", "p50 µs ",
            "p99 µs ",
        ),
        tuple(
            (
                label,
                median(alone_times[name]) * 1e6,
                quantile(alone_times[name], 0.99) * 1e6,
                median(alone_times[name]) / echo_p50,
                median(alone[name]),
                median(together[name]),
                spread(together[name]),
                median(together_times[name]) * 1e6,
                quantile(together_times[name], 0.99) * 1e6,
            )
            for name, label in LABELS.items()
        ),
    )  # fmt: skip
    targets = []
    for name in ("lookup", "acquire"):
        what_text = f"{LABELS[name]} of {prompt_blocks} keys"
        targets += [
            Target(f"{what_text}, one client, median", median(alone_times[name]) * 1e3, 0.5, "ms"),
            Target(f"{what_text}, {size.clients} clients", median(together[name]), 2000, "per s", at_least=True),
        ]
    return table, targets


def _asking(clients: "Sequence[_Child]", asked: _Asked) -> Callable[[], float]:
    """Return a measure: all clients do the same at once; its value is how often per second, in all."""

    def measure() -> float:
        for client in clients:
            client.pipe.send(asked)
        total = 0.0
        for client in clients:
            times = array("d", client.receive())
            client.times.setdefault(asked.what, array("d")).extend(times)
            total += len(times) / sum(times)
        return total

    return measure


def _times(clients: "Sequence[_Child]", what: str) -> "array[float]":
    """Return the seconds of every call since the last time, and forget them."""
    times = array("d")
    for client in clients:
        times.extend(client.times.pop(what))
    return times


class _Child:
    """A process of its own, with a pipe to it; it ends with the context."""

    def __init__(self, target: Callable[..., None], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.times: dict[str, array[float]] = {}
        self._process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self._theirs = theirs

    def __enter__(self) -> "_Child":
        self._process.start()
        self._theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        self._process.join(WAIT_SECONDS_MAX)
        self._process.kill()
        self._process.join()

    def receive(self) -> bytes:
        assert self.pipe.poll(WAIT_SECONDS_MAX), "a child process does not answer"
        return self.pipe.recv_bytes()


# What runs in the children.


def _serve_client(pipe: Connection, server: str, echo: str, number: int, prompts: int) -> None:
    peer = Peer(server, block_bytes=BLOCK_BYTES)
    bare = socket.socket(socket.AF_UNIX)
    bare.connect(echo)
    users = [(number * USERS_PER_CLIENT + index) % prompts for index in range(USERS_PER_CLIENT)]
    pipe.send_bytes(b"")
    try:
        while True:
            asked: _Asked = pipe.recv()
            keys_by_user = {user_id(user): prompt_keys(user, asked.prompt_blocks) for user in users}
            match asked.what:
                case "lookup":
                    works = [_looking_up(peer, user, keys) for user, keys in keys_by_user.items()]
                case "acquire":
                    works = [_acquiring(peer, user, keys) for user, keys in keys_by_user.items()]
                case _:
                    user, keys = next(iter(keys_by_user.items()))
                    works = [_echoing(bare, len(encode(Lookup(1, user, keys))), len(encode(LookedUp(1, len(keys)))))]
            pipe.send_bytes(_timed(works, asked.seconds).tobytes())
    except EOFError:
        peer.close()


def _timed(works: Sequence[Callable[[], None]], seconds: float) -> "array[float]":
    """Call `works` in turn for `seconds` and return how long each call took."""
    times = array("d")
    began = now = time.perf_counter()
    for work in cycle(works):
        work()
        before, now = now, time.perf_counter()
        times.append(now - before)
        if now - began >= seconds:
            break
    return times


def _looking_up(peer: Peer, user: UserId, keys: tuple[Key, ...]) -> Callable[[], None]:
    def work() -> None:
        answer = peer.ask(Lookup(1, user, keys))
        assert isinstance(answer, LookedUp) and answer.ready == len(keys), f"not found: {answer}"

    return work


def _acquiring(peer: Peer, user: UserId, keys: tuple[Key, ...]) -> Callable[[], None]:
    def work() -> None:
        answer = peer.ask(Acquire(1, user, keys, start=0))
        assert isinstance(answer, Acquired) and answer.ready == len(keys), f"not found: {answer}"
        peer.tell(Release(answer.lease))

    return work


def _echoing(bare: socket.socket, request_bytes: int, reply_bytes: int) -> Callable[[], None]:
    """Send as many bytes as a lookup has, after their number; as many come back as its answer has."""
    request = request_bytes.to_bytes(4, "little") + reply_bytes.to_bytes(4, "little") + bytes(request_bytes - 8)

    def work() -> None:
        bare.sendall(request)
        left = reply_bytes
        while left:
            left -= len(bare.recv(left))

    return work


def _serve_echo(pipe: Connection, path: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    epoll = select.epoll()
    epoll.register(listener, select.EPOLLIN)
    epoll.register(pipe.fileno(), select.EPOLLIN)
    connection_by_fd: dict[int, socket.socket] = {}
    pending_by_fd: dict[int, bytearray] = {}
    pipe.send_bytes(b"")
    while True:
        for fd, _ in epoll.poll():
            if fd == pipe.fileno():
                os.unlink(path)
                return
            if fd == listener.fileno():
                connection, _ = listener.accept()
                connection_by_fd[connection.fileno()] = connection
                pending_by_fd[connection.fileno()] = bytearray()
                epoll.register(connection, select.EPOLLIN)
                continue
            pending, connection = pending_by_fd[fd], connection_by_fd[fd]
            data = connection.recv(64 * 1024)
            if not data:
                epoll.unregister(fd)
                connection.close()
                continue
            pending += data
            if len(pending) >= 8 and len(pending) == int.from_bytes(pending[:4], "little"):
                connection.sendall(bytes(int.from_bytes(pending[4:8], "little")))
                pending.clear()
