"""Operations: the one layer through which a running server's tenants, plans and signing secret are changed.

A method an operation: check, write the audit log, change, then tell the core. Whoever asks (the admin socket; a command
on the file of a server that is down) waits on a thread of its own, since writing waits for the disk. One change is made
at a time, so what was checked still holds when it is told. The audit log comes before the change: there may be a line
of something that a crash prevented, but never a change without a line.
"""

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from secrets import token_bytes
from threading import Lock
from typing import NamedTuple, Protocol, TypeVar

import msgspec
from msgspec import UNSET

from saltern.audit import AuditError, AuditLog, Detail, Line
from saltern.core.cache import Cache
from saltern.core.effects import Event, PublicationAdded, PublicationRemoved, SecretsRotated
from saltern.core.keys import USER_ID_BYTES, Content, UserId
from saltern.core.messages import PUBLIC_TENANT, PublicationId
from saltern.core.snapshot import PublicationStats
from saltern.core.tenants import why_not as why_not_alone
from saltern.epochs import begin_anew
from saltern.operations import (
    Answer,
    Erase,
    Failed,
    GetTenant,
    KeyRotated,
    ListPlans,
    ListPublications,
    ListTenants,
    OpenPublication,
    Operation,
    PlanSettings,
    PlansListed,
    PublicationOpened,
    PublicationsListed,
    RemovePlan,
    RemovePublication,
    RemoveTenant,
    RotateKey,
    RotateSigning,
    SetPlan,
    SetTenant,
    SigningRotated,
    TenantSettings,
    TenantShown,
    TenantsListed,
    TenantState,
    UserErased,
)
from saltern.publishing import sign_mark
from saltern.secret import next_signing_secrets, read_signing_secrets, write_signing_secrets
from saltern.server.erasure import Erasure, Secrets, Whom, resolve, who
from saltern.server.store import Erased, Store, StoreError
from saltern.server.tenancy import Layers
from saltern.sizes import format_size

log = logging.getLogger(__name__)

_Settings = TypeVar("_Settings", TenantSettings, PlanSettings)


class OperationError(Exception):
    """It can't be done, and nothing was changed. The text says why, and what to do."""


class Holding(NamedTuple):
    """What a tenant has in the cache."""

    used_bytes: int
    users: int
    disk_bytes: int


NOTHING = Holding(used_bytes=0, users=0, disk_bytes=0)


class Subject(Protocol):
    """Who is changed: a running server's cache, or nobody yet."""

    arena_bytes: int
    disk_bytes: int

    def why_not(self, layers: Layers) -> str | None:
        """Return why this can't hold, for a person, or None if it can."""

    def tell(self, events: Sequence[Event]) -> None:
        """Have the core handle events, in order and with nothing in between."""

    def holdings(self) -> Mapping[str, Holding]:
        """Return what each tenant with blocks holds."""

    def publications(self) -> tuple[PublicationStats, ...]:
        """Return what is published."""

    def forget_publication(self, publication: PublicationId) -> bool:
        """Have a removed publication forgotten for good, and return whether it would have been back after a restart.

        Raises `OperationError`.
        """

    def users(self, tenant: str) -> Collection[UserId]:
        """Return which users of a tenant hold something."""

    def is_erased_for_good(self, tenant: str, user: UserId) -> bool:
        """Return whether nothing is ever stored for a user again."""

    def erase(self, tenant: str, user: UserId | None, *, for_good: bool) -> Erasure:
        """Forget a user, or with None all users of a tenant.

        Raises `OperationError` after as much as can be done: ask again, until then nobody `is_erased_for_good`.
        """

    def rotate_key(self) -> int:
        """Replace the deployment key, and return how many data keys it wraps. Raises `OperationError`."""

    def engines(self) -> tuple[str, ...]:
        """Return which engines are connected."""


