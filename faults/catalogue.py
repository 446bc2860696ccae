"""The catalogue: all faults in the order of a run, and how each is taken."""

from __future__ import annotations

import inspect
import subprocess
from collections.abc import Callable

from demo.engine import EngineError, RequestError
from demo.server import ServerError
from faults import engine_faults, server_faults
from faults.prompts import References
from faults.stage import NotReachedError, Stage
from faults.watch import Row, Watch
from saltern.client.sockets import ConnectionLost

Act = Callable[[Stage, Watch], None]

_ACTS: tuple[Act, ...] = (
    server_faults.server_absent_at_start,
    server_faults.server_killed_idle,
    server_faults.server_killed_mid_store,
    server_faults.server_killed_mid_load,
    server_faults.server_frozen,
    server_faults.server_restarted_with_another_arena,
    server_faults.socket_deleted,
    server_faults.arena_full_of_pinned_blocks,
    server_faults.server_out_of_descriptors,
    server_faults.disk_full,
    server_faults.log_full,
    server_faults.clock_jumps,
    server_faults.second_engine_with_the_same_id,
    server_faults.engine_out_of_descriptors,
    engine_faults.api_server_killed_mid_store,
    engine_faults.engine_core_killed_mid_store,
    engine_faults.worker_killed_mid_store,
    engine_faults.api_server_killed_mid_load,
    engine_faults.engine_core_killed_mid_load,
    engine_faults.worker_killed_mid_load,
)

FAULTS: dict[str, Act] = {act.__name__.replace("_", "-"): act for act in _ACTS}
"""What `make faults` does, by name."""

ATTEMPTS_MAX = 3

_STARTS_BY_ITSELF = server_faults.server_absent_at_start


def what_happens(name: str) -> str:
    """Return what a fault does, in a sentence."""
    return inspect.getdoc(FAULTS[name]) or ""


def take(name: str, stage: Stage, references: References) -> Row:
    """Bring a fault about and judge what came of it. What could not be done is a problem as well.

    Other work on the machine may keep the engine from computing. So where requests only took longer, and none of them
    waited, the fault is brought about again: what the cache does to them it does every time.
    """
    row = _take_once(name, stage, references)
    for attempt in range(2, ATTEMPTS_MAX + 1):
        if not row.only_took_longer:
            break
        note = f"attempt {attempt}: in the one before, a request took {row.added_seconds:.2f} s longer"
        row = _take_once(name, stage, references, note)
    return row


def _take_once(name: str, stage: Stage, references: References, *notes: str) -> Row:
    act, watch = FAULTS[name], Watch(references)
    watch.notes += notes
    try:
        if act is not _STARTS_BY_ITSELF:
            stage.settle()
        act(stage, watch)
        stage.check(watch)
    except NotReachedError as error:
        watch.problems.append(f"not reached: {error}")
    except (EngineError, RequestError, ServerError, ConnectionLost, OSError, subprocess.SubprocessError) as error:
        watch.problems.append(str(error) or repr(error))
    return watch.row(name, what_happens(name))
