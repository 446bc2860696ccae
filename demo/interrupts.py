"""Interruptions: signals that end the program in good order, whenever they come.

    interruptible(body, clean_up=…)  SIGINT, SIGTERM and SIGHUP raise `Interrupted` in `body`, once
    with deferred():                 … but not in here: what comes meanwhile is raised at the end of the block
        process = Popen(…)

Without `deferred` a signal could come between the start of a process and the note that it was started, and nobody
would end it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

T = TypeVar("T")


class Interrupted(BaseException):
    """Somebody wants the program to end. Not an `Exception`: only the clean-up is still to run."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_status(self) -> int:
        """Return what shells make of a death by this signal."""
        return 128 + self.signum


class _State:
    """What the handler goes by; only the main thread reads or changes it."""

    deferrals = 0  # nested blocks in which nothing is raised
    pending: int | None = None
    is_raised = False


def interruptible(body: Callable[[], T], *, clean_up: Callable[[], None]) -> T:
    """Return what `body` does, and run `clean_up` after it in any case, which no signal cuts short."""
    # A program under nohup is meant to outlive its terminal.
    signals = [signum for signum in SIGNALS if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN]
    _State.deferrals, _State.pending, _State.is_raised = 1, None, False
    handler_by_signal = {signum: signal.signal(signum, _handle) for signum in signals}
    try:
        try:
            _State.deferrals = 0
            return body()
        finally:
            # A signal may still raise right before this; the next ones find that one has been raised.
            _State.deferrals = 1
    finally:
        clean_up()
        for signum, handler in handler_by_signal.items():
            signal.signal(signum, handler)
        _State.deferrals = 0


@contextmanager
def deferred() -> Iterator[None]:
    """Let no signal raise in this block; one that came raises at its end. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.deferrals += 1
    try:
        yield
    finally:
        _State.deferrals -= 1
        if not _State.deferrals and _State.pending is not None:
            _raise(_State.pending)


def _handle(signum: int, frame: FrameType | None) -> None:
    if _State.is_raised:
        return  # once is enough: what follows is bounded, and must not be cut short
    if _State.deferrals:
        _State.pending = signum
    else:
        _raise(signum)


def _raise(signum: int) -> None:
    _State.is_raised, _State.pending = True, None
    raise Interrupted(signum)
