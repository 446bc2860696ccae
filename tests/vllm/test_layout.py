"""Tests of the layout: what is read of vLLM's description of its KV cache, and what is refused."""

from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MambaSpec,
    MLAAttentionSpec,
    RSWASpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from saltern.vllm.geometry import Geometry, Group
from saltern.vllm.layout import (
    CONTIGUOUS_PAGES,
    GroupPages,
    LayerPages,
    Layout,
    LayoutError,
    read_groups,
    read_layout,
)

BLOCKS = 10


def attention(kind: type = FullAttentionSpec, **changes: Any) -> Any:
    """Return vLLM's description of an attention layer."""
    return kind(**{"block_size": 16, "num_kv_heads": 2, "head_size": 8, "dtype": torch.bfloat16} | changes)


PAGE_BYTES = attention().page_size_bytes


def kv_config(*specs: Any, layers: int = 3, tensors: list[KVCacheTensor] | None = None) -> KVCacheConfig:
    """Return the description of a KV cache of as many groups as there are `specs`, which lie over one another."""
    groups = [
        KVCacheGroupSpec(layer_names=[f"{group}.{layer}" for layer in range(layers)], kv_cache_spec=spec)
        for group, spec in enumerate(specs)
    ]
    whole = [
        KVCacheTensor(
            size=layers * BLOCKS * PAGE_BYTES,
            layers=group.layer_names,
            layer_stride=BLOCKS * PAGE_BYTES,
            block_stride=PAGE_BYTES,
        )
        for group in groups
    ]
    return KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=tensors or whole, kv_cache_groups=groups)


def layout_of(config: KVCacheConfig, *, block_tokens: int = 32, layout_name: str | None = "LBHNC") -> Layout:
    """Read a layout, with blocks of two engine blocks."""
    return read_layout(config, Geometry(block_tokens, read_groups(config)), layout_name=layout_name)


@pytest.mark.parametrize("layout_name", CONTIGUOUS_PAGES)
@pytest.mark.parametrize("kind", [FullAttentionSpec, MLAAttentionSpec])
def test_full_attention_is_read(kind: type, layout_name: str) -> None:
    spec = attention(kind)
    assert read_groups(kv_config(spec)) == (Group(16),)
    layout = layout_of(kv_config(spec), layout_name=layout_name)
    pages = LayerPages(
        offset=0,
        layers=3,
        layer_stride=BLOCKS * PAGE_BYTES,
        block_stride=PAGE_BYTES,
        page_bytes=spec.page_size_bytes,
    )
    assert layout == Layout((GroupPages(offset=0, slots=2, tensors=(pages,)),), blocks=BLOCKS)
    assert (layout.block_bytes, layout.state_bytes) == (2 * 3 * spec.page_size_bytes, 0)


def test_padding_belongs_to_a_page() -> None:
    spec = attention(page_size_padded=PAGE_BYTES + 64)
    assert layout_of(kv_config(spec)).block_bytes == 2 * 3 * (PAGE_BYTES + 64)


def test_layers_of_different_sizes_are_read_from_their_own_tensors() -> None:
    small, large = attention(), attention(num_kv_heads=4)
    spec = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"0.0": small, "0.1": large, "0.2": small})
    tensors = [
        KVCacheTensor(size=8192, layers=["0.0", "0.2"], layer_stride=PAGE_BYTES, block_stride=8192, offset=0),
        KVCacheTensor(size=8192, layers=["0.1"], layer_stride=0, block_stride=8192, offset=2 * PAGE_BYTES),
    ]
    (group,) = layout_of(kv_config(spec, tensors=tensors), layout_name="BLHNC").groups
    assert [(pages.offset, pages.layers, pages.page_bytes) for pages in group.tensors] == [
        (0, 2, PAGE_BYTES),
        (2 * PAGE_BYTES, 1, 2 * PAGE_BYTES),
    ]
    assert group.slot_bytes == 4 * PAGE_BYTES


def state(**changes: Any) -> MambaSpec:
    """Return vLLM's description of a layer that keeps a state."""
    return MambaSpec(
        **{
            "block_size": 16,
            "shapes": ((2, 8),),
            "dtypes": (torch.float32,),
            "page_size_padded": PAGE_BYTES,
            "mamba_cache_mode": "align",
        }
        | changes
    )


