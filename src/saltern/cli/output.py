"""What commands print: tables, complaints, and the exit status that goes with one."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXIT_FAILED = 1
EXIT_ASKED_WRONGLY = 2


def complain(text: str, status: int) -> int:
    """Say in one line why a command did not do what was asked, and return its exit status."""
    print(f"saltern: {text}", file=sys.stderr)
    return status


def table(header: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> list[str]:
    """Line columns up, the first to the left and the others to the right. Control characters come out escaped."""
    cells = [header, *(tuple(_printable(str(value)) for value in row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in cells
    ]  # fmt: skip


def _printable(text: str) -> str:
    """An engine names itself: keep its name from driving the operator's terminal."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
