"""The wire: bytes to messages and back, without I/O.

    connection  =  preamble  frame*
    preamble    =  "SALT"  oldest: u16  newest: u16          both sides send theirs first
    frame       =  length: u32  payload                      payload: one message, msgpack

All integers are little-endian. The protocol spoken is the newest that both sides know. Whatever a peer
sends, the only error is `ProtocolError`, and its text says what to do. A frame's length is checked before
anything is kept for it, so a peer can't make us hold more than one frame.
"""

from struct import Struct as Layout
from typing import Generic, TypeVar

import msgspec

from saltern.core.messages import Reply, Request
from saltern.operations import Answer, Operation

PROTOCOL_OLDEST = 1
PROTOCOL_NEWEST = 1
FRAME_BYTES_MAX = 8 * 1024 * 1024
"""Largest payload: an Acquired of 65,536 blocks in a few runs each."""

_MAGIC = b"SALT"
_PREAMBLE = Layout("<4sHH")
_LENGTH = Layout("<I")

Incoming = TypeVar("Incoming")


class ProtocolError(Exception):
    """The peer sent what this side can't speak. The text is for a person."""


def encode(message: Request | Reply | Operation | Answer) -> bytes:
    """Return a message as one frame."""
    payload = _encoder.encode(message)
    if len(payload) > FRAME_BYTES_MAX:
        raise ProtocolError(f"a {type(message).__name__} of {len(payload)} bytes, the limit is {FRAME_BYTES_MAX}")
    return _LENGTH.pack(len(payload)) + payload


class Wire(Generic[Incoming]):
    """One side of a connection: send `preamble`, then `encode()`d messages; `feed()` what comes in."""

    def __init__(
        self,
        decoder: "msgspec.msgpack.Decoder[Incoming]",
        *,
        peer: str,
        oldest: int = PROTOCOL_OLDEST,
        newest: int = PROTOCOL_NEWEST,
    ) -> None:
        self.preamble = _PREAMBLE.pack(_MAGIC, oldest, newest)
        self.protocol: int | None = None  # until the peer's preamble is in
        self._decoder = decoder
        self._peer = peer
        self._oldest, self._newest = oldest, newest
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> list[Incoming]:
        """Take bytes as they come and return the messages that they complete.

        Raises `ProtocolError`; the connection is then of no further use.
        """
        self._buffer += data
        view, position = memoryview(self._buffer), 0
        messages: list[Incoming] = []
        try:
            if self.protocol is None:
                if not _MAGIC.startswith(bytes(view[: len(_MAGIC)])) and bytes(view[: len(_MAGIC)]) != _MAGIC:
                    raise ProtocolError(f"the {self._peer} doesn't speak Saltern's protocol")
                if len(view) < _PREAMBLE.size:
                    return messages
                self.protocol = self._agree(view)
                position = _PREAMBLE.size
            while len(view) - position >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(view, position)
                if length > FRAME_BYTES_MAX:
                    raise ProtocolError(
                        f"the {self._peer} sent a frame of {length} bytes, the limit is {FRAME_BYTES_MAX}"
                    )
                end = position + _LENGTH.size + length
                if end > len(view):
                    break
                messages.append(self._decode(view[position + _LENGTH.size : end]))
                position = end
        finally:
            view.release()
        del self._buffer[:position]
        return messages

    def _agree(self, preamble: memoryview) -> int:
        oldest: int
        newest: int
        _, oldest, newest = _PREAMBLE.unpack_from(preamble)
        if oldest > self._newest or newest < self._oldest:
            raise ProtocolError(
                f"the {self._peer} speaks Saltern protocol {_versions(oldest, newest)}, this side"
                f" {_versions(self._oldest, self._newest)}: run the same release of Saltern on both sides"
            )
        return min(newest, self._newest)

    def _decode(self, payload: memoryview) -> Incoming:
        try:
            return self._decoder.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"the {self._peer} sent a malformed message: {error}") from None


def _versions(oldest: int, newest: int) -> str:
    return str(oldest) if oldest == newest else f"{oldest} to {newest}"


_encoder = msgspec.msgpack.Encoder()


def server_wire() -> Wire[Request]:
    """Return the server's side of a connection."""
    return Wire(msgspec.msgpack.Decoder(Request), peer="client")


def client_wire() -> Wire[Reply]:
    """Return an engine's or an operator's side of a connection."""
    return Wire(msgspec.msgpack.Decoder(Reply), peer="server")


def admin_server_wire() -> Wire[Operation]:
    """Return the server's side of a connection to its admin socket."""
    return Wire(msgspec.msgpack.Decoder(Operation), peer="client")


def admin_client_wire() -> Wire[Answer]:
    """Return the operator's side of it."""
    return Wire(msgspec.msgpack.Decoder(Answer), peer="server")
