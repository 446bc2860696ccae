"""Signals end a program in good order, whenever they come."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from demo.interrupts import SIGNALS, Interrupted, deferred, interruptible


def send(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_ends_the_body_and_then_comes_the_clean_up(signum: signal.Signals) -> None:
    seen: list[str] = []

    def body() -> None:
        send(signum)()
        seen.append("went on")

    with pytest.raises(Interrupted, match=signum.name) as interrupted:
        interruptible(body, clean_up=lambda: seen.append("clean"))
    assert interrupted.value.exit_status == 128 + signum
    assert seen == ["clean"]


def test_a_deferred_signal_is_raised_at_the_end_of_the_outermost_block() -> None:
    seen: list[str] = []

    def body() -> None:
        with deferred():
            with deferred():
                send(signal.SIGTERM)()
            seen.append("noted")
        seen.append("went on")

    with pytest.raises(Interrupted):
        interruptible(body, clean_up=lambda: None)
    assert seen == ["noted"]


def test_no_signal_cuts_the_clean_up_short() -> None:
    seen: list[str] = []

    def clean_up() -> None:
        send(signal.SIGINT)()
        with deferred():
            send(signal.SIGTERM)()
        seen.append("clean")

    with pytest.raises(Interrupted):
        interruptible(send(signal.SIGHUP), clean_up=clean_up)
    assert interruptible(lambda: 7, clean_up=clean_up) == 7
    assert seen == ["clean", "clean"]


def test_handlers_come_back_and_a_body_may_fail_by_itself() -> None:
    before = [signal.getsignal(signum) for signum in SIGNALS]
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0, clean_up=lambda: None)
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


def test_a_program_under_nohup_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interruptible(send(signal.SIGHUP), clean_up=lambda: None)
    finally:
        signal.signal(signal.SIGHUP, before)
