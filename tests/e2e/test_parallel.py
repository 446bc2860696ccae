"""Engines of several ranks, and models with one latent for all heads: a prefix comes back to all ranks or to none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.engine import Engine
from demo.server import Server, connector_config
from saltern.core.snapshot import Snapshot
from tests.e2e.lab import Lab, LabError
from tests.e2e.models import CACHED, PROMPT, make_deepseek, make_llama

pytestmark = pytest.mark.e2e

NEEDS_AMX = pytest.mark.skipif(
    "amx_tile" not in Path("/proc/cpuinfo").read_text(), reason="vLLM reuses no prefix of MLA on a CPU without AMX"
)

FORMS = [  # the last but one is the number of ranks
    pytest.param(make_llama, 2, {"tensor_parallel_size": 2}, id="TP 2"),
    pytest.param(make_llama, 2, {"pipeline_parallel_size": 2}, id="PP 2"),
    pytest.param(make_deepseek, 1, {}, id="MLA", marks=NEEDS_AMX),
    pytest.param(make_deepseek, 2, {"tensor_parallel_size": 2}, id="MLA with TP 2", marks=NEEDS_AMX),
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path, arena="64 MiB")
    server.start()
    yield server
    server.stop()


@pytest.mark.parametrize(("make_model", "ranks", "arguments"), FORMS)
def test_a_prefix_comes_back_to_all_ranks(
    lab: Lab,
    server: Server,
    tmp_path: Path,
    make_model: Callable[[Path], Path],
    ranks: int,
    arguments: dict[str, Any],
) -> None:
    model = make_model(tmp_path / "model")
    lab.start(model, enable_prefix_caching=True, **arguments)  # its own hits are rounded as ours are
    computed, found = lab.ask(PROMPT, "alice"), lab.ask(PROMPT, "alice")
    assert (computed.cached_tokens, found.cached_tokens) == (0, CACHED)

    lab.start(model, socket_path=server.socket_path, **arguments)
    assert lab.ask(PROMPT, "alice") == computed
    assert lab.ask(PROMPT, "alice") == found
    assert lab.ask(PROMPT, "bob") == computed

    if ranks > 1:
        lab.kill_worker(ranks - 1)
        with pytest.raises(LabError):
            lab.ask(PROMPT, "alice")
        lab.end()
        server.wait_for("the dead engine's leases to end", _is_at_rest)

    lab.start(model, socket_path=server.socket_path, **arguments)
    assert lab.ask(PROMPT, "alice") == found
    assert lab.ask(PROMPT, "carol") == computed
    server.wait_for("all leases to end", _is_at_rest)


@NEEDS_AMX
def test_ranks_with_one_latent_share_it_in_the_cache(lab: Lab, server: Server, tmp_path: Path) -> None:
    """Both ranks hold the same KV, and what one has written both read: the test above sees that it is right."""
    model = make_deepseek(tmp_path / "model")
    sizes = []
    for ranks in (1, 2):
        lab.start(model, socket_path=server.socket_path, tensor_parallel_size=ranks)
        (session,) = server.stats().sessions
        assert session.workers == ranks
        sizes.append(session.block_bytes)
        lab.end()
        server.wait_for("the session to end", lambda snapshot: not snapshot.sessions)
    assert sizes[0] == sizes[1]


def test_mla_is_refused_where_vllm_reuses_no_prefix_of_it(lab: Lab, server: Server, tmp_path: Path) -> None:
    model = make_deepseek(tmp_path / "model")
    reference: dict[str, Any] = {"attention_config": {"backend": "CPU_MLA"}}
    with pytest.raises(LabError, match="MLA on this CPU"):
        lab.start(model, socket_path=server.socket_path, **reference)
    lab.start(model, enable_prefix_caching=True, **reference)
    assert [lab.ask(PROMPT, "alice").cached_tokens for _ in range(2)] == [0, 0]


def test_engines_of_one_server_find_what_the_other_has_stored(model: Path, server: Server, tmp_path: Path) -> None:
    """Data parallel ranks are such engines: each has a scheduler, and so a session, of its own."""
    tiny = make_llama(tmp_path / "tiny")
    for file in model.glob("tokenizer*"):  # without one, vLLM's API serves nothing
        shutil.copy(file, tiny)
    engine = Engine(
        tiny,
        log_path=tmp_path / "vllm.log",
        kv_transfer_config=connector_config(server.socket_path, patience_ms=10_000),
        prefix_caching=False,
        extra_args=("--data-parallel-size", "2", "--max-model-len", "2048"),
        env={"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
    )
    with engine:
        sessions = server.wait_for("two sessions", lambda snapshot: len(snapshot.sessions) == 2).sessions
        assert sessions[0].engine != sessions[1].engine
        computed = _complete(engine, rank=0)
        server.wait_for_blocks("alice", 2)
        answers = [_complete(engine, rank=rank) for rank in (1, 0, 1)]
    assert computed["cached_tokens"] == 0
    assert answers == [computed | {"cached_tokens": CACHED}] * 3
    server.wait_for("all leases to end", _is_at_rest)


def _complete(engine: Engine, *, rank: int) -> dict[str, Any]:
    """Have one data parallel rank complete the prompt."""
    connection = engine.connect()
    body = {
        "model": "tiny",
        "prompt": PROMPT,
        "cache_salt": "alice",
        "max_tokens": 8,
        "temperature": 0,
        "return_token_ids": True,
    }
    headers = {"Content-Type": "application/json", "X-data-parallel-rank": str(rank)}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    answer = json.load(connection.getresponse())
    connection.close()
    return {
        "token_ids": answer["choices"][0]["token_ids"],
        "cached_tokens": answer["usage"]["prompt_tokens_details"]["cached_tokens"],
    }


def _is_at_rest(snapshot: Snapshot) -> bool:
    leases = sum(session.read_leases + session.write_leases for session in snapshot.sessions)
    return not leases and not snapshot.arena.pinned_blocks and not snapshot.arena.writing_blocks
