"""Operations on the file of a server that is down: how a change is taken back with which it would not start."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from saltern.audit import AuditLog
from saltern.core.effects import Event
from saltern.core.keys import UserId
from saltern.core.messages import PublicationId
from saltern.core.snapshot import PublicationStats
from saltern.operations import Answer, Operation
from saltern.server.erasure import Erasure
from saltern.server.operations import Holding, OperationError, Operations
from saltern.server.store import InUseError, Store, StoreError
from saltern.server.tenancy import Layers


def operate_offline(path: Path, operation: Operation) -> Answer:
    """Do an operation on a store alone, without the settings' file. Raises `StoreError`, also while a server runs."""
    if not path.is_file():
        raise StoreError(f"{path}: there is no such file")
    try:
        store = Store(path)
    except InUseError:
        raise StoreError(f"a server uses {path}: ask it by its admin socket, without --offline") from None
    try:
        layers = Layers({}, {}, store.tenants, store.plans)
        operations = Operations(layers, store, _Nobody(), AuditLog(path.parent))
        return operations.answer(operation, by=f"uid {os.getuid()}, offline")
    finally:
        store.close()


class _Nobody:
    """In place of a running server. Nothing is checked: that is for the next start, which knows the arena."""

    arena_bytes = disk_bytes = 0

    def why_not(self, layers: Layers) -> str | None:
        return None

    def tell(self, events: Sequence[Event]) -> None:
        pass

    def holdings(self) -> Mapping[str, Holding]:
        return {}

    def publications(self) -> tuple[PublicationStats, ...]:
        return ()

    def forget_publication(self, publication: PublicationId) -> bool:
        return False

    def users(self, tenant: str) -> frozenset[UserId]:
        return frozenset()

    def is_erased_for_good(self, tenant: str, user: UserId) -> bool:
        return False

    def erase(self, tenant: str, user: UserId | None, *, for_good: bool) -> Erasure:
        raise OperationError("only a running server can erase")

    def rotate_key(self) -> int:
        raise OperationError("only a running server can rotate the deployment key")

    def engines(self) -> tuple[str, ...]:
        return ()
