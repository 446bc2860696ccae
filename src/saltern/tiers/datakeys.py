"""Data keys: what each user's records are encrypted under, and the key of the deployment that they are wrapped under.

A user's data key is 32 random bytes. It lies on the disk only wrapped, with whose it is authenticated; to erase the
user is to destroy it. The file of the deployment's key has the form of a file of signing secrets: one a line in
hexadecimal, the newest first, and a second one only while it is being replaced.
"""

import secrets
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import NewType

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from msgspec import Struct

from saltern.core.effects import OpId
from saltern.core.keys import SECRET_BYTES, UserId, digest, frame
from saltern.secret import make_signing_secrets, read_signing_secrets, write_signing_secrets
from saltern.tiers.errors import DiskError

KeyId = NewType("KeyId", bytes)
"""Names a data key: 16 random bytes, in its user's records and in the receipt of its destruction."""

KEY_ID_BYTES = 16
_WRAPPED_VERSION = b"1"
_NONCE_BYTES = 12

Owner = tuple[str, UserId]
"""A tenant and one of its users."""


class DataKey(Struct, frozen=True):
    """A user's data key. `secret` is what must never be written anywhere unwrapped."""

    id: KeyId
    secret: bytes

    def __repr__(self) -> str:
        return f"DataKey({self.id.hex()})"


def new_data_key() -> DataKey:
    """Make a key that nobody has had."""
    return DataKey(KeyId(secrets.token_bytes(KEY_ID_BYTES)), secrets.token_bytes(SECRET_BYTES))


def wrap(deployment_key: bytes, owner: Owner, key: DataKey) -> bytes:
    """Return a data key as it may lie on the disk."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + AESGCM(deployment_key).encrypt(nonce, key.secret, _bound_to(owner, key.id))


def unwrap(deployment_key: bytes, owner: Owner, key_id: KeyId, wrapped: bytes) -> DataKey | None:
    """Return the data key, or None if it is not this user's, this id's and under this deployment key."""
    try:
        nonce, text = wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:]
        return DataKey(key_id, AESGCM(deployment_key).decrypt(nonce, text, _bound_to(owner, key_id)))
    except (InvalidTag, ValueError):  # too short to have a nonce
        return None


def deployment_name(deployment_key: bytes) -> bytes:
    """Return what says which deployment key it is and nothing else about it. 16 bytes."""
    return digest(b"saltern.deploy", [], key=deployment_key, size=16)


def read_deployment_keys(path: Path) -> tuple[bytes, ...]:
    """Return the deployment key, or the new and the old one while it is replaced. Raises `DiskError`."""
    try:
        return read_signing_secrets(path)
    except FileNotFoundError:
        raise DiskError(f"the deployment key {path} is missing: put it back from your backup") from None
    except OSError as error:
        raise DiskError(f"the deployment key {path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise DiskError(f"the deployment key can't be used: {error}") from None


def make_deployment_key(path: Path) -> None:
    """Make a deployment key where there is none. Raises `DiskError`."""
    try:
        make_signing_secrets(path)
    except OSError as error:
        raise DiskError(f"the deployment key {path} can't be made: {error.strerror}") from None
    except ValueError as error:
        raise DiskError(f"the deployment key can't be used: {error}") from None


def new_deployment_key() -> bytes:
    """Make a deployment key that nobody has had."""
    return secrets.token_bytes(SECRET_BYTES)


def write_deployment_keys(path: Path, keys: tuple[bytes, ...]) -> None:
    """Make these the contents of the key file, durably. Raises `DiskError`."""
    try:
        write_signing_secrets(path, keys)
    except OSError as error:
        raise DiskError(f"the deployment key {path} can't be written: {error.strerror}") from None


def _bound_to(owner: Owner, key_id: KeyId) -> bytes:
    tenant, user = owner
    return frame([b"saltern.datakey", _WRAPPED_VERSION, tenant.encode(), user, key_id])


class Keyring:
    """The data keys of all users in memory, and for whom none may be used. For any thread."""

    def __init__(self) -> None:
        self.lock = Lock()
        """Held by whoever must not be overtaken by `refuse`."""
        self._key_by_owner: dict[Owner, DataKey] = {}
        self._refused_up_to: dict[tuple[str, UserId | None], float] = {}  # operations up to this id; inf: all
        self._erased: set[Owner] = set()

    def add(self, owner: Owner, key: DataKey) -> None:
        """Take up a key that was found on the disk."""
        self._key_by_owner[owner] = key

    def allows(self, op: OpId, owner: Owner) -> bool:
        """Return whether an operation may still succeed."""
        refused = max(self._refused_up_to.get(owner, -1), self._refused_up_to.get((owner[0], None), -1))
        return op > refused and owner not in self._erased

    def owners(self, tenant: str) -> list[Owner]:
        """Return the users of a tenant that have a key, stored or not."""
        with self.lock:
            return [owner for owner in self._key_by_owner if owner[0] == tenant]

    def find(self, op: OpId, owner: Owner) -> DataKey | None:
        """Return a user's key, for reading."""
        with self.lock:
            return self._key_by_owner.get(owner) if self.allows(op, owner) else None

    def find_or_make(self, op: OpId, owner: Owner) -> DataKey | None:
        """Return a user's key, for writing: made with the first record. None for one who may have none."""
        with self.lock:
            if not self.allows(op, owner):
                return None
            key = self._key_by_owner.get(owner)
            if key is None:
                key = self._key_by_owner[owner] = new_data_key()
            return key

    def refuse(self, tenant: str, user: UserId | None) -> None:
        """Let no operation of these users succeed from now on."""
        with self.lock:
            self._refused_up_to[tenant, user] = float("inf")

    def drop(self, owners: Iterable[Owner], *, for_good: bool) -> None:
        """Forget the keys of users whose keys are destroyed on the disk; with `for_good`, never use one again."""
        with self.lock:
            for owner in owners:
                self._key_by_owner.pop(owner, None)
                if for_good:
                    self._erased.add(owner)

    def allow(self, tenant: str, user: UserId | None, after: OpId) -> None:
        """Let operations of these users succeed again that are younger than `after`."""
        with self.lock:
            self._refused_up_to[tenant, user] = after
