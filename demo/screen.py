"""What the demo prints: one line a step, and on a terminal what it is waiting for right now."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import cycle

from demo.steps import Step

_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_FRAME_SECONDS = 0.1
_CLEAR_LINE = "\r\x1b[K"
_GREEN, _RED, _DIM, _PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[2m", "\x1b[0m"


class Screen:
    """Standard output, as a terminal or as a file that is read later."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()

    def say(self, text: str = "") -> None:
        """Print a line."""
        print(text, flush=True)

    @contextmanager
    def waiting(self, for_what: str, *, is_step: bool = False) -> Iterator[None]:
        """Show what is going on, with the seconds it has taken. In a file: the line alone, and of steps not even it."""
        if not self._is_terminal:
            if not is_step:
                self.say(f"… {for_what}")
            yield
            return
        is_over = threading.Event()
        ticker = threading.Thread(target=_tick, args=(for_what, is_over), daemon=True)
        ticker.start()
        try:
            yield
        finally:
            is_over.set()
            ticker.join()

    def header(self) -> None:
        """Print what the columns of the steps are."""
        self.say(
            self._colored(f"      {'step':19} {'what was done':52} {'cached':>12} {'first token':>12}  output", _DIM)
        )

    def step(self, step: Step) -> None:
        """Print one line for a step, and below it what else is worth a look, and why it failed."""
        verdict = self._colored("pass", _GREEN) if step.ok else self._colored("FAIL", _RED)
        cached = "–" if step.cached_tokens is None else f"{step.cached_tokens:,} of {step.prompt_tokens:,}"
        first_token = "–" if step.ttft_ms is None else _duration(step.ttft_ms)
        output = {None: "–", True: "identical", False: "different"}[step.identical]
        self.say(f"{verdict}  {step.name:19} {step.did:52} {cached:>12} {first_token:>12}  {output}")
        for note in step.notes:
            self.say(self._colored(f"      {note}", _DIM))
        for problem in step.problems:
            self.say("\n".join(f"      {line}" for line in problem.splitlines()))

    def _colored(self, text: str, color: str) -> str:
        return f"{color}{text}{_PLAIN}" if self._is_terminal else text


def _duration(milliseconds: float) -> str:
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.2f} s"


def _tick(text: str, is_over: threading.Event) -> None:
    began = time.monotonic()
    text = text[: shutil.get_terminal_size().columns - 14]  # a line that wraps could not be cleared
    with suppress(OSError):  # a terminal that was closed: the signal that says so ends the demo
        for frame in cycle(_FRAMES):
            if is_over.is_set():
                break
            print(f"{_CLEAR_LINE}  {frame}   {text} {_DIM}{time.monotonic() - began:.0f} s{_PLAIN}", end="", flush=True)
            is_over.wait(_FRAME_SECONDS)
        print(_CLEAR_LINE, end="", flush=True)
