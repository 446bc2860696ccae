"""What every test starts from."""

import logging
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from demo.engine import REQUEST_SECONDS_MAX, START_SECONDS_MAX

# The same examples wherever and however slowly they run: `make fuzz` and `make simulate` are what looks further.
settings.register_profile(
    "same", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")

E2E_SECONDS_MAX = START_SECONDS_MAX + 2 * REQUEST_SECONDS_MAX
"""A slow start of an engine and slow answers, each of which says itself what it has waited for in vain."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests that start a real vLLM the time that they give it."""
    for item in items:
        if item.get_closest_marker("e2e") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(E2E_SECONDS_MAX))


@pytest.fixture(autouse=True)
def log_seen_by_caplog() -> None:
    """Send Saltern's log to the root logger again: a connector in this process gives it to vLLM's."""
    log = logging.getLogger("saltern")
    log.parent = logging.getLogger()
    log.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True, scope="session")
def state_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep a server without settings, and a command without options, out of the tester's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield
