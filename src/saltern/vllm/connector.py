"""The connector: vLLM's hooks, each handed to the planner (scheduler) or the worker (one a rank).

What vLLM guarantees of these hooks, and what it doesn't, is written down in `docs/connector.md`. Anything
raised on the scheduler's side after start would end the engine for everybody: what a request carries is
checked in `_salt_of`, and what isn't understood is not cached.
"""

import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.platforms import current_platform

from saltern.client.lifeline import Lifeline
from saltern.core.keys import digest
from saltern.publishing import FIELD as PUBLISH_FIELD
from saltern.publishing import Mark, parse_mark
from saltern.vllm.adapters import Adapters, FilesState, Loads
from saltern.vllm.copier import Shard
from saltern.vllm.copies import Copies, Reports
from saltern.vllm.devices import make_copier, worker_facts
from saltern.vllm.geometry import Geometry
from saltern.vllm.layout import LayoutError, read_groups, read_layout
from saltern.vllm.names import SaltCounts
from saltern.vllm.namespace import namespace_digest
from saltern.vllm.planner import DiskCounts, Planner
from saltern.vllm.session import Session
from saltern.vllm.settings import BLOCK_TOKENS, Settings, SettingsError, parse_settings
from saltern.vllm.stats import SalternPromMetrics, SalternStats
from saltern.vllm.versions import check_version, disk_hit_source, memory_hit_source
from saltern.vllm.worker import Worker

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

KV_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")
"""KV types whose scales are constants of the model."""

ATTACH_SECONDS_MAX = 2.0
"""How long the start of the engine waits for a server: enough for one that is there."""


@dataclass
class SalternHandshake(KVConnectorHandshakeMetadata):
    """What a worker tells its scheduler at start."""

    name: bytes
    rank: int
    block_bytes: int
    state_bytes: int
    replicas: int
    facts: dict[str, Any]


@dataclass
class SalternMetadata(KVConnectorMetadata):
    """What the scheduler tells the workers with every step."""

    copies: Copies
    shards: tuple[Shard, ...]


@dataclass
class SalternReports(KVConnectorWorkerMetadata):
    """What a worker tells its scheduler after a step: what it copied, and by rank which adapters it loaded."""

    reports: Reports
    loaded: dict[int, dict[int, FilesState]] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Add another rank's."""
        assert isinstance(other, SalternReports), "two connectors' reports mixed"
        self.reports.add(other.reports)
        self.loaded.update(other.loaded)
        return self


class PooledBlocks:
    """vLLM's block pool, as far as the planner needs it."""

    def __init__(self, pool: "BlockPool") -> None:
        self._pool = pool

    @property
    def total(self) -> int:
        """Return how many blocks there are."""
        return int(self._pool.num_gpu_blocks)

    def hold(self, block_ids: Sequence[int]) -> None:
        """Count one more user of each block, as vLLM does for a request."""
        self._pool.touch([self._pool.blocks[block_id] for block_id in block_ids])

    def free(self, block_ids: Sequence[int]) -> None:
        """Count one user less; the deepest first, since vLLM reuses in this order."""
        self._pool.free_blocks(self._pool.blocks[block_id] for block_id in reversed(block_ids))


