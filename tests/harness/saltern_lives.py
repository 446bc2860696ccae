"""The lives of Saltern: engines of all shapes, their clients and the weather around them, each under one seed.

A life is one server and one or two engines after another. In the end the weather clears up, one more request must
find the cache in service, and nothing may be left: not with the engine, not with the connector, not at the server.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any, cast

import msgspec
from msgspec.structs import replace

from saltern.core.disk import DISK_PAGE_BYTES, record_pages
from saltern.core.tenants import NO_LIMITS, Limits
from saltern.vllm.connector import SalternConnector
from saltern.vllm.planner import HELD_SHARE_MAX
from saltern.vllm.session import RETRY_SECONDS_MAX

from .architectures import ARCHITECTURES, HEAD_SIZE
from .engine import Counts, Engine, LoadFault
from .findings import Finding
from .options import Options
from .saltern_world import FAIR, LOAD_PATIENCE_SECONDS, SLOW_STEP_SECONDS, STEP_SECONDS, Weather, World
from .scenario import Scenario, play_arrivals, scenario
from .subjects import Subject

PAGE_BYTES = 1024
RETRY_STEPS_MAX = int(RETRY_SECONDS_MAX / STEP_SECONDS) + 1
MODELS = ("full attention",) * 6 + ("states in most layers",) * 3 + tuple(ARCHITECTURES)
"""What lives draw from: the plain one most often, and then what vLLM treats most differently."""

RETURNS_MAX = 5  # requests until scheduler and workers have found one another again

EVENTS = (
    "lose_control",
    "lose_lifeline",
    "restart_server",
    "kill_server",
    "start_server",
    "freeze_server",
    "thaw_server",
)


DISK_EVENTS = (
    "erase_alice",
    "erase_alice",
    "erase_alice_for_good",
    "erase_all",
    "stall_disk",
    "resume_disk",
    "rot",
    "restart_server",
)


class OutOfService(Finding):
    """All was well again, and yet nothing was stored."""


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """What happens under one seed. `slots` are engine blocks a block of ours; sizes of the cache are in blocks.

    The engine plays `plans` one after the other, each as an engine of its own; all but the last are killed at the step
    in `killed_at`, unless that is None.
    """

    seed: int
    plans: tuple[Scenario, ...]
    killed_at: int | None
    slots: int
    store: str
    weather: Weather
    cache_blocks: int
    user_limit_blocks: int | None
    disk_blocks: int = 0
    disk_limit_blocks: int | None = None  # of a user

    def world(self) -> World:
        """Make what is around the engines."""
        pages = max(_block_pages(plan.options, self.slots) for plan in self.plans)
        disk_pages = record_pages(pages * PAGE_BYTES)
        return World(
            self.weather,
            seed=self.seed,
            pages=self.cache_blocks * pages,
            page_bytes=PAGE_BYTES,
            limits=_limits(self.user_limit_blocks, pages * PAGE_BYTES),
            disk_pages=self.disk_blocks * disk_pages,
            disk_limits=_limits(self.disk_limit_blocks, disk_pages * DISK_PAGE_BYTES),
        )

    def stores(self, options: Options) -> bool:
        """Return whether an engine is large enough to hold a block of ours while it is stored."""
        engine_blocks = options.architecture.groups * self.slots * options.architecture.unit_blocks
        return int(HELD_SHARE_MAX * options.blocks) >= engine_blocks

    def settings(self, plan: Scenario) -> dict[str, Any]:
        """Return the connector's settings."""
        return _settings(plan.options, self.slots) | {
            "saltern.store": self.store,
            "saltern.load_patience_ms": 1000 * LOAD_PATIENCE_SECONDS,
        }


def _limits(blocks: int | None, block_bytes: int) -> Limits:
    return NO_LIMITS if blocks is None else Limits(user_limit_bytes=blocks * block_bytes)


