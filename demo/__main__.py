"""`make demo`: thirteen steps on a real model, each of which passes or says why not."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import msgspec

from demo.engine import Engine, EngineError
from demo.front import Front
from demo.interrupts import Interrupted, deferred, interruptible
from demo.model import MODEL_NAME, ensure_model, room_for
from demo.orphans import adopt, bury
from demo.screen import Screen
from demo.server import Server, ServerError, connector_config
from demo.steps import STEPS, Scene, Step, not_reached, take_step

ARENA = room_for(56)  # the smaller, the sooner it is flooded
DISK = room_for(360)  # more than all steps together store
USER_LIMIT = room_for(9)  # alice's prompt has 8, carol's three together 12
PATIENCE_MS = 2000

EPILOGUE = """\
What was proved: a prompt comes back to the user who sent it, and to nobody else, with the same output; it outlives
the engine and the server, killed or stopped; a user at its limit pays with its own blocks; and without the server
requests go on as before. Nobody takes what a tenant is guaranteed; what the operator publishes is there for everybody;
and no salt opens another's cache. Of who is erased nothing is found any more, and a signed receipt says so.

With your own vLLM, 0.31 or 0.32, in two terminals:

  saltern serve --arena "8 GiB"

which keeps up to 16 GiB more on the disk, below ~/.local/state/saltern, and

  vllm serve MODEL --kv-transfer-config '{"kv_connector": "SalternConnector",
    "kv_connector_module_path": "saltern.vllm", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}'

Send requests with a "cache_salt" for each user, and look at what is kept: saltern stats"""


class Report(msgspec.Struct, frozen=True):
    """What `--json` writes."""

    steps: tuple[Step, ...]
    ok: bool


class Demo:
    """One run, and all that it has to leave behind as it was."""

    def __init__(self) -> None:
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._server: Server | None = None
        self._engine: Engine | None = None
        self._front: Front | None = None

    def run(self, screen: Screen) -> Report:
        """Set everything up and take the steps; what can't be set up fails them all."""
        began = time.monotonic()
        screen.say(f"Saltern with vLLM and {MODEL_NAME} on this machine; vLLM's own prefix caching is off\n")
        try:
            scene = self._set_up(screen)
        except (EngineError, ServerError, FileNotFoundError) as error:
            screen.say(f"\n{error}\n")
            return Report(steps=tuple(not_reached(name) for name in STEPS), ok=False)
        steps = _take_steps(scene, screen)
        passed = sum(step.ok for step in steps)
        screen.say(f"\n{passed} of {len(steps)} steps passed in {time.monotonic() - began:.0f} s")
        return Report(steps=steps, ok=passed == len(steps))

    def clean_up(self) -> None:
        """End every process and remove every file of this run; the engine first, which uses the server."""
        with ExitStack() as stack:
            stack.callback(bury)
            if self._scratch is not None:
                stack.callback(self._scratch.cleanup)
            if self._server is not None:
                stack.callback(self._server.stop)
            if self._engine is not None:
                stack.callback(self._engine.stop)
            if self._front is not None:
                stack.callback(self._front.engine.stop)

    def _set_up(self, screen: Screen) -> Scene:
        with screen.waiting("making sure that the model is there"):
            model = ensure_model()
        with deferred():
            self._scratch = tempfile.TemporaryDirectory(prefix="saltern-demo-")
        folder = Path(self._scratch.name)
        self._server = server = Server(folder, arena=ARENA, disk=DISK, user_limit=USER_LIMIT)
        self._engine = engine = Engine(
            model,
            log_path=folder / "vllm.log",
            # The default patience is meant for serving: nobody shall take a busy machine for a broken cache.
            kv_transfer_config=connector_config(server.socket_path, patience_ms=PATIENCE_MS),
            prefix_caching=False,
        )
        self._front = front = Front(model, server, folder, patience_ms=PATIENCE_MS)
        with screen.waiting("starting saltern serve"):
            server.start()
        with screen.waiting("starting vLLM (half a minute)"):
            engine.start()
        return Scene(server, engine, front)


def _take_steps(scene: Scene, screen: Screen) -> tuple[Step, ...]:
    screen.header()
    steps = []
    for name, (did, _) in STEPS.items():
        with screen.waiting(f"{name:19} {did}", is_step=True):
            step = take_step(scene, name)
        screen.step(step)
        steps.append(step)
    return tuple(steps)


def main() -> int:
    """Run the demo; return 0 if all steps passed, 1 if not, 2 for wrong usage, 128 + signal when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the steps down as JSON as well")
    options = parser.parse_args()
    if options.json is not None and not os.access(options.json.absolute().parent, os.W_OK):
        parser.error(f"--json: can't write {options.json}")
    try:
        return _run(options.json)
    except Interrupted as interrupted:
        with suppress(OSError):  # the terminal may be gone
            print(f"interrupted by {interrupted}; nothing is left behind", file=sys.stderr)
        return interrupted.exit_status
    except BrokenPipeError:
        # Nobody reads on. Python would complain once more about what is left to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(json_path: Path | None) -> int:
    adopt()
    demo, screen = Demo(), Screen()
    report = interruptible(partial(demo.run, screen), clean_up=demo.clean_up)
    if json_path is not None:
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    if report.ok:
        screen.say(f"\n{EPILOGUE}")
    return 0 if report.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
