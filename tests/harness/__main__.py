"""The harness on the command line: plays scenarios with a connector and stops at the first finding.

Seeds decide everything but the order of Python's sets of strings, so that is fixed as well.
"""

import argparse
import functools
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
from .saltern_lives import live
from .subjects import run

HASH_SEED = "0"


def main() -> int:
    """Play one seed or many. Returns 1 after printing the first seed with a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.harness", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="play the seeds [0, SEEDS)")
    parser.add_argument("--seed", type=int, help="play this seed only")
    connectors: tuple[type[ReferenceConnector], ...] = (ReferenceConnector, *MUTANTS)
    play_by_name: dict[str, Callable[[int], Counts]] = {"Saltern": live}
    play_by_name |= {connector.__name__: functools.partial(run, connector=connector) for connector in connectors}
    parser.add_argument("--connector", choices=sorted(play_by_name), default=ReferenceConnector.__name__)
    options = parser.parse_args()
    seeds = range(options.seeds) if options.seed is None else (options.seed,)
    total: Counter[str] = Counter()
    began = time.monotonic()
    for seed in seeds:
        try:
            total.update(msgspec.structs.asdict(play_by_name[options.connector](seed)))
        except Finding as finding:
            print(f"seed {seed}: {type(finding).__name__}: {finding}")
            return 1
    rate = len(seeds) / (time.monotonic() - began)
    print(
        f"{len(seeds)} seeds without a finding, {rate:.1f} a second:",
        ", ".join(f"{name} {count}" for name, count in total.items()),
    )
    return 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != HASH_SEED:
        command = [sys.executable, "-m", "tests.harness", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | {"PYTHONHASHSEED": HASH_SEED})
    sys.exit(main())
