"""The command that runs simulations: `python -m tests.simulator --seeds 1000`, or `--seed 42` to see one again."""

import sys
from argparse import ArgumentParser
from time import perf_counter

from tests.simulator.claims import ViolationError
from tests.simulator.simulation import Simulation


def main() -> int:
    """Run the seeds asked for; stop at the first that violates an invariant."""
    parser = ArgumentParser(prog="python -m tests.simulator", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds to run")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="run this one seed only")
    parser.add_argument("--verbose", action="store_true", help="print every event and what was done about it")
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.seeds) if options.seed is None else (options.seed,)
    began, events, hits_alone = perf_counter(), 0, 0
    for seed in seeds:
        simulation = Simulation(seed, verbose=options.verbose)
        try:
            simulation.run()
        except ViolationError as violation:
            print(f"seed {seed}, step {simulation.world.steps}: {violation}")
            print(f"see it again: python -m tests.simulator --seed {seed} --verbose")
            return 1
        events += simulation.events
        hits_alone += simulation.hits_alone
    seconds = perf_counter() - began
    print(f"{hits_alone} blocks hit in the private caches that tenants were compared with")
    print(f"{len(seeds)} seeds, {events} events, all invariants held ({len(seeds) / seconds:.1f} seeds/s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