def life(seed: int) -> Life:
    """Make the life of a seed."""
    random = Random(f"saltern {seed}")
    plan = _tagged(scenario(seed, MODELS))
    plan = replace(plan, fault_share=random.choice((0.0, 0.0, 0.3, 1.0)))
    plan = replace(plan, weight_steps=tuple(sorted(random.sample(range(60), random.choice((0, 0, 0, 1, 2))))))
    plans = [plan]
    if random.random() < 0.75:  # the cache outlives the engine; sometimes the next one is another
        other = random.random() < 0.3
        next_plan = (
            _tagged(scenario(seed + 1_000_000, (plan.options.model,)))
            if other
            else replace(plan, seed=seed + 1_000_000)
        )
        plans.append(replace(next_plan, arrivals=plan.arrivals if not other else next_plan.arrivals, weight_steps=()))
    without_disk = Life(
        seed=seed,
        plans=tuple(plans),
        killed_at=random.choice((None, random.randrange(1, 60))),
        slots=random.choice((1, 1, 1, 1, 1, 1, 2, 2, 2, 4, 4, 16)),
        store=random.choice(("prompt", "all")),
        weather=_weather(random),
        cache_blocks=random.choice((4, 12, 60, 120)),
        user_limit_blocks=random.choice((None, None, 6)),
    )
    return _with_disk(without_disk, random) if random.random() < 0.6 else without_disk


def _with_disk(life: Life, random: Random) -> Life:
    """Give a life a disk, and what can befall it."""
    weather, share = life.weather, random.choice((0.0, 0.0, 0.2, 1.0))
    is_read = random.random() < 0.7
    blows = [(random.randrange(1, 80), random.choice(DISK_EVENTS)) for _ in range(random.choice((0, 1, 2, 4)))]
    # Then what requests share is on the disk only.
    blows += [(random.randrange(5, 100), "crowd_out") for _ in range(random.choice((0, 1, 3, 10)))]
    return replace(
        life,
        plans=tuple(_repeated(plan, random.choice((20, 40))) for plan in life.plans),
        slots=random.choice((1, 1, 1, 2, life.slots)),
        cache_blocks=random.choice((2, 3, 5, 8, life.cache_blocks)),
        disk_blocks=random.choice((4, 20, 200)),
        disk_limit_blocks=random.choice((None, None, 5)),
        weather=replace(
            weather,
            disk_steps_max=random.choice((0, 1, 3, 8)),
            read_fault_share=share if is_read else 0.0,
            write_fault_share=0.0 if is_read else share,
            block_seconds=random.choice((None, 0.0, 0.002, 0.05, 1.0, 1.0)),
            events=tuple(sorted([*weather.events, *blows])),
        ),
    )


def _repeated(plan: Scenario, after: int) -> Scenario:
    """Let every request come a second time, by when RAM may have lost what the first has stored."""
    again = [
        replace(
            arrival,
            step=arrival.step + after,
            request_id=f"{arrival.request_id}-again",
            turns=(),
            abort_after=None,
            abort_while_loading=False,
        )
        for arrival in plan.arrivals
    ]
    return replace(plan, arrivals=sorted([*plan.arrivals, *again], key=lambda arrival: arrival.step))


def live(seed: int, subject: Life | None = None) -> Counts:
    """Live the life of a seed, or one made from it, to its end; return what it went through. Raises a `Finding`."""
    what = life(seed) if subject is None else subject
    world = what.world()
    total: Counter[str] = Counter()
    with world.around():
        for plan in what.plans:
            steps_max = None if plan is what.plans[-1] else what.killed_at
            total.update(msgspec.structs.asdict(_play(what, plan, world, steps_max)))
            world.check_deserted()
    total.update(world.counts())
    return Counts(**total)


