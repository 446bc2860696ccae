"""The worker's side: one rank's lifeline and copier, and what it reports back."""

import os
from collections.abc import Mapping
from typing import Any, Protocol

from saltern.client.lifeline import Lifeline
from saltern.core.messages import NAME_BYTES
from saltern.vllm.copier import Finished, Shard
from saltern.vllm.copies import Copies, Copy, Reports
from saltern.vllm.layout import Layout


class Copier(Protocol):
    """What moves bytes: `CpuCopier` here, or the one for CUDA."""

    def submit(self, copy: Copy, shard: Shard, *, is_store: bool) -> None:
        """Begin a copy."""

    def finished(self) -> "list[Finished]":
        """Return the copies that ended since the last call."""

    def close(self) -> None:
        """Wait for the copies under way."""


class Worker:
    """One rank. `name` is how its scheduler's session knows it."""

    def __init__(self, *, rank: int, layout: Layout, facts: Mapping[str, Any]) -> None:
        self.name = os.urandom(NAME_BYTES)
        self.rank = rank
        self.layout = layout
        self.facts = facts
        self._lifeline: Lifeline | None = None
        self._copier: Copier | None = None
        self._reports = Reports()
        self._bad_blocks: set[int] = set()
        self._finished: list[Finished] = []  # for statistics

    def attach(self, lifeline: Lifeline, copier: Copier) -> None:
        """Begin to connect."""
        self._lifeline, self._copier = lifeline, copier
        lifeline.start()

    def start(self, copies: Copies, shards: tuple[Shard, ...]) -> None:
        """Begin what the scheduler asks of this step."""
        assert self._copier is not None, "copies before the KV caches are registered"
        for copy in copies.loads:
            self._copier.submit(copy, shards[self.rank], is_store=False)
        for copy in copies.stores:
            if shards[self.rank].is_writer:
                self._copier.submit(copy, shards[self.rank], is_store=True)
            else:  # another rank writes the same bytes to the same place
                self._reports.add(Reports(done={copy.op_id: 1}))

    def collect_loaded(self) -> tuple[set[str], set[str]]:
        """Take in the copies that ended; return the requests whose load is over, and which of them failed."""
        loaded: set[str] = set()
        failed: set[str] = set()
        for finished in self._copier.finished() if self._copier else ():
            self._finished.append(finished)
            copy, ended = finished.copy, {finished.copy.op_id: 1}
            self._reports.add(
                Reports(
                    done={} if finished.is_failed else ended,
                    failed=ended if finished.is_failed else {},
                    untouched=ended if finished.is_untouched else {},
                )
            )
            if not finished.is_store:
                loaded.add(copy.request_id)
                if finished.is_failed:
                    failed.add(copy.request_id)
                    self._bad_blocks.update(block for piece in copy.pieces for block in piece.engine_blocks)
        return loaded, failed

    def take_bad_blocks(self) -> set[int]:
        """Return the engine blocks that could not be loaded since the last call."""
        bad_blocks, self._bad_blocks = self._bad_blocks, set()
        return bad_blocks

    def take_reports(self) -> Reports | None:
        """Return what has ended since the last call, None if nothing."""
        reports, self._reports = self._reports, Reports()
        return reports or None

    def take_finished(self) -> list[Finished]:
        """Return every copy that ended since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def close(self) -> None:
        """End the copies, then the connection."""
        if self._copier is not None:
            self._copier.close()
        if self._lifeline is not None:
            self._lifeline.close()
