"""Orphans: processes whose parent has died before them, which the demo takes in so that it can bury them.

vLLM's processes are killed together when it has to be quick, and one that dies after its parent becomes a child of
the machine's first process. In a container that is often one that never asks for its children.
"""

from __future__ import annotations

import ctypes
import os

_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


def adopt(*, wanted: bool = True) -> None:
    """Become the parent of all descendants that lose theirs, or no longer."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def bury() -> None:
    """Take note of the end of every child that has ended. Children that are still waited for elsewhere must be gone."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass  # there are none left
