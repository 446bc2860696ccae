"""Tests of the connector's own part: what it refuses at start, whom it caches, and what it hands on."""

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.lora.request import LoRARequest
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

import saltern.vllm
from saltern.vllm.adapters import FilesState
from saltern.vllm.connector import (
    PooledBlocks,
    SalternConnector,
    SalternHandshake,
    SalternMetadata,
    SalternReports,
    _check_start,
    _geometry,
    _salt_of,
)
from saltern.vllm.copier import CpuCopier, Shard
from saltern.vllm.copies import Copies, Copy, Piece, Reports
from saltern.vllm.devices import make_copier
from saltern.vllm.geometry import Geometry, Group
from saltern.vllm.layout import LayoutError
from saltern.vllm.names import SaltCounts
from saltern.vllm.planner import DiskCounts
from saltern.vllm.settings import Settings, SettingsError
from saltern.vllm.versions import VersionError, disk_hit_source
from tests.vllm.arena import make_layout


def make_config(**changes: Any) -> Any:
    """Return as much of vLLM's configuration as is read at start, of an engine that is accepted."""
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"saltern.socket": "/nowhere/saltern.sock"},
            engine_id="engine",
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", enable_prefix_caching=False),
        model_config=SimpleNamespace(is_encoder_decoder=False, use_mla=False),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=False),
        parallel_config=SimpleNamespace(
            nnodes=1, decode_context_parallel_size=1, prefill_context_parallel_size=1, world_size=2, rank=0
        ),
        speculative_config=None,
        lora_config=None,
        kv_events_config=None,
    )
    for path, value in changes.items():
        part, _, name = path.partition("__")
        if name:
            setattr(getattr(config, part), name, value)
        else:
            setattr(config, part, value)
    return config


def kv_config_of(engine_tokens: int) -> KVCacheConfig:
    """Return the description of a KV cache of one group of full attention."""
    spec = FullAttentionSpec(block_size=engine_tokens, num_kv_heads=1, head_size=8, dtype=torch.bfloat16)
    return KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])


def make_request(*, pooling: bool = False, sampling: dict[str, Any] | None = None, **changes: Any) -> Request:
    """Return a request as vLLM makes it."""
    options: dict[str, Any] = {
        "request_id": "r",
        "prompt_token_ids": [1, 2, 3],
        "sampling_params": None if pooling else SamplingParams(max_tokens=4, **(sampling or {})),
        "pooling_params": PoolingParams() if pooling else None,
    }
    return Request(**(options | changes))


