"""The catalogue: each fault has a name and a sentence, and what can't be done is not passed over."""

from __future__ import annotations

import ast
from itertools import count
from pathlib import Path
from typing import Any, cast

import pytest

from demo.engine import Completion, EngineError
from faults.catalogue import FAULTS, take, what_happens
from faults.prompts import Reference, References, Timed
from faults.stage import NotReachedError, Stage
from faults.watch import Watch

SOURCES = Path(__file__).resolve().parents[2] / "src" / "saltern"
WALL_CLOCKS = {"time", "time_ns", "now", "utcnow", "today", "gmtime"}


class FakeStage:
    """A stage that is always in good order."""

    settled = checked = 0

    def settle(self) -> None:
        self.settled += 1

    def check(self, watch: Watch) -> None:
        self.checked += 1


class FakeReferences:
    """A machine whose steps take a second."""

    step_seconds = 1.0

    def __getitem__(self, prompt: str) -> Reference:
        return Reference(token_ids=(1,), seconds=1.0, step_seconds=1.0)


def taken(name: str, stage: FakeStage) -> Any:
    return take(name, cast(Stage, stage), cast(References, FakeReferences()))


def test_every_fault_is_one_sentence() -> None:
    assert len(FAULTS) == 20
    for name in FAULTS:
        assert what_happens(name).endswith(".") and "\n" not in what_happens(name), name


@pytest.mark.parametrize(
    ("error", "said"), [(NotReachedError("too late"), "not reached: too late"), (EngineError("it died"), "it died")]
)
def test_a_fault_that_could_not_be_brought_about_fails(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fails(stage: Stage, watch: Watch) -> None:
        """It fails."""
        raise error

    monkeypatch.setitem(FAULTS, "fails", fails)
    stage = FakeStage()
    row = taken("fails", stage)
    assert said in row.problems and row.harm
    assert (stage.settled, stage.checked, row.did) == (1, 0, "It fails.")


def test_a_fault_that_was_brought_about_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAULTS, "nothing", lambda stage, watch: None)
    stage = FakeStage()
    assert taken("nothing", stage).problems == ()
    assert (stage.settled, stage.checked) == (1, 1)


@pytest.mark.parametrize(
    ("slow", "waited", "attempts", "harm"), [(0, 0.0, 1, 0), (1, 0.0, 2, 0), (9, 0.0, 3, 1), (9, 9.0, 1, 2)]
)
def test_a_fault_is_brought_about_again_when_requests_only_took_longer(
    monkeypatch: pytest.MonkeyPatch, slow: int, waited: float, attempts: int, harm: int
) -> None:
    times = count(1)

    def act(stage: Stage, watch: Watch) -> None:
        """It is slow the first times."""
        seconds = 9.0 if next(times) <= slow else 1.0
        completion = Completion(text="", token_ids=(1,), prompt_tokens=9, cached_tokens=1, ttft_ms=1.0)
        watch.judge("prompt", Timed(completion, seconds, waited))
        watch.await_hit(lambda: completion)

    monkeypatch.setitem(FAULTS, "slow", act)
    stage = FakeStage()
    row = taken("slow", stage)
    assert (stage.settled, len(row.harm), len(row.notes)) == (attempts, harm, attempts > 1)


def test_no_decision_reads_the_wall_clock() -> None:
    """No process has a wall clock of its own that a fault could turn. The log's formatter is given its moments.

    But for dates, in a list of keys and in the audit log; for how long a publication's mark is good: who turns that
    clock can have the very same prompt stored once more, or must publish again; and for when blocks were used before
    the server's start: who turns it meanwhile makes them look fresh, or expired.
    """
    read = {
        str(path.relative_to(SOURCES))
        for path in SOURCES.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr in WALL_CLOCKS
        and isinstance(node.value, ast.Name)
        and node.value.id in {"time", "datetime", "date"}
    }
    assert read == {
        "audit.py",
        "cli/keys.py",
        "server/operations.py",
        "server/serve.py",
        "vllm/planner.py",
    }
