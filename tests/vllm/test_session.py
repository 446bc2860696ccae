"""Tests of the session: opened when it can be, lost without a word to the engine, and found again."""

import logging
from itertools import pairwise
from typing import Any

import pytest

from saltern.client.control import ConnectionLost
from saltern.core.keys import UserId
from saltern.core.messages import LookedUp, Lookup, SchedulerHello
from saltern.vllm.session import RETRY_SECONDS_MAX, RETRY_SECONDS_MIN, Session, SessionPhase
from tests.vllm.server import ROUND_TRIP_SECONDS, Clock, Server

LOOKUP = Lookup(1, UserId(b"u" * 16), ())


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server(clock: Clock) -> Server:
    return Server(clock, pages=8, page_bytes=2, ranks=2)


def make_session(server: Server, **changes: Any) -> Session:
    options: dict[str, Any] = {
        "engine": "engine",
        "workers": server.workers,
        "block_bytes": 2,
        "connect": server.connect,
    } | changes
    return Session("server.sock", clock=server.clock, **options)


def opened(server: Server) -> Session:
    session = make_session(server)
    session.await_open(1.0)
    assert session.is_open
    return session


def until_open(session: Session, clock: Clock) -> float:
    """Let time pass until the session is open, and return how long it took."""
    began = clock()
    for _ in range(1000):
        session.connect_if_due()
        session.receive()
        if session.is_open:
            return clock() - began
        clock.advance(0.01)
    raise AssertionError("the session does not open")


def test_it_opens_once_the_server_has_all_workers(server: Server) -> None:
    server.lose_workers()
    session = make_session(server)
    session.await_open(1.0)
    assert session.phase is SessionPhase.GREETING
    assert not session.send(LOOKUP), "sent before leases can be had"
    server.attach_workers()
    session.receive(1.0)
    assert session.is_open
    assert session.naming_secret == server.secret


def test_waiting_for_it_ends_with_the_answer_and_not_with_the_time(server: Server, clock: Clock) -> None:
    before = clock()
    make_session(server).await_open(1.0)
    assert clock() - before == pytest.approx(ROUND_TRIP_SECONDS)


def test_waiting_for_a_server_that_is_not_there_takes_no_time(server: Server, clock: Clock) -> None:
    server.kill()
    before = clock()
    make_session(server).await_open(1.0)
    assert clock() == before


def test_waiting_for_a_frozen_server_ends(server: Server, clock: Clock) -> None:
    server.is_frozen = True
    before = clock()
    session = make_session(server)
    session.await_open(1.0)
    assert clock() - before == pytest.approx(1.0)
    server.thaw()
    session.receive(1.0)
    assert session.is_open


def test_it_hands_on_answers_and_nothing_else(server: Server) -> None:
    session = opened(server)
    assert session.send(LOOKUP)
    assert session.receive(1.0) == [LookedUp(1, ready=0)]


@pytest.mark.parametrize("loss", ["server", "lifelines", "send"])
def test_a_loss_is_no_error_and_the_next_session_is_another(server: Server, clock: Clock, loss: str) -> None:
    session = opened(server)
    first, secret = session.incarnation, session.naming_secret
    if loss == "lifelines":
        server.lose_workers()
        server.attach_workers()
    else:
        server.restart()
    if loss == "send":
        assert not session.send(LOOKUP)
    else:
        assert session.receive(1.0) == []
    assert not session.is_open
    assert session.receive(1.0) == []
    until_open(session, clock)
    assert session.incarnation != first
    assert (session.naming_secret == secret) == (loss == "lifelines")


def test_attempts_come_later_each_time_and_soon_again_after_a_success(server: Server, clock: Clock) -> None:
    session = opened(server)
    attempts: list[float] = []

    def refuse(path: str) -> Any:
        attempts.append(clock())
        raise ConnectionLost(f"no server listens on {path}")

    session._connect = refuse
    server.restart()
    session.receive()
    lost_at = clock()
    for _ in range(1000):
        session.connect_if_due()
        clock.advance(0.005)
    waits = [later - earlier for earlier, later in pairwise([lost_at, *attempts])]
    assert waits[0] == pytest.approx(RETRY_SECONDS_MIN, abs=0.006)
    assert all(later >= earlier - 0.006 for earlier, later in pairwise(waits))
    assert waits[-1] == pytest.approx(RETRY_SECONDS_MAX, abs=0.006)

    session._connect = server.connect
    until_open(session, clock)
    server.restart()
    session.receive()
    assert until_open(session, clock) <= RETRY_SECONDS_MIN + 0.03


def test_a_reason_is_logged_once_and_not_once_an_attempt(
    server: Server, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    session = opened(server)
    server.kill()
    session.receive()
    for _ in range(100):
        clock.advance(RETRY_SECONDS_MAX)
        session.connect_if_due()
    reasons = [record.getMessage() for record in caplog.records]
    assert len(reasons) == 2
    assert "the server closed the connection" in reasons[0]
    assert "no server listens on server.sock" in reasons[1]


def test_an_engine_whose_id_is_taken_is_told_so_and_tries_again(
    server: Server, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    first = opened(server)
    second = make_session(server)
    second.await_open(1.0)
    assert not second.is_open
    assert "connected already" in caplog.text
    first.close()
    until_open(second, clock)


def test_answers_that_came_before_the_end_are_handed_on(server: Server) -> None:
    session = opened(server)
    session.send(LOOKUP)
    server.lose_workers()
    assert session.receive(1.0) == [LookedUp(1, ready=0)]
    assert not session.is_open


def test_it_stays_closed_once_it_is_closed(server: Server, clock: Clock) -> None:
    session = opened(server)
    session.close()
    clock.advance(1e9)
    session.connect_if_due()
    assert session.phase is SessionPhase.CLOSED
    assert not server.cache.session_by_control


def test_its_hello_names_what_the_server_must_know(server: Server) -> None:
    lines = []

    def connect(path: str) -> Any:
        lines.append(server.connect(path))
        return lines[-1]

    session = make_session(server, connect=connect)
    session.await_open(1.0)
    assert lines[0].sent == [SchedulerHello("engine", session.incarnation, server.workers, 2)]
