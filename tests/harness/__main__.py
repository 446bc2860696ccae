"""The harness on the command line: plays scenarios with the reference connector and stops at the first finding."""

import argparse
import sys
from collections import Counter

import msgspec

from .findings import Finding
from .mutants import MUTANTS
from .reference import ReferenceConnector
from .subjects import run


def main() -> int:
    """Play one seed or many. Returns 1 after printing the first seed with a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.harness", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="play the seeds [0, SEEDS)")
    parser.add_argument("--seed", type=int, help="play this seed only")
    connectors: tuple[type[ReferenceConnector], ...] = (ReferenceConnector, *MUTANTS)
    by_name = {connector.__name__: connector for connector in connectors}
    parser.add_argument("--connector", choices=sorted(by_name), default=ReferenceConnector.__name__)
    options = parser.parse_args()
    seeds = range(options.seeds) if options.seed is None else (options.seed,)
    total: Counter[str] = Counter()
    for seed in seeds:
        try:
            total.update(msgspec.structs.asdict(run(seed, by_name[options.connector])))
        except Finding as finding:
            print(f"seed {seed}: {type(finding).__name__}: {finding}")
            return 1
    print(f"{len(seeds)} seeds without a finding:", ", ".join(f"{name} {count}" for name, count in total.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
