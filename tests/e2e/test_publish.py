"""`saltern publish` against a real engine: all users read what it published, and nobody but the operator can."""

from __future__ import annotations

import json
import subprocess
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.prompts import PARAGRAPHS
from saltern.client.admin import operate
from saltern.core.keys import Content, content_of
from saltern.core.snapshot import PublicationStats, Snapshot
from saltern.operations import OpenPublication, PublicationOpened, PublicationsListed, RemovePublication
from saltern.publishing import FIELD
from tests.e2e.conftest import NewSalt, Stack, Story

pytestmark = pytest.mark.e2e

PUBLIC_BYTES = 64 * 1024 * 1024
PUBLISH_SECONDS_MAX = 120


def saltern(*arguments: str, fails: bool = False) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "saltern.cli", *arguments], capture_output=True, text=True, timeout=PUBLISH_SECONDS_MAX
    )
    assert bool(done.returncode) == fails, done.stderr
    return done


def admin_socket(stack: Stack) -> str:
    return str(stack.server.socket_path.with_name("admin.sock"))


def endpoint(stack: Stack) -> str:
    return f"http://127.0.0.1:{stack.engine.port}"


def publish(stack: Stack, *arguments: str, fails: bool = False) -> subprocess.CompletedProcess[str]:
    sockets = ("--socket", str(stack.server.socket_path), "--admin-socket", admin_socket(stack))
    return saltern("publish", *sockets, *arguments, fails=fails)


def publish_prompt(stack: Stack, file: Path) -> str:
    """Publish a system prompt and return the publication's name."""
    said = publish(stack, "--endpoint", endpoint(stack), "--system-prompt", str(file), "--json").stdout
    (stats,) = json.loads(said)
    return str(stats["publication"])


@pytest.fixture(scope="module", autouse=True)
def _pool(stack: Stack) -> None:
    saltern("tenants", "set", "public", "--guarantee", str(PUBLIC_BYTES), "--socket", admin_socket(stack))


