"""An engine without an API in front, real model and all: whatever it is asked ends as it does without Saltern."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from demo.server import Server
from tests.e2e.conftest import SALT_MARK
from tests.e2e.lab import Lab, LabError
from tests.e2e.models import CACHED, PROMPT, make_llama

pytestmark = pytest.mark.e2e

CONTEXT_TOKENS = 2048  # the lab's

SALTS: dict[str, Any] = {
    "none": None,
    "empty": "",
    "number": 7,
    "zero": 0,
    "yes": True,
    "fraction": 1.5,
    "huge number": 10**40,
    "list": [SALT_MARK],
    "nested": [[], {"": [None]}],
    "dict": {SALT_MARK: 1},
    "nul": SALT_MARK + "\0",
    "half a character": SALT_MARK + "\ud800",
    "a megabyte": SALT_MARK * 65_536,
    "path": f"../../{SALT_MARK}",
}
# Others end the engine, with or without a connector: in one process nothing stands between them and the model.
PROMPTS: dict[str, Any] = {
    "empty": [],
    "full": [1] * (CONTEXT_TOKENS - 1),
    "no room": [1] * CONTEXT_TOKENS,
    "too long": [1] * (CONTEXT_TOKENS + 1),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "llama")


def test_an_engine_is_asked_anything_and_answers_as_without_saltern(lab: Lab, server: Server, model: Path) -> None:
    asked = [(name, PROMPT, salt) for name, salt in SALTS.items()]
    asked += [(name, prompt, "alice") for name, prompt in PROMPTS.items()]
    lab.start(model)
    expected = [(name, outcome(lab, prompt, salt)) for name, prompt, salt in asked]
    lab.start(model, socket_path=server.socket_path)
    bystanders = lab.ask(PROMPT, "bystander")
    for (name, prompt, salt), same in zip(asked, expected, strict=True):
        assert (name, outcome(lab, prompt, salt)) == same
        again = lab.ask(PROMPT, "bystander")
        assert (again.token_ids, again.cached_tokens) == (bystanders.token_ids, CACHED), f"after {name}"
    for name, salt in SALTS.items():  # text is a user; vLLM drops what is nothing, such as 0
        assert lab.ask(PROMPT, salt).cached_tokens == (CACHED if not salt or isinstance(salt, str) else 0), name
    snapshot = server.stats()
    assert not sum(session.read_leases + session.write_leases for session in snapshot.sessions)
    for log_path in (server.log_path, lab.log_path):
        assert SALT_MARK not in log_path.read_text(errors="replace")


def outcome(lab: Lab, prompt: Any, salt: Any) -> object:
    """Return how many tokens an answer has, or the error."""
    try:
        return len(lab.ask(prompt, salt).token_ids)
    except LabError as error:
        return str(error).strip().splitlines()[-1]
