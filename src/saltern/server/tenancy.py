"""Tenancy: what holds for each tenant, out of the layers in which somebody has said so.

    run time        what the operator set while the server ran
    file            the tenant's own lines in the settings
    plan            its plan, run time above file
    (nothing)       no guarantee, no limit, weight 1

Each value is taken from the first layer that has it. Which plan a tenant has is a value as any other.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
from msgspec import UNSET, Struct

from saltern.core.disk import DISK_PAGE_BYTES
from saltern.core.effects import TenantRemoved, TenantSet
from saltern.core.messages import DEFAULT_TENANT, PUBLIC_TENANT
from saltern.core.tenants import Limits
from saltern.operations import FIELDS, Bound, Origin, PlanSettings, PlanState, TenantSettings
from saltern.sizes import format_size

FILE = Origin("file")
RUN_TIME = Origin("run time")
NOBODY = Origin("")

RESERVED = frozenset({"none", "inherit"})
"""What the command line says for "no plan" and "the file's plan": no plan can be called so."""

RAM_FIELDS = ("guarantee", "limit", "user_limit")
DISK_FIELDS = ("disk_guarantee", "disk_limit", "disk_user_limit")

NOT_OF_THE_POOL = ("limit", "user_limit", "ttl", "weight")
"""What the public tenant can't have: what is published has the room it is guaranteed, and stays."""

_PLAN_FIELDS = tuple(name for name in FIELDS if name != "plan")
_DEFAULTS: Mapping[str, Any] = {"guarantee": 0, "disk_guarantee": 0, "weight": 1.0}


