"""The planner: what the scheduler's side of the connector decides, without vLLM.

One request, as it is seen here (`Phase`):

              first ask                Acquired                 admitted with a hit
    IDLE ───────────────────► ASKED ───────────────► ANSWERED ─────────────────────► LOADING
     ▲                          │                       │                               │
     │                          │ patience is out       │ nothing beyond what           │ admitted a second
     │                          ▼                       ▼ the engine has                ▼ time, loaded
     └──────────────────────  MISSED  ◄─────────────────┘                              IDLE
        admitted; a further ask comes only after a preemption, and starts anew

A store is no phase: it belongs to the engine's blocks, not to the request, which may be preempted or gone
before the copy is made. Blocks are held from the step that fills them until every rank has reported, the
server has refused them, or its answer is overdue.

    plan(): full blocks ── hold, Reserve ──► Reserved ── next plan(): Copy ──► reports of all ranks ── Commit, free

Nothing here raises for what a request carries or the server does.
"""

import logging
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import Enum
from itertools import count
from typing import Protocol

from saltern.core.keys import (
    Content,
    Key,
    UserId,
    UserKey,
    block_key,
    namespace_content,
    next_content,
    unsigned_user_key,
    user_id,
)
from saltern.core.messages import (
    KEYS_MAX,
    Abort,
    Acquire,
    Acquired,
    Commit,
    Discard,
    Grant,
    LeaseId,
    LookedUp,
    Lookup,
    Refusal,
    Release,
    Reply,
    Request,
    Reserve,
    Reserved,
)
from saltern.vllm.copies import Copies, Copy, Piece, Reports
from saltern.vllm.settings import StoreMode

logger = logging.getLogger(__name__)

ASKING_SECONDS_MAX = 300e-6
"""Most time that all asks of one `schedule()` together may wait: one call walks every waiting request."""

HELD_SHARE_MAX = 0.25
"""Largest share of the engine's blocks that may be held for stores; more would cost it batch size."""

assert sys.byteorder == "little" and array("i").itemsize == 4, "keys hash token ids as little-endian int32"


class EngineRequest(Protocol):
    """What is read of vLLM's request. It is live: vLLM updates it in place."""

    request_id: str
    num_computed_tokens: int
    num_output_placeholders: int
    num_prompt_tokens: int

    @property
    def num_tokens(self) -> int:
        """Return how many tokens are known."""

    @property
    def all_token_ids(self) -> Sequence[int]:
        """Return the ids of the known tokens."""


class EngineBlocks(Protocol):
    """The engine's pool of KV blocks, as far as it is needed to hold some of them."""

    @property
    def total(self) -> int:
        """Return how many blocks there are."""

    def hold(self, block_ids: Sequence[int]) -> None:
        """Keep blocks from being reused."""

    def free(self, block_ids: Sequence[int]) -> None:
        """Undo one `hold` of each block."""


class ServerSession(Protocol):
    """The way to the server; `saltern.vllm.session.Session` is the real one."""

    incarnation: bytes
    naming_secret: bytes

    @property
    def is_open(self) -> bool:
        """Return whether leases can be had."""

    def connect_if_due(self) -> None:
        """Connect where there is no connection and it is time to try."""

    def send(self, message: Request) -> bool:
        """Send; False if there is no session."""

    def receive(self, timeout: float = 0.0) -> list[Reply]:
        """Return answers that came in, waiting for the first."""


class Phase(Enum):
    """Where a request stands with us; see the drawing above."""

    IDLE = "idle"
    ASKED = "asked"
    ANSWERED = "answered"
    MISSED = "missed"
    LOADING = "loading"


