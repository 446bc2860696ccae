"""Statistics in vLLM's own log and `/metrics`: what the workers moved, how long it took, what failed.

Labels are vLLM's own and a direction; nothing that a request carries becomes one, so a client can't make lines.
"""

from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from saltern.vllm.copier import Finished

FIELDS = {
    "copies": "Copies between the engine's KV cache and Saltern's arena, per rank.",
    "failed": "Copies that failed; their blocks are recomputed, or not stored.",
    "bytes": "Bytes copied.",
    "seconds": "Seconds that copies took.",
}


@dataclass
class SalternStats(KVConnectorStats):
    """Sums since the last step: `data` is ``{"load": {"copies": …, "bytes": …, …}, "store": …}``."""

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        """Start from nothing."""
        self.data = {direction: dict.fromkeys(FIELDS, 0.0) for direction in ("load", "store")}

    def add(self, finished: Finished, *, slot_bytes: int) -> None:
        """Count one copy of one rank; a failed one moved nothing that counts."""
        sums = self.data["store" if finished.is_store else "load"]
        sums["copies"] += 1
        sums["failed"] += finished.is_failed
        if not finished.is_failed:
            sums["bytes"] += slot_bytes * sum(len(piece.engine_blocks) for piece in finished.copy.pieces)
            sums["seconds"] += finished.seconds

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another rank's, or another step's."""
        for direction, sums in self.data.items():
            for name in FIELDS:
                sums[name] += other.data[direction][name]
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return what vLLM's log shows of an interval."""
        shown: dict[str, int | float] = {}
        for direction, sums in self.data.items():
            shown[f"saltern {direction}s"] = int(sums["copies"])
            shown[f"{direction}s failed"] = int(sums["failed"])
            shown[f"{direction} MB"] = round(sums["bytes"] / 1e6, 1)
            shown[f"{direction} GB/s"] = round(sums["bytes"] / sums["seconds"] / 1e9, 2) if sums["seconds"] else 0.0
        return shown

    def is_empty(self) -> bool:
        """Return whether nothing was copied."""
        return not any(sums["copies"] for sums in self.data.values())


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

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what an engine's workers have summed."""
        labels = self.per_engine_labelvalues[engine_idx]
        for direction, sums in transfer_stats_data.items():
            for name, counter in self._counter_by_name.items():
                counter.labels(*labels, direction).inc(sums[name])
