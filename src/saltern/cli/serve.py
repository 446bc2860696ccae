"""`saltern serve`: run the server."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from saltern.cli.output import EXIT_ASKED_WRONGLY, EXIT_FAILED, complain
from saltern.paths import default_socket_path

if TYPE_CHECKING:
    from saltern.cli.output import Commands


def add_commands(commands: "Commands") -> None:
    """Add the command's parser."""
    serve = commands.add_parser("serve", help="run the server until SIGTERM or Ctrl-C")
    serve.add_argument("--config", type=Path, metavar="FILE", help="settings, as TOML")
    serve.add_argument("--socket", metavar="PATH", help=f"where to listen (default: {default_socket_path()})")
    serve.add_argument("--arena", metavar="SIZE", help='how much memory to cache in, such as "64 GiB"')
    serve.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> int:
    from saltern.server.arena import ArenaError
    from saltern.server.config import ConfigError, load_config
    from saltern.server.listener import ListenError
    from saltern.server.serve import serve
    from saltern.server.store import StoreError
    from saltern.tiers.errors import DiskError

    try:
        serve(load_config(options.config, socket=options.socket, arena=options.arena))
    except ConfigError as error:
        return complain(str(error), EXIT_ASKED_WRONGLY)
    except (ArenaError, DiskError, ListenError, StoreError) as error:
        return complain(str(error), EXIT_FAILED)
    return 0
