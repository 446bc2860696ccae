"""The disk tier under a real vLLM: what memory has lost comes back from there, unless that takes too long."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from demo.engine import Completion, Engine
from demo.model import room_for
from demo.prompts import PARAGRAPHS
from demo.server import Server, connector_config
from saltern.client.admin import operate
from saltern.core.messages import PUBLIC_TENANT
from saltern.core.snapshot import DiskStats, Snapshot
from saltern.operations import Erase, UserErased
from tests.e2e.conftest import PATIENCE_MS, NewSalt, Stack, Story
from tests.e2e.test_publish import chat, publish, publish_prompt, saltern

pytestmark = pytest.mark.e2e

REST = 9  # tokens of a prompt that fill no block
BLOCKS = 5
USER_LIMIT = room_for(5)  # of whoever stores two prompts of five memory has only the second
ATTACH_SECONDS_MAX = 60.0
POLL_SECONDS = 0.02

# The disk stands still while the file that is named first is there: no read of it ends.
STANDING = """
import os, sys, time
held, preadv = sys.argv.pop(1), os.preadv
def standing_preadv(*arguments):
    while os.path.exists(held):
        time.sleep(0.01)
    return preadv(*arguments)
os.preadv = standing_preadv
from saltern.cli import main
sys.exit(main())
"""


class ServerWithDisk(Server):
    """A server whose disk stands still while `held` is there."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, arena=room_for(180), disk=room_for(360), user_limit=USER_LIMIT, log_level="debug")
        self.held = folder / "held"

    @property
    def command(self) -> list[str]:
        """What is run to start the server."""
        return [sys.executable, "-c", STANDING, str(self.held), *super().command[3:]]

    @property
    def disk(self) -> DiskStats:
        """What the server says of its disk."""
        disk = self.stats().disk
        assert disk is not None, "it has one"
        return disk

    def wait_until_written(self, blocks: int) -> None:
        """Wait until so many blocks are on the disk, and nothing is on its way there."""
        self.wait_for(f"{blocks} blocks on the disk", lambda snapshot: _is_written(snapshot.disk, blocks))


@pytest.fixture(scope="module")
def server() -> Iterator[ServerWithDisk]:
    with tempfile.TemporaryDirectory(prefix="saltern-e2e-") as name:
        server = ServerWithDisk(Path(name))
        server.start()
        yield server
        server.stop()


@pytest.fixture(scope="module")
def stack(model: Path, server: ServerWithDisk) -> Iterator[Stack]:
    engine = Engine(
        model,
        log_path=server.log_path.with_name("vllm.log"),
        kv_transfer_config=connector_config(
            server.socket_path, patience_ms=PATIENCE_MS, load_patience_ms=PATIENCE_MS, store="all"
        ),
        prefix_caching=False,
    )
    try:
        engine.start()
        yield Stack(server, engine)
    finally:
        engine.stop()


def test_what_memory_has_evicted_comes_back_from_the_disk(
    stack: Stack, server: ServerWithDisk, new_salt: NewSalt, story: Story
) -> None:
    salt = new_salt()
    prompt, cold = _stored_on_disk(stack, server, salt, story)
    _push_out_of_memory(stack, server, salt, story)
    before, hits_before = stack.counts, _hit_tokens(stack.engine)
    hit = stack.engine.complete(prompt, salt=salt)
    hits = _hit_tokens(stack.engine)

    assert hit.cached_tokens == BLOCKS * stack.block_tokens
    assert hit.token_ids == cold.token_ids
    assert stack.counts.hit_blocks - before.hit_blocks == BLOCKS
    assert stack.counts.disk_loaded - before.disk_loaded == BLOCKS
    assert hits["external"] - hits_before["external"] == BLOCKS * stack.block_tokens
    assert hits["disk"] - hits_before["disk"] == BLOCKS * stack.block_tokens


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_what_the_server_before_has_stored_comes_back_from_the_disk(
    stack: Stack, server: ServerWithDisk, new_salt: NewSalt, story: Story, end: str
) -> None:
    salt = new_salt()
    prompt, cold = _stored_on_disk(stack, server, salt, story)
    blocks = server.disk.blocks
    if end == "stopped":
        server.stop()
    else:
        server.kill()
    server.start()
    _send_until_attached(stack)

    assert server.disk.blocks == blocks
    assert stack.blocks(salt) == 0, "memory is empty after a start"
    before, hits_before = stack.counts, _hit_tokens(stack.engine)
    hit = stack.engine.complete(prompt, salt=salt)
    hits = _hit_tokens(stack.engine)

    assert hit.cached_tokens == BLOCKS * stack.block_tokens
    assert hit.token_ids == cold.token_ids
    assert stack.counts.disk_loaded - before.disk_loaded == BLOCKS
    assert hits["external"] - hits_before["external"] == BLOCKS * stack.block_tokens


