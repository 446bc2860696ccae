"""What every test starts from."""

import logging

import pytest


@pytest.fixture(autouse=True)
def log_seen_by_caplog() -> None:
    """Send Saltern's log to the root logger again: a connector in this process gives it to vLLM's."""
    log = logging.getLogger("saltern")
    log.parent = logging.getLogger()
    log.setLevel(logging.NOTSET)