class Operations:
    """All operations on one server. Any thread may call any of them; each raises `OperationError`.

    `secrets` are those of a server that runs.
    """

    def __init__(
        self, layers: Layers, store: Store, subject: Subject, audit: AuditLog, secrets: Secrets | None = None
    ) -> None:
        self._layers = layers
        self._store = store
        self._subject = subject
        self._audit = audit
        self._secrets = secrets
        self._lock = Lock()
        self._by = ""  # who asked for what is being done, under the lock

    def answer(self, operation: Operation, *, by: str) -> Answer:
        """Do what was asked, by whom the audit log shall name, and say how it ended."""
        try:
            with self._lock:
                self._by = by
                return self._do(operation)
        except OperationError as error:
            return Failed(str(error))

    def _do(self, operation: Operation) -> Answer:
        match operation:
            case ListTenants():
                return self._list_tenants()
            case GetTenant(name):
                return self._get_tenant(name)
            case SetTenant(name, settings, inherit):
                return self._set_tenant(name, settings, inherit)
            case RemoveTenant(name):
                return self._remove_tenant(name)
            case ListPlans():
                return self._list_plans()
            case SetPlan(name, settings, inherit):
                return self._set_plan(name, settings, inherit)
            case RemovePlan(name):
                return self._remove_plan(name)
            case RotateSigning():
                return self._rotate_signing()
            case OpenPublication():
                return self._open_publication(operation)
            case ListPublications():
                return PublicationsListed(self._subject.publications())
            case RemovePublication(publication):
                return self._remove_publication(PublicationId(publication))
            case Erase():
                return self._erase(operation)
            case RotateKey():
                return self._rotate_key()

    # Tenants

    def _list_tenants(self) -> TenantsListed:
        holdings = self._subject.holdings()
        names = sorted({*self._layers.tenant_names, *holdings})
        return TenantsListed(
            tuple(self._state(name, holdings) for name in names),
            guaranteed_bytes=sum(self._layers.limits(name).guarantee_bytes for name in names),
            arena_bytes=self._subject.arena_bytes,
            disk_guaranteed_bytes=sum(self._layers.disk_limits(name).guarantee_bytes for name in names),
            disk_bytes=self._subject.disk_bytes,
        )

    def _get_tenant(self, name: str) -> TenantShown:
        holdings = self._subject.holdings()
        if name not in self._layers.tenant_names and name not in holdings:
            raise OperationError(f"no tenant {name} has settings or blocks")
        return TenantShown(self._state(name, holdings))

    def _set_tenant(self, name: str, settings: TenantSettings, inherit: Sequence[str]) -> TenantShown:
        changed = _merged(self._layers.tenants.get(name, TenantSettings()), settings, inherit)
        layers = msgspec.structs.replace(self._layers, tenants={**self._layers.tenants, name: changed})
        self._change(layers, "tenant-set", {"tenant": name, **_details(settings, inherit)})
        log.info("tenant %s: set %s", name, _described(settings, inherit))
        return TenantShown(self._state(name, self._subject.holdings()))

    def _remove_tenant(self, name: str) -> TenantShown:
        if name not in self._layers.tenants:
            said_by = "the settings' file alone: change it there" if name in self._layers.file_tenants else "nobody"
            raise OperationError(f"tenant {name} has settings of {said_by}")
        kept = {other: settings for other, settings in self._layers.tenants.items() if other != name}
        layers = msgspec.structs.replace(self._layers, tenants=kept)
        self._change(layers, "tenant-removed", {"tenant": name})
        log.info("tenant %s: removed what was set at run time", name)
        return TenantShown(self._state(name, self._subject.holdings()))

    def _state(self, name: str, holdings: Mapping[str, Holding]) -> TenantState:
        holding = holdings.get(name, NOTHING)
        return TenantState(
            name,
            **{field: self._layers.bound(name, field) for field in TenantSettings.__struct_fields__},
            used_bytes=holding.used_bytes,
            users=holding.users,
            disk_bytes=holding.disk_bytes,
        )

    # Plans

    def _list_plans(self) -> PlansListed:
        return PlansListed(tuple(self._layers.plan_state(name) for name in self._layers.plan_names))

    def _set_plan(self, name: str, settings: PlanSettings, inherit: Sequence[str]) -> PlansListed:
        changed = _merged(self._layers.plans.get(name, PlanSettings()), settings, inherit)
        layers = msgspec.structs.replace(self._layers, plans={**self._layers.plans, name: changed})
        self._change(layers, "plan-set", {"plan": name, **_details(settings, inherit)})
        log.info("plan %s: set %s", name, _described(settings, inherit))
        return self._list_plans()

    def _remove_plan(self, name: str) -> PlansListed:
        if name not in self._layers.plans:
            said_by = "the settings' file alone: change it there" if name in self._layers.file_plans else "nobody"
            raise OperationError(f"plan {name} has settings of {said_by}")
        kept = {other: settings for other, settings in self._layers.plans.items() if other != name}
        self._change(msgspec.structs.replace(self._layers, plans=kept), "plan-removed", {"plan": name})
        log.info("plan %s: removed what was set at run time", name)
        return self._list_plans()

    def _change(self, layers: Layers, what: str, details: Mapping[str, Detail]) -> None:
        """Make `layers` what holds: in the file first, so that an answer is a promise."""
        if reason := self._subject.why_not(layers):
            raise OperationError(reason)
        with self._audited(what, details):
            try:
                self._store.write(layers.tenants, layers.plans)
            except StoreError as error:
                raise OperationError(str(error)) from None
        events = self._layers.changes_to(layers)
        self._layers = layers
        self._subject.tell(events)

    # The signing secret

    def _rotate_signing(self) -> SigningRotated:
        if self._secrets is None:
            raise OperationError("only a running server can rotate the signing secret")
        path = self._secrets.signing_path
        try:
            present = read_signing_secrets(path)
        except (OSError, ValueError) as error:
            raise OperationError(f"the signing secret can't be rotated: {_reason(error)}") from None
        rotated = next_signing_secrets(present)
        with self._audited("signing-rotated", {"file": str(path)}):
            # Engines first: whoever signs by the file must not be ahead of whoever verifies.
            self._subject.tell([SecretsRotated(rotated)])
            try:
                write_signing_secrets(path, rotated)
            except OSError as error:
                self._subject.tell([SecretsRotated(present)])
                raise OperationError(f"the signing secret can't be rotated: {path}: {error.strerror}") from None
        log.info("the signing secret was rotated")
        return SigningRotated(str(path))

    # What is published

    def _open_publication(self, wanted: OpenPublication) -> PublicationOpened:
        if not self._layers.limits(PUBLIC_TENANT).guarantee_bytes:
            raise OperationError(
                f"the tenant {PUBLIC_TENANT}, which what is published is charged to, has no guarantee:"
                f" `saltern tenants set {PUBLIC_TENANT} --guarantee SIZE` gives it one"
            )
        if self._secrets is None:
            raise OperationError("only a running server can publish")
        try:
            secret = read_signing_secrets(self._secrets.signing_path)[0]
        except (OSError, ValueError) as error:
            raise OperationError(f"the signing secret can't be read: {error}") from None
        publication = PublicationId(token_bytes(USER_ID_BYTES))
        expires_at = int(time.time()) + wanted.seconds
        root, content = Content(wanted.root), Content(wanted.content)
        mark = sign_mark(publication, expires_at, root=root, content=content, secret=secret)
        added = PublicationAdded(publication, root=root, blocks=wanted.blocks, label=wanted.label)
        said = {"publication": publication.hex(), "label": wanted.label}
        with self._audited("publication-opened", {**said, "blocks": wanted.blocks}):
            self._subject.tell([added])
        log.info("publication %s: opened for %d blocks, %r", publication.hex(), wanted.blocks, wanted.label)
        return PublicationOpened(publication, mark)

    def _remove_publication(self, publication: PublicationId) -> PublicationsListed:
        is_published = publication.hex() in {stats.publication for stats in self._subject.publications()}
        # Or an earlier removal could not be written down.
        if not is_published and not self._subject.forget_publication(publication):
            raise OperationError(f"nothing is published under {publication.hex()}")
        with self._audited("publication-removed", {"publication": publication.hex()}):
            self._subject.tell([PublicationRemoved(publication)])
            self._subject.forget_publication(publication)  # only now, when nothing of it is kept any more
        log.info("publication %s: removed", publication.hex())
        return PublicationsListed(self._subject.publications())

    # What is erased

    def _erase(self, wanted: Erase) -> UserErased:
        secrets = self._secrets
        if secrets is None:
            raise OperationError("only a running server can erase")
        try:
            whom = resolve(wanted, secrets, self._subject.is_erased_for_good)
        except (OSError, ValueError) as error:
            raise OperationError(f"nothing was erased: {_reason(error)}") from None
        with self._audited("erase-begun", who(whom)):
            if whom.begins_anew:
                try:
                    begin_anew(secrets.epochs_path, whom.tenant, whom.tag)
                except (OSError, ValueError) as error:
                    raise OperationError(f"nothing was erased: {_reason(error)}") from None
            try:
                # Before any key goes: a server that is killed now destroys it when it starts again.
                self._store.note_erased(self._erased(whom))
            except StoreError as error:
                raise OperationError(f"nothing was erased: {error}; erase again") from None
            erasure = self._erase_all(whom)
        try:
            line = self._note("erased", erasure.details(whom))
        except OperationError as error:
            raise OperationError(f"it is erased, and there is no receipt: {error}; erase again for one") from None
        log.info(
            "erased %d users of tenant %s: %s in memory, of which %s are under lease, %s on disk, %d data keys",
            *(erasure.users, whom.tenant, format_size(erasure.ram_bytes), format_size(erasure.leased_bytes)),
            *(format_size(erasure.disk_bytes), len(erasure.keys)),
        )
        return UserErased(line.text, whom.may_be_in_vllm, self._subject.engines())

    def _erased(self, whom: Whom) -> list[Erased]:
        """Return what the next server must know."""
        if whom.users is not None:
            return [(whom.tenant, user, whom.for_good) for user in whom.users]
        known = self._subject.users(whom.tenant) if whom.for_good else ()
        return [(whom.tenant, None, False), *((whom.tenant, user, True) for user in known)]

    def _erase_all(self, whom: Whom) -> Erasure:
        """Erase all who are meant, also where one of them fails. Raises `OperationError`."""
        erasure, failure = Erasure(), None
        for user in (None,) if whom.users is None else whom.users:
            try:
                erasure = erasure.plus(self._subject.erase(whom.tenant, user, for_good=whom.for_good))
            except OperationError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return erasure

    def _rotate_key(self) -> KeyRotated:
        if self._secrets is None:
            raise OperationError("only a running server can rotate the deployment key")
        if not self._subject.disk_bytes:
            raise OperationError("there is no disk tier, and so no deployment key to rotate: see disk.size")
        path = str(self._secrets.deployment_path)
        with self._audited("deployment-key-rotated", {"file": path}):
            keys = self._subject.rotate_key()
        log.info("the deployment key was rotated, %d data keys were wrapped anew", keys)
        return KeyRotated(path, keys)

    # The audit log

    @contextmanager
    def _audited(self, what: str, details: Mapping[str, Detail]) -> Iterator[None]:
        """Write down what is done within the block before it is done, and what kept it from being done."""
        line = self._note(what, details)
        try:
            yield
        except OperationError as error:
            with suppress(OperationError):
                self._note("not-done", {"line": line.serial, "reason": str(error)})
            raise

    def _note(self, what: str, details: Mapping[str, Detail]) -> Line:
        """Add a line to the audit log. Raises `OperationError`: what can't be written down isn't done."""
        try:
            line = self._audit.append(what, details, by=self._by)
        except AuditError as error:
            raise OperationError(str(error)) from None
        log.info("audit line %d: %s, hash %s", line.serial, what, line.hash)
        return line


