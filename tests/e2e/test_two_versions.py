"""Two real versions of vLLM on one server: what one has computed the other never finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from demo.server import Server
from tests.e2e.lab import REPOSITORY, Lab
from tests.e2e.models import CACHED, PROMPT, make_llama

OLDEST = REPOSITORY / ".venv-oldest" / "bin" / "python"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not OLDEST.exists(), reason="`make versions` installs the oldest vLLM"),
]


@pytest.fixture(scope="module")
def oldest_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("oldest") / "vllm.log", python=str(OLDEST)) as lab:
        yield lab


def test_neither_finds_what_the_other_has_computed(
    lab: Lab, oldest_lab: Lab, server: Server, tmp_path: Path, new_salt: Callable[[], str]
) -> None:
    model, salt, confused_salt = make_llama(tmp_path / "llama"), new_salt(), new_salt()
    labs = (lab, oldest_lab)
    for each in labs:
        each.start(model, socket_path=server.socket_path)
    assert len({each.vllm_version() for each in labs}) == 2

    computed = [each.ask(PROMPT, salt) for each in labs]  # the second asks for what the first has stored
    found = [each.ask(PROMPT, salt) for each in labs]
    assert [answer.cached_tokens for answer in computed] == [0, 0]
    assert [answer.cached_tokens for answer in found] == [CACHED, CACHED]

    for each in labs:
        each.forget("namespace")
    assert [each.ask(PROMPT, confused_salt).cached_tokens for each in labs] == [0, CACHED]