def test_what_is_published_is_there_for_a_new_user_after_a_restart(
    stack: Stack, server: ServerWithDisk, new_salt: NewSalt, tmp_path: Path
) -> None:
    system_prompt = tmp_path / "system.txt"
    system_prompt.write_text("\n\n".join(PARAGRAPHS[:6]))
    saltern("tenants", "set", "public", "--guarantee", "64 MiB", "--socket", str(server.admin_socket_path))
    publication = publish_prompt(stack, system_prompt)
    cold = chat(stack, system_prompt, "Hello!", new_salt())
    blocks = server.stats().publications[0].blocks
    server.wait_for("what is published is on the disk", lambda snapshot: _public_on_disk(snapshot) == blocks)
    server.kill()
    server.start()
    server.wait_for("it is back", lambda snapshot: snapshot.publications[0].blocks_ready == blocks)
    _send_until_attached(stack)

    assert cold == chat(stack, system_prompt, "Hello!", new_salt()) == blocks * stack.block_tokens
    publish(stack, "--remove", publication)
    salt = new_salt()
    assert chat(stack, system_prompt, "Hello!", salt) == 0
    server.wait_for("what that stored is on the disk", lambda snapshot: _is_on_disk(server, snapshot, salt))


def _public_on_disk(snapshot: Snapshot) -> int:
    return sum(tenant.disk_blocks for tenant in snapshot.tenants if tenant.tenant == PUBLIC_TENANT)


def test_nobody_else_gets_what_is_on_the_disk(
    stack: Stack, server: ServerWithDisk, new_salt: NewSalt, story: Story
) -> None:
    salt = new_salt()
    prompt, cold = _stored_on_disk(stack, server, salt, story)
    _push_out_of_memory(stack, server, salt, story)
    before = stack.counts
    blocks = server.disk.blocks
    foreign = stack.store(prompt, new_salt())
    server.wait_until_written(blocks + BLOCKS)

    assert foreign.cached_tokens == 0
    assert foreign.token_ids == cold.token_ids
    assert stack.counts.disk_loaded == before.disk_loaded


def test_a_request_goes_on_without_a_disk_that_is_slower_than_patience(
    stack: Stack, server: ServerWithDisk, new_salt: NewSalt, story: Story
) -> None:
    salt = new_salt()
    prompt, cold = _stored_on_disk(stack, server, salt, story)
    _push_out_of_memory(stack, server, salt, story)
    before = stack.counts
    server.held.touch()
    try:
        missed = stack.engine.complete(prompt, salt=salt)
        meanwhile = server.disk
    finally:
        server.held.unlink()
    server.wait_for("the end of what was begun", lambda snapshot: not _is_busy(snapshot.disk))
    # An engine without requests takes no steps for an answer that it has given up; the next one gives it back.
    stack.engine.complete(story.told(REST), salt=new_salt(), max_tokens=1)
    settled = server.wait_for("nobody who reads", lambda snapshot: not snapshot.arena.pinned_blocks)
    hit = stack.engine.complete(prompt, salt=salt)

    assert meanwhile.reading_blocks > 0, "the disk did not stand still"
    assert missed.cached_tokens == 0
    assert missed.token_ids == cold.token_ids
    assert stack.counts.disk_loaded - before.disk_loaded == BLOCKS, "what came too late is there for the next"
    assert settled.sessions[0].read_leases == 0
    assert hit.cached_tokens == BLOCKS * stack.block_tokens
    assert hit.token_ids == cold.token_ids


