"""What every test of the demo starts from."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from demo.interrupts import SIGNALS


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """Let each signal do what it does by default, here and in children, also under nohup or in the background."""
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    for signum in SIGNALS:
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)
