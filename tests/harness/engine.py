"""The engine under test: vLLM's engine core, its steps counted and its promises checked."""

import copy
import functools
import os
import pickle
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, cast
from unittest import mock

import msgspec
import numpy as np
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from .findings import EngineDied, Finding, NotDrained, Stuck, WrongOutput
from .model import Sequence, mix
from .options import Options, vllm_config
from .worker import Worker


class Job(Future[Any]):
    """A call to all workers, run no later than its result is asked for and never before an earlier one."""

    def __init__(self, call: Callable[[], Any], jobs: "deque[Job]") -> None:
        super().__init__()
        self._call = call
        self._jobs = jobs
        jobs.append(self)

    def result(self, timeout: float | None = None) -> Any:
        while not self.done():
            self._jobs.popleft().run()
        return super().result(timeout)

    def run(self) -> None:
        try:
            self.set_result(self._call())
        except Exception as error:  # noqa: BLE001 - handed to whoever awaits the result
            self.set_exception(error)


class FakeExecutor(Executor):
    """An executor whose workers are objects of this process, one a rank."""

    def __init__(self, engine: "Engine", config: VllmConfig) -> None:
        self._engine = engine
        self._options = engine.options
        self._jobs: deque[Job] = deque()
        super().__init__(config)

    def _init_executor(self) -> None:
        self.workers = [
            Worker(_of_rank(self.vllm_config, rank), rank, self._options, self._engine)
            for rank in range(self._options.ranks)
        ]

    def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> list[Any]:
        assert not non_block, "only a step is not waited for"
        return [getattr(worker, method)(*args, **(kwargs or {})) for worker in self.workers]

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        return self._submit("execute_model", scheduler_output, non_block)

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        return self._submit("sample_tokens", grammar_output, non_block)

    def check_health(self) -> None:
        return

    def catch_up(self) -> None:
        """Run all that the workers lag behind with."""
        while self._jobs:
            self._jobs.popleft().run()

    def _submit(self, method: str, argument: Any, non_block: bool) -> Any:
        # What the scheduler does to its objects afterwards must not reach a worker that lags, so it is pickled now.
        sent = pickle.dumps(argument) if self._options.crosses_processes else None
        job = Job(functools.partial(self._call, method, argument, sent), self._jobs)
        if not self._options.workers_lag or not non_block:
            output = job.result()
            return job if non_block else output
        return job

    def _call(self, method: str, argument: Any, sent: bytes | None) -> ModelRunnerOutput | None:
        if sent is None:
            return cast(ModelRunnerOutput | None, getattr(self.workers[0], method)(argument))
        outputs = [_piped(getattr(worker, method)(pickle.loads(sent))) for worker in self.workers]  # noqa: S301
        assert self.kv_output_aggregator is not None, "no aggregator"
        return self.kv_output_aggregator.aggregate(outputs)


class Answer(msgspec.Struct):
    """What a client got: the tokens, why they ended, and how many prompt tokens were not computed."""

    max_tokens: int
    tokens: list[int] = []  # of a session: those of its last turn
    finish_reason: str | None = None
    local_tokens: int = 0
    external_tokens: int = 0


class Counts(msgspec.Struct):
    """What a run went through, so that a test can say that it did go through it."""

    steps: int = 0
    empty_steps: int = 0
    requests: int = 0
    external_tokens: int = 0
    local_tokens: int = 0
    loads: int = 0
    loads_failed: int = 0
    preemptions: int = 0
    aborts: int = 0
    aborts_during_load: int = 0
    resets: int = 0
    turns: int = 0
    drafted_tokens: int = 0
    rejected_tokens: int = 0
    records_written: int = 0
    records_read: int = 0
    records_lost: int = 0
    erasures: int = 0


LoadFault = Callable[[int, str, list[int]], set[int]]
"""Given rank, request and the blocks its load wrote, choose those that are spoiled and reported bad."""


