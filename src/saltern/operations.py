"""Operations: what an operator asks of a running server, and the settings that tenants and plans have.

One connection to the admin socket carries any number of requests, each answered before the next is read. The
framing is that of the engines' socket (`wire`); the tags are others, so that no message is taken for another.

    operator    ListTenants → TenantsListed     GetTenant | SetTenant | RemoveTenant → TenantShown
                ListPlans → PlansListed         SetPlan | RemovePlan → PlansListed
                RotateSigning → SigningRotated  RotateKey → KeyRotated  Erase → UserErased
                OpenPublication → PublicationOpened   ListPublications | RemovePublication → PublicationsListed
                                                Failed, in place of an answer: nothing was changed
"""

from typing import Annotated, Any, NewType

from msgspec import UNSET, Meta, Struct, UnsetType

from saltern.core.keys import KEY_BYTES, USER_ID_BYTES
from saltern.core.messages import KEYS_MAX, Refused
from saltern.core.snapshot import PublicationStats
from saltern.core.tenants import TENANT_NAME

BYTES_MAX = 1 << 62
SECONDS_MAX = 1e9  # thirty years
WEIGHT_MAX = 1e6
PLAN_NAME_MAX = 40

Size = Annotated[int, Meta(ge=0, le=BYTES_MAX)]
"""A number of bytes, written as "64 GiB" or as a plain number."""

Duration = Annotated[float, Meta(gt=0, le=SECONDS_MAX)]
"""A number of seconds, written as "7 days" or as a plain number."""

Weight = Annotated[float, Meta(ge=1 / WEIGHT_MAX, le=WEIGHT_MAX)]

Name = Annotated[str, Meta(pattern=rf"^{TENANT_NAME}\Z")]
"""A tenant's or a plan's name."""


