"""Hostile values: what a client can put into a request that no honest one would."""

from random import Random
from typing import Any

SALTS: dict[str, str] = {
    "like a path": "../../../etc/shadow\0",
    "that is no text": "\ud800",
    "without an end": "a" * 10_000,
    "of another user, nearly": "alice\0",
}
PARAMETERS: dict[str, dict[Any, Any]] = {
    "of another connector": {"do_remote_prefill": True, "do_remote_decode": True, "remote_block_ids": 3},
    "that are nonsense": {"tenant": 7, "user": None, "": {"": []}},
}
"""What comes as `kv_transfer_params`: vLLM's API demands an object, and no more."""

TOKENS: dict[str, int] = {"beyond 32 bits": 2**31 + 5, "below zero": -7}
"""Token ids that are none."""


def hostile_values(random: Random) -> tuple[str | None, dict[Any, Any] | None, int | None]:
    """Return a salt, parameters and a token id; all but one of them are None."""
    values: list[Any] = [None, None, None]
    kind = random.randrange(3)
    values[kind] = random.choice(list((SALTS, PARAMETERS, TOKENS)[kind].values()))
    return values[0], values[1], values[2]
