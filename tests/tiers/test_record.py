"""Records: what is read is the block that was asked for, or nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from saltern.core.disk import DISK_PAGE_BYTES
from saltern.core.effects import RecordName
from saltern.core.extents import Run
from saltern.core.keys import Key, UserId
from saltern.tiers.datakeys import DataKey, KeyId
from saltern.tiers.record import Header, pieces, record_bytes, seal, unseal

NAME = RecordName("acme", UserId(b"u" * 16), Key(b"k" * 32), b"r" * 32)
KEY = DataKey(KeyId(b"i" * 16), b"s" * 32)
NONCE = b"n" * 12
BLOCK = bytes(range(100))
USED_BYTES = 256 + len(BLOCK) + 16


def sealed(
    name: RecordName = NAME, key: DataKey = KEY, nonce: bytes = NONCE, block: bytes = BLOCK, before: bytes = b"\xaa"
) -> bytearray:
    record = bytearray(before * record_bytes(len(block)))
    seal(name, key, nonce, [memoryview(block)], memoryview(record))
    return record


def opened(
    record: bytes | bytearray, name: RecordName = NAME, key: DataKey = KEY, length: int = len(BLOCK)
) -> bytes | None:
    block = bytearray(b"\xff" * length)
    if unseal(name, key, memoryview(record), [memoryview(block)]):
        return bytes(block)
    assert bytes(block) in (bytes(length), b"\xff" * length), "bytes that are not authentic were left behind"
    return None


@given(st.binary(min_size=1, max_size=20_000), st.text(max_size=40), st.binary(max_size=32))
def test_what_was_sealed_is_opened(block: bytes, tenant: str, root: bytes) -> None:
    name = replace(NAME, tenant=tenant, root=root)
    if len(tenant.encode()) > 120:
        with pytest.raises(ValueError, match="no room"):
            sealed(name, block=block)
        return
    record = sealed(name, block=block)
    assert len(record) % DISK_PAGE_BYTES == 0
    assert opened(record, name, length=len(block)) == block


def test_the_block_is_nowhere_in_its_record() -> None:
    record = bytes(sealed(block=b"a prompt's KV" * 100))
    assert b"prompt" not in record


def test_nothing_of_the_record_before_in_the_buffer_goes_along() -> None:
    record = sealed()
    assert not any(record[USED_BYTES:])


def test_one_bit_flipped_anywhere_is_a_loss() -> None:
    record = sealed()
    for place in range(USED_BYTES):
        for bit in range(8):
            record[place] ^= 1 << bit
            assert opened(record) is None, f"byte {place}, bit {bit}"
            record[place] ^= 1 << bit
    assert opened(record) == BLOCK


@pytest.mark.parametrize("before", ["zeros", "another block", "the same block"])
def test_a_record_torn_at_any_byte_is_a_loss(before: str) -> None:
    record = sealed()
    old = {
        "zeros": bytes(len(record)),
        "another block": sealed(replace(NAME, key=Key(b"o" * 32))),
        "the same block": sealed(nonce=b"o" * 12, block=b"older" * 20),
    }[before]
    for end in range(USED_BYTES):
        torn = bytes(record[:end]) + bytes(old[end:])
        if torn != bytes(old) and torn != bytes(record):
            assert opened(torn) is None, f"only {end} bytes were written"
        torn = bytes(old[:end]) + bytes(record[end:])
        if torn != bytes(old) and torn != bytes(record):
            assert opened(torn) is None, f"the first {end} bytes were not written"


@pytest.mark.parametrize(
    "name",
    [
        replace(NAME, tenant="acmf"),
        replace(NAME, user=UserId(b"v" * 16)),
        replace(NAME, key=Key(b"l" * 32)),
        replace(NAME, root=b"s" * 32),
        replace(NAME, root=b"r" * 31),
        replace(NAME, tenant="acme\0"),
    ],
    ids=str,
)
def test_a_record_is_no_other_block_s(name: RecordName) -> None:
    assert opened(sealed(name)) is None
    # Not even where somebody has written the other's name in front.
    forged = sealed()
    forged[:256] = sealed(name)[:256]
    assert opened(forged, name) is None


def test_a_root_that_ends_in_zeros_is_another_root() -> None:
    assert opened(sealed(replace(NAME, root=b"r\0")), replace(NAME, root=b"r")) is None


def test_a_record_has_the_length_that_it_was_written_with() -> None:
    assert opened(sealed(), length=len(BLOCK) - 1) is None
    assert opened(sealed(), length=len(BLOCK) + 1) is None


def test_a_record_is_under_the_key_that_it_names() -> None:
    assert opened(sealed(), key=replace(KEY, secret=b"t" * 32)) is None
    assert opened(sealed(), key=replace(KEY, id=KeyId(b"j" * 16))) is None


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_a_block_in_several_runs_is_one_block(counts: list[int], data: st.DataObject) -> None:
    page_bytes = 64
    runs: list[Run] = []
    start = 0
    for count in counts:
        start += data.draw(st.integers(0, 3))
        runs.append(Run(start=start, count=count))
        start += count
    extent = data.draw(st.permutations(runs))
    length = data.draw(st.integers(1, sum(counts) * page_bytes))
    memory = memoryview(bytearray(start * page_bytes))
    block = bytes(number % 251 for number in range(length))
    place = 0
    for piece in pieces(memory, tuple(extent), page_bytes=page_bytes, length=length):
        piece[:] = block[place : place + len(piece)]
        place += len(piece)
    record = bytearray(record_bytes(length))
    parts = list(pieces(memory, tuple(extent), page_bytes=page_bytes, length=length))
    seal(NAME, KEY, NONCE, parts, memoryview(record))
    assert opened(record, length=length) == block
    memory[:] = bytes(len(memory))
    assert unseal(NAME, KEY, memoryview(record), parts)
    assert b"".join(parts) == block


def test_a_record_can_be_listed_without_its_index() -> None:
    header = Header(bytes(sealed()))
    assert (header.name, header.key_id, header.length) == (NAME, KEY.id, len(BLOCK))
    with pytest.raises(ValueError, match="no record"):
        Header(bytes(DISK_PAGE_BYTES))
