"""An engine that also has vLLM's own prefix cache, stores answers, and caches nobody without a salt."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.engine import Engine
from demo.model import room_for
from demo.server import Server, connector_config
from tests.e2e.conftest import PATIENCE_MS, NewSalt, Stack, Story, running

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def stack(model: Path) -> Iterator[Stack]:
    with tempfile.TemporaryDirectory(prefix="saltern-e2e-") as name:
        folder = Path(name)
        server = Server(folder, arena=room_for(180))
        engine = Engine(
            model,
            log_path=folder / "vllm.log",
            kv_transfer_config=connector_config(
                server.socket_path, patience_ms=PATIENCE_MS, store="all", require_salt=True
            ),
            prefix_caching=True,
            env={"VLLM_SERVER_DEV_MODE": "1"},  # which has the route that empties vLLM's own cache
        )
        with running(server, engine) as stack:
            yield stack


def test_what_vllm_has_itself_is_continued_from_the_cache(stack: Stack, new_salt: NewSalt, story: Story) -> None:
    salt, block = new_salt(), stack.block_tokens
    prompt = story.told(5 * block + 9)
    cold = stack.store(prompt, salt)
    stack.engine.post("/reset_prefix_cache", {})
    beginning = stack.engine.complete(prompt[: 2 * block + 9], salt=salt)
    before = _hit_tokens(stack.engine)
    hit = stack.engine.complete(prompt, salt=salt)
    after = _hit_tokens(stack.engine)

    assert beginning.cached_tokens == 2 * block
    assert hit.cached_tokens == 5 * block
    assert hit.token_ids == cold.token_ids
    assert after["prefix_cache_hits"] - before["prefix_cache_hits"] == 2 * block
    assert after["external_prefix_cache_hits"] - before["external_prefix_cache_hits"] == 3 * block


def test_what_the_model_says_is_stored_when_all_is(stack: Stack, new_salt: NewSalt, story: Story) -> None:
    salt, block = new_salt(), stack.block_tokens
    stack.engine.complete(story.told(2 * block - 9), salt=salt, fields={"min_tokens": 16})

    stack.server.wait_for_blocks(salt, 2)


def test_without_a_salt_nothing_is_asked_or_stored_when_one_is_required(
    stack: Stack, new_salt: NewSalt, story: Story
) -> None:
    prompt = story.told(2 * stack.block_tokens + 9, chapter=6)
    before = stack.counts
    stack.engine.complete(prompt)
    after = stack.counts
    stack.store(prompt, new_salt())  # what came before it has been stored by then, if ever

    assert after.acquires == before.acquires
    assert stack.blocks("") == 0


def _hit_tokens(engine: Engine) -> dict[str, float]:
    """Return vLLM's own counts of tokens found in its cache and in ours."""
    found = re.findall(r"^vllm:(\w*prefix_cache_hits)_total\{[^}]*\} (\S+)$", engine.get("/metrics"), re.MULTILINE)
    return {name: float(value) for name, value in found}
