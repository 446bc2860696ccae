"""What holds for a worker's lifeline and its mapping, against a real server and real processes."""

import fcntl
import logging
import os
import signal
from pathlib import Path

import pytest

from saltern.client import lifeline as lifeline_module
from saltern.client.lifeline import Arena, Lifeline, check_sealed
from saltern.core.messages import NAME_BYTES, SessionEnded
from tests.support import PATIENCE_SECONDS, Engine, engine_at, serving, until, worker_at


def arenas_mapped(pid: int | str = "self") -> int:
    """Count the arenas that a process maps."""
    return Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").count("memfd:saltern-arena")


def sockets_open(pid: int) -> int:
    """Count the sockets that a process has."""
    return sum(os.readlink(fd).startswith("socket:") for fd in Path(f"/proc/{pid}/fd").iterdir())


def arena_rss_bytes() -> int:
    """Return how much of its arena this process has in its own page tables."""
    sizes = iter(Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines())
    for line in sizes:
        if "memfd:saltern-arena" in line:
            return next(int(line.split()[1]) * 1024 for line in sizes if line.startswith("Rss:"))
    return 0


def is_attached(engine: Engine) -> bool:
    use = engine.lifelines[0].hold(engine.incarnation)
    if use is not None:
        use.release()
    return use is not None


def test_two_processes_share_the_arena() -> None:
    with (
        serving() as server,
        worker_at(server.path) as worker,
        engine_at(server.path, engine="there", workers=(worker.name,)) as there,
        engine_at(server.path, engine="here") as here,
    ):
        assert worker.tell(f"hold {there.incarnation.hex()}") == "ok"
        assert worker.tell("write over there") == "ok"
        mapping = here.hold()
        assert len(mapping.buffer) == 64 * 1024 * 1024
        assert mapping.page_bytes == 65_536
        assert bytes(mapping.buffer[:10]) == b"over there"
        mapping.buffer[:4] = b"down"
        assert worker.tell("read 10") == "down there"
        mapping.release()


def test_only_the_attached_incarnation_gets_the_arena() -> None:
    with serving() as server, engine_at(server.path, ranks=2) as engine:
        assert engine.lifelines[0].hold(os.urandom(NAME_BYTES)) is None
        for rank in range(2):
            engine.hold(rank).release()


def test_the_arena_stays_mapped_until_every_use_is_released() -> None:
    with serving() as server, engine_at(server.path) as engine:
        first, second = engine.hold(), engine.hold()
        engine.control.close()
        until(lambda: not is_attached(engine), "the session ends")
        assert arenas_mapped() == 1
        assert server.stats().sessions[0].state == "ended"  # its leases hold: this worker may be copying
        first.release()
        first.release()  # again, which must not count as the second's
        assert arenas_mapped() == 1
        second.buffer[0] = 1
        second.release()
        until(lambda: arenas_mapped() == 0 or not server.stats().sessions, "the worker lets go")


def test_a_worker_attaches_to_its_schedulers_next_session() -> None:
    with serving() as server, engine_at(server.path) as engine:
        ended = engine.incarnation
        engine.control.close()
        until(lambda: not server.stats().sessions, "the session is gone")
        engine.attach(server.path)
        assert engine.lifelines[0].hold(ended) is None
        engine.hold().release()


