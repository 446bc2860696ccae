"""Statistics sum what ranks copied, and name nothing that a request carries."""

import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.config import KVTransferConfig, VllmConfig

from saltern.core.extents import Run
from saltern.vllm import register
from saltern.vllm.copier import Finished
from saltern.vllm.copies import Copy, Piece
from saltern.vllm.layout import Layout
from saltern.vllm.names import SaltCounts
from saltern.vllm.planner import DiskCounts
from saltern.vllm.stats import DISK_FIELDS, FIELDS, SalternPromMetrics, SalternStats
from tests.vllm.arena import make_layout


def layout_of(*, slot_bytes: int) -> Layout:
    """Return a layout of one layer."""
    layout, _ = make_layout([(1, slot_bytes)], blocks=8, slots=8, layers_first=True)
    return layout


def copied(*, blocks: int, is_store: bool = False, is_failed: bool = False, seconds: float = 0.5) -> Finished:
    """Return a copy of `blocks` engine blocks, and of one that nobody needs, that has ended."""
    piece = Piece(extent=(Run(start=0, count=1),), first_slot=0, engine_blocks=(0, *range(1, blocks + 1)))
    return Finished(Copy(1, b"", "request-of-alice", (piece,)), is_store, is_failed, seconds=seconds)


def test_bytes_are_those_of_the_blocks_that_were_copied() -> None:
    stats = SalternStats()
    stats.add(copied(blocks=3), layout_of(slot_bytes=1000))
    stats.add(copied(blocks=2, is_store=True), layout_of(slot_bytes=1000))
    assert stats.data["load"] == {"copies": 1, "failed": 0, "bytes": 3000, "seconds": 0.5}
    assert stats.data["store"] == {"copies": 1, "failed": 0, "bytes": 2000, "seconds": 0.5}


def test_a_failed_copy_moved_nothing() -> None:
    stats = SalternStats()
    stats.add(copied(blocks=3, is_failed=True), layout_of(slot_bytes=1000))
    assert stats.data["load"] == {"copies": 1, "failed": 1, "bytes": 0, "seconds": 0}
    assert not stats.is_empty()


def test_ranks_and_steps_add_up() -> None:
    first, second = SalternStats(), SalternStats()
    first.add(copied(blocks=1), layout_of(slot_bytes=1_000_000))
    second.add(copied(blocks=2), layout_of(slot_bytes=1_000_000))
    second.add_disk(DiskCounts(loads=1, blocks=3, seconds=0.25, misses=2))
    total = first.aggregate(SalternStats(data=second.to_dict()))
    assert total.reduce() == {
        "saltern loads": 2,
        "loads failed": 0,
        "load MB": 3.0,
        "load GB/s": pytest.approx(0.003, abs=0.01),
        "saltern stores": 0,
        "stores failed": 0,
        "store MB": 0.0,
        "store GB/s": 0.0,
        "disk loads": 1,
        "disk blocks": 3,
        "disk seconds": 0.25,
        "disk misses": 2,
        "signed salts": 0,
        "unsigned salts": 0,
        "bad signature salts": 0,
        "bad mark salts": 0,
    }


def test_nothing_copied_is_empty() -> None:
    assert SalternStats().is_empty()


def test_metrics_have_one_line_a_direction_and_none_a_request() -> None:
    register()  # as vLLM does with the plugin
    config = VllmConfig(kv_transfer_config=KVTransferConfig(kv_connector="SalternConnector", kv_role="kv_both"))
    metrics = SalternPromMetrics(config, {Counter: Counter, Gauge: Gauge, Histogram: Histogram}, ["engine"], {0: ["0"]})
    stats = SalternStats()
    stats.add(copied(blocks=3), layout_of(slot_bytes=1000))
    salts = SalternStats()  # the scheduler's
    salts.add_salts(SaltCounts(signed=2, unsigned=1))
    assert not salts.is_empty()
    disk = SalternStats()
    disk.add_disk(DiskCounts(misses=1))
    assert not disk.is_empty()
    stats.aggregate(SalternStats(data=disk.to_dict()))
    stats.aggregate(SalternStats(data=salts.to_dict()))
    metrics.observe(stats.to_dict())
    assert REGISTRY.get_sample_value("vllm:saltern_bytes_total", {"engine": "0", "direction": "load"}) == 3000
    assert REGISTRY.get_sample_value("vllm:saltern_copies_total", {"engine": "0", "direction": "load"}) == 1
    lines = [sample for family in REGISTRY.collect() for sample in family.samples if "saltern" in sample.name]
    assert {line.name for line in lines if line.name.endswith("_total")} == {
        f"vllm:saltern_{name}_total" for name in (*FIELDS, *(f"disk_{name}" for name in DISK_FIELDS), "requests")
    }
    assert {line.labels.get("direction") for line in lines} == {"load", "store", None}
    assert REGISTRY.get_sample_value("vllm:saltern_disk_misses_total", {"engine": "0"}) == 1
    assert {line.labels["salt"] for line in lines if "requests" in line.name} == {
        "signed", "unsigned", "bad_signature", "bad_mark",
    }  # fmt: skip
    assert REGISTRY.get_sample_value("vllm:saltern_requests_total", {"engine": "0", "salt": "signed"}) == 2
