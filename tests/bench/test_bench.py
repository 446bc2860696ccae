"""Every benchmark still runs, in a size that says nothing about speed."""

import json
from pathlib import Path

import pytest

from bench.__main__ import BENCHES, main
from bench.report import Target

WITH_ENGINES = ("ttft", "ttft-disk", "load")


def run(name: str, tmp_path: Path) -> None:
    """Run one benchmark through its command line and check what it wrote down."""
    path = tmp_path / "results.json"
    assert main([name, "--smoke", "--json", str(path)]) == 0
    written = json.loads(path.read_bytes())
    assert written["machine"]["cores"]
    (report,) = written["reports"]
    assert report["name"] == name
    assert all(len(row) == len(table["columns"]) for table in report["tables"] for row in table["rows"])
    assert any(table["rows"] for table in report["tables"])


@pytest.mark.parametrize("name", [name for name in BENCHES if name not in WITH_ENGINES])
def test_a_benchmark_without_an_engine_measures_and_writes_down_what_it_measured(name: str, tmp_path: Path) -> None:
    run(name, tmp_path)


@pytest.mark.e2e
@pytest.mark.parametrize("name", WITH_ENGINES)
def test_a_benchmark_with_real_engines_measures_and_writes_down_what_it_measured(name: str, tmp_path: Path) -> None:
    run(name, tmp_path)


def test_a_target_is_reached_from_the_side_it_names() -> None:
    assert Target("time", measured=0.5, bound=1, unit="s").reached
    assert not Target("time", measured=1.5, bound=1, unit="s").reached
    assert Target("rate", measured=1.5, bound=1, unit="per s", at_least=True).reached
    assert not Target("rate", measured=0.5, bound=1, unit="per s", at_least=True).reached


def test_an_unknown_name_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["lookups"])
    assert "lookup, copy, ttft, ttft-disk, load, start, disk, core" in capsys.readouterr().err
