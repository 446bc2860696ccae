"""Mutants for the rules that the harness does not see: each breaks one, and the test that keeps it has to notice.

The first sentence of each says what goes wrong. A mutant patches what decides the rule, and nothing else. It is planted
before the test's file is imported, and in every process that the test starts.
"""

import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from saltern.client import control as control_module
from saltern.client import lifeline as lifeline_module
from saltern.client.control import Control
from saltern.client.lifeline import Lifeline
from saltern.core.cache import Cache
from saltern.core.leases import Session
from saltern.core.messages import Acquire, Loading, Lookup, Request, WorkerHello
from saltern.server import arena as arena_module
from saltern.server.loop import Loop, _Connection
from saltern.vllm.adapters import Adapters, LoraRequest, files_state
from saltern.vllm.pace import Pace
from saltern.vllm.planner import Planner
from saltern.vllm.questions import Question, Questions
from saltern.vllm.track import Phase, Track

Patch = pytest.MonkeyPatch
Mutant = Callable[[Patch], None]


# Leases and descriptors


def drops_leases_with_the_scheduler(patch: Patch) -> None:
    """Leases fall with the scheduler's connection, although workers may still be copying."""
    drop = Cache._drop_if_unreachable

    def drop_at_once(self: Cache, session: Session) -> None:
        if session.control is None:
            for lifeline in session.lifelines:
                lifeline.session = None
            session.lifelines.clear()
        drop(self, session)

    patch.setattr(Cache, "_drop_if_unreachable", drop_at_once)


def overlooks_that_a_device_outlives_its_socket(patch: Patch) -> None:
    """Leases of a device fall with its worker's connection, although it may still write."""
    watch = Loop._watch

    def watch_the_socket(self: Loop, connection: _Connection, hello: WorkerHello) -> bool:
        hello = WorkerHello(hello.engine, hello.name, hello.rank, hello.world_size, outlives_socket=False)
        return watch(self, connection, hello)

    patch.setattr(Loop, "_watch", watch_the_socket)


def lets_programs_inherit_the_arena(patch: Patch) -> None:
    """A program that is started meanwhile gets the arena's descriptor."""
    take = lifeline_module._Connection.take_fd

    def take_inheritable(self: lifeline_module._Connection) -> int:
        fd = take(self)
        os.set_inheritable(fd, True)
        return fd

    patch.setattr(lifeline_module._Connection, "take_fd", take_inheritable)


def keeps_the_lifeline_in_a_forked_child(patch: Patch) -> None:
    """A forked child lets go of the arena, and keeps the socket: the server does not see its parent's end."""
    forget = Lifeline.forget_in_child

    def forget_the_arena(self: Lifeline) -> None:
        connection, self._connection = self._connection, None
        forget(self)
        self._connection = connection

    patch.setattr(Lifeline, "forget_in_child", forget_the_arena)


def drops_releases(patch: Patch) -> None:
    """What does not fit the buffer is dropped, and the session goes on."""
    send = Control.send

    def send_what_fits(self: Control, message: Request) -> None:
        if len(self._outgoing) < control_module.OUTGOING_BYTES_MAX - 100:  # more than a release takes
            send(self, message)

    patch.setattr(Control, "send", send_what_fits)


def leaves_a_dead_servers_arena_mapped(patch: Patch) -> None:
    """The arena of a server that is gone stays mapped when the copies are over."""
    kept: list[lifeline_module.Arena] = []

    def keep(self: lifeline_module.Arena) -> bool:
        kept.append(self)
        return True

    patch.setattr(lifeline_module.Arena, "unmap", keep)


def unmaps_an_arena_in_use(patch: Patch) -> None:
    """The arena is unmapped when the session ends, whoever still copies."""
    unmap = Lifeline._unmap

    def unmap_at_once(self: Lifeline, arena: lifeline_module.Arena) -> None:
        arena.unmap()
        unmap(self, arena)

    patch.setattr(Lifeline, "_unmap", unmap_at_once)


def prefaults_whatever_memory_there_is(patch: Patch) -> None:
    """A server touches all of its arena, however little memory is left."""

    def prefault(self: arena_module.Arena) -> None:
        arena_module._madvise(self._address, self.total_bytes, arena_module._MADV_POPULATE_WRITE)

    patch.setattr(arena_module.Arena, "_prefault", prefault)


# Requests and their loads


def accepts_other_roles_and_policies(patch: Patch) -> None:
    """An engine starts that only stores or only loads, or that answers a lost block with an error."""
    from saltern.vllm import connector  # here, since vLLM takes seconds to import

    check = connector._check_start

    def check_the_rest(config: Any) -> Any:
        transfer = config.kv_transfer_config
        transfer.kv_role, transfer.kv_load_failure_policy = "kv_both", "recompute"
        return check(config)

    patch.setattr(connector, "_check_start", check_the_rest)


