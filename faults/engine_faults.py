"""Faults of the engine: one of its processes is killed in the middle of a copy, and a new engine follows."""

from __future__ import annotations

import os
import signal
import time

from faults.processes import Roles, is_alive
from faults.prompts import OTHER_SAGA, SAGA
from faults.stage import Stage
from faults.watch import Watch

OWN_END_SECONDS = 10.0
"""How long the other processes may take to notice; then they are ended as well."""
POLL_SECONDS = 0.05


def api_server_killed_mid_store(stage: Stage, watch: Watch) -> None:
    """vLLM's API server is killed while its worker writes blocks into the arena."""
    _killed_mid_store(stage, watch, stage.roles.api_server)


def engine_core_killed_mid_store(stage: Stage, watch: Watch) -> None:
    """vLLM's engine core, where the scheduler runs, is killed while its worker writes blocks into the arena."""
    _killed_mid_store(stage, watch, stage.roles.engine_core)


def worker_killed_mid_store(stage: Stage, watch: Watch) -> None:
    """vLLM's worker is killed while it writes blocks into the arena."""
    _killed_mid_store(stage, watch, stage.roles.worker)


def api_server_killed_mid_load(stage: Stage, watch: Watch) -> None:
    """vLLM's API server is killed while its worker reads blocks from the arena."""
    _killed_mid_load(stage, watch, stage.roles.api_server)


def engine_core_killed_mid_load(stage: Stage, watch: Watch) -> None:
    """vLLM's engine core is killed while its worker reads blocks from the arena."""
    _killed_mid_load(stage, watch, stage.roles.engine_core)


def worker_killed_mid_load(stage: Stage, watch: Watch) -> None:
    """vLLM's worker is killed while it reads blocks from the arena."""
    _killed_mid_load(stage, watch, stage.roles.worker)


def _killed_mid_store(stage: Stage, watch: Watch, victim: int) -> None:
    stage.fresh_arena()
    roles = stage.roles
    salt = stage.store(watch)
    with stage.mid_store() as request:
        os.kill(victim, signal.SIGKILL)
    _replace_engine(stage, watch, roles)
    stage.await_hit(watch, salt)
    stage.ask(watch, SAGA, salt=request.salt)  # of which the dead engine has left a part


def _killed_mid_load(stage: Stage, watch: Watch, victim: int) -> None:
    stage.fresh_arena()
    roles = stage.roles
    salt = stage.store(watch, SAGA)
    stage.store(watch, OTHER_SAGA, salt=salt)
    with stage.mid_load(salt):
        os.kill(victim, signal.SIGKILL)
    _replace_engine(stage, watch, roles)
    stage.await_hit(watch, salt, SAGA)
    stage.hit(watch, salt, OTHER_SAGA)


def _replace_engine(stage: Stage, watch: Watch, roles: Roles) -> None:
    """End the processes that are left, see that nothing of them is, and start the next engine."""
    survivors = _survivors(roles)
    stage.engine.kill()
    for what in stage.leftovers(sessions=0):
        watch.left.append(f"{what}, of the dead engine")
    if survivors:
        watch.notes.append(f"ended by us, having outlived the death by {OWN_END_SECONDS:.0f} s: {', '.join(survivors)}")
    stage.engine.start()


def _survivors(roles: Roles) -> list[str]:
    """Return which processes of a maimed engine don't end by themselves."""
    deadline = time.monotonic() + OWN_END_SECONDS
    while any(map(is_alive, roles)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return [name for name, pid in roles._asdict().items() if is_alive(pid)]
