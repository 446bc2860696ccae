"""An engine in memory: as much of a scheduler, its block pool and its workers as the planner can tell apart.

KV is not bytes but an `Identity`, the user and the tokens that decide them, so a slot that holds anything but
its own prefix is seen when a request attends to it, when a write is published, and when a load ends. Workers
copy late and in any order: what nobody holds is reused by then.
"""

from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from saltern.core.blocks import BlockState
from saltern.core.effects import SecretsRotated
from saltern.core.keys import Key, block_key, namespace_content, next_content, signed_user_key, unsigned_user_key
from saltern.core.messages import Commit, Request
from saltern.core.tenants import NO_LIMITS, Limits
from saltern.signing import Signed, verify
from saltern.vllm.copier import extent_slices
from saltern.vllm.copies import Copies, Copy, Reports
from saltern.vllm.geometry import Geometry, Group
from saltern.vllm.planner import Planner
from saltern.vllm.session import Session
from saltern.vllm.settings import StoreMode
from tests.vllm.server import Clock, Line, Server

ENGINE_BLOCK_TOKENS = 2
PATIENCE_SECONDS = 0.05
LOAD_PATIENCE_SECONDS = 0.4
STEP_SECONDS = 0.01
NAMESPACE = b"model"
VOCABULARY = 4  # few enough that prefixes meet

Identity = tuple[str, tuple[int, ...], int]
"""What a slot holds: (user, all tokens up to its end, rank)."""


class FakeBlocks:
    """The engine's pool. Its users are requests, local hits and the planner, who is counted apart."""

    def __init__(self, total: int) -> None:
        self._users = [0] * total
        self._free = deque(range(1, total))  # block 0 is vLLM's null block
        self._hashed: dict[int, Identity] = {}  # what vLLM's own prefix cache finds
        self.held: Counter[int] = Counter()
        self.held_max = 0

    @property
    def total(self) -> int:
        """Return how many blocks there are."""
        return len(self._users)

    @property
    def available(self) -> int:
        """Return how many blocks are free."""
        return len(self._free)

    def hold(self, block_ids: Sequence[int]) -> None:
        """Count the planner as a user of blocks that somebody uses."""
        assert all(self._users[block_id] for block_id in block_ids), "held a block that may be another's by now"
        self.share(block_ids)
        self.held.update(block_ids)
        self.held_max = max(self.held_max, self.held.total())

    def free(self, block_ids: Sequence[int]) -> None:
        """Undo a hold."""
        assert all(self.held[block_id] for block_id in block_ids), "freed what was not held"
        self.held.subtract(block_ids)
        self.give_back(block_ids)

    def allocate(self, count: int) -> list[int] | None:
        """Take free blocks for a request; None if there are too few. Those freed last come first, to do most harm."""
        if count > len(self._free):
            return None
        block_ids = [self._free.popleft() for _ in range(count)]
        for block_id in block_ids:
            self._users[block_id] = 1
            self._hashed.pop(block_id, None)
        return block_ids

    def know(self, block_id: int, identity: Identity) -> None:
        """Let a full block be found by others."""
        self._hashed[block_id] = identity

    def find(self, identity: Identity) -> int | None:
        """Return a block that holds this, in use or not."""
        return next((block_id for block_id, held in self._hashed.items() if held == identity), None)

    def share(self, block_ids: Sequence[int]) -> None:
        """Count one more user of blocks."""
        for block_id in block_ids:
            assert block_id, "touched the null block"
            if not self._users[block_id]:
                self._free.remove(block_id)
            self._users[block_id] += 1

    def give_back(self, block_ids: Sequence[int]) -> None:
        """Count one user less."""
        for block_id in block_ids:
            assert self._users[block_id], f"freed block {block_id} twice"
            self._users[block_id] -= 1
            if not self._users[block_id]:
                self._free.appendleft(block_id)