class TestStart:
    """An engine that can't be cached correctly is refused with a reason, before it serves anybody."""

    def test_an_engine_that_is_as_it_must_be_is_accepted(self) -> None:
        assert _check_start(make_config()).socket == "/nowhere/saltern.sock"

    @pytest.mark.parametrize("method", ["ngram", "suffix"])
    def test_speculation_without_a_model_is_accepted(self, method: str) -> None:
        _check_start(make_config(speculative_config=SimpleNamespace(method=method)))

    @pytest.mark.parametrize("dtype", ["auto", "bfloat16", "fp8", "fp8_e4m3"])
    def test_kv_types_with_constant_scales_are_accepted(self, dtype: str) -> None:
        _check_start(make_config(cache_config__cache_dtype=dtype))

    @pytest.mark.parametrize(
        "able_to", ["cache_config__enable_prefix_caching", "scheduler_config__enable_chunked_prefill"]
    )
    def test_mla_is_accepted_where_vllm_computes_behind_a_prefix(self, able_to: str) -> None:
        _check_start(make_config(model_config__use_mla=True, **{able_to: True}))

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"kv_transfer_config__kv_role": "kv_producer"}, '"kv_role": "kv_both"'),
            ({"kv_transfer_config__kv_role": "kv_consumer"}, '"kv_role": "kv_both"'),
            ({"kv_transfer_config__kv_load_failure_policy": "fail"}, '"kv_load_failure_policy": "recompute"'),
            ({"kv_transfer_config__kv_connector_extra_config": {"saltern.sockt": ""}}, "saltern.socket"),
            ({"cache_config__cache_dtype": "fp8_per_token_head"}, "--kv-cache-dtype fp8_per_token_head"),
            ({"model_config__is_encoder_decoder": True}, "encoder-decoder"),
            ({"model_config__use_mla": True}, "MLA on this CPU"),
            ({"parallel_config__nnodes": 2}, "several nodes"),
            ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
            ({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism"),
            ({"speculative_config": SimpleNamespace(method="eagle")}, "draft model .eagle."),
            ({"speculative_config": SimpleNamespace(method="mtp")}, "draft model .mtp."),
        ],
    )
    def test_another_is_refused(self, changes: dict[str, Any], told: str) -> None:
        with pytest.raises(SettingsError, match=told):
            _check_start(make_config(**changes))

    def test_another_vllm_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(vllm, "__version__", "1.0.0")
        with pytest.raises(VersionError, match=r"this is 1\.0\.0"):
            _check_start(make_config())

    @pytest.mark.parametrize("role", KVConnectorRole)
    def test_events_that_hold_salts_are_warned_of_once_an_engine(
        self, role: KVConnectorRole, caplog: pytest.LogCaptureFixture
    ) -> None:
        for enabled in (False, True):
            config = make_config(kv_events_config=SimpleNamespace(enable_kv_cache_events=enabled))
            with caplog.at_level("WARNING", "saltern"):
                SalternConnector(config, role, kv_config_of(16))
            assert ("--kv-events-config" in caplog.text) == (enabled and role is KVConnectorRole.SCHEDULER)

    @pytest.mark.parametrize(
        ("engine_tokens", "setting", "block_tokens"),
        [(16, None, 128), (128, None, 128), (256, None, 256), (48, None, 96), (16, 16, 16), (16, 64, 64)],
    )
    def test_a_block_is_a_multiple_of_the_engines(
        self, engine_tokens: int, setting: int | None, block_tokens: int
    ) -> None:
        geometry = _geometry(kv_config_of(engine_tokens), Settings(socket="", block_tokens=setting))
        assert geometry == Geometry(block_tokens, (Group(engine_tokens),))

    @pytest.mark.parametrize("setting", [0, -16, 8, 24])
    def test_a_block_that_is_none_is_refused(self, setting: int) -> None:
        with pytest.raises(SettingsError, match=f"saltern.block_tokens is {setting}, but must be a multiple"):
            _geometry(kv_config_of(16), Settings(socket="", block_tokens=setting))

    def test_a_scheduler_that_hears_of_no_or_not_all_workers_is_refused(self) -> None:
        connector = make_connector()
        with pytest.raises(LayoutError, match="0 of 2 workers"):
            connector.set_xfer_handshake_metadata_pp_aware({})
        alone = SalternHandshake(b"n" * 16, rank=1, block_bytes=8, state_bytes=0, replicas=1, facts={})
        with pytest.raises(LayoutError, match="1 of 2 workers"):
            connector.set_xfer_handshake_metadata_pp_aware({(0, 1): alone})

    def test_the_name_is_registered_once_however_often_plugins_are_loaded(self) -> None:
        saltern.vllm.register()
        saltern.vllm.register()
        assert KVConnectorFactory.get_connector_class_by_name("SalternConnector") is SalternConnector
        assert saltern.vllm.SalternConnector is SalternConnector


