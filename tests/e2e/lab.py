"""A child process in which tiny engines run one after another, and the end of it that a test holds.

An engine in a process that has imported vLLM starts in two seconds, one in a process of its own in twenty. What is
done here also reaches through vLLM's classes: an engine that serves (`demo.engine`) can be told neither to change its
weights nor to forget what Saltern's namespace is made of.

A call and its answer are a line of JSON each, over pipes of their own: vLLM writes to the standard streams.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest import mock

import msgspec

from demo.server import connector_config
from tests.e2e.models import HIDDEN

REPOSITORY = Path(__file__).resolve().parents[2]
LOG_TAIL_LINES = 60
STOP_SECONDS_MAX = 30.0
KV_BYTES = 64 * 1024 * 1024  # of the engine's own
DRAIN_STEPS_MAX = 100_000  # empty ones; copies take some milliseconds

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler runs in the lab's process, and with one rank the worker too
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound threads could not be bound anew by the next engine
    "OMP_NUM_THREADS": "1",  # a matrix of 128 x 128 has no work for two
}


class LabError(Exception):
    """vLLM raised, or the child ended. The message is what vLLM said."""


class Answer(msgspec.Struct, frozen=True):
    """What a request came to. `logprobs` are those of the first token's likeliest alternatives."""

    token_ids: tuple[int, ...]
    logprobs: dict[str, float]
    cached_tokens: int

    def distance(self, other: Answer) -> float:
        """Return how far apart the log probabilities are at most. An alternative that one lacks counts as its least."""
        least, others_least = min(self.logprobs.values()), min(other.logprobs.values())
        return max(
            abs(self.logprobs.get(token, least) - other.logprobs.get(token, others_least))
            for token in self.logprobs.keys() | other.logprobs.keys()
        )


class Lora(msgspec.Struct, frozen=True):
    """An adapter as a request names it."""

    lora_path: str
    lora_name: str = "adapter"
    lora_int_id: int = 1
    load_inplace: bool = False


class Lab:
    """The test's end, a context manager. What vLLM says goes to `log_path`; `python` has the vLLM that is wanted."""

    def __init__(self, log_path: Path, *, python: str = sys.executable) -> None:
        self.log_path = log_path
        asked, ask = os.pipe()
        answered, answer = os.pipe()
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [python, "-m", "tests.e2e.lab", str(asked), str(answer)],
                cwd=REPOSITORY,
                env={**os.environ, **ENVIRONMENT},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(asked, answer),
                start_new_session=True,  # workers are processes of it, and all are ended together
            )
        os.close(asked)
        os.close(answer)
        self._calls, self._answers = os.fdopen(ask, "w"), os.fdopen(answered)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._calls.close()  # at which the child ends its engine and itself
        try:
            self._process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._answers.close()

    def start(
        self, model: Path, *, socket_path: Path | None = None, vllm_version: str | None = None, **arguments: object
    ) -> None:
        """Start an engine, with Saltern where there is a server's socket. `arguments` are those of `vllm.LLM`.

        The engine before is ended first. `vllm_version` is what vLLM says of itself.
        """
        transfer = None if socket_path is None else connector_config(socket_path, patience_ms=10_000)
        self._call("start", {"model": str(model), "kv_transfer_config": transfer, **arguments}, vllm_version)

    def end(self) -> None:
        """End the engine."""
        self._call("end")

    def ask(
        self, prompt: Sequence[int], salt: str, *, lora: Lora | None = None, embeddings_seed: int | None = None
    ) -> Answer:
        """Complete a prompt, and return when the engine has no more to do: what it stores is stored.

        With `embeddings_seed`, random embeddings stand in the place of the prompt's tokens.
        """
        adapter = None if lora is None else msgspec.to_builtins(lora)
        return msgspec.convert(self._call("ask", prompt, salt, adapter, embeddings_seed), Answer)

    def block_tokens(self) -> int:
        """Return how long the running engine's blocks of the cache are."""
        return int(self._call("block_tokens"))

    def vllm_version(self) -> str:
        """Return the version of vLLM that the engines are."""
        return str(self._call("vllm_version"))

    def forget(self, what: str) -> None:
        """Let the running engine leave something out of its keys, so that a test may see what that leads to.

        `what` is "namespace", "version" (of vLLM, in the namespace), "adapter", "files" (of an adapter, which then goes
        by its name), "embeddings" (that they aren't token ids), "change" (of weights in place), "group 0" and so on
        (that a group of layers is loaded), or "last token" (that it is computed anew).
        """
        self._call("forget", what)

    def rpc(self, method: str, *arguments: object) -> None:
        """Call a method of every worker."""
        self._call("rpc", method, arguments)

    def reset_caches(self) -> None:
        """Tell the engine that its KV is void, as whoever has changed its weights does."""
        self._call("reset_caches")

    def add_lora(self, lora: Lora) -> None:
        """Let the workers load an adapter."""
        self._call("add_lora", msgspec.to_builtins(lora))

    def remove_lora(self, number: int) -> None:
        """Let the workers forget an adapter."""
        self._call("remove_lora", number)

    def kill_worker(self, rank: int) -> None:
        """End one rank's process at once."""
        self._call("kill_worker", rank)

    def _call(self, name: str, *arguments: object) -> Any:
        print(json.dumps([name, arguments]), file=self._calls, flush=True)
        line = self._answers.readline()
        if not line:
            raise LabError(f"the engines' process ended.\n{self._log_tail()}")
        answer, error = json.loads(line)
        if error is not None:
            raise LabError(error)
        return answer

    def _log_tail(self) -> str:
        tail = self.log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"The end of {self.log_path}:", *tail])


