"""Sweeps: one small life, again and again, with the same blow at each of its steps in turn.

What a seed hits by chance is hit here on purpose: a request is aborted at every stage that it goes through, and the
server, a connection or the engine is gone at every step, and back soon, later or much later.
"""

from collections.abc import Iterator

from msgspec.structs import replace

from .options import Options
from .saltern_lives import Life
from .saltern_world import Weather
from .scenario import Arrival, Scenario

STEPS = 45
"""A little more than the small life takes."""

ENGINES: dict[str, Options] = {
    "one rank": Options(tag_users=True, blocks=24, batch_tokens=40),
    "two late ranks, two batches in flight, drafts": Options(
        tag_users=True, blocks=24, batch_tokens=40, ranks=2, asynchronous=True, workers_lag=True, speculated_tokens=1
    ),
    "second runner, prefix caching": Options(
        tag_users=True, blocks=24, batch_tokens=40, runner_v2=True, asynchronous=True, prefix_caching=True
    ),
    "windows": Options(
        tag_users=True, blocks=72, batch_tokens=40, model="windows in most layers", layers=1, asynchronous=True
    ),
    "states": Options(
        tag_users=True, blocks=72, batch_tokens=40, model="states in most layers", layers=1, prefix_caching=True
    ),
}
BACK_AFTER_STEPS = (0, 1, 4, 15)
FROZEN_STEPS = (1, 4, 30)  # the last is longer than a request's patience


def base(options: Options) -> Life:
    """Return a life in which prompts are stored, hit, hit in part and missed, one after the other and side by side."""
    prompt = [(7 * position) % 251 for position in range(5 * options.block_tokens)]
    longer = [*prompt[: 3 * options.block_tokens + 3], *prompt[: 2 * options.block_tokens]]
    arrivals = [
        Arrival(0, "first", prompt, "alice", 4),
        Arrival(14, "hit", prompt, "alice", 4),
        Arrival(15, "partial hit", longer, "alice", 20),
        Arrival(16, "miss", prompt, "bob", 4),
        Arrival(26, "last", longer, "alice", 2),
    ]
    # What vLLM has cached by itself is forgotten before the hit, for there to be something to load.
    plan = Scenario(seed=0, options=options, arrivals=arrivals, fault_share=0.0, knobs=[], reset_steps=((13, False),))
    return Life(
        seed=0,
        plans=(plan,),
        killed_at=None,
        slots=1,
        store="all",
        weather=Weather(reply_steps_max=1, copy_steps_max=2, lifeline_steps_max=1),
        cache_blocks=40,
        user_limit_blocks=None,
    )


def _with_plan(life: Life, **changes: object) -> Life:
    return replace(life, plans=(replace(life.plans[0], **changes),))


def _with_events(life: Life, *events: tuple[int, str]) -> Life:
    return replace(life, weather=replace(life.weather, events=events))


def aborts(life: Life) -> Iterator[Life]:
    """Abort each request at each step of its life, between two steps and during one."""
    arrivals = life.plans[0].arrivals
    for index, arrival in enumerate(arrivals):
        for after in range(STEPS - arrival.step):
            for while_executing in (False, True):
                gone = replace(arrival, abort_after=after, abort_while_executing=while_executing)
                yield _with_plan(life, arrivals=[*arrivals[:index], gone, *arrivals[index + 1 :]])


def outages(life: Life) -> Iterator[Life]:
    """Have the server gone at each step, and another one in its place after some."""
    for step in range(1, STEPS):
        for after in BACK_AFTER_STEPS:
            yield _with_events(life, (step, "kill_server"), (step + after, "start_server"))


def freezes(life: Life) -> Iterator[Life]:
    """Have the server stand still at each step, for less and for more than anybody's patience."""
    for step in range(1, STEPS):
        for after in FROZEN_STEPS:
            yield _with_events(life, (step, "freeze_server"), (step + after, "thaw_server"))


def losses(life: Life) -> Iterator[Life]:
    """Break the scheduler's connection, or a worker's, at each step."""
    for step in range(1, STEPS):
        yield _with_events(life, (step, "lose_control"))
        yield _with_events(life, (step, "lose_lifeline"))


def resets(life: Life) -> Iterator[Life]:
    """Empty vLLM's prefix cache at each step, without and with the connector's, and change the weights."""
    for step in range(STEPS):
        yield _with_plan(life, reset_steps=((step, False),))
        yield _with_plan(life, reset_steps=((step, True),))
        yield _with_plan(life, weight_steps=(step,))


def restarts(life: Life) -> Iterator[Life]:
    """Kill the engine at each step, and have another one live the same life after it."""
    for step in range(1, STEPS):
        yield replace(life, plans=(life.plans[0], replace(life.plans[0], seed=1)), killed_at=step)


def disks(life: Life) -> Iterator[Life]:
    """Have RAM lose all to the disk before the hit; erase a user, kill the server or stop the disk at each step.

    What is much like one of these is left to every third step.
    """
    disk = replace(
        life,
        disk_blocks=40,
        weather=replace(life.weather, disk_steps_max=1, block_seconds=1.0, events=((13, "crowd_out"),)),
    )
    for step in range(1, STEPS):
        others = () if step % 3 else ("erase_alice_for_good", "erase_all", "rot", "crowd_out")
        for blow in ("erase_alice", "restart_server", *others):
            yield _with_events(disk, (13, "crowd_out"), (step, blow))
        for after in FROZEN_STEPS[:: 1 if step % 3 == 0 else 2]:
            yield _with_events(disk, (13, "crowd_out"), (step, "stall_disk"), (step + after, "resume_disk"))


def failures(life: Life) -> Iterator[Life]:
    """Fail all loads or all stores, of one rank or of all, whatever their delays."""
    for seed in range(STEPS // 3):
        for rank in (None, 0):
            for load_share, store_share in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
                weather = replace(
                    life.weather, load_fault_share=load_share, store_fault_share=store_share, faulty_rank=rank
                )
                yield replace(life, seed=seed, weather=weather)


SWEEPS = {
    "aborts": aborts,
    "outages": outages,
    "freezes": freezes,
    "losses": losses,
    "resets": resets,
    "restarts": restarts,
    "disks": disks,
    "failures": failures,
}
