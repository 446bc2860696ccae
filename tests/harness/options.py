"""The options of a harness engine, and the configuration that vLLM reads from them."""

import copy
import functools
import json
import logging
import os
import tempfile
from typing import Any

import msgspec
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from .architectures import ARCHITECTURES, HEAD_SIZE, Architecture

# What vLLM has to say about a model that is tiny and a CPU that is plain.
logging.getLogger("vllm").setLevel(logging.ERROR)

VOCABULARY = 256
CONTEXT_TOKENS_MAX = 4096


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine looks like: its KV pool, its workers, its scheduler.

    `blocks` counts the null block, so that `blocks - 1` can be handed out. `workers_lag` lets the workers run a step
    only when its output is awaited: with `asynchronous` that is one `schedule()` later. `separate_processes` passes
    everything between scheduler and workers through pickle and aggregates outputs, as the multiprocess executor does;
    several ranks imply it.
    """

    model: str = "full attention"  # one of `ARCHITECTURES`
    window_tokens: int = 20  # for models that have windows
    block_tokens: int = 16
    blocks: int = 64
    ranks: int = 1
    layers: int = 3  # of each kind
    heads: int = 2  # KV heads of one rank
    layout: str = "LBHNC"
    prefix_caching: bool = False
    batch_tokens: int = 64
    sequences_max: int = 8
    policy: str = "fcfs"
    speculated_tokens: int = 0  # drafted each step, some right and some wrong
    asynchronous: bool = False
    workers_lag: bool = False
    separate_processes: bool = False
    runner_v2: bool = False
    tag_users: bool = False  # mix the salt into every value, so that a hit across salts is wrong even for equal prompts
    load_failure_policy: str = "recompute"
    steps_max: int = 5000
    idle_steps_max: int = 200  # in a row; more means that somebody waits for nothing
    idle_seconds: float = 0.0  # slept in an idle step, for connectors with threads of their own

    @property
    def context_tokens(self) -> int:
        """Return the longest request the pool can hold alone, in tokens."""
        blocks = (self.blocks - 1) // self.architecture.groups
        if not self.architecture.keeps_all:
            blocks -= 1  # a window may lie across one block more than it fills
        return min(CONTEXT_TOKENS_MAX, blocks * self.block_tokens)

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.model]

    @property
    def unit_tokens(self) -> int:
        """Return what all groups' blocks go into: no cache can have smaller ones."""
        return self.architecture.unit_blocks * self.block_tokens

    @property
    def names_bad_blocks(self) -> bool:
        """Return whether a load may fail at a block; else it fails as a whole, as vLLM wants it."""
        return self.architecture.groups == 1 and self.architecture.keeps_all

    @property
    def crosses_processes(self) -> bool:
        return self.separate_processes or self.ranks > 1


def vllm_config(options: Options, connector: type[KVConnectorBase_V1], extra: dict[str, Any]) -> VllmConfig:
    """Make the configuration of an engine with this connector class and `kv_connector_extra_config`."""
    layers = options.layers * len(options.architecture.layers)
    model = copy.copy(_model_config(options.model, layers, options.heads * options.ranks))
    model.max_model_len = options.context_tokens
    config = VllmConfig(
        model_config=model,
        cache_config=CacheConfig(
            block_size=options.block_tokens,
            enable_prefix_caching=options.prefix_caching,
            num_gpu_blocks_override=options.blocks,
        ),
        scheduler_config=SchedulerConfig(
            max_num_batched_tokens=options.batch_tokens,
            max_num_seqs=options.sequences_max,
            max_model_len=options.context_tokens,
            enable_chunked_prefill=True,
            policy=options.policy,
            is_encoder_decoder=False,
        ),
        parallel_config=ParallelConfig(tensor_parallel_size=options.ranks),
        device_config=DeviceConfig(device="cpu"),
        speculative_config=_speculative_config(options.speculated_tokens, model) if options.speculated_tokens else None,
        kv_transfer_config=KVTransferConfig(
            kv_connector=connector.__name__,
            kv_connector_module_path=connector.__module__,
            kv_role="kv_both",
            kv_load_failure_policy=options.load_failure_policy,
            kv_connector_extra_config=extra,
        ),
    )
    # The CPU platform turns it off whatever was asked for, and it is the scheduler that we are after.
    config.scheduler_config.async_scheduling = options.asynchronous
    if options.architecture.has_states:  # as vLLM does for a model that it knows to have them
        assert options.prefix_caching, "vLLM keeps states at the ends of blocks only where it caches prefixes"
        config.cache_config.mamba_cache_mode = "align"
    return config


def _speculative_config(tokens: int, model: ModelConfig) -> SpeculativeConfig:
    """Ask for drafts from the prompt: no second model is needed, and the workers draft as they like."""
    return SpeculativeConfig(
        method="ngram",
        num_speculative_tokens=tokens,
        prompt_lookup_min=1,
        prompt_lookup_max=2,
        target_model_config=model,
        target_parallel_config=ParallelConfig(),
    )


@functools.cache
def _model_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="harness-model-")


@functools.cache
def _model_config(name: str, layers: int, heads: int) -> ModelConfig:
    """Make a model's configuration from a `config.json` without weights, once per shape.

    vLLM takes all for one plain model: what its layers remember it learns from the workers.
    """
    folder = os.path.join(_model_folder().name, f"{name}-{layers}-{heads}")
    os.mkdir(folder)
    # Nobody loads it; but a connector that is careful takes a model without weights for one it can't recognise again.
    with open(os.path.join(folder, "model.safetensors"), "wb") as weights:
        weights.write(bytes(8))
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": heads * HEAD_SIZE,
                "intermediate_size": heads * HEAD_SIZE,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": heads,
                "head_dim": HEAD_SIZE,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": CONTEXT_TOKENS_MAX,
                "rms_norm_eps": 1e-5,
                "torch_dtype": "bfloat16",
            },
            file,
        )
    return ModelConfig(
        model=folder,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=CONTEXT_TOKENS_MAX,
        enforce_eager=True,
        seed=0,
    )
