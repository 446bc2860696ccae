"""A real vLLM as a child process, and the few requests that the demo, the tests and the benchmarks send it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import msgspec

from demo.interrupts import deferred
from demo.model import DTYPE

START_SECONDS_MAX = 500.0  # a quiet machine with two cores takes 25; a loaded one many times that
STOP_SECONDS_MAX = 20.0
REQUEST_SECONDS_MAX = 300.0  # 7,000 tokens computed cold on two busy cores take the better part of a minute
POLL_SECONDS = 0.1
LOG_TAIL_LINES = 40
MODEL_MAX_TOKENS = 8192

# What `vllm serve` runs for one API server; docs/decisions/0004-vllm-by-module.md says why it is not the command.
VLLM_MODULE = "vllm.entrypoints.launchers.api_server.entry"


class EngineError(Exception):
    """The engine did not start, died or went silent; the message ends with the tail of its log."""


class RequestError(Exception):
    """The engine answered a request with an error, which its user would have got as well."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"vLLM answered {status}: {message}")
        self.status = status


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """What one request came to.

    `cached_tokens` is what vLLM reports as not computed, whichever cache they came from. `ttft_ms` runs from before the
    request is sent until the first token is here.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    ttft_ms: float
    gaps_ms: tuple[float, ...] = ()  # from each token to the next


class Engine:
    """One vLLM with one model on a free port of 127.0.0.1, used as a context manager.

    `extra_args` and `env` go to vLLM as they are and win over the defaults here, which buy a fast start. The log of
    all its processes is appended to `log_path`, so that an engine started twice tells both stories.
    """

    def __init__(
        self,
        model: Path,
        *,
        log_path: Path,
        kv_transfer_config: Mapping[str, object] | None = None,
        prefix_caching: bool = True,
        kv_cache_gib: int = 1,
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.log_path = log_path
        self.port = 0
        self._model = model
        self._kv_transfer_config = kv_transfer_config
        self._prefix_caching = prefix_caching
        self._kv_cache_gib = kv_cache_gib
        self._extra_args = tuple(extra_args)
        self._env = dict(env or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = "stopped" if self._process is None else f"pid {self._process.pid}, port {self.port}"
        return f"<Engine {self._model.name}: {state}>"

    @property
    def pid(self) -> int:
        """The process id of the API server, which is also the id of the group of all its processes."""
        assert self._process is not None, "an engine that was not started has no process"
        return self._process.pid

    @property
    def is_started(self) -> bool:
        """Whether there are processes to be ended, whatever has become of them."""
        return self._process is not None

    # Life and death

    def start(self, seconds_max: float = START_SECONDS_MAX) -> None:
        """Start vLLM and wait until it serves.

        Raises `EngineError`, with nothing left running, when it ends or is not healthy within `seconds_max`.
        """
        self.launch()
        self.wait_until_healthy(seconds_max)

    def launch(self) -> None:
        """Start vLLM; `wait_until_healthy` is to follow."""
        assert self._process is None, "an engine is started once, or again after stop"
        self.port = _free_port()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with deferred(), self.log_path.open("ab") as log:
                # vLLM leaves its sockets behind in the folder for temporary files, so it gets one that goes with it.
                self._scratch = tempfile.TemporaryDirectory(prefix="saltern-engine-")
                self._process = self._spawn(log, scratch=self._scratch.name)
        except BaseException:
            self.kill()
            raise

    def wait_until_healthy(self, seconds_max: float = START_SECONDS_MAX) -> None:
        """Wait until a launched vLLM serves.

        Raises `EngineError`, with nothing left running, when it ends or is not healthy within `seconds_max`.
        """
        deadline = time.monotonic() + seconds_max
        try:
            while time.monotonic() < deadline:
                if self._ended():
                    raise EngineError(f"vLLM ended while it started.\n{self.log_tail()}")
                if self._healthy():
                    return
                time.sleep(POLL_SECONDS)
            raise EngineError(f"vLLM was not healthy after {seconds_max:.0f} s.\n{self.log_tail()}")
        except BaseException:
            self.kill()
            raise

    def stop(self, seconds_max: float = STOP_SECONDS_MAX) -> None:
        """Ask vLLM to stop, and kill what is left of it after `seconds_max`; does nothing when it is not running."""
        if self._process is None:
            return
        if not self._ended():
            os.kill(self.pid, signal.SIGTERM)
        # Its children outlive the API server for a moment, in which a worker lets go of what it holds.
        _wait_until_gone(self.pid, seconds_max)
        self.kill()

    def kill(self) -> None:
        """End every process of the engine at once, as a crash would, and return when they are gone.

        Spared until the last is Python's resource tracker: it unlinks the shared memory of processes that died.
        """
        with deferred():
            self._kill()

    def _kill(self) -> None:
        if self._process is None:
            return
        for pid in _living(self.pid):
            if not _is_resource_tracker(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        _wait_until_gone(self.pid, STOP_SECONDS_MAX)
        # The API server is not reaped before this, so its id still names the group that we made and no other.
        os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        if self._scratch is not None:
            self._scratch.cleanup()

    def _spawn(self, log: IO[bytes], *, scratch: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", VLLM_MODULE, *self._arguments()],
            env=self._environment(scratch),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, so that all of it can be ended and nothing else
        )

    def _arguments(self) -> list[str]:
        arguments = [
            *("--model", str(self._model)),
            *("--served-model-name", self._model.name),
            *("--host", "127.0.0.1"),
            *("--port", str(self.port)),
            *("--dtype", DTYPE),
            *("--max-model-len", str(MODEL_MAX_TOKENS)),
            "--enforce-eager",  # compiling would double the start
            "--enable-prompt-tokens-details",  # without it no answer says how many tokens were cached
            "--enable-prefix-caching" if self._prefix_caching else "--no-enable-prefix-caching",
        ]
        if self._kv_transfer_config is not None:
            arguments += ["--kv-transfer-config", json.dumps(self._kv_transfer_config)]
        return [*arguments, *self._extra_args]

    def _environment(self, scratch: str) -> dict[str, str]:
        cores = sorted(os.sched_getaffinity(0))
        return {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "TMPDIR": scratch,
            "VLLM_HOST_IP": "127.0.0.1",  # its processes meet on this machine and are seen from no other
            "VLLM_CPU_KVCACHE_SPACE": str(self._kv_cache_gib),  # GiB; a given size skips the profiling run
            # By default vLLM leaves a core idle, which is half of a machine with two.
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            **self._env,
        }

    def _healthy(self) -> bool:
        try:
            self.get("/health")
        except (RequestError, EngineError):
            return False
        return True

    def _ended(self) -> bool:
        return self.pid not in _living(self.pid)

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        """Return the path of the log and its last `lines` lines."""
        tail = self.log_path.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join([f"The end of {self.log_path}:", *tail])

    # Requests

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        salt: str | None = None,
        key: str | None = None,
        max_tokens: int = 16,
        temperature: float = 0.0,
        fields: Mapping[str, object] | None = None,
    ) -> Completion:
        """Complete a prompt, given as text or token ids, and measure the time to the first token.

        `salt` is sent as `cache_salt` and `key` as the API key, and left out when None. `fields` are further fields of
        the request's body. May be called from several threads at once. Raises `RequestError` for an error answer,
        `EngineError` for none.
        """
        body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": temperature,
            **({} if salt is None else {"cache_salt": salt}),
            **(fields or {}),
        }
        return self._generate("/v1/completions", body, key)

    def chat(self, system_prompt: str, message: str, *, key: str | None = None, max_tokens: int = 16) -> Completion:
        """Let the model answer a user's first message under a system prompt. Measures and raises as `complete` does."""
        messages = [{"role": "system", "content": system_prompt}, {"role": "user", "content": message}]
        body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0.0}
        return self._generate("/v1/chat/completions", body, key)

    def _generate(self, path: str, fields: Mapping[str, object], key: str | None) -> Completion:
        body = {
            "model": self._model.name,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            **fields,
        }
        connection = self.connect()
        try:
            sent_at = time.monotonic()
            response = _send(connection, "POST", path, msgspec.json.encode(body), key)
            return _read_completion(response, sent_at)
        except (OSError, HTTPException) as error:
            raise EngineError(f"vLLM broke off a request: {error!r}.\n{self.log_tail()}") from error
        finally:
            connection.close()

    def get(self, path: str) -> str:
        """Fetch a page such as `/metrics`. Raises as `complete` does."""
        connection = self.connect()
        try:
            return _send(connection, "GET", path).read().decode()
        except (OSError, HTTPException) as error:
            raise EngineError(f"vLLM did not answer {path}: {error!r}.\n{self.log_tail()}") from error
        finally:
            connection.close()

    def post(self, path: str, body: Mapping[str, object]) -> bytes:
        """Send a request as JSON and return the answer as it is. Raises as `complete` does."""
        connection = self.connect()
        try:
            return _send(connection, "POST", path, msgspec.json.encode(body)).read()
        except (OSError, HTTPException) as error:
            raise EngineError(f"vLLM did not answer {path}: {error!r}.\n{self.log_tail()}") from error
        finally:
            connection.close()

    def connect(self) -> HTTPConnection:
        """Return a connection of one's own to the API server."""
        return HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_SECONDS_MAX)


