"""The layout: where the KV of an engine block lies in a worker's memory, and where in a block of the cache.

vLLM keeps all layers of a worker in one buffer, described by tensors of equal layers:

    page of layer l, engine block b   =   offset + l · layer_stride + b · block_stride,  `page_bytes` long

A page is opaque (on CPUs its packing depends on the instruction set): whole pages are moved. In a block of
the cache the ranks' shards follow one another; a shard holds its slots, each an engine block with the
pages of all layers, so that any slot can be loaded without its neighbours:

    block  =  shard of rank 0 | shard of rank 1 | …
    shard  =  slot 0 | slot 1 | …                    slot  =  tensor 0: page of layer 0 | 1 | … , tensor 1: …
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CONTIGUOUS_PAGES = ("LBHNC", "LBNHC", "BLHNC", "BLNHC")
"""vLLM's layouts in which a layer's page of a block is one piece: heads (H) don't lie outside of blocks (B)."""

FULL_ATTENTION = ("FullAttentionSpec", "MLAAttentionSpec")
"""vLLM's kinds of layers that keep the KV of every token. Others give blocks back while a request runs (and have
its null block in their place), or keep a state that isn't a sum of blocks. Subclasses are other kinds."""


class LayoutError(ValueError):
    """The engine's KV cache can't be cached. The text says why and what to do."""


@dataclass(frozen=True)
class LayerPages:
    """Equal layers of one tensor; all sizes in bytes."""

    offset: int
    layers: int
    layer_stride: int
    block_stride: int
    page_bytes: int

    @property
    def slot_bytes(self) -> int:
        """Return what these layers keep for one engine block."""
        return self.layers * self.page_bytes


@dataclass(frozen=True)
class Layout:
    """One worker's KV cache."""

    tensors: tuple[LayerPages, ...]
    blocks: int

    @property
    def slot_bytes(self) -> int:
        """Return what this worker keeps for one engine block."""
        return sum(tensor.slot_bytes for tensor in self.tensors)


def read_layout(kv_cache_config: Any, *, layout_name: str | None) -> Layout:
    """Read vLLM's `KVCacheConfig`; raises `LayoutError` for what isn't supported."""
    groups: Sequence[Any] = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise LayoutError(
            f"this model keeps its KV in {len(groups)} groups (layers with different attention);"
            " Saltern caches models with one. Start vLLM without Saltern's connector for this model"
        )
    if layout_name not in CONTIGUOUS_PAGES:
        raise LayoutError(
            f"vLLM's KV cache layout is {layout_name}, in which a block's heads are scattered;"
            f" Saltern supports {', '.join(CONTIGUOUS_PAGES)}"
        )
    group = groups[0]
    _check_kind(group.kv_cache_spec)
    tensors = tuple(_layer_pages(tensor, group.kv_cache_spec) for tensor in kv_cache_config.kv_cache_tensors)
    named = [name for tensor in kv_cache_config.kv_cache_tensors for name in tensor.layers]
    if sorted(named) != sorted(group.layer_names) or not named:
        raise LayoutError("vLLM's KV tensors don't hold each layer of the model once; Saltern can't tell what to copy")
    return Layout(tensors=tensors, blocks=kv_cache_config.num_blocks)


def _check_kind(spec: Any) -> None:
    for layer in getattr(spec, "kv_cache_specs", {"": spec}).values():
        if type(layer).__name__ not in FULL_ATTENTION or layer.non_causal:
            raise LayoutError(
                f"this model's layers ({type(layer).__name__}) don't all have full attention that looks back only;"
                " Saltern caches no others. Start vLLM without Saltern's connector for this model"
            )


def _layer_pages(tensor: Any, spec: Any) -> LayerPages:
    spec_by_layer = getattr(spec, "kv_cache_specs", None)  # of a group whose layers differ in size
    sizes = {(spec_by_layer[name] if spec_by_layer else spec).page_size_bytes for name in tensor.layers}
    if len(sizes) != 1 or tensor.host_resident:
        raise LayoutError("one of vLLM's KV tensors mixes layers of different sizes; Saltern can't tell what to copy")
    return LayerPages(
        offset=tensor.offset,
        layers=len(tensor.layers),
        layer_stride=tensor.layer_stride,
        block_stride=tensor.block_stride,
        page_bytes=sizes.pop(),
    )
