"""The audit log: what operators have changed, in a file that only grows, and that tells when it was changed itself.

One line of JSON for each change, in the order of `Line`'s fields:

    hash       =  H("saltern.audit", previous, serial, time, what, by, details)       fields framed by their lengths
    previous   =  the hash of the line before; 64 zeros in the first
    signature  =  Ed25519(receipt.key, "saltern.audit" ‖ hash)

A receipt is such a line, handed out. Its hash covers all lines before it, so a log that doesn't hold it was cut or
written anew, and its signature says who gave it, without the log. Every line is signed, not those alone that are handed
out: a chain of bare hashes can be written anew by whoever may write the file. Whoever holds the key can forge all of
it, but for what a receipt elsewhere contradicts.

A line is on the disk when `append()` returns. Several processes may append, since a lock on the file lets one at a time
find its end.
"""

import fcntl
import os
import time
from binascii import unhexlify
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, BinaryIO, NamedTuple

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from msgspec import Meta, Struct

from saltern.core.keys import digest
from saltern.secret import read_private, write_private

LOG_NAME, KEY_NAME, PUBLIC_KEY_NAME = "audit.log", "receipt.key", "receipt.pub"

Detail = str | int | float | list[str] | None

_PURPOSE = b"saltern.audit"
_NO_HASH = bytes(32).hex()
_TAIL_BYTES = 64 * 1024
"""Read from the end at a time, to find the last line: many times as much as a line has."""

Hex32 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Hex64 = Annotated[str, Meta(pattern="^[0-9a-f]{128}$")]


class AuditError(Exception):
    """The log can't be written, or it is not what was written. The text says why, where, and what to do."""


class Line(Struct, frozen=True, forbid_unknown_fields=True):
    """One change: the `serial`-th, what was done, by whom, and to what."""

    serial: Annotated[int, Meta(ge=1)]
    time: str
    what: str
    by: str
    details: Mapping[str, Detail]
    previous: Hex32
    hash: Hex32
    signature: Hex64

    @property
    def is_whole(self) -> bool:
        """Return whether the hash is that of what the line says."""
        return self.hash == _hash(self.serial, self.time, self.what, self.by, self.details, previous=self.previous)

    def is_signed_by(self, key: Ed25519PublicKey) -> bool:
        """Return whether the holder of the other half of `key` wrote this line."""
        try:
            key.verify(unhexlify(self.signature), _PURPOSE + unhexlify(self.hash))
        except InvalidSignature:
            return False
        return True

    @property
    def text(self) -> str:
        """Return the line as the log holds it: a receipt, for whoever gets it."""
        return _encoder.encode(self).decode()


class Verified(NamedTuple):
    """A log that is what was written, as far as it goes: how many lines it has, and the last one's hash."""

    lines: int
    head: str


