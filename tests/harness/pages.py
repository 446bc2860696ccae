"""The pages of one rank: where each layer's KV lies, what it should be, and how it was when last looked at.

A page is opaque to whoever moves it. Here a page of attention has one slot a token, one of a recurrent layer a single
slot, the state. Groups lie over one another in the same bytes, and a block is one group's at a time.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec, KVCacheTensor, MambaSpec, SlidingWindowSpec

from .model import Words, slot_keys

Indices = NDArray[np.int64]
Bytes = NDArray[np.uint8]

GARBAGE = np.uint64(0xEEEEEEEEEEEEEEEE)
WORD = np.dtype(np.uint64)
NULL_BLOCK = 0
"""vLLM's block for places of a table that nobody reads."""


class Tensor:
    """Layers of one group whose pages are equal: words of shape [layers, blocks, slots of a page, words of a slot]."""

    def __init__(
        self, place: KVCacheTensor, spec: KVCacheSpec, *, group: int, blocks: int, keys_of: tuple[int, int]
    ) -> None:
        self.group = group
        self.names = place.layers
        self.block_tokens = spec.block_size
        self.is_state = isinstance(spec, MambaSpec)
        self.window = spec.sliding_window if isinstance(spec, SlidingWindowSpec) else None
        slots = 1 if self.is_state else spec.block_size
        slot_words = spec.page_size_bytes // slots // WORD.itemsize
        assert slots * slot_words * WORD.itemsize == spec.page_size_bytes, "a slot is not made of whole words"
        self._place = place
        self._shape = (len(place.layers), blocks, slots, slot_words)
        self.keys = slot_keys(*keys_of, len(place.layers), slot_words)

    def over(self, buffer: Bytes) -> Words:
        """Return this tensor's words in a buffer."""
        place, slot_bytes = self._place, self._shape[3] * WORD.itemsize
        strides = (place.layer_stride, place.block_stride, slot_bytes, WORD.itemsize)
        return np.ndarray(self._shape, WORD, buffer, place.offset, strides)

    def first_read(self, start: int) -> int:
        """Return the first position that the token at `start` attends to."""
        return 0 if self.window is None else max(0, start - self.window + 1)

    def places(self, table: list[int], start: int, end: int) -> tuple[Indices, Indices]:
        """Return the blocks and the slots within them of positions `[start, end)`, or of the state behind each."""
        positions = np.arange(start, end)
        slots = np.zeros_like(positions) if self.is_state else positions % self.block_tokens
        return np.array(table)[positions // self.block_tokens], slots


class Pages:
    """All tensors of a rank over one buffer."""

    def __init__(self, config: KVCacheConfig, views: dict[str, torch.Tensor], rank: int) -> None:
        self.tensors = list(_tensors(config, rank))
        storage = next(iter(views.values())).untyped_storage()
        self._buffer = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        self._shadow = self._buffer.copy()
        self.words = [tensor.over(self._buffer) for tensor in self.tensors]
        self._shadow_words = [tensor.over(self._shadow) for tensor in self.tensors]
        self.spoil([NULL_BLOCK])  # whoever reads it will be seen

    def write(self, index: int, layer: int, places: tuple[Indices, Indices], values: Words) -> None:
        """Write a forward pass's KV of one layer, but for places that are kept nowhere."""
        blocks, slots = places
        kept = blocks != NULL_BLOCK
        for words in (self.words[index], self._shadow_words[index]):
            words[layer, blocks[kept], slots[kept]] = values[kept]

    def wrong(self, index: int, places: tuple[Indices, Indices], expected: Words) -> NDArray[np.bool_]:
        """Return which words are not as expected, in shape [positions, layers, words]."""
        blocks, slots = places
        there: Words = self.words[index][:, blocks, slots].swapaxes(0, 1)
        return np.not_equal(there, expected)

    def spoil(self, block_ids: Iterable[int]) -> None:
        """Overwrite blocks."""
        for words in (*self.words, *self._shadow_words):
            words[:, list(block_ids)] = GARBAGE

    def take_changes(self) -> set[int]:
        """Return the blocks that changed since the last call other than by `write`."""
        if np.array_equal(self._buffer, self._shadow):
            return set()
        changed: set[int] = set()
        for words, shadow in zip(self.words, self._shadow_words, strict=True):
            changed |= set(np.nonzero((words != shadow).any(axis=(0, 2, 3)))[0].tolist())
        np.copyto(self._shadow, self._buffer)
        return changed


def _tensors(config: KVCacheConfig, rank: int) -> Iterator[Tensor]:
    for index, place in enumerate(config.kv_cache_tensors):
        holders = [
            number for number, group in enumerate(config.kv_cache_groups) if place.layers[0] in group.layer_names
        ]
        (group,) = holders
        described = config.kv_cache_groups[group]
        specs = getattr(described.kv_cache_spec, "kv_cache_specs", {})
        spec = specs.get(place.layers[0], described.kv_cache_spec)
        # Ranks that hold the same heads have the same KV.
        keys_of = (rank // config.kv_tp_replicas, index)
        yield Tensor(place, spec, group=group, blocks=config.num_blocks, keys_of=keys_of)