# The child's side


class Bench:
    """What the child has: one engine at a time. Each method that has no underscore is one of `Lab`'s calls."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._patches = ExitStack()

    @property
    def _core(self) -> Any:
        return self._llm.llm_engine.engine_core.engine_core

    def start(self, arguments: dict[str, Any], vllm_version: str | None) -> None:
        import vllm
        from vllm import LLM
        from vllm.config import KVTransferConfig

        self.end()
        if vllm_version is not None:
            self._patch(vllm, "__version__", vllm_version)
        transfer = arguments.pop("kv_transfer_config")
        self._llm = LLM(
            skip_tokenizer_init=True,
            enforce_eager=True,
            kv_transfer_config=None if transfer is None else KVTransferConfig(**transfer),
            **{
                "dtype": "bfloat16",
                "max_model_len": 2048,
                "kv_cache_memory_bytes": KV_BYTES,
                "enable_prefix_caching": False,
                **arguments,
            },
        )
        if arguments.get("pipeline_parallel_size", 1) > 1:
            # vLLM makes the later stages' buffers when it warms up, which it doesn't on a CPU without compiling.
            self._llm.collective_rpc("execute_dummy_batch")

    def end(self) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._patches.close()
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            cleanup_dist_env_and_memory()

    def ask(
        self, prompt: list[int], salt: str, lora: dict[str, Any] | None, embeddings_seed: int | None
    ) -> dict[str, Any]:
        import torch
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        asked: dict[str, Any] = {"prompt_token_ids": prompt, "cache_salt": salt}
        if embeddings_seed is not None:
            generator = torch.Generator().manual_seed(embeddings_seed)
            embeddings = torch.randn(len(prompt), HIDDEN, generator=generator)
            asked = {"prompt_embeds": embeddings.to(torch.bfloat16), "cache_salt": salt}
        parameters = SamplingParams(temperature=0, max_tokens=8, logprobs=20, detokenize=False, ignore_eos=True)
        adapter = None if lora is None else LoRARequest(**lora)
        (output,) = self._llm.generate([asked], parameters, lora_request=adapter, use_tqdm=False)
        self._drain()
        choice = output.outputs[0]
        return {
            "token_ids": list(choice.token_ids),
            "logprobs": {str(token): found.logprob for token, found in choice.logprobs[0].items()},
            "cached_tokens": output.num_cached_tokens,
        }

    def _drain(self) -> None:
        """Step until nothing is stored any more, as an engine with a loop of its own does."""
        for _ in range(DRAIN_STEPS_MAX):
            if not self._core.scheduler.has_requests():
                return
            self._llm.llm_engine.step()
        raise AssertionError("the engine never came to rest")

    def block_tokens(self) -> int:
        block_tokens: int = self._core.scheduler.connector._geometry.block_tokens
        return block_tokens

    def vllm_version(self) -> str:
        import vllm

        return str(vllm.__version__)

    def forget(self, what: str) -> None:
        from saltern.vllm import connector as module
        from saltern.vllm import geometry, planner
        from saltern.vllm.namespace import namespace_digest

        connector = self._core.scheduler.connector
        match what:
            case "namespace":
                connector._planner.reset(b"all are one")
            case "version":
                facts = [worker.facts for worker in connector._handshakes]
                connector._planner.reset(namespace_digest(connector._config, vllm_version="", worker_facts=facts))
            case "adapter":
                self._patch(connector._adapters, "identity", mock.Mock(return_value=b""))
            case "files":
                named = mock.Mock(side_effect=lambda lora: lora.lora_name.encode())
                self._patch(connector._adapters, "identity", named)
            case "embeddings":
                self._patch(module, "_salt_of", mock.Mock(side_effect=lambda request, **_: request.cache_salt))
            case "change":
                self._patch(connector, "reset_cache", mock.Mock(return_value=True))
            case "last token":
                self._patch(geometry.Geometry, "keeps_all", True)
            case _ if what.startswith("group "):
                pieces = planner._pieces
                group = int(what.removeprefix("group "))
                some = lambda *asked: [piece for piece in pieces(*asked) if piece.group != group]  # noqa: E731
                self._patch(planner, "_pieces", some)
            case _:
                raise ValueError(f"nothing is known of {what!r}")

    def _patch(self, target: object, name: str, replacement: object) -> None:
        self._patches.enter_context(mock.patch.object(target, name, replacement))

    def rpc(self, method: str, arguments: list[Any]) -> None:
        self._llm.collective_rpc(method, args=tuple(arguments))

    def reset_caches(self) -> None:
        assert self._llm.llm_engine.reset_prefix_cache(reset_running_requests=True, reset_connector=True)

    def add_lora(self, lora: dict[str, Any]) -> None:
        from vllm.lora.request import LoRARequest

        self._llm.llm_engine.add_lora(LoRARequest(**lora))

    def remove_lora(self, number: int) -> None:
        self._llm.llm_engine.remove_lora(number)

    def kill_worker(self, rank: int) -> None:
        os.kill(self._core.model_executor.workers[rank].proc.pid, signal.SIGKILL)


def main() -> None:
    """Do what is called, line by line, until there is nobody left to call."""
    calls, answers = os.fdopen(int(sys.argv[1])), os.fdopen(int(sys.argv[2]), "w")
    bench = Bench()
    for line in calls:
        name, arguments = json.loads(line)
        answer, error = None, None
        try:
            answer = getattr(bench, name)(*arguments)
        except Exception:  # noqa: BLE001 - whatever vLLM raises is the answer
            error = traceback.format_exc()
        print(json.dumps([answer, error]), file=answers, flush=True)
    bench.end()


if __name__ == "__main__":
    main()
