"""The steps of the demo: what is done in each, and what must then be true.

Every step judges by three witnesses: vLLM's count of cached tokens, the server's own counts, and the output, which must
be that of the same prompt computed cold.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import msgspec

from demo.engine import Completion, Engine, EngineError, RequestError
from demo.model import KV_BYTES_PER_TOKEN
from demo.prompts import OTHER_STORIES, STORY
from demo.server import Server, ServerError
from saltern.client.sockets import ConnectionLost
from saltern.core.snapshot import Counts, Snapshot

MAX_TOKENS = 16
SAMPLE_SECONDS = 0.01
REATTACH_SECONDS_MAX = 30.0


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a step. The tokens, time and output are those of the request that the step is about.

    `identical` compares the outputs of all the step's requests with the cold ones; None where there was no answer.
    `problems` say what was not as it must be.
    """

    name: str
    ok: bool
    did: str
    prompt_tokens: int | None
    cached_tokens: int | None
    ttft_ms: float | None
    identical: bool | None
    problems: tuple[str, ...]
    details: dict[str, float]


class Findings:
    """What a step has seen so far."""

    def __init__(self) -> None:
        self.shown: Completion | None = None
        self.identical: bool | None = None
        self.problems: list[str] = []
        self.details: dict[str, float] = {}

    def expect(self, holds: bool, otherwise: str) -> None:
        """Note a problem unless something holds."""
        if not holds:
            self.problems.append(otherwise)