def _play(what: Life, plan: Scenario, world: World, steps_max: int | None) -> Counts:
    """Play what one engine does, to its end or until it is killed after `steps_max` steps."""
    fault = _spoiled_loads(plan)
    with Engine(plan.options, SalternConnector, what.settings(plan), world.leftovers, fault, world.tick) as engine:
        engine.on_idle = world.check_idle
        play_arrivals(plan, engine, steps_max)
        world.check_users(engine)
        if steps_max is None:
            world.heal()
            engine.load_fault = None
            _serve_again(what, engine, world)
            engine.check_drained()
        return engine.counts


def _serve_again(what: Life, engine: Engine, world: World) -> None:
    """Come with something new until it is stored, as it must be as soon as all are connected again."""
    tally = world.server.cache.default_tenant.tally
    before = tally.stored + tally.stored_after_evicting
    for attempt in range(RETURNS_MAX):
        for _ in range(RETRY_STEPS_MAX):
            engine.pass_time()
        tokens = min(what.slots * engine.options.unit_tokens, engine.options.context_tokens - 1)
        prompt = [attempt] * tokens
        engine.ask(f"last-{attempt}", prompt, "carol")
        if tally.stored + tally.stored_after_evicting > before or not what.stores(engine.options):
            return
    raise OutOfService(f"nothing was stored of {RETURNS_MAX} requests in fair weather")


def _tagged(plan: Scenario) -> Scenario:
    """Let each user have KV of its own, since all that is named and kept is checked for whose it is."""
    return replace(plan, options=replace(plan.options, tag_users=True))


def _weather(random: Random, steps: int = 80) -> Weather:
    share = random.choice((0.0, 0.0, 0.2, 1.0))
    is_store = random.random() < 0.5
    return Weather(
        step_seconds=random.choice((STEP_SECONDS, STEP_SECONDS, STEP_SECONDS, SLOW_STEP_SECONDS)),
        reply_steps_max=random.choice((0, 0, 2, 8)),
        copy_steps_max=random.choice((0, 1, 3, 6)),
        lifeline_steps_max=random.choice((0, 0, 3, 12)),
        load_fault_share=0.0 if is_store else share,
        store_fault_share=share if is_store else 0.0,
        faulty_rank=random.choice((None, 0)),
        events=tuple(
            sorted((random.randrange(1, steps), random.choice(EVENTS)) for _ in range(random.choice((0, 0, 2, 6))))
        ),
    )


def _spoiled_loads(plan: Scenario) -> LoadFault | None:
    """Return which loads the workers spoil that Saltern took for good: of one rank, some or all of their blocks."""
    if not plan.fault_share:
        return None
    random = Random(plan.seed)
    choose = random.choice(
        (
            lambda block_ids: {block_ids[0]},
            lambda block_ids: {block_ids[-1]},
            lambda block_ids: {random.choice(block_ids)},
            set,
        )
    )

    def fault(rank: int, request_id: str, block_ids: list[int]) -> set[int]:
        if rank != random.randrange(plan.options.ranks) or random.random() >= plan.fault_share:
            return set()
        return cast(set[int], choose(block_ids))

    return fault


def _block_pages(options: Options, slots: int) -> int:
    slot_bytes = options.layers * options.heads * options.block_tokens * 2 * HEAD_SIZE * 2  # K and V in bfloat16
    shares = 2 * len(options.architecture.layers)  # no layer has more than twice of this
    return -(-options.ranks * slots * shares * slot_bytes // PAGE_BYTES)


# The promises


@contextmanager
def stepped(options: Options, weather: Weather = FAIR) -> Iterator[Subject]:
    """Serve an empty cache for a while; yields the connector, its blocks as large as the engine's."""
    world = World(weather)
    with world.around():
        settings = _settings(options, slots=1) | {"saltern.store": "all"}
        yield Subject(SalternConnector, settings, world.leftovers, world.tick)
        world.check_deserted()


def _settings(options: Options, slots: int) -> dict[str, Any]:
    return {"saltern.socket": "in this process", "saltern.block_tokens": slots * options.unit_tokens}
