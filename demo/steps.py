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
from msgspec.structs import replace

from demo.engine import Completion, Engine, EngineError, RequestError
from demo.front import ALICE, BOB, DAVE, ERIN, EVE, MALLORY, Front, User
from demo.model import KV_BYTES_PER_TOKEN, room_for
from demo.prompts import FLOOD, MESSAGE, OTHER_STORIES, STORY, SYSTEM_PROMPT
from demo.server import Server, ServerError
from saltern.audit import Line
from saltern.client.sockets import ConnectionLost
from saltern.core.snapshot import Counts, Snapshot, TenantStats
from saltern.sizes import format_size

MAX_TOKENS = 16
SAMPLE_SECONDS = 0.01
REATTACH_SECONDS_MAX = 30.0
SETTLE_SECONDS_MAX = 30.0

GUARANTEE = room_for(25)  # alice's prompt, hers and bob's, has 16; it also says how much may be read at one time
FLOODER_GUARANTEE = room_for(6)
FLOODER_WEIGHT = 32  # it may borrow so much that without a guarantee everybody else would have to give way
PUBLIC_GUARANTEE = room_for(4)


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a step. The tokens, time and output are those of the request that the step is about.

    `identical` compares the outputs of all the step's requests with the cold ones; None where there was no answer.
    `problems` say what was not as it must be, `notes` what else is worth a look.
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
    notes: tuple[str, ...] = ()


class Client(msgspec.Struct, frozen=True):
    """Who sends a request: what is sent along, and by which salt and tenant the cache then knows it."""

    sent_salt: str | None
    salt: str
    tenant: str = "default"
    key: str | None = None


class Findings:
    """What a step has seen so far."""

    def __init__(self) -> None:
        self.shown: Completion | None = None
        self.identical: bool | None = None
        self.problems: list[str] = []
        self.details: dict[str, float] = {}
        self.notes: list[str] = []

    def expect(self, holds: bool, otherwise: str) -> None:
        """Note a problem unless something holds."""
        if not holds:
            self.problems.append(otherwise)


