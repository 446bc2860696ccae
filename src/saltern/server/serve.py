"""A server's life: everything it needs, in the order in which it can fail, until it is told to stop."""

import logging
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NoReturn, TypeVar

from saltern.audit import AuditError, AuditLog
from saltern.core.cache import Cache
from saltern.core.disk import DISK_PAGE_BYTES
from saltern.core.effects import Erased, Event, OpId
from saltern.core.keys import UserId
from saltern.core.messages import PublicationId
from saltern.core.snapshot import ErasedStats, PublicationStats
from saltern.server.admin import AdminServer
from saltern.server.arena import Arena, check_memory
from saltern.server.config import Config, ConfigError, check_epochs, make_state_folder, naming_secret, signing_secrets
from saltern.server.erasure import Erasure, Secrets
from saltern.server.listener import Listener
from saltern.server.logs import start_logging
from saltern.server.loop import Loop, LoopEndedError
from saltern.server.operations import Holding, OperationError, Operations, why_not
from saltern.server.store import Store
from saltern.server.tenancy import Layers
from saltern.sizes import format_size
from saltern.tiers.datakeys import KeyId
from saltern.tiers.disk import DiskTier
from saltern.tiers.errors import DiskError

_Result = TypeVar("_Result")

log = logging.getLogger(__name__)