class TestSalts:
    """Who a request belongs to, and which requests nobody's cache may answer."""

    @pytest.mark.parametrize("salt", ["alice", " ", "\0", "\udc80"])
    def test_a_salt_is_a_user(self, salt: str) -> None:
        for require_salt in (True, False):
            assert _salt_of(make_request(cache_salt=salt), require_salt=require_salt) == salt

    @pytest.mark.parametrize("salt", [None, ""])
    def test_no_salt_is_one_user_unless_salts_are_required(self, salt: str | None) -> None:
        assert _salt_of(make_request(cache_salt=salt), require_salt=False) == ""
        assert _salt_of(make_request(cache_salt=salt), require_salt=True) is None

    @pytest.mark.parametrize("salt", [0, 1, b"alice", ["alice"], {"tenant": "alice"}, True])
    def test_a_salt_that_is_no_text_is_nobody(self, salt: Any) -> None:
        assert _salt_of(make_request(cache_salt=salt), require_salt=False) is None

    @pytest.mark.parametrize(
        "changes",
        [
            pytest.param({"sampling": {"prompt_logprobs": 0}}, id="prompt-logprobs"),
            pytest.param({"sampling": {"prompt_logprobs": 5}}, id="prompt-logprobs-of-several"),
            pytest.param({"sampling": {"skip_reading_prefix_cache": True}}, id="skips-reading"),
            pytest.param({"pooling": True}, id="pooling"),
            pytest.param({"prompt_token_ids": None, "prompt_embeds": torch.zeros(3, 8)}, id="embeddings"),
            pytest.param({"prompt_embeds": torch.zeros(3, 8)}, id="embeddings-beside-tokens"),
            pytest.param({"mm_features": [object()]}, id="images"),
            pytest.param({"resumable": True}, id="resumable"),
        ],
    )
    def test_what_tokens_do_not_decide_or_may_not_come_from_a_cache_is_not_cached(
        self, changes: dict[str, Any]
    ) -> None:
        assert _salt_of(make_request(cache_salt="alice", **changes), require_salt=False) is None

    def test_what_a_client_may_write_besides_is_not_read(self) -> None:
        hostile = {"extra_args": {"kv_transfer_params": {"cache_salt": "bob", "do_remote_prefill": object()}}}
        assert _salt_of(make_request(cache_salt="alice", sampling=hostile), require_salt=False) == "alice"


SHARD = Shard(0, 0, is_writer=True)


class Recorder:
    """A planner that notes what it is told."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.matched: int | None = 0
        self.has_unfinished_work = self.has_stores_in_flight = True
        self.from_disk = 0

    def add(
        self, request: Any, salt: str, extras: bytes = b"", mark: Any = None, *, only_published: bool = False
    ) -> None:
        assert mark is None
        assert not only_published
        self.calls.append(("add", request.request_id, salt, extras))

    def count_bad_mark(self) -> None:
        self.calls.append(("bad mark",))

    def match(self, request_id: str, local_tokens: int) -> int | None:
        self.calls.append(("match", request_id, local_tokens))
        return self.matched

    def admit(self, request_id: str, tables: Any, loaded_tokens: int) -> None:
        self.calls.append(("admit", request_id, tables, loaded_tokens))

    def plan(self, scheduled_tokens: Any, tables_of: Any) -> Copies:
        self.calls.append(("plan", dict(scheduled_tokens), {name: tables_of(name) for name in scheduled_tokens}))
        return Copies()

    def remove(self, request_id: str) -> None:
        self.calls.append(("remove", request_id))

    def disk_tokens(self, request_id: str, loaded_tokens: int) -> int:
        return self.from_disk

    def end_step(self) -> None:
        self.calls.append(("end step",))

    def take_salt_counts(self) -> SaltCounts:
        return SaltCounts()

    def take_disk_counts(self) -> DiskCounts:
        return DiskCounts(loads=self.from_disk)

    def spoil(self, *failed: Any) -> None:
        self.calls.append(("spoil", *failed))

    def report(self, reports: Reports) -> None:
        self.calls.append(("report", reports))

    def reset(self, namespace: bytes) -> None:
        self.calls.append(("reset", namespace))


def make_connector(planner: Any = None, **extra: Any) -> SalternConnector:
    """Return a scheduler's connector, before its start or with a planner given to it."""
    config = make_config()
    config.kv_transfer_config.kv_connector_extra_config.update(extra)
    connector = SalternConnector(config, KVConnectorRole.SCHEDULER, kv_config_of(16))
    connector._planner = planner
    return connector