# The parts of a streamed completion that are read. Each event is one line `data: JSON`, the last is `data: [DONE]`.


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str = ""
    delta: _Delta | None = None  # a chat's; its first names the speaker, and comes before there is any token
    token_ids: list[int] | None = None


class _PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class _Usage(msgspec.Struct):
    prompt_tokens: int
    prompt_tokens_details: _PromptTokensDetails


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, object] | None = None  # a request that fails after its first byte is told so in the stream


def _send(
    connection: HTTPConnection, method: str, path: str, body: bytes | None = None, key: str | None = None
) -> HTTPResponse:
    authorization = {} if key is None else {"Authorization": f"Bearer {key}"}
    connection.request(method, path, body, {"Content-Type": "application/json", **authorization})
    response = connection.getresponse()
    if response.status != 200:
        raise RequestError(response.status, response.read().decode(errors="replace"))
    return response


def _read_completion(response: HTTPResponse, sent_at: float) -> Completion:
    text: list[str] = []
    token_ids: list[int] = []
    arrivals: list[float] = []
    usage: _Usage | None = None
    for chunk in _chunks(response):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            if choice.delta is not None and not choice.token_ids:
                continue
            arrivals.append(time.monotonic())
            text.append(choice.text if choice.delta is None else choice.delta.content or "")
            token_ids += choice.token_ids or []
    if usage is None or not arrivals:
        raise HTTPException("the stream ended before the completion did")
    return Completion(
        text="".join(text),
        token_ids=tuple(token_ids),
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.prompt_tokens_details.cached_tokens,
        ttft_ms=(arrivals[0] - sent_at) * 1e3,
        gaps_ms=tuple((later - earlier) * 1e3 for earlier, later in pairwise(arrivals)),
    )


