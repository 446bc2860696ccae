"""Tests of the layout: what is read of vLLM's description of its KV cache, and what is refused."""

from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MambaSpec,
    MLAAttentionSpec,
    RSWASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from saltern.vllm.layout import CONTIGUOUS_PAGES, LayerPages, LayoutError, read_layout

BLOCKS = 10


def attention(kind: type = FullAttentionSpec, **changes: Any) -> Any:
    """Return vLLM's description of an attention layer."""
    return kind(**{"block_size": 16, "num_kv_heads": 2, "head_size": 8, "dtype": torch.bfloat16} | changes)


PAGE_BYTES = attention().page_size_bytes


def kv_config(spec: Any, *, layers: int = 3, tensors: list[KVCacheTensor] | None = None) -> KVCacheConfig:
    """Return the description of a KV cache of one group."""
    names = [f"layer.{layer}" for layer in range(layers)]
    whole = KVCacheTensor(
        size=layers * BLOCKS * PAGE_BYTES, layers=names, layer_stride=BLOCKS * PAGE_BYTES, block_stride=PAGE_BYTES
    )
    groups = [KVCacheGroupSpec(layer_names=names, kv_cache_spec=spec)]
    return KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=tensors or [whole], kv_cache_groups=groups)


@pytest.mark.parametrize("layout_name", CONTIGUOUS_PAGES)
@pytest.mark.parametrize("kind", [FullAttentionSpec, MLAAttentionSpec])
def test_full_attention_is_read(kind: type, layout_name: str) -> None:
    spec = attention(kind)
    layout = read_layout(kv_config(spec), layout_name=layout_name)
    assert layout.blocks == BLOCKS
    assert layout.tensors == (
        LayerPages(
            offset=0,
            layers=3,
            layer_stride=BLOCKS * PAGE_BYTES,
            block_stride=PAGE_BYTES,
            page_bytes=spec.page_size_bytes,
        ),
    )
    assert layout.slot_bytes == 3 * spec.page_size_bytes


def test_padding_belongs_to_a_page() -> None:
    spec = attention(page_size_padded=PAGE_BYTES + 64)
    assert read_layout(kv_config(spec), layout_name="LBHNC").slot_bytes == 3 * (PAGE_BYTES + 64)


def test_layers_of_different_sizes_are_read_from_their_own_tensors() -> None:
    small, large = attention(), attention(num_kv_heads=4)
    spec = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"layer.0": small, "layer.1": large, "layer.2": small})
    tensors = [
        KVCacheTensor(size=8192, layers=["layer.0", "layer.2"], layer_stride=PAGE_BYTES, block_stride=8192, offset=0),
        KVCacheTensor(size=8192, layers=["layer.1"], layer_stride=0, block_stride=8192, offset=2 * PAGE_BYTES),
    ]
    layout = read_layout(kv_config(spec, tensors=tensors), layout_name="BLHNC")
    assert [(pages.offset, pages.layers, pages.page_bytes) for pages in layout.tensors] == [
        (0, 2, PAGE_BYTES),
        (2 * PAGE_BYTES, 1, 2 * PAGE_BYTES),
    ]
    assert layout.slot_bytes == 4 * PAGE_BYTES


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(attention(SlidingWindowSpec, sliding_window=64), id="sliding-window"),
        pytest.param(attention(RSWASpec, rswa_window=64), id="window-of-answers"),
        pytest.param(attention(non_causal=True), id="prefix-reads-what-follows"),
        pytest.param(MambaSpec(block_size=16, shapes=((2, 8),), dtypes=(torch.bfloat16,)), id="state-space"),
        pytest.param(
            UniformTypeKVCacheSpecs(
                block_size=16,
                kv_cache_specs={f"layer.{i}": attention(SlidingWindowSpec, sliding_window=64) for i in range(3)},
            ),
            id="sliding-windows-of-different-sizes",
        ),
    ],
)
def test_layers_that_forget_or_that_look_ahead_are_refused(spec: Any) -> None:
    """Blocks out of a window are vLLM's null block, whose bytes are nobody's KV."""
    with pytest.raises(LayoutError, match="full attention"):
        read_layout(kv_config(spec), layout_name="LBHNC")


def test_full_attention_that_computes_only_a_window_is_read() -> None:
    """So vLLM keeps models with both kinds of layers when it may not manage them apart."""
    assert read_layout(kv_config(attention(sliding_window=64)), layout_name="LBHNC").blocks == BLOCKS


def test_several_groups_are_refused() -> None:
    config = kv_config(attention())
    config.kv_cache_groups = config.kv_cache_groups * 2
    with pytest.raises(LayoutError, match="2 groups"):
        read_layout(config, layout_name="LBHNC")


@pytest.mark.parametrize("layout_name", ["LHBNC", "HLBNC", "NHD", "", None])
def test_a_layout_whose_pages_are_scattered_or_unknown_is_refused(layout_name: str | None) -> None:
    with pytest.raises(LayoutError, match="scattered"):
        read_layout(kv_config(attention()), layout_name=layout_name)


@pytest.mark.parametrize(
    "names", [["layer.0", "layer.1"], ["layer.0", "layer.1", "layer.1"], ["layer.0", "layer.1", "layer.2", "draft"]]
)
def test_tensors_that_don_t_hold_each_layer_once_are_refused(names: list[str]) -> None:
    tensor = KVCacheTensor(size=1, layers=names, layer_stride=1, block_stride=1)
    with pytest.raises(LayoutError, match="each layer of the model once"):
        read_layout(kv_config(attention(), tensors=[tensor]), layout_name="LBHNC")


def test_tensors_outside_of_the_worker_are_refused() -> None:
    names = [f"layer.{layer}" for layer in range(3)]
    tensor = KVCacheTensor(size=1, layers=names, layer_stride=1, block_stride=1, host_resident=True)
    with pytest.raises(LayoutError, match="can't tell what to copy"):
        read_layout(kv_config(attention(), tensors=[tensor]), layout_name="LBHNC")