class SalternConnector(KVConnectorBase_V1, SupportsHMA):
    """Saltern's cache behind vLLM's KV connector interface, for `kv_role: kv_both`."""

    _cache_hit_source = memory_hit_source()  # how vLLM's metrics name where our hits come from
    _disk_hit_source = disk_hit_source()

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        logging.getLogger("saltern").parent = logging.getLogger("vllm")  # our lines go where the engine's go
        self._settings = _check_start(vllm_config)
        events = vllm_config.kv_events_config
        if role is KVConnectorRole.SCHEDULER and events is not None and events.enable_kv_cache_events:
            logger.warning("vLLM's KV events (--kv-events-config) contain raw salts: let nobody read them who may not")
        self._config = vllm_config
        self._kv_config = kv_cache_config
        self._geometry = _geometry(kv_cache_config, self._settings)
        # The scheduler's side
        self._planner: Planner | None = None
        self._session: Session | None = None
        self._blocks: PooledBlocks | None = None
        lora_config = vllm_config.lora_config
        self._adapters = Adapters(
            ranks=vllm_config.parallel_config.world_size, dtype=str(lora_config.lora_dtype) if lora_config else ""
        )
        self._handshakes: list[SalternHandshake] = []
        self._facts_digest = b""
        self._epoch = b""  # empty until the weights change in place, to what has no name; then random
        self._shards: tuple[Shard, ...] = ()
        # The worker's side
        self._worker: Worker | None = None
        self._loads = Loads()

    @property
    def requires_kv_delivery(self) -> bool:
        """Say that a request whose KV was not stored is still answered."""
        return False

    # Scheduler: start and end

    def bind_gpu_block_pool(self, gpu_block_pool: "BlockPool") -> None:
        """Keep the pool whose blocks are held while they are stored."""
        self._blocks = PooledBlocks(gpu_block_pool)

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """Learn of all workers, and open the session; the last hook before requests come."""
        workers = [worker for worker in metadata.values() if isinstance(worker, SalternHandshake)]
        self._handshakes = sorted(workers, key=lambda worker: worker.rank)
        world_size = self._config.parallel_config.world_size
        if [worker.rank for worker in self._handshakes] != list(range(world_size)):
            raise LayoutError(f"{len(workers)} of {world_size} workers told Saltern of their KV cache")
        block_bytes, state_bytes = 0, 0
        shards: list[Shard] = []
        for worker in self._handshakes:
            replica = worker.rank % self._config.parallel_config.tensor_parallel_size % worker.replicas
            if replica:  # the rank that is so many before has the same KV
                shards.append(shards[-replica]._replace(is_writer=False))
            else:
                shards.append(Shard(block_bytes, state_bytes, is_writer=True))
                block_bytes += worker.block_bytes
                state_bytes += worker.state_bytes
        self._shards = tuple(shards)
        self._session = Session(
            self._settings.socket,
            engine=_engine_id(self._config),
            workers=tuple(worker.name for worker in self._handshakes),
            block_bytes=max(block_bytes, 1),  # a model with nothing but states has blocks as well, to hang them on
            state_bytes=state_bytes,
            block_tokens=0 if state_bytes else self._geometry.block_tokens,
            clock=time.monotonic,
            server_uid=self._settings.server_uid,
        )
        self._facts_digest = namespace_digest(
            self._config, vllm_version=vllm.__version__, worker_facts=[worker.facts for worker in self._handshakes]
        )
        assert self._blocks is not None, "vLLM binds its block pool before the handshake"
        self._planner = Planner(
            session=self._session,
            blocks=self._blocks,
            geometry=self._geometry,
            namespace=self._namespace,
            ranks=world_size,
            store=self._settings.store,
            naming_secret=self._settings.naming_secret,
            strict=self._settings.strict,
            patience_seconds=self._settings.patience_seconds,
            load_patience_seconds=self._settings.load_patience_seconds,
            clock=time.monotonic,
        )
        self._session.await_open(ATTACH_SECONDS_MAX)

    @property
    def _namespace(self) -> bytes:
        return digest(b"saltern.epoch", [self._facts_digest, self._epoch])

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """Give vLLM's process that logs what a worker has sent, as an object that can sum it."""
        return SalternStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: "VllmConfig",
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        """Register counters beside vLLM's own."""
        return SalternPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def reset_cache(self) -> bool:
        """Leave all KV computed so far behind: vLLM calls this when the weights change in place."""
        if self._planner is not None:
            self._epoch = os.urandom(16)
            self._planner.reset(self._namespace)
        return True

    def shutdown(self) -> None:
        """End what this role has open."""
        self._adapters.close()
        if self._session is not None:
            self._session.close()
        if self._worker is not None:
            self._worker.close()

    # Scheduler: requests

    def on_new_request(self, request: "Request") -> None:
        """Look a request's prompt up as it arrives."""
        said, mark = _mark_of(request)
        if self._planner is not None and said is not None and mark is None:
            self._planner.count_bad_mark()
        salt = _salt_of(request, require_salt=self._settings.require_salt and mark is None)
        if self._planner is None or salt is None:
            return
        adapter = self._adapters.identity(request.lora_request) if request.lora_request is not None else b""
        if adapter is not None:
            self._planner.add(request, salt, adapter, mark, only_published=self._settings.require_salt and not salt)

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        """Return what can be loaded beyond the engine's own tokens, always asynchronously."""
        if self._planner is None:
            return 0, False
        matched = self._planner.match(request.request_id, num_computed_tokens)
        return matched, bool(matched)

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        """Take note of the blocks that a request was given."""
        if self._planner is not None:
            tables = blocks.get_block_ids() if num_external_tokens else ()
            self._planner.admit(request.request_id, tables, num_external_tokens)

    def get_external_cache_hit_sources(self, request: "Request", num_external_tokens: int) -> dict[Any, int]:
        """Say which of the tokens that a request loads were fetched from the server's disk for it."""
        planner, request_id = self._planner, request.request_id
        from_disk = planner.disk_tokens(request_id, num_external_tokens) if planner is not None else 0
        by_source = {
            self._disk_hit_source: from_disk,
            self._cache_hit_source: num_external_tokens - from_disk,
        }
        return {source: tokens for source, tokens in by_source.items() if tokens}

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> SalternMetadata:
        """Return what the workers shall copy with this step."""
        if self._planner is None:
            return SalternMetadata(Copies(), ())
        speculated = scheduler_output.scheduled_spec_decode_tokens
        block_state = scheduler_output.kv_connector_block_state

        def tables_of(request_id: str) -> Sequence[Sequence[int]] | None:
            return block_state.get_block_ids(request_id) if block_state is not None else None

        scheduled = {
            request_id: tokens - len(speculated.get(request_id, ()))
            for request_id, tokens in scheduler_output.num_scheduled_tokens.items()
        }
        return SalternMetadata(self._planner.plan(scheduled, tables_of), self._shards)

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        """Take in what the workers have finished."""
        if self._planner is None:
            return
        self._planner.spoil(connector_output.invalid_block_ids, connector_output.failed_recving)
        reports = connector_output.kv_connector_worker_meta
        if isinstance(reports, SalternReports):
            # Requests under way count as the adapter that it was, but are computed with what it is now: none of
            # their blocks may be stored. It is rare enough to give up those of all others with them.
            changed = [self._adapters.load(rank, loaded) for rank, loaded in reports.loaded.items()]
            if any(changed):
                self._planner.reset(self._namespace)
            self._planner.report(reports.reports)

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request. Blocks still being stored are held by themselves: vLLM may free its own at once."""
        if self._planner is not None:
            self._planner.remove(request.request_id)
        return False, None

    def has_pending_push_work(self) -> bool:
        """Keep an idle engine stepping until what is held or asked has ended."""
        return self._planner is not None and self._planner.has_unfinished_work

    def has_pending_block_frees(self) -> bool:
        """Say that waiting is better than preempting: blocks come free as soon as copies are done."""
        return self._planner is not None and self._planner.has_stores_in_flight

    # Worker

    def register_kv_caches(self, kv_caches: "dict[str, torch.Tensor]") -> None:
        """Take the worker's KV cache, and begin to connect."""
        parallel = self._config.parallel_config
        rank = parallel.rank % parallel.world_size
        layout_name = self._kv_config.kv_cache_layout or self._config.cache_config.kv_cache_layout
        layout = read_layout(self._kv_config, self._geometry, layout_name=layout_name)
        self._worker = Worker(rank=rank, layout=layout, facts=worker_facts(self._config, self._kv_config, layout_name))
        buffer = next(iter(kv_caches.values()))
        lifeline = Lifeline(
            self._settings.socket,
            engine=_engine_id(self._config),
            name=self._worker.name,
            rank=rank,
            world_size=parallel.world_size,
            outlives_socket=buffer.is_cuda,
            server_uid=self._settings.server_uid,
        )
        self._worker.attach(lifeline, make_copier(buffer, layout, lifeline))
        if self._config.lora_config is not None:
            self._loads.watch()

    def get_handshake_metadata(self) -> SalternHandshake | None:
        """Tell the scheduler of this worker."""
        worker = self._worker
        if worker is None:
            return None
        layout, replicas = worker.layout, getattr(self._kv_config, "kv_tp_replicas", 1)
        return SalternHandshake(
            worker.name, worker.rank, layout.block_bytes, layout.state_bytes, replicas, dict(worker.facts)
        )

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Begin a step's copies before its forward pass, which those that take long overlap.

        vLLM has brought its block tables up to date by then, the blocks to store are full since the step
        before, and those to load are nobody else's.
        """
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None and isinstance(connector_metadata, SalternMetadata):
            self._worker.start(connector_metadata.copies, connector_metadata.shards)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Do nothing: loads have begun with `bind_connector_metadata`."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: a request runs only when its load is over."""

    def save_kv_layer(self, layer_name: str, kv_layer: "torch.Tensor", attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: whole blocks are stored a step later."""

    def wait_for_save(self) -> None:
        """Do nothing: blocks being stored are held until they are."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Report the requests whose load is over on this rank."""
        loaded, failed = self._worker.collect_loaded() if self._worker is not None else (set(), set())
        return KVConnectorTransferResults(
            finished_recving=loaded, failed_recving=set() if self._names_bad_blocks else failed
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Report blocks whose load failed, in the same pass as the end of their request's load."""
        bad_blocks = self._worker.take_bad_blocks() if self._worker is not None else set()
        return bad_blocks if self._names_bad_blocks else set()

    @property
    def _names_bad_blocks(self) -> bool:
        """Return whether a request can go on at its first bad block; else it starts anew.

        It can't where a group has forgotten what is needed there, and vLLM allows it to models with one group only.
        """
        return self._geometry.keeps_all and len(self._geometry.groups) == 1

    def get_kv_connector_stats(self) -> SalternStats | None:
        """Return what this rank has copied since the last step, or what the scheduler saw, for vLLM's metrics.

        vLLM asks the scheduler's side whenever it has taken in what a step computed, and so tells when it has ended.
        """
        if self._planner is not None:
            self._planner.end_step()
            salts, disk = self._planner.take_salt_counts(), self._planner.take_disk_counts()
            if salts == SaltCounts() and disk == DiskCounts():
                return None  # as in most steps
            stats = SalternStats()
            stats.add_salts(salts)
            stats.add_disk(disk)
            return stats
        finished = self._worker.take_finished() if self._worker is not None else []
        if self._worker is None or not finished:
            return None
        stats = SalternStats()
        for copy in finished:
            stats.add(copy, self._worker.layout)
        return stats

    def build_connector_worker_meta(self) -> SalternReports | None:
        """Report the operations that ended on this rank, and the adapters that it has loaded."""
        if self._worker is None:
            return None
        reports, loaded = self._worker.take_reports(), self._loads.take()
        if reports is None and not loaded:
            return None
        return SalternReports(reports or Reports(), {self._worker.rank: loaded} if loaded else {})


def _salt_of(request: "Request", *, require_salt: bool) -> str | None:
    """Return the salt of a request that may be cached, None of one that may not.

    Not cached are: what token ids don't decide (embeddings, images), what must not be read from a cache
    (prompt log probabilities), and prompts that may still grow.
    """
    salt = request.cache_salt
    parameters = request.sampling_params
    is_cacheable = (
        (salt is None or isinstance(salt, str))
        and (salt or not require_salt)
        and parameters is not None
        and parameters.prompt_logprobs is None
        and not request.skip_reading_prefix_cache
        and request.prompt_token_ids is not None
        and request.prompt_embeds is None
        and not request.mm_features
        and not request.resumable
    )
    return (salt or "") if is_cacheable else None


def _mark_of(request: "Request") -> tuple[object, Mark | None]:
    """Return what a request carries as a publication mark, and the mark if it is well formed: it may be anything."""
    parameters = request.kv_transfer_params
    said = parameters.get(PUBLISH_FIELD) if isinstance(parameters, dict) else None
    return said, parse_mark(said)


def _check_start(config: "VllmConfig") -> Settings:
    """Refuse, with a reason, engines that can't be cached correctly; return the settings."""
    transfer = config.kv_transfer_config
    check_version(vllm.__version__)
    if transfer.kv_role != "kv_both":
        raise SettingsError(f'Saltern needs "kv_role": "kv_both" in --kv-transfer-config, not {transfer.kv_role!r}')
    if transfer.kv_load_failure_policy != "recompute":
        raise SettingsError(
            'Saltern needs "kv_load_failure_policy": "recompute" in --kv-transfer-config: with'
            f" {transfer.kv_load_failure_policy!r}, vLLM's default, a lost block is an error to the client"
        )
    if config.cache_config.cache_dtype not in KV_DTYPES:
        raise SettingsError(
            f"Saltern doesn't support --kv-cache-dtype {config.cache_config.cache_dtype} (scales that are"
            f" calculated at run time); supported are {', '.join(KV_DTYPES)}"
        )
    if config.model_config.is_encoder_decoder:
        raise SettingsError("Saltern doesn't support encoder-decoder models")
    if config.parallel_config.nnodes > 1:
        raise SettingsError("Saltern doesn't support engines that span several nodes")
    if (
        config.parallel_config.decode_context_parallel_size > 1
        or config.parallel_config.prefill_context_parallel_size > 1
    ):
        raise SettingsError("Saltern doesn't support context parallelism")
    if (
        config.model_config.use_mla
        and current_platform.is_cpu()
        and not config.cache_config.enable_prefix_caching
        and not config.scheduler_config.enable_chunked_prefill
    ):
        raise SettingsError(
            "Saltern doesn't support MLA on this CPU: without AMX vLLM reuses no prefix there, and turns its own prefix"
            " caching off as well"
        )
    speculative = config.speculative_config
    if speculative is not None and speculative.method not in {"ngram", "suffix"}:
        raise SettingsError(f"Saltern doesn't support speculation with a draft model ({speculative.method})")
    return parse_settings(transfer.kv_connector_extra_config)


def _geometry(kv_cache_config: "KVCacheConfig", settings: Settings) -> Geometry:
    groups = read_groups(kv_cache_config)
    engine_tokens = math.lcm(*(group.block_tokens for group in groups))
    block_tokens = settings.block_tokens
    if block_tokens is None:
        # States exist where a step of the engine ends, and that is at one of its own blocks.
        has_states = any(group.is_state for group in groups)
        block_tokens = engine_tokens * (1 if has_states else max(BLOCK_TOKENS // engine_tokens, 1))
    if block_tokens <= 0 or block_tokens % engine_tokens:
        raise SettingsError(f"saltern.block_tokens is {block_tokens}, but must be a multiple of vLLM's {engine_tokens}")
    return Geometry(block_tokens=block_tokens, groups=groups)


def _engine_id(config: "VllmConfig") -> str:
    return str(config.kv_transfer_config.engine_id)[:256]
