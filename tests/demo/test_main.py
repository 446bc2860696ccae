"""`make demo`: all its steps pass, and it leaves nothing behind, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from demo.orphans import adopt

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    "alice-cold",
    "alice-hit",
    "bob-isolated",
    "unsalted-isolated",
    "engine-restarted",
    "user-limit",
    "server-killed",
    "server-back",
    "flood-unharmed",
    "public-prefix",
    "forged-salt-refused",
    "server-restarted",
    "erased",
]
DEMO_SECONDS_MAX = 900.0
END_SECONDS_MAX = 100.0  # of what a demo that took longer has left
POLL_SECONDS = 0.05

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(DEMO_SECONDS_MAX + END_SECONDS_MAX)]


class _Step(msgspec.Struct):
    name: str
    ok: bool
    cached_tokens: int
    ttft_ms: float
    identical: bool
    problems: list[str]


class _Report(msgspec.Struct):
    steps: list[_Step]
    ok: bool


class Demo:
    """A demo under way, with a folder for temporary files of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        folder.mkdir()
        self._output_path = folder / "output"
        self._temporary = folder / "tmp"
        self._temporary.mkdir()
        self._shared_before = _shared_memory()
        self._processes_before = _descendants(os.getpid())
        self._deadline = time.monotonic() + DEMO_SECONDS_MAX
        with self._output_path.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "demo", *arguments],
                cwd=ROOT,
                env={**os.environ, "TMPDIR": str(self._temporary), "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What it has said so far."""
        return self._output_path.read_text()

    @property
    def processes(self) -> set[int]:
        """Its processes, itself included; those whose parent has died are ours."""
        return _descendants(os.getpid()) - self._processes_before

    @property
    def leftovers(self) -> list[str]:
        """What a demo that has ended has left behind: processes, files, and shared memory that nobody uses."""
        shared = _shared_memory() - self._shared_before
        orphaned = [name for name in shared if not _is_mapped(name)]  # others may work on this machine as well
        return [*(f"{pid} {_command(pid)}" for pid in self.processes), *map(str, self._temporary.iterdir()), *orphaned]

    def wait_for(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds."""
        while not condition():
            assert self._process.poll() is None, f"the demo ended before {what}: {self.output}"
            assert time.monotonic() < self._deadline, f"waited too long for {what}: {self.output}"
            time.sleep(POLL_SECONDS)

    def interrupt(self, signum: int) -> None:
        """Send a signal to the demo alone."""
        self._process.send_signal(signum)

    def wait(self) -> int:
        """Wait for its end and return its exit status."""
        return self._process.wait(max(0.0, self._deadline - time.monotonic()))

    def kill(self) -> None:
        """End what is left of it."""
        for pid in self.processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture
def start() -> Iterator[Callable[..., Demo]]:
    """Return what starts demos; those that a failed test has left are ended."""
    started: list[Demo] = []
    adopt()
    with tempfile.TemporaryDirectory(prefix="saltern-e2e-") as folder:  # short: a socket's path holds 107 bytes

        def start_one(*arguments: str) -> Demo:
            started.append(Demo(Path(folder, str(len(started))), *arguments))
            return started[-1]

        yield start_one
        for demo in started:
            demo.kill()
    adopt(wanted=False)


def test_all_steps_pass(start: Callable[..., Demo], tmp_path: Path) -> None:
    demo = start("--json", str(tmp_path / "report.json"))
    status = demo.wait()
    report = msgspec.json.decode((tmp_path / "report.json").read_bytes(), type=_Report)

    assert [step.name for step in report.steps] == NAMES
    assert {step.name: step.problems for step in report.steps if not step.ok or not step.identical} == {}
    assert report.ok
    assert status == 0
    assert {step.name for step in report.steps if step.cached_tokens} == {
        "alice-hit",
        "engine-restarted",
        "user-limit",
        "server-back",
        "flood-unharmed",
        "public-prefix",
        "server-restarted",
    }
    assert demo.leftovers == []


@pytest.mark.parametrize(
    ("signum", "moment"),
    [(signal.SIGHUP, "starting saltern serve"), (signal.SIGINT, "starting vLLM"), (signal.SIGTERM, "VLLM::")],
    ids=["server", "engine", "worker"],
)
def test_an_interrupted_demo_leaves_nothing_behind(start: Callable[..., Demo], signum: int, moment: str) -> None:
    demo = start()
    # Of vLLM's processes those that are named are in the midst of loading the model.
    demo.wait_for(moment, lambda: moment in demo.output or any(moment in _command(pid) for pid in demo.processes))
    demo.interrupt(signum)

    assert demo.wait() == 128 + signum, demo.output
    assert demo.leftovers == []


def _descendants(root: int) -> set[int]:
    """Return the ids of the processes below one, those that have ended and are not buried included."""
    parent_by_id = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            # pid (name) state parent …; the name may hold spaces and parentheses, hence the last ")".
            _state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            parent_by_id[int(stat.parent.name)] = int(parent)
    found: set[int] = set()
    while below := {pid for pid, parent in parent_by_id.items() if parent == root or parent in found} - found:
        found |= below
    return found


def _command(pid: int) -> str:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def _shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def _is_mapped(name: str) -> bool:
    """Return whether any process uses this shared memory."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # the process has ended, or is another user's
            if f"/dev/shm/{name}" in maps.read_text():
                return True
    return False
