"""The stage: what a server still holds is seen, and a server can be started otherwise than it should be."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.population import prompt_keys, user_id
from bench.serving import Peer
from demo.server import ServerError
from faults.stage import FaultyServer, held_by
from saltern.core.messages import Acquire, Commit, Reserve, Reserved
from tests.support import until

BLOCK_BYTES = 64 * 1024


@pytest.fixture
def server(tmp_path: Path) -> FaultyServer:
    server = FaultyServer(tmp_path, tmp_path / "disk")
    server.arena = "4 MiB"
    return server


def test_whatever_a_session_holds_is_seen_until_it_is_gone(server: FaultyServer) -> None:
    server.start()
    try:
        assert held_by(server.stats(), sessions=0) == []
        peer = Peer(str(server.socket_path), block_bytes=BLOCK_BYTES)
        assert held_by(server.stats(), sessions=1) == []
        assert held_by(server.stats(), sessions=0) == ["sessions that are open, where 0 should be open"]
        keys = prompt_keys(0, 2)
        reserved = peer.ask(Reserve(1, user_id(0), keys, start=0, acquired_at=float("inf")))
        assert held_by(server.stats(), sessions=1) == ["2 blocks being written", "1 leases"]
        assert isinstance(reserved, Reserved)
        peer.tell(Commit(reserved.lease))
        peer.ask(Acquire(2, user_id(0), keys, start=0))
        pinned = ["2 blocks pinned", "1 leases"]  # and nothing more, once both are on the disk
        until(lambda: held_by(server.stats(), sessions=1) == pinned, "what is pinned, and no more")
        peer.close()
        until(lambda: not held_by(server.stats(), sessions=0), "the end of all leases")
    finally:
        server.kill()


def test_a_server_is_restarted_with_another_arena_and_by_another_command(server: FaultyServer) -> None:
    server.restart()
    try:
        assert server.is_running
        assert server.stats().arena.total_bytes == 4 * 1024 * 1024
        server.arena, server.prefix = "8 MiB", ("env", "MARKED=yes")
        server.restart()
        assert server.stats().arena.total_bytes == 8 * 1024 * 1024
        assert b"MARKED=yes" in Path(f"/proc/{server.pid}/environ").read_bytes().split(b"\0")
    finally:
        server.kill()


def test_a_server_that_can_not_listen_says_why(server: FaultyServer) -> None:
    server.start()
    try:
        assert "a server listens on" in server.refusal()
    finally:
        server.kill()
    server.prefix = ("true",)
    with pytest.raises(ServerError, match="ended with status 0"):
        server.refusal()