class Scene:
    """The server, the engine, later the one behind the middleware, and the users who send requests."""

    def __init__(self, server: Server, engine: Engine, front: Front) -> None:
        self.server = server
        self.engine = engine
        self.front = front
        self._cold_by_prompt: dict[str, Completion] = {}

    def alice_cold(self, findings: Findings) -> None:
        """Alice's prompt is computed, stored and kept as what all others are compared with."""
        self._expect_computed_and_stored(findings, unsigned("alice"))

    def alice_hit(self, findings: Findings) -> None:
        """Alice gets every full block of her prompt from the cache."""
        self._expect_hit(findings, unsigned("alice"))

    def bob_isolated(self, findings: Findings) -> None:
        """Bob's same prompt is computed, though alice has it in the cache."""
        self._expect_computed_and_stored(findings, unsigned("bob"))

    def unsalted_isolated(self, findings: Findings) -> None:
        """A request without a salt is one more user, who gets nobody's blocks."""
        self._expect_computed_and_stored(findings, unsigned(None))

    def engine_restarted(self, findings: Findings) -> None:
        """The very first request that alice sends to a new engine is a hit."""
        self.engine.stop()
        began = time.monotonic()
        self.engine.start()
        findings.details["engine_start_seconds"] = time.monotonic() - began
        self._expect_hit(findings, unsigned("alice"))

    def user_limit(self, findings: Findings) -> None:
        """Carol stores more than a user may hold: she pays with her own oldest blocks, and alice with none."""
        before = self.server.stats()
        alice_before = self.server.user(before, "alice")
        limit_bytes = before.tenants[0].user_limit_bytes
        assert limit_bytes is not None, "the demo's server has a user_limit"

        offered_blocks = 0
        with sampled(self.server) as samples:
            for prompt in OTHER_STORIES:
                completion = self._send(findings, prompt, unsigned("carol"))
                offered_blocks += self._blocks(completion)
                blocks = min(offered_blocks, limit_bytes // self._block_room_bytes())
                self.server.wait_for_blocks("carol", blocks)
            again = self._send(findings, OTHER_STORIES[-1], unsigned("carol"))

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
        self._expect_hit(findings, unsigned("alice"))

    def server_killed(self, findings: Findings) -> None:
        """The server is killed while a request is under way: it and those after it are answered as ever."""
        asked = self._counts().acquires
        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(self.engine.complete, STORY, salt="alice", max_tokens=MAX_TOKENS)
            self.server.wait_for("alice's request", lambda snapshot: snapshot.tenants[0].counts.acquires > asked)
            self.server.kill()
        self._compare(findings, STORY, under_way.result())
        first = self._send(findings, STORY, unsigned("alice"))
        second = self._send(findings, STORY, unsigned("alice"))
        findings.shown = first
        findings.details["added_wait_ms"] = first.ttft_ms - second.ttft_ms
        findings.details["cached_tokens_under_way"] = under_way.result().cached_tokens
        for completion in (first, second):
            findings.expect(not completion.cached_tokens, f"{completion.cached_tokens} tokens came from a dead server")

    def server_back(self, findings: Findings) -> None:
        """The engine finds the new server by itself, and what the one that was killed has stored is on its disk."""
        self.server.start()
        began = time.monotonic()
        self._wait_until_reattached(unsigned("alice"))
        findings.details["reattached_after_seconds"] = time.monotonic() - began
        self._expect_hit_from_disk(findings, unsigned("alice"))

    def flood_unharmed(self, findings: Findings) -> None:
        """Mallory's tenant stores far more than the whole cache holds: it takes what is lent, and alice still hits."""
        self._pass_to_front()
        self.server.set_tenant("acme", "--guarantee", GUARANTEE)
        self.server.set_tenant("umbrella", "--guarantee", FLOODER_GUARANTEE, "--weight", str(FLOODER_WEIGHT))
        alice, mallory = self._signed(ALICE), self._signed(MALLORY)
        cold = self._send(findings, STORY, alice)
        arena = self.server.wait_for_blocks(alice.salt, self._blocks(cold)).arena
        before = self._tenant("umbrella").counts

        offered_blocks = 0
        with sampled(self.server) as samples:
            for prompt in FLOOD:
                completion = self.front.engine.complete(prompt, key=mallory.key, max_tokens=1)
                offered_blocks += self._blocks(completion)
            self.server.wait_for("the end of the flood", lambda snapshot: not snapshot.arena.writing_blocks)

        flooder = self._tenant("umbrella")
        alices = {self.server.user(sample, alice.salt).blocks for sample in (*samples, self.server.stats())}
        offered_bytes = offered_blocks * self._block_room_bytes()
        evicted = flooder.counts.evicted - before.evicted
        findings.details |= {
            "arena_bytes": arena.total_bytes,
            "offered_bytes": offered_bytes,
            "flooder_bytes": flooder.used_bytes,
            "flooder_guarantee_bytes": flooder.guarantee_bytes,
            "flooder_evicted_blocks": evicted,
            "cold_ttft_ms": cold.ttft_ms,
            "samples": len(samples),
        }
        findings.expect(
            offered_bytes > 3 * arena.total_bytes // 2, f"the flood was {offered_bytes} of {arena.total_bytes} bytes"
        )
        findings.expect(evicted > 0, "the flooder's own oldest blocks did not have to go")
        findings.expect(
            flooder.used_bytes > 2 * flooder.guarantee_bytes,
            f"the flooder borrowed nothing: {flooder.used_bytes} bytes",
        )
        findings.expect(alices == {self._blocks(cold)}, f"alice had {alices} of her {self._blocks(cold)} blocks")
        self._expect_hit(findings, alice)

    def public_prefix(self, findings: Findings) -> None:
        """Once a system prompt is published, the first chat of a user who never came before begins with a hit."""
        self._pass_to_front()
        earlier = self._chat(findings, self._signed(ERIN))
        self.server.set_tenant("public", "--guarantee", PUBLIC_GUARANTEE)
        publication = self.front.publish(SYSTEM_PROMPT)
        dave = self._signed(DAVE)
        newcomer = self.server.user(self.server.stats(), dave.salt)
        before = self._counts(dave.tenant)
        findings.shown = completion = self._chat(findings, dave)
        hits = self._counts(dave.tenant).public_blocks - before.public_blocks

        expected, cached = publication.blocks * self._block_tokens(), completion.cached_tokens
        findings.details |= {"published_blocks": publication.blocks, "cold_ttft_ms": earlier.ttft_ms}
        findings.expect(publication.blocks > 0, "nothing was published")
        findings.expect(not earlier.cached_tokens, f"erin's chat had {earlier.cached_tokens} tokens before it was")
        findings.expect(not newcomer.blocks, f"dave was there before, with {newcomer.blocks} blocks")
        findings.expect(cached == expected, f"{cached} tokens came from the cache, where {expected} are published")
        findings.expect(hits == publication.blocks, f"the server counted {hits} published blocks as hits")

    def forged_salt_refused(self, findings: Findings) -> None:
        """Others send alice's salt, signed or not, with keys of their own: they are who their keys say they are."""
        self._pass_to_front()
        self._expect_hit(findings, self._signed(ALICE))
        for user, forged in ((BOB, self.front.salt(ALICE)), (EVE, "alice")):
            self._expect_computed_and_stored(findings, replace(self._signed(user), sent_salt=forged))
        asked = self._asked()
        for key in (None, "sk-saltern-" + "A" * 43):
            self._expect_unknown(findings, key)
        findings.expect(self._asked() == asked, "a request without a valid key came as far as the cache")

    def server_restarted(self, findings: Findings) -> None:
        """The server ends and starts in good order; users and what was set for tenants are as they were."""
        self._pass_to_front()
        alice = self._signed(ALICE)
        before = self._tenant(alice.tenant)
        self.server.stop()
        began = time.monotonic()
        self.server.start()
        findings.details["server_start_seconds"] = time.monotonic() - began
        self._wait_until_reattached(alice)
        self._expect_hit_from_disk(findings, alice)
        after = self._tenant(alice.tenant)
        findings.details["guarantee_bytes"] = after.guarantee_bytes
        findings.expect(before.guarantee_bytes > 0, "nothing was guaranteed to alice's tenant")
        findings.expect(
            after.guarantee_bytes == before.guarantee_bytes,
            f"alice's tenant is guaranteed {after.guarantee_bytes} bytes, and had {before.guarantee_bytes}",
        )

    def erased(self, findings: Findings) -> None:
        """Alice is erased by her name: nothing of hers is found or stored, bob has his, and she may begin anew."""
        self._pass_to_front()
        alice, bob = self._signed(ALICE), self._signed(BOB)
        for client in (alice, bob):
            self._send_until_stored(findings, client)
        receipt = self.front.erase(ALICE)
        first = self._send(findings, STORY, alice)
        findings.notes += [_in_words(receipt), f"saltern audit-log verify: {self.front.verify(receipt)}"]
        self._expect_hit(findings, bob)
        anew = self._signed(ALICE)
        self._send_until_stored(findings, anew)
        self._expect_hit(findings, anew)
        findings.shown = first

        left = self.server.user(self.server.stats(), alice.salt).blocks
        erased = {name: int(str(receipt.details[name])) for name in ("ram_bytes", "disk_bytes")}
        findings.details |= {f"erased_{name}": count for name, count in erased.items()}
        findings.expect(min(erased.values()) > 0, f"not all was erased: {receipt.text}")
        findings.expect(not first.cached_tokens, f"{first.cached_tokens} tokens of alice's were found after all")
        findings.expect(not left, f"{left} blocks are stored for who alice was")
        findings.expect(anew.salt != alice.salt, "alice's requests are still signed as those of who was erased")

    # What the steps have in common

    def _pass_to_front(self) -> None:
        """End the engine that believes whatever salt it is sent, and start the one behind the middleware."""
        self.engine.stop()
        if not self.front.engine.is_started:
            self.front.start()

    def _signed(self, user: User) -> Client:
        return Client(None, self.front.salt(user), user.tenant, self.front.key(user))

    def _expect_unknown(self, findings: Findings, key: str | None) -> None:
        try:
            completion = self.front.engine.complete(STORY, salt=self.front.salt(ALICE), key=key, max_tokens=MAX_TOKENS)
        except RequestError as error:
            findings.expect(error.status == 401, str(error))
        else:
            findings.problems.append(f"without a valid key the answer was {completion.text!r}")

    def _expect_computed_and_stored(self, findings: Findings, client: Client) -> Completion:
        before = self._counts(client.tenant)
        findings.shown = completion = self._send(findings, STORY, client)
        after = self._counts(client.tenant)
        cached, hits = completion.cached_tokens, after.hit_blocks - before.hit_blocks
        findings.expect(not cached, f"{cached} tokens came from a cache, where none was expected")
        findings.expect(not hits, f"the server counted {hits} blocks as hits, where none was expected")
        findings.expect(after.missed_blocks > before.missed_blocks, "the server was not even asked")
        self.server.wait_for_blocks(client.salt, self._blocks(completion))
        return completion

    def _expect_hit(self, findings: Findings, client: Client) -> None:
        before = self._counts(client.tenant)
        findings.shown = completion = self._send(findings, STORY, client)
        hits = self._counts(client.tenant).hit_blocks - before.hit_blocks
        blocks = self._blocks(completion)
        expected, cached = blocks * self._block_tokens(), completion.cached_tokens
        findings.expect(cached >= expected, f"{cached} tokens came from the cache, where {expected} were expected")
        findings.expect(hits >= blocks, f"the server counted {hits} blocks as hits, where {blocks} were expected")

    def _expect_hit_from_disk(self, findings: Findings, client: Client) -> None:
        """Expect what a server that was just started can have from nowhere else."""
        before = self._counts(client.tenant).disk_loaded
        self._expect_hit(findings, client)
        loaded = self._counts(client.tenant).disk_loaded - before
        blocks = self._blocks(findings.shown) if findings.shown else 0
        findings.details["loaded_blocks"] = loaded
        findings.expect(
            loaded >= blocks, f"the server read {loaded} blocks from its disk, where {blocks} were expected"
        )

    def _send_until_stored(self, findings: Findings, client: Client) -> None:
        """Send the prompt until it is stored: the middleware looks no more than once a second who somebody is now."""
        deadline = time.monotonic() + SETTLE_SECONDS_MAX
        while not self.server.user(self.server.stats(), client.salt).blocks:
            if time.monotonic() > deadline:
                raise ServerError(f"nothing was stored for {client.salt!r} in {SETTLE_SECONDS_MAX:.0f} s")
            self._send(findings, STORY, client)
        self.server.wait_for_blocks(client.salt, self._blocks(self._cold_by_prompt[STORY]))

    def _send(self, findings: Findings, prompt: str, client: Client) -> Completion:
        completion = self._complete(prompt, client, max_tokens=MAX_TOKENS)
        self._compare(findings, prompt, completion)
        return completion

    def _complete(self, prompt: str, client: Client, *, max_tokens: int) -> Completion:
        engine = self.engine if client.key is None else self.front.engine
        return engine.complete(prompt, salt=client.sent_salt, key=client.key, max_tokens=max_tokens)

    def _chat(self, findings: Findings, client: Client) -> Completion:
        completion = self.front.engine.chat(SYSTEM_PROMPT, MESSAGE, key=client.key, max_tokens=MAX_TOKENS)
        self._compare(findings, SYSTEM_PROMPT + MESSAGE, completion)
        return completion

    def _compare(self, findings: Findings, prompt: str, completion: Completion) -> None:
        """Compare with the first completion of this prompt, which was computed cold."""
        cold = self._cold_by_prompt.setdefault(prompt, completion)
        is_identical = bool(completion.token_ids) and completion.token_ids == cold.token_ids
        findings.identical = is_identical and findings.identical is not False
        findings.expect(is_identical, f"the output was {completion.text!r}, and cold it was {cold.text!r}")

    def _wait_until_reattached(self, client: Client) -> None:
        """Wait until the engine has a session with the new server.

        An idle engine does nothing, not even look for a server: a client's prompts of less than a block, of which
        nothing is stored, keep it going.
        """
        deadline = time.monotonic() + REATTACH_SECONDS_MAX
        while not any(session.state == "open" for session in self.server.stats().sessions):
            if time.monotonic() > deadline:
                raise ServerError(f"the engine had not come back {REATTACH_SECONDS_MAX:.0f} s after the server")
            self._complete("Good morning", client, max_tokens=1)

    def _tenant(self, name: str) -> TenantStats:
        """Return what the server says of a tenant. One that never stored anything is unknown to it."""
        tenants = (tenant for tenant in self.server.stats().tenants if tenant.tenant == name)
        return next(tenants, TenantStats(name, 0, 0, None, None, Counts(), (), 0))

    def _counts(self, tenant: str = "default") -> Counts:
        return self._tenant(tenant).counts

    def _asked(self) -> int:
        """Return how often the cache has been asked, by whomever."""
        return sum(tenant.counts.acquires for tenant in self.server.stats().tenants)

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


def _in_words(receipt: Line) -> str:
    """Return the main lines of an erasure's receipt."""
    said = receipt.details
    ram, disk = (format_size(int(str(said[name]))) for name in ("ram_bytes", "disk_bytes"))
    return (
        f"receipt: line {receipt.serial} of the audit log, {receipt.time[:19]}: {ram} in memory and {disk} on disk,"
        f" {said['keys_destroyed']} data key destroyed"
    )


def unsigned(salt: str | None) -> Client:
    """Return who sends this salt, or none, to an engine that believes it."""
    return Client(salt, salt or "")


Act = Callable[[Scene, Findings], None]

STEPS: dict[str, tuple[str, Act]] = {
    "alice-cold": ("alice sends a prompt for the first time", Scene.alice_cold),
    "alice-hit": ("alice sends it again", Scene.alice_hit),
    "bob-isolated": ("bob sends the same prompt", Scene.bob_isolated),
    "unsalted-isolated": ("somebody without a salt sends the same prompt", Scene.unsalted_isolated),
    "engine-restarted": ("vLLM is started anew, alice's is its first request", Scene.engine_restarted),
    "user-limit": ("carol stores too much, then alice sends hers again", Scene.user_limit),
    "server-killed": ("the server is killed while alice waits; she goes on", Scene.server_killed),
    "server-back": ("the server is back; alice's comes from its disk", Scene.server_back),
    "flood-unharmed": ("mallory floods the cache; alice sends hers again", Scene.flood_unharmed),
    "public-prefix": ("a system prompt is published; a new user's first chat", Scene.public_prefix),
    "forged-salt-refused": ("others send alice's salt, with keys of their own", Scene.forged_salt_refused),
    "server-restarted": ("the server is restarted; alice's comes from disk", Scene.server_restarted),
    "erased": ("alice is erased, by her name; she sends hers again", Scene.erased),
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
        notes=tuple(findings.notes),
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
