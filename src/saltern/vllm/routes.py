"""Routes: every path that vLLM 0.31 and 0.32 may serve, and what a request needs to get there.

Paths are compared as they are: what is spelled in another way (a slash more, another case) is no route here, whatever
vLLM would make of it. A path that isn't listed is refused, so that a route which vLLM gains later is closed rather than
open, and `tests/vllm/test_routes.py` fails for each that nobody has looked at.
"""

import re
from collections.abc import Mapping
from enum import Enum


class Kind(Enum):
    """What a request of a route needs, and what becomes of it."""

    PROBE = "probe"  # nothing: whether the engine lives
    METRICS = "metrics"  # an operator's key, or nothing where the operator says so
    SALTED = "salted"  # a key; computes, so the salt of the key's user is set
    STRIPPED = "stripped"  # a key; computes nothing, so that a salt would only be shown to the client
    PLAIN = "plain"  # a key; has no body that anybody reads
    UNSALTED = "unsalted"  # a key; computes but has no field for a salt: refused unless the operator allows it
    OPERATOR = "operator"  # an operator's key


_PATHS: Mapping[Kind, str] = {
    Kind.PROBE: "GET /health, GET /ping, POST /ping, GET /version",
    Kind.METRICS: "GET /metrics, GET /load",
    Kind.SALTED: """
        POST /v1/completions, POST /v1/chat/completions, POST /v1/chat/completions/batch, POST /v1/responses,
        POST /v1/messages, POST /invocations, POST /inference/v1/generate, POST /v1/systemone, POST /generative_scoring,
        POST /v1/embeddings, POST /pooling, POST /classify, POST /score, POST /v1/score, POST /rerank, POST /v1/rerank,
        POST /v2/rerank
    """,
    Kind.STRIPPED: """
        POST /tokenize, POST /detokenize, POST /v1/messages/count_tokens,
        POST /v1/completions/render, POST /v1/chat/completions/render, POST /v1/responses/render,
        POST /v1/messages/render, POST /cohere/v2/chat/render,
        POST /v1/completions/derender, POST /v1/chat/completions/derender
    """,
    Kind.PLAIN: """
        GET /v1/models, GET /tokenizer_info, GET /v1/responses/{id}, POST /v1/responses/{id}/cancel,
        GET /openapi.json, GET /docs, GET /docs/oauth2-redirect, GET /redoc,
        HEAD /openapi.json, HEAD /docs, HEAD /docs/oauth2-redirect, HEAD /redoc
    """,
    Kind.UNSALTED: "POST /v1/audio/transcriptions, POST /v1/audio/translations, POST /cohere/v2/chat, POST /v2/embed",
    Kind.OPERATOR: """
        POST /v1/load_lora_adapter, POST /v1/unload_lora_adapter, POST /adapters, DELETE /adapters/{id},
        POST /abort_requests, POST /inference/v1/abort_requests, GET /server_info, GET /kv_event_sources,
        POST /start_profile, POST /stop_profile, POST /reset_prefix_cache, POST /reset_mm_cache,
        POST /reset_encoder_cache, POST /collective_rpc, POST /sleep, POST /wake_up, GET /is_sleeping,
        POST /release_kv_cache_memory, POST /scale_elastic_ep, POST /is_scaling_elastic_ep, POST /pause, POST /resume,
        GET /is_paused, POST /init_weight_transfer_engine, POST /shutdown_weight_transfer_engine,
        POST /start_weight_update, POST /start_draft_weight_update, POST /update_weights, POST /finish_weight_update,
        POST /update_weight_version, GET /weight_info, POST /weight_checker, GET /get_world_size,
        POST /fault_tolerance/apply, GET /fault_tolerance/status
    """,
}

KIND_BY_ROUTE: Mapping[tuple[str, str], Kind] = {
    (method, path): kind
    for kind, routes in _PATHS.items()
    for method, _, path in (route.strip().partition(" ") for route in routes.split(","))
}
"""What is known of each (method, path); `{id}` stands for one part of a path."""

SCORING = ("POST", "/generative_scoring")


def kind_by_route(*, scoring_has_salt: bool) -> Mapping[tuple[str, str], Kind]:
    """Return `KIND_BY_ROUTE` for a vLLM that reads a salt at `SCORING`, as 0.32 does, or reads none, as 0.31."""
    return {**KIND_BY_ROUTE, SCORING: Kind.SALTED if scoring_has_salt else Kind.UNSALTED}


_METHODS_BY_PATH = {path: {method for method, other in KIND_BY_ROUTE if other == path} for _, path in KIND_BY_ROUTE}
_WITH_ID = [(re.compile(re.escape(path).replace(r"\{id\}", "[^/]+")), path) for path in _METHODS_BY_PATH if "{" in path]


def known_path(path: str) -> str | None:
    """Return the path as it is listed, with `{id}` in its place, or None for one that isn't."""
    if path in _METHODS_BY_PATH and "{" not in path:
        return path
    return next((listed for pattern, listed in _WITH_ID if pattern.fullmatch(path)), None)


def methods_of(path: str) -> frozenset[str]:
    """Return the methods of a listed path."""
    return frozenset(_METHODS_BY_PATH[path])


def route_path(path: str, root_path: str) -> str:
    """Return the part of a path by which vLLM's router goes: without the root path, where it begins with that."""
    if not path.startswith(root_path):
        return path
    if path == root_path:
        return ""
    return path[len(root_path) :] if path[len(root_path)] == "/" else path
