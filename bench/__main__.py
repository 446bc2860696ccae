"""The command line of the benchmarks."""

import argparse
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from bench import copy, core, disk, load, lookup, start, ttft, ttft_disk
from bench.report import Report, Run, load_average, machine

BENCHES: dict[str, Callable[[bool], Report]] = {
    "lookup": lambda smoke: lookup.run(lookup.SMOKE if smoke else lookup.FULL),
    "copy": lambda smoke: copy.run(copy.SMOKE if smoke else copy.FULL),
    "ttft": lambda smoke: ttft.run(ttft.SMOKE if smoke else ttft.FULL),
    "ttft-disk": lambda smoke: ttft_disk.run(ttft_disk.SMOKE if smoke else ttft_disk.FULL),
    "load": lambda smoke: load.run(load.SMOKE if smoke else load.FULL),
    "start": lambda smoke: start.run(start.SMOKE if smoke else start.FULL),
    "disk": lambda smoke: disk.run(disk.SMOKE if smoke else disk.FULL),
    "core": lambda smoke: core.run(core.SMOKE if smoke else core.FULL),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks that were asked for. A target that isn't reached is a result, not a failure."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure Saltern on this machine.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(BENCHES)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results down as well")
    parser.add_argument("--smoke", action="store_true", help="run with tiny sizes: that it works, not how fast")
    options = parser.parse_args(arguments)
    logging.getLogger("saltern").setLevel(logging.ERROR)  # peers come and go here, which is a warning in an engine
    unknown = [name for name in options.names if name not in BENCHES]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHES)}")
    here = machine()
    print(*(f"{name}: {value}" for name, value in here.items()), "", sep="\n", flush=True)
    reports = []
    for name in options.names or BENCHES:
        report = _run(BENCHES[name], smoke=options.smoke)
        print(report, flush=True)
        reports.append(report)
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(Run(here, tuple(reports))), indent=2))
    return 0


def _run(bench: Callable[[bool], Report], *, smoke: bool) -> Report:
    before, began = load_average(), time.monotonic()
    report = bench(smoke)
    return msgspec.structs.replace(report, load=(before, load_average()), seconds=time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
