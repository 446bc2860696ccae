"""The subjects of a run: connectors, with the settings they need and a way to ask what they still hold."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from .engine import Counts, Engine, LoadFault
from .options import Options
from .reference import MEMORIES, Memory, ReferenceConnector
from .scenario import Scenario, play, scenario


class Subject(msgspec.Struct, frozen=True):
    """A connector to judge. `settings` become `kv_connector_extra_config`; what they lead to outlives an engine.

    `on_step` lets time pass there.
    """

    connector: type[KVConnectorBase_V1]
    settings: dict[str, Any]
    leftovers: Callable[[Engine], list[str]] | None = None
    on_step: Callable[[], None] | None = None

    def engine(self, options: Options, load_fault: LoadFault | None = None, **settings: Any) -> Engine:
        """Start an engine with this connector, and with more settings if given."""
        return Engine(options, self.connector, self.settings | settings, self.leftovers, load_fault, self.on_step)


def run(seed: int, connector: type[ReferenceConnector] = ReferenceConnector) -> Counts:
    """Play the scenario of a seed with the reference connector, or a mutant of it, and an empty memory."""
    plan = scenario(seed)
    with reference(connector) as subject:
        return play(plan, subject.connector, subject.settings | reference_settings(plan), subject.leftovers)


def reference_settings(plan: Scenario) -> dict[str, Any]:
    """Return the delays and faults of the reference connector in a scenario."""
    return {
        "reference.load_steps": int(plan.knobs[0] * 6),
        "reference.store_steps": int(plan.knobs[1] * 4),
        "reference.fail_every": int(plan.knobs[2] * 3) * 2,
    }


@contextmanager
def reference(connector: type[ReferenceConnector] = ReferenceConnector) -> Iterator[Subject]:
    """Make an empty memory for a while, and the reference connector, or a mutant of it, that keeps blocks there."""
    name = f"memory-{len(MEMORIES)}"
    MEMORIES[name] = Memory()
    try:
        yield Subject(connector, {"reference.memory": name}, _leftovers)
    finally:
        del MEMORIES[name]


def _leftovers(engine: Engine) -> list[str]:
    roles = [engine.connector, *(worker.connector for worker in engine.workers)]
    return [line for role in roles if isinstance(role, ReferenceConnector) for line in role.leftovers()]