class Track:
    """One request: its identity, its growing chain of keys, and its phase."""

    def __init__(self, request: EngineRequest, salt: str, extras: bytes) -> None:
        self.request = request
        self.salt = salt
        self.extras = extras
        self.phase = Phase.IDLE
        self.load_failed = False  # then it matches nothing for the rest of its life
        self.incarnation = b""  # of the session that the fields below belong to
        self.user_key = UserKey(b"")
        self.user = UserId(b"")
        self.tokens = array("i")
        self.content = Content(b"")  # of the last key
        self.keys: list[Key] = []
        self.start = 0  # first block asked for
        self.asked_at = 0.0
        self.asks = 0
        self.awaited = 0  # number of the last Acquire: an answer to an earlier one only tells the time
        self.looked_up: int | None = None  # blocks that the early lookup saw
        self.looked_up_at = 0.0
        self.acquired: Acquired | None = None
        self.acquired_at = float("inf")  # until the server has named a time: then it counts the Reserve's own
        self.offered = 0  # blocks [0, offered) are in the cache or were offered to it
        self.settled = 0  # blocks [offered, settled) were turned down: they are offered again with the next block only


@dataclass
class Question:
    """A request to the server that has no answer yet. `held` are the engine blocks of a Reserve."""

    track: Track
    sent_at: float
    held: tuple[int, ...] = ()
    first_block: int = 0
    is_dropped: bool = False  # nobody waits any more: what it brings is given back
    plans: int = 0  # how many steps it has been open


@dataclass
class Operation:
    """A copy under way: what is released, committed or aborted when every rank has reported."""

    copy: Copy
    track: Track
    lease: LeaseId
    keys: tuple[Key, ...]
    is_store: bool
    held: tuple[int, ...] = ()
    first_block: int = 0
    is_with_workers: bool = False
    is_spoiled: bool = False  # whatever its ranks report
    done: int = 0  # ranks
    failed: int = 0
    untouched: int = 0  # of the failed

    @property
    def is_failed(self) -> bool:
        """Return whether the blocks are not what they should be: for a load in the engine, for a store in the cache."""
        return self.is_spoiled or self.failed > 0

    @property
    def is_bad(self) -> bool:
        """Return whether the blocks in the cache are to blame, rather than a rank that had no arena."""
        return self.is_spoiled or self.failed > self.untouched


@dataclass(frozen=True)
class Geometry:
    """Sizes in tokens. A block of the cache is `slots` engine blocks."""

    block_tokens: int
    engine_block_tokens: int

    @property
    def slots(self) -> int:
        """Return how many engine blocks make one block of ours."""
        return self.block_tokens // self.engine_block_tokens


