"""The harness on the command line: plays scenarios with a connector and stops at the first finding.

A life of Saltern that finds something is made smaller at once, unless `--no-shrink` is given. Seeds decide everything
but the order of Python's sets of strings, so that is fixed as well.
"""

import argparse
import functools
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable

import msgspec

from .engine import Counts
from .findings import Finding
from .mutants import MUTANTS
from .reference import ReferenceConnector
from .saltern_lives import life, live
from .shrink import found, shrink
from .subjects import run
from .sweeps import ENGINES as SWEPT_ENGINES
from .sweeps import SWEEPS, base

HASH_SEED = "0"


def main() -> int:
    """Play one seed or many, or sweep. Returns 1 after printing the first seed with a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.harness", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds to play")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="play this seed only")
    connectors: tuple[type[ReferenceConnector], ...] = (ReferenceConnector, *MUTANTS)
    play_by_name: dict[str, Callable[[int], Counts]] = {"Saltern": live}
    play_by_name |= {connector.__name__: functools.partial(run, connector=connector) for connector in connectors}
    parser.add_argument("--connector", choices=sorted(play_by_name), default=ReferenceConnector.__name__)
    parser.add_argument(
        "--sweep", action="store_true", help="live Saltern's small lives with a blow at every step instead"
    )
    parser.add_argument("--all", action="store_true", help="go on after a finding")
    parser.add_argument("--no-shrink", action="store_true", help="leave a life that finds something as it is")
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.seeds) if options.seed is None else (options.seed,)
    if options.sweep:
        return sweep()
    total: Counter[str] = Counter()
    findings, began = 0, time.monotonic()
    for seed in seeds:
        try:
            total.update(msgspec.structs.asdict(play_by_name[options.connector](seed)))
        except Finding as finding:
            print(f"seed {seed}: {type(finding).__name__}: {finding}", flush=True)
            if options.connector == "Saltern" and not options.no_shrink:
                smaller, finding = shrink(life(seed))
                print(f"shrunk: {type(finding).__name__}: {finding}\n{smaller!r}", flush=True)
            findings += 1
            if not options.all:
                return 1
    rate = len(seeds) / (time.monotonic() - began)
    print(
        f"{len(seeds)} seeds, {findings or 'none'} with a finding, {rate:.1f} a second:",
        ", ".join(f"{name} {count}" for name, count in total.items()),
    )
    return min(findings, 1)


def sweep() -> int:
    """Live all that is swept. Returns 1 after printing the lives that found something."""
    findings = 0
    for (engine, options), (name, blows) in itertools.product(SWEPT_ENGINES.items(), SWEEPS.items()):
        lives = list(blows(base(options)))
        for blow in lives:
            finding = found(blow)
            if finding is not None:
                print(f"{engine}: {type(finding).__name__}: {finding}\n{blow!r}", flush=True)
                findings += 1
        print(f"{engine}, {name}: {len(lives)} lives", flush=True)
    return min(findings, 1)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != HASH_SEED:
        command = [sys.executable, "-m", "tests.harness", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | {"PYTHONHASHSEED": HASH_SEED})
    sys.exit(main())
