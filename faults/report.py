"""The report: a line a fault on the screen, and the table in the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from faults.watch import Row

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- made by `make faults`: begin -->", "<!-- end -->"
COLUMNS = ("fault", "what happens", "right answers", "waited", "took longer", "allowed", "cached again", "left behind")


def line(row: Row) -> str:
    """Return a fault's line on the screen, and below it what was wrong."""
    verdict = "FAIL" if row.harm else "pass"
    times = "  ".join(f"{time:>7}" for time in _times(row))
    lines = [f"{verdict}  {row.name:36} {_answers(row):>9}  {times}  {_back(row)}"]
    lines += [f"      {text}" for problem in (*row.harm, *row.notes) for text in problem.splitlines()]
    return "\n".join(lines)


def head() -> str:
    """Return what the columns of `line` are."""
    return f"      {'fault':36} {'right':>9}  {'waited':>7}  {'longer':>7}  {'allowed':>7}  first hit afterwards"


def table(rows: Iterable[Row], machine: Mapping[str, str]) -> str:
    """Return the table in Markdown, with the machine that it was made on."""
    made = "Made by `make faults` on: " + ", ".join(f"{name} {value}" for name, value in machine.items()) + "."
    cells = [COLUMNS, ("---",) * len(COLUMNS), *(_cells(row) for row in rows)]
    return "\n".join([made, "", *("| " + " | ".join(row) + " |" for row in cells)])


def write_down(text: str, page: Path = PAGE, *, begin: str = BEGIN) -> None:
    """Put a table into the page, in place of the one that `begin` marks."""
    before, marked, rest = page.read_text(encoding="utf-8").partition(begin)
    _, end, after = rest.partition(END)
    assert marked and end, f"{page} has no place for the table, between {begin} and {END}"
    page.write_text(f"{before}{begin}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def _cells(row: Row) -> tuple[str, ...]:
    verdict = f"**FAILED**: {'; '.join(row.harm)}" if row.harm else "; ".join(("nothing", *row.notes))
    cells = (f"`{row.name}`", row.did, _answers(row), *_times(row), _back(row), verdict)
    return tuple(cell.replace("|", "\\|").replace("\n", " ") for cell in cells)


def _answers(row: Row) -> str:
    return f"{row.right} of {len(row.sent)}"


def _times(row: Row) -> list[str]:
    """Return the longest wait to be computed, the longest time beyond that without a cache, and what is allowed."""
    return [f"{seconds:.2f} s" for seconds in (row.waited_seconds, row.added_seconds, row.allowed_seconds)]


def _back(row: Row) -> str:
    if row.back_requests is None or row.back_seconds is None:
        return "not"
    return f"with request {row.back_requests}, {row.back_seconds:.1f} s"