def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises `ConfigError`, `StoreError`, `ListenError`, `ArenaError` or `DiskError` if it can't.
    """
    start_logging(config.log)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)  # until the loop is there to end in good order
    _allow_descriptors(2 * config.server.connections_max + 64)  # a socket and a pidfd each
    with ExitStack() as stack:
        loop = _prepare(config, stack)
        log.info(
            "ready: listening on %s, arena of %s in pages of %s",
            config.server.socket_path,
            format_size(config.arena.size // config.arena.page_size * config.arena.page_size),
            format_size(config.arena.page_size),
        )
        loop.run()
    log.info("stopped")


def _leave(*_: object) -> NoReturn:
    log.info("stopped while it started")
    raise SystemExit(0)


def _prepare(config: Config, stack: ExitStack) -> Loop:
    """Make everything, the cheap and the likely to fail first; `stack` ends it in the opposite order."""
    settings = config.server
    make_state_folder(settings)
    naming, signing = naming_secret(settings), signing_secrets(settings)
    check_epochs(settings)
    listener = Listener(settings.socket_path, mode=settings.socket_mode)
    stack.callback(listener.close)
    store = Store(settings.store_path)
    stack.callback(store.close)
    admin_listener = Listener(settings.admin_socket_path, setting="server.admin_socket")
    stack.callback(admin_listener.close)
    pages = int(config.arena.size) // config.arena.page_size
    page_bytes = int(config.arena.page_size)  # messages hold plain integers
    layers = Layers(config.tenants, config.plans, store.tenants, store.plans)
    cache = Cache(
        pages=pages,
        page_bytes=page_bytes,
        disk_pages=int(config.disk.size) // DISK_PAGE_BYTES,
        naming_secret=naming,
        signing_secrets=signing,
    )
    _check_tenants(cache, layers, store)
    check_memory(pages * page_bytes)
    arena = Arena(total_bytes=pages * page_bytes, huge_pages=config.arena.huge_pages)
    stack.callback(arena.close)
    uids = settings.allowed_uids
    loop = Loop(
        cache,
        arena,
        listener,
        uids=frozenset([os.getuid()] if uids is None else uids),
        connections_max=settings.connections_max,
    )
    loop.handle(*layers.all_set())
    disk = None
    if config.disk.size:
        disk = _start_disk(config, loop, arena, store, stack)
    else:
        cache.restore((), store.erased, time.monotonic())
    loop.stop_on_signals()
    if config.arena.prefault:
        arena.prefault()
    audit = _audit_log(settings.state_path)
    running = _Running(loop, cache, disk, disk_path=config.disk_path)
    secrets = Secrets(naming, settings.signing_path, settings.epochs_path, config.deployment_key_path)
    admin = AdminServer(admin_listener, Operations(layers, store, running, audit, secrets))
    stack.callback(admin.close)
    admin.start()
    return loop


def _check_tenants(cache: Cache, layers: Layers, store: Store) -> None:
    """Raise `ConfigError` unless what file and operator have said of tenants can hold in this arena."""
    file_alone = Layers(layers.file_tenants, layers.file_plans)
    if reason := why_not(cache, file_alone):
        raise ConfigError(f"the tenants of the settings: {reason}: lower a guarantee, or make arena.size larger")
    if reason := why_not(cache, layers):
        raise ConfigError(
            f"what was set at run time does not fit these settings: {reason}: change the settings back, or what was"
            f" set, by `saltern tenants` or `saltern plans` with --offline {store.path}"
        )


def _start_disk(config: Config, loop: Loop, arena: Arena, store: Store, stack: ExitStack) -> DiskTier:
    """Open the disk tier, and have the loop take up what is there. Raises `DiskError`."""
    started = time.monotonic()
    disk = DiskTier(
        config.disk_path,
        size_bytes=int(config.disk.size),
        key_path=config.deployment_key_path,
        arena=arena.memory,
        page_bytes=int(config.arena.page_size),
        tell=loop.tell,
        wall_clock=time.time,
    )
    stack.callback(disk.close)
    restored = loop.use_disk(disk, store.erased)
    log.info(
        "disk tier of %s in %s: %d blocks are there, %d were damaged and %d not written whole, in %.1f s",
        *(format_size(config.disk.size), config.disk_path, len(restored.records), restored.dropped, restored.torn),
        time.monotonic() - started,
    )
    if restored.cut:
        log.warning(
            "%d blocks had no room in a smaller disk tier, whoever's they were: they lay beyond its end", restored.cut
        )
    _warn_of_little_space(config)
    return disk


def _warn_of_little_space(config: Config) -> None:
    """Say so if the disk tier can't grow to what it may have: a full disk is other programs' trouble too."""
    with suppress(OSError):
        taken = sum(file.stat().st_blocks * 512 for file in config.disk_path.iterdir())
        room = shutil.disk_usage(config.disk_path).free + taken
        if room < config.disk.size:
            log.warning(
                "disk.size is %s, and the filesystem of %s has room for %s: make disk.size smaller, or name another"
                " disk.path",
                *(format_size(config.disk.size), config.disk_path, format_size(room)),
            )


def _audit_log(folder: Path) -> AuditLog:
    """Return the audit log. One that can't be written keeps operators from changing anything, and nobody else."""
    audit = AuditLog(folder)
    try:
        audit.prepare()
    except AuditError as error:
        log.error("nothing can be changed by commands: %s", error)
    return audit


