"""The architectures: which layers a model has and what each of them remembers, from which vLLM makes its KV groups."""

from collections.abc import Callable

import msgspec
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

HEAD_SIZE = 4  # elements; K and V of one head in bfloat16 then fill a slot of 16 bytes, two words
DTYPE = torch.bfloat16

Layer = Callable[[int, int, int], KVCacheSpec]
"""Makes the description of a layer from the tokens of a block, a rank's KV heads and the tokens of a window."""


def full(block_tokens: int, heads: int, window: int) -> KVCacheSpec:
    return FullAttentionSpec(block_size=block_tokens, num_kv_heads=heads, head_size=HEAD_SIZE, dtype=DTYPE)


def wide(block_tokens: int, heads: int, window: int) -> KVCacheSpec:
    return full(block_tokens, 2 * heads, window)


def latent(block_tokens: int, heads: int, window: int) -> KVCacheSpec:
    return MLAAttentionSpec(block_size=block_tokens, num_kv_heads=1, head_size=4 * HEAD_SIZE, dtype=DTYPE)


def sliding(block_tokens: int, heads: int, window: int) -> KVCacheSpec:
    return SlidingWindowSpec(
        block_size=block_tokens, num_kv_heads=heads, head_size=HEAD_SIZE, dtype=DTYPE, sliding_window=window
    )


def wide_sliding(block_tokens: int, heads: int, window: int) -> KVCacheSpec:
    return sliding(block_tokens, 2 * heads, window)


def recurrent(block_tokens: int, heads: int, window: int) -> KVCacheSpec:
    """Describe a layer with a state, in pages as large as those of `full`, half of them padding."""
    page_bytes = full(block_tokens, heads, window).page_size_bytes
    return MambaSpec(
        block_size=block_tokens,
        shapes=((page_bytes // 2 // DTYPE.itemsize,),),
        dtypes=(DTYPE,),
        page_size_padded=page_bytes,
        mamba_cache_mode="align",
    )


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """Layers, as often as the options say, and how many tables vLLM keeps for them at most.

    Where pages differ in size, vLLM makes the smaller ones' blocks longer: `unit_blocks` of the shortest are one of the
    longest.
    """

    layers: tuple[Layer, ...]
    groups: int = 1
    unit_blocks: int = 1

    @property
    def has_states(self) -> bool:
        return recurrent in self.layers

    @property
    def keeps_all(self) -> bool:
        """Return whether a request can go on at any of its tokens."""
        return not {sliding, wide_sliding, recurrent} & {*self.layers}


ARCHITECTURES = {
    "full attention": Architecture(layers=(full,)),
    "latent attention": Architecture(layers=(latent,)),
    "layers of two sizes": Architecture(layers=(full, wide)),
    "one window": Architecture(layers=(sliding,)),
    "a window in every second layer": Architecture(layers=(full, sliding), groups=2),
    "windows in most layers": Architecture(layers=(sliding, sliding, full), groups=3),
    "wide windows": Architecture(layers=(full, wide_sliding), groups=4, unit_blocks=2),
    "states in most layers": Architecture(layers=(recurrent, recurrent, full), groups=3),
}
