"""What holds for the wire, whatever a peer sends and however it arrives."""

import struct
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saltern.core.extents import Run
from saltern.core.keys import KEY_BYTES, USER_ID_BYTES, Key, UserId
from saltern.core.messages import (
    KEYS_MAX,
    NAME_BYTES,
    Abort,
    Acquire,
    Acquired,
    Attached,
    Commit,
    Discard,
    GetStats,
    Grant,
    LookedUp,
    Lookup,
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
    Welcome,
    WorkerHello,
)
from saltern.wire import (
    FRAME_BYTES_MAX,
    PROTOCOL_NEWEST,
    ProtocolError,
    Wire,
    client_wire,
    encode,
    server_wire,
)

counts = st.integers(0, 2**63 - 1)
names = st.binary(min_size=NAME_BYTES, max_size=NAME_BYTES)
users = st.binary(min_size=USER_ID_BYTES, max_size=USER_ID_BYTES).map(UserId)
key = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES).map(Key)
keys = st.lists(key, max_size=5).map(tuple)
times = st.floats(allow_nan=False)
extents = st.lists(st.builds(Run, start=counts, count=counts), min_size=1, max_size=3).map(tuple)

requests: st.SearchStrategy[Request] = st.one_of(
    st.builds(
        SchedulerHello,
        engine=st.text(max_size=20),
        incarnation=names,
        workers=st.lists(names, min_size=1, max_size=3).map(tuple),
        block_bytes=st.integers(1, 2**40),
        state_bytes=st.integers(0, 2**40),
    ),
    st.builds(
        WorkerHello,
        engine=st.text(max_size=20),
        name=names,
        rank=counts,
        world_size=st.integers(1, 9),
        outlives_socket=st.booleans(),
    ),
    st.builds(Lookup, request=counts, user=users, keys=keys, states=keys),
    st.builds(Acquire, request=counts, user=users, keys=keys, start=counts, states=keys),
    st.builds(Release, lease=counts),
    st.builds(
        Reserve,
        request=counts,
        user=users,
        keys=keys,
        start=counts,
        acquired_at=times,
        ends_in_state=st.booleans(),
    ),
    st.builds(Commit, lease=counts),
    st.builds(Abort, lease=counts),
    st.builds(Discard, user=users, key=key),
    st.builds(GetStats),
)
secrets = st.binary(max_size=32)
replies: st.SearchStrategy[Reply] = st.one_of(
    st.builds(
        Welcome, arena_bytes=counts, page_bytes=counts, naming_secret=secrets, signing_secrets=st.tuples(secrets)
    ),
    st.builds(SigningSecrets, secrets=st.lists(secrets, max_size=2).map(tuple)),
    st.builds(Refused, reason=st.text()),
    st.builds(Attached, incarnation=names),
    st.builds(SessionEnded, reason=st.text()),
    st.builds(LookedUp, request=counts, ready=counts),
    st.builds(
        Acquired, request=counts, lease=counts, acquired_at=times, ready=counts, extents=st.tuples(extents, extents)
    ),
    st.builds(
        Reserved,
        request=counts,
        lease=counts,
        grants=st.lists(st.builds(Grant, index=counts, extent=extents), max_size=3).map(tuple),
        upto=counts,
        refusal=st.none() | st.sampled_from(Refusal),
    ),
)


@given(st.lists(requests, max_size=4), st.integers(1, 7))
def test_requests_arrive_whole_however_the_bytes_are_cut(messages: list[Request], step: int) -> None:
    wire = server_wire()
    stream = client_wire().preamble + b"".join(map(encode, messages))
    arrived = [message for start in range(0, len(stream), step) for message in wire.feed(stream[start : start + step])]
    assert arrived == messages


@given(st.lists(replies, min_size=1, max_size=3))
def test_replies_arrive_whole_when_split_at_every_byte(messages: list[Reply]) -> None:
    stream = server_wire().preamble + b"".join(map(encode, messages))
    for cut in range(len(stream) + 1):
        wire = client_wire()
        assert wire.feed(stream[:cut]) + wire.feed(stream[cut:]) == messages


