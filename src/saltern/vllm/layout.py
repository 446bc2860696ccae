"""The layout: where the KV of an engine block lies in a worker's memory, and where in a block of the cache.

vLLM keeps all layers of a worker in one buffer, described by tensors of equal layers:

    page of layer l, engine block b   =   offset + l · layer_stride + b · block_stride,  `page_bytes` long

A page is opaque (on CPUs its packing depends on the instruction set): whole pages are moved. Groups lie over one
another in the buffer, since an engine block is one group's at a time. In a block of the cache the ranks' shards follow
one another; a shard holds its groups, a group its slots, and a slot the pages of all layers of one engine block, so
that any slot can be loaded without its neighbours:

    block  =  shard of rank 0 | shard of rank 1 | …          group  =  slot 0 | slot 1 | …
    shard  =  group 0 | group 1 | …                          slot   =  tensor 0: page of layer 0 | 1 | … , tensor 1: …

A state is laid out as a block is, with the groups that keep states instead of those that keep KV.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from saltern.vllm.copies import Piece
from saltern.vllm.geometry import NULL_BLOCK, Geometry, Group

CONTIGUOUS_PAGES = ("LBHNC", "LBNHC", "BLHNC", "BLNHC")
"""vLLM's layouts in which a layer's page of a block is one piece: heads (H) don't lie outside of blocks (B)."""

ATTENTION = ("FullAttentionSpec", "MLAAttentionSpec", "SlidingWindowSpec", "SlidingWindowMLASpec")
"""vLLM's kinds of layers that keep KV in a form that is known here. Subclasses are other kinds."""

STATES_KEPT = "align"
"""vLLM's `mamba_cache_mode` in which a state stays where the block ends that it belongs to."""


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
class GroupPages:
    """What one group of layers keeps on this worker; `offset` is where its slots begin in the worker's shard."""

    offset: int
    slots: int
    tensors: tuple[LayerPages, ...]
    is_state: bool = False

    @cached_property
    def slot_bytes(self) -> int:
        """Return what this group keeps for one engine block."""
        return sum(tensor.slot_bytes for tensor in self.tensors)

    @property
    def end(self) -> int:
        """Return where its slots end in the worker's shard."""
        return self.offset + self.slots * self.slot_bytes


@dataclass(frozen=True)
class Layout:
    """One worker's KV cache: its groups, and how many engine blocks they share."""

    groups: tuple[GroupPages, ...]
    blocks: int

    @property
    def block_bytes(self) -> int:
        """Return the size of this worker's shard of a block."""
        return max((group.end for group in self.groups if not group.is_state), default=0)

    @property
    def state_bytes(self) -> int:
        """Return the size of this worker's shard of a state."""
        return max((group.end for group in self.groups if group.is_state), default=0)

    def piece_bytes(self, piece: Piece) -> int:
        """Return how many bytes this worker moves for a piece."""
        engine_blocks = len(piece.engine_blocks) - piece.engine_blocks.count(NULL_BLOCK)
        return engine_blocks * self.groups[piece.group].slot_bytes


def read_groups(kv_cache_config: Any) -> tuple[Group, ...]:
    """Read what vLLM's `KVCacheConfig` says of its groups; raises `LayoutError` for what isn't supported."""
    groups = tuple(_read_group(group) for group in kv_cache_config.kv_cache_groups)
    if not groups:
        raise LayoutError("this model keeps no KV: nothing can be cached. Start vLLM without Saltern's connector")
    return groups


def read_layout(kv_cache_config: Any, geometry: Geometry, *, layout_name: str | None) -> Layout:
    """Read where vLLM's `KVCacheConfig` puts the KV; raises `LayoutError` for what isn't supported."""
    if layout_name not in CONTIGUOUS_PAGES:
        raise LayoutError(
            f"vLLM's KV cache layout is {layout_name}, in which a block's heads are scattered;"
            f" Saltern supports {', '.join(CONTIGUOUS_PAGES)}"
        )
    named = sorted(name for tensor in kv_cache_config.kv_cache_tensors for name in tensor.layers)
    if not named or named != sorted(name for group in kv_cache_config.kv_cache_groups for name in group.layer_names):
        raise LayoutError("vLLM's KV tensors don't hold each layer of the model once; Saltern can't tell what to copy")
    ends = {False: 0, True: 0}  # of the groups so far, of those with states and of the others
    groups = []
    for group, described in zip(geometry.groups, kv_cache_config.kv_cache_groups, strict=True):
        pages = GroupPages(
            offset=ends[group.is_state],
            slots=geometry.slots(group),
            tensors=tuple(_group_tensors(kv_cache_config.kv_cache_tensors, described)),
            is_state=group.is_state,
        )
        ends[group.is_state] = pages.end
        groups.append(pages)
    return Layout(groups=tuple(groups), blocks=kv_cache_config.num_blocks)


def _read_group(group: Any) -> Group:
    kinds = {_read_kind(spec) for spec in layer_specs(group)}
    if len(kinds) != 1 or not group.enable_kv_transfer:
        raise LayoutError(
            "this model has layers that share a table of blocks and remember differently, which Saltern doesn't"
            " support. Start vLLM without Saltern's connector for this model"
        )
    return kinds.pop()


def _read_kind(spec: Any) -> Group:
    kind = type(spec).__name__
    if kind == "MambaSpec":
        if spec.mamba_cache_mode != STATES_KEPT or spec.num_speculative_blocks:
            raise LayoutError(
                f"this model keeps states, in vLLM's mode {spec.mamba_cache_mode!r}; Saltern caches them in mode"
                f" {STATES_KEPT!r} and without speculation. Start vLLM with --enable-prefix-caching, which sets it"
            )
        return Group(spec.block_size, is_state=True)
    if kind not in ATTENTION or getattr(spec, "non_causal", False) or not spec.prefix_cacheable:
        raise LayoutError(
            f"this model has layers ({kind}) whose past is not only the tokens before; Saltern caches attention that"
            " looks back, in full or through a sliding window, and states. Start vLLM without Saltern's connector for"
            " this model"
        )
    return Group(spec.block_size, window=spec.sliding_window if kind.startswith("SlidingWindow") else None)


def layer_specs(group: Any) -> Sequence[Any]:
    """Return the different descriptions of a group's layers: more than one where they differ in size."""
    return list(getattr(group.kv_cache_spec, "kv_cache_specs", {"": group.kv_cache_spec}).values())


def _group_tensors(tensors: Sequence[Any], group: Any) -> Iterator[LayerPages]:
    spec_by_layer = getattr(group.kv_cache_spec, "kv_cache_specs", {})
    for tensor in tensors:
        names = [name for name in tensor.layers if name in group.layer_names]
        if not names:
            continue
        sizes = {spec_by_layer.get(name, group.kv_cache_spec).page_size_bytes for name in names}
        if len(names) < len(tensor.layers) or len(sizes) != 1 or tensor.host_resident:
            raise LayoutError(
                "one of vLLM's KV tensors mixes layers of different groups or sizes, or lies elsewhere; Saltern can't"
                " tell what to copy"
            )
        yield LayerPages(
            offset=tensor.offset,
            layers=len(names),
            layer_stride=tensor.layer_stride,
            block_stride=tensor.block_stride,
            page_bytes=sizes.pop(),
        )
