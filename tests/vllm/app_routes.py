"""All routes of vLLM's own app, printed as JSON. A program of its own, since building the app changes its process.

Everything that vLLM can be told to serve is turned on, and routers that depend on the model are asked directly.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

TASKS = ("generate", "render", "transcription", "realtime", "embed", "classify", "token_embed", "token_classify")
OPTIONS = (
    "--enable-scale-out",
    "--enable-offline-docs",
    "--enable-tokenizer-info-endpoint",
    "--enable-fault-tolerance",
)
VARIABLES = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_ENABLE_COHERE_API": "1",
    "VLLM_TORCH_PROFILER_DIR": "/tmp",
}
POOLING = "vllm.entrypoints.pooling"
ASKED_DIRECTLY = tuple(
    f"{package}.api_router"
    for package in (
        *(f"{POOLING}.{name}" for name in ("pooling", "classify", "embed", "scoring")),
        "vllm.entrypoints.serve.profile",
        "vllm.entrypoints.serve.fault_tolerance",
    )
)


def main() -> None:
    """Print `[[method, path, whether its body has a field for a salt], …]`; what has no method is named by its kind."""
    os.environ.update(VARIABLES)
    print(json.dumps(sorted({*_routes(_app().routes), *_asked_directly()})))


def _app() -> Any:
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    known = {option for action in parser._actions for option in action.option_strings}
    arguments = [*(option for option in OPTIONS if option in known), *sys.argv[1:]]
    return build_app(parser.parse_args(arguments), TASKS, None)


def _asked_directly() -> Iterator[tuple[str, str, bool]]:
    for name in ASKED_DIRECTLY:
        yield from _routes(importlib.import_module(name).router.routes)


def _routes(routes: Iterable[Any], prefix: str = "") -> Iterator[tuple[str, str, bool]]:
    for route in routes:
        if hasattr(route, "path"):
            kinds = getattr(route, "methods", None) or {type(route).__name__}
            yield from ((kind, prefix + route.path, _has_salt(route)) for kind in kinds)
        else:  # FastAPI keeps an included router as one entry
            yield from _routes(route.original_router.routes, prefix + getattr(route, "prefix", ""))


def _has_salt(route: Any) -> bool:
    """Return whether every type that a route's body may be has the field; a body that is read by hand has no type."""
    bodies = getattr(getattr(route, "dependant", None), "body_params", [])
    types = [kind for body in bodies for kind in _alternatives(body.field_info.annotation)]
    return bool(types) and all("cache_salt" in getattr(kind, "model_fields", ()) for kind in types)


def _alternatives(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, UnionType):
        for alternative in get_args(annotation):
            yield from _alternatives(alternative)
    elif get_origin(annotation) is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    else:
        yield annotation


if __name__ == "__main__":
    main()
