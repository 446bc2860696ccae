"""Faults of the server and of what it lives on, under an engine that goes on. A docstring says what happens."""

from __future__ import annotations

import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from bench.population import prompt_keys, user_id
from bench.serving import Peer
from demo.prompts import STORY
from demo.server import ServerError
from faults.private import full
from faults.processes import descriptors, lowest_free_descriptor, mapped_arenas, stopped
from faults.prompts import OTHER_SAGA, SAGA, timed_completion
from faults.stage import NotReachedError, Stage
from faults.watch import Watch
from saltern.client.sockets import ConnectionLost, open_socket
from saltern.core.messages import Acquire, Acquired, Commit, Reserve, Reserved

FROZEN_SECONDS = 30.0
SUSPENDED_SECONDS = 5.0
CLOCK_AHEAD_SECONDS = 400 * 24 * 3600
PEER_BLOCKS = 32
PEER_BLOCK_BYTES = 1024 * 1024
STRANGERS = 40


def server_absent_at_start(stage: Stage, watch: Watch) -> None:
    """The engine starts without a server; one is started later."""
    stage.server.stop()
    stage.restart_engine()
    for _ in range(2):
        stage.ask(watch, salt=stage.salt())
    stage.server.start()
    stage.await_hit(watch)


def server_killed_idle(stage: Stage, watch: Watch) -> None:
    """The server is killed while nothing is asked of it, and started again after three requests."""
    salt = stage.store(watch)
    stage.hit(watch, salt)
    stage.server.kill()
    for _ in range(3):
        stage.ask(watch, salt=salt)
    stage.server.start()
    stage.await_hit(watch, salt)


def server_killed_mid_store(stage: Stage, watch: Watch) -> None:
    """The server is killed while the worker writes blocks of a prompt into the arena."""
    stage.fresh_arena()
    with stage.mid_store() as request:
        stage.server.kill()
    request.judge(watch)
    stage.ask(watch, salt=stage.salt())
    stage.server.start()
    stage.await_hit(watch)


def server_killed_mid_load(stage: Stage, watch: Watch) -> None:
    """The server is killed while the worker reads blocks of a prompt from the arena."""
    salt = stage.store(watch, SAGA)
    stage.store(watch, OTHER_SAGA, salt=salt)
    with stage.mid_load(salt) as request:
        stage.server.kill()
    request.judge(watch)
    stage.ask(watch, SAGA, salt=salt)
    stage.server.start()
    stage.await_hit(watch)


def server_frozen(stage: Stage, watch: Watch) -> None:
    """The server is stopped for 30 s under a steady flow of requests, and then goes on."""
    salt = stage.store(watch)
    began = time.monotonic()
    with stopped(stage.server.pid):
        while time.monotonic() - began < FROZEN_SECONDS:
            for user in (salt, stage.salt()):
                cached = stage.ask(watch, salt=user).cached_tokens
                watch.expect(not cached, f"{cached} tokens came from a server that stands still")
    stage.await_hit(watch, salt)


def server_restarted_with_another_arena(stage: Stage, watch: Watch) -> None:
    """The server is restarted with a much smaller arena, and with a larger one again."""
    arenas = {*mapped_arenas(stage.roles.worker)}
    for arena in ("64 MiB", "768 MiB"):
        salt = stage.store(watch)
        stage.server.stop()
        stage.server.arena = arena
        stage.server.start()
        stage.await_hit(watch, salt)
        now = mapped_arenas(stage.roles.worker)
        watch.expect(len(now) == 1 and not now & arenas, f"the worker maps the arenas {now}, before {arenas}")
        arenas |= now


def socket_deleted(stage: Stage, watch: Watch) -> None:
    """The socket's file is deleted under the running server, which is later restarted."""
    salt = stage.store(watch)
    stage.server.socket_path.unlink()
    stage.hit(watch, salt)  # those who are connected stay so
    stage.ask(watch, salt=stage.salt())
    try:
        stage.server.stats()
        raise NotReachedError("the server can still be reached by its path")
    except ConnectionLost:
        stage.server.restart()
    stage.await_hit(watch, salt)


def arena_full_of_pinned_blocks(stage: Stage, watch: Watch) -> None:
    """Another client holds the whole arena, half of it pinned for reading and half of it never written to the end."""
    stage.server.arena = f"{2 * PEER_BLOCKS * PEER_BLOCK_BYTES} B"
    stage.server.restart()
    stage.attach()
    peer = Peer(str(stage.server.socket_path), block_bytes=PEER_BLOCK_BYTES)
    try:
        _hold_everything(peer)
        arena = stage.server.stats().arena
        if (arena.pinned_blocks, arena.writing_blocks, arena.used_bytes) != (
            PEER_BLOCKS,
            PEER_BLOCKS,
            arena.total_bytes,
        ):
            raise NotReachedError(f"the arena is not full of blocks that are held: {arena}")
        for _ in range(3):
            stage.ask(watch, salt=stage.salt())
        refused = stage.server.stats().tenants[0].counts.refused_all_pinned
        watch.expect(refused > 0, "nothing was refused for want of a block that may be evicted")
    finally:
        peer.close()
    stage.await_hit(watch)


