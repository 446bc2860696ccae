"""A record: a block as it lies on the disk, encrypted, with its own name in front.

    [ header: 256 bytes, plain ][ block, encrypted: length bytes ][ tag: 16 bytes ][ zeros to the end of the page ]

The header is what is authenticated with the block. A reader makes the header that it expects from what it asked for
and believes nothing of the one on the disk but the nonce. docs/disk-format.md has the layout and the reasons.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import GCM

from saltern.core.disk import DISK_PAGE_BYTES, RECORD_HEADER_BYTES, RECORD_TAG_BYTES, record_pages
from saltern.core.effects import RecordName
from saltern.core.extents import Extent
from saltern.tiers.datakeys import DataKey

NONCE_BYTES = 12
RECORD_VERSION = 1
MAGIC = b"saltern\0"
TENANT_BYTES_MAX = 120
"""Room for a tenant's name in the header."""

_LAYOUT = struct.Struct(f"<8sHBB4xQ{NONCE_BYTES}s4x16s16s32s32s{TENANT_BYTES_MAX}s")
assert _LAYOUT.size == RECORD_HEADER_BYTES, "the header's layout is 256 bytes"
_NONCE_AT = 24


class Header:
    """What the header of a record says, for a tool that lists a slab. Nothing of it is authentic."""

    def __init__(self, page: bytes | memoryview) -> None:
        """Read a header from the beginning of a page. Raises ValueError if there is none of this version."""
        magic, version, tenant_length, root_length, length, _, key_id, user, key, root, tenant = _LAYOUT.unpack_from(
            page
        )
        if magic != MAGIC or version != RECORD_VERSION:
            raise ValueError("no record of this version")
        self.name = RecordName(tenant[:tenant_length].decode(errors="replace"), user, key, root[:root_length])
        self.key_id: bytes = key_id
        self.length: int = length


def record_bytes(length: int) -> int:
    """Return how many bytes the record of a block of `length` bytes takes, in whole pages."""
    return record_pages(length) * DISK_PAGE_BYTES


def pieces(memory: memoryview, extent: Extent, *, page_bytes: int, length: int) -> Iterator[memoryview]:
    """Yield the first `length` bytes of an extent of `memory`, run by run."""
    for run in extent:
        start, size = run.start * page_bytes, min(run.count * page_bytes, length)
        if size:
            yield memory[start : start + size]
        length -= size
    assert length == 0, "the extent is shorter than its block"


def seal(name: RecordName, key: DataKey, nonce: bytes, block: Sequence[memoryview], record: memoryview) -> None:
    """Write the record of a block, given in pieces, over all of `record`. Raises ValueError if the name has no room."""
    length = sum(map(len, block))
    header = _header(name, key, nonce, length)
    record[:RECORD_HEADER_BYTES] = header
    encryptor = Cipher(AES256(key.secret), GCM(nonce)).encryptor()
    encryptor.authenticate_additional_data(header)
    # Without the interpreter's lock: the loop goes on beside it.
    place = RECORD_HEADER_BYTES
    for piece in block:
        place += encryptor.update_into(piece, record[place : place + len(piece)])
    encryptor.finalize()
    record[place : place + RECORD_TAG_BYTES] = encryptor.tag
    place += RECORD_TAG_BYTES
    record[place:] = bytes(len(record) - place)  # nothing of the record before in this buffer goes along


def unseal(name: RecordName, key: DataKey, record: memoryview, block: Iterable[memoryview]) -> bool:
    """Decrypt a record into a block, given in pieces, and return whether it is the one that `name` names.

    If it isn't, the block's bytes are zeros, or what they were before.
    """
    block = list(block)
    length = sum(map(len, block))
    nonce = bytes(record[_NONCE_AT : _NONCE_AT + NONCE_BYTES])
    header = _header(name, key, nonce, length)
    if record[:RECORD_HEADER_BYTES] != header:
        return False
    decryptor = Cipher(AES256(key.secret), GCM(nonce)).decryptor()
    decryptor.authenticate_additional_data(header)
    place = RECORD_HEADER_BYTES
    for piece in block:
        place += decryptor.update_into(record[place : place + len(piece)], piece)
    try:
        decryptor.finalize_with_tag(bytes(record[place : place + RECORD_TAG_BYTES]))
    except InvalidTag:
        for piece in block:
            piece[:] = bytes(len(piece))
        return False
    return True


def _header(name: RecordName, key: DataKey, nonce: bytes, length: int) -> bytes:
    tenant = name.tenant.encode()
    if len(tenant) > TENANT_BYTES_MAX:
        raise ValueError(f"a tenant's name of {len(tenant)} bytes has no room in a record")
    return _LAYOUT.pack(
        MAGIC,
        RECORD_VERSION,
        len(tenant),
        len(name.root),
        length,
        nonce,
        key.id,
        name.user,
        name.key,
        name.root,
        tenant,
    )
