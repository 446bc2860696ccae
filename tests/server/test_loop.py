"""What holds for a whole server: a real process, spoken to over its socket by peers good and bad."""

import json
import os
import resource
import signal
import socket
import stat
import struct
import tempfile
import threading
from array import array
from contextlib import suppress
from pathlib import Path

import pytest

from saltern.client.control import ConnectionLost, Control
from saltern.core.cache import Cache
from saltern.core.keys import KEY_BYTES, USER_ID_BYTES, Key, UserId
from saltern.core.messages import (
    NAME_BYTES,
    Acquire,
    Acquired,
    Attached,
    Commit,
    GetStats,
    LookedUp,
    Lookup,
    Refused,
    Release,
    Reply,
    Reserve,
    Reserved,
    SchedulerHello,
    SessionEnded,
    Stats,
    Welcome,
    WorkerHello,
)
from saltern.server.arena import Arena
from saltern.server.listener import Listener, Peer
from saltern.server.loop import READ_BYTES, Loop, _Connection
from saltern.wire import PROTOCOL_NEWEST, client_wire, encode
from tests.support import PATIENCE_SECONDS, Engine, Server, engine_at, serving, until, worker_at

ALICE = UserId(b"alice".ljust(USER_ID_BYTES))


def keys(count: int) -> tuple[Key, ...]:
    return tuple(Key(bytes([number]) * KEY_BYTES) for number in range(count))


def store(engine: Engine, count: int) -> None:
    reserved = engine.ask(Reserve(request=1, user=ALICE, keys=keys(count), start=0, acquired_at=0.0))
    assert isinstance(reserved, Reserved)
    assert len(reserved.grants) == count
    engine.control.send(Commit(lease=reserved.lease))


def pin(engine: Engine, count: int) -> Acquired:
    acquired = engine.ask(Acquire(request=2, user=ALICE, keys=keys(count), start=0))
    assert isinstance(acquired, Acquired)
    assert acquired.ready == count
    return acquired


class Raw:
    """A raw connection, for what no client of ours would do."""

    def __init__(self, server: Server) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE_SECONDS)
        self.socket.connect(server.path)
        self.wire = client_wire()
        self.fds = array("i")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive_all(self) -> list[Reply]:
        """Return everything up to the server's end of the connection."""
        replies: list[Reply] = []
        while received := self.receive():
            replies += received
        return replies

    def receive(self) -> list[Reply]:
        """Wait for replies; none is the end."""
        while True:
            try:
                data, ancillary, _, _ = self.socket.recvmsg(65536, socket.CMSG_SPACE(16))
            except ConnectionResetError:
                return []
            for _, _, payload in ancillary:
                self.fds.frombytes(payload)
            if not data:
                return []
            if replies := self.wire.feed(data):
                return replies

    def close(self) -> None:
        self.socket.close()
        for fd in self.fds:
            os.close(fd)


def worker_hello(name: bytes, *, outlives_socket: bool = False) -> bytes:
    return encode(WorkerHello(engine="engine", name=name, rank=0, world_size=1, outlives_socket=outlives_socket))


def test_what_is_stored_is_found_and_only_by_its_user() -> None:
    with serving() as server, engine_at(server.path) as engine:
        store(engine, 3)
        assert engine.ask(Lookup(request=7, user=ALICE, keys=keys(5))) == LookedUp(request=7, ready=3)
        bob = UserId(b"bob".ljust(USER_ID_BYTES))
        assert engine.ask(Lookup(request=8, user=bob, keys=keys(5))) == LookedUp(request=8, ready=0)
        acquired = pin(engine, 3)
        assert server.stats().arena.pinned_blocks == 3
        engine.control.send(Release(lease=acquired.lease))
        until(lambda: server.stats().arena.pinned_blocks == 0, "the pins are gone")


def test_the_cache_outlives_the_engine() -> None:
    with serving() as server:
        with engine_at(server.path) as engine:
            store(engine, 3)
        with engine_at(server.path) as engine:
            pin(engine, 3)