def test_a_user_who_is_erased_while_decoding_gets_the_whole_answer_and_leaves_nothing(
    stack: Stack, server: ServerWithDisk, new_salt: NewSalt, story: Story
) -> None:
    salt, block = new_salt(), stack.block_tokens
    prompt = story.told(2 * block - REST)  # a few words more and there is a second block, and much later a third
    disk_blocks = server.disk.blocks + 3
    expected = _decode(stack, prompt, new_salt())
    server.wait_until_written(disk_blocks)
    before = stack.counts
    with ThreadPoolExecutor(1) as pool:
        decoding = pool.submit(_decode, stack, prompt, salt)
        while server.user(server.stats(), salt).blocks < 2 and not decoding.done():
            time.sleep(POLL_SECONDS)
        erased = operate(str(server.admin_socket_path), Erase("default", user=server.user_id(salt)))
        is_decoding = not decoding.done()
        completion = decoding.result()
    server.wait_for("the end of what was begun", lambda snapshot: not snapshot.arena.writing_blocks)
    server.wait_until_written(disk_blocks)

    assert isinstance(erased, UserErased)
    assert is_decoding, "the erasure came too late to show anything"
    assert completion.token_ids == expected.token_ids
    assert stack.counts.refused_erased > before.refused_erased, "what came after the erasure was never offered"
    assert stack.blocks(salt) == 0
    anew = stack.store(prompt, salt, max_tokens=REST - 1)
    hit = stack.engine.complete(prompt, salt=salt)
    assert anew.cached_tokens == 0
    assert hit.cached_tokens == block
    assert hit.token_ids == expected.token_ids[: len(hit.token_ids)]


def _stored_on_disk(stack: Stack, server: ServerWithDisk, salt: str, story: Story) -> tuple[list[int], Completion]:
    """Have a prompt of five blocks stored for a user, in memory and on the disk; return it, and what came of it."""
    before = server.disk.blocks
    prompt = story.told(BLOCKS * stack.block_tokens + REST)
    cold = stack.store(prompt, salt)
    server.wait_until_written(before + BLOCKS)
    return prompt, cold


def _push_out_of_memory(stack: Stack, server: ServerWithDisk, salt: str, story: Story) -> None:
    """Have a user store another prompt, which takes the room of the first."""
    before = server.disk.blocks
    stack.engine.complete(story.told(BLOCKS * stack.block_tokens + REST, chapter=2), salt=salt)
    server.wait_until_written(before + BLOCKS)


def _decode(stack: Stack, prompt: list[int], salt: str) -> Completion:
    """Have a prompt answered by more than a block of tokens."""
    tokens = stack.block_tokens + 3 * REST
    return stack.engine.complete(prompt, salt=salt, max_tokens=tokens, fields={"ignore_eos": True})


def _is_written(disk: DiskStats | None, blocks: int) -> bool:
    return disk is not None and disk.blocks == blocks and not disk.writing_blocks


def _is_on_disk(server: ServerWithDisk, snapshot: Snapshot, salt: str) -> bool:
    blocks = server.user(snapshot, salt).disk_blocks
    return bool(blocks) and not _is_busy(snapshot.disk) and not snapshot.sessions[0].write_leases


def _is_busy(disk: DiskStats | None) -> bool:
    return disk is not None and bool(disk.reading_blocks or disk.writing_blocks)


def _send_until_attached(stack: Stack) -> None:
    """Keep the engine going, since an idle one does not look for a server."""
    deadline = time.monotonic() + ATTACH_SECONDS_MAX
    while not any(session.state == "open" for session in stack.server.stats().sessions):
        assert time.monotonic() < deadline, "the engine did not come back to the server"
        stack.engine.complete("Good morning", max_tokens=1)


def _hit_tokens(engine: Engine) -> dict[str, float]:
    """Return vLLM's own counts of tokens found outside it, and by its name for the place."""
    page = engine.get("/metrics")
    by_source = re.findall(r'^vllm:prompt_tokens_cached_by_source_total\{.*source="(\w+)"\} (\S+)$', page, re.MULTILINE)
    external = re.findall(r"^vllm:external_prefix_cache_hits_total\{.*\} (\S+)$", page, re.MULTILINE)
    return {name: float(value) for name, value in [*by_source, *(("external", value) for value in external)]}