class TestScheduler:
    """vLLM's hooks reach the planner with what it needs, and no more."""

    def test_before_its_start_it_answers_and_caches_nothing(self) -> None:
        connector = make_connector()
        request = make_request()
        connector.on_new_request(request)
        assert connector.get_num_new_matched_tokens(request, 0) == (0, False)
        assert connector.request_finished_all_groups(request, ([],)) == (False, None)
        assert not connector.has_pending_push_work()
        assert not connector.has_pending_block_frees()
        assert connector.reset_cache()
        assert not connector.requires_kv_delivery
        connector.shutdown()

    def test_each_request_is_added_under_its_own_salt(self) -> None:
        planner = Recorder()
        connector = make_connector(planner)
        for name in ("alice", "bob"):
            connector.on_new_request(make_request(request_id=f"of-{name}", cache_salt=name))
        assert planner.calls == [("add", "of-alice", "alice", b""), ("add", "of-bob", "bob", b"")]

    def test_a_required_salt_that_is_missing_keeps_a_request_out(self) -> None:
        planner = Recorder()
        make_connector(planner, **{"saltern.require_salt": True}).on_new_request(make_request())
        assert not planner.calls

    @pytest.mark.parametrize("required", [False, True])
    @pytest.mark.parametrize("said", ["", "p1.x", 0, ["p1"], {"mark": True}])
    def test_what_is_no_mark_at_all_is_counted_and_not_believed(self, said: Any, required: bool) -> None:
        planner = Recorder()
        connector = make_connector(planner, **{"saltern.require_salt": required})
        marked = {"extra_args": {"kv_transfer_params": {"saltern.publish": said}}}
        connector.on_new_request(make_request(request_id="r", cache_salt="alice", sampling=marked))
        assert planner.calls == [("bad mark",), ("add", "r", "alice", b"")]
        connector.on_new_request(make_request(request_id="r", sampling=marked))
        assert planner.calls[2:] == [("bad mark",)] + ([] if required else [("add", "r", "", b"")])

    def test_an_adapter_that_is_not_known_yet_keeps_a_request_out(self) -> None:
        planner = Recorder()
        connector = make_connector(planner)
        connector.on_new_request(make_request(lora_request=LoRARequest("adapter", 1, "/no/such/adapter")))
        assert not planner.calls
        connector.shutdown()

    @pytest.mark.parametrize(("matched", "answer"), [(None, (None, False)), (0, (0, False)), (128, (128, True))])
    def test_hits_are_loaded_asynchronously_and_misses_are_not(
        self, matched: int | None, answer: tuple[int | None, bool]
    ) -> None:
        planner = Recorder()
        planner.matched = matched
        assert make_connector(planner).get_num_new_matched_tokens(make_request(), 32) == answer
        assert planner.calls == [("match", "r", 32)]

    @pytest.mark.skipif(disk_hit_source() is None, reason="this vLLM doesn't tell sources apart")
    @pytest.mark.parametrize(
        ("from_disk", "by_source"), [(0, {"host": 96}), (32, {"disk": 32, "host": 64}), (96, {"disk": 96})]
    )
    def test_vllm_is_told_what_came_from_the_disk(self, from_disk: int, by_source: dict[str, int]) -> None:
        planner = Recorder()
        planner.from_disk = from_disk
        told = make_connector(planner).get_external_cache_hit_sources(make_request(), 96)
        assert {source.value: tokens for source, tokens in told.items()} == by_source

    def test_a_step_ends_once_when_vllm_asks_for_statistics(self) -> None:
        planner = Recorder()
        assert make_connector(planner).get_kv_connector_stats() is None
        assert planner.calls == [("end step",)]
        planner.from_disk = 3
        stats = make_connector(planner).get_kv_connector_stats()
        assert stats is not None
        assert stats.data["disk"]["loads"] == 3

    def test_speculated_tokens_are_left_out_and_blocks_are_the_requests_own(self) -> None:
        planner = Recorder()
        blocks = {"a": ([1, 2],), "b": None}
        output: Any = SimpleNamespace(
            num_scheduled_tokens={"a": 5, "b": 1},
            scheduled_spec_decode_tokens={"a": [7, 8, 9]},
            kv_connector_block_state=SimpleNamespace(get_block_ids=blocks.get),
        )
        connector = make_connector(planner)
        connector._shards = (SHARD,)
        assert connector.build_connector_meta(output) == SalternMetadata(Copies(), (SHARD,))
        assert planner.calls == [("plan", {"a": 2, "b": 1}, {"a": ([1, 2],), "b": None})]

    def test_a_finished_requests_blocks_are_never_delayed(self) -> None:
        planner = Recorder()
        connector = make_connector(planner)
        assert connector.request_finished_all_groups(make_request(), ([1, 2],)) == (False, None)
        assert planner.calls == [("remove", "r")]
        assert connector.has_pending_push_work()
        assert connector.has_pending_block_frees()

    def test_what_crosses_to_the_workers_and_back_survives_the_way(self) -> None:
        copies = Copies(loads=[Copy(1, b"i", "r", (Piece((), 0, (1, 2)),))])
        for sent in (SalternMetadata(copies, (SHARD,)), SalternReports(Reports({1: 1}, {2: 1}))):
            assert pickle.loads(pickle.dumps(sent)) == sent  # noqa: S301  # vLLM's way between its own processes

    def test_reports_of_ranks_add_up(self) -> None:
        total = SalternReports(Reports(done={1: 1}, failed={2: 1}), {0: {7: FilesState(b"a")}})
        total = total.aggregate(SalternReports(Reports(done={1: 1, 3: 1}, failed={2: 1}), {1: {7: FilesState(b"b")}}))
        assert total.reports == Reports(done={1: 2, 3: 1}, failed={2: 2})
        assert total.loaded == {0: {7: b"a"}, 1: {7: b"b"}}

    def test_an_adapter_that_becomes_another_ends_what_was_begun_with_it(self) -> None:
        planner = Recorder()
        connector = make_connector(planner)
        states = {"first": [b"a", b"a"], "again": [b"a", b"a"], "of one rank": [b"a", b"b"], "of all": [b"b", b"b"]}
        resets = {}
        for when, (one, other) in states.items():
            loaded = {0: {7: FilesState(one)}, 1: {7: FilesState(other)}}
            planner.calls.clear()
            reports = SalternReports(Reports(), loaded)
            connector.update_connector_output(KVConnectorOutput(kv_connector_worker_meta=reports))
            resets[when] = [call for call in planner.calls if call[0] == "reset"]
        same_namespace = [("reset", connector._namespace)]
        assert resets == {"first": [], "again": [], "of one rank": same_namespace, "of all": same_namespace}


