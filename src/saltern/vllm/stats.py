"""Statistics in vLLM's own log and `/metrics`: what the workers moved, how long it took, what failed, who signed, who
waited for the disk.

Labels are vLLM's own, a direction and what a salt was; nothing that a request carries becomes one, so a client can't
make lines.
"""

from dataclasses import asdict, dataclass
from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from saltern.vllm.copier import Finished
from saltern.vllm.layout import Layout
from saltern.vllm.names import SaltCounts
from saltern.vllm.planner import DiskCounts

FIELDS = {
    "copies": "Copies between the engine's KV cache and Saltern's arena, per rank.",
    "failed": "Copies that failed; their blocks are recomputed, or not stored.",
    "bytes": "Bytes copied.",
    "seconds": "Seconds that copies took.",
}
DIRECTIONS = ("load", "store")
DISK_FIELDS = {
    "loads": "Requests that waited for blocks from the cache's disk, and got them.",
    "blocks": "Blocks that they waited for.",
    "seconds": "Seconds that they waited, all together.",
    "misses": "Requests that computed what the disk would have brought too late.",
}
REQUESTS = "Requests that could be cached, by what their salt was: signed by the middleware, or not, or so it seemed."


@dataclass
class SalternStats(KVConnectorStats):
    """Sums since the last step: `data` is ``{"load": {"copies": …, …}, "store": …, "salts": …, "disk": …}``."""

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        """Start from nothing."""
        self.data = {direction: dict.fromkeys(FIELDS, 0.0) for direction in DIRECTIONS}
        self.data["salts"] = asdict(SaltCounts())
        self.data["disk"] = asdict(DiskCounts())

    def add(self, finished: Finished, layout: Layout) -> None:
        """Count one copy of one rank; a failed one moved nothing that counts."""
        sums = self.data["store" if finished.is_store else "load"]
        sums["copies"] += 1
        sums["failed"] += finished.is_failed
        if not finished.is_failed:
            sums["bytes"] += sum(map(layout.piece_bytes, finished.copy.pieces))
            sums["seconds"] += finished.seconds

    def add_salts(self, salts: SaltCounts) -> None:
        """Count requests by their salts; the scheduler does, and no rank."""
        for name, count in asdict(salts).items():
            self.data["salts"][name] += count

    def add_disk(self, disk: DiskCounts) -> None:
        """Count loads from the server's disk; the scheduler does, and no rank."""
        for name, count in asdict(disk).items():
            self.data["disk"][name] += count

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another rank's, or another step's."""
        for kind, sums in self.data.items():
            for name in sums:
                sums[name] += other.data[kind][name]
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return what vLLM's log shows of an interval."""
        shown: dict[str, int | float] = {}
        for direction in DIRECTIONS:
            sums = self.data[direction]
            shown[f"saltern {direction}s"] = int(sums["copies"])
            shown[f"{direction}s failed"] = int(sums["failed"])
            shown[f"{direction} MB"] = round(sums["bytes"] / 1e6, 1)
            shown[f"{direction} GB/s"] = round(sums["bytes"] / sums["seconds"] / 1e9, 2) if sums["seconds"] else 0.0
        disk = self.data["disk"]
        shown |= {f"disk {name}": round(disk[name], 3) for name in DISK_FIELDS}
        return shown | {f"{name.replace('_', ' ')} salts": int(count) for name, count in self.data["salts"].items()}

    def is_empty(self) -> bool:
        """Return whether nothing was copied, and nobody counted."""
        return not any(self.data[direction]["copies"] for direction in DIRECTIONS) and not any(
            count for kind in ("salts", "disk") for count in self.data[kind].values()
        )


class SalternPromMetrics(KVConnectorPromMetrics):
    """Counters `vllm:saltern_*_total`, one a direction and engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counter_by_name = {
            name: metric_types[Counter](
                name=f"vllm:saltern_{name}", documentation=text, labelnames=[*labelnames, "direction"]
            )
            for name, text in FIELDS.items()
        }
        self._disk_counter_by_name = {
            name: metric_types[Counter](name=f"vllm:saltern_disk_{name}", documentation=text, labelnames=labelnames)
            for name, text in DISK_FIELDS.items()
        }
        self._requests = metric_types[Counter](
            name="vllm:saltern_requests", documentation=REQUESTS, labelnames=[*labelnames, "salt"]
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what an engine's workers have summed."""
        labels = self.per_engine_labelvalues[engine_idx]
        for direction in DIRECTIONS:
            for name, counter in self._counter_by_name.items():
                counter.labels(*labels, direction).inc(transfer_stats_data[direction][name])
        for name, counter in self._disk_counter_by_name.items():
            counter.labels(*labels).inc(transfer_stats_data["disk"][name])
        for salt, count in transfer_stats_data["salts"].items():
            self._requests.labels(*labels, salt).inc(count)
