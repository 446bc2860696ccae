"""The report: what a benchmark measured, as tables for a person and as JSON for a program."""

import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Struct

Cell = str | int | float


class Target(Struct, frozen=True):
    """What was hoped for, and what came of it."""

    what: str
    measured: float
    bound: float
    unit: str
    at_least: bool = False

    @property
    def reached(self) -> bool:
        """Return whether the measured value is on the right side of the bound."""
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        verdict = "reached" if self.reached else "NOT REACHED"
        return f"{self.what}: {_text(self.measured)} {self.unit}, target {sign} {self.bound:g} {self.unit}: {verdict}"


class Table(Struct, frozen=True):
    """Rows under a title; the first column says what, the others hold numbers in the unit that their head names."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __str__(self) -> str:
        lines = [self.columns, *(tuple(map(_text, row)) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.columns))]
        body = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
        return "\n".join([self.title, *("  " + line for line in body)])


class Report(Struct, frozen=True):
    """One benchmark's results. `load` is the machine's load average before and after."""

    name: str
    tables: tuple[Table, ...]
    targets: tuple[Target, ...] = ()
    notes: tuple[str, ...] = ()
    load: tuple[float, float] = (0.0, 0.0)
    seconds: float = 0.0

    def __str__(self) -> str:
        before, after = self.load
        head = f"== {self.name} ({self.seconds:.0f} s, load {before:.1f} before and {after:.1f} after)"
        return "\n".join([head, *map(str, self.tables), *map(str, self.targets), *self.notes, ""])


class Run(Struct, frozen=True):
    """All that one call of the program measured, and where."""

    machine: dict[str, str]
    reports: tuple[Report, ...]


def machine() -> dict[str, str]:
    """Describe this machine as far as it decides the numbers."""
    return {
        "processor": next(_lines("/proc/cpuinfo", "model name"), platform.machine()),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": next(_lines("/proc/meminfo", "MemTotal"), "unknown"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "huge pages in shared memory": _chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
    }


def load_average() -> float:
    """Return the load average over the last minute."""
    return os.getloadavg()[0]


def spread(values: Sequence[float]) -> str:
    """Write the range of what was measured in different rounds."""
    return f"{_text(min(values))}–{_text(max(values))}"


def _text(value: Cell) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else value
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _lines(path: str, name: str) -> Iterator[str]:
    for line in Path(path).read_text("ascii", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            yield value.strip()


def _chosen(path: str) -> str:
    try:
        words: Sequence[str] = Path(path).read_text("ascii").split()
    except OSError:
        return "unknown"
    return next((word.strip("[]") for word in words if word.startswith("[")), "unknown")
