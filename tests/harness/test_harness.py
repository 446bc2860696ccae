"""The tests of the harness itself: a right connector passes, and every mutant of it is caught."""

from collections import Counter

import msgspec
import pytest

pytest.importorskip("vllm", reason="the harness runs vLLM's own scheduler")

from .model import Sequence
from .mutants import MUTANTS
from .options import Options
from .promises import ENGINES, PROMISES, failed_load_is_an_error_if_so_configured
from .reference import ReferenceConnector
from .subjects import reference, run

SEEDS = 60  # the reference connector must pass all of these
HUNT = 150  # and a mutant be caught within these
DELAYS = {"reference.load_steps": 2, "reference.store_steps": 1}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("promise", PROMISES)
def test_reference_connector_keeps(promise: str, engine: str) -> None:
    with reference() as subject:
        subject.settings.update(DELAYS)
        PROMISES[promise](subject, ENGINES[engine])


def test_failed_load_is_an_error_under_the_other_policy() -> None:
    with reference() as subject:
        failed_load_is_an_error_if_so_configured(subject, Options())


def test_reference_connector_passes_and_goes_through_everything() -> None:
    total: Counter[str] = Counter()
    for seed in range(SEEDS):
        total.update(msgspec.structs.asdict(run(seed)))
    for name in ("resets", "records_written", "records_read", "records_lost", "erasures"):
        del total[name]  # the weights change in the lives of Saltern only, and only these have a disk
    for event, count in total.items():
        assert count > 10, f"the scenarios hardly ever lead to {event}"


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant: type[ReferenceConnector]) -> None:
    def play_all() -> None:
        for seed in range(HUNT):
            run(seed, mutant)

    with pytest.raises(MUTANTS[mutant]):
        play_all()


def test_a_seed_decides_everything() -> None:
    assert run(7) == run(7)


def test_kv_depends_on_the_whole_prefix_and_on_the_tag() -> None:
    kv_hash = Sequence([1, 2, 3]).hashes(2, 3)
    assert Sequence([1, 2, 3, 4]).hashes(2, 3) == kv_hash
    assert Sequence([2, 2, 3]).hashes(2, 3) != kv_hash
    assert Sequence([1, 2, 3], tag="bob").hashes(2, 3) != kv_hash
