"""The middleware's routes beside those of vLLM's own app: none is there that nobody has looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from saltern.vllm.callers import SETTINGS_VARIABLE
from saltern.vllm.routes import KIND_BY_ROUTE, Kind, kind_by_route, known_path
from saltern.vllm.versions import scoring_has_salt

vllm = pytest.importorskip("vllm")

PROGRAM = Path(__file__).with_name("app_routes.py")

CLOSED = {
    ("APIWebSocketRoute", "/v1/realtime"),  # every websocket is
    ("Mount", "/static"),  # pictures of the documentation
    ("Mount", "/metrics"),  # what is below it, which is the same
}
"""What vLLM serves and the middleware doesn't, on purpose."""

READ_BY_HAND = {"/invocations"}
"""Routes that try the body as one of the others' types."""

Route = tuple[str, str]


@pytest.fixture(scope="module")
def salted_by_route() -> dict[Route, bool]:
    """Every route of vLLM's with everything turned on, and whether its body has a field for a salt."""
    result = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    routes = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("[[")))
    return {(method, path): has_salt for method, path, has_salt in routes}


def test_no_route_of_vllms_is_there_that_nobody_has_looked_at(salted_by_route: dict[Route, bool]) -> None:
    assert len(salted_by_route) > 60, "vLLM's routes were not found"
    unknown = [
        (method, path)
        for method, path in salted_by_route
        if (method, path) not in CLOSED and kind_of(method, path) is None
    ]
    assert unknown == [], "decide what a request needs to get there, in saltern/vllm/routes.py"


def test_a_salt_is_set_where_vllm_reads_one_and_nowhere_else(salted_by_route: dict[Route, bool]) -> None:
    for (method, path), has_salt in salted_by_route.items():
        kind = kind_of(method, path)
        if kind is Kind.SALTED and path not in READ_BY_HAND:
            assert has_salt, f"{path} ignores the salt that is set"
        if has_salt:
            assert kind in (Kind.SALTED, Kind.STRIPPED), f"{path} reads a salt that is neither set nor taken out"
            assert kind is Kind.SALTED or path.endswith("/render"), f"{path} computes without a salt"


@pytest.mark.skipif(Version(vllm.__version__) < Version("0.32"), reason="an older vLLM has fewer")
def test_no_route_is_listed_that_vllm_has_not(salted_by_route: dict[Route, bool]) -> None:
    optional = {path for _, path in KIND_BY_ROUTE if path.startswith(("/cohere/", "/redoc", "/docs"))}
    served = {known_path(path.replace("{", "x").replace("}", "")) for _, path in salted_by_route}
    assert {path for _, path in KIND_BY_ROUTE} - served - optional == set()


def kind_of(method: str, path: str) -> Kind | None:
    """What the middleware makes of a route of vLLM's, whose parameters stand in braces."""
    listed = known_path(path.replace("{", "x").replace("}", ""))
    kinds = kind_by_route(scoring_has_salt=scoring_has_salt())
    return None if listed is None else kinds.get((method, listed))


def test_vllm_does_not_start_where_nobody_could_be_known(tmp_path: Path) -> None:
    for environment, reason in (
        ({"XDG_STATE_HOME": str(tmp_path)}, "saltern keys add"),
        ({SETTINGS_VARIABLE: str(tmp_path / "nowhere.toml")}, "No such file"),
    ):
        result = subprocess.run(
            [sys.executable, str(PROGRAM), "--middleware", "saltern.vllm.TenantMiddleware"],
            env={**os.environ, **environment},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert result.returncode != 0
        assert reason in result.stderr.splitlines()[-1]