def looks_nothing_up_early(patch: Patch) -> None:
    """The server hears of a request when vLLM asks for it, and not before."""
    ask = Planner._ask

    def ask_late(self: Planner, track: Track, message: Lookup | Acquire) -> bool:
        return not isinstance(message, Lookup) and ask(self, track, message)

    patch.setattr(Planner, "_ask", ask_late)


def stays_in_front_after_a_failed_load(patch: Patch) -> None:
    """A request whose load failed does not step aside for those that can go on."""
    match = Planner.match

    def match_at_once(self: Planner, request_id: str, local_tokens: int) -> int | None:
        track = self._track_by_id.get(request_id)
        return 0 if track is not None and track.load_failed else match(self, request_id, local_tokens)

    patch.setattr(Planner, "match", match_at_once)


def promises_blocks_after_a_failed_load(patch: Patch) -> None:
    """Others are promised blocks before the request whose load failed has started anew."""
    match = Planner.match

    def match_for_all(self: Planner, request_id: str, local_tokens: int) -> int | None:
        starting_anew, self._starting_anew = self._starting_anew, self._starting_anew & {request_id}
        matched = match(self, request_id, local_tokens)
        self._starting_anew = starting_anew
        return matched

    patch.setattr(Planner, "match", match_for_all)


def forgets_failed_loads_when_weights_change(patch: Patch) -> None:
    """New weights make the planner forget whose load failed, and whose is under way."""
    reset = Planner.reset

    def reset_all(self: Planner, namespace: bytes) -> None:
        reset(self, namespace)
        self._starting_anew.clear()
        self._track_by_id.clear()

    patch.setattr(Planner, "reset", reset_all)


def loses_patience_within_a_step(patch: Patch) -> None:
    """An answer that came during a long step is too late."""
    match = Planner.match

    def match_by_the_clock(self: Planner, request_id: str, local_tokens: int) -> int | None:
        track = self._track_by_id.get(request_id)
        if track is not None and track.phase is Phase.ASKED and self._clock() >= track.waits_until:
            track.phase = Phase.MISSED
        return match(self, request_id, local_tokens)

    patch.setattr(Planner, "match", match_by_the_clock)


# The server's disk


def takes_reading_for_silence(patch: Patch) -> None:
    """A server that reads from its disk is left alone, like one that does not answer."""

    def wait_as_for_any(self: Questions, number: int, question: Question) -> None:
        self._asked[number] = question

    patch.setattr(Questions, "wait_for_disk", wait_as_for_any)


def takes_nothing_without_the_disk(patch: Patch) -> None:
    """When the disk is late, what is in RAM is computed as well."""
    acquire = Planner._acquire

    def acquire_all_or_nothing(self: Planner, track: Track, local_tokens: int, *, with_disk: bool = True) -> None:
        track.phase = Phase.MISSED
        if with_disk:
            acquire(self, track, local_tokens)

    patch.setattr(Planner, "_acquire", acquire_all_or_nothing)


def sleeps_while_the_disk_reads(patch: Patch) -> None:
    """An idle engine takes no steps for what the disk brings, and gives it back with the next request only."""
    are_awaited = vars(Questions)["are_awaited"].fget

    def asked_are_awaited(self: Questions) -> bool:
        loading, self._loading = self._loading, {}
        awaited: bool = are_awaited(self)
        self._loading = loading
        return awaited

    patch.setattr(Questions, "are_awaited", property(asked_are_awaited))


def steps_for_the_disk_for_ever(patch: Patch) -> None:
    """An idle engine spins for a server whose disk brings nothing."""
    init = Questions.__init__

    def init_patiently(
        self: Questions, *, patience_seconds: float, load_patience_seconds: float, clock: Callable[[], float]
    ) -> None:
        init(self, patience_seconds=patience_seconds, load_patience_seconds=math.inf, clock=clock)

    patch.setattr(Questions, "__init__", init_patiently)


def believes_how_long_the_disk_takes(patch: Patch) -> None:
    """A request waits for the disk as long as the server says, whatever that is."""
    take = Planner._take_loading

    def take_its_word(self: Planner, question: Question | None, reply: Loading) -> None:
        take(self, question, reply)
        if question is not None and question.track.phase in (Phase.COMING, Phase.LATE):
            question.track.phase = Phase.COMING
            question.track.waits_until = question.since + reply.seconds

    patch.setattr(Planner, "_take_loading", take_its_word)


