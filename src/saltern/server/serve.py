"""A server's life: everything it needs, in the order in which it can fail, until it is told to stop."""

import logging
import os
import resource
import signal
from typing import NoReturn

from saltern.core.cache import Cache
from saltern.server.arena import Arena, check_memory
from saltern.server.config import Config, naming_secret
from saltern.server.listener import Listener
from saltern.server.logs import start_logging
from saltern.server.loop import Loop
from saltern.sizes import format_size

log = logging.getLogger(__name__)


def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT. Raises `ConfigError`, `ListenError` or `ArenaError` if it can't start."""
    start_logging(config.log)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)  # until the loop is there to end in good order
    _allow_descriptors(2 * config.server.connections_max + 64)  # a socket and a pidfd each
    secret = naming_secret(config.server)
    listener = Listener(config.server.socket_path, mode=config.server.socket_mode)
    try:
        arena, loop = _prepare(config, listener, secret)
    except BaseException:
        listener.close()
        raise
    log.info(
        "ready: listening on %s, arena of %s in pages of %s",
        listener.path,
        format_size(arena.total_bytes),
        format_size(config.arena.page_size),
    )
    loop.run()
    arena.close()
    log.info("stopped")


def _leave(*_: object) -> NoReturn:
    log.info("stopped while it started")
    raise SystemExit(0)


def _prepare(config: Config, listener: Listener, secret: bytes) -> tuple[Arena, Loop]:
    pages = int(config.arena.size) // config.arena.page_size
    check_memory(pages * config.arena.page_size)
    arena = Arena(total_bytes=pages * config.arena.page_size, huge_pages=config.arena.huge_pages)
    cache = Cache(
        pages=pages,
        page_bytes=int(config.arena.page_size),  # messages hold plain integers
        limits=config.tenants.default.limits,
        naming_secret=secret,
    )
    uids = config.server.allowed_uids
    loop = Loop(
        cache,
        arena,
        listener,
        uids=frozenset([os.getuid()] if uids is None else uids),
        connections_max=config.server.connections_max,
    )
    loop.stop_on_signals()
    if config.arena.prefault:
        arena.prefault()
    return arena, loop


def _allow_descriptors(wanted: int) -> None:
    """Raise the soft limit as far as the hard one lets us; the loop gets by with less."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        bound = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, bound), hard))