@dataclass(eq=False)
class FakeRequest:
    """A request as vLLM keeps it, live."""

    request_id: str
    salt: str
    all_token_ids: list[Any]
    num_prompt_tokens: int
    outputs_left: int = 1
    num_computed_tokens: int = 0
    num_output_placeholders: int = 0
    block_ids: list[int] = field(default_factory=list)
    is_loading: bool = False
    is_aborted: bool = False
    loaded_from: int = 0  # first engine block of the load under way
    ranks_loaded: int = 0
    ranks_failed: int = 0
    loaded_tokens: int = 0  # so far, of all its loads
    has_failed: bool = False  # one of its loads
    signed: Signed | None = None  # whom the salt stands for, if it was signed when the request came

    @property
    def user(self) -> str:
        """Return what its user is known by: of a signed salt, all but the signature."""
        return self.salt if self.signed is None else self.salt.rpartition(".")[0]

    @property
    def num_tokens(self) -> int:
        """Return how many tokens are known."""
        return len(self.all_token_ids)


@dataclass
class Rank:
    """One worker: what it shall copy, and what it has not yet reported."""

    pending: list[tuple[Copy, bool]] = field(default_factory=list)
    ended: list[tuple[Copy, bool, bool]] = field(default_factory=list)  # (copy, is a store, has failed)
    kv: dict[int, Identity] = field(default_factory=dict)  # by engine block


