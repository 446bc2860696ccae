"""What an engine without an API in front takes: requests whose parts have any type, beside somebody who behaves."""

from typing import Any
from unittest import mock

import pytest

pytest.importorskip("vllm", reason="the harness runs vLLM's own scheduler")

from vllm.v1.request import Request

from . import engine as engine_module
from .engine import Engine
from .options import Options
from .saltern_lives import stepped

PROMPT = [1] * 40  # two blocks of 16, and some
CACHED = 32

SALTS: dict[str, Any] = {
    "number": 7,
    "zero": 0,
    "yes": True,
    "fraction": 1.5,
    "bytes": b"alice",
    "list": ["alice"],
    "dict": {"alice": 1},
    "object": ("alice", None),
}
"""Salts that are none. A request with one is answered, and not cached: nobody can say whose it would be."""

TEXTS = {
    "empty": "",
    "nul": "\0",
    "half a character": "\ud800",
    "large": "a" * 1_000_000,
    "path": "../../etc",
    "nearly": "alice\0",
    "other form": "e\u0301",
    "form": "é",
}

EXTRAS: dict[str, dict[str, Any]] = {
    "transfer": {"extra_args": {"kv_transfer_params": {"do_remote_prefill": True, "do_remote_decode": True}}},
    "another's salt": {"extra_args": {"cache_salt": "alice", "kv_transfer_params": {"cache_salt": "alice"}}},
    "log probabilities": {"prompt_logprobs": 1},
    "reading nothing": {"skip_reading_prefix_cache": True},
    "stop tokens": {"stop_token_ids": [10**6]},
}


def add(engine: Engine, name: str, salt: Any, max_tokens: int, **sampling: Any) -> None:
    """Send the prompt with a salt of any type."""

    def carrying(**parts: Any) -> Request:
        return Request(**{**parts, "cache_salt": salt})

    with mock.patch.object(engine_module, "Request", carrying):
        engine.add(name, PROMPT, salt if isinstance(salt, str) else None, max_tokens, **sampling)


def ask(engine: Engine, name: str, salt: Any, **sampling: Any) -> int:
    """Ask for the prompt, to the end, and return how many tokens the cache had."""
    add(engine, name, salt, max_tokens=2, **sampling)
    engine.run()
    assert engine.answers[name].finish_reason == "length"
    return engine.answers[name].external_tokens


@pytest.mark.parametrize("prefix_caching", [False, True], ids=["", "beside vLLM's own cache"])
def test_whatever_a_request_carries_it_is_answered_and_the_others_go_on(prefix_caching: bool) -> None:
    options = Options(prefix_caching=prefix_caching, tag_users=True)
    expected = 0 if prefix_caching else CACHED  # vLLM's own cache comes first
    with stepped(options) as subject, subject.engine(options) as engine:
        assert ask(engine, "alice's first", "alice") == 0
        for name, salt in SALTS.items():
            assert [ask(engine, f"{name} {turn}", salt) for turn in (1, 2)] == [0, 0], (
                f"a salt that is {name} was a user"
            )
        for name, salt in TEXTS.items():
            assert [ask(engine, f"{name} {turn}", salt) for turn in (1, 2)] == [0, expected]
        for name, extra in EXTRAS.items():
            may_read = not {"prompt_logprobs", "skip_reading_prefix_cache"} & extra.keys()
            assert ask(engine, f"alice's {name}", "alice", **extra) == expected * may_read
            assert ask(engine, f"nobody's {name}", f"{name}", **extra) == 0
        assert ask(engine, "alice's last", "alice") == expected
        engine.check_drained()


def test_all_at_once_they_leave_nothing() -> None:
    options = Options(tag_users=True, blocks=24, asynchronous=True)
    with stepped(options) as subject, subject.engine(options) as engine:
        for turn in range(3):
            for name, salt in {**SALTS, **TEXTS}.items():
                add(engine, f"{name} {turn}", salt, max_tokens=4)
                if turn == 1:
                    engine.step()
                    engine.abort(f"{name} {turn}", while_executing=True)
            engine.run()
        engine.check_drained()
