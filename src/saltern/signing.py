"""Signed salts: what the serving layer puts into `cache_salt`, and the connector believes without asking anybody.

    salt      =  "st1." tenant "." user tag "." epoch "." mac        at most 121 of the 128 characters that vLLM allows
    user tag  =  H(tenant, user name), 16 bytes                      22 characters of base64url
    mac       =  keyed_H(signing secret, tenant, user tag, epoch)    43 characters of base64url

Hashes are those of `core/keys.py`: BLAKE2b over length-framed fields, under a purpose of their own. A tenant's name may
contain dots, what follows it has none. Whoever holds a signed salt may act as its user towards an engine, so it goes
nowhere but into the engine. No key in the cache depends on the mac: the signing secret may change, and the cache stays.
"""

import re
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Sequence
from hmac import compare_digest

from msgspec import Struct

from saltern.core.keys import digest
from saltern.core.messages import PUBLIC_TENANT
from saltern.core.tenants import TENANT_NAME, is_tenant_name

PREFIX = "st1."
EPOCH_MAX = 2**32 - 1

_PURPOSE = b"saltern.signed"

_SALT = re.compile(rf"st1\.({TENANT_NAME})\.([A-Za-z0-9_-]{{22}})\.(0|[1-9][0-9]{{0,9}})\.([A-Za-z0-9_-]{{43}})")


class Signed(Struct, frozen=True):
    """Whom a salt stands for. `user` is the tag, not the name; a user whose epoch changes begins anew."""

    tenant: str
    user: str
    epoch: int = 0


def user_tag(tenant: str, user: str) -> str:
    """Return what stands for a user's name in salts, whatever is in that name; 22 characters."""
    return base64url(digest(b"saltern.usertag", [tenant.encode(), user.encode("utf-8", "surrogatepass")], size=16))


def is_signable(tenant: str) -> bool:
    """Return whether a tenant's name may stand in a salt."""
    return is_tenant_name(tenant) and tenant != PUBLIC_TENANT


def sign(signed: Signed, secret: bytes) -> str:
    """Return the salt of a user."""
    salt = f"{PREFIX}{signed.tenant}.{signed.user}.{signed.epoch}.{mac_of(_PURPOSE, _fields(signed), secret)}"
    assert _parse(salt) is not None, f"a salt for {signed} that nobody could verify"
    return salt


def verify(salt: str, secrets: Iterable[bytes]) -> Signed | None:
    """Return whom a salt stands for, or None if none of `secrets` signed it. Raises for no text whatsoever."""
    parsed = _parse(salt)
    if parsed is None:
        return None
    signed, mac = parsed
    return signed if is_mac_of(mac, _PURPOSE, _fields(signed), secrets) else None


def _parse(salt: str) -> tuple[Signed, str] | None:
    match = _SALT.fullmatch(salt)
    if match is None:
        return None
    tenant, user, epoch, mac = match.groups()
    if tenant == PUBLIC_TENANT or int(epoch) > EPOCH_MAX:
        return None
    return Signed(tenant, user, int(epoch)), mac


def _fields(signed: Signed) -> list[bytes]:
    return [signed.tenant.encode(), signed.user.encode(), signed.epoch.to_bytes(8, "little")]


def mac_of(purpose: bytes, fields: Sequence[bytes], secret: bytes) -> str:
    """Return the mac of length-framed `fields` for one `purpose`, as 43 characters of base64url."""
    return base64url(digest(purpose, fields, key=secret))


def is_mac_of(mac: str, purpose: bytes, fields: Sequence[bytes], secrets: Iterable[bytes]) -> bool:
    """Return whether one of `secrets` made a mac."""
    # The text itself is compared, so that no other spelling of the same bytes is valid. All are tried, whichever
    # fits: the time tells nothing of a secret.
    fits = [compare_digest(mac, mac_of(purpose, fields, secret)) for secret in secrets]
    return any(fits)


def base64url(data: bytes) -> str:
    """Write bytes with letters, digits, "-" and "_", without padding."""
    return urlsafe_b64encode(data).rstrip(b"=").decode()