class PlanSettings(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a plan says. Unset is left to whoever is asked next; None lifts what that one would say."""

    guarantee: Size | UnsetType = UNSET
    limit: Size | UnsetType | None = UNSET
    user_limit: Size | UnsetType | None = UNSET
    disk_guarantee: Size | UnsetType = UNSET
    disk_limit: Size | UnsetType | None = UNSET
    disk_user_limit: Size | UnsetType | None = UNSET
    ttl: Duration | UnsetType | None = UNSET
    weight: Weight | UnsetType = UNSET


class TenantSettings(PlanSettings, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What is said of a tenant; what is unset, its plan says, and else nobody."""

    plan: Name | UnsetType | None = UNSET


FIELDS = TenantSettings.__struct_fields__
"""The settings' names, those of a plan first."""

Origin = NewType("Origin", str)
"""Where a value comes from: "run time", "file", "plan NAME", or "" where nobody has said anything."""


class Bound(Struct, frozen=True, rename="kebab"):
    """One value in force, of its setting's type, and where it comes from. None is no limit, or no plan."""

    value: Any
    origin: Origin


class TenantState(Struct, frozen=True, rename="kebab"):
    """A tenant: what holds for it (bytes, seconds), and what it holds."""

    tenant: str
    guarantee: Bound
    limit: Bound
    user_limit: Bound
    disk_guarantee: Bound
    disk_limit: Bound
    disk_user_limit: Bound
    ttl: Bound
    weight: Bound
    plan: Bound
    used_bytes: int
    users: int
    disk_bytes: int


class PlanState(Struct, frozen=True, rename="kebab"):
    """A plan: what it says, each value with its origin, and which tenants name it."""

    plan: str
    bounds: dict[str, Bound]
    tenants: tuple[str, ...]


# Requests


class ListTenants(Struct, frozen=True, array_like=True, tag=101):
    """Ask for every tenant that has settings or blocks."""


class GetTenant(Struct, frozen=True, array_like=True, tag=102):
    """Ask for one tenant."""

    name: Name


class SetTenant(Struct, frozen=True, array_like=True, tag=103):
    """Change what is set in `settings`, durably and at once; fields in `inherit` go back to what file and plan say."""

    name: Name
    settings: TenantSettings
    inherit: tuple[str, ...] = ()


class RemoveTenant(Struct, frozen=True, array_like=True, tag=104):
    """Forget what was set at run time: what the file says holds again, and else nothing."""

    name: Name


class ListPlans(Struct, frozen=True, array_like=True, tag=105):
    """Ask for every plan."""


class SetPlan(Struct, frozen=True, array_like=True, tag=106):
    """Change a plan, and with it every tenant that names it."""

    name: Name
    settings: PlanSettings
    inherit: tuple[str, ...] = ()


class RemovePlan(Struct, frozen=True, array_like=True, tag=107):
    """Forget what was set of a plan at run time."""

    name: Name


class RotateSigning(Struct, frozen=True, array_like=True, tag=108):
    """Make a new signing secret; the one before stays valid until the next rotation."""


class OpenPublication(Struct, frozen=True, array_like=True, tag=109):
    """Let one prompt of whole blocks of text be stored for all users.

    `root` and `content` (`core/keys.py`) say which, in which namespace; it has `blocks` blocks. A request must bring
    the mark in the answer within `seconds`.
    """

    root: Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
    content: Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
    blocks: Annotated[int, Meta(ge=1, le=KEYS_MAX)]
    label: Annotated[str, Meta(max_length=200)] = ""
    seconds: Annotated[int, Meta(ge=1, le=86_400)] = 900


class ListPublications(Struct, frozen=True, array_like=True, tag=110):
    """Ask for everything that is published."""


class RemovePublication(Struct, frozen=True, array_like=True, tag=111):
    """Publish it no longer: its blocks go, but for those of other publications, and what users have behind them."""

    publication: Annotated[bytes, Meta(max_length=USER_ID_BYTES)]


class Erase(Struct, frozen=True, array_like=True, tag=112):
    """Forget a user in all tiers, for ever, or without a user all those of a tenant.

    The user is named by one of: `user_name`, as the middleware knows it; `user`, the opaque id; `salt`, which nobody
    has signed.
    """

    tenant: Name
    user_name: str | None = None
    user: Annotated[bytes, Meta(min_length=USER_ID_BYTES, max_length=USER_ID_BYTES)] | None = None
    salt: str | None = None

    def __repr__(self) -> str:
        return f"Erase(tenant={self.tenant!r}, …)"  # a salt gets nowhere


class RotateKey(Struct, frozen=True, array_like=True, tag=113):
    """Make a new deployment key, and wrap all data keys by it."""


# Answers


class TenantsListed(Struct, frozen=True, array_like=True, tag=121):
    """All tenants by name, and what their guarantees come to together."""

    tenants: tuple[TenantState, ...]
    guaranteed_bytes: int
    arena_bytes: int  # 0 without a running server
    disk_guaranteed_bytes: int = 0
    disk_bytes: int = 0


class TenantShown(Struct, frozen=True, array_like=True, tag=122):
    """One tenant as it is now, after whatever was asked."""

    tenant: TenantState


class PlansListed(Struct, frozen=True, array_like=True, tag=123):
    """All plans by name, after whatever was asked."""

    plans: tuple[PlanState, ...]


class SigningRotated(Struct, frozen=True, array_like=True, tag=124):
    """The new secret is in the file that is named, and in every connected engine."""

    path: str


class Failed(Struct, frozen=True, array_like=True, tag=125):
    """It can't be done, and nothing was changed; why, in words for a person."""

    reason: str


class PublicationOpened(Struct, frozen=True, array_like=True, tag=126):
    """The publication has this name, and a request stores it that brings `mark` (`publishing.py`)."""

    publication: bytes
    mark: str


class PublicationsListed(Struct, frozen=True, array_like=True, tag=127):
    """What is published, the oldest first, after whatever was asked."""

    publications: tuple[PublicationStats, ...]


class UserErased(Struct, frozen=True, array_like=True, tag=128):
    """All is forgotten, and `receipt`, a line of the audit log, says what.

    If `may_be_in_vllm`, what these engines keep for themselves can still be found by whoever knows the salt.
    """

    receipt: str
    may_be_in_vllm: bool
    engines: tuple[str, ...]


class KeyRotated(Struct, frozen=True, array_like=True, tag=129):
    """The new key is in the file that is named, and wraps so many data keys; the one before opens nothing any more."""

    path: str
    keys: int


Operation = (
    ListTenants
    | GetTenant
    | SetTenant
    | RemoveTenant
    | ListPlans
    | SetPlan
    | RemovePlan
    | RotateSigning
    | OpenPublication
    | ListPublications
    | RemovePublication
    | Erase
    | RotateKey
)
"""What the admin socket receives."""

Answer = (
    TenantsListed
    | TenantShown
    | PlansListed
    | SigningRotated
    | PublicationOpened
    | PublicationsListed
    | UserErased
    | KeyRotated
    | Failed
    | Refused
)
"""What it sends. `Refused` closes the connection."""
