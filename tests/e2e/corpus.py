"""The corpus: requests that no honest client sends, one a name, for a vLLM of `CONTEXT_TOKENS` with SmolLM2.

All that a request carries is here in every shape that JSON has, and some that it hasn't. None of them takes long: what
they come to must be the same with and without a connector.
"""

from __future__ import annotations

import json
import pickle
from base64 import b64encode
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec

from demo.model import MODEL_NAME
from tests.e2e.conftest import SALT_MARK
from tests.e2e.models import make_lora

CONTEXT_TOKENS = 1024
VOCABULARY = 49_152
HIDDEN = 576  # SmolLM2-135M's
LAYERS, KV = 30, 3 * 64
ADAPTER = "adapter"

ENGINE_ARGS = (
    *("--max-model-len", str(CONTEXT_TOKENS)),
    "--enable-prompt-embeds",
    *("--scheduling-policy", "priority"),
    "--enable-request-id-headers",
    "--enable-scale-out",  # the routes that take token ids as they are
)

COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/inference/v1/generate"

DEEP: dict[str, Any] = {}
for _ in range(200):
    DEEP = {"": DEEP}


class Case(msgspec.Struct, frozen=True):
    """One request, as it goes over the wire."""

    body: bytes
    path: str = COMPLETIONS
    headers: dict[str, str] = {}


def case(path: str = COMPLETIONS, /, **fields: Any) -> Case:
    """Make a request that is right but for `fields`."""
    base: dict[str, Any] = {"model": MODEL_NAME, "max_tokens": 2, "temperature": 0.0}
    match path:
        case "/v1/chat/completions":
            base["messages"] = [{"role": "user", "content": "Good morning"}]
        case "/inference/v1/generate":
            base = {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 2, "temperature": 0.0}}
        case _:
            base["prompt"] = "Good morning"
    return Case(json.dumps(base | fields).encode(), path)


def corpus() -> dict[str, Case]:
    """Return all of them, by name, in the order in which they are sent."""
    return _salts() | _transfers() | _prompts() | _embeddings() | _numbers() | _outputs() | _models() | _bodies()


def adapter_args(folder: Path) -> tuple[str, ...]:
    """Return the arguments of an engine with an adapter, which is written to `folder`.

    It gets a corpus of its own: on a CPU, with adapters, `prompt_logprobs` beside other requests end vLLM 0.32 itself.
    """
    adapter = {"name": ADAPTER, "path": str(make_lora(folder, seed=1, layers=LAYERS, hidden=HIDDEN, kv=KV))}
    context = ("--max-model-len", str(CONTEXT_TOKENS))
    return (*context, "--enable-lora", "--max-lora-rank", "8", "--lora-modules", json.dumps(adapter))


def adapters() -> dict[str, Case]:
    """Return requests for adapters that are there and that aren't, by name, for an engine with `adapter_args`."""
    request = {"lora_name": ADAPTER, "lora_int_id": -1, "lora_path": "/"}
    names: tuple[Any, ...] = (
        ADAPTER,
        f"{ADAPTER} ",
        f"{ADAPTER}\0",
        f"../{ADAPTER}",
        f"{ADAPTER}\ud800",
        ADAPTER.upper(),
        ADAPTER * 10_000,
        [ADAPTER],
        request,
        1,
        -1,
    )
    cases = {f"{str(name)[:12]!r} {number}": case(model=name) for number, name in enumerate(names)}
    cases |= {f"chat {name!r}": case(CHAT, model=name) for name in (ADAPTER, f"{ADAPTER}/", "")}
    for field in ("lora_name", "lora_request", "adapter", "lora_int_id"):
        cases |= {f"{field}: {value!r}": case(**{field: value}) for value in (ADAPTER, request, 2**63, None)}
    long = "Good morning. " * 80  # two blocks and more
    for number, salt in enumerate(("a", "a", "b", None, "", 7)):
        cases[f"adapter of salt {number}"] = case(model=ADAPTER, prompt=long, cache_salt=salt)
        cases[f"model of salt {number}"] = case(prompt=long, cache_salt=salt)
    return cases


