"""Messages: what is sent is what arrives, bounds hold while decoding, and version 1 keeps its bytes."""

from typing import get_args

import msgspec
import pytest

from saltern.core.cache import Cache
from saltern.core.extents import Run
from saltern.core.keys import Key, UserId
from saltern.core.messages import (
    KEYS_MAX,
    Abort,
    Acquire,
    Acquired,
    Attached,
    Commit,
    Discard,
    GetStats,
    Grant,
    Loading,
    LookedUp,
    Lookup,
    NamespaceChanged,
    PublicDepth,
    Refusal,
    Refused,
    Release,
    Reply,
    Request,
    Reserve,
    Reserved,
    SchedulerHello,
    SessionEnded,
    SigningSecrets,
    Stats,
    Welcome,
    WorkerHello,
)

NAME = bytes(range(16))
USER = UserId(bytes(range(100, 116)))
KEY = Key(bytes(range(32)))
OTHER_KEY = Key(bytes(range(32, 64)))
EXTENT = (Run(start=3, count=2), Run(start=9, count=1))

REQUESTS: list[tuple[Request, str]] = [
    (
        SchedulerHello("engine", NAME, (NAME,), 4096, 512, root=NAME, block_tokens=128),
        "9801a6656e67696e65c410000102030405060708090a0b0c0d0e0f91c410000102030405060708090a0b0c0d0e0fcd1000cd0200"
        "c410000102030405060708090a0b0c0d0e0fcc80",
    ),
    (WorkerHello("engine", NAME, 1, 2, True), "9602a6656e67696e65c410000102030405060708090a0b0c0d0e0f0102c3"),
    (
        Lookup(7, USER, (KEY,), (OTHER_KEY,), public=(OTHER_KEY,), block_seconds=1.5),
        "980707c4106465666768696a6b6c6d6e6f7071727391c420000102030405060708090a0b0c0d0e0f1011121314151617"
        "18191a1b1c1d1e1f91c420202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f"
        "a764656661756c74"
        "91c420202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3fcb3ff8000000000000",
    ),
    (
        Acquire(7, USER, (KEY, OTHER_KEY), 1),
        "990907c4106465666768696a6b6c6d6e6f7071727392c420000102030405060708090a0b0c0d0e0f1011121314151617"
        "18191a1b1c1d1e1fc420202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f0190"
        "a764656661756c7490cb0000000000000000",
    ),
    (Release(5), "920b05"),
    (
        Reserve(7, USER, (KEY,), 0, 1.5, True, began_at=1.5),
        "9a0c07c4106465666768696a6b6c6d6e6f7071727391c420000102030405060708090a0b0c0d0e0f1011121314151617"
        "18191a1b1c1d1e1f00cb3ff8000000000000c3a764656661756c7490cb3ff8000000000000",
    ),
    (Commit(5), "920e05"),
    (Abort(5), "920f05"),
    (
        Discard(USER, KEY),
        "9410c4106465666768696a6b6c6d6e6f70717273c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
        "a764656661756c74",
    ),
    (GetStats(), "9111"),
    (NamespaceChanged(NAME), "9214c410000102030405060708090a0b0c0d0e0f"),
]
REPLIES: list[tuple[Reply, str]] = [
    (
        Welcome(arena_bytes=65536, page_bytes=4096, naming_secret=NAME, signing_secrets=(NAME,)),
        "9503ce00010000cd1000c410000102030405060708090a0b0c0d0e0f91c410000102030405060708090a0b0c0d0e0f",
    ),
    (SigningSecrets((NAME, NAME)), "921392" + "c410000102030405060708090a0b0c0d0e0f" * 2),
    (Refused("why"), "9204a3776879"),
    (Attached(NAME), "9205c410000102030405060708090a0b0c0d0e0f"),
    (SessionEnded("why"), "9206a3776879"),
    (LookedUp(7, 2), "93080702"),
    (Loading(7, 2, 1.5), "94160702cb3ff8000000000000"),
    (Acquired(7, 5, 1.5, 2, (EXTENT,), 1), "970a0705cb3ff800000000000002919292030292090101"),
    (PublicDepth(3), "921503"),
    (
        Reserved(7, 5, (Grant(index=1, extent=EXTENT),), 2, Refusal.NEXT_VICTIM),
        "960d07059192019292030292090102ab6e6578742d76696374696d",
    ),
]

requests = msgspec.msgpack.Decoder(Request)
replies = msgspec.msgpack.Decoder(Reply)


@pytest.mark.parametrize(("message", "golden"), REQUESTS, ids=[type(message).__name__ for message, _ in REQUESTS])
def test_a_request_keeps_its_bytes(message: Request, golden: str) -> None:
    assert msgspec.msgpack.encode(message).hex() == golden
    assert requests.decode(bytes.fromhex(golden)) == message


