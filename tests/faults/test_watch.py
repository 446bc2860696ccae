"""The watch: what is counted, and what fails a fault."""

from __future__ import annotations

from typing import Any, cast

import pytest

from demo.engine import Completion
from faults.prompts import Reference, References, Timed
from faults.watch import PATIENCE_SECONDS, Row, Watch

STEP_SECONDS = 2.0
REFERENCE = Reference(token_ids=(1, 2), seconds=3.0, step_seconds=STEP_SECONDS)


class FakeReferences:
    """One prompt, whatever it is called."""

    step_seconds = STEP_SECONDS

    def __getitem__(self, prompt: str) -> Reference:
        return REFERENCE


def new_watch() -> Watch:
    return Watch(cast(References, FakeReferences()))


def answer(*token_ids: int, cached_tokens: int = 0) -> Completion:
    return Completion(text="", token_ids=token_ids, prompt_tokens=9, cached_tokens=cached_tokens, ttft_ms=1.0)


def timed(completion: Completion, *, beyond: float = 0.0, queued: float = 0.0) -> Timed:
    return Timed(completion, REFERENCE.seconds + beyond, queued)


def row_of(watch: Watch) -> Row:
    return watch.row("fault", "It happens.")


def good_watch() -> Watch:
    """Return a watch over a fault that did no harm."""
    watch = new_watch()
    watch.judge("prompt", timed(answer(1, 2)))
    watch.await_hit(lambda: answer(1, 2, cached_tokens=1))
    return watch


def test_a_fault_that_does_no_harm_passes() -> None:
    row = row_of(good_watch())
    assert not row.harm
    assert (len(row.sent), row.right, row.back_requests) == (1, 1, 1)


def test_one_other_token_fails_it() -> None:
    watch = good_watch()
    watch.judge("prompt", timed(answer(1, 3)))
    assert "1 of 2 answers were not those without a cache" in row_of(watch).harm


@pytest.mark.parametrize(
    ("beyond", "stopped", "ok"),
    [(-1.0, 0.0, True), (2.2, 0.0, True), (2.3, 0.0, False), (7.2, 5.0, True), (7.3, 5.0, False)],
)
def test_a_request_may_take_its_time_without_a_cache_and_patience_and_one_step(
    beyond: float, stopped: float, ok: bool
) -> None:
    watch = good_watch()
    watch.judge("prompt", timed(answer(1, 2), beyond=beyond), stopped_seconds=stopped)
    row = row_of(watch)
    assert row.allowed_seconds == PATIENCE_SECONDS + STEP_SECONDS
    assert row.added_seconds == pytest.approx(max(beyond - stopped, 0.0))
    assert (not row.harm) is ok


@pytest.mark.parametrize(("queued", "ok"), [(2.2, True), (2.3, False), (7.2, False)])
def test_no_request_may_wait_longer_to_be_computed_however_fast_it_is_then(queued: float, ok: bool) -> None:
    watch = good_watch()
    watch.judge("prompt", timed(answer(1, 2), queued=queued))
    watch.judge("prompt", timed(answer(1, 2), queued=5.0), stopped_seconds=5.0)
    row = row_of(watch)
    assert row.waited_seconds == pytest.approx(queued)
    assert (not row.harm) is ok


def test_the_longest_wait_counts() -> None:
    watch = new_watch()
    for beyond in (0.5, 1.5, 1.0):
        watch.judge("prompt", timed(answer(1, 2), beyond=beyond))
    assert row_of(watch).added_seconds == pytest.approx(1.5)


def test_caching_is_back_with_the_first_hit() -> None:
    watch = good_watch()
    answers = iter([answer(1, 2), answer(1, 2), answer(1, 2, cached_tokens=128)])
    assert watch.await_hit(lambda: next(answers)).cached_tokens == 128
    assert row_of(watch).back_requests == 3


def test_a_cache_that_does_not_come_back_fails_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faults.watch.BACK_SECONDS_MAX", 0.0)
    watch = good_watch()
    watch.await_hit(lambda: answer(1, 2))
    assert row_of(watch).harm == ("caching did not come back",)


def test_a_fault_without_an_answer_has_shown_nothing() -> None:
    assert "no request was answered" in row_of(new_watch()).harm


@pytest.mark.parametrize("what", ["problem", "left"])
def test_problems_and_what_is_left_fail_it_and_notes_do_not(what: str) -> None:
    watch = good_watch()
    watch.notes.append("a note")
    watch.expect(True, "nothing")
    assert not row_of(watch).harm
    cast(Any, {"problem": watch.problems, "left": watch.left})[what].append("something")
    assert row_of(watch).harm
