"""The pace: how long the engine takes to compute a token of a prompt, learned from its own steps.

With two batches in flight a step is scheduled while the one before is still computed, and begins when that one ends:

    scheduled   1 2   3   4                    a step took from the later of the two,
    ended         ────1───2───3                the end of the one before and its own schedule, to its end

An engine that idles schedules nothing, so its naps are in no step.
"""

from collections import deque
from collections.abc import Callable, Iterable

NEW_SHARE = 0.2
"""Weight of the newest step: some ten of them follow a change of load, and one alone changes little."""

STEPS_MAX = 64
"""Most steps that are remembered; vLLM has one or two in flight, and one for each stage of a pipeline."""


class Pace:
    """`seconds_per_token` is 0 until known. Only steps that compute a block's worth of prompts tell: others cost a
    step, however little they compute. `clock` is in seconds."""

    def __init__(self, *, block_tokens: int, clock: Callable[[], float]) -> None:
        self._block_tokens = block_tokens
        self._clock = clock
        self._steps: deque[tuple[float, int]] = deque(maxlen=STEPS_MAX)  # (scheduled at, tokens of prompts)
        self._ended_at = float("-inf")
        self.seconds_per_token = 0.0

    @property
    def block_seconds(self) -> float:
        """Return how long a block takes, 0 if that isn't known."""
        return self.seconds_per_token * self._block_tokens

    def begin(self, scheduled_tokens: Iterable[int]) -> None:
        """Take note of a step that is scheduled now. A request that computes one token only is answering."""
        self._steps.append((self._clock(), sum(tokens for tokens in scheduled_tokens if tokens > 1)))

    def end(self) -> None:
        """Take note that the oldest step under way has ended."""
        if not self._steps:
            return
        scheduled_at, tokens = self._steps.popleft()
        began_at, self._ended_at = max(scheduled_at, self._ended_at), self._clock()
        seconds = self._ended_at - began_at
        if tokens >= self._block_tokens and seconds > 0:
            newest = seconds / tokens
            known = self.seconds_per_token or newest
            self.seconds_per_token = known + NEW_SHARE * (newest - known)
