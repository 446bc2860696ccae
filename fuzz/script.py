"""A script: bytes that are read as one choice after the other; behind their end every choice is the first."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Script:
    """Reads `data` from its beginning. Equal bytes make equal choices, so a finding is a byte string."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def is_over(self) -> bool:
        """Return whether all bytes are used."""
        return self._at >= len(self._data)

    def number(self, below: int) -> int:
        """Choose one of `below` numbers, at most 256, with one byte."""
        (byte,) = self.take(1) or b"\0"
        return byte % below

    def choice(self, options: Sequence[T]) -> T:
        """Choose one of at most 256 things."""
        return options[self.number(len(options))]

    def several(self, options: Sequence[T], count_max: int) -> list[T]:
        """Choose up to `count_max` things, the same one perhaps more than once."""
        return [self.choice(options) for _ in range(self.number(count_max + 1))]

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes as they are, fewer at the end."""
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken
