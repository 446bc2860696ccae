"""Devices: which copier moves a worker's KV, and what about its device decides the bytes of a block."""

import platform
from typing import TYPE_CHECKING, Any

import torch

from saltern.client.lifeline import Lifeline
from saltern.vllm.copier import CpuCopier
from saltern.vllm.layout import Layout, layer_specs

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from saltern.vllm.worker import Copier


def make_copier(kv_cache: torch.Tensor, layout: Layout, lifeline: Lifeline) -> "Copier":
    """Return the copier for the device that `kv_cache`, any layer's tensor, is on."""
    storage = kv_cache.untyped_storage()
    kv = torch.empty(0, dtype=torch.uint8, device=kv_cache.device).set_(storage)
    if kv_cache.is_cuda:
        from saltern.vllm.cuda import CudaCopier

        return CudaCopier(kv, layout, lifeline)
    return CpuCopier(kv.numpy(), layout, lifeline)


def worker_facts(config: "VllmConfig", kv_config: "KVCacheConfig", layout_name: str) -> dict[str, Any]:
    """Return what only a worker knows of the bytes of a block, as plain values."""
    facts: dict[str, Any] = {
        "layout": layout_name,
        "layers": [tensor.layers for tensor in kv_config.kv_cache_tensors],
        "specs": [repr(group.kv_cache_spec) for group in kv_config.kv_cache_groups],
        "attention": _attention_backends(config),
        "device": config.device_config.device_type,
    }
    if config.device_config.device_type == "cpu":
        facts["isa"] = [platform.machine(), *_cpu_packings(config, kv_config)]
    return facts


def _attention_backends(config: "VllmConfig") -> list[str]:
    layers = config.compilation_config.static_forward_context.values()
    return sorted({layer.get_attn_backend().get_name() for layer in layers if hasattr(layer, "get_attn_backend")})


def _cpu_packings(config: "VllmConfig", kv_config: "KVCacheConfig") -> list[str]:
    """Return how the CPU backend packs a page: it depends on the instructions that the CPU has."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    specs = [
        spec
        for group in kv_config.kv_cache_groups
        for spec in layer_specs(group)
        if hasattr(spec, "head_size")  # others are kept as they are
    ]
    return [
        str(_get_attn_isa(spec.dtype, spec.block_size, spec.head_size, config.cache_config.cache_dtype))
        for spec in specs
    ]