class Engine:
    """One engine and its clients.

    `leftovers` is asked, once all requests are gone, what the connector still holds. `on_step` is called before every
    step: what goes on around the engine meanwhile. Use as a context manager.
    Raises a `Finding` from the call in which something went wrong.
    """

    def __init__(
        self,
        options: Options,
        connector: type[KVConnectorBase_V1],
        extra: dict[str, Any] | None = None,
        leftovers: Callable[["Engine"], list[str]] | None = None,
        load_fault: LoadFault | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        self.options = options
        self.weights = np.uint64(0)  # what the KV depends on beside the tokens
        self.on_step = on_step
        self.on_idle: Callable[[], None] | None = None  # asked whenever vLLM's loop would sleep
        self.answers: dict[str, Answer] = {}
        self.counts = Counts()
        self._idle_steps = 0  # in a row
        self._requests: dict[str, Request] = {}
        self._sequences: dict[str, Sequence] = {}
        self.uncached: set[str] = set()  # requests that no cache may store or read for
        self._findings: list[Finding] = []
        self._leftovers = leftovers
        self.load_fault = load_fault
        # Which model runner the scheduler addresses is read from the environment, and only at start.
        runner = {"VLLM_USE_V2_MODEL_RUNNER": "1" if options.runner_v2 else "0"}
        # Freezing the heap for garbage collection and caching the environment suit a process with one engine for life.
        once: dict[str, Any] = dict.fromkeys(("freeze_gc_heap", "enable_envs_cache"), lambda: None)
        config = vllm_config(options, connector, extra or {})
        with mock.patch.dict(os.environ, runner), mock.patch.multiple("vllm.v1.engine.core", **once):
            make_executor = cast(type[Executor], functools.partial(FakeExecutor, self))
            self.core = EngineCore(config, make_executor, log_stats=True)
        assert isinstance(self.core.scheduler, Scheduler), "not one of vLLM's schedulers"
        self.scheduler = self.core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self._preempt = self.scheduler._preempt_request
        self.scheduler._preempt_request = self._preempt_and_forget
        self.workers_executor = cast(FakeExecutor, self.core.model_executor)
        self.workers = self.workers_executor.workers

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Shut down the connector in both roles. (`EngineCore.shutdown` would also tear down process-wide state.)"""
        self.core.model_executor.shutdown()
        self.scheduler.shutdown()

    @property
    def connector(self) -> KVConnectorBase_V1:
        """Return the scheduler's connector."""
        connector = self.scheduler.get_kv_connector()
        assert connector is not None, "no connector"
        return connector

    # Clients

    def add(
        self,
        request_id: str,
        prompt: list[int],
        salt: str | None = None,
        max_tokens: int = 1,
        priority: int = 0,
        is_session: bool = False,
        **sampling: Any,
    ) -> None:
        """Send a request, or begin a session that waits for more when it has answered (see `go_on`).

        `sampling` goes to vLLM's `SamplingParams`.
        """
        assert len(prompt) + max_tokens <= self.options.context_tokens, "longer than the context"
        self._sequences[request_id] = Sequence(prompt, user_tag(self.options, salt))
        self.answers[request_id] = Answer(max_tokens=max_tokens)
        self.counts.requests += 1
        request = self._request(
            request_id, prompt, max_tokens, cache_salt=salt, priority=priority, resumable=is_session, **sampling
        )
        self._requests[request_id] = request
        if is_session or request.skip_reading_prefix_cache:
            self.uncached.add(request_id)
        self._alive(lambda: self.core.add_request(request))

    def go_on(self, request_id: str, prompt: list[int], max_tokens: int = 1) -> None:
        """Add to the prompt of a session, or end it with an empty one."""
        if request_id in self.scheduler.requests and not self.scheduler.requests[request_id].is_finished():
            self.counts.turns += bool(prompt)
            more = self._request(request_id, prompt or [0], max_tokens, resumable=bool(prompt))
            self._alive(lambda: self.core.add_request(more))

    def _request(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        resumable: bool = False,
        **sampling: Any,
    ) -> Request:
        return Request(
            request_id=request_id,
            prompt_token_ids=list(prompt),  # a session's grows in place
            sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0, **sampling),
            pooling_params=None,
            arrival_time=float(self.counts.requests),
            cache_salt=cache_salt,
            priority=priority,
            resumable=resumable,
            block_hasher=self.core.request_block_hasher,
        )

    def abort(self, request_id: str, while_executing: bool = False) -> None:
        """Abort between steps, or, as when a client hangs up during one, just before the next output is processed."""
        request = self.scheduler.requests.get(request_id)
        if request is None or request.is_finished():
            return
        self.counts.aborts += 1
        self.counts.aborts_during_load += self.is_loading(request_id)
        if while_executing:
            self.core.aborts_queue.put_nowait([request_id])
            return
        self._alive(lambda: self.core.abort_requests([request_id]))

    def is_loading(self, request_id: str) -> bool:
        """Whether a request waits for its load."""
        request = self.scheduler.requests.get(request_id)
        return bool(request and request.status == RequestStatus.WAITING_FOR_REMOTE_KVS)

    def ask(self, request_id: str, prompt: list[int], salt: str | None = None, max_tokens: int = 1) -> Answer:
        """Send a request, run until nothing is left to do, and return the answer."""
        self.add(request_id, prompt, salt, max_tokens)
        self.run()
        return self.answers[request_id]

    def reset_prefix_cache(self, *, with_connector: bool) -> None:
        """Have vLLM forget what it has cached, as an operator may at any time; it may refuse, while blocks are used."""
        self._alive(lambda: self.core.reset_prefix_cache(False, with_connector))

    def change_weights(self) -> bool:
        """Change the weights in place, as a trainer does: preempt all, empty both caches, go on.

        Returns False if vLLM refuses, since blocks are held or awaited: then nothing has changed but that running
        requests may have been preempted, and the trainer tries again.
        """
        if any(self.is_loading(request_id) for request_id in self.scheduler.requests):
            # vLLM can't preempt these; but the external cache it empties even so.
            self._alive(lambda: self.core.reset_prefix_cache(False, True))
            return False
        self.workers_executor.catch_up()
        try:
            done = self.core.reset_prefix_cache(True, True)
        except RuntimeError as refusal:
            if "Failed to reset KV cache" not in str(refusal):
                raise
            return False
        assert done, "vLLM's cache is empty and the connector's isn't"
        self.weights = np.uint64(mix(int(self.weights)))
        self.counts.resets += 1
        return True

    # Steps

    @property
    def busy(self) -> bool:
        """Whether vLLM's busy loop would take another step."""
        return bool(self.scheduler.has_requests() or self.core.batch_queue)

    def step(self) -> bool:
        """Take one step of the busy loop. Returns whether a forward pass was submitted."""
        self.pass_time()
        outputs, executed = self._alive(self.core.step_fn)
        self.core.post_step(executed)
        self.counts.steps += 1
        self.counts.empty_steps += not executed
        self.counts.preemptions = sum(request.num_preemptions for request in self._requests.values())
        for client_outputs in (outputs or {}).values():
            self._receive(client_outputs)
        if self._findings:
            raise self._findings[0]
        if not executed and self.options.idle_seconds and self.scheduler.has_requests():
            time.sleep(self.options.idle_seconds)  # as vLLM's loop does, to let transfer threads have the interpreter
        return bool(executed)

    def pass_time(self) -> None:
        """Let happen around the engine what happens during a step; an idle engine takes none, and time passes."""
        if self.on_step is not None:
            self._alive(self.on_step)

    def rest(self) -> None:
        """Let time pass that an idle engine sleeps through."""
        self.pass_time()
        if self.on_idle is not None:
            self.on_idle()

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Step until nothing is left to do, or until a condition holds."""
        while self.busy and not (until and until()):
            self.move()

    def move(self) -> None:
        """Take one step, and raise `Stuck` when too many in a row moved nothing."""
        before = self._progress()
        self._idle_steps = 0 if self.step() or self._progress() != before else self._idle_steps + 1
        if self._idle_steps > self.options.idle_steps_max or self.counts.steps > self.options.steps_max:
            waiting = {request.request_id: request.status.name for request in self.scheduler.requests.values()}
            raise Stuck(
                f"after {self.counts.steps} steps, the last {self._idle_steps} of them idle, still waiting: "
                f"{waiting or 'the connector'}"
            )

    def _progress(self) -> tuple[int, ...]:
        """Return numbers that change when something moves without a forward pass."""
        return (len(self.scheduler.requests), self.pool.get_num_free_blocks())

    def _receive(self, outputs: EngineCoreOutputs) -> None:
        for output in outputs.outputs:
            answer = self.answers[output.request_id]
            answer.tokens += output.new_token_ids
            if output.prefill_stats is not None:
                answer.local_tokens = output.prefill_stats.num_local_cached_tokens
                answer.external_tokens = output.prefill_stats.num_external_cached_tokens
                self.counts.local_tokens += answer.local_tokens
                self.counts.external_tokens += answer.external_tokens
            if output.finish_reason is not None:
                answer.finish_reason = str(output.finish_reason)
            self._judge(output.request_id, answer)

    def _judge(self, request_id: str, answer: Answer) -> None:
        sequence = self._sequences[request_id]
        count = len(answer.tokens)
        right = sequence.tokens(sequence.prompt_tokens + count)[sequence.prompt_tokens :]
        if answer.tokens != right:
            self.found(WrongOutput(f"request {request_id} answered {answer.tokens}, its prefix decides {right}"))
        if answer.finish_reason == "length" and count != answer.max_tokens:
            self.found(WrongOutput(f"request {request_id} ended after {count} tokens"))

    def _alive(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Finding:
            raise
        except Exception as error:
            if self._findings:
                raise self._findings[0] from error
            *_, (frame, line) = traceback.walk_tb(error.__traceback__)
            place = f"{frame.f_code.co_filename}:{line}, {frame.f_code.co_qualname}"
            raise EngineDied(f"step {self.counts.steps}: {type(error).__name__}: {error} ({place})") from error

    @property
    def sequences(self) -> Mapping[str, Sequence]:
        """Return what each request consists of."""
        return self._sequences

    def _preempt_and_forget(self, request: Request, *args: Any, **rest: Any) -> Any:
        """Preempt, and keep vLLM from finding what it never computed.

        It names blocks as it schedules them. A request that has to go in the very step in which it was scheduled, for
        one of higher priority, leaves such blocks behind, and whoever asks for their name next would be given them.
        """
        tables = self.scheduler.kv_cache_manager.get_blocks(request.request_id).blocks
        computed = request.num_computed_tokens // self.options.block_tokens
        self.pool.evict_blocks({block.block_id for table in tables for block in table[computed:] if not block.is_null})
        return self._preempt(request, *args, **rest)

    # Asked by the workers

    def sequence(self, request_id: str) -> Sequence:
        return self._sequences[request_id]

    def prompt(self, request_id: str, prompt: list[int]) -> int:
        """Take the prompt that a worker was sent, the longer one of a session that goes on; return its length."""
        sequence = self._sequences[request_id]
        if prompt != sequence.known[: sequence.prompt_tokens]:
            assert request_id in self.uncached and len(prompt) > sequence.prompt_tokens, "the prompt is another one"
            self._sequences[request_id] = Sequence(prompt, sequence.tag)
            max_tokens = self._requests[request_id].max_tokens
            self.answers[request_id] = Answer(max_tokens=max_tokens)
        return len(prompt)

    def drafted(self, tokens: int, rejected_tokens: int) -> None:
        """Count what the workers drafted."""
        self.counts.drafted_tokens += tokens
        self.counts.rejected_tokens += rejected_tokens

    def found(self, finding: Finding) -> None:
        self._findings.append(finding)

    def loading_blocks(self) -> set[int]:
        """Return the blocks that a load may write: those not yet computed, of requests that wait for a load.

        An aborted request keeps its blocks until the load reports, and stays among the scheduler's requests so long.
        """
        return {
            block_id
            for request in self.scheduler.requests.values()
            if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS or request.is_finished()
            for block_id in self._loaded_blocks(request)
        }

    def load_faults(self, rank: int, request_id: str) -> set[int]:
        """Return the blocks to spoil of a load that this rank reports finished."""
        request = self.scheduler.requests.get(request_id)
        if request is None:
            return set()  # the scheduler will notice by itself
        self.counts.loads += rank == 0
        block_ids = self._loaded_blocks(request)
        faults = self.load_fault(rank, request_id, block_ids) if self.load_fault and block_ids else set()
        self.counts.loads_failed += bool(faults)
        return faults

    def _loaded_blocks(self, request: Request) -> list[int]:
        # Blocks found in the local prefix cache have a hash already; loaded ones get theirs once the load is done.
        tables = self.scheduler.kv_cache_manager.get_blocks(request.request_id).blocks
        return [block.block_id for table in tables for block in table if block.block_hash is None and not block.is_null]

    # The end

    def check_drained(self) -> None:
        """Raise unless every request, block and promise is gone. Call when `busy` is false."""
        left = [f"request {request_id}" for request_id in self.scheduler.requests]
        for name in (
            "running",
            "waiting",
            "kv_holding_waiting",
            "deferred_waiting",
            "finished_recving_kv_req_ids",
            "failed_recving_kv_req_ids",
            "deferred_frees",
        ):
            if getattr(self.scheduler, name):
                left.append(f"scheduler.{name}")
        used = [block for block in self.pool.blocks if block.ref_cnt and not block.is_null]
        left += [f"block {block.block_id} is held {block.ref_cnt} times" for block in used]
        free = self.pool.get_num_free_blocks()
        if free != self.options.blocks - 1:
            left.append(f"{free} of {self.options.blocks - 1} blocks are free")
        left += [line for worker in self.workers for line in worker.leftovers()]
        left += [f"request {name} got no end" for name in self.answers if self._is_unanswered(name)]
        left += self._leftovers(self) if self._leftovers else []
        if left:
            raise NotDrained("; ".join(left))

    def _is_unanswered(self, request_id: str) -> bool:
        reason = self.answers[request_id].finish_reason
        return reason is None and self._requests[request_id].status != RequestStatus.FINISHED_ABORTED


def _piped(sent: Any) -> Any:
    """Return what arrives in another process, pickled as vLLM does between its own."""
    return pickle.loads(pickle.dumps(sent))  # noqa: S301


def user_tag(options: Options, salt: str | None) -> str:
    """Return what marks a user's KV as this user's. No salt and an empty one are the same user."""
    return salt or "" if options.tag_users else ""


def _of_rank(config: VllmConfig, rank: int) -> VllmConfig:
    """Return the configuration as the process of one rank has it."""
    config = copy.copy(config)
    config.parallel_config = copy.copy(config.parallel_config)
    config.cache_config = copy.copy(config.cache_config)
    config.parallel_config.rank = rank
    return config
