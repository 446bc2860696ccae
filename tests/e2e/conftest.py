"""The real thing for all tests here: one server and one vLLM with the connector, started once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from demo.engine import Completion, Engine, started_together
from demo.model import KV_BYTES_PER_TOKEN, ensure_model, room_for
from demo.prompts import PARAGRAPHS
from demo.server import Server, connector_config
from saltern.core.snapshot import Counts
from tests.e2e.lab import Lab
from tests.e2e.relay import Relay

PATIENCE_MS = 10_000  # the longest that may be set: these tests are about what is found, not how fast
SALT_MARK = "zq7-unmistakable"
"""Begins every salt of these tests, so that it is recognised wherever it should not be."""


@dataclass(frozen=True)
class Stack:
    """A server and an engine that uses it, through a relay where there is one."""

    server: Server
    engine: Engine
    relay: Relay | None = None

    @property
    def counts(self) -> Counts:
        """The server's decisions so far."""
        return self.server.stats().tenants[0].counts

    @property
    def block_tokens(self) -> int:
        """Tokens of a block, as the server knows it from the engine."""
        return self.server.stats().sessions[0].block_bytes // KV_BYTES_PER_TOKEN

    def blocks(self, salt: str) -> int:
        """Return how many blocks a user has."""
        return self.server.user(self.server.stats(), salt).blocks

    def store(self, prompt: list[int], salt: str | None, *, max_tokens: int = 16) -> Completion:
        """Complete a prompt for a user who has none of it yet, and wait until its full blocks are stored."""
        before = self.blocks(salt or "")
        completion = self.engine.complete(prompt, salt=salt, max_tokens=max_tokens)
        self.server.wait_for_blocks(salt or "", before + completion.prompt_tokens // self.block_tokens)
        return completion


class Story:
    """The demo's text as token ids, told as prompts of a wanted length.

    Like the demo's prompts each ends with words that began an earlier paragraph, so that the model's next choices are
    clear ones. That is so up to five blocks of 128 tokens.
    """

    def __init__(self, model: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._text = self._tokens("\n\n".join(PARAGRAPHS))
        self._opening = self._tokens("\n\n" + " ".join(PARAGRAPHS[0].split()[:12]))

    def told(self, tokens: int, *, chapter: int = 1) -> list[int]:
        """Return a prompt of exactly this many tokens; prompts of different chapters share no block."""
        heading = self._tokens(f"Chapter {chapter}.\n\n")
        return [*heading, *self._text[: tokens - len(heading) - len(self._opening)], *self._opening]

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)


@contextmanager
def running(
    server: Server, engine: Engine, relay: Relay | None = None, *, beside: Engine | None = None
) -> Iterator[Stack]:
    """Start a server, its engine and one that has nothing to do with it, and end them, the engines first."""
    try:
        server.start()
        with started_together(*([beside] if beside is not None else []), engine):
            yield Stack(server, engine, relay)
    finally:
        if relay is not None:
            relay.close()
        server.stop()


@pytest.fixture(scope="session")
def model() -> Path:
    return ensure_model()


@pytest.fixture(scope="session")
def story(model: Path) -> Story:
    return Story(model)


@pytest.fixture(scope="session")
def stack(model: Path) -> Iterator[Stack]:
    """One server and one engine for most tests, each of which uses salts of its own."""
    with tempfile.TemporaryDirectory(prefix="saltern-e2e-") as name:
        folder = Path(name)
        server = Server(folder, arena=room_for(360), log_level="debug")
        relay = Relay(folder / "relay.sock", server.socket_path)
        engine = Engine(
            model,
            log_path=folder / "vllm.log",
            kv_transfer_config=connector_config(relay.path, patience_ms=PATIENCE_MS),
            prefix_caching=False,
        )
        with running(server, engine, relay) as stack:
            yield stack


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for the engines of a lab."""
    server = Server(tmp_path_factory.mktemp("server"), arena="256 MiB", log_level="debug")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Tiny engines, one after another."""
    with Lab(tmp_path_factory.mktemp("lab") / "vllm.log") as lab:
        yield lab


NewSalt = Callable[[], str]


@pytest.fixture
def new_salt() -> NewSalt:
    """Return a maker of salts that no test has used before."""
    return lambda: f"{SALT_MARK}-{next(_numbers)}"


_numbers = count()