def _salts() -> dict[str, Case]:
    values: dict[str, Any] = {
        "none": None,
        "empty": "",
        "number": 7,
        "huge number": 10**40,
        "fraction": 1.5,
        "yes": True,
        "list": ["a"],
        "dict": {"a": 1},
        "half a character": SALT_MARK + "\ud800",
        "two halves": SALT_MARK + "\udc00\ud800",
        "nul": SALT_MARK + "\0",
        "control": SALT_MARK + "\x1b[2J\r\n\t",
        "path": f"../{SALT_MARK}",
        "at": f"{SALT_MARK}@x",
        "format": SALT_MARK + "%s{0}${HOME}",
        "longest": SALT_MARK.ljust(128, "x"),
        "too long": SALT_MARK.ljust(129, "x"),
        "endless": SALT_MARK * 60_000,
        "wide": SALT_MARK + "\U0010ffff\ufffe\u202e",
    }
    routes = {"": COMPLETIONS, "chat ": CHAT, "generate ": GENERATE, "invocations ": "/invocations"}
    return {
        f"salt: {route}{name}": case(path, cache_salt=value, **({"prompt": "Good morning"} if "inv" in route else {}))
        for route, path in routes.items()
        for name, value in values.items()
        if not route or name in {"empty", "list", "half a character", "longest", "too long"}
    }


def _transfers() -> dict[str, Case]:
    values: dict[str, Any] = {
        "empty": {},
        "none": None,
        "text": "x",
        "number": 7,
        "list": [{}],
        "yes": True,
        "fraction": 1e308,
        "prefill": {
            "do_remote_prefill": True,
            "remote_block_ids": [1, 2],
            "remote_engine_id": "x",
            "remote_host": "::1",
            "remote_port": 1,
        },
        "decode": {"do_remote_decode": True, "remote_block_ids": "none", "remote_engine_id": None, "tp_size": -1},
        "settings": {
            "saltern.socket": "/dev/null",
            "cache_salt": SALT_MARK,
            "tenant": [0],
            "load_failure_policy": "fail",
        },
        "odd names": {"": 1, "\0": 2, "\ud800": 3, "🧂": 4, "__class__": 5},
        "deep": DEEP,
        "large numbers": {"a": 2**63, "b": -(2**63)},
        "huge numbers": {"a": 2**64, "b": -(2**70)},
        "not numbers": {"a": float("nan"), "b": float("inf")},
        "many": {str(number): number for number in range(5000)},
        "long": {"a": "x" * 1_000_000},
    }
    cases = {f"transfer: {name}": case(kv_transfer_params=value) for name, value in values.items()}
    xargs: dict[str, Any] = {
        "transfer": {"kv_transfer_params": "x"},
        "salt": {"cache_salt": SALT_MARK, "skip_reading_prefix_cache": 1},
        "list": ["x"],
        "huge": {"a": 2**70},
        "nested": {"a": {"b": 1}},
    }
    cases |= {f"xargs: {name}": case(vllm_xargs=value) for name, value in xargs.items()}
    return cases | {
        "transfer: both ways": case(kv_transfer_params={"a": 1}, vllm_xargs={"kv_transfer_params": 1}),
        "transfer: other cache": case(ec_transfer_params={"do_remote_prefill": True}),
        "transfer: generate": case(GENERATE, kv_transfer_params={"do_remote_prefill": True}),
        "transfer: stream": case(kv_transfer_params={"do_remote_decode": True}, stream=True),
    }


