"""Tiny models with random weights, of the shapes that real ones have, whose answers depend on all of their prompt."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

VOCABULARY = 512
HIDDEN = 128

_random = random.Random(7)
PROMPT = [_random.randrange(3, VOCABULARY) for _ in range(2 * 128 + 9)]
"""A prompt of two blocks and some tokens more."""

CACHED = 2 * 128
"""How many tokens of it fill blocks."""

# What all share: two layers with full attention, and heads of sizes that vLLM's kernels for CPUs take.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Standard deviations of the weights, by module. Behind a norm, queries and keys of these give scores with a deviation
# of about 2: attention looks at some dozens of tokens, near and far ones. What it sees there outweighs the last token.
_DEVIATIONS = {
    "embed_tokens": 1.0,
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj"), 0.125),
    **dict.fromkeys(("o_proj", "out_proj"), 0.4),
    "lm_head": 0.3,
}


def make_llama(folder: Path, *, seed: int = 0) -> Path:
    """Write a model of Llama's shape: four query heads on two KV heads of 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _save(LlamaForCausalLM(LlamaConfig(**_SIZES, num_key_value_heads=2, head_dim=32)), folder, seed)


def make_deepseek(folder: Path, *, seed: int = 0) -> Path:
    """Write a model of DeepSeek-V3's shape, without experts: one latent of 512 + 64 a token for all heads (MLA)."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **_SIZES,
        num_key_value_heads=4,
        kv_lora_rank=512,  # the only size that vLLM's kernels for CPUs take
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=64,
        q_lora_rank=64,
        first_k_dense_replace=2,  # no layer has experts
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
    )
    return _save(DeepseekV3ForCausalLM(config), folder, seed)


def make_gemma(folder: Path, *, seed: int = 0) -> Path:
    """Write a model of Gemma-3's shape: three layers with a sliding window of 64 tokens to one with full attention."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **_SIZES | {"num_hidden_layers": 4},
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=64,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
    )
    return _save(Gemma3ForCausalLM(config), folder, seed)


def make_gpt_oss(folder: Path, *, seed: int = 0) -> Path:
    """Write a model of gpt-oss' shape: every other layer has a sliding window, all have experts and sinks."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **_SIZES,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return _save(GptOssForCausalLM(config), folder, seed)


def make_qwen(folder: Path, *, seed: int = 0) -> Path:
    """Write a model of Qwen3-Next's shape: three layers with a state to one with full attention."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        **_SIZES | {"num_hidden_layers": 4},
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=128,  # a size that vLLM's kernels for CPUs take
        linear_value_head_dim=128,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
    )
    model = Qwen3NextForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith("A_log"):
            weight.data.fill_(-5.0)  # a state that fades by less than a percent a token
    return _save(model, folder, seed)


def make_lora(folder: Path, *, seed: int, layers: int = 2, hidden: int = HIDDEN, kv: int = 2 * 32) -> Path:
    """Write an adapter of rank 8 for a model's keys and values, by default `make_llama`'s.

    To those of that model it is as large an addition as what it adds to.
    """
    import torch
    from safetensors.torch import save_file

    rank, generator = 8, torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for module in ("k_proj", "v_proj"):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, hidden, generator=generator) / hidden**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(kv, rank, generator=generator) / 2
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["k_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _save(model: Any, folder: Path, seed: int) -> Path:
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=_deviation(name), generator=generator)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _deviation(name: str) -> float:
    """Return the standard deviation of one of a model's weights."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    return _DEVIATIONS.get(module, 0.1)