@pytest.mark.parametrize(("message", "golden"), REPLIES, ids=[type(message).__name__ for message, _ in REPLIES])
def test_a_reply_keeps_its_bytes(message: Reply, golden: str) -> None:
    assert msgspec.msgpack.encode(message).hex() == golden
    assert replies.decode(bytes.fromhex(golden)) == message


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        (SchedulerHello("engine", NAME, (NAME,), 4096), [1, "engine", NAME, [NAME], 4096]),
        (Lookup(7, USER, (KEY,)), [7, 7, USER, [KEY]]),
        (Acquire(7, USER, (KEY,), 1), [9, 7, USER, [KEY], 1]),
        (Reserve(7, USER, (KEY,), 0, 1.5), [12, 7, USER, [KEY], 0, 1.5]),
        (Discard(USER, KEY), [16, USER, KEY]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_who_knows_no_states_or_tenants_need_not_speak_of_them(message: Request, fields: list[object]) -> None:
    assert requests.decode(msgspec.msgpack.encode(fields)) == message


def test_a_server_that_signs_nothing_need_not_say_so() -> None:
    old = msgspec.msgpack.encode([3, 65536, 4096, NAME])
    assert replies.decode(old) == Welcome(arena_bytes=65536, page_bytes=4096, naming_secret=NAME)


def test_every_message_is_pinned() -> None:
    assert {type(message) for message, _ in REQUESTS} == set(get_args(Request))
    assert {type(message) for message, _ in REPLIES} | {Stats} == set(get_args(Reply))


@pytest.mark.parametrize("refusal", [None, *Refusal])
def test_every_refusal_arrives(refusal: Refusal | None) -> None:
    reserved = Reserved(1, 0, (), 0, refusal)
    assert replies.decode(msgspec.msgpack.encode(reserved)) == reserved


def test_a_snapshot_arrives_whole() -> None:
    stats = Stats(Cache(pages=4, page_bytes=10).snapshot())
    assert replies.decode(msgspec.msgpack.encode(stats)) == stats


OUT_OF_BOUNDS: list[Request] = [
    SchedulerHello("e" * 257, NAME, (NAME,), 1),
    SchedulerHello("engine", NAME[:-1], (NAME,), 1),
    SchedulerHello("engine", NAME, (), 1),
    SchedulerHello("engine", NAME, (NAME,) * 4097, 1),
    SchedulerHello("engine", NAME, (NAME + b"x",), 1),
    SchedulerHello("engine", NAME, (NAME,), 0),
    SchedulerHello("engine", NAME, (NAME,), 1, -1),
    WorkerHello("e" * 257, NAME, 0, 1, False),
    WorkerHello("engine", b"", 0, 1, False),
    WorkerHello("engine", NAME, -1, 1, False),
    WorkerHello("engine", NAME, 0, 0, False),
    Lookup(1, UserId(USER + b"x"), (KEY,)),
    Lookup(1, UserId(b""), (KEY,)),
    Lookup(1, USER, (Key(KEY[:-1]),)),
    Lookup(1, USER, (KEY,) * (KEYS_MAX + 1)),
    Lookup(1, USER, (KEY,), (Key(KEY[:-1]),)),
    Lookup(1, USER, (KEY,), (KEY,) * (KEYS_MAX + 1)),
    Acquire(1, USER, (KEY, Key(KEY + b"x")), 0),
    Acquire(1, USER, (KEY,), -1),
    Acquire(1, USER, (KEY,) * (KEYS_MAX + 1), 0),
    Acquire(1, USER, (KEY,), 0, (Key(KEY + b"x"),)),
    Reserve(1, USER, (Key(b""),), 0, 0.0),
    Reserve(1, USER, (KEY,), -1, 0.0),
    Reserve(1, USER, (KEY,) * (KEYS_MAX + 1), 0, 0.0),
    Discard(UserId(b""), KEY),
    Discard(USER, Key(b"")),
]


@pytest.mark.parametrize("message", OUT_OF_BOUNDS, ids=lambda message: type(message).__name__)
def test_what_is_out_of_bounds_is_not_decoded(message: Request) -> None:
    with pytest.raises(msgspec.ValidationError):
        requests.decode(msgspec.msgpack.encode(message))


def test_the_longest_prompt_is_decoded() -> None:
    longest = Lookup(1, USER, (KEY,) * KEYS_MAX)
    assert requests.decode(msgspec.msgpack.encode(longest)) == longest


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [7],
        [7, 1, USER],
        [7, "1", USER, [KEY]],
        [7, 1, USER.hex(), [KEY]],
        [7, 1, USER, KEY],
        [7, True, USER, [KEY]],
        [7, 1.5, USER, [KEY]],
        [0, 1],
        [8, 1, 1],
        [99],
        ["7", 1, USER, [KEY]],
        {"request": 1},
        None,
    ],
)
def test_what_is_no_request_is_not_decoded(fields: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        requests.decode(msgspec.msgpack.encode(fields))
