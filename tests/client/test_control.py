"""What holds for the scheduler's connection, against sockets that behave badly on purpose."""

import os
import resource
import shutil
import signal
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from saltern.client import control as control_module
from saltern.client.admin import fetch_stats
from saltern.client.control import ConnectionLost, Control
from saltern.core.messages import GetStats, LookedUp, Refused, Release
from saltern.wire import PROTOCOL_NEWEST, encode, server_wire
from tests.support import Engine, serving, until


class FakeServer:
    """A listening socket without a server behind it: what arrives is what the test sends."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "fake.sock")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(1)

    def meet(self) -> tuple[Control, socket.socket]:
        """Return both ends of a fresh connection."""
        control = Control.connect(self.path)
        peer, _ = self.listener.accept()
        return control, peer


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    folder = Path(tempfile.mkdtemp(prefix="saltern-"))
    server = FakeServer(folder)
    yield server
    server.listener.close()
    shutil.rmtree(folder)


def test_a_missing_server_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConnectionLost, match=r"no server listens on /nowhere/s\.sock: start one with `saltern serve`"):
        Control.connect("/nowhere/s.sock")
    with pytest.raises(ConnectionLost, match="too long"):
        Control.connect(str(tmp_path / ("x" * 200)))


def test_the_socket_of_a_dead_server_is_no_server(fake: FakeServer) -> None:
    fake.listener.close()
    with pytest.raises(ConnectionLost, match="no server listens"):
        Control.connect(fake.path)


def test_a_server_that_does_not_accept_is_not_waited_for(fake: FakeServer) -> None:
    waiting = [Control.connect(fake.path) for _ in range(2)]  # one more than the backlog, as Linux counts
    with pytest.raises(ConnectionLost, match="does not accept connections"):
        Control.connect(fake.path)
    for control in waiting:
        control.close()


def test_replies_come_in_order_however_they_are_cut(fake: FakeServer) -> None:
    control, peer = fake.meet()
    assert control.receive() == []
    stream = server_wire().preamble + encode(LookedUp(request=1, ready=2)) + encode(LookedUp(request=2, ready=0))
    replies = []
    for byte in stream:
        peer.send(bytes([byte]))
        replies += control.receive()
    assert replies == [LookedUp(request=1, ready=2), LookedUp(request=2, ready=0)]
    assert control.receive(0.0003) == []
    peer.close()
    control.close()


def test_last_replies_are_delivered_before_the_end(fake: FakeServer) -> None:
    control, peer = fake.meet()
    peer.send(server_wire().preamble + encode(LookedUp(request=1, ready=2)))
    peer.close()
    assert control.receive(5.0) == [LookedUp(request=1, ready=2)]
    with pytest.raises(ConnectionLost, match="closed the connection"):
        control.receive(5.0)


def test_a_refusal_is_the_reason_even_when_it_comes_before_the_first_message(fake: FakeServer) -> None:
    control, peer = fake.meet()
    peer.send(server_wire().preamble + encode(Refused("uid 7 may not")))
    peer.close()
    with pytest.raises(ConnectionLost, match="uid 7 may not"):
        control.send(GetStats())


def test_a_server_of_another_protocol_is_named_with_what_to_do(fake: FakeServer) -> None:
    control, peer = fake.meet()
    newer = PROTOCOL_NEWEST + 1
    peer.send(b"SALT" + struct.pack("<HH", newer, newer))
    with pytest.raises(ConnectionLost, match=f"speaks Saltern protocol {newer}, this side {PROTOCOL_NEWEST}: run the"):
        control.receive(5.0)
    peer.close()


def test_something_else_on_the_socket_is_no_server(fake: FakeServer) -> None:
    control, peer = fake.meet()
    peer.send(b"220 mail.example.org ESMTP")
    with pytest.raises(ConnectionLost, match="doesn't speak Saltern's protocol"):
        control.receive(5.0)
    peer.close()


def test_releases_are_never_dropped_a_full_buffer_ends_the_session(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_module, "OUTGOING_BYTES_MAX", 10_000)
    control, peer = fake.meet()
    leases = iter(range(1_000_000))

    def release_all() -> None:
        for lease in leases:
            control.send(Release(lease=lease))

    with pytest.raises(ConnectionLost, match="has not read"):
        release_all()
    sent = next(leases)
    received, wire = 0, server_wire()
    while data := peer.recv(65536):
        for message in wire.feed(data):
            assert message == Release(lease=received)
            received += 1
    assert 0 < received <= sent
    peer.close()


def test_what_does_not_fit_the_socket_follows_with_later_calls(fake: FakeServer) -> None:
    control, peer = fake.meet()
    count = 100_000  # some 700 kB, more than a socket holds
    for lease in range(count):
        control.send(Release(lease=lease))
    peer.setblocking(False)
    wire, received = server_wire(), 0

    def drained() -> bool:
        nonlocal received
        try:
            received += len(wire.feed(peer.recv(65536)))
        except BlockingIOError:
            assert control.receive() == []
        return received == count

    until(drained, "all releases arrive")
    peer.close()
    control.close()


def test_a_killed_server_is_a_lost_connection() -> None:
    with serving() as server:
        engine = Engine(server.path)
        server.kill()
        with pytest.raises(ConnectionLost):
            receive_for_ever(engine.control)
        engine.close()


def receive_for_ever(control: Control) -> None:
    while True:
        control.receive(5.0)


def test_a_forked_child_does_not_keep_the_connection(fake: FakeServer) -> None:
    control, peer = fake.meet()
    child = os.fork()
    if not child:
        signal.pause()
        os._exit(0)
    try:
        control.close()
        peer.settimeout(30)
        data = b"-"
        while data:
            data = peer.recv(4096)  # the preamble, and then the end
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        peer.close()


def test_a_frozen_server_is_not_waited_for_longer_than_asked(fake: FakeServer) -> None:
    with pytest.raises(ConnectionLost, match="did not answer within"):
        fetch_stats(fake.path, timeout=0.01)


def test_a_server_of_another_user_is_not_spoken_to(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    uid = os.getuid()
    with monkeypatch.context() as patch:  # as if this process were neither the server's user nor served by root
        patch.setattr(os, "getuid", lambda: uid + 1)
        patch.setattr("saltern.client.sockets.ROOT", -1)
        with pytest.raises(ConnectionLost, match=rf"served by another user \(uid {uid}\): set saltern.server_uid"):
            Control.connect(fake.path)
        Control.connect(fake.path, server_uid=uid).close()


def test_no_descriptors_left_is_a_lost_connection_and_no_error(fake: FakeServer) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(ConnectionLost, match="Too many open files"):
            Control.connect(fake.path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