class AuditLog:
    """The log in `folder`, which appears with its key at the first line. Any thread of any process may append."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = folder / LOG_NAME
        self.key_path = folder / KEY_NAME
        self.public_key_path = folder / PUBLIC_KEY_NAME
        self._clock = clock

    def prepare(self) -> None:
        """Make the key where there is none, and see that lines can be added. Raises `AuditError`."""
        try:
            key = self._key()
            with self.path.open("rb") as file:
                _last_line(self.path, file, key.public_key())
        except FileNotFoundError:
            pass
        except OSError as error:
            raise AuditError(f"{error.filename or self.path}: {error.strerror}") from None

    def append(self, what: str, details: Mapping[str, Detail], *, by: str) -> Line:
        """Add a line and wait until it is on the disk. Raises `AuditError`, and then nothing was added."""
        try:
            key = self._key()
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "r+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                return self._append(file, key, what, details, by)
        except OSError as error:
            where = error.filename or self.path
            raise AuditError(f"the audit log can't be written: {where}: {error.strerror}") from None

    def _append(
        self, file: BinaryIO, key: Ed25519PrivateKey, what: str, details: Mapping[str, Detail], by: str
    ) -> Line:
        if os.fstat(file.fileno()).st_mode & 0o022:
            raise AuditError(f"others may change {self.path}: chmod 600 it once you trust what it says")
        last, torn_bytes = _last_line(self.path, file, key.public_key())
        size = os.fstat(file.fileno()).st_size - torn_bytes
        data = b""
        if torn_bytes:  # of whoever ended while writing, and therefore was never answered
            os.ftruncate(file.fileno(), size)
            last = self._signed(key, last, "torn-line-dropped", {"bytes": torn_bytes}, by)
            data = last.text.encode() + b"\n"
        line = self._signed(key, last, what, details, by)
        data += line.text.encode() + b"\n"
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                os.ftruncate(file.fileno(), size)
            raise
        if not size:
            _sync_folder(self.path.parent)
        return line

    def _signed(
        self, key: Ed25519PrivateKey, last: Line | None, what: str, details: Mapping[str, Detail], by: str
    ) -> Line:
        serial, previous = (1, _NO_HASH) if last is None else (last.serial + 1, last.hash)
        moment = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds")
        hashed = _hash(serial, moment, what, by, details, previous=previous)
        signature = key.sign(_PURPOSE + unhexlify(hashed))
        return Line(serial, moment, what, by, details, previous, hashed, signature.hex())

    def _key(self) -> Ed25519PrivateKey:
        """Return the key that signs, made where neither it nor a log is. Raises OSError, or `AuditError`."""
        try:
            if not self.key_path.exists():
                self._make_key()
            key = _private_key(self.key_path, read_private(self.key_path))
        except ValueError as error:  # that others may read it, and the like
            raise AuditError(str(error)) from None
        if not self.public_key_path.exists():
            public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            write_private(self.public_key_path, public)
        return key

    def _make_key(self) -> None:
        if self.path.exists() and self.path.stat().st_size:
            raise AuditError(
                f"there is no {self.key_path}, with which {self.path} was signed: put it back, or move log and"
                f" {PUBLIC_KEY_NAME} away to begin another"
            )
        key = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with suppress(FileExistsError):  # another process was first
            write_private(self.key_path, key, replace=False)


def verify_log(path: Path, key: Ed25519PublicKey, receipt: Line | None = None) -> Verified:
    """Check every line of a log, and that it still holds what a receipt says. Raises `AuditError`."""
    if receipt is not None:
        verify_receipt(receipt, key)
    count, head = 0, _NO_HASH
    try:
        with path.open("rb") as file:
            for count, line in enumerate(_lines(path, file, key), start=1):
                if receipt is not None and line.serial == receipt.serial and line.hash != receipt.hash:
                    raise AuditError(
                        f"{path}: line {count} is not what the receipt says of it: the log was written anew, by"
                        " somebody who has the key"
                    )
                head = line.hash
    except OSError as error:
        raise AuditError(f"{path}: {error.strerror}") from None
    if receipt is not None and receipt.serial > count:
        raise AuditError(
            f"{path} ends after line {count}, and the receipt is of line {receipt.serial}: at least"
            f" {receipt.serial - count} lines were cut off its end"
        )
    return Verified(count, head)


def verify_receipt(receipt: Line, key: Ed25519PublicKey) -> None:
    """Raise `AuditError` unless the holder of the key gave out this receipt."""
    if not receipt.is_whole:
        raise AuditError("the receipt was changed: its hash is not that of what it says")
    if not receipt.is_signed_by(key):
        raise AuditError("the receipt is forged, or of another server: its signature is not of this public key")


def parse_receipt(text: bytes) -> Line:
    """Read a receipt. Raises `AuditError`."""
    try:
        return _decoder.decode(text)
    except ValueError as error:  # msgspec's errors are, and that of a text which is not UTF-8
        raise AuditError(f"this is no receipt: {error}") from None


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Read the public half of a key. Raises `AuditError`."""
    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise AuditError(f"{path}: {error.strerror}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise AuditError(f"{path} is no public key: {PUBLIC_KEY_NAME} in the server's state folder is") from None
    if not isinstance(key, Ed25519PublicKey):
        raise AuditError(f"{path} is another kind of key: receipts are signed with Ed25519")
    return key


def _lines(path: Path, file: BinaryIO, key: Ed25519PublicKey) -> Iterator[Line]:
    """Yield a log's lines, each checked against the one before it. Raises `AuditError`."""
    head = _NO_HASH
    for number, raw in enumerate(file, start=1):
        where = f"{path}: line {number}"
        if not raw.endswith(b"\n"):
            raise AuditError(
                f"{where} ends in the middle, after {len(raw)} bytes: whoever wrote it was killed, and the next"
                " change drops it; or the log was cut"
            )
        line = _parse(raw, where)
        if line.serial != number or line.previous != head:
            raise AuditError(
                f"{where} is line {line.serial}, and it does not follow the line before it: lines were removed,"
                " added or put in another order"
            )
        if not line.is_signed_by(key):
            raise AuditError(f"{where} was not written by the holder of this public key: it is forged")
        head = line.hash
        yield line


def _parse(raw: bytes, where: str) -> Line:
    """Return what a line says, if it is written as we write and says what its hash says. Raises `AuditError`."""
    try:
        line = _decoder.decode(raw)
    except ValueError as error:
        raise AuditError(f"{where} was changed, it is no line of an audit log any more: {error}") from None
    if not line.is_whole or line.text.encode() + b"\n" != raw:
        raise AuditError(f"{where} was changed: its hash is not that of what it says")
    return line


def _last_line(path: Path, file: BinaryIO, key: Ed25519PublicKey) -> tuple[Line | None, int]:
    """Return the last whole line, and how many bytes of one that was never finished are behind it."""
    size = os.fstat(file.fileno()).st_size
    tail, start = b"", size
    while start and tail.count(b"\n") < 2:
        length = min(_TAIL_BYTES, start)
        start -= length
        tail = os.pread(file.fileno(), length, start) + tail
    whole, newline, torn = tail.rpartition(b"\n")
    if not newline:
        return None, len(torn)
    line = _parse(whole.rpartition(b"\n")[2] + b"\n", f"{path}: the last line")
    if not line.is_signed_by(key):
        raise AuditError(f"{path} was signed with another key than {KEY_NAME} beside it: put that one back")
    return line, len(torn)


def _hash(serial: int, moment: str, what: str, by: str, details: Mapping[str, Detail], *, previous: str) -> str:
    fields = (previous, str(serial), moment, what, by)
    return digest(_PURPOSE, [*(field.encode() for field in fields), _encoder.encode(details)]).hex()


def _private_key(path: Path, pem: bytes) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError(f"{path} is no private key: put a copy of it back") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path} is another kind of key: put a copy of the one for Ed25519 back")
    return key


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_encoder = msgspec.json.Encoder(order="deterministic")
_decoder = msgspec.json.Decoder(Line)