class Layers(Struct, frozen=True):
    """Who has said what, by name: the file and, above it, the operator at run time."""

    file_tenants: Mapping[str, TenantSettings]
    file_plans: Mapping[str, PlanSettings]
    tenants: Mapping[str, TenantSettings] = {}
    plans: Mapping[str, PlanSettings] = {}

    @property
    def tenant_names(self) -> list[str]:
        """Return the tenants that somebody has said something of, and the default one, which there always is."""
        return sorted({DEFAULT_TENANT, *self.file_tenants, *self.tenants})

    @property
    def plan_names(self) -> list[str]:
        """Return the plans that somebody has defined."""
        return sorted({*self.file_plans, *self.plans})

    def bound(self, tenant: str, field: str) -> Bound:
        """Return the value of one setting of a tenant, and who has said it."""
        return _first(self._said_of(tenant, field), field)

    def plan_bound(self, plan: str, field: str) -> Bound:
        """Return the value of one setting of a plan, and who has said it."""
        return _first(((self.plans.get(plan), RUN_TIME), (self.file_plans.get(plan), FILE)), field)

    def limits(self, tenant: str) -> Limits:
        """Return what holds for a tenant in RAM, in the core's terms."""
        return self._limits(tenant, RAM_FIELDS)

    def disk_limits(self, tenant: str) -> Limits:
        """Return what holds for a tenant on disk; ttl and weight are those of both tiers."""
        return self._limits(tenant, DISK_FIELDS)

    def limits_by_tenant(self) -> dict[str, Limits]:
        """Return what holds in RAM for every tenant by its name."""
        return {name: self.limits(name) for name in self.tenant_names}

    def disk_limits_by_tenant(self) -> dict[str, Limits]:
        """Return the same for the disk."""
        return {name: self.disk_limits(name) for name in self.tenant_names}

    def all_set(self) -> list[TenantSet]:
        """Return what a core must be told that knows nothing yet."""
        return [TenantSet(name, self.limits(name), self.disk_limits(name)) for name in self.tenant_names]

    def plan_state(self, plan: str) -> PlanState:
        """Describe a plan."""
        bounds = {field: self.plan_bound(plan, field) for field in _PLAN_FIELDS}
        return PlanState(
            plan,
            bounds={field: bound for field, bound in bounds.items() if bound.origin},
            tenants=tuple(name for name in self.tenant_names if self.bound(name, "plan").value == plan),
        )

    def why_not(self, *, page_bytes: int) -> str | None:
        """Return what is wrong with what was said, for a person, or None; sums are the core's to check."""
        for plan in self.plan_names:
            if plan in RESERVED:
                return f"plans.{plan}: no plan can be called {plan}"
            if reason := _less_than_a_page({field: self.plan_bound(plan, field) for field in _PLAN_FIELDS}, page_bytes):
                return f"plans.{plan}.{reason}"
        for tenant in self.tenant_names:
            plan = self.bound(tenant, "plan").value
            if plan is not None and plan not in self.plan_names:
                known = f"known are {', '.join(self.plan_names)}" if self.plan_names else "there is none"
                return f"tenants.{tenant}.plan: nobody has defined the plan {plan}; {known}"
            if reason := _less_than_a_page({field: self.bound(tenant, field) for field in _PLAN_FIELDS}, page_bytes):
                return f"tenants.{tenant}.{reason}"
        return self._why_not_of_the_pool()

    def changes_to(self, new: "Layers") -> list[TenantSet | TenantRemoved]:
        """Return what the core must be told when `new` holds instead; what lowers a guarantee comes first."""
        before, after = ({event.name: event for event in layers.all_set()} for layers in (self, new))
        changed = [event for name, event in after.items() if before.get(name) != event]
        # They are told one by one, and at no moment may guarantees add up to more than there is. So one that falls in
        # one tier and rises in the other is told twice.
        lowered = [_lower_of(before[event.name], event) for event in changed if event.name in before]
        first = [event for event in lowered if _falls(before[event.name], event)]
        gone = [TenantRemoved(name) for name in before if name not in after]
        return [*gone, *first, *(event for event in changed if event not in first)]

    def _why_not_of_the_pool(self) -> str | None:
        for field in NOT_OF_THE_POOL:
            bound = self.bound(PUBLIC_TENANT, field)
            if bound.value != _DEFAULTS.get(field):
                return (
                    f"tenants.{PUBLIC_TENANT}.{field} ({bound.origin}): what is published has the room that"
                    f" {PUBLIC_TENANT} is guaranteed and stays; it can have a guarantee, and settings of the disk"
                )
        return None

    def _limits(self, tenant: str, fields: tuple[str, str, str]) -> Limits:
        guarantee, limit, user_limit = (self.bound(tenant, field).value for field in fields)
        return Limits(
            guarantee_bytes=guarantee,
            limit_bytes=limit,
            user_limit_bytes=user_limit,
            ttl_seconds=self.bound(tenant, "ttl").value,
            weight=self.bound(tenant, "weight").value,
        )

    def _said_of(self, tenant: str, field: str) -> Iterator[tuple[PlanSettings | None, Origin]]:
        yield self.tenants.get(tenant), RUN_TIME
        yield self.file_tenants.get(tenant), FILE
        if field != "plan":
            plan = self.bound(tenant, "plan").value
            yield self.plans.get(plan), Origin(f"plan {plan}")
            yield self.file_plans.get(plan), Origin(f"plan {plan}")


def _first(said: Iterable[tuple[PlanSettings | None, Origin]], field: str) -> Bound:
    for settings, origin in said:
        value = getattr(settings, field, UNSET)
        if value is not UNSET:
            return Bound(value, origin)
    return Bound(_DEFAULTS.get(field), NOBODY)


def _falls(before: TenantSet, event: TenantSet) -> bool:
    """Return whether a guarantee is less than before."""
    return (
        event.limits.guarantee_bytes < before.limits.guarantee_bytes
        or event.disk.guarantee_bytes < before.disk.guarantee_bytes
    )


def _lower_of(before: TenantSet, event: TenantSet) -> TenantSet:
    """Return what is set, but for guarantees that rise: they are as before."""

    def lower(old: Limits, new: Limits) -> Limits:
        return msgspec.structs.replace(new, guarantee_bytes=min(old.guarantee_bytes, new.guarantee_bytes))

    return TenantSet(event.name, lower(before.limits, event.limits), lower(before.disk, event.disk))


def _less_than_a_page(bounds: Mapping[str, Bound], page_bytes: int) -> str | None:
    """Return which size is not 0 and yet holds nothing, most likely for want of a unit."""
    for fields, least, of_what in ((RAM_FIELDS, page_bytes, "arena"), (DISK_FIELDS, DISK_PAGE_BYTES, "disk tier")):
        for field in fields:
            value = bounds[field].value
            if value and value < least:
                return f"{field}: {format_size(value)} is less than one page of the {of_what}"
    return None
