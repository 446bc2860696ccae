"""A trace: recorded requests, each with its time, the prefix of blocks that it asks for, and who stands for its user.

The format is that of Mooncake's public traces, one JSON object a line:

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48, …]}

`timestamp` is in milliseconds and `hash_ids` are the prompt's blocks of 512 tokens each, the last perhaps not full.
Whatever else a line has may stand for the user.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

NOBODY = ""
"""The user of requests whose line has none, such as one too short for `hash_ids[1]`."""


class TraceError(Exception):
    """A trace can't be read; the text says where and why."""


class UserColumn(NamedTuple):
    """Which part of a line stands for the user: a field, or one item of a field that is a list."""

    field: str
    item: int | None = None

    def __str__(self) -> str:
        return self.field if self.item is None else f"{self.field}[{self.item}]"

    def of(self, row: dict[str, Any]) -> str:
        """Return the user of a line. Raises `KeyError` if it has no such field, `TypeError` if that is no list."""
        value = row[self.field]
        if self.item is not None:
            if not isinstance(value, list):
                raise TypeError(f"{self.field} is no list, so there is no {self}")
            value = value[self.item] if self.item < len(value) else None
        return NOBODY if value is None else str(value)


def parse_user_column(text: str) -> UserColumn:
    """Read `field` or `field[item]`. Raises `ValueError` with a text for a person."""
    match = re.fullmatch(r"([\w.-]+)(?:\[([0-9]+)\])?", text)
    if match is None:
        raise ValueError(f"{text!r} names no column: write a field such as user_id, or an item such as hash_ids[1]")
    return UserColumn(match[1], int(match[2]) if match[2] else None)


class Request(NamedTuple):
    """One request. Block numbers are equal only for equal prefixes, as the keys of the cache are."""

    at: float  # seconds
    user: str
    blocks: tuple[int, ...]


class Trace(NamedTuple):
    """Requests in order of time, and how many different blocks they have, users apart or not."""

    name: str
    requests: tuple[Request, ...]
    distinct_blocks: int
    user_column: UserColumn | None

    @property
    def blocks(self) -> int:
        """Return how many blocks are asked for in all."""
        return sum(len(request.blocks) for request in self.requests)


def read_trace(path: Path, user_column: UserColumn | None = None) -> Trace:
    """Read a file of lines as above; without a column all requests are one user's. Raises `TraceError`."""
    try:
        with path.open("rb") as lines:
            requests, distinct_blocks = _read(path, lines, user_column)
    except OSError as error:
        raise TraceError(f"{path} can't be read: {error.strerror}") from error
    if not requests:
        raise TraceError(f"{path} has no requests")
    if user_column and all(request.user == NOBODY for request in requests):
        raise TraceError(f"{path}: no line has a {user_column}, so that all would be one user")
    return Trace(path.name, tuple(requests), distinct_blocks, user_column)


def _read(path: Path, lines: Iterable[bytes], user_column: UserColumn | None) -> tuple[list[Request], int]:
    # A trace may number blocks by their own content. Numbered by what came before as well, they are prefixes.
    number_by_link: dict[tuple[int, int], int] = {}
    requests: list[Request] = []
    for line_number, line in _filled(lines):
        try:
            row = msgspec.json.decode(line, type=dict[str, Any])
            seconds = msgspec.convert(row["timestamp"], float) / 1000
            hash_ids = msgspec.convert(row["hash_ids"], list[int])
            user = user_column.of(row) if user_column else NOBODY
        except KeyError as error:
            raise TraceError(f"{path}, line {line_number}: there is no column {error.args[0]!r}") from error
        except (msgspec.MsgspecError, TypeError) as error:
            raise TraceError(f"{path}, line {line_number}: {error}") from error
        blocks: list[int] = []
        parent = -1
        for hash_id in hash_ids:
            parent = number_by_link.setdefault((parent, hash_id), len(number_by_link))
            blocks.append(parent)
        requests.append(Request(seconds, user, tuple(blocks)))
    requests.sort(key=lambda request: request.at)  # stable: what came at one time stays in the file's order
    return requests, len(number_by_link)


def _filled(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in enumerate(lines, start=1) if not line.isspace())
