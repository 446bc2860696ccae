"""The planner: what the scheduler's side of the connector decides, without vLLM.

What becomes of a request is drawn in `saltern.vllm.track`. A store is no phase of it: it belongs to the engine's
blocks, not to the request, which may be preempted or gone before the copy is made. Blocks are held from the step that
fills them until every rank has reported, the server has refused them, or its answer is overdue.

    plan(): full blocks ── hold, Reserve ──► Reserved ── next plan(): Copy ──► reports of all ranks ── Commit, free

Nothing here raises for what a request carries or the server does.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from saltern.core.extents import Extent
from saltern.core.keys import Key
from saltern.core.messages import (
    KEYS_MAX,
    PUBLIC_TENANT,
    PUBLIC_USER,
    Abort,
    Acquire,
    Acquired,
    Commit,
    Discard,
    LeaseId,
    Loading,
    LookedUp,
    Lookup,
    NamespaceChanged,
    PublicDepth,
    Refusal,
    Release,
    Reply,
    Reserve,
    Reserved,
)
from saltern.publishing import Mark
from saltern.vllm.copies import Copies, Copy, Piece, Reports
from saltern.vllm.geometry import NULL_BLOCK, Geometry, Pages, kept
from saltern.vllm.names import Names, SaltCounts, ServerSession
from saltern.vllm.pace import Pace
from saltern.vllm.questions import Answer, Question, Questions
from saltern.vllm.settings import LOAD_PATIENCE_MS, StoreMode
from saltern.vllm.track import EngineRequest, Phase, Track

logger = logging.getLogger(__name__)

ASKING_SHARE = 0.02
ASKING_SECONDS_MIN = 300e-6
ASKING_SECONDS_MAX = 25e-3
"""All asks of one `schedule()` together may wait for this share of the time since the one before, within these bounds.

Together, since one call walks every waiting request. A share, since a request without an answer loses a step, and the
processors that make steps long make answers late.
"""

NO_DISK_SECONDS = 1e-9
"""How long a block takes, says who wants no answer to wait for the disk: no disk is faster."""

HELD_SHARE_MAX = 0.25
"""Largest share of the engine's blocks that may be held for stores; more would cost it batch size."""

TablesOf = Callable[[str], Sequence[Sequence[int]] | None]
"""Names the engine blocks of a request, by group; None for one that isn't in the step."""


class EngineBlocks(Protocol):
    """The engine's pool of KV blocks, as far as it is needed to hold some of them."""

    @property
    def total(self) -> int:
        """Return how many blocks there are."""

    def hold(self, block_ids: Sequence[int]) -> None:
        """Keep blocks from being reused."""

    def free(self, block_ids: Sequence[int]) -> None:
        """Undo one `hold` of each block."""


@dataclass
class Operation:
    """A copy under way: what is released, committed or aborted when every rank has reported."""

    copy: Copy
    track: Track
    lease: LeaseId
    is_store: bool
    discard: Discard | None = None  # of a load, for when its blocks are to blame
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


