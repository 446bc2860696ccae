"""A short run of each fuzzer, and whatever they found."""

from collections.abc import Callable
from importlib import import_module
from random import Random

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from fuzz.__main__ import FUZZERS
from saltern.core import cache
from saltern.core.leases import Lease, Session
from saltern.server import config, logs
from saltern.vllm.planner import Planner
from saltern.vllm.questions import Question

EXAMPLES = 150
LENGTH_MAX = 300  # some sixty acts, enough to open a session and do harm in it


def player(name: str) -> Callable[[bytes], None]:
    play: Callable[[bytes], None] = import_module(f"fuzz.{name}").play
    return play


@pytest.mark.parametrize("name", FUZZERS)
@seed(20)
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=LENGTH_MAX))
def test_hypothesis_finds_nothing(name: str, data: bytes) -> None:
    player(name)(data)


@pytest.mark.parametrize("name", FUZZERS)
def test_chance_finds_nothing(name: str) -> None:
    play_by_chance(name, EXAMPLES)


def play_by_chance(name: str, games: int) -> None:
    """Play games that only their number decides."""
    for number in range(games):
        player(name)(Random(number).randbytes(LENGTH_MAX))


def any_lease(session: Session, lease_id: int, *, is_write: bool) -> Lease:
    """Take whatever lease there is for one of the kind that was meant."""
    if lease_id not in session.lease_by_id:
        raise cache.ViolationError("no such lease")
    return session.lease_by_id.pop(lease_id)


PLANTED: dict[str, tuple[str, object, str, object]] = {
    "a commit of a read lease": ("server", cache, "_end_lease", any_lease),
    "a violation without an answer": ("server", cache.Cache, "_refuse", lambda *_: None),
    "an engine's name as it is": ("server", logs, "_quoted", str),
    "answers that are never checked": ("engine", Question, "fits", lambda *_: True),
    "blocks of an answer that is given up": ("engine", Planner, "_give_up", lambda *_: None),
    "settings that are never checked": ("files", config, "_check", lambda *_: None),
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_planted_is_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, owner, attribute, broken = PLANTED[what]
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whichever claim it comes to break first
        play_by_chance(name, 4 * EXAMPLES)