class Planner:
    """All decisions of one engine's scheduler. `clock` is monotonic, in seconds."""

    def __init__(
        self,
        *,
        session: ServerSession,
        blocks: EngineBlocks,
        geometry: Geometry,
        namespace: bytes,
        ranks: int,
        store: StoreMode,
        naming_secret: bytes | None,
        patience_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._session = session
        self._blocks = blocks
        self._geometry = geometry
        self._ranks = ranks
        self._store = store
        self._naming_secret = naming_secret
        self._patience_seconds = patience_seconds
        self._clock = clock
        self._root = namespace_content(namespace)
        self._incarnation = b""  # of the session that is open
        self._track_by_id: dict[str, Track] = {}
        self._question_by_number: dict[int, Question] = {}  # in the order of sending
        self._operation_by_id: dict[int, Operation] = {}
        self._copies = Copies()  # for the next step
        self._numbers = count(1)
        self._held = 0  # engine blocks held, each as often as it is held
        self._asking_seconds = ASKING_SECONDS_MAX  # left in this schedule()
        if HELD_SHARE_MAX * blocks.total < geometry.slots:
            logger.warning(
                "nothing will be stored: a block of %d tokens is more than the share of vLLM's %d blocks of %d tokens"
                " that may be held for stores; set saltern.block_tokens lower",
                geometry.block_tokens,
                blocks.total,
                geometry.engine_block_tokens,
            )

    # What vLLM asks, in the order of a request's life

    def add(self, request: EngineRequest, salt: str, extras: bytes = b"") -> None:
        """Take a new request that may be cached, and look its prompt up early.

        `extras` is what decides its KV beside the tokens, the same for every block: an adapter's identity.
        """
        try:
            track = Track(request, salt, extras)
            self._poll()
            if self._prepare(track, request.num_tokens) and self._responds():
                self._ask(track, Lookup(next(self._numbers), track.user, tuple(track.keys)))
            self._track_by_id[request.request_id] = track
        except (OverflowError, TypeError, ValueError) as error:  # token ids that are none
            logger.warning("request %s is not cached: %s", request.request_id, error)

    def match(self, request_id: str, local_tokens: int) -> int | None:
        """Return how many tokens beyond the engine's own `local_tokens` can be loaded; None is "ask again"."""
        track = self._track_by_id.get(request_id)
        if track is None or track.load_failed:
            return 0
        self._poll()
        if track.phase is Phase.ANSWERED and track.start * self._geometry.block_tokens > local_tokens:
            self._release_answer(track)  # the engine has lost blocks since, and needs more than is pinned
            track.phase = Phase.IDLE
        if track.phase in (Phase.IDLE, Phase.LOADING):
            self._acquire(track, local_tokens)
        if track.phase is Phase.ASKED:
            self._wait_for(track)
        if track.phase is Phase.ASKED:
            track.asks += 1
            if track.asks == 1 or self._clock() - track.asked_at < self._patience_seconds:
                return None
            track.phase = Phase.MISSED
        if track.phase is not Phase.ANSWERED:
            return 0
        assert track.acquired is not None, "answered without an answer"
        matched = track.acquired.ready * self._geometry.block_tokens - local_tokens
        if matched <= 0:
            self._release_answer(track)
            track.phase = Phase.MISSED
            return 0
        return matched

    def admit(self, request_id: str, block_ids: Sequence[int], loaded_tokens: int) -> None:
        """Take note that a request was given blocks, the last `loaded_tokens` of which we have to fill.

        Comes a second time, with 0, when an asynchronous load is done: only what never became a load is
        released.
        """
        track = self._track_by_id.get(request_id)
        if track is None:
            assert not loaded_tokens, "a hit for a request that isn't tracked"
            return
        if loaded_tokens:
            self._load(track, block_ids, loaded_tokens)
            track.phase = Phase.LOADING
            return
        self._release_answer(track)
        track.phase = Phase.IDLE

    def plan(self, scheduled_tokens: Mapping[str, int], block_ids_of: Callable[[str], Sequence[int] | None]) -> Copies:
        """Offer the blocks that this step fills and return what the workers shall copy.

        `scheduled_tokens` counts what the step computes for each request, speculated tokens left out;
        `block_ids_of` names the engine blocks of a request that is in it.
        """
        self._asking_seconds = ASKING_SECONDS_MAX
        self._poll()
        self._give_up_overdue()
        for request_id, tokens in scheduled_tokens.items():
            track = self._track_by_id.get(request_id)
            if track is not None:
                self._offer(track, tokens, block_ids_of)
        copies, self._copies = self._copies, Copies()
        for copy in (*copies.loads, *copies.stores):
            self._operation_by_id[copy.op_id].is_with_workers = True
        return copies

    def spoil(self, block_ids: Set[int]) -> None:
        """Take in which engine blocks could not be loaded, whoever says so: vLLM asks anew for their requests.

        Comes before the report that ends their loads.
        """
        for operation in self._operation_by_id.values() if block_ids else ():
            if not operation.is_store and any(block_ids & set(piece.engine_blocks) for piece in operation.copy.pieces):
                operation.is_spoiled = True

    def report(self, reports: Reports) -> None:
        """Take in what ranks have finished or failed; ends the operations that every rank has reported."""
        for op_id in {*reports.done, *reports.failed}:
            operation = self._operation_by_id.get(op_id)
            if operation is None:
                logger.error("a worker reported operation %d, which is not under way", op_id)
                continue
            operation.done += reports.done.get(op_id, 0)
            operation.failed += reports.failed.get(op_id, 0)
            operation.untouched += reports.untouched.get(op_id, 0)
            if operation.done + operation.failed >= self._ranks:
                self._finish(operation)

    def remove(self, request_id: str) -> None:
        """Forget a request that is finished or aborted; its copies under way go on."""
        track = self._track_by_id.pop(request_id, None)
        if track is not None:
            self._release_answer(track)
            self._drop_questions(track)

    def reset(self, namespace: bytes) -> None:
        """Start a new namespace: what was computed so far is neither matched nor stored any more."""
        for request_id in list(self._track_by_id):
            self.remove(request_id)
        for question in self._question_by_number.values():
            self._give_up(question)
        for operation in self._operation_by_id.values():
            operation.is_spoiled |= operation.is_store  # aborted, once every rank has let go of it
        self._root = namespace_content(namespace)

    @property
    def has_unfinished_work(self) -> bool:
        """Return whether steps are needed, even empty ones, to end what is held or asked."""
        return bool(self._operation_by_id) or any(
            question.held or question.plans == 0 or self._clock() - question.sent_at < self._patience_seconds
            for question in self._question_by_number.values()
        )

    @property
    def has_stores_in_flight(self) -> bool:
        """Return whether held blocks come free by themselves soon: workers are copying from them."""
        return any(operation.is_store and operation.is_with_workers for operation in self._operation_by_id.values())

    @property
    def leftovers(self) -> Mapping[str, int]:
        """Return how much of each kind is under way: all zero when the engine has drained."""
        return {
            "requests": len(self._track_by_id),
            "questions": len(self._question_by_number),
            "operations": len(self._operation_by_id),
            "held blocks": self._held,
        }

    # Asking

    def _prepare(self, track: Track, tokens: int) -> bool:
        """Bring a request's keys up to its first `tokens` tokens, in the present session; False without one.

        Raises for token ids that are none, with or without a session: so `add` meets all that the prompt has.
        """
        size = self._geometry.block_tokens
        tokens = min(tokens, KEYS_MAX * size)  # what no message can name is not cached
        if len(track.tokens) < tokens:
            track.tokens.extend(track.request.all_token_ids[len(track.tokens) : tokens])
        if not self._session.is_open:
            return False
        if track.incarnation != self._session.incarnation:
            track.incarnation = self._session.incarnation
            track.user_key = unsigned_user_key(self._naming_secret or self._session.naming_secret, track.salt)
            track.user = user_id(track.user_key)
            track.content = self._root
            track.keys.clear()
            track.offered = track.settled = 0
            track.acquired_at = float("inf")
        for start in range(len(track.keys) * size, tokens - size + 1, size):
            track.content = next_content(track.content, track.tokens[start : start + size].tobytes(), track.extras)
            track.keys.append(block_key(track.user_key, track.content))
        return True

    def _responds(self) -> bool:
        """Return whether the server answers: while one answer is overdue, nothing more is asked."""
        oldest = next(iter(self._question_by_number.values()), None)
        return oldest is None or self._clock() - oldest.sent_at < self._patience_seconds or oldest.plans <= 1

    def _acquire(self, track: Track, local_tokens: int) -> None:
        track.phase = Phase.MISSED
        if not self._prepare(track, track.request.num_tokens) or not track.keys or not self._responds():
            return
        track.start = local_tokens // self._geometry.block_tokens
        track.asked_at = self._clock()
        track.asks = 0
        track.awaited = next(self._numbers)
        keys = tuple(track.keys)
        if not self._ask(track, Acquire(track.awaited, track.user, keys, min(track.start, len(keys)))):
            return
        # The lookup sent at arrival has often been answered by now. If there is nothing to load, the Acquire
        # only marks the prefix as used, and nobody waits for it. A request that has queued for long asks anew:
        # the one before it may have stored what it needs.
        looked_up, track.looked_up = track.looked_up, None  # once: after a preemption the cache may hold more
        is_fresh = track.asked_at - track.looked_up_at < self._patience_seconds
        if looked_up is None or not is_fresh or looked_up * self._geometry.block_tokens > local_tokens:
            track.phase = Phase.ASKED

    def _wait_for(self, track: Track) -> None:
        """Wait for the answer, as long as this schedule() may still wait."""
        while track.phase is Phase.ASKED and self._asking_seconds > 0 and self._responds():
            began = self._clock()
            self._poll(self._asking_seconds)
            self._asking_seconds -= max(self._clock() - began, 1e-6)

    def _ask(self, track: Track, message: Lookup | Acquire | Reserve, *, held: tuple[int, ...] = ()) -> bool:
        if not self._session.send(message):
            return False
        first_block = message.start if isinstance(message, Reserve) else 0
        self._question_by_number[message.request] = Question(
            track, sent_at=self._clock(), held=held, first_block=first_block
        )
        return True

    # Answers

    def _poll(self, timeout: float = 0.0) -> None:
        """Take in what the server has sent, and notice when its session is another one."""
        self._session.connect_if_due()
        replies = self._session.receive(timeout)
        incarnation = self._session.incarnation if self._session.is_open else b""
        if incarnation != self._incarnation:
            self._lose_session()
            self._incarnation = incarnation
        for reply in replies:
            self._take(reply)

    def _take(self, reply: Reply) -> None:
        match reply:
            case LookedUp(number, ready):
                question = self._question_by_number.pop(number, None)
                if question is not None and not question.is_dropped:
                    question.track.looked_up = ready
                    question.track.looked_up_at = question.sent_at
            case Acquired():
                question = self._question_by_number.pop(reply.request, None)
                self._take_acquired(question, reply)
            case Reserved():
                question = self._question_by_number.pop(reply.request, None)
                self._take_reserved(question, reply)
            case _:
                logger.error("the server sent an unexpected %s", type(reply).__name__)

    def _take_acquired(self, question: Question | None, reply: Acquired) -> None:
        if question is not None and not question.is_dropped:
            track = question.track
            track.acquired_at = reply.acquired_at
            track.offered = max(track.offered, reply.ready)
            is_whole = len(reply.extents) == max(reply.ready - track.start, 0)
            if track.phase is Phase.ASKED and track.awaited == reply.request and is_whole:
                track.acquired = reply
                track.phase = Phase.ANSWERED
                return
        if reply.lease:
            self._session.send(Release(reply.lease))

    def _take_reserved(self, question: Question | None, reply: Reserved) -> None:
        if question is None or question.is_dropped:
            if reply.lease:
                self._session.send(Abort(reply.lease))
            return
        track, slots, first = question.track, self._geometry.slots, question.first_block
        if reply.refusal is not None:
            track.offered = min(track.offered, reply.upto)
            if reply.refusal is not Refusal.NO_PARENT:  # which the next offer puts right
                track.settled = max(track.settled, first + len(question.held) // slots)
        granted = [
            (grant, question.held[(grant.index - first) * slots : (grant.index - first + 1) * slots])
            for grant in reply.grants
        ]
        kept = tuple(block_id for _, held in granted for block_id in held)
        if granted:
            self._store_granted(track, reply.lease, granted, kept)
        spare = set(question.held) - set(kept)
        self._free([block_id for block_id in question.held if block_id in spare])

    def _store_granted(
        self, track: Track, lease: LeaseId, granted: list[tuple[Grant, tuple[int, ...]]], held: tuple[int, ...]
    ) -> None:
        pieces = tuple(Piece(extent=grant.extent, first_slot=0, engine_blocks=blocks) for grant, blocks in granted)
        keys = tuple(track.keys[grant.index] for grant, _ in granted)
        copy = Copy(next(self._numbers), track.incarnation, track.request.request_id, pieces)
        self._copies.stores.append(copy)
        self._operation_by_id[copy.op_id] = Operation(
            copy, track, lease, keys, is_store=True, held=held, first_block=granted[0][0].index
        )

    def _release_answer(self, track: Track) -> None:
        acquired, track.acquired = track.acquired, None
        if acquired is not None and acquired.lease and track.incarnation == self._session.incarnation:
            self._session.send(Release(acquired.lease))

    def _drop_questions(self, track: Track) -> None:
        """Stop waiting for lookups and acquires of a request; its reservations still stand."""
        for question in self._question_by_number.values():
            if question.track is track and not question.held:
                question.is_dropped = True

    def _give_up_overdue(self) -> None:
        """Free what is held for reservations that the server doesn't answer."""
        now = self._clock()
        for question in self._question_by_number.values():
            question.plans += 1
            if question.held and question.plans > 1 and now - question.sent_at >= self._patience_seconds:
                self._give_up(question)

    def _give_up(self, question: Question) -> None:
        """Wait for an answer no longer: what it brings is given back, what is held for it is freed."""
        if question.held:
            question.track.offered = min(question.track.offered, question.first_block)
        self._free(question.held)
        question.held = ()
        question.is_dropped = True

    def _lose_session(self) -> None:
        """Give up what only the lost session could have answered; copies under way are still reported."""
        for question in self._question_by_number.values():
            self._free(question.held)
        self._question_by_number.clear()
        for copy in self._copies.stores:  # no worker has heard of them
            self._free(self._operation_by_id.pop(copy.op_id).held)
        self._copies.stores.clear()
        for track in self._track_by_id.values():
            track.acquired = None
            track.looked_up = None
            if track.phase in (Phase.ASKED, Phase.ANSWERED):
                track.phase = Phase.MISSED

    # Copies

    def _load(self, track: Track, block_ids: Sequence[int], loaded_tokens: int) -> None:
        acquired, slots = track.acquired, self._geometry.slots
        assert acquired is not None, "a hit was admitted that nobody pins"
        end = acquired.ready * slots
        first = end - loaded_tokens // self._geometry.engine_block_tokens
        pieces, keys = [], []
        for index in range(first // slots, acquired.ready):
            begin = max(first, index * slots)  # a local hit may end inside a block of ours
            pieces.append(
                Piece(
                    extent=acquired.extents[index - track.start],
                    first_slot=begin - index * slots,
                    engine_blocks=tuple(block_ids[begin : (index + 1) * slots]),
                )
            )
            keys.append(track.keys[index])
        copy = Copy(next(self._numbers), track.incarnation, track.request.request_id, tuple(pieces))
        self._copies.loads.append(copy)
        self._operation_by_id[copy.op_id] = Operation(copy, track, acquired.lease, tuple(keys), is_store=False)
        track.acquired = None

    def _offer(self, track: Track, scheduled_tokens: int, block_ids_of: Callable[[str], Sequence[int] | None]) -> None:
        """Reserve room for the blocks of a request that this step fills with confirmed tokens."""
        request, size, slots = track.request, self._geometry.block_tokens, self._geometry.slots
        computed = request.num_computed_tokens + scheduled_tokens - request.num_output_placeholders
        known = request.num_prompt_tokens if self._store is StoreMode.PROMPT else request.num_tokens
        if not self._prepare(track, min(computed, known) // size * size):
            return
        first = track.offered  # 0 in a new session
        room = int(HELD_SHARE_MAX * self._blocks.total) - self._held
        full = min(min(computed, known) // size, len(track.keys), first + room // slots)  # the rest with a later step
        if full <= max(first, track.settled) or not self._responds():
            return
        block_ids = block_ids_of(request.request_id)
        if block_ids is None:
            return
        held = tuple(block_ids[first * slots : full * slots])
        message = Reserve(
            next(self._numbers), track.user, tuple(track.keys[:full]), start=first, acquired_at=track.acquired_at
        )
        if self._ask(track, message, held=held):
            self._blocks.hold(held)
            self._held += len(held)
            track.offered = full

    def _finish(self, operation: Operation) -> None:
        del self._operation_by_id[operation.copy.op_id]
        if operation.held:
            self._free(operation.held)
        track = operation.track
        if operation.is_failed and not operation.is_store:
            track.load_failed = True
            track.offered = track.settled = 0  # the request computes itself what the cache loses
        if operation.copy.incarnation != self._session.incarnation:
            return  # the lease went with its session
        if operation.is_store:
            self._session.send(Abort(operation.lease) if operation.is_failed else Commit(operation.lease))
            if operation.is_failed:
                track.settled = max(track.settled, track.offered)
                track.offered = min(track.offered, operation.first_block)
            return
        if operation.is_bad:
            self._session.send(Discard(track.user, operation.keys[0]))
        self._session.send(Release(operation.lease))

    def _free(self, block_ids: Sequence[int]) -> None:
        if block_ids:
            self._blocks.free(block_ids)
            self._held -= len(block_ids)
