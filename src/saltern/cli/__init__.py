"""The command line: `saltern COMMAND`, one module a group of commands.

Exit status: 0 done, 1 it failed, 2 it was asked wrongly (usage or settings). What each command needs is imported
when it runs, so that none waits for the others' modules.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from saltern import __version__
from saltern.cli import audit, check, erase, keys, publish, replay, serve, stats, tenants
from saltern.cli.output import EXIT_FAILED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells say it
    except BrokenPipeError:
        sys.stderr.close()  # the reader of a pipe has seen enough
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="saltern", description="A multi-tenant KV cache outside the inference engine."
    )
    parser.add_argument("--version", action="version", version=f"saltern {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (
        serve,
        stats,
        tenants,
        keys,
        publish,
        erase,
        check,
        audit,
        replay,
    ):  # in the order in which --help lists them; each sets `run`
        module.add_commands(commands)
    return parser