class _Running:
    """A running server as what operations change; used from the operators' threads."""

    def __init__(self, loop: Loop, cache: Cache, disk: DiskTier | None, *, disk_path: Path) -> None:
        self.arena_bytes = cache.pool.pages * cache.page_bytes
        self.disk_bytes = cache.disk.pool.pages * DISK_PAGE_BYTES
        self._loop = loop
        self._cache = cache
        self._disk = disk
        self._disk_path = disk_path
        self._unfinished: set[tuple[str, UserId | None]] = set()  # who is forgotten, with a key that may be there

    def why_not(self, layers: Layers) -> str | None:
        return self._call(lambda: why_not(self._cache, layers))

    def tell(self, events: Sequence[Event]) -> None:
        with suppress(LoopEndedError):  # what is written holds from the next start on
            self._loop.call(lambda: self._loop.handle(*events))

    def holdings(self) -> Mapping[str, Holding]:
        return self._call(self._holdings)

    def _holdings(self) -> Mapping[str, Holding]:
        in_ram, on_disk = self._cache.tenant_by_name, self._cache.disk.shares.tenant_by_name
        holdings = {}
        for name in {*in_ram, *on_disk}:
            tenant, stored = in_ram.get(name), on_disk.get(name)
            users = self._cache.census.users(name)
            if users:
                holdings[name] = Holding(
                    used_bytes=tenant.used_pages * self._cache.page_bytes if tenant is not None else 0,
                    users=users,
                    disk_bytes=stored.used_pages * DISK_PAGE_BYTES if stored is not None else 0,
                )
        return holdings

    def publications(self) -> tuple[PublicationStats, ...]:
        return self._call(self._cache.publications)

    def forget_publication(self, publication: PublicationId) -> bool:
        try:
            return self._disk is not None and self._disk.forget_publication(publication)
        except DiskError as error:
            raise OperationError(f"it is removed, and may be back after a restart: {error}; remove it again") from None

    def users(self, tenant: str) -> frozenset[UserId]:
        def known() -> frozenset[UserId]:
            owners = (self._cache.tenant_by_name.get(tenant), self._cache.disk.shares.tenant_by_name.get(tenant))
            return frozenset(id_ for owner in owners if owner is not None for id_ in owner.user_by_id)

        return self._call(known)

    def is_erased_for_good(self, tenant: str, user: UserId) -> bool:
        if not self._unfinished.isdisjoint({(tenant, user), (tenant, None)}):
            return False  # what is left of it is for the next erasure
        return self._call(lambda: self._cache.is_erased_for_good(tenant, user))

    def erase(self, tenant: str, user: UserId | None, *, for_good: bool) -> Erasure:
        def forget() -> tuple[ErasedStats, OpId]:
            stats = self._cache.erasable(tenant, user)
            self._loop.handle(Erased(tenant, user, for_good))
            return stats, self._cache.last_op

        if self._left_on_disk is not None:
            raise OperationError(
                f"nothing was erased: disk.size is 0, and {self._left_on_disk} still has what an earlier server stored:"
                " give disk.size a size again, or delete that folder"
            )
        keys: list[KeyId] = []
        failure: DiskError | None = None
        self._unfinished.add((tenant, user))
        if self._disk is not None:
            try:
                keys = self._disk.destroy_keys(tenant, user, for_good=for_good)
            except DiskError as error:
                failure = error
        try:
            stats, last_op = self._call(forget)
        except OperationError as error:
            raise OperationError(
                f"data keys may be destroyed, and nothing else was erased: {error}; erase again"
            ) from None
        if failure is not None:
            raise OperationError(
                f"it is found no more, in memory or on disk, but may be again after a restart, since its data keys may"
                f" still be on the disk: {failure}; erase again"
            )
        if self._disk is not None:
            self._disk.allow(tenant, user, last_op)
        self._unfinished.discard((tenant, user))
        return Erasure(stats.users, stats.ram_bytes, stats.leased_bytes, stats.disk_bytes, tuple(keys))

    @property
    def _left_on_disk(self) -> Path | None:
        """Return the folder of a disk tier that is off and was on: what is in it can't be erased from here."""
        return self._disk_path if self._disk is None and (self._disk_path / "index.db").exists() else None

    def rotate_key(self) -> int:
        assert self._disk is not None, "rotates a key that there isn't"
        try:
            return self._disk.rotate_key()
        except DiskError as error:
            raise OperationError(f"the deployment key can't be rotated: {error}") from None

    def engines(self) -> tuple[str, ...]:
        return self._call(lambda: tuple(session.engine for session in self._cache.sessions))

    def _call(self, function: Callable[[], _Result]) -> _Result:
        try:
            return self._loop.call(function)
        except LoopEndedError:
            raise OperationError("the server is stopping") from None


def _allow_descriptors(wanted: int) -> None:
    """Raise the soft limit as far as the hard one lets us; the loop gets by with less."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        bound = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, bound), hard))
