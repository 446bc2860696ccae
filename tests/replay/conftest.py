"""What the replay's tests share: one trace."""

from pathlib import Path

import pytest

from saltern.replay.traces import Trace, UserColumn, read_trace
from tests.replay.synthetic import write_trace


@pytest.fixture(scope="session")
def trace_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trace(tmp_path_factory.mktemp("replay") / "made.jsonl", seed=1, requests=1500)


@pytest.fixture(scope="session")
def trace(trace_path: Path) -> Trace:
    return read_trace(trace_path, UserColumn("person"))
