"""The worker of one rank: paged KV of known content, and the model runner's side of the connector.

The order in which a connector's hooks are called is not written down here: for both generations of vLLM's model runner
the code that calls them is vLLM's own (`KVConnectorModelRunnerMixin`, `ActiveKVConnector`).
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backends.utils import record_kv_cache_layout
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin
from vllm.v1.worker.utils import allocate_kv_cache
from vllm.v1.worker.worker_base import CompilationTimes

from .findings import StrayWrite, WrongKV
from .model import Words, kv, slot_keys
from .options import HEAD_SIZE, Options

if TYPE_CHECKING:
    from .engine import Engine

GARBAGE = np.uint64(0xEEEEEEEEEEEEEEEE)


class RequestState(msgspec.Struct):
    """What a model runner remembers of a request: its block table and how many of its tokens are chosen already."""

    prompt_tokens: int
    block_ids: list[int]
    known_tokens: int


class Chunk(msgspec.Struct, frozen=True):
    """The positions `[start, end)` of one request that one step computes."""

    request_id: str
    start: int
    end: int


class Worker:
    """One rank. Its public methods are those that vLLM's executor calls by name."""

    def __init__(self, config: VllmConfig, rank: int, options: Options, engine: "Engine") -> None:
        self.rank = rank
        self._config = config
        self._options = options
        self._engine = engine
        self._states: dict[str, RequestState] = {}
        self._pending: ModelRunnerOutput | None = None  # chosen tokens of a step whose sampling was not asked for yet
        self._pending_finished: set[str] = set()

    # Start

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        spec = FullAttentionSpec(
            block_size=self._options.block_tokens,
            num_kv_heads=self._options.heads,
            head_size=HEAD_SIZE,
            dtype=torch.bfloat16,
        )
        return {f"model.layers.{layer}.self_attn.attn": spec for layer in range(self._options.layers)}

    def get_supported_kv_cache_layouts(self) -> list[str]:
        return [self._options.layout]

    def set_kv_cache_layout(self, layout_name: str) -> None:
        record_kv_cache_layout(self._config.cache_config, layout_name)

    def determine_available_memory(self) -> int:
        return 1 << 40  # bytes; the number of blocks is overridden

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        """Make the connector first and the KV afterwards, as vLLM's worker does."""
        kv_cache_config = kv_cache_configs[self.rank]
        self._config.cache_config.num_gpu_blocks = kv_cache_config.num_blocks
        connector = KVConnectorFactory.create_connector(self._config, KVConnectorRole.WORKER, kv_cache_config)
        assert isinstance(connector, KVConnectorBase_V1), "not a connector of this generation"
        self.connector = connector
        layout = self._config.cache_config.get_resolved_kv_cache_layout()
        views = allocate_kv_cache(kv_cache_config, torch.device("cpu"), layout)
        self._layer_names = list(views)
        self._kv = _words([views[name] for name in self._layer_names])
        self._keys = slot_keys(self.rank, *(self._kv.shape[axis] for axis in (0, 2, 4)))
        with self._as_current_connector():
            self._active_connector = ActiveKVConnector(self._config, views)
        self._shadow = self._kv.copy()

    def compile_or_warm_up_model(self) -> CompilationTimes:
        return CompilationTimes(language_model=0.0, encoder=0.0)

    def get_kv_connector_handshake_metadata(self) -> dict[tuple[int, int], Any] | None:
        metadata = self.connector.get_handshake_metadata()
        return None if metadata is None else {(0, self.rank): metadata}

    def shutdown(self) -> None:
        self.connector.shutdown()

    # Step

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Run a step up to sampling. Returns None when `sample_tokens` has to follow."""
        assert self._pending is None, "a step began before the previous one was sampled"
        self._find_stray_writes()
        with self._as_current_connector():
            if self._options.runner_v2:
                output = self._execute_v2(scheduler_output)
            else:
                output = self._execute_v1(scheduler_output)
        self._find_stray_writes()
        return self._with_faults(output) if output is not None else None

    def sample_tokens(self, grammar_output: object) -> ModelRunnerOutput:
        assert self._pending is not None, "sampling without a forward pass"
        output, self._pending = self._pending, None
        if self._options.runner_v2:
            with self._as_current_connector():
                output.kv_connector_output = self._active_connector.post_forward(self._pending_finished)
            self._find_stray_writes()
        return self._with_faults(output)

    def _execute_v1(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        self.connector.handle_preemptions(scheduler_output.kv_connector_metadata)
        self._update_states(scheduler_output)
        if not scheduler_output.total_num_scheduled_tokens:
            return KVConnectorModelRunnerMixin.kv_connector_no_forward(scheduler_output, self._config)
        with (
            set_forward_context(None, self._config),
            KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(scheduler_output) as kv_connector_output,
        ):
            self._pending = self._forward(scheduler_output)
        self._pending.kv_connector_output = kv_connector_output
        return None

    def _execute_v2(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        self._update_states(scheduler_output)
        if not scheduler_output.total_num_scheduled_tokens:
            return self._active_connector.no_forward(scheduler_output)
        with set_forward_context(None, self._config):
            self._active_connector.pre_forward(scheduler_output)
            self._pending = self._forward(scheduler_output)
        self._active_connector.finish_forward()
        self._pending_finished = scheduler_output.finished_req_ids
        return None

    def _update_states(self, scheduler_output: SchedulerOutput) -> None:
        for request_id in scheduler_output.finished_req_ids:
            self._states.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            prompt_tokens = len(new.prompt_token_ids or [])
            # The second runner gets a resumed request as a new one, with the tokens it had chosen before.
            known_tokens = len(new.prefill_token_ids or []) or prompt_tokens
            self._states[new.req_id] = RequestState(prompt_tokens, list(new.block_ids[0]), known_tokens)
        cached = scheduler_output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            state = self._states[request_id]
            state.known_tokens = state.prompt_tokens + cached.num_output_tokens[index]
            new_block_ids = cached.new_block_ids[index]
            if request_id in cached.resumed_req_ids:
                assert new_block_ids is not None, "resumed without blocks"
                state.block_ids = list(new_block_ids[0])
            elif new_block_ids is not None:
                state.block_ids.extend(new_block_ids[0])

    def _forward(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        """Write the KV of all chunks, check all that they attend to, and choose the next tokens."""
        chunks = list(_chunks(scheduler_output))
        for layer, name in enumerate(self._layer_names):
            self.connector.wait_for_layer_load(name)
            for chunk in chunks:
                self._compute(layer, chunk)
            self.connector.save_kv_layer(name, torch.empty(0), None)
        for chunk in chunks:
            self._check(chunk)
        return ModelRunnerOutput(
            req_ids=[chunk.request_id for chunk in chunks],
            req_id_to_index={chunk.request_id: index for index, chunk in enumerate(chunks)},
            sampled_token_ids=[self._choose(chunk) for chunk in chunks],
        )

    def _compute(self, layer: int, chunk: Chunk) -> None:
        hashes = self._engine.sequence(chunk.request_id).hashes(chunk.start, chunk.end)
        blocks, slots = self._places(chunk.request_id, chunk.start, chunk.end)
        values = kv(hashes, self.keys[layer : layer + 1])[:, 0]
        self._kv[layer, blocks, :, slots] = values
        self._shadow[layer, blocks, :, slots] = values

    def _check(self, chunk: Chunk) -> None:
        expected = kv(self._engine.sequence(chunk.request_id).hashes(0, chunk.end), self.keys)
        blocks, slots = self._places(chunk.request_id, 0, chunk.end)
        wrong = self._kv[:, blocks, :, slots] != expected  # [positions, layers, heads, words]
        if not wrong.any():
            return
        position, layer, head, _ = (int(index[0]) for index in np.nonzero(wrong))
        self._engine.found(
            WrongKV(
                f"request {chunk.request_id} read wrong KV in rank {self.rank}, layer {layer}, head {head}, "
                f"position {position} (block {blocks[position]}, slot {slots[position]}) while computing "
                f"[{chunk.start}, {chunk.end}); {int(wrong.any(axis=(1, 2, 3)).sum())} positions are wrong, "
                f"in layers {sorted(set(np.nonzero(wrong)[1].tolist()))}"
            )
        )

    def _choose(self, chunk: Chunk) -> list[int]:
        """Return the next token, or nothing when the chunk ends before the last token that is already chosen."""
        if chunk.end < self._states[chunk.request_id].known_tokens:
            return []
        return self._engine.sequence(chunk.request_id).tokens(chunk.end + 1)[-1:]

    @property
    def keys(self) -> Words:
        """Return the key of each place of a slot, under the present weights."""
        return self._keys ^ self._engine.weights

    def _places(self, request_id: str, start: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the blocks and the slots within them of positions `[start, end)`, by the block table."""
        positions = np.arange(start, end)
        table = np.array(self._states[request_id].block_ids)
        return table[positions // self._options.block_tokens], positions % self._options.block_tokens

    # Judgement

    def _find_stray_writes(self) -> None:
        """Report KV that changed although neither this worker's forward pass nor a load accounts for it."""
        changed = set(np.nonzero((self._kv != self._shadow).any(axis=(0, 2, 3, 4)))[0].tolist())
        if not changed:
            return
        if stray := changed - self._engine.loading_blocks():
            self._engine.found(StrayWrite(f"rank {self.rank}: blocks {sorted(stray)} changed, awaited by no load"))
        self._shadow[:, sorted(changed)] = self._kv[:, sorted(changed)]

    def _with_faults(self, output: ModelRunnerOutput) -> ModelRunnerOutput:
        """Spoil the loads that the plan says fail, in the pass that reports them finished."""
        report = output.kv_connector_output
        for request_id in sorted((report and report.finished_recving) or ()):
            block_ids = self._engine.load_faults(self.rank, request_id)
            assert isinstance(report, KVConnectorOutput), "nothing was reported"
            report.invalid_block_ids = report.invalid_block_ids | block_ids
            for block_id in block_ids:
                self._kv[:, block_id] = self._shadow[:, block_id] = GARBAGE
        return output

    def leftovers(self) -> list[str]:
        """Return what should have been forgotten by now."""
        return [f"rank {self.rank} remembers {request_id}" for request_id in self._states]

    @contextmanager
    def _as_current_connector(self) -> Iterator[None]:
        """Be the process's only rank for a while: vLLM keeps a process's connector in a global."""
        kv_transfer_state._KV_CONNECTOR_AGENT = self.connector
        try:
            yield
        finally:
            kv_transfer_state._KV_CONNECTOR_AGENT = None


def _chunks(scheduler_output: SchedulerOutput) -> Iterator[Chunk]:
    cached = scheduler_output.scheduled_cached_reqs
    start_by_request = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
    start_by_request |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    for request_id, count in scheduler_output.num_scheduled_tokens.items():
        start = start_by_request[request_id]
        yield Chunk(request_id, start, start + count)


def _words(views: list[torch.Tensor]) -> Words:
    """Return all layers' KV as one array [layers, blocks, heads, tokens, words] over the same bytes.

    `views` are [blocks, heads, tokens, elements] each, evenly spaced in one allocation.
    """
    first = views[0]
    pointers = [view.data_ptr() for view in views]
    layer_stride = pointers[1] - pointers[0] if len(views) > 1 else first.numel() * first.element_size()
    assert all(b - a == layer_stride for a, b in itertools.pairwise(pointers)), "unevenly spaced layers"
    size = first.element_size()
    word = np.dtype(np.uint64).itemsize
    assert first.stride(3) == 1 and first.shape[3] * size % word == 0, "a slot is not made of whole words"
    storage = torch.empty(0, dtype=torch.uint8).set_(first.untyped_storage()).numpy()
    start = first.storage_offset() * size
    return np.ndarray(
        shape=(len(views), *first.shape[:3], first.shape[3] * size // word),
        dtype=np.uint64,
        buffer=storage,
        offset=start,
        strides=(layer_stride, *(stride * size for stride in first.stride()[:3]), word),
    )