def test_groups_follow_one_another_in_a_block_and_those_with_states_in_a_state() -> None:
    window = attention(SlidingWindowSpec, sliding_window=64)
    config = kv_config(attention(), state(), window, state())
    assert read_groups(config) == (Group(16), Group(16, is_state=True), Group(16, window=64), Group(16, is_state=True))
    layout = layout_of(config)
    assert [(group.offset, group.slots, group.is_state) for group in layout.groups] == [
        (0, 2, False),
        (0, 1, True),
        (2 * 3 * PAGE_BYTES, 2, False),
        (3 * PAGE_BYTES, 1, True),
    ]
    assert (layout.block_bytes, layout.state_bytes) == (4 * 3 * PAGE_BYTES, 2 * 3 * PAGE_BYTES)


def test_a_group_with_longer_blocks_has_fewer_slots() -> None:
    config = kv_config(attention(), attention(SlidingWindowSpec, sliding_window=64, block_size=32))
    assert [group.slots for group in layout_of(config, block_tokens=64).groups] == [4, 2]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        pytest.param(attention(RSWASpec, rswa_window=64), "RSWASpec", id="window-of-answers"),
        pytest.param(
            attention(ChunkedLocalAttentionSpec, attention_chunk_size=64), "ChunkedLocalAttentionSpec", id="chunks"
        ),
        pytest.param(attention(non_causal=True), "looks back", id="prefix-reads-what-follows"),
        pytest.param(state(mamba_cache_mode="none"), "--enable-prefix-caching", id="states-that-are-not-kept"),
        pytest.param(state(num_speculative_blocks=1), "without speculation", id="states-of-guesses"),
        pytest.param(
            attention(SlidingWindowMLASpec, sliding_window=64, bounded_replay=True), "SlidingWindowMLASpec", id="replay"
        ),
        pytest.param(
            UniformTypeKVCacheSpecs(
                block_size=16,
                kv_cache_specs={f"0.{i}": attention(SlidingWindowSpec, sliding_window=64 + i) for i in range(3)},
            ),
            "remember differently",
            id="sliding-windows-of-different-sizes",
        ),
    ],
)
def test_layers_whose_past_is_another_are_refused(spec: Any, told: str) -> None:
    with pytest.raises(LayoutError, match=told):
        read_groups(kv_config(spec))
    with pytest.raises(LayoutError, match=told):
        read_groups(kv_config(attention(), spec))


def test_a_model_without_kv_is_refused() -> None:
    with pytest.raises(LayoutError, match="keeps no KV"):
        read_groups(kv_config())


def test_a_group_that_vllm_does_not_hand_on_is_refused() -> None:
    config = kv_config(attention())
    config.kv_cache_groups[0].enable_kv_transfer = False
    with pytest.raises(LayoutError, match="Start vLLM without"):
        read_groups(config)


def test_full_attention_that_computes_only_a_window_keeps_all() -> None:
    """So vLLM keeps models with both kinds of layers when it may not manage them apart."""
    assert read_groups(kv_config(attention(sliding_window=64))) == (Group(16),)


@pytest.mark.parametrize("layout_name", ["LHBNC", "HLBNC", "NHD", "", None])
def test_a_layout_whose_pages_are_scattered_or_unknown_is_refused(layout_name: str | None) -> None:
    with pytest.raises(LayoutError, match="scattered"):
        layout_of(kv_config(attention()), layout_name=layout_name)


@pytest.mark.parametrize("names", [["0.0", "0.1"], ["0.0", "0.1", "0.1"], ["0.0", "0.1", "0.2", "draft"]])
def test_tensors_that_don_t_hold_each_layer_once_are_refused(names: list[str]) -> None:
    tensor = KVCacheTensor(size=1, layers=names, layer_stride=1, block_stride=1)
    with pytest.raises(LayoutError, match="each layer of the model once"):
        layout_of(kv_config(attention(), tensors=[tensor]))


def test_tensors_outside_of_the_worker_are_refused() -> None:
    names = ["0.0", "0.1", "0.2"]
    tensor = KVCacheTensor(size=1, layers=names, layer_stride=1, block_stride=1, host_resident=True)
    with pytest.raises(LayoutError, match="can't tell what to copy"):
        layout_of(kv_config(attention(), tensors=[tensor]))