def test_a_killed_servers_arena_is_unmapped_and_its_successors_mapped(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with serving() as server, engine_at(server.path) as engine:
        mapping = engine.hold()
        mapping.buffer[:3] = b"old"
        server.kill()
        until(lambda: not is_attached(engine), "the end is seen")
        assert bytes(mapping.buffer[:3]) == b"old"  # a copy that runs goes on undisturbed
        mapping.release()
        until(lambda: "no server listens" in caplog.text, "another server is looked for")
        assert arenas_mapped() == 0
        engine.control.close()
        server.start()
        engine.attach(server.path)
        mapping = engine.hold()
        assert bytes(mapping.buffer[:3]) == bytes(3)
        mapping.release()


def test_a_view_that_is_left_keeps_the_arena_but_not_the_lifeline(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as server, engine_at(server.path) as engine:
        mapping = engine.hold()
        forgotten = mapping.buffer[10:20]
        mapping.release()
        engine.control.close()
        try:
            until(lambda: "a view of it left" in caplog.text, "the view is reported")
            forgotten[:] = b"still safe"
            assert arenas_mapped() == 1
        finally:
            forgotten.release()  # or the lifeline would wait for it for ever
        until(lambda: not server.stats().sessions, "the lifeline goes on")


def test_a_killed_worker_ends_the_session_and_its_leases_fall() -> None:
    with (
        serving() as server,
        worker_at(server.path) as worker,
        engine_at(server.path, workers=(worker.name,)) as engine,
    ):
        assert worker.tell(f"hold {engine.incarnation.hex()}") == "ok"
        worker.kill()
        ended = engine.receive()
        assert isinstance(ended, SessionEnded)
        assert "the lifeline of rank 0 is gone" in ended.reason
        engine.control.close()
        until(lambda: not server.stats().sessions, "the leases fall")


def test_a_forked_child_keeps_neither_lifeline_nor_arena() -> None:
    with (
        serving() as server,
        worker_at(server.path) as worker,
        engine_at(server.path, workers=(worker.name,)) as engine,
    ):
        assert worker.tell(f"hold {engine.incarnation.hex()}") == "ok"
        child = int(worker.tell("fork"))
        try:
            assert arenas_mapped(child) == 0
            assert sockets_open(child) == sockets_open(worker.process.pid) - 1
            worker.kill()
            assert isinstance(engine.receive(), SessionEnded)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_program_that_is_started_meanwhile_gets_no_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    inheritable: list[bool] = []

    def spy(fd: int, *, arena_bytes: int, page_bytes: int) -> Arena:
        inheritable.append(os.get_inheritable(fd))
        return Arena(fd, arena_bytes=arena_bytes, page_bytes=page_bytes)

    monkeypatch.setattr(lifeline_module, "Arena", spy)
    with serving() as server, engine_at(server.path) as engine:
        engine.hold()
    assert inheritable == [False]


def test_closing_is_prompt_without_a_server(tmp_path: Path) -> None:
    lifeline = Lifeline(str(tmp_path / "none"), engine="e", name=bytes(NAME_BYTES), rank=0, world_size=1)
    lifeline.start()
    assert lifeline.hold(bytes(NAME_BYTES)) is None
    lifeline.close()
    lifeline.close()


def test_a_closed_lifeline_keeps_a_child_from_forgetting_nothing_else() -> None:
    with serving() as server:
        closed = Lifeline(server.path, engine="e", name=bytes(NAME_BYTES), rank=0, world_size=1)
        closed.start()
        closed.close()
        closed.forget_in_child()  # an error here would leave the child with whatever comes after it


def test_the_end_wakes_whoever_waits_for_the_beginning() -> None:
    with serving() as server:
        lifeline = Lifeline(server.path, engine="e", name=bytes(NAME_BYTES), rank=0, world_size=1)
        lifeline.start()
        lifeline.close()
        assert lifeline.hold(bytes(NAME_BYTES), timeout=PATIENCE_SECONDS) is None


def test_a_refusal_is_said_once_and_retried(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline_module, "RETRY_SECONDS_REFUSED", 0.001)
    with serving(server={"allowed_uids": [os.getuid() + 1]}) as server:
        lifeline = Lifeline(server.path, engine="e", name=bytes(NAME_BYTES), rank=0, world_size=1)
        lifeline.start()
        until(lambda: server.log.count("may not use this server") > 3, "it tries again")
        lifeline.close()
    said = [record for record in caplog.records if "may not use this server" in record.getMessage()]
    assert len(said) == 1
    assert said[0].levelno == logging.WARNING


def test_the_device_learns_of_the_mapping_before_its_first_and_after_its_last_use() -> None:
    story: list[str] = []

    def mapped(arena: Arena) -> None:
        story.append(f"map {len(arena.buffer)}")

    def unmapped(arena: Arena) -> None:
        story.append(f"unmap after {bytes(arena.buffer[:4]).decode()}")

    with serving(arena="1 MiB") as server, worker_at(server.path) as worker:
        lifeline = Lifeline(
            server.path, engine="e", name=worker.name, rank=0, world_size=1, on_map=mapped, on_unmap=unmapped
        )
        worker.close()  # only its name is used
        lifeline.start()
        with engine_at(server.path, workers=(worker.name,)) as engine:
            mapping = lifeline.hold(engine.incarnation, PATIENCE_SECONDS)
            assert mapping is not None
            assert story == ["map 1048576"]
            mapping.buffer[:4] = b"last"
            mapping.release()
            lifeline.close()
    assert story == ["map 1048576", "unmap after last"]


def test_a_worker_populates_all_that_the_server_has_touched() -> None:
    with serving(arena="48 MiB", prefault=True) as server, engine_at(server.path):
        until(lambda: arena_rss_bytes() == 48 * 1024**2, "all of the arena is in the worker's page tables")


def test_a_worker_never_takes_memory_that_the_server_has_not() -> None:
    fd = os.memfd_create("saltern-arena")
    os.ftruncate(fd, 2 * lifeline_module.POPULATE_BYTES)
    os.pwrite(fd, bytes(lifeline_module.POPULATE_BYTES), 0)
    arena = Arena(fd, arena_bytes=2 * lifeline_module.POPULATE_BYTES, page_bytes=65_536)
    assert [arena.populate(), arena.populate()] == [True, False]
    assert os.fstat(fd).st_blocks * 512 == lifeline_module.POPULATE_BYTES
    os.pwrite(fd, bytes(lifeline_module.POPULATE_BYTES), lifeline_module.POPULATE_BYTES)
    assert arena.populate()
    assert arena.populated
    assert arena_rss_bytes() == 2 * lifeline_module.POPULATE_BYTES
    assert arena.unmap()
    os.close(fd)


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_SHRINK])
def test_an_arena_that_could_shrink_under_its_users_is_not_mapped(seals: int) -> None:
    fd = os.memfd_create("arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 65_536)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        with pytest.raises(ValueError, match="not sealed"):
            check_sealed(fd, 65_536)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        check_sealed(fd, 65_536)
        with pytest.raises(ValueError, match="another size"):
            check_sealed(fd, 131_072)
    finally:
        os.close(fd)