def test_the_socket_is_private_and_gone_after_a_clean_stop() -> None:
    with serving() as server:
        assert stat.S_IMODE(server.socket_path.stat().st_mode) == 0o600
        assert server.stop() == 0
        assert not server.socket_path.exists()
        assert "stopped" in server.log
        assert {path.name for path in server.folder.iterdir()} == {"saltern.toml", "server.log", "state"}


def test_an_engine_is_no_reason_not_to_stop() -> None:
    with serving() as server, engine_at(server.path) as engine:
        engine.hold()
        assert server.stop() == 0


def test_a_killed_servers_socket_is_taken_over() -> None:
    with serving() as server:
        server.kill()
        assert server.socket_path.exists()
        server.start()
        assert server.stats().arena.blocks == 0


def test_a_second_server_is_refused_and_harms_nobody() -> None:
    with serving() as server, engine_at(server.path) as engine:
        store(engine, 1)
        with pytest.raises(AssertionError, match=r"a server listens on .* already: stop it"):
            Server(server.folder).start()
        pin(engine, 1)


def test_another_uid_is_refused_with_the_reason() -> None:
    uid = os.getuid()
    with serving(server={"allowed_uids": [uid + 1]}) as server:
        peer = Raw(server)
        expected = f"uid {uid} may not use this server, only {uid + 1}: see server.allowed_uids"
        assert peer.receive_all() == [Refused(expected)]
        peer.close()
        assert "refused pid" in server.log


def test_one_connection_too_many_is_refused_with_the_reason() -> None:
    with serving(server={"connections_max": 2}) as server:
        until(lambda: server.stats() is not None, "the probes of the start are gone")
        peers = [Raw(server) for _ in range(2)]
        for peer in peers:
            peer.send(peer.wire.preamble + encode(GetStats()))
            assert isinstance(peer.receive()[0], Stats)
        third = Raw(server)
        assert third.receive_all() == [Refused("the server has its most connections, 2")]
        peers[0].close()
        until(lambda: takes_connections(server), "there is room again")
        for peer in (*peers[1:], third):
            peer.close()


def takes_connections(server: Server) -> bool:
    try:
        server.stats()
    except ConnectionLost:
        return False
    return True


@pytest.mark.parametrize("theirs", [PROTOCOL_NEWEST + 1, 0])
def test_a_peer_of_another_protocol_is_told_what_to_do(theirs: int) -> None:
    with serving() as server:
        peer = Raw(server)
        peer.send(b"SALT" + struct.pack("<HH", theirs, theirs))
        (refused,) = peer.receive_all()
        assert refused == Refused(
            f"the client speaks Saltern protocol {theirs}, this side {PROTOCOL_NEWEST}:"
            " run the same release of Saltern on both sides"
        )
        peer.close()


@pytest.mark.parametrize(
    ("garbage", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "doesn't speak Saltern's protocol"),
        (client_wire().preamble + b"\xff\xff\xff\xff", "a frame of 4294967295 bytes"),
        (client_wire().preamble + struct.pack("<I", 3) + b"\x93\x63\x00", "malformed"),
    ],
)
def test_garbage_is_answered_with_the_reason_and_harms_nobody(garbage: bytes, reason: str) -> None:
    with serving() as server, engine_at(server.path) as engine:
        peer = Raw(server)
        peer.send(garbage)
        (refused,) = peer.receive_all()
        assert isinstance(refused, Refused)
        assert reason in refused.reason
        peer.close()
        store(engine, 1)


def test_a_lease_that_nobody_gave_ends_the_session_and_harms_nobody() -> None:
    with serving() as server, engine_at(server.path, engine="good") as good:
        store(good, 1)
        bad = Engine(server.path, engine="bad")
        bad.control.send(Release(lease=1))
        until(lambda: lost(bad.control), "the connection is closed")
        bad.close()
        pin(good, 1)


def lost(control: Control) -> bool:
    try:
        control.receive(0.01)
    except ConnectionLost:
        return True
    return False


def test_the_arena_comes_with_the_welcome_and_is_sealed() -> None:
    with serving() as server:
        peer = Raw(server)
        peer.send(peer.wire.preamble + worker_hello(os.urandom(NAME_BYTES)))
        assert peer.receive() == [Welcome(arena_bytes=64 * 1024**2, page_bytes=65_536)]
        (fd,) = peer.fds
        assert os.fstat(fd).st_size == 64 * 1024**2
        for size in (0, 2**30):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        peer.close()


