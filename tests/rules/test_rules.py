"""The rules that the harness does not see: each is kept by a test, which a Saltern that breaks the rule has to fail."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rules.mutants import TEST_BY_MUTANT, Mutant
from tests.rules.trial import PASSED, ROOT
from tests.simulator import test_simulator as simulator
from tests.test_docs import rows_headed


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Try all mutants, and return where it is written how the cases of their tests ended."""
    folder = tmp_path_factory.mktemp("trials")
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-m", "tests.rules.trial", str(folder)]
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)
    return folder


@pytest.mark.parametrize("mutant", TEST_BY_MUTANT, ids=lambda mutant: mutant.__name__)
def test_its_own_test_notices_a_saltern_that(mutant: Mutant, trials: Path) -> None:
    path, _, test = TEST_BY_MUTANT[mutant].partition("::")
    written = trials / f"{mutant.__name__}.json"
    endings: dict[str, str] = json.loads(written.read_text("utf-8")) if written.exists() else {}
    assert endings, f"{test} was not run: see {trials / 'log'}"
    failures = [ending for ending in endings.values() if ending != PASSED]
    assert failures, f"{test} passes"
    for failure in failures:  # of the test itself: whatever else fails would be a fault of the mutant
        assert re.match(rf"{Path(path).name}: (AssertionError|Failed: DID NOT RAISE)", failure), failure


def test_the_page_has_every_mutant_and_its_test() -> None:
    places = {mutant.__name__: test.split("::") for mutant, test in TEST_BY_MUTANT.items()}
    expected = {name: f"`{place[-1]}` in `{place[0]}`" for name, place in places.items()}
    planted = f"`{simulator.test_an_invariant_catches.__name__}` in `tests/simulator/test_simulator.py`"
    catching = dict.fromkeys((plant.__name__ for _, plant in simulator.PLANTED), planted)
    rows = rows_headed("docs/correctness.md", "rule", "mutant", "test")
    test_by_name = {mutant.strip("`"): test for _, mutant, test in rows}
    assert len(test_by_name) == len(rows), "a mutant has two rows"
    assert test_by_name == expected | {name: catching[name] for name in test_by_name if name in catching}
