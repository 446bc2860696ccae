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
    VllmConfig,
)
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

# What vLLM has to say about a model that is tiny and a CPU that is plain.
logging.getLogger("vllm").setLevel(logging.ERROR)

VOCABULARY = 256
HEAD_SIZE = 4  # elements; K and V of one head in bfloat16 then fill a slot of 16 bytes, two words
CONTEXT_TOKENS_MAX = 4096


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine looks like: its KV pool, its workers, its scheduler.

    `blocks` counts the null block, so that `blocks - 1` can be handed out. `workers_lag` lets the workers run a step
    only when its output is awaited: with `asynchronous` that is one `schedule()` later. `separate_processes` passes
    everything between scheduler and workers through pickle and aggregates outputs, as the multiprocess executor does;
    several ranks imply it.
    """

    block_tokens: int = 16
    blocks: int = 64
    ranks: int = 1
    layers: int = 3
    heads: int = 2  # KV heads of one rank
    layout: str = "LBHNC"
    prefix_caching: bool = False
    batch_tokens: int = 64
    sequences_max: int = 8
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
        return min(CONTEXT_TOKENS_MAX, (self.blocks - 1) * self.block_tokens)

    @property
    def crosses_processes(self) -> bool:
        return self.separate_processes or self.ranks > 1


def vllm_config(options: Options, connector: type[KVConnectorBase_V1], extra: dict[str, Any]) -> VllmConfig:
    """Make the configuration of an engine with this connector class and `kv_connector_extra_config`."""
    model = copy.copy(_model_config(options.layers, options.heads * options.ranks))
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
            is_encoder_decoder=False,
        ),
        parallel_config=ParallelConfig(tensor_parallel_size=options.ranks),
        device_config=DeviceConfig(device="cpu"),
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
    return config


@functools.cache
def _model_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="harness-model-")


@functools.cache
def _model_config(layers: int, heads: int) -> ModelConfig:
    """Make a model's configuration from a `config.json` without weights, once per shape."""
    folder = os.path.join(_model_folder().name, f"{layers}-{heads}")
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