def test_the_arena_comes_with_its_own_message_however_slowly_the_peer_reads() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    connection = _Connection(1, ours, Peer(pid=0, uid=0))
    filler = Refused("x" * 1_000_000)  # more than a socket holds
    connection.queue(filler, with_arena=False)
    connection.queue(Welcome(arena_bytes=1, page_bytes=1), with_arena=True)
    connection.queue(filler, with_arena=False)
    welcome_at = len(client_wire().preamble) + len(encode(filler))
    received, total = 0, len(connection.outgoing)
    came_within: list[tuple[int, int]] = []
    while received < total:
        connection.flush(arena_fd=ours.fileno())
        data, ancillary, _, _ = theirs.recvmsg(10_000, socket.CMSG_SPACE(4))
        if ancillary:
            came_within.append((received, received + len(data)))
            os.close(struct.unpack("i", ancillary[0][2])[0])
        received += len(data)
    ((start, end),) = came_within
    assert start <= welcome_at < end
    ours.close()
    theirs.close()


def test_only_schedulers_get_the_naming_secret() -> None:
    with serving(server={"secret_file": "/dev/null/no"}, start=False) as server:
        settings = (server.folder / "saltern.toml").read_text(encoding="utf-8")
        key = server.folder / "naming.key"
        (server.folder / "saltern.toml").write_text(settings.replace("/dev/null/no", str(key)), encoding="utf-8")
        server.start()
        with engine_at(server.path) as engine:
            assert engine.welcome.naming_secret == key.read_bytes()
            assert len(key.read_bytes()) == 32
        peer = Raw(server)
        peer.send(peer.wire.preamble + worker_hello(os.urandom(NAME_BYTES)))
        assert peer.receive() == [Welcome(arena_bytes=64 * 1024**2, page_bytes=65_536)]
        peer.close()


def test_leases_hold_until_the_last_worker_is_gone() -> None:
    with serving() as server, worker_at(server.path) as worker:
        engine = Engine(server.path, workers=(worker.name,))
        store(engine, 2)
        pin(engine, 2)
        assert worker.tell(f"hold {engine.incarnation.hex()}") == "ok"
        engine.close()
        until(lambda: all(session.state == "ended" for session in server.stats().sessions), "the session ends")
        assert server.stats().arena.pinned_blocks == 2
        worker.kill()
        until(lambda: not server.stats().sessions, "the leases fall")
        assert server.stats().arena.pinned_blocks == 0
        assert server.stats().arena.blocks == 2


def test_leases_of_a_device_hold_until_its_process_is_gone() -> None:
    with serving() as server, worker_at(server.path, outlives_socket=True) as worker:
        engine = Engine(server.path, workers=(worker.name,))
        store(engine, 2)
        pin(engine, 2)
        assert worker.tell("close") == "ok"
        assert isinstance(engine.receive(), SessionEnded)
        engine.close()
        for _ in range(20):  # the lifeline and the control connection are closed, and the server knows
            assert server.stats().arena.pinned_blocks == 2
        worker.kill()
        until(lambda: not server.stats().sessions, "the leases fall")
        assert server.stats().arena.pinned_blocks == 0


def test_a_device_that_says_hello_anew_has_drained() -> None:
    with serving() as server:
        descriptors = len(list(Path(f"/proc/{server.pid}/fd").iterdir()))
        name = os.urandom(NAME_BYTES)
        with engine_at(server.path) as engine:
            store(engine, 2)
        for _ in range(3):
            peer = Raw(server)
            peer.send(peer.wire.preamble + worker_hello(name, outlives_socket=True))
            engine = Engine(server.path, workers=(name,))
            assert len(server.stats().sessions) == 1, "the session before still holds its leases"
            pin(engine, 2)
            engine.close()
            peer.close()
        until(lambda: server.stats().sessions[0].state == "ended", "the last session ends")
        # The lifeline's socket is closed, and one pidfd watches this process.
        until(lambda: len(list(Path(f"/proc/{server.pid}/fd").iterdir())) == descriptors + 1, "the others are closed")