def _prompts() -> dict[str, Case]:
    values: dict[str, Any] = {
        "none": None,
        "empty": "",
        "no tokens": [],
        "empty lists": [[], []],
        "one empty": [[1], []],
        "number": 7,
        "dict": {"a": 1},
        "mixed": [1, "a"],
        "fraction": [1.5],
        "yes": [True],
        "null": [None],
        "text and tokens": [[1], "a"],
        "nested": [[[1]]],
        "last token": [VOCABULARY - 1],
        "beyond the vocabulary": [1, VOCABULARY],
        "negative": [1, -1],
        "31 bits": [2**31 - 1],
        "32 bits": [2**31],
        "below 32 bits": [-(2**31) - 1],
        "63 bits": [1] * 300 + [2**63 - 1],
        "64 bits": [2**63],
        "more bits": [2**70],
        "longest": [5] * (CONTEXT_TOKENS - 2),
        "full": [5] * (CONTEXT_TOKENS - 1),
        "no room": [5] * CONTEXT_TOKENS,
        "too long": [5] * (CONTEXT_TOKENS + 1),
        "enormous": [5] * 200_000,
        "enormous text": "salt " * 200_000,
        "no text": "\ud800",
        "nul": "\0",
        "several": ["a", "b", "c"],
        "many": [[5]] * 40,
    }
    cases = {f"prompt: {name}": case(prompt=value) for name, value in values.items()}
    tokens: tuple[Any, ...] = ([], [-1], [VOCABULARY], [2**31], [2**63], [2**64], "x", None, [5] * CONTEXT_TOKENS)
    cases |= {f"tokens: {str(value)[:20]}": case(GENERATE, token_ids=value) for value in tokens}
    return cases | {
        f"truncate: {value}": case(prompt=[5] * 300, truncate_prompt_tokens=value)
        for value in (-2, -1, 0, 1, 2**63, "x")
    }


def _embeddings() -> dict[str, Case]:
    import torch

    def packed(tensor: Any) -> str:
        buffer = BytesIO()
        torch.save(tensor, buffer)
        return b64encode(buffer.getvalue()).decode()

    generator = torch.Generator().manual_seed(1)
    good = torch.randn(300, HIDDEN, generator=generator).to(torch.bfloat16)
    values: dict[str, Any] = {
        "good": packed(good),
        "again": packed(good),
        "several": [packed(good[:3]), packed(good[3:9])],
        "one token": packed(good[:1]),
        "batch": packed(good[None]),
        "no tokens": packed(good[:0]),
        "narrow": packed(good[:, :7]),
        "flat": packed(good[0]),
        "double": packed(good[:5].double()),
        "integers": packed(torch.ones(5, HIDDEN, dtype=torch.int64)),
        "not numbers": packed(good[:5] * float("nan")),
        "sparse": packed(good[:5].float().to_sparse()),
        "longer than the context": packed(torch.zeros(CONTEXT_TOKENS + 1, HIDDEN, dtype=torch.bfloat16)),
        "complex": packed(torch.ones(5, HIDDEN, dtype=torch.complex64)),
        "dict": packed({"a": good[:5]}),
        "pickle": b64encode(pickle.dumps(print)).decode(),
        "no base 64": "!",
        "no tensor": b64encode(b"x" * 100).decode(),
        "cut off": packed(good)[:4000],
        "empty": "",
        "no list": [],
        "number": 7,
        "null in a list": [None],
    }
    cases = {f"embeddings: {name}": case(prompt=None, prompt_embeds=value) for name, value in values.items()}
    return cases | {
        "embeddings: salted": case(prompt=None, prompt_embeds=packed(good), cache_salt=SALT_MARK + "-embeddings"),
        "embeddings: beside text": case(prompt_embeds=packed(good[:5])),
        "embeddings: with log probabilities": case(prompt=None, prompt_embeds=packed(good[:5]), prompt_logprobs=1),
    }


def _numbers() -> dict[str, Case]:
    values: dict[str, tuple[Any, ...]] = {
        "prompt_logprobs": (0, 1, 20, 21, -1, -2, 2**31, 2**63, 1.5, True, "1", [1]),
        "priority": (0, 9, -9, 2**31, 2**63 - 1, -(2**63), 2**63, 2**64, 10**40, 1.5, "x", None, True),
        "max_tokens": (0, -1, 1, 2**63, 10**40, "x"),
        "min_tokens": (-1, 2, 3, 2**63),
        "n": (0, -1, 1, 3, 20_000, 2**63, 1.5, "x"),
        "logprobs": (0, 5, 21, -1, 2**63),
        "seed": (0, -1, 2**63 - 1, 2**63, "x"),
        "temperature": (-1, 2, 1e308, float("nan"), "x"),
        "top_p": (0, 1, 2, -1),
        "top_k": (0, -1, -2, 1, 2**63),
        "stream_interval": (0, 1, 2**63),
        "routed_experts_prompt_start": (-1, 2**63),
        "repetition_penalty": (0, -1, 1e-30),
        "length_penalty": (float("inf"),),
    }
    return {
        f"{name}: {str(value)[:24]}": case(**{"seed": 1, name: value})
        for name, several in values.items()
        for value in several
    } | {"prompt_logprobs: stream": case(prompt_logprobs=1, stream=True), "logprobs: echo": case(logprobs=1, echo=True)}


