"""Where a raw salt must not be seen: outside the engine's own processes."""

from __future__ import annotations

import base64
import subprocess
import sys

import pytest

from tests.e2e.conftest import SALT_MARK, NewSalt, Stack, Story

pytestmark = pytest.mark.e2e


def test_no_salt_is_sent_logged_or_shown(stack: Stack, new_salt: NewSalt, story: Story) -> None:
    salt = new_salt()
    prompt = story.told(stack.block_tokens + 9)
    stack.store(prompt, salt)
    stack.engine.complete(prompt, salt=salt)
    shown = subprocess.run(
        [sys.executable, "-m", "saltern.cli", "stats", "--json", "--socket", str(stack.server.socket_path)],
        check=True,
        capture_output=True,
    ).stdout
    assert stack.relay is not None
    sent = b"\n".join(map(bytes, stack.relay.passed))
    logged = stack.server.log_path.read_bytes()

    # These are the right places to look: the user is there, under its opaque name, and so are the decisions about it.
    assert stack.server.user_id(salt) in sent
    assert stack.server.user_id(salt).hex().encode() in shown
    assert b"acquired" in logged
    for seen in (sent, shown, logged, stack.engine.log_path.read_bytes()):
        for form in _forms(SALT_MARK):  # begins every salt that any test has sent
            assert form not in seen


def _forms(salt: str) -> list[bytes]:
    """Return a salt as it may be written: base64 in the alignment that begins a field."""
    raw = salt.encode()
    return [raw, raw.hex().encode(), base64.b64encode(raw[: len(raw) // 3 * 3]), salt.encode("utf-16-le"), raw[::-1]]