def test_a_worker_that_the_server_turns_away_keeps_what_it_may_be_copying() -> None:
    with serving() as server:
        peer, name = Raw(server), os.urandom(NAME_BYTES)
        peer.send(peer.wire.preamble + worker_hello(name))
        engine = Engine(server.path, workers=(name,))
        store(engine, 2)
        pin(engine, 2)
        peer.send(b"\xff\xff\xff\xff")  # a fault of ours, not the end of the worker
        welcome, attached, refused = peer.receive_all()
        assert isinstance(welcome, Welcome)
        assert isinstance(attached, Attached)
        assert isinstance(refused, Refused)
        assert isinstance(engine.receive(), SessionEnded)
        engine.close()
        for _ in range(20):
            assert server.stats().arena.pinned_blocks == 2
        peer.close()
        until(lambda: not server.stats().sessions, "the leases fall")


def test_messages_sent_just_before_the_end_still_count() -> None:
    with serving() as server, engine_at(server.path) as engine:
        reserved = engine.ask(Reserve(request=1, user=ALICE, keys=keys(3), start=0, acquired_at=0.0))
        assert isinstance(reserved, Reserved)
        for request in range(2000):
            engine.control.send(Lookup(request=request, user=ALICE, keys=keys(3)))  # answers that nobody reads
        engine.control.send(Commit(lease=reserved.lease))
        until(lambda: flushed(engine.control), "all is sent")
        engine.control.close()
        until(lambda: server.stats().tenants[0].counts.stored == 3, "the commit is seen")


def flushed(control: Control) -> bool:
    control._flush()
    return not control._outgoing


def test_a_peer_that_does_not_read_is_closed_and_stops_nobody() -> None:
    with serving() as server, engine_at(server.path) as engine:
        store(engine, 3)
        peer = Raw(server)
        peer.send(peer.wire.preamble)
        peer.socket.setblocking(False)
        request = encode(GetStats()) * 1000
        closed = False
        for _ in range(10_000):
            with suppress(BlockingIOError):
                try:
                    peer.socket.send(request)
                except (BrokenPipeError, ConnectionResetError):
                    closed = True
                    break
            assert isinstance(engine.ask(Lookup(request=1, user=ALICE, keys=keys(3))), LookedUp)
        assert closed, "the server keeps answers without end"
        assert "it does not read what is sent to it" in server.log
        peer.close()


def test_a_stopped_engine_stops_no_other() -> None:
    with (
        serving() as server,
        worker_at(server.path) as worker,
        engine_at(server.path, engine="stopped", workers=(worker.name,)) as stopped,
        engine_at(server.path, engine="runs") as runs,
    ):
        assert worker.tell(f"hold {stopped.incarnation.hex()}") == "ok"
        os.kill(worker.process.pid, signal.SIGSTOP)
        store(runs, 3)
        stopped.control.close()
        until(lambda: server.stats().sessions[0].state == "ended", "the session ends")
        assert len(server.stats().sessions) == 2  # its worker may go on any time
        pin(runs, 3)
        os.kill(worker.process.pid, signal.SIGCONT)
        worker.kill()
        until(lambda: len(server.stats().sessions) == 1, "it is gone")


def test_one_flood_does_not_starve_the_others() -> None:
    with serving() as server, engine_at(server.path, engine="calm") as calm:
        flood = Raw(server)
        hello = SchedulerHello(
            engine="flood", incarnation=bytes(NAME_BYTES), workers=(bytes(NAME_BYTES),), block_bytes=4096
        )
        flood.send(flood.wire.preamble + encode(hello))
        assert isinstance(flood.receive()[0], Welcome)
        request = Acquire(request=1, user=ALICE, keys=(), start=0)
        at_once = READ_BYTES // len(encode(request))  # takes tens of milliseconds, the log lines included
        freeze(server)
        flood.send(encode(request) * at_once)
        calm.control.send(request)
        os.kill(server.pid, signal.SIGCONT)
        assert isinstance(calm.receive(), Acquired)
        until(lambda: server.log.count("acquired") == at_once + 1, "the flood is served as well")
        engines = [line.partition("engine=")[2].split()[0] for line in server.log.splitlines() if "acquired" in line]
        assert 0 < engines.index("calm") < at_once / 2
        flood.close()


