"""`make faults`: every fault on a real vLLM, each of which leaves its requests right, quick and unharmed, or fails."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import msgspec

from bench.report import machine
from demo.engine import EngineError
from demo.interrupts import Interrupted, deferred, interruptible
from demo.model import MODEL_NAME, ensure_model
from demo.orphans import adopt, bury
from demo.screen import Screen
from faults.catalogue import FAULTS, take, what_happens
from faults.private import hide_mounts
from faults.report import head, line, table, write_down
from faults.stage import Stage
from faults.watch import Row


class Report(msgspec.Struct, frozen=True):
    """What `--json` writes."""

    machine: dict[str, str]
    rows: tuple[Row, ...]
    ok: bool


class Run:
    """One run, and all that it has to leave behind as it was."""

    def __init__(self, *, has_own_mounts: bool, logs: Path | None) -> None:
        self._has_own_mounts = has_own_mounts
        self._logs = logs
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._stage: Stage | None = None

    def run(self, screen: Screen, names: Sequence[str]) -> tuple[Row, ...]:
        """Take the faults one after the other. Raises `EngineError` when there is nothing to compare with."""
        began = time.monotonic()
        screen.say(f"Saltern with vLLM and {MODEL_NAME} on this machine; vLLM's own prefix caching is off\n")
        with screen.waiting("making sure that the model is there"):
            model = ensure_model()
        with deferred():
            self._scratch = tempfile.TemporaryDirectory(prefix="saltern-faults-")
            self._stage = stage = Stage(
                Path(self._scratch.name), model, has_own_mounts=self._has_own_mounts, logs=self._logs
            )
        with screen.waiting("computing all answers without a cache (a minute)"):
            references = stage.measure_references()
        screen.say(f"\n{head()}")
        rows = []
        for name in names:
            with screen.waiting(f"{name:36} {what_happens(name)}", is_step=True):
                row = take(name, stage, references)
            screen.say(line(row))
            rows.append(row)
        passed = sum(not row.harm for row in rows)
        screen.say(f"\n{passed} of {len(rows)} faults did no harm, in {time.monotonic() - began:.0f} s")
        return tuple(rows)

    def clean_up(self) -> None:
        """End every process and remove every file of this run."""
        with ExitStack() as stack:
            stack.callback(bury)
            if self._scratch is not None:
                stack.callback(self._scratch.cleanup)
            if self._stage is not None:
                stack.callback(self._stage.close)


def main() -> int:
    """Take the faults; return 0 if none did harm, 1 if one did, 2 for wrong usage, 128 + signal when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="FAULT", help=f"some of {', '.join(FAULTS)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results down as JSON as well")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the logs of server and engines there")
    options = parser.parse_args()
    if options.logs is not None and not options.logs.is_dir():
        parser.error(f"--logs: there is no folder {options.logs}")
    unknown = [name for name in options.names if name not in FAULTS]
    if unknown:
        parser.error(f"no fault {unknown[0]!r}; there are {', '.join(FAULTS)}")
    try:
        return _run(options.names, json_path=options.json, logs=options.logs)
    except Interrupted as interrupted:
        with suppress(OSError):  # the terminal may be gone
            print(f"interrupted by {interrupted}; nothing is left behind", file=sys.stderr)
        return interrupted.exit_status
    except EngineError as error:
        print(error, file=sys.stderr)
        return 1


def _run(names: Sequence[str], *, json_path: Path | None, logs: Path | None) -> int:
    has_own_mounts = hide_mounts()  # before there are threads
    adopt()
    run = Run(has_own_mounts=has_own_mounts, logs=logs)
    rows = interruptible(partial(run.run, Screen(), names or list(FAULTS)), clean_up=run.clean_up)
    ok = not any(row.harm for row in rows)
    if json_path is not None:
        report = Report(machine(), rows, ok)
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    if not names:
        write_down(table(rows, machine()))
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