class Scene:
    """The server, the engine, and the users who send requests. `say` is told what goes on within a step."""

    def __init__(self, server: Server, engine: Engine) -> None:
        self.server = server
        self.engine = engine
        self._cold_by_prompt: dict[str, Completion] = {}

    def alice_cold(self, findings: Findings) -> None:
        """Alice's prompt is computed, stored and kept as what all others are compared with."""
        self._expect_computed_and_stored(findings, salt="alice")

    def alice_hit(self, findings: Findings) -> None:
        """Alice gets every full block of her prompt from the cache."""
        self._expect_hit(findings, salt="alice")

    def bob_isolated(self, findings: Findings) -> None:
        """Bob's same prompt is computed, though alice has it in the cache."""
        self._expect_computed_and_stored(findings, salt="bob")

    def unsalted_isolated(self, findings: Findings) -> None:
        """A request without a salt is one more user, who gets nobody's blocks."""
        self._expect_computed_and_stored(findings, salt=None)

    def engine_restarted(self, findings: Findings) -> None:
        """The very first request that alice sends to a new engine is a hit."""
        self.engine.stop()
        began = time.monotonic()
        self.engine.start()
        findings.details["engine_start_seconds"] = time.monotonic() - began
        self._expect_hit(findings, salt="alice")

    def user_limit(self, findings: Findings) -> None:
        """Carol stores more than a user may hold: she pays with her own oldest blocks, and alice with none."""
        before = self.server.stats()
        alice_before = self.server.user(before, "alice")
        limit_bytes = before.tenants[0].user_limit_bytes
        assert limit_bytes is not None, "the demo's server has a user_limit"

        offered_blocks = 0
        with sampled(self.server) as samples:
            for prompt in OTHER_STORIES:
                completion = self._send(findings, prompt, salt="carol")
                offered_blocks += self._blocks(completion)
                blocks = min(offered_blocks, limit_bytes // self._block_room_bytes())
                self.server.wait_for_blocks("carol", blocks)
            again = self._send(findings, OTHER_STORIES[-1], salt="carol")

        after = self.server.stats()
        carol_bytes = [self.server.user(sample, "carol").used_bytes for sample in (*samples, after)]
        alices = {self.server.user(sample, "alice") for sample in (*samples, after)}
        evicted = after.tenants[0].counts.evicted - before.tenants[0].counts.evicted
        offered_bytes = offered_blocks * self._block_room_bytes()
        findings.details |= {
            "user_limit_bytes": limit_bytes,
            "offered_bytes": offered_bytes,
            "used_bytes_max": max(carol_bytes),
            "evicted_blocks": evicted,
            "samples": len(samples),
        }
        findings.expect(
            offered_bytes > limit_bytes, f"carol offered only {offered_bytes} bytes, no more than the limit"
        )
        findings.expect(max(carol_bytes) <= limit_bytes, f"carol held {max(carol_bytes)} of {limit_bytes} bytes")
        findings.expect(carol_bytes[-1] > 0, "carol holds nothing")
        findings.expect(evicted > 0, "the server counted no eviction")
        findings.expect(alices == {alice_before}, f"alice's blocks were not left alone: {alices} after {alice_before}")
        findings.expect(again.cached_tokens > 0, "carol's newest prompt was not in the cache")
        self._expect_hit(findings, salt="alice")

    def server_killed(self, findings: Findings) -> None:
        """The server is killed while a request is under way: it and those after it are answered as ever."""
        asked = self._counts().acquires
        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(self.engine.complete, STORY, salt="alice", max_tokens=MAX_TOKENS)
            self.server.wait_for("alice's request", lambda snapshot: snapshot.tenants[0].counts.acquires > asked)
            self.server.kill()
        self._compare(findings, STORY, under_way.result())
        first = self._send(findings, STORY, salt="alice")
        second = self._send(findings, STORY, salt="alice")
        findings.shown = first
        findings.details["added_wait_ms"] = first.ttft_ms - second.ttft_ms
        findings.details["cached_tokens_under_way"] = under_way.result().cached_tokens
        for completion in (first, second):
            findings.expect(not completion.cached_tokens, f"{completion.cached_tokens} tokens came from a dead server")

    def server_back(self, findings: Findings) -> None:
        """The engine finds the new server by itself; alice is computed and stored again, and hits again."""
        self.server.start()
        began = time.monotonic()
        self._wait_until_reattached()
        findings.details["reattached_after_seconds"] = time.monotonic() - began
        cold = self._expect_computed_and_stored(findings, salt="alice")
        findings.details["cold_ttft_ms"] = cold.ttft_ms
        self._expect_hit(findings, salt="alice")

    # What the steps have in common

    def _expect_computed_and_stored(self, findings: Findings, *, salt: str | None) -> Completion:
        before = self._counts()
        findings.shown = completion = self._send(findings, STORY, salt=salt)
        after = self._counts()
        cached, hits = completion.cached_tokens, after.hit_blocks - before.hit_blocks
        findings.expect(not cached, f"{cached} tokens came from a cache, where none was expected")
        findings.expect(not hits, f"the server counted {hits} blocks as hits, where none was expected")
        findings.expect(after.missed_blocks > before.missed_blocks, "the server was not even asked")
        self.server.wait_for_blocks(salt or "", self._blocks(completion))
        return completion

    def _expect_hit(self, findings: Findings, *, salt: str) -> None:
        before = self._counts()
        findings.shown = completion = self._send(findings, STORY, salt=salt)
        hits = self._counts().hit_blocks - before.hit_blocks
        blocks = self._blocks(completion)
        expected, cached = blocks * self._block_tokens(), completion.cached_tokens
        findings.expect(cached >= expected, f"{cached} tokens came from the cache, where {expected} were expected")
        findings.expect(hits >= blocks, f"the server counted {hits} blocks as hits, where {blocks} were expected")

    def _send(self, findings: Findings, prompt: str, *, salt: str | None) -> Completion:
        completion = self.engine.complete(prompt, salt=salt, max_tokens=MAX_TOKENS)
        self._compare(findings, prompt, completion)
        return completion

    def _compare(self, findings: Findings, prompt: str, completion: Completion) -> None:
        """Compare with the first completion of this prompt, which was computed cold."""
        cold = self._cold_by_prompt.setdefault(prompt, completion)
        is_identical = bool(completion.token_ids) and completion.token_ids == cold.token_ids
        findings.identical = is_identical and findings.identical is not False
        findings.expect(is_identical, f"the output was {completion.text!r}, and cold it was {cold.text!r}")

    def _wait_until_reattached(self) -> None:
        """Wait until the engine has a session with the new server.

        An idle engine does nothing, not even look for a server: prompts of less than a block, of which nothing is
        stored, keep it going.
        """
        deadline = time.monotonic() + REATTACH_SECONDS_MAX
        while not any(session.state == "open" for session in self.server.stats().sessions):
            if time.monotonic() > deadline:
                raise ServerError(f"the engine had not come back {REATTACH_SECONDS_MAX:.0f} s after the server")
            self.engine.complete("Good morning", salt="alice", max_tokens=1)

    def _counts(self) -> Counts:
        return self.server.stats().tenants[0].counts

    def _block_tokens(self) -> int:
        return self.server.stats().sessions[0].block_bytes // KV_BYTES_PER_TOKEN

    def _block_room_bytes(self) -> int:
        """Return what a block is charged: whole pages."""
        snapshot = self.server.stats()
        page_bytes = snapshot.arena.page_bytes
        return -(-snapshot.sessions[0].block_bytes // page_bytes) * page_bytes

    def _blocks(self, completion: Completion) -> int:
        """Return how many full blocks a completion's prompt has."""
        return completion.prompt_tokens // self._block_tokens()


Act = Callable[[Scene, Findings], None]

STEPS: dict[str, tuple[str, Act]] = {
    "alice-cold": ("alice sends a prompt for the first time", Scene.alice_cold),
    "alice-hit": ("alice sends it again", Scene.alice_hit),
    "bob-isolated": ("bob sends the same prompt", Scene.bob_isolated),
    "unsalted-isolated": ("somebody without a salt sends the same prompt", Scene.unsalted_isolated),
    "engine-restarted": ("vLLM is started anew, alice's is its first request", Scene.engine_restarted),
    "user-limit": ("carol stores too much, then alice sends hers again", Scene.user_limit),
    "server-killed": ("the server is killed while alice waits; she goes on", Scene.server_killed),
    "server-back": ("the server is back; alice stores hers, and hits it", Scene.server_back),
}


def take_step(scene: Scene, name: str) -> Step:
    """Do one step and judge it. An engine or server that fails is a failed step."""
    did, act = STEPS[name]
    findings = Findings()
    try:
        act(scene, findings)
    except (EngineError, RequestError, ServerError, ConnectionLost) as error:
        findings.problems.append(str(error))
    shown = findings.shown
    return Step(
        name=name,
        ok=not findings.problems,
        did=did,
        prompt_tokens=shown.prompt_tokens if shown else None,
        cached_tokens=shown.cached_tokens if shown else None,
        ttft_ms=round(shown.ttft_ms, 1) if shown else None,
        identical=findings.identical,
        problems=tuple(findings.problems),
        details=findings.details,
    )


def not_reached(name: str) -> Step:
    """Return the step of a demo that could not even begin."""
    return Step(
        name=name,
        ok=False,
        did=STEPS[name][0],
        prompt_tokens=None,
        cached_tokens=None,
        ttft_ms=None,
        identical=None,
        problems=("not reached: the server or the engine did not start",),
        details={},
    )


@contextmanager
def sampled(server: Server) -> Iterator[list[Snapshot]]:
    """Take the server's stats every few milliseconds meanwhile; the list is complete after the block."""
    samples: list[Snapshot] = []
    is_over = threading.Event()

    def sample() -> None:
        while not is_over.is_set():
            samples.append(server.stats())
            is_over.wait(SAMPLE_SECONDS)

    with ThreadPoolExecutor(1) as pool:
        sampling = pool.submit(sample)
        try:
            yield samples
        finally:
            is_over.set()
        sampling.result()  # a server that did not answer has not been watched
