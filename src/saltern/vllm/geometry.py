"""The geometry: how the tokens of a request fall into engine blocks, and these into blocks of the cache.

vLLM keeps layers that remember alike in one *group*, with a table of engine blocks of its own:

    attention        the KV of every token                                        [ 1 | 2 | 3 | 4 | 5 ]
    sliding window   the KV of the last `window` tokens; vLLM's null block        [ ∅ | ∅ | ∅ | 6 | 7 ]
                     stands where nothing is kept any more
    state            what all tokens so far have come to, in the table's last     [ ∅ | ∅ | ∅ | ∅ | 8 ]
                     engine block

A block of the cache holds what the groups that keep KV have of `block_tokens` tokens. A state is a block of the
cache by itself: it exists only behind the block with which a step ended, and a prefix can be continued from there only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

NULL_BLOCK = 0
"""vLLM's engine block for places of a table that nobody reads."""

Pages = tuple[tuple[int, ...], ...]
"""The engine blocks of one block of the cache, by group."""


@dataclass(frozen=True)
class Group:
    """Layers with one table, each of whose engine blocks is `block_tokens` long."""

    block_tokens: int
    window: int | None = None  # tokens that a token attends to, itself included; None: all
    is_state: bool = False

    def forgotten(self, tokens: int) -> int:
        """Return how many of so many tokens the next one doesn't attend to: all before have no use any more."""
        return 0 if self.window is None else max(tokens - self.window + 1, 0)


@dataclass(frozen=True)
class Geometry:
    """Sizes in tokens. `block_tokens` is a multiple of every group's."""

    block_tokens: int
    groups: tuple[Group, ...]

    def slots(self, group: Group) -> int:
        """Return how many of a group's engine blocks a block of the cache holds."""
        return 1 if group.is_state else self.block_tokens // group.block_tokens

    @cached_property
    def engine_blocks(self) -> int:
        """Return how many engine blocks make a block of the cache and a state."""
        return sum(self.slots(group) for group in self.groups)

    @cached_property
    def has_states(self) -> bool:
        """Return whether a prefix is worth nothing without its state."""
        return any(group.is_state for group in self.groups)

    @cached_property
    def keeps_all(self) -> bool:
        """Return whether a request can go on at any of its tokens, since no group forgets."""
        return all(group.window is None and not group.is_state for group in self.groups)

    def pages(self, tables: Sequence[Sequence[int]], index: int) -> Pages:
        """Return the engine blocks of block `index` of a request with these tables, one a group."""
        return tuple(
            () if group.is_state else tuple(table[index * self.slots(group) : (index + 1) * self.slots(group)])
            for group, table in zip(self.groups, tables, strict=True)
        )

    def state_pages(self, tables: Sequence[Sequence[int]], blocks: int) -> Pages:
        """Return the engine blocks of the state behind the first `blocks` blocks."""
        return tuple(
            tuple(table[place : place + 1]) if group.is_state else ()
            for group, table in zip(self.groups, tables, strict=True)
            for place in [blocks * self.block_tokens // group.block_tokens - 1]
        )

    def is_whole(self, pages: Pages, index: int) -> bool:
        """Return whether all of block `index` is there that somebody who continues it, or a later one, may need."""
        for group, engine_blocks in zip(self.groups, pages, strict=True):
            forgotten = group.forgotten((index + 1) * self.block_tokens)
            for slot, engine_block in enumerate(engine_blocks, start=1):
                if engine_block == NULL_BLOCK and index * self.block_tokens + slot * group.block_tokens > forgotten:
                    return False
        return True


def kept(pages: Pages) -> tuple[int, ...]:
    """Return the engine blocks among `pages` that hold something."""
    return tuple(engine_block for group in pages for engine_block in group if engine_block != NULL_BLOCK)
