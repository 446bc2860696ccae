"""`make torture`: a server killed again and again under load, on the same files; and every damage to those files."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import msgspec

from bench.report import machine
from demo.interrupts import Interrupted, deferred, interruptible
from faults.private import hide_mounts
from faults.report import write_down
from faults.torture.damage import DAMAGES, take
from faults.torture.lives import Torture
from faults.torture.report import BEGIN, Result, damage_table, line, table
from faults.torture.scene import Outcome

KILLS = 200


class Report(msgspec.Struct, frozen=True):
    """What `--json` writes."""

    machine: dict[str, str]
    kills: Result | None
    damages: tuple[Outcome, ...]
    ok: bool


class Run:
    """One run, and all that it has to leave behind as it was."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._stack = ExitStack()

    def run(self) -> Report:
        """Kill, damage, and say what became of it."""
        with deferred():
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="saltern-torture-")))
        outcomes = []
        for name in self._options.damages:
            outcome = take(name, folder / name)
            print(line(outcome), flush=True)
            outcomes.append(outcome)
        result = self._kill(folder) if self._options.kills else None
        ok = not any(outcome.problems for outcome in outcomes) and (result is None or result.is_ok)
        return Report(machine(), result, tuple(outcomes), ok)

    def close(self) -> None:
        """End every process and remove every file of this run."""
        self._stack.close()

    def _kill(self, folder: Path) -> Result:
        with deferred():
            torture = Torture(
                folder, kills=self._options.kills, seed=self._options.seed, say=partial(print, flush=True)
            )
            self._stack.callback(torture.close)
        return torture.run()


def main() -> int:
    """Return 0 if all was as it should be, 1 if anything wasn't, 2 for wrong usage, 128 + signal when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m faults.torture", description=__doc__)
    parser.add_argument("damages", nargs="*", metavar="DAMAGE", help=f"some of {', '.join(DAMAGES)} (default: all)")
    parser.add_argument("--kills", type=int, default=KILLS, metavar="COUNT", help=f"default {KILLS}; 0 for none")
    parser.add_argument("--no-damages", action="store_true", help="kill only")
    parser.add_argument("--seed", type=int, default=1, help="of the moments of kills, and of what is asked")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results down as JSON as well")
    options = parser.parse_args()
    unknown = [name for name in options.damages if name not in DAMAGES]
    if unknown:
        parser.error(f"no damage {unknown[0]!r}; there are {', '.join(DAMAGES)}")
    is_all = not options.damages and not options.no_damages and options.kills >= KILLS
    options.damages = [] if options.no_damages else options.damages or list(DAMAGES)
    logging.disable()  # that a server is lost is what this is about
    hide_mounts()  # before there are threads; without it a disk that is full can't be had
    run = Run(options)
    try:
        report = interruptible(run.run, clean_up=run.close)
    except Interrupted as interrupted:
        with suppress(OSError):  # the terminal may be gone
            print(f"interrupted by {interrupted}; nothing is left behind", file=sys.stderr)
        return interrupted.exit_status
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    if report.kills is not None:
        print(table(report.kills, report.machine))
        if is_all:
            write_down(f"{table(report.kills, report.machine)}\n\n{damage_table(report.damages)}", begin=BEGIN)
    return 0 if report.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