def freeze(server: Server) -> None:
    os.kill(server.pid, signal.SIGSTOP)
    stat_path = Path(f"/proc/{server.pid}/stat")
    until(lambda: stat_path.read_text(encoding="ascii").rpartition(")")[2].split()[0] == "T", "the server is stopped")


def test_a_server_out_of_descriptors_goes_on_and_recovers() -> None:
    with serving() as server, engine_at(server.path) as engine:
        store(engine, 1)
        limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        in_use = max(int(path.name) for path in Path(f"/proc/{server.pid}/fd").iterdir()) + 1
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (in_use, limits[1]))
        waiting = [Raw(server) for _ in range(20)]
        until(lambda: "cannot accept a connection" in server.log, "descriptors run out")
        for request in range(200):
            assert engine.ask(Lookup(request=request, user=ALICE, keys=keys(1))) == LookedUp(request=request, ready=1)
        assert server.log.count("cannot accept a connection") <= 5  # and not once a turn
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, limits)
        for peer in waiting:
            peer.send(peer.wire.preamble + encode(GetStats()))
            assert isinstance(peer.receive()[0], Stats)
            peer.close()


def test_limits_come_from_the_settings() -> None:
    with serving(limit="256 KiB", user_limit="128 KiB") as server, engine_at(server.path) as engine:
        tenant = server.stats().tenants[0]
        assert (tenant.limit_bytes, tenant.user_limit_bytes) == (256 * 1024, 128 * 1024)
        reserved = engine.ask(Reserve(request=1, user=ALICE, keys=keys(3), start=0, acquired_at=0.0))
        assert isinstance(reserved, Reserved)
        assert len(reserved.grants) == 2  # of 64 KiB each


def test_decisions_are_logged_one_a_line() -> None:
    with serving(log={"format": "json"}) as server:
        with engine_at(server.path, engine='tricky" name\n') as engine:
            store(engine, 3)
        until(lambda: all(f'"{event}"' in server.log for event in ("stored", "session-ended")), "all is logged")
        by_event = {line["event"]: line for line in map(json.loads, server.log.splitlines())}
        assert by_event["stored"]["blocks"] == 3
        assert by_event["stored"]["tenant"] == "default"
        assert by_event["stored"]["engine"] == 'tricky" name\n'
        assert by_event["session-opened"]["level"] == "info"
        assert by_event["stored"]["level"] == "debug"


def test_requests_are_not_logged_unless_asked_for() -> None:
    with serving(log={"level": "info"}) as server:
        with engine_at(server.path, engine='tricky" name\n') as engine:
            store(engine, 3)
        until(lambda: "session-ended" in server.log, "the end is logged")
        assert "stored" not in server.log
        assert 'session-opened tenant=default engine="tricky\\" name\\n" blocks=0' in server.log


def test_a_signal_that_does_not_interrupt_the_wait_stops_the_server_all_the_same() -> None:
    """A signal may come right before epoll waits, or to another thread: then nothing interrupts the wait."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    finished, had_to_be_woken = threading.Event(), threading.Event()

    def signal_this_thread() -> None:
        finished.wait(0.2)  # by then the loop waits; were it not there yet, it would have to stop just the same
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        if not finished.wait(PATIENCE_SECONDS):
            had_to_be_woken.set()
            loop.stop()

    with tempfile.TemporaryDirectory(prefix="saltern-") as folder:
        arena = Arena(total_bytes=65_536, huge_pages=False)
        cache = Cache(pages=1, page_bytes=65_536)
        loop = Loop(cache, arena, Listener(Path(folder, "s")), uids=frozenset([os.getuid()]), connections_max=2)
        thread = threading.Thread(target=signal_this_thread)
        try:
            loop.stop_on_signals()
            thread.start()
            loop.run()
        finally:
            finished.set()
            thread.join()
            arena.close()
            for number, handler in before.items():
                signal.signal(number, handler)
    assert not had_to_be_woken.is_set()