def why_not(cache: Cache, layers: Layers) -> str | None:
    """Return why this can't hold in a cache, with what each tenant would be guaranteed, or None if it can."""
    if reason := layers.why_not(page_bytes=cache.page_bytes):
        return reason
    in_ram, on_disk = layers.limits_by_tenant(), layers.disk_limits_by_tenant()
    reason, limits_by_tenant = cache.check_tenants(in_ram), in_ram
    if reason is None and cache.disk.pool.pages:  # without a disk tier nothing is promised of it
        reason, limits_by_tenant = cache.check_tenants(in_ram, on_disk), on_disk
    if reason is None or any(why_not_alone(limits) for limits in limits_by_tenant.values()):
        return reason  # the fault of one, whom it names
    guarantees = sorted(
        ((limits.guarantee_bytes, name) for name, limits in limits_by_tenant.items() if limits.guarantee_bytes),
        key=lambda pair: (-pair[0], pair[1]),
    )
    return f"{reason} (guaranteed: {', '.join(f'{name} {format_size(size)}' for size, name in guarantees)})"


def _merged(old: _Settings, settings: _Settings, inherit: Sequence[str]) -> _Settings:
    """Return the old settings with the new ones over them, and without those in `inherit`."""
    unknown = set(inherit) - set(old.__struct_fields__)
    if unknown:
        raise OperationError(f"there is no setting {min(unknown)}")
    said = {field: value for field in settings.__struct_fields__ if (value := getattr(settings, field)) is not UNSET}
    return msgspec.structs.replace(old, **{**said, **dict.fromkeys(inherit, UNSET)})


def _reason(error: OSError | ValueError) -> str:
    """Return what to say of a file that can't be read or written."""
    if not isinstance(error, OSError):
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)


def _details(settings: PlanSettings, inherit: Sequence[str]) -> dict[str, Detail]:
    """Return what was set as the audit log holds it."""
    said = {name: value for name, value in msgspec.structs.asdict(settings).items() if value is not UNSET}
    return {**said, "inherited": list(inherit)} if inherit else said


def _described(settings: PlanSettings, inherit: Sequence[str]) -> str:
    said = [f"{name}={value}" for name, value in msgspec.structs.asdict(settings).items() if value is not UNSET]
    return " ".join([*said, *(f"{name} inherited" for name in inherit)]) or "nothing"