def _chunks(response: HTTPResponse) -> Iterator[_Chunk]:
    decoder = msgspec.json.Decoder(_Chunk)
    for line in response:
        data = line.removeprefix(b"data: ").strip()
        if not data or data == b"[DONE]":
            continue
        chunk = decoder.decode(data)
        if chunk.error is not None:
            raise RequestError(response.status, str(chunk.error.get("message", chunk.error)))
        yield chunk


def _wait_until_gone(group: int, seconds_max: float) -> bool:
    """Wait until no process of a group is alive, for `seconds_max` at most, and say whether that came true."""
    deadline = time.monotonic() + seconds_max
    while _living(group) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return not _living(group)


def _living(group: int) -> set[int]:
    """Return the ids of a process group's members that have not exited; zombies have."""
    living = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # pid (name) state parent group …; the name may hold spaces and parentheses, hence the last ")".
            state, _parent, member_of = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it exited between the listing and the reading
        if int(member_of) == group and state not in "ZX":
            living.add(int(stat.parent.name))
    return living


def _is_resource_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def started_together(*engines: Engine) -> Iterator[None]:
    """Start engines side by side, and end them: a start is imports for the most part, which keep one core busy."""
    try:
        for engine in engines:
            engine.launch()
        for engine in engines:
            engine.wait_until_healthy()
        yield
    finally:
        for engine in reversed(engines):
            engine.stop()


def _free_port() -> int:
    """Find a port that is free now. Another process may take it before vLLM does: vLLM then ends and says so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