def _hold_everything(peer: Peer) -> None:
    """Fill the arena, with one half read and one half being written."""
    keys = prompt_keys(0, PEER_BLOCKS)
    reserved = peer.ask(Reserve(1, user_id(0), keys, start=0, acquired_at=float("inf")))
    assert isinstance(reserved, Reserved) and len(reserved.grants) == PEER_BLOCKS, f"not reserved: {reserved}"
    peer.tell(Commit(reserved.lease))
    acquired = peer.ask(Acquire(2, user_id(0), keys, start=0))
    assert isinstance(acquired, Acquired) and acquired.ready == PEER_BLOCKS, f"not pinned: {acquired}"
    unfinished = peer.ask(Reserve(3, user_id(1), prompt_keys(1, PEER_BLOCKS), start=0, acquired_at=float("inf")))
    assert isinstance(unfinished, Reserved) and len(unfinished.grants) == PEER_BLOCKS, f"not reserved: {unfinished}"


def server_out_of_descriptors(stage: Stage, watch: Watch) -> None:
    """Strangers connect until the server is out of file descriptors; a further engine has to wait."""
    salt = stage.store(watch)
    server, path = stage.server.pid, str(stage.server.socket_path)
    before = resource.prlimit(server, resource.RLIMIT_NOFILE)
    limit = descriptors(server) + STRANGERS // 2
    told = len(stage.server.log_path.read_text())
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        resource.prlimit(server, resource.RLIMIT_NOFILE, (limit, before[1]))
        for _ in range(STRANGERS):
            stack.enter_context(open_socket(path))
        stage.expect_soon(
            lambda: "cannot accept a connection" in stage.server.log_path.read_text()[told:],
            "the server is not out of descriptors",
        )
        waiting = pool.submit(Peer, path, block_bytes=PEER_BLOCK_BYTES)
        stage.hit(watch, salt)
        stage.ask(watch, salt=stage.salt())
        watch.expect(not waiting.done(), "somebody was let in")
    waiting.result().close()
    resource.prlimit(server, resource.RLIMIT_NOFILE, before)
    stage.await_hit(watch, salt)


def engine_out_of_descriptors(stage: Stage, watch: Watch) -> None:
    """The engine's processes may open no file from their first copy on, and lose their server meanwhile."""
    stage.restart_engine()
    stage.attach()
    pids = stage.roles[1:]
    before = {pid: resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in pids}
    try:
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free_descriptor(pid), before[pid][1]))
        salt = stage.salt()
        for _ in range(2):
            stage.ask(watch, salt=salt)
        stage.server.restart()
        for _ in range(3):
            stage.ask(watch, salt=salt)
        states = {session.state for session in stage.server.stats().sessions}
        watch.expect("open" not in states, "the worker has the arena without a descriptor for it")
    finally:
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before[pid])
    stage.await_hit(watch, salt)


def disk_full(stage: Stage, watch: Watch) -> None:
    """The disk with the socket and the log is full; the server is killed and can't start until there is room."""
    if not stage.has_small_disk:
        raise NotReachedError("no disk could be mounted: this needs root, or user namespaces")
    salt = stage.store(watch)
    with full(stage.server.folder):
        stage.hit(watch, salt)
        Peer(str(stage.server.socket_path), block_bytes=PEER_BLOCK_BYTES).close()  # whose coming and going is logged
        stage.hit(watch, salt)
        stage.server.kill()
        said = stage.server.refusal()
        watch.expect("No space left on device" in said, f"a server that can't listen said {said!r}")
        stage.ask(watch, salt=salt)
    stage.server.start()
    stage.await_hit(watch, salt)


def log_full(stage: Stage, watch: Watch) -> None:
    """Nothing that the server logs can be written, from its first line on."""
    stage.server.prefix = ("sh", "-c", 'exec "$@" 2>/dev/full', "sh")
    stage.server.restart()
    stage.await_hit(watch)
    said = os.readlink(f"/proc/{stage.server.pid}/fd/2")
    watch.expect(said == "/dev/full", f"the log goes to {said}")


def clock_jumps(stage: Stage, watch: Watch) -> None:
    """The server's clock is 400 days ahead in its next life and back in the next; then all stand still for 5 s."""
    salt = stage.salt()
    jump = ("unshare", "--time", "--monotonic", str(CLOCK_AHEAD_SECONDS), "--boottime", str(CLOCK_AHEAD_SECONDS))
    for prefix in (jump, ()):
        stage.server.prefix = prefix
        try:
            stage.server.restart()
        except ServerError as error:
            raise NotReachedError(f"no clock of its own for the server: {error}") from None
        has_own_clock = os.readlink(f"/proc/{stage.server.pid}/ns/time") != os.readlink("/proc/self/ns/time")
        if has_own_clock != bool(prefix):
            raise NotReachedError("the server's clock did not jump")
        stage.await_hit(watch, salt)
    with ThreadPoolExecutor(1) as pool:
        acquires = stage.server.stats().tenants[0].counts.acquires
        request = pool.submit(timed_completion, stage.engine, STORY, salt=stage.salt())
        stage.server.wait_for("a request", lambda snapshot: snapshot.tenants[0].counts.acquires > acquires)
        with stopped(*stage.roles, stage.server.pid):
            time.sleep(SUSPENDED_SECONDS)
    watch.judge(STORY, request.result(), stopped_seconds=SUSPENDED_SECONDS)
    stage.await_hit(watch, salt)


def second_engine_with_the_same_id(stage: Stage, watch: Watch) -> None:
    """A second engine starts under the id of the first, and is turned away until that one ends."""
    salt = stage.store(watch)
    second = stage.start_second()
    for _ in range(2):
        cached = stage.ask(watch, salt=salt, engine=second).cached_tokens
        watch.expect(not cached, f"the second engine found {cached} tokens under an id that was taken")
    stage.hit(watch, salt)
    stage.replace_engine()
    stage.await_hit(watch, salt)
