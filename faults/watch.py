"""The watch over one fault: what its requests came to, and the verdict."""

from __future__ import annotations

import time
from collections.abc import Callable

from msgspec import Struct

from demo.engine import Completion
from faults.prompts import References, Timed

PATIENCE_SECONDS = 0.25
"""The connector's default, which is what these engines run with."""

BACK_SECONDS_MAX = 60.0


class Sent(Struct, frozen=True, kw_only=True):
    """A request that was answered, beside the same without a cache. Times run to the last token, in seconds."""

    prompt_tokens: int
    cached_tokens: int
    is_right: bool
    seconds: float
    queued_seconds: float  # of them before it was computed
    stopped_seconds: float  # for which the fault itself stopped the engine meanwhile
    reference_seconds: float

    @property
    def added_seconds(self) -> float:
        """What it took beyond its time without a cache; nothing if it was faster."""
        return max(self.seconds - self.stopped_seconds - self.reference_seconds, 0.0)

    @property
    def waited_seconds(self) -> float:
        """What it waited to be computed or, for a hit, until it was loaded."""
        return max(self.queued_seconds - self.stopped_seconds, 0.0)


class Row(Struct, frozen=True, kw_only=True):
    """What became of a fault.

    `back_requests` is which request after the fault was the first to be a hit, answered after `back_seconds`.
    """

    name: str
    did: str
    sent: tuple[Sent, ...]
    allowed_seconds: float
    back_requests: int | None
    back_seconds: float | None
    left: tuple[str, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def added_seconds(self) -> float:
        """The longest that a request took beyond its time without a cache."""
        return max((sent.added_seconds for sent in self.sent), default=0.0)

    @property
    def waited_seconds(self) -> float:
        """The longest that a request waited to be computed, or until it was loaded."""
        return max((sent.waited_seconds for sent in self.sent), default=0.0)

    @property
    def right(self) -> int:
        """How many answers were those without a cache."""
        return sum(sent.is_right for sent in self.sent)

    @property
    def took_longer(self) -> bool:
        """Whether a request took longer than is allowed."""
        return self.added_seconds > self.allowed_seconds

    @property
    def only_took_longer(self) -> bool:
        """Whether that is all that was wrong: no request waited, so it may be that the processor was not to be had."""
        return self.took_longer and len(self.harm) == 1

    @property
    def harm(self) -> tuple[str, ...]:
        """What was wrong, in words; a fault passes without any."""
        found = list(self.problems)
        if not self.sent:
            found.append("no request was answered")
        if self.right < len(self.sent):
            found.append(f"{len(self.sent) - self.right} of {len(self.sent)} answers were not those without a cache")
        if self.took_longer:
            found.append(f"a request took {self.added_seconds:.2f} s longer, {self.allowed_seconds:.2f} s are allowed")
        if self.waited_seconds > self.allowed_seconds:
            found.append(f"a request waited {self.waited_seconds:.2f} s, {self.allowed_seconds:.2f} s are allowed")
        if self.back_requests is None:
            found.append("caching did not come back")
        return (*found, *(f"left behind: {what}" for what in self.left))


class Watch:
    """What has been seen so far of a fault.

    The rule for waits: a request may take its time without a cache, measured in the same run on an engine without a
    connector, and beyond it the connector's patience and one engine step; nor may it wait longer than those to be
    computed. Time for which the fault itself stopped the engine's processes is not counted.
    """

    def __init__(self, references: References) -> None:
        self._references = references
        self._sent: list[Sent] = []
        self._back: tuple[int, float] | None = None
        self.left: list[str] = []
        self.problems: list[str] = []
        self.notes: list[str] = []

    def expect(self, holds: bool, otherwise: str) -> None:
        """Note a problem unless something holds."""
        if not holds:
            self.problems.append(otherwise)

    def judge(self, prompt: str, timed: Timed, *, stopped_seconds: float = 0.0) -> None:
        """Compare an answer and its time with those without a cache."""
        reference, completion = self._references[prompt], timed.completion
        self._sent.append(
            Sent(
                prompt_tokens=completion.prompt_tokens,
                cached_tokens=completion.cached_tokens,
                is_right=completion.token_ids == reference.token_ids,
                seconds=timed.seconds,
                queued_seconds=timed.queued_seconds,
                stopped_seconds=stopped_seconds,
                reference_seconds=reference.seconds,
            )
        )

    def await_hit(self, ask: Callable[[], Completion]) -> Completion:
        """Send a request again and again until it is a hit, a minute at most; the last time it was called counts."""
        began, requests = time.monotonic(), 0
        while True:
            completion, requests = ask(), requests + 1
            seconds = time.monotonic() - began
            if completion.cached_tokens:
                self._back = requests, seconds
                return completion
            if seconds > BACK_SECONDS_MAX:
                self._back = None
                return completion

    def row(self, name: str, did: str) -> Row:
        """Return the verdict."""
        requests, seconds = self._back or (None, None)
        return Row(
            name=name,
            did=did,
            sent=tuple(self._sent),
            allowed_seconds=PATIENCE_SECONDS + self._references.step_seconds,
            back_requests=requests,
            back_seconds=seconds,
            left=tuple(self.left),
            problems=tuple(self.problems),
            notes=tuple(self.notes),
        )
