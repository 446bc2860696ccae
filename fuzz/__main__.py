"""The command line of the fuzzers: `python -m fuzz [NAMES…] [--seconds 60]`, and one finding again with `--again FILE`.

Inputs that reached new code are kept under `.cache/fuzz`, so that the next run begins where this one ended. A finding
is written there too, as a file that the last lines of the output name.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from random import Random

FUZZERS = {
    "server": "strangers talk to a server, and its neighbour must not notice",
    "engine": "a stranger serves an engine, which must go on without",
    "files": "what a person writes: the server's file, the connector's settings, secrets",
}
FOLDER = Path(".cache/fuzz")
SEEDS = 20
INPUT_BYTES_MAX = 1024  # some two hundred acts
INPUT_SECONDS_MAX = 60  # for one of them, which takes some milliseconds


def main(arguments: list[str] | None = None) -> int:
    """Run the fuzzers that were asked for, one after the other; the status is that of the first finding."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Look for what a stranger could break.")
    known = ", ".join(FUZZERS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {known} (default: all)")
    parser.add_argument("--seconds", type=int, default=60, metavar="N", help="for each of them (default: 60)")
    parser.add_argument("--again", type=Path, metavar="FILE", help="play one input again, without atheris")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in FUZZERS]
    if unknown:
        parser.error(f"no fuzzer {unknown[0]!r}; there are {known}")
    names = options.names or list(FUZZERS)
    if options.again is not None:
        for name in names:
            _player(name)(options.again.read_bytes())
        return 0
    for name in names:
        print(f"{name}: {FUZZERS[name]}", flush=True)
        # A process of its own: atheris ends the one that it runs in.
        command = [sys.executable, "-c", f"from fuzz.__main__ import hunt; hunt({name!r}, {options.seconds})"]
        status = subprocess.run(command, check=False).returncode
        if status:
            return status
    return 0


def hunt(name: str, seconds: int) -> None:
    """Let atheris choose inputs by the code that they reach, and end the process."""
    import atheris

    with atheris.instrument_imports(include=["saltern"]):
        play = _player(name)
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(SEEDS):  # from nothing it would take hours to come to the first session
        (folder / f"seed-{seed}").write_bytes(Random(seed).randbytes(20 * seed + 20))
    limits = {"max_total_time": seconds, "max_len": INPUT_BYTES_MAX, "timeout": INPUT_SECONDS_MAX, "len_control": 0}
    options = [f"-{option}={value}" for option, value in limits.items()]
    atheris.Setup([name, *options, f"-artifact_prefix={folder.parent}/{name}-", str(folder)], play)
    atheris.Fuzz()


def _player(name: str) -> Callable[[bytes], None]:
    play: Callable[[bytes], None] = import_module(f"fuzz.{name}").play
    return play


if __name__ == "__main__":
    sys.exit(main())