def counts_naps_as_steps(patch: Patch) -> None:
    """A step begins where the one before ended, however long the engine has idled in between."""
    begin = Pace.begin

    def begin_where_the_last_ended(self: Pace, scheduled_tokens: Iterable[int]) -> None:
        begin(self, scheduled_tokens)
        scheduled_at, tokens = self._steps.pop()
        self._steps.append((self._ended_at if math.isfinite(self._ended_at) else scheduled_at, tokens))

    patch.setattr(Pace, "begin", begin_where_the_last_ended)


# Adapters


def knows_adapters_by_their_ids(patch: Patch) -> None:
    """An adapter is its id, whatever its files are."""
    identity = Adapters.identity

    def identity_by_id(self: Adapters, lora: LoraRequest) -> bytes | None:
        return None if identity(self, lora) is None else lora.lora_int_id.to_bytes(8, "little")

    patch.setattr(Adapters, "identity", identity_by_id)


def caches_adapters_unread(patch: Patch) -> None:
    """Requests of an adapter are cached under its files' state until their digest is known."""
    identity = Adapters.identity

    def identity_at_once(self: Adapters, lora: LoraRequest) -> bytes | None:
        state = files_state(lora.lora_path)
        is_loaded = set(self._loaded.get(lora.lora_int_id, {}).values()) == {state}
        return identity(self, lora) or (state if is_loaded else None)

    patch.setattr(Adapters, "identity", identity_at_once)


TEST_BY_MUTANT: dict[Mutant, str] = {
    drops_leases_with_the_scheduler: "tests/server/test_loop.py::test_leases_hold_until_the_last_worker_is_gone",
    overlooks_that_a_device_outlives_its_socket: (
        "tests/server/test_loop.py::test_leases_of_a_device_hold_until_its_process_is_gone"
    ),
    lets_programs_inherit_the_arena: (
        "tests/client/test_lifeline.py::test_a_program_that_is_started_meanwhile_gets_no_arena"
    ),
    keeps_the_lifeline_in_a_forked_child: (
        "tests/client/test_lifeline.py::test_a_forked_child_keeps_neither_lifeline_nor_arena"
    ),
    drops_releases: ("tests/client/test_control.py::test_releases_are_never_dropped_a_full_buffer_ends_the_session"),
    accepts_other_roles_and_policies: "tests/vllm/test_connector.py::TestStart::test_another_is_refused",
    looks_nothing_up_early: ("tests/vllm/test_planner.py::test_the_first_message_about_a_request_is_a_lookup"),
    stays_in_front_after_a_failed_load: (
        "tests/vllm/test_planner.py::TestFailedLoads::test_after_a_failed_load_others_are_looked_at_first"
    ),
    promises_blocks_after_a_failed_load: (
        "tests/vllm/test_planner.py::TestFailedLoads::test_until_its_request_starts_anew_nobody_is_promised_blocks"
    ),
    forgets_failed_loads_when_weights_change: (
        "tests/vllm/test_planner.py::TestFailedLoads::test_nor_when_the_weights_change_meanwhile"
    ),
    takes_reading_for_silence: (
        "tests/vllm/test_planner_disk.py::TestWaiting::test_it_may_take_longer_than_the_servers_answers"
    ),
    takes_nothing_without_the_disk: "tests/vllm/test_planner_disk.py::TestWaiting::test_without_the_disk",
    sleeps_while_the_disk_reads: (
        "tests/vllm/test_planner_disk.py::TestEnds"
        "::test_an_idle_engine_waits_for_what_it_has_to_give_back_and_not_for_ever"
    ),
    steps_for_the_disk_for_ever: (
        "tests/vllm/test_planner_disk.py::TestEnds"
        "::test_an_idle_engine_waits_for_what_it_has_to_give_back_and_not_for_ever"
    ),
    believes_how_long_the_disk_takes: "tests/vllm/test_planner_disk.py::TestStrangeServers::test_a_server_that_loads",
    counts_naps_as_steps: "tests/vllm/test_pace.py::test_a_nap_between_steps_is_in_none",
    loses_patience_within_a_step: (
        "tests/vllm/test_planner.py::TestLeases::test_patience_lasts_at_least_one_engine_step"
    ),
    knows_adapters_by_their_ids: "tests/vllm/test_adapters.py::test_other_files_are_another_adapter",
    caches_adapters_unread: "tests/vllm/test_adapters.py::test_nothing_is_cached_until_the_files_are_read",
    leaves_a_dead_servers_arena_mapped: (
        "tests/client/test_lifeline.py::test_a_killed_servers_arena_is_unmapped_and_its_successors_mapped"
    ),
    unmaps_an_arena_in_use: ("tests/client/test_lifeline.py::test_the_arena_stays_mapped_until_every_use_is_released"),
    prefaults_whatever_memory_there_is: "tests/server/test_arena.py::test_prefaulting_stops_before_memory_is_short",
}
"""Each mutant with the test that has to notice it, as pytest names it."""
