"""A trial: a test runs on a Saltern that breaks its rule, in a process of its own, and it is noted how it ends.

`python -m tests.rules.trial FOLDER`, at the root, tries all mutants and leaves a file for each in the folder: how every
case of its test ended. The processes are forked, so that what all of them need is imported once.
"""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.rules.mutants import TEST_BY_MUTANT, Mutant

ROOT = Path(__file__).parents[2]

PASSED = "passed"

OPTIONS = ("-p", "no:cacheprovider", "-p", "pytest_timeout")
"""Of pytest, which leaves nothing in the repository, and loads the one plugin that our settings need."""

PLANTING = """\
from pytest import MonkeyPatch
from tests.rules.mutants import {name}
{name}(MonkeyPatch())
"""
"""What Python runs first in the processes that a test starts, under the name that it looks for."""


class Endings:
    """A plugin of pytest that notes how each case of a test ended: setting up and cleaning up don't count."""

    def __init__(self) -> None:
        self.by_case: dict[str, str] = {}

    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        """Take note that a case passed, or of what was raised in which file. Leaves the report to others."""
        if call.when == "call":
            self.by_case[item.nodeid] = PASSED if call.excinfo is None else _raised(call.excinfo)


def _raised(error: pytest.ExceptionInfo[BaseException]) -> str:
    return f"{Path(error.traceback.filter(error)[-1].path).name}: {error.exconly()}"


def try_out(mutant: Mutant, folder: Path) -> None:
    """Run a mutant's test on it. Changes this process for good."""
    name, endings, patch = mutant.__name__, Endings(), pytest.MonkeyPatch()
    (folder / "sitecustomize.py").write_text(PLANTING.format(name=name), encoding="utf-8")
    patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]), prepend=os.pathsep)
    mutant(patch)
    pytest.main([TEST_BY_MUTANT[mutant], *OPTIONS, f"--basetemp={folder / 'tmp'}"], [endings])
    (folder / f"{name}.json").write_text(json.dumps(endings.by_case), encoding="utf-8")


def main() -> None:
    """Try all mutants, one after the other."""
    import tests.conftest  # noqa: F401  # which all of them need

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # others that are installed take longer than the tests
    os.environ.pop("PYTEST_ADDOPTS", None)
    for mutant in TEST_BY_MUTANT:
        child = os.fork()
        if not child:
            try_out(mutant, Path(sys.argv[1]))
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