@pytest.fixture
def system_prompt(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A system prompt of some blocks that no other test has published."""
    path = tmp_path / "system.txt"
    path.write_text(f"You belong to {request.node.name}.\n" + "\n\n".join(PARAGRAPHS[:6]))
    return path


@pytest.fixture
def published(stack: Stack, system_prompt: Path) -> Iterator[str]:
    publication = publish_prompt(stack, system_prompt)
    yield publication
    if publication in {stats.publication for stats in stack.server.stats().publications}:
        publish(stack, "--remove", publication)


def chat(stack: Stack, system_prompt: Path, words: str, salt: str | None, **more: Any) -> int:
    """Chat under a system prompt and return how many of its tokens came from a cache."""
    messages = [{"role": "system", "content": system_prompt.read_text()}, {"role": "user", "content": words}]
    body = {"messages": messages, "max_tokens": 8, **({"cache_salt": salt} if salt else {}), **more}
    answer = json.loads(stack.engine.post("/v1/chat/completions", body))
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def stats_of(stack: Stack, publication: str) -> PublicationStats:
    (stats,) = [each for each in stack.server.stats().publications if each.publication == publication]
    return stats


def test_a_new_users_first_chat_hits_it(stack: Stack, new_salt: NewSalt, system_prompt: Path, published: str) -> None:
    blocks = stats_of(stack, published).blocks
    assert blocks >= 2
    for words in ("Hello!", " 7 cats", "语"):
        assert chat(stack, system_prompt, words, new_salt()) == blocks * stack.block_tokens
    assert chat(stack, system_prompt, "And me?", None) == blocks * stack.block_tokens


def test_it_is_what_the_engine_would_have_computed(
    stack: Stack, new_salt: NewSalt, story: Story, system_prompt: Path
) -> None:
    messages = [{"role": "system", "content": system_prompt.read_text()}, {"role": "user", "content": "Tell me."}]

    def said() -> Any:
        body = {"messages": messages, "max_tokens": 24, "temperature": 0, "cache_salt": new_salt()}
        return json.loads(stack.engine.post("/v1/chat/completions", body))["choices"][0]["message"]["content"]

    cold = said()
    publication = publish_prompt(stack, system_prompt)
    assert said() == cold
    publish(stack, "--remove", publication)


def test_two_users_store_it_once(stack: Stack, new_salt: NewSalt, system_prompt: Path, published: str) -> None:
    used = stack.server.stats().arena.used_bytes
    for _ in range(2):
        salt = new_salt()
        chat(stack, system_prompt, "Hi", salt)
        assert stack.blocks(salt) == 0
    assert stack.server.stats().arena.used_bytes == used


def test_once_removed_it_is_gone(
    stack: Stack, new_salt: NewSalt, story: Story, system_prompt: Path, published: str
) -> None:
    listed = publish(stack, "--list").stdout
    assert published in listed
    publish(stack, "--remove", published)
    assert published not in publish(stack, "--list").stdout
    assert chat(stack, system_prompt, "Hello?", new_salt()) == 0
    assert "nothing is published" in publish(stack, "--remove", published, fails=True).stderr


def test_a_mark_holds_for_its_prompt_alone_and_only_while_it_is_published(
    stack: Stack, new_salt: NewSalt, story: Story
) -> None:
    session, block = stack.server.stats().sessions[0], stack.block_tokens
    prompt, other = story.told(2 * block, chapter=8), story.told(2 * block, chapter=9)
    root = Content(bytes.fromhex(session.root))
    opened = operate(admin_socket(stack), OpenPublication(root, content_of(root, array("i", prompt), block), blocks=2))
    assert isinstance(opened, PublicationOpened)

    def bring_mark(tokens: list[int]) -> None:
        parameters = {FIELD: opened.mark}
        body = {"prompt": tokens, "max_tokens": 1, "cache_salt": new_salt(), "kv_transfer_params": parameters}
        stack.engine.post("/v1/completions", body)

    def found(tokens: list[int]) -> int:
        return stack.engine.complete(tokens, salt=new_salt()).cached_tokens

    bring_mark(other)
    assert found(other) == 0
    bring_mark(prompt)
    stack.server.wait_for("the blocks", lambda stats: stats.publications[0].blocks_ready == 2)
    assert found(prompt) >= 2 * block - 1
    assert isinstance(operate(admin_socket(stack), RemovePublication(opened.publication)), PublicationsListed)
    bring_mark(prompt)
    stack.server.wait_for("a refusal", lambda stats: refused(stats) == 1)
    assert found(prompt) == 0


def refused(stats: Snapshot) -> int:
    (public,) = [tenant for tenant in stats.tenants if tenant.tenant == "public"]
    return public.counts.refused_not_published


@pytest.mark.parametrize(
    "mark",
    ["p1." + "A" * 22 + ".1999999999." + "A" * 43, "p1", None, 7, {"p1": []}, ["x"] * 100],
    ids=["forged", "short", "null", "number", "object", "list"],
)
def test_what_a_client_makes_up_publishes_nothing(stack: Stack, new_salt: NewSalt, story: Story, mark: Any) -> None:
    salt, prompt = new_salt(), story.told(2 * stack.block_tokens)
    body = {"prompt": prompt, "max_tokens": 1, "cache_salt": salt, "kv_transfer_params": {FIELD: mark}}
    stack.engine.post("/v1/completions", body)
    stack.server.wait_for_blocks(salt, 2)  # it is served and stored as any other
    assert stack.server.stats().publications == ()
    assert stack.engine.complete(prompt, salt=new_salt()).cached_tokens == 0


def test_what_is_too_short_is_said(stack: Stack, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Be brief.")
    said = publish(stack, "--endpoint", endpoint(stack), "--system-prompt", str(short), fails=True).stderr
    assert "fewer than a block of 128" in said
    assert stack.server.stats().publications == ()