class Engine:
    """A scheduler's loop around a planner, and the workers behind it."""

    def __init__(
        self,
        *,
        slots: int = 2,
        ranks: int = 1,
        blocks: int = 64,
        pages: int = 256,
        store: StoreMode = StoreMode.PROMPT,
        limits: Limits = NO_LIMITS,
        naming_secret: bytes | None = None,
        signing_secrets: tuple[bytes, ...] = (),
        strict: bool = False,
        local_hits: bool = False,
    ) -> None:
        self.clock = Clock()
        self.ranks = [Rank() for _ in range(ranks)]
        self.slots = slots
        self.block_tokens = slots * ENGINE_BLOCK_TOKENS
        self.server = Server(self.clock, pages=pages, page_bytes=2, ranks=ranks, limits=limits)
        self.rotate(signing_secrets)
        self.server.before_commit = self._check_commit  # type: ignore[method-assign]
        self.session = Session(
            "server.sock",
            engine="engine",
            workers=self.server.workers,
            block_bytes=slots * ranks,  # a slot of one rank is one byte of the model
            clock=self.clock,
            connect=self._connect,
        )
        self.lines: list[Line] = []
        self.blocks = FakeBlocks(blocks)
        self.naming_secret = naming_secret
        self.namespaces = [NAMESPACE]
        self.planner = Planner(
            session=self.session,
            blocks=self.blocks,
            geometry=Geometry(self.block_tokens, (Group(ENGINE_BLOCK_TOKENS),)),
            namespace=NAMESPACE,
            ranks=ranks,
            store=store,
            naming_secret=naming_secret,
            strict=strict,
            patience_seconds=PATIENCE_SECONDS,
            load_patience_seconds=LOAD_PATIENCE_SECONDS,
            clock=self.clock,
        )
        self.waiting: list[FakeRequest] = []
        self.running: list[FakeRequest] = []
        self.finished: list[FakeRequest] = []
        self._loading_after_abort: list[FakeRequest] = []
        self._local_hits = local_hits
        self._arena: dict[tuple[int, int], Identity] = {}  # by (life of the server, byte)
        self.requests: list[FakeRequest] = []  # all that ever came
        self.session.await_open(1.0)

    def _connect(self, path: str) -> Any:
        line = self.server.connect(path)
        self.lines.append(line)
        return line

    # What a test looks at

    @property
    def sent(self) -> list[Request]:
        """Return all that the planner's session has sent so far."""
        return [message for line in self.lines for message in line.sent]

    def sent_of(self, kind: type) -> list[Any]:
        """Return the messages of one type, in order."""
        return [message for message in self.sent if isinstance(message, kind)]

    def rotate(self, signing_secrets: tuple[bytes, ...]) -> None:
        """Have the server name other secrets, and the news arrive."""
        self.signing_secrets = self.server.signing_secrets = signing_secrets
        self.server.tell(SecretsRotated(signing_secrets))
        self.clock.advance(STEP_SECONDS)

    def ready_blocks(self, salt: str) -> int:
        """Return how many READY blocks a user has."""
        identity_by_key = self._identities()
        users = self.server.cache.default_tenant.user_by_id.values()
        return sum(
            block.state is BlockState.READY and identity_by_key[key][0] == salt
            for user in users
            for key, block in user.block_by_key.items()
        )

    def held(self) -> int:
        """Return how many engine blocks the planner holds."""
        return self.blocks.held.total()

    # A request's life

    def arrive(self, tokens: Sequence[Any], salt: str = "", *, outputs: int = 1) -> FakeRequest:
        """Add a request; it waits for the next step."""
        request = FakeRequest(f"r{len(self.requests)}", salt, list(tokens), len(tokens), outputs_left=outputs)
        request.signed = verify(salt, self.signing_secrets)
        self.planner.add(request, salt)
        self.waiting.append(request)
        self.requests.append(request)
        return request

    def abort(self, request: FakeRequest) -> None:
        """End a request, wherever it stands. One that loads keeps its blocks until the load is over."""
        self.planner.remove(request.request_id)
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        request.is_aborted = True
        if request.is_loading:
            self._loading_after_abort.append(request)
        else:
            self._give_back(request)

    def preempt(self, request: FakeRequest) -> None:
        """Take a running request's blocks; it starts again."""
        self.running.remove(request)
        self._give_back(request)
        request.num_computed_tokens = 0
        self.waiting.insert(0, request)

    def _give_back(self, request: FakeRequest) -> None:
        self.blocks.give_back(request.block_ids[::-1])
        request.block_ids = []

    def reset(self, namespace: bytes) -> None:
        """Change the weights in place."""
        self.namespaces.append(namespace)
        self.planner.reset(namespace)

    # A step

    def step(self, budget: int = 1_000_000) -> Copies:
        """Schedule, plan, and compute up to `budget` tokens; the workers' copies begin but don't run yet."""
        self.clock.advance(STEP_SECONDS)
        self.planner.end_step()  # the one before, which took that long
        scheduled: dict[str, int] = {}
        computing: list[FakeRequest] = []
        is_short = False
        for request in list(self.running):
            tokens = min(budget, request.num_tokens - request.num_computed_tokens)
            if request not in self.running or not tokens:
                continue
            while request in self.running and not self._extend(request, request.num_computed_tokens + tokens):
                is_short = True
                if self.planner.has_stores_in_flight:
                    break
                self.preempt(self.running[-1])
            else:
                if request in self.running:
                    scheduled[request.request_id] = tokens
                    computing.append(request)
                    budget -= tokens
                continue
            break
        if not is_short:
            self._admit_waiting(budget, scheduled, computing)
        computing = [request for request in computing if request in self.running]
        scheduled = {request.request_id: scheduled[request.request_id] for request in computing}
        tables_by_id = {request.request_id: (tuple(request.block_ids),) for request in computing}
        copies = self.planner.plan(scheduled, tables_by_id.get)
        for rank in self.ranks:
            rank.pending += [(copy, False) for copy in copies.loads] + [(copy, True) for copy in copies.stores]
        for request in computing:
            self._compute(request, scheduled[request.request_id])
        return copies

    def _admit_waiting(self, budget: int, scheduled: dict[str, int], computing: list[FakeRequest]) -> None:
        for request in sorted(self.waiting, key=lambda request: not request.block_ids):  # those that hold some first
            if budget <= 0:
                return
            if request.is_loading:
                continue
            local: list[int] = []
            if not request.num_computed_tokens:
                local = self._local_prefix(request)
                matched = self.planner.match(request.request_id, len(local) * ENGINE_BLOCK_TOKENS)
                if matched is None:
                    continue
                assert len(local) * ENGINE_BLOCK_TOKENS + matched <= request.num_tokens, "matched more than there is"
                if matched:
                    assert not request.has_failed, "matched again after a failed load, and so for ever"
                    if not self._begin_load(request, local, matched):
                        return
                    continue
            tokens = self._start(request, local, budget)
            if not tokens:
                return
            scheduled[request.request_id] = tokens
            computing.append(request)
            budget -= tokens

    def _start(self, request: FakeRequest, local: list[int], budget: int) -> int:
        """Let a request run, and return how many tokens it computes; 0 if there is no room for them."""
        computed = max(request.num_computed_tokens, len(local) * ENGINE_BLOCK_TOKENS)
        computed = min(computed, request.num_tokens - 1)  # the last is always computed
        tokens = min(budget, request.num_tokens - computed)
        needed = -(-(computed + tokens) // ENGINE_BLOCK_TOKENS) - len(local) - len(request.block_ids)
        block_ids = self._allocate(local, max(needed, 0))
        if block_ids is None:
            return 0
        request.block_ids += block_ids
        request.num_computed_tokens = computed
        self.planner.admit(request.request_id, (request.block_ids,), 0)
        self.waiting.remove(request)
        self.running.append(request)
        return tokens

    def _begin_load(self, request: FakeRequest, local: list[int], matched: int) -> bool:
        # As vLLM does: two that loaded and then don't fit would wait for each other.
        reserved = sum(self._missing(other) for other in self.waiting if other.block_ids)
        if reserved + self._missing(request) > self.blocks.available:
            return False  # nothing is said to the planner: it is asked again
        block_ids = self._allocate(local, matched // ENGINE_BLOCK_TOKENS)
        assert block_ids is not None, "there was room for all of the request"
        request.block_ids = block_ids
        request.loaded_from = len(local)
        request.num_computed_tokens = len(request.block_ids) * ENGINE_BLOCK_TOKENS
        request.is_loading = True
        request.ranks_loaded = request.ranks_failed = 0
        self.planner.admit(request.request_id, (request.block_ids,), matched)
        return True

    def _allocate(self, local: list[int], count: int) -> list[int] | None:
        """Return blocks found locally, and new ones behind them; None if there are too few."""
        self.blocks.share(local)
        fresh = self.blocks.allocate(count)
        if fresh is None:
            self.blocks.give_back(local[::-1])
            return None
        return local + fresh

    def _missing(self, request: FakeRequest) -> int:
        return -(-request.num_tokens // ENGINE_BLOCK_TOKENS) - len(request.block_ids)

    def _extend(self, request: FakeRequest, tokens: int) -> bool:
        fresh = self.blocks.allocate(max(-(-tokens // ENGINE_BLOCK_TOKENS) - len(request.block_ids), 0))
        if fresh is None:
            return False
        request.block_ids += fresh
        return True

    def _compute(self, request: FakeRequest, tokens: int) -> None:
        """Attend to everything before, and write KV; a request that is through gives its next token or ends."""
        start, end = request.num_computed_tokens, request.num_computed_tokens + tokens
        self._check(request, 0, start // ENGINE_BLOCK_TOKENS)
        for number, rank in enumerate(self.ranks):
            for index in range(start // ENGINE_BLOCK_TOKENS, -(-end // ENGINE_BLOCK_TOKENS)):
                upto = min((index + 1) * ENGINE_BLOCK_TOKENS, end)
                rank.kv[request.block_ids[index]] = (request.user, tuple(request.all_token_ids[:upto]), number)
        self._know_locally(request, end // ENGINE_BLOCK_TOKENS)
        request.num_computed_tokens = end
        if end < request.num_tokens:
            return
        if request.outputs_left > 1:
            request.outputs_left -= 1
            request.all_token_ids.append(request.num_tokens % VOCABULARY)
        else:
            self.running.remove(request)
            self.planner.remove(request.request_id)
            self._give_back(request)
            self.finished.append(request)

    # The workers

    def work(self, *, rank: int | None = None, stores: bool = True, loads: bool = True, fail: bool = False) -> None:
        """Have one rank, or all, run what is pending; with `fail` each copy spoils what it may write and fails."""
        for number, worker in enumerate(self.ranks):
            if rank is not None and rank != number:
                continue
            pending, worker.pending = worker.pending, []
            for copy, is_store in pending:
                if not (stores if is_store else loads):
                    worker.pending.append((copy, is_store))
                    continue
                worker.ended.append((copy, is_store, not self._copy(copy, number, is_store=is_store, fail=fail)))

    def _copy(self, copy: Copy, number: int, *, is_store: bool, fail: bool) -> bool:
        if copy.incarnation != self.server.attached:
            return False  # the worker's lifeline is another session's: it touches nothing
        kv, life = self.ranks[number].kv, self.server.lives
        for piece in copy.pieces:
            for slot, engine_block in enumerate(piece.engine_blocks, start=piece.first_slot):
                (part,) = extent_slices(piece.extent, number * self.slots + slot, 1, 2)
                place = (life, part.start)
                if fail:
                    garbage: Identity = ("nobody", (), number)
                    if is_store:
                        self._arena[place] = garbage
                    else:
                        kv[engine_block] = garbage
                elif is_store:
                    self._arena[place] = kv[engine_block]
                else:
                    kv[engine_block] = self._arena[place]
        return not fail

    def report(self, *, rank: int | None = None) -> None:
        """Tell the planner and the scheduler what one rank, or all, have ended."""
        ended: list[tuple[Copy, bool, bool]] = []
        for number, worker in enumerate(self.ranks):
            if rank is None or rank == number:
                ended += worker.ended
                worker.ended = []
        reports = Reports()
        for copy, _, is_failed in ended:
            reports.add(Reports(failed={copy.op_id: 1}) if is_failed else Reports(done={copy.op_id: 1}))
        if reports:
            self.planner.report(reports)
        for copy, is_store, is_failed in ended:
            if not is_store:
                self._loaded(copy.request_id, is_failed=is_failed)

    def _loaded(self, request_id: str, *, is_failed: bool) -> None:
        queue = self.waiting + self._loading_after_abort
        request = next(request for request in queue if request.request_id == request_id)
        request.ranks_loaded += 1
        request.ranks_failed += is_failed
        if request.ranks_loaded < len(self.ranks):
            return
        request.is_loading = False
        if request.is_aborted:
            self._loading_after_abort.remove(request)
            self._give_back(request)
        elif request.ranks_failed:
            request.has_failed = True
            good, bad = request.block_ids[: request.loaded_from], request.block_ids[request.loaded_from :]
            self.blocks.give_back(bad)
            request.block_ids = good
            request.num_computed_tokens = len(good) * ENGINE_BLOCK_TOKENS
        else:
            self._check(request, request.loaded_from, len(request.block_ids))
            self._know_locally(request, len(request.block_ids))
            request.loaded_tokens += (len(request.block_ids) - request.loaded_from) * ENGINE_BLOCK_TOKENS

    def settle(self) -> None:
        """Take steps until nothing moves any more: requests are through, copies reported, answers in."""
        for _ in range(1000):
            idle = not (self.waiting or self.running or self._loading_after_abort)
            if idle and not any(self.planner.leftovers.values()):
                return
            self.step()
            self.work()
            self.report()
        raise AssertionError(f"the engine does not come to rest: {self.planner.leftovers}")

    def check_drained(self) -> None:
        """Check that nothing is left anywhere once everything has ended."""
        self.settle()
        assert not self.planner.has_unfinished_work
        assert not self.planner.has_stores_in_flight
        assert not self.blocks.held.total(), "blocks are held although nothing is under way"
        assert self.blocks.available == self.blocks.total - 1, "blocks were lost"
        for line in self.lines:
            self.server.serve(line)
        cache = self.server.cache
        assert not self.server.leases(), "leases are left on the server"
        pins = [block.pins for user in cache.default_tenant.user_by_id.values() for block in user.block_by_key.values()]
        assert not any(pins), "blocks are pinned although there is no lease"

    # What must hold

    def _check(self, request: FakeRequest, first: int, end: int) -> None:
        """Check that engine blocks `[first, end)` of a request hold the KV of its own prefix."""
        for number, rank in enumerate(self.ranks):
            for index in range(first, end):
                tokens = tuple(request.all_token_ids[: (index + 1) * ENGINE_BLOCK_TOKENS])
                held = rank.kv.get(request.block_ids[index])
                assert held == (request.user, tokens, number), f"slot {index} of {request.request_id} holds {held}"

    def _check_commit(self, commit: Commit) -> None:
        """Check that every byte of what is published is what its key promises."""
        self.server.commits_seen.append(commit.lease)
        sessions = self.server.cache.sessions
        lease = next((s.lease_by_id[commit.lease] for s in sessions if commit.lease in s.lease_by_id), None)
        assert lease is not None, "committed what was not reserved, or not any more"
        identity_by_key = self._identities()
        for block in lease.blocks:
            assert block.key in identity_by_key, "published under a key that no user's tokens have"
            user, tokens = identity_by_key[block.key]
            for number in range(len(self.ranks)):
                for slot in range(self.slots):
                    (part,) = extent_slices(block.extent, number * self.slots + slot, 1, 2)
                    upto = len(tokens) - (self.slots - 1 - slot) * ENGINE_BLOCK_TOKENS
                    held = self._arena.get((self.server.lives, part.start))
                    assert held == (user, tokens[:upto], number), f"published {held} as {(user, tokens[:upto])}"

    def _identities(self) -> dict[Key, tuple[str, tuple[int, ...]]]:
        """Return (user, tokens) of every full prefix of every request so far, by the key derived here once more."""
        identity_by_key = {}
        for request, namespace in product(self.requests, self.namespaces):
            secret, signed = self.naming_secret or self.server.secret, request.signed
            if signed is None:
                user_key = unsigned_user_key(secret, request.salt)
            else:
                user_key = signed_user_key(secret, signed.tenant, signed.user, signed.epoch)
            content = namespace_content(namespace)
            tokens = request.all_token_ids
            for end in range(self.block_tokens, request.num_tokens + 1, self.block_tokens):
                if not all(isinstance(token, int) and -(2**31) <= token < 2**31 for token in tokens[:end]):
                    break
                content = next_content(content, array("i", tokens[end - self.block_tokens : end]).tobytes())
                identity_by_key[block_key(user_key, content)] = (request.user, tuple(tokens[:end]))
        return identity_by_key

    def _local_prefix(self, request: FakeRequest) -> list[int]:
        """Return blocks of the engine's own prefix cache; it leaves the last token to be computed."""
        found: list[int] = []
        while self._local_hits and (len(found) + 1) * ENGINE_BLOCK_TOKENS < request.num_tokens:
            tokens = tuple(request.all_token_ids[: (len(found) + 1) * ENGINE_BLOCK_TOKENS])
            block_id = self.blocks.find((request.user, tokens, 0))
            if block_id is None:
                break
            found.append(block_id)
        return found

    def _know_locally(self, request: FakeRequest, end: int) -> None:
        for block_id in request.block_ids[:end]:
            self.blocks.know(block_id, self.ranks[0].kv[block_id])


EngineMaker = Callable[..., Engine]
"""Makes an engine that is checked to have drained at the end of its test."""
