"""The model that does not exist: what its KV and its next token would be, as a function of the prefix."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from .options import VOCABULARY

Words = NDArray[np.uint64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # the increment of splitmix64


class Sequence:
    """One request's tokens and prefix hashes, continued for ever by the model's own choices.

    The hash after position p stands for the tokens `[0, p]` and, if given, the user's tag. It decides both the KV at p
    and the token at p + 1, so a prefix computed by anybody with the same tag has the same KV, bit for bit.
    """

    def __init__(self, prompt: list[int], tag: str = "") -> None:
        assert prompt, "an empty prompt has no prefix"
        self.prompt_tokens = len(prompt)
        self.tag = tag
        self._tokens = list(prompt)
        self._hashes: list[int] = []
        self._hash = 0
        for byte in tag.encode("utf-8", "surrogatepass"):
            self._hash = mix(self._hash ^ byte)

    def tokens(self, count: int) -> list[int]:
        """Return the first `count` tokens."""
        self._extend(count)
        return self._tokens[:count]

    @property
    def known(self) -> list[int]:
        """Return the prompt, and the tokens behind it that somebody asked for."""
        return self._tokens

    def hashes(self, start: int, end: int) -> Words:
        """Return the prefix hashes of positions `[start, end)`."""
        self._extend(end)
        return np.array(self._hashes[start:end], dtype=np.uint64)

    def hashes_astray(self, start: int, tokens: Iterable[int]) -> Words:
        """Return the prefix hashes of positions `start` and on, were these the tokens there."""
        self._extend(start)
        prefix_hash = self._hashes[start - 1]
        hashes = [prefix_hash := mix(prefix_hash ^ (token + 1)) for token in tokens]
        return np.array(hashes, dtype=np.uint64)

    def draft(self, position: int, count: int) -> list[int]:
        """Guess the tokens after `position`: some are right, how many hangs on the prefix, and the next one isn't."""
        (choice,) = self.hashes(position, position + 1).tolist()
        right = mix(choice ^ _GOLDEN) % (count + 1)
        guessed = self.tokens(position + 1 + count)[position + 1 :]
        return guessed[:right] + [(token + 1) % VOCABULARY for token in guessed[right:]]

    def _extend(self, count: int) -> None:
        while len(self._hashes) < count:
            position = len(self._hashes)
            if position == len(self._tokens):
                self._tokens.append((self._hash >> 33) % VOCABULARY)
            self._hash = mix(self._hash ^ (self._tokens[position] + 1))
            self._hashes.append(self._hash)


def kv(hashes: Words, keys: Words) -> Words:
    """Return the KV of positions with these prefix hashes, or the state behind them.

    `keys` come from `slot_keys`, of shape [layers, words]; the result is [positions, layers, words].
    """
    values = hashes[:, None, None] ^ keys[None]
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def slot_keys(rank: int, tensor: int, layers: int, words: int) -> Words:
    """Return one key for each word of a slot, so that no two ranks, tensors, layers or words hold the same value."""
    first = mix(mix(rank + 1) ^ tensor)
    keys = [mix(first ^ index) for index in range(layers * words)]
    return np.array(keys, dtype=np.uint64).reshape(layers, words)


def mix(value: int) -> int:
    """Mix 64 bits (the output function of splitmix64)."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