def _outputs() -> dict[str, Case]:
    schema = {"type": "object", "properties": {"a": {"enum": ["b"]}}, "required": ["a"]}
    values: dict[str, tuple[Any, ...]] = {
        "stop": ("", "o", ["", "x"], [None], ["x" * 100_000], [str(number) for number in range(2000)], 7, {"a": 1}),
        "stop_token_ids": ([-1], [VOCABULARY], [2**63], "x", [None]),
        "bad_words": ([""], ["a"] * 200, "x", [None]),
        "logit_bias": ({"1": 1000}, {"-1": 1}, {str(VOCABULARY): 1}, {"x": 1}, [], {str(2**63): 1}),
        "allowed_token_ids": ([], [5], [VOCABULARY], [-1], [2**63], "x"),
        "suffix": ("x", 7),
        "stream_options": ({}, "x", {"include_usage": 7}),
        "structured_outputs": (
            {"regex": "[0-9]{2}"},
            {"regex": "("},
            {"json": schema},
            {"json": "{"},
            {"choice": []},
            {"choice": ["yes", "no"]},
            {"grammar": "root ::= "},
            {"regex": "a", "choice": ["a"]},
            {"structural_tag": "x"},
            "x",
            {},
        ),
        "response_format": ({"type": "json_object"}, {"type": "x"}, {"type": "json_schema", "json_schema": 7}, "x"),
        "use_beam_search": (True, "x"),
        "echo": (True, "x"),
        "session_id": ("x" * 10_000, 7),
        "user": ("x" * 10_000, SALT_MARK),
        "request_id": ("", "x", "../\0", "x" * 10_000, 7),
        "watermarking": (True,),
        "thinking_token_budget": (-7, 2**63, "x"),
        "repetition_detection": ({}, {"max_pattern_size": -1}, "x"),
    }
    return {
        f"{name}: {str(value)[:24]} {number}": case(**{name: value})
        for name, several in values.items()
        for number, value in enumerate(several)
    }


def _models() -> dict[str, Case]:
    names = (
        None,
        "",
        "../../etc/passwd",
        "/tmp",
        "x" * 100_000,
        "\0",
        "\ud800",
        7,
        [MODEL_NAME],
        f"{MODEL_NAME}/",
        "lora-1",
    )
    return {f"model: {str(name)[:20]!r}": case(model=name) for name in names}


def _bodies() -> dict[str, Case]:
    good = case().body
    bodies = {
        "empty": b"",
        "cut off": good[:-1],
        "null": b"null",
        "list": b"[]",
        "number": b"1e999",
        "nan": b"NaN",
        "no text": b"\xff\xfe",
        "deep": b"[" * 100_000,
        "twice": good[:-1] + b', "cache_salt": "a", "cache_salt": 7}',
        "zeros": bytes(10_000),
    }
    cases = {f"body: {name}": Case(body) for name, body in bodies.items()}
    ids = ("x", "", "x" * 8000, "../../x", "\xe9", "a b")
    cases |= {f"request id: {name[:8]!r}": Case(good, headers={"X-Request-Id": name}) for name in ids}
    return cases | {
        "type: text": Case(good, headers={"Content-Type": "text/plain"}),
        "type: none": Case(good, headers={"Content-Type": ""}),
        "route: unknown": Case(good, "/v1/salts"),
        "chat: no messages": case(CHAT, messages=[]),
        "chat: odd roles": case(
            CHAT, messages=[{"role": "\ud800", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        ),
        "chat: deep template": case(
            CHAT, chat_template="{% for i in range(9) %}{{ i }}{% endfor %}", chat_template_kwargs={"a": 1}
        ),
    }