@dataclass
class DiskCounts:
    """How requests fared that waited for blocks from the server's disk."""

    loads: int = 0
    blocks: int = 0
    seconds: float = 0.0  # waited, all together
    misses: int = 0  # that were not waited for, or not to the end, and computed


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
        strict: bool = False,
        wall_clock: Callable[[], float] = time.time,
        patience_seconds: float,
        load_patience_seconds: float = LOAD_PATIENCE_MS / 1000,
        clock: Callable[[], float],
    ) -> None:
        self._session = session
        self._blocks = blocks
        self._geometry = geometry
        self._ranks = ranks
        self._store = store
        self._patience_seconds = patience_seconds
        self._load_patience_seconds = load_patience_seconds
        self._clock = clock
        self._names = Names(
            session=session,
            geometry=geometry,
            namespace=namespace,
            naming_secret=naming_secret,
            strict=strict,
            wall_clock=wall_clock,
        )
        self._incarnation = b""  # of the session that is open
        self._track_by_id: dict[str, Track] = {}
        self._starting_anew: set[str] = set()  # requests whose load failed, until vLLM admits them
        self._questions = Questions(
            patience_seconds=patience_seconds, load_patience_seconds=load_patience_seconds, clock=clock
        )
        self._pace = Pace(block_tokens=geometry.block_tokens, clock=clock)
        self._disk = DiskCounts()
        self._operation_by_id: dict[int, Operation] = {}
        self._copies = Copies()  # for the next step
        self._numbers = count(1)
        self._held = 0  # engine blocks held, each as often as it is held
        self._planned_at = clock()
        self._asking_seconds: float | None = None  # left in this schedule(), None before its first ask
        if HELD_SHARE_MAX * blocks.total < geometry.engine_blocks:
            logger.warning(
                "nothing will be stored: a block of %d tokens takes %d of vLLM's %d blocks, more than the share that"
                " may be held for stores; set saltern.block_tokens lower",
                geometry.block_tokens,
                geometry.engine_blocks,
                blocks.total,
            )

    # What vLLM asks, in the order of a request's life

    def add(
        self,
        request: EngineRequest,
        salt: str,
        extras: bytes = b"",
        mark: Mark | None = None,
        *,
        only_published: bool = False,
    ) -> None:
        """Take a new request that may be cached, and look its prompt up early.

        `extras` is what decides its KV beside the tokens, the same for every block: an adapter's identity. With a
        `mark` that holds, its prompt is stored for all users; with `only_published` it is not
        cached otherwise.
        """
        try:
            track = Track(request, salt, extras, began_at=self._clock())
            self._poll()
            if mark is not None:
                self._names.publish(track, mark)
            if only_published and track.publication is None:
                return
            if self._names.prepare(track, request.num_tokens) and self._questions.responds:
                keys, states, public = self._names.wanted(track)
                number, pace = next(self._numbers), self._pace.block_seconds
                self._ask(track, Lookup(number, track.user, keys, states, track.tenant, public, pace))
            self._track_by_id[request.request_id] = track
        except (OverflowError, TypeError, ValueError) as error:  # token ids that are none
            logger.warning("request %s is not cached: %s", request.request_id, error)

    def match(self, request_id: str, local_tokens: int) -> int | None:
        """Return how many tokens beyond the engine's own `local_tokens` can be loaded; None is "ask again"."""
        track = self._track_by_id.get(request_id)
        if track is None:
            return 0
        if track.load_failed:
            # vLLM has freed its blocks, and yet keeps it at the head of those that hold some. Where it then needs more
            # than are free, those behind it, who could free theirs, are never looked at. "Ask again" moves it out.
            track.asks += 1
            return None if track.asks == 1 and request_id in self._starting_anew else 0
        if self._starting_anew:
            # vLLM reserves room for these: who asks for a load and doesn't fit would wait for them, before them.
            return 0
        self._poll()
        if track.phase is Phase.ANSWERED and track.start * self._geometry.block_tokens > local_tokens:
            self._release_answer(track)  # the engine has lost blocks since, and needs more than is pinned
            track.phase = Phase.IDLE
        if track.phase in (Phase.IDLE, Phase.LOADING):
            self._acquire(track, local_tokens)
        self._wait_for(track)
        if track.phase is Phase.COMING and track.asks and self._clock() >= track.waits_until:
            track.phase = Phase.LATE
        if track.phase is Phase.LATE:
            self._disk.misses += 1
            self._acquire(track, local_tokens, with_disk=False)
            self._wait_for(track)
        if track.phase in (Phase.ASKED, Phase.COMING):
            track.asks += 1
            if track.asks == 1 or self._clock() < track.waits_until:
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

    def admit(self, request_id: str, tables: Sequence[Sequence[int]], loaded_tokens: int) -> None:
        """Take note that a request was given engine blocks, of which we have to fill those of the last `loaded_tokens`.

        `tables` has the request's engine blocks by group. Comes a second time, with 0, when an asynchronous load is
        done: only what never became a load is released.
        """
        track = self._track_by_id.get(request_id)
        if track is None:
            assert not loaded_tokens, "a hit for a request that isn't tracked"
            return
        if loaded_tokens:
            self._load(track, tables, loaded_tokens)
            track.phase = Phase.LOADING
            return
        self._release_answer(track)
        self._starting_anew.discard(request_id)
        track.phase = Phase.IDLE

    def plan(self, scheduled_tokens: Mapping[str, int], tables_of: TablesOf) -> Copies:
        """Offer the blocks that this step fills and return what the workers shall copy.

        `scheduled_tokens` counts what the step computes for each request, speculated tokens left out;
        `tables_of` names the engine blocks of a request that is in it, by group.
        """
        self._planned_at = self._clock()
        self._asking_seconds = None
        self._pace.begin(scheduled_tokens.values())
        self._poll()
        for question in self._questions.take_overdue():
            self._give_up(question)
        for request_id, tokens in scheduled_tokens.items():
            track = self._track_by_id.get(request_id)
            if track is not None:
                self._offer(track, tokens, tables_of)
        copies, self._copies = self._copies, Copies()
        for copy in (*copies.loads, *copies.stores):
            self._operation_by_id[copy.op_id].is_with_workers = True
        return copies

    def spoil(self, block_ids: Set[int], request_ids: Set[str] = frozenset()) -> None:
        """Take in which engine blocks, or whose, could not be loaded, whoever says so: vLLM asks anew for them.

        Comes before the report that ends their loads.
        """
        for operation in self._operation_by_id.values() if block_ids or request_ids else ():
            copy = operation.copy
            is_spoiled = copy.request_id in request_ids or any(
                not block_ids.isdisjoint(piece.engine_blocks) for piece in copy.pieces
            )
            operation.is_spoiled |= is_spoiled and not operation.is_store

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

    def end_step(self) -> None:
        """Take note that the oldest step under way has ended: once for each `plan`, whatever it computed."""
        self._pace.end()

    def remove(self, request_id: str) -> None:
        """Forget a request that is finished or aborted; its copies under way go on."""
        track = self._track_by_id.pop(request_id, None)
        if track is not None:
            self._starting_anew.discard(request_id)
            self._let_go(track)

    def reset(self, namespace: bytes) -> None:
        """Start a new namespace: what was computed so far is neither matched nor stored any more.

        Requests under way are tracked on: vLLM may have to start one of them anew, or have to yet.
        """
        for track in self._track_by_id.values():
            track.is_outdated = True
            track.phase = Phase.MISSED
            self._let_go(track)
        for question in self._questions:
            self._give_up(question)
        for operation in self._operation_by_id.values():
            operation.is_spoiled |= operation.is_store  # aborted, once every rank has let go of it
        self._names.change_namespace(namespace)
        self._session.send(NamespaceChanged(self._names.root))

    @property
    def has_unfinished_work(self) -> bool:
        """Return whether steps are needed, even empty ones, to end what is held or asked."""
        return bool(self._operation_by_id) or self._questions.are_awaited

    @property
    def has_stores_in_flight(self) -> bool:
        """Return whether held blocks come free by themselves soon: workers are copying from them."""
        return any(operation.is_store and operation.is_with_workers for operation in self._operation_by_id.values())

    @property
    def leftovers(self) -> Mapping[str, int]:
        """Return how much of each kind is under way: all zero when the engine has drained."""
        return {
            "requests": len(self._track_by_id),
            "questions": len(self._questions),
            "operations": len(self._operation_by_id),
            "held blocks": self._held,
        }

    def count_bad_mark(self) -> None:
        """Count what a request carried in place of a publication mark."""
        self._names.count_bad_mark()

    def take_salt_counts(self) -> SaltCounts:
        """Return what the salts of requests were since the last call."""
        return self._names.take_salt_counts()

    def take_disk_counts(self) -> DiskCounts:
        """Return how loads from the server's disk went since the last call."""
        disk, self._disk = self._disk, DiskCounts()
        return disk

    def disk_tokens(self, request_id: str, loaded_tokens: int) -> int:
        """Return how many of the tokens that a request loads came from the server's disk while it waited."""
        track = self._track_by_id.get(request_id)
        blocks = track.coming_blocks if track is not None else 0
        return min(blocks * self._geometry.block_tokens, loaded_tokens)

    # Asking

    def _acquire(self, track: Track, local_tokens: int, *, with_disk: bool = True) -> None:
        track.phase = Phase.MISSED
        if not self._names.prepare(track, track.request.num_tokens) or not self._questions.responds:
            return
        keys, states, public = self._names.wanted(track)
        if not keys:
            return
        track.start = local_tokens // self._geometry.block_tokens
        track.asked_at = self._clock()
        track.waits_until = track.asked_at + self._patience_seconds
        track.asks = 0
        track.awaited = next(self._numbers)
        track.with_disk = with_disk
        track.coming_blocks = 0
        start, pace = min(track.start, len(keys)), self._pace.block_seconds if with_disk else NO_DISK_SECONDS
        if not self._ask(track, Acquire(track.awaited, track.user, keys, start, states, track.tenant, public, pace)):
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
        if self._asking_seconds is None:
            seconds = ASKING_SHARE * (self._clock() - self._planned_at)
            self._asking_seconds = min(max(seconds, ASKING_SECONDS_MIN), ASKING_SECONDS_MAX)
        while track.phase is Phase.ASKED and self._asking_seconds > 0 and self._questions.responds:
            began = self._clock()
            self._poll(self._asking_seconds)
            self._asking_seconds -= max(self._clock() - began, 1e-6)

    def _ask(self, track: Track, message: Lookup | Acquire) -> bool:
        if not self._session.send(message):
            return False
        self._questions.add(message.request, Question(track, since=self._clock()))
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
            self._names.renew()
        for reply in replies:
            self._take(reply)

    def _take(self, reply: Reply) -> None:
        match reply:
            case LookedUp():
                question = self._question_of(reply)
                if question is not None and not question.is_dropped:
                    question.track.looked_up = reply.ready
                    question.track.looked_up_at = question.since
            case Loading():
                self._take_loading(self._question_of(reply), reply)
            case Acquired():
                self._take_acquired(self._question_of(reply), reply)
            case Reserved():
                self._take_reserved(self._question_of(reply), reply)
            case PublicDepth(blocks):
                self._names.public_depth = blocks
            case _:
                logger.error("the server sent an unexpected %s", type(reply).__name__)

    def _question_of(self, reply: Answer) -> Question | None:
        """Take the question that this is the answer to; None if it can't be one, and is given back."""
        question = self._questions.take(reply)
        if question is None or question.is_dropped or question.fits(reply):
            return question
        logger.error("the server sent a %s that doesn't fit what was asked", type(reply).__name__)
        self._give_up(question)
        return None

    def _take_loading(self, question: Question | None, reply: Loading) -> None:
        """Let a request wait for what comes from the disk, as long as computing it would take and patience lasts.

        So a disk that is slower than it believes costs a request no more than twice what no disk would have. Who waits
        no longer asks once more, for what is there without the disk.
        """
        if question is None:
            return
        self._questions.wait_for_disk(reply.request, question)
        track = question.track
        if question.is_dropped or track.phase is not Phase.ASKED or track.awaited != reply.request:
            return
        blocks = min(reply.blocks, len(track.keys))  # others may wait for more of the same load
        computing_seconds = blocks * self._pace.block_seconds or float("inf")  # inf: not known yet
        wait_seconds = min(computing_seconds, self._load_patience_seconds)
        if not track.with_disk:
            track.phase = Phase.MISSED
        elif reply.seconds < wait_seconds:
            track.coming_blocks = blocks
            track.waits_until = question.since + wait_seconds
            track.phase = Phase.COMING
        else:  # not a number neither
            track.phase = Phase.LATE

    def _take_acquired(self, question: Question | None, reply: Acquired) -> None:
        if question is not None and not question.is_dropped:
            track = question.track
            track.acquired_at = reply.acquired_at
            track.offered = max(track.offered, reply.ready)
            blocks = max(reply.ready - track.start, 0)
            is_whole = len(reply.extents) == blocks + (blocks > 0 and self._geometry.has_states)
            if track.phase in (Phase.ASKED, Phase.COMING) and track.awaited == reply.request and is_whole:
                if track.phase is Phase.COMING:
                    self._disk.loads += 1
                    self._disk.blocks += min(track.coming_blocks, blocks)
                    self._disk.seconds += self._clock() - question.since
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
        track = question.track
        if reply.refusal is not None:
            track.offered = min(track.offered, reply.upto)
            is_for_good = question.is_cut if reply.refusal is Refusal.NO_PARENT else reply.refusal is Refusal.ERASED
            if is_for_good:  # the engine has forgotten what is missing, or the user is forgotten
                track.settled = KEYS_MAX
            elif reply.refusal is not Refusal.NO_PARENT:  # which the next offer puts right
                track.settled = max(track.settled, question.end_block)
        granted = {grant.index: grant.extent for grant in reply.grants}
        held = tuple(engine_block for index in granted for engine_block in kept(question.pages[index]))
        if granted:
            pieces = tuple(
                piece for index, extent in granted.items() for piece in _pieces(extent, question.pages[index])
            )
            copy = Copy(next(self._numbers), track.incarnation, track.request.request_id, pieces)
            self._copies.stores.append(copy)
            self._operation_by_id[copy.op_id] = Operation(
                copy, track, reply.lease, is_store=True, held=held, first_block=min(granted)
            )
        spare = set(question.held) - set(held)
        self._free([engine_block for engine_block in question.held if engine_block in spare])

    def _let_go(self, track: Track) -> None:
        self._release_answer(track)
        self._questions.drop(track)

    def _release_answer(self, track: Track) -> None:
        acquired, track.acquired = track.acquired, None
        if acquired is not None and acquired.lease and track.incarnation == self._session.incarnation:
            self._session.send(Release(acquired.lease))

    def _give_up(self, question: Question) -> None:
        """Wait for an answer no longer: what it brings is given back, what is held for it is freed."""
        if question.pages and not question.is_dropped:
            question.track.offered = min(question.track.offered, question.first_block)
        self._free(question.held)
        question.held = ()
        question.is_dropped = True

    def _lose_session(self) -> None:
        """Give up what only the lost session could have answered; copies under way are still reported."""
        for question in self._questions:
            self._free(question.held)
        self._questions.clear()
        for copy in self._copies.stores:  # no worker has heard of them
            self._free(self._operation_by_id.pop(copy.op_id).held)
        self._copies.stores.clear()
        for track in self._track_by_id.values():
            track.acquired = None
            track.looked_up = None
            if track.phase in (Phase.ASKED, Phase.COMING, Phase.LATE, Phase.ANSWERED):
                track.phase = Phase.MISSED

    # Copies

    def _load(self, track: Track, tables: Sequence[Sequence[int]], loaded_tokens: int) -> None:
        acquired, geometry = track.acquired, self._geometry
        assert acquired is not None, "a hit was admitted that nobody pins"
        begin = acquired.ready * geometry.block_tokens - loaded_tokens
        pieces: list[Piece] = []
        first = begin // geometry.block_tokens
        for index in range(first, acquired.ready):
            extent, pages = acquired.extents[index - track.start], geometry.pages(tables, index)
            # A local hit may end inside a block of ours.
            skipped = [max(begin - index * geometry.block_tokens, 0) // group.block_tokens for group in geometry.groups]
            pieces += _pieces(extent, pages, skipped)
        if geometry.has_states:
            pieces += _pieces(acquired.extents[-1], geometry.state_pages(tables, acquired.ready))
        copy = Copy(next(self._numbers), track.incarnation, track.request.request_id, tuple(pieces))
        self._copies.loads.append(copy)
        discard = Discard(track.user, track.keys[first], track.tenant)
        if first < acquired.public:
            discard = Discard(PUBLIC_USER, track.public[first], PUBLIC_TENANT)
        self._operation_by_id[copy.op_id] = Operation(copy, track, acquired.lease, is_store=False, discard=discard)
        track.acquired = None

    def _offer(self, track: Track, scheduled_tokens: int, tables_of: TablesOf) -> None:
        """Reserve room for the blocks of a request that this step fills with confirmed tokens, and for its state."""
        request, geometry = track.request, self._geometry
        reached = request.num_computed_tokens + scheduled_tokens
        is_prompt_only = self._store is StoreMode.PROMPT or track.publication is not None
        known = request.num_prompt_tokens if is_prompt_only else request.num_tokens
        full = min(reached - request.num_output_placeholders, known) // geometry.block_tokens
        if not self._names.prepare(track, full * geometry.block_tokens):
            return
        first = track.offered  # 0 in a new session
        room = (int(HELD_SHARE_MAX * self._blocks.total) - self._held) // geometry.engine_blocks
        full = min(full, len(track.keys), first + room)  # the rest with a later step
        has_blocks = full > max(first, track.settled)
        # A state belongs to the token with which the step ends, and to no other.
        has_state = geometry.has_states and full * geometry.block_tokens == reached and 0 < full != track.state_offered
        has_state = has_state and room > 0 and (has_blocks or full <= first)
        if not (has_blocks or has_state) or not self._questions.responds:
            return
        tables = tables_of(request.request_id)
        if tables is None:
            return
        pages = {index: geometry.pages(tables, index) for index in range(first, full)}
        start = full
        while start - 1 in pages and geometry.is_whole(pages[start - 1], start - 1):
            start -= 1
        offered = {index: pages[index] for index in range(start, full)}
        keys = track.keys[:full]
        state = geometry.state_pages(tables, full) if has_state else ()
        if has_state and all(NULL_BLOCK not in engine_blocks for engine_blocks in state):
            offered[full] = state
            keys.append(track.states[full - 1])
        if offered:
            self._reserve(track, tuple(keys), offered, start=start, is_cut=start > first, ends_in_state=full in offered)
        else:
            track.settled = max(track.settled, full)

    def _reserve(
        self,
        track: Track,
        keys: tuple[Key, ...],
        pages: Mapping[int, Pages],
        *,
        start: int,
        is_cut: bool,
        ends_in_state: bool,
    ) -> None:
        """Ask for room for the blocks from `start` on, and hold their engine blocks until it is answered."""
        number, blocks = next(self._numbers), len(keys) - ends_in_state
        public = tuple(track.public[:blocks])
        message = Reserve(
            number,
            track.user,
            keys,
            start,
            track.acquired_at,
            ends_in_state,
            track.tenant,
            public,
            began_at=track.began_at,
        )
        if not self._session.send(message):
            return
        held = tuple(engine_block for offered in pages.values() for engine_block in kept(offered))
        self._blocks.hold(held)
        self._held += len(held)
        question = Question(track, self._clock(), pages, held, first_block=start, end_block=blocks, is_cut=is_cut)
        self._questions.add(number, question)
        track.offered = max(track.offered, blocks)
        if ends_in_state:
            track.state_offered = blocks

    def _finish(self, operation: Operation) -> None:
        del self._operation_by_id[operation.copy.op_id]
        if operation.held:
            self._free(operation.held)
        track = operation.track
        if operation.is_failed and not operation.is_store:
            track.load_failed, track.asks = True, 0
            if self._track_by_id.get(track.request.request_id) is track:
                self._starting_anew.add(track.request.request_id)
            track.offered = track.settled = 0  # the request computes itself what the cache loses
        if operation.copy.incarnation != self._session.incarnation:
            return  # the lease went with its session
        if operation.is_store:
            self._session.send(Abort(operation.lease) if operation.is_failed else Commit(operation.lease))
            if operation.is_failed:
                track.settled = max(track.settled, track.offered)
                track.offered = min(track.offered, operation.first_block)
            return
        if operation.is_bad and operation.discard is not None:
            self._session.send(operation.discard)
        self._session.send(Release(operation.lease))

    def _free(self, block_ids: Sequence[int]) -> None:
        if block_ids:
            self._blocks.free(block_ids)
            self._held -= len(block_ids)


def _pieces(extent: Extent, pages: Pages, skipped: Sequence[int] | None = None) -> Iterator[Piece]:
    """Yield what to copy between an extent and engine blocks, but for the first `skipped` slots of each group."""
    for group, engine_blocks in enumerate(pages):
        first = 0 if skipped is None else skipped[group]
        if kept((engine_blocks[first:],)):
            yield Piece(extent, first, engine_blocks[first:], group)
