"""The engine's session: the scheduler's connection to the server, and its way back after a loss.

    CLOSED ──connect──► GREETING ──Welcome, Attached──► OPEN
      ▲                    │                              │
      └────────────────────┴── EOF, SessionEnded, refusal ┘     tried again, later each time, up to a second

No call blocks longer than it is told to, and none raises for what the server does: a cache that is gone
is a cache that has nothing.
"""

import logging
import os
from collections.abc import Callable
from enum import Enum
from functools import partial

from saltern.client.control import ConnectionLost, Control
from saltern.core.keys import Content
from saltern.core.messages import (
    NAME_BYTES,
    Attached,
    Refused,
    Reply,
    Request,
    SchedulerHello,
    SessionEnded,
    SigningSecrets,
    Welcome,
)

logger = logging.getLogger(__name__)

RETRY_SECONDS_MIN = 0.05
RETRY_SECONDS_MAX = 1.0


class SessionPhase(Enum):
    """Where the session is; see the drawing above."""

    CLOSED = "closed"
    GREETING = "greeting"
    OPEN = "open"


class Session:
    """One engine's session at a time. `incarnation` names the present one and is new for every connection."""

    def __init__(
        self,
        path: str,
        *,
        engine: str,
        workers: tuple[bytes, ...],
        block_bytes: int,
        state_bytes: int = 0,
        block_tokens: int = 0,
        clock: Callable[[], float],
        server_uid: int | None = None,
        connect: Callable[[str], Control] | None = None,
    ) -> None:
        self._path = path
        self._engine = engine
        self._workers = workers
        self._block_bytes = block_bytes
        self._state_bytes = state_bytes
        self._block_tokens = block_tokens
        self.root = Content(b"")
        self._clock = clock
        self._connect = connect or partial(Control.connect, server_uid=server_uid)
        self._control: Control | None = None
        self._retry_at = 0.0
        self._retry_seconds = RETRY_SECONDS_MIN
        self._last_reason = ""
        self.phase = SessionPhase.CLOSED
        self.incarnation = b""
        self.naming_secret = b""
        self.signing_secrets: tuple[bytes, ...] = ()

    @property
    def is_open(self) -> bool:
        """Return whether leases can be had."""
        return self.phase is SessionPhase.OPEN

    def connect_if_due(self) -> None:
        """Connect where there is no connection and the last attempt is long enough ago."""
        if self.phase is not SessionPhase.CLOSED or self._clock() < self._retry_at:
            return
        try:
            self._control = self._connect(self._path)
            self.phase = SessionPhase.GREETING
            self.incarnation = os.urandom(NAME_BYTES)
            self._control.send(
                SchedulerHello(
                    self._engine,
                    self.incarnation,
                    self._workers,
                    self._block_bytes,
                    state_bytes=self._state_bytes,
                    root=self.root,
                    block_tokens=self._block_tokens,
                )
            )
        except ConnectionLost as lost:
            self._close(str(lost))

    def await_open(self, seconds: float) -> None:
        """Connect and wait for the session to open: at start, where nothing else waits."""
        deadline = self._clock() + seconds
        while not self.is_open and (left := deadline - self._clock()) > 0:
            self.connect_if_due()
            if self._control is None and self._last_reason:
                return  # nobody is there
            self.receive(left)

    def send(self, message: Request) -> bool:
        """Send to an open session; False if there is none (any more)."""
        if self._control is None or not self.is_open:
            return False
        try:
            self._control.send(message)
        except ConnectionLost as lost:
            self._close(str(lost))
            return False
        return True

    def receive(self, timeout: float = 0.0) -> list[Reply]:
        """Return answers that came in, waiting up to `timeout` seconds for the first."""
        if self._control is None:
            return []
        try:
            replies = self._control.receive(timeout)
        except ConnectionLost as lost:
            self._close(str(lost))
            return []
        answers: list[Reply] = []
        for reply in replies:
            match reply:
                case Welcome():
                    self.naming_secret = reply.naming_secret
                    self.signing_secrets = reply.signing_secrets
                case SigningSecrets(secrets):
                    self.signing_secrets = secrets
                case Attached():
                    self.phase = SessionPhase.OPEN
                    self._retry_seconds = RETRY_SECONDS_MIN
                    self._last_reason = ""
                    logger.info("Saltern's cache at %s is in use", self._path)
                case Refused(reason) | SessionEnded(reason):
                    self._close(reason)
                    return answers
                case _:
                    answers.append(reply)
        return answers

    def close(self) -> None:
        """Leave for good, without a word in the log."""
        self._close(self._last_reason)
        self._retry_at = float("inf")

    def _close(self, reason: str) -> None:
        if self._control is not None:
            self._control.close()
        self._control = None
        self.phase = SessionPhase.CLOSED
        self._retry_at = self._clock() + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, RETRY_SECONDS_MAX)
        if reason != self._last_reason:  # once, not once a retry
            self._last_reason = reason
            logger.warning("requests go on without Saltern's cache at %s: %s", self._path, reason)
