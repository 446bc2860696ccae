"""Erasure: whom an operator means, under which ids the cache may know them, and what of them was forgotten.

    epoch + 1  →  data key destroyed, durably  →  nobody finds a block  →  line of the audit log  →  receipt
       │              │                               │
       └ of signed    └ what is under way fails       └ what engines hold goes when they let go; memory is zeroed
         users

The epoch comes first: from then on the middleware signs for another id, and what was signed before is never stored
again. A crash anywhere leaves no receipt, and whoever asks again erases whatever is left, also under older epochs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from saltern.audit import Detail
from saltern.core.keys import UserId, digest, signed_user_key, unsigned_user_key, user_id
from saltern.core.messages import DEFAULT_TENANT, PUBLIC_TENANT
from saltern.epochs import read_epochs
from saltern.operations import Erase
from saltern.secret import read_signing_secrets
from saltern.signing import user_tag, verify

KEYS_SHOWN = 100
"""Most data keys that a receipt names; their number is always there, and a hash over all of them."""


class Secrets(NamedTuple):
    """By what a running server knows users, and the files of what can be changed about that."""

    naming: bytes
    signing_path: Path
    epochs_path: Path
    deployment_path: Path


class Whom(NamedTuple):
    """Who is erased. `users` are all ids that one user may have, or None for all users of the tenant.

    With `begins_anew` the tenant, or the user of `tag`, gets another epoch. Whoever is erased `for_good` never stores
    anything again under these ids.
    """

    tenant: str
    users: tuple[UserId, ...] | None
    tag: str | None = None
    begins_anew: bool = False
    for_good: bool = False

    @property
    def may_be_in_vllm(self) -> bool:
        """Return whether a salt from before still finds what an engine keeps for itself."""
        return not self.for_good


class Erasure(NamedTuple):
    """What was forgotten: so many users' bytes. Those under lease fall when their leases do."""

    users: int = 0
    ram_bytes: int = 0
    leased_bytes: int = 0
    disk_bytes: int = 0
    keys: tuple[bytes, ...] = ()

    def plus(self, other: "Erasure") -> "Erasure":
        """Return both together."""
        return Erasure(
            self.users + other.users,
            self.ram_bytes + other.ram_bytes,
            self.leased_bytes + other.leased_bytes,
            self.disk_bytes + other.disk_bytes,
            self.keys + other.keys,
        )

    def details(self, whom: Whom) -> dict[str, Detail]:
        """Return what a receipt says."""
        return {
            **who(whom),
            "users_found": self.users,
            "ram_bytes": self.ram_bytes,
            "leased_bytes": self.leased_bytes,
            "disk_bytes": self.disk_bytes,
            "keys_destroyed": len(self.keys),
            "keys": [key.hex() for key in self.keys[:KEYS_SHOWN]],
            "keys_hash": digest(b"saltern.keys", sorted(self.keys)).hex(),
        }


def who(whom: Whom) -> dict[str, Detail]:
    """Return whom the audit log names: by opaque ids, since a name or a salt would outlive its user there."""
    users = "all" if whom.users is None else [user.hex() for user in whom.users]
    return {"tenant": whom.tenant, "users": users}


def resolve(wanted: Erase, secrets: Secrets, is_erased_for_good: Callable[[str, UserId], bool]) -> Whom:
    """Return who is meant. Raises OSError, or ValueError with a text for a person, which holds no salt."""
    tenant = wanted.tenant
    if tenant == PUBLIC_TENANT:
        raise ValueError(f"what {PUBLIC_TENANT} holds belongs to no user: `saltern publish --remove ID` removes it")
    if sum(named is not None for named in (wanted.user_name, wanted.user, wanted.salt)) > 1:
        raise ValueError("name the user in one way: by name, by id or by salt")
    tag = None if wanted.user_name is None else user_tag(tenant, wanted.user_name)
    if wanted.salt is not None:
        signed = verify(wanted.salt, read_signing_secrets(secrets.signing_path))
        if signed is None and tenant != DEFAULT_TENANT:
            raise ValueError(
                f"nobody has signed this salt, so its user is one of the tenant {DEFAULT_TENANT}, not of {tenant}"
            )
        if signed is not None and signed.tenant != tenant:
            raise ValueError(f"this salt is signed for another tenant than {tenant}")
        if signed is None:
            return Whom(tenant, (user_id(unsigned_user_key(secrets.naming, wanted.salt)),))
        tag = signed.user
    if wanted.user is not None:
        return Whom(tenant, (UserId(wanted.user),))
    epochs = read_epochs(secrets.epochs_path)
    if tag is None:
        # A tenant's users are all signed for, but for those of the default one.
        return Whom(tenant, None, begins_anew=True, for_good=tenant != DEFAULT_TENANT)
    epoch = epochs.of(tenant, tag)
    ids = [user_id(signed_user_key(secrets.naming, tenant, tag, past)) for past in range(epoch + 1)]
    left = [id_ for id_ in ids[:-1] if not is_erased_for_good(tenant, id_)]  # of an erasure that never ended
    return Whom(tenant, (*left, ids[-1]), tag=tag, begins_anew=True, for_good=True)