@given(st.binary(max_size=200), st.booleans(), st.integers(1, 50))
def test_garbage_gives_only_our_error(garbage: bytes, greeted: bool, step: int) -> None:
    for wire in (server_wire(), client_wire()):
        stream = (wire.preamble if greeted else b"") + garbage
        with suppress(ProtocolError):
            for start in range(0, len(stream), step):
                wire.feed(stream[start : start + step])


@given(st.binary(max_size=200))
def test_a_garbled_payload_gives_only_our_error(payload: bytes) -> None:
    for wire in (server_wire(), client_wire()):
        wire.feed(wire.preamble)
        with suppress(ProtocolError):
            wire.feed(struct.pack("<I", len(payload)) + payload)


@given(requests, st.data())
def test_a_request_with_one_byte_changed_is_another_request_or_our_error(message: Request, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    at = data.draw(st.integers(4, len(frame) - 1))
    frame[at] = data.draw(st.integers(0, 255))
    wire = server_wire()
    wire.feed(wire.preamble)
    try:
        (received,) = wire.feed(frame)
    except ProtocolError:
        return
    assert server_wire().feed(wire.preamble + encode(received)), "what came in is not a message that could be sent"


def test_a_frame_that_is_too_long_is_refused_by_its_length_alone() -> None:
    wire = server_wire()
    with pytest.raises(ProtocolError, match=f"a frame of {FRAME_BYTES_MAX + 1} bytes, the limit is {FRAME_BYTES_MAX}"):
        wire.feed(wire.preamble + struct.pack("<I", FRAME_BYTES_MAX + 1))


def test_a_message_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="a Refused of"):
        encode(Refused("x" * FRAME_BYTES_MAX))


def test_the_longest_prompt_and_its_answer_fit_a_frame() -> None:
    many = (Key(bytes(KEY_BYTES)),) * KEYS_MAX
    wire = server_wire()
    ask = Acquire(request=2**63 - 1, user=UserId(bytes(USER_ID_BYTES)), keys=many, start=KEYS_MAX, states=many)
    assert wire.feed(wire.preamble + encode(ask)) == [ask]
    runs = (Run(start=2**31, count=2**31), Run(start=2**31, count=2**31), Run(start=2**31, count=2**31))
    extents = (runs,) * (KEYS_MAX + 1)  # the last is a state's
    encode(Acquired(request=2**63 - 1, lease=2**63 - 1, acquired_at=1.0, ready=KEYS_MAX, extents=extents))


def test_more_keys_than_a_message_may_have_are_refused() -> None:
    many = (Key(bytes(KEY_BYTES)),) * (KEYS_MAX + 1)
    wire = server_wire()
    with pytest.raises(ProtocolError, match="length <= 65536"):
        wire.feed(wire.preamble + encode(Lookup(request=1, user=UserId(bytes(USER_ID_BYTES)), keys=many)))


def test_keys_and_users_of_another_length_are_refused() -> None:
    for message in (
        Lookup(request=1, user=UserId(b"short"), keys=()),
        Discard(user=UserId(bytes(USER_ID_BYTES)), key=Key(bytes(KEY_BYTES + 1))),
    ):
        wire = server_wire()
        with pytest.raises(ProtocolError, match="malformed"):
            wire.feed(wire.preamble + encode(message))


def wire_of(oldest: int, newest: int) -> Wire[Request]:
    return Wire(msgspec.msgpack.Decoder(Request), peer="client", oldest=oldest, newest=newest)


def test_peers_speak_the_newest_protocol_that_both_know() -> None:
    older, newer = wire_of(1, 2), wire_of(2, 4)
    older.feed(newer.preamble)
    newer.feed(older.preamble)
    assert older.protocol == newer.protocol == 2


@pytest.mark.parametrize("theirs", [(PROTOCOL_NEWEST + 1, PROTOCOL_NEWEST + 3), (0, 0)])
def test_peers_without_a_common_protocol_say_what_to_do(theirs: tuple[int, int]) -> None:
    with pytest.raises(ProtocolError, match="run the same release of Saltern on both sides"):
        server_wire().feed(wire_of(*theirs).preamble)


def test_another_protocol_is_recognised_at_its_first_byte() -> None:
    with pytest.raises(ProtocolError, match="the client doesn't speak Saltern's protocol"):
        server_wire().feed(b"G")
