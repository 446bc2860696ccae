"""Publication marks: with what a request says that its prompt shall become readable by all users.

    mark  =  "p1." publication "." expiry "." mac                                 stands in `kv_transfer_params`
    mac   =  keyed_H(signing secret, root, content, publication, expiry)          43 characters of base64url

`root` and `content` (`core/keys.py`) say for which namespace and which tokens the mark holds: with another prompt,
model or adapter it is a forged one. `publication` is the server's name of what is published, 16 bytes; once that is
removed the mark is of no use, whoever has seen it. `expiry` is in seconds of Unix time.
"""

import re
from base64 import urlsafe_b64decode
from collections.abc import Iterable

from msgspec import Struct

from saltern.core.keys import Content
from saltern.core.messages import PublicationId
from saltern.signing import base64url, is_mac_of, mac_of

FIELD = "saltern.publish"
"""Where a mark stands in a request's `kv_transfer_params`."""

_PURPOSE = b"saltern.publish"
_MARK = re.compile(r"p1\.([A-Za-z0-9_-]{22})\.([1-9][0-9]{0,11})\.([A-Za-z0-9_-]{43})")


class Mark(Struct, frozen=True):
    """A mark that is well formed, and no more than that until `holds` says so."""

    publication: PublicationId
    expires_at: int
    mac: str

    def holds(self, *, root: Content, content: Content, secrets: Iterable[bytes], now: float) -> bool:
        """Return whether one of `secrets` signed the mark for these tokens in this namespace; `now` is Unix time."""
        fields = _fields(self.publication, self.expires_at, root, content)
        return is_mac_of(self.mac, _PURPOSE, fields, secrets) and now < self.expires_at


def sign_mark(publication: PublicationId, expires_at: int, *, root: Content, content: Content, secret: bytes) -> str:
    """Return the mark for a prompt that ends in `content`, valid until `expires_at`."""
    mac = mac_of(_PURPOSE, _fields(publication, expires_at, root, content), secret)
    mark = f"p1.{base64url(publication)}.{expires_at}.{mac}"
    assert parse_mark(mark) is not None, "a mark that nobody could read"
    return mark


def parse_mark(text: object) -> Mark | None:
    """Read a mark that a request carries; None for whatever isn't one. Raises for nothing."""
    match = _MARK.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        return None
    publication, expires_at, mac = match.groups()
    name = PublicationId(urlsafe_b64decode(publication + "=="))
    return Mark(name, int(expires_at), mac) if base64url(name) == publication else None


def _fields(publication: PublicationId, expires_at: int, root: Content, content: Content) -> list[bytes]:
    return [root, content, publication, expires_at.to_bytes(8, "little")]
