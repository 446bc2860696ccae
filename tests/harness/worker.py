"""The worker of one rank: paged KV of known content, and the model runner's side of the connector.

The order in which a connector's hooks are called is not written down here: for both generations of vLLM's model runner
the code that calls them is vLLM's own (`KVConnectorModelRunnerMixin`, `ActiveKVConnector`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backends.utils import record_kv_cache_layout
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import DraftTokenIds, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin
from vllm.v1.worker.utils import allocate_kv_cache
from vllm.v1.worker.worker_base import CompilationTimes

from .findings import StrayWrite, WrongKV
from .model import Words, kv
from .options import Options
from .pages import Indices, Pages, Tensor

if TYPE_CHECKING:
    from .engine import Engine


class RequestState(msgspec.Struct):
    """What a model runner remembers of a request: its block tables and how many of its tokens are chosen already.

    Only the runner knows at once how many drafted tokens were right, so it keeps count itself of those computed for
    good; `scheduled_start` is where the scheduler believes that this step starts.
    """

    prompt_tokens: int
    tables: list[list[int]]  # one a group
    known_tokens: int
    computed_tokens: int
    scheduled_start: int
    rejected_tokens: int = 0  # drafted in the last step, and wrong


class Chunk(msgspec.Struct, frozen=True):
    """The positions `[start, end)` of one request that one step computes.

    Those of `[certain_end, end)` hold drafted tokens. From `right_end` on these turn out wrong: their KV is that of
    another continuation.
    """

    request_id: str
    start: int
    certain_end: int
    right_end: int
    end: int
    hashes: Words
    is_sampled: bool  # and not a prefill that goes on


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
        self._drafts: DraftTokenIds | None = None

    # Start

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        options = self._options
        return {
            f"model.layers.{layer}.self_attn.attn": describe(options.block_tokens, options.heads, options.window_tokens)
            for layer, describe in enumerate(options.architecture.layers * options.layers)
        }

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
        groups = len(kv_cache_config.kv_cache_groups)
        assert groups <= self._options.architecture.groups, "vLLM groups layers otherwise"
        self._pages = Pages(kv_cache_config, views, self.rank)
        with self._as_current_connector():
            self._active_connector = ActiveKVConnector(self._config, views)

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

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Return what the last step drafted; only a scheduler that awaits each step asks."""
        drafts, self._drafts = self._drafts, None
        return drafts

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
        is_drafting = bool(self._options.speculated_tokens)  # the draft comes after the forward pass, saves after it
        with (
            set_forward_context(None, self._config),
            KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(
                scheduler_output, defer_finalize=is_drafting
            ) as kv_connector_output,
        ):
            self._pending = self._forward(scheduler_output)
        if is_drafting:
            KVConnectorModelRunnerMixin.finalize_kv_connector()
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
            prompt_tokens = self._engine.prompt(new.req_id, new.prompt_token_ids or [])
            # The second runner gets a resumed request as a new one, with the tokens it had chosen before.
            known_tokens = len(new.prefill_token_ids or []) or prompt_tokens
            start = new.num_computed_tokens
            tables = [*map(list, new.block_ids)]
            self._states[new.req_id] = RequestState(prompt_tokens, tables, known_tokens, start, start)
        cached = scheduler_output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            state = self._states[request_id]
            state.known_tokens = state.prompt_tokens + cached.num_output_tokens[index]
            new_block_ids = cached.new_block_ids[index]
            state.scheduled_start = cached.num_computed_tokens[index]
            if request_id in cached.resumed_req_ids:
                state.computed_tokens = state.scheduled_start
                assert new_block_ids is not None, "resumed without blocks"
                state.tables = [*map(list, new_block_ids)]
            elif new_block_ids is not None:
                for table, block_ids in zip(state.tables, new_block_ids, strict=True):
                    table.extend(block_ids)

    def _forward(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        """Write the KV of all chunks, check all that they attend to, and choose the next tokens."""
        chunks = [self._chunk(scheduler_output, request_id) for request_id in scheduler_output.num_scheduled_tokens]
        assert not scheduler_output.kv_cache_block_copies, "blocks are copied only for states inside of blocks"
        for index, tensor in enumerate(self._pages.tensors):
            if tensor.is_state:
                for chunk in chunks:
                    self._check(index, chunk, max(chunk.start - 1, 0), chunk.start)  # before it goes on
            for layer, name in enumerate(tensor.names):
                self.connector.wait_for_layer_load(name)
                for chunk in chunks:
                    self._compute(index, layer, chunk)
                self.connector.save_kv_layer(name, torch.empty(0), None)
            if not tensor.is_state:
                for chunk in chunks:
                    self._check(index, chunk, tensor.first_read(chunk.start), chunk.right_end)
        if self._options.speculated_tokens and not self._options.asynchronous:
            sampled = [chunk for chunk in chunks if chunk.is_sampled]
            self._drafts = DraftTokenIds(
                [chunk.request_id for chunk in sampled], [self._draft(chunk) for chunk in sampled]
            )
        return ModelRunnerOutput(
            req_ids=[chunk.request_id for chunk in chunks],
            req_id_to_index={chunk.request_id: index for index, chunk in enumerate(chunks)},
            sampled_token_ids=[self._choose(chunk) for chunk in chunks],
        )

    def _chunk(self, scheduler_output: SchedulerOutput, request_id: str) -> Chunk:
        """Return what a step computes of a request: its drafted tokens judged, and its place by our own count."""
        state, sequence = self._states[request_id], self._engine.sequence(request_id)
        start, count = state.computed_tokens, scheduler_output.num_scheduled_tokens[request_id]
        drafted = scheduler_output.scheduled_spec_decode_tokens.get(request_id, [])
        if self._options.asynchronous and drafted:
            # The scheduler has not seen the draft: it knows the number only, and counts on all of the last one.
            drafted = sequence.draft(start + count - len(drafted) - 1, len(drafted))
        certain_end = start + count - len(drafted)
        right = _equal_items(drafted, sequence.tokens(certain_end + len(drafted))[certain_end:])
        unseen = state.rejected_tokens if self._options.asynchronous else 0
        assert start <= state.scheduled_start <= start + unseen, f"{request_id} is at {start}, not {state}"
        state.computed_tokens = right_end = certain_end + right
        state.rejected_tokens = len(drafted) - right
        self._engine.drafted(len(drafted), state.rejected_tokens)
        certain, astray = sequence.hashes(start, certain_end), sequence.hashes_astray(certain_end, drafted)
        return Chunk(
            request_id=request_id,
            start=start,
            certain_end=certain_end,
            right_end=right_end,
            end=start + count,
            hashes=np.concatenate([certain, astray]),
            is_sampled=state.scheduled_start + count >= state.known_tokens,
        )

    def _draft(self, chunk: Chunk) -> list[int]:
        """Return what follows the token that this step has chosen, or less, as a drafter does that finds nothing."""
        sequence = self._engine.sequence(chunk.request_id)
        return sequence.draft(chunk.right_end, chunk.right_end % (self._options.speculated_tokens + 1))

    def _compute(self, index: int, layer: int, chunk: Chunk) -> None:
        """Write what one layer keeps of a chunk: the KV of its tokens, or the state behind the last one."""
        tensor = self._pages.tensors[index]
        first = chunk.end - 1 if tensor.is_state else chunk.start
        values = kv(chunk.hashes[first - chunk.start :], self._keys(tensor)[layer : layer + 1])[:, 0]
        self._pages.write(index, layer, self._places(tensor, chunk, first, chunk.end), values)

    def _check(self, index: int, chunk: Chunk, start: int, end: int) -> None:
        """Report what is wrong among positions `[start, end)` that a chunk attends to, or in the state behind them."""
        tensor = self._pages.tensors[index]
        places = self._places(tensor, chunk, start, end)
        expected = kv(self._engine.sequence(chunk.request_id).hashes(start, end), self._keys(tensor))
        wrong = self._pages.wrong(index, places, expected)
        if not wrong.any():
            return
        position, layer, _ = (int(axis[0]) for axis in np.nonzero(wrong))
        blocks, slots = places
        self._engine.found(
            WrongKV(
                f"request {chunk.request_id} read wrong KV in rank {self.rank}, group {tensor.group}, layer {layer}, "
                f"position {start + position} (block {blocks[position]}, slot {slots[position]}) while computing "
                f"[{chunk.start}, {chunk.end}); {int(wrong.any(axis=(1, 2)).sum())} positions are wrong, "
                f"in layers {sorted(set(np.nonzero(wrong)[1].tolist()))}"
            )
        )

    def _places(self, tensor: Tensor, chunk: Chunk, start: int, end: int) -> tuple[Indices, Indices]:
        return tensor.places(self._states[chunk.request_id].tables[tensor.group], start, end)

    def _choose(self, chunk: Chunk) -> list[int]:
        """Return the drafted tokens that are right and the one after them, or nothing while the prompt goes on."""
        if not chunk.is_sampled:
            return []
        return self._engine.sequence(chunk.request_id).tokens(chunk.right_end + 1)[chunk.certain_end :]

    def _keys(self, tensor: Tensor) -> Words:
        """Return the key of each word of a slot, under the present weights."""
        return tensor.keys ^ self._engine.weights

    # Judgement

    def _find_stray_writes(self) -> None:
        """Report KV that changed although neither this worker's forward pass nor a load accounts for it."""
        stray = self._pages.take_changes() - self._engine.loading_blocks()
        if stray:
            self._engine.found(StrayWrite(f"rank {self.rank}: blocks {sorted(stray)} changed, awaited by no load"))

    def _with_faults(self, output: ModelRunnerOutput) -> ModelRunnerOutput:
        """Spoil the loads that the plan says fail, in the pass that reports them finished."""
        report = output.kv_connector_output
        for request_id in sorted((report and report.finished_recving) or ()):
            block_ids = self._engine.load_faults(self.rank, request_id)
            assert isinstance(report, KVConnectorOutput), "nothing was reported"
            if block_ids and self._options.names_bad_blocks:
                report.invalid_block_ids = report.invalid_block_ids | block_ids
            elif block_ids:
                report.failed_recving = {*(report.failed_recving or ()), request_id}
            self._pages.spoil(block_ids)
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


def _equal_items(items: list[int], others: list[int]) -> int:
    """Return how many items at the beginning are equal."""
    return next((index for index, pair in enumerate(zip(items, others, strict=True)) if pair[0] != pair[1]), len(items))