class TestBlocks:
    """Blocks are held and freed as vLLM's own pool counts them."""

    def test_a_held_block_is_not_reused_until_it_is_freed(self) -> None:
        pool = BlockPool(num_gpu_blocks=4, enable_caching=False, hash_block_size=16)
        blocks = PooledBlocks(pool)
        assert blocks.total == 4
        owned = pool.get_new_blocks(3)
        block_ids = [block.block_id for block in owned]
        blocks.hold(block_ids[:2])
        pool.free_blocks(owned)
        assert pool.get_num_free_blocks() == 1
        blocks.free(block_ids[:2])
        assert pool.get_num_free_blocks() == 3
        assert {block.ref_cnt for block in owned} == {0}


class TestDevices:
    """The worker's KV cache is found behind whatever view of it vLLM hands over."""

    def test_a_layers_view_leads_to_the_whole_buffer(self) -> None:
        layout, size = make_layout([(2, 32)], blocks=4, slots=1, layers_first=True)
        buffer = torch.arange(size, dtype=torch.int64).to(torch.int8)
        layer = buffer.view(torch.bfloat16)[64:].view(4, 1, 2, 8)
        lifeline: Any = SimpleNamespace()
        copier = make_copier(layer, layout, lifeline)
        assert isinstance(copier, CpuCopier)
        ((pages,),) = copier._pages
        assert pages.shape == (4, 2, 32)
        assert (pages[1, 1] == np.arange(128 + 32, 128 + 64).astype(np.uint8)).all()
        pages[3, 1] = 7
        assert (buffer[-32:] == 7).all(), "the copier writes to a copy"
        copier.close()
