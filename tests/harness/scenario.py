"""A scenario: one random life of an engine under one seed, and what came of it."""

from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from .engine import Counts, Engine, LoadFault, user_tag
from .findings import Stuck
from .model import Sequence
from .options import VOCABULARY, Options

SALTS = (None, "alice", "alice", "bob")  # somebody comes more often, so that there is something to hit
PREFIXES = 2
WEIGHTS_AGAIN_STEPS = 10
OUTPUT_TOKENS_MAX = 49  # each costs a step


class Arrival(msgspec.Struct, frozen=True):
    """A request, sent before the step of this number.

    It is aborted `abort_after` steps later (None is never), or else, with `abort_while_loading`, as soon as it waits
    for a load; either between two steps or, with `abort_while_executing`, during one.
    """

    step: int
    request_id: str
    prompt: list[int]
    salt: str | None
    max_tokens: int
    reads_cache: bool = True
    abort_after: int | None = None
    abort_while_loading: bool = False
    abort_while_executing: bool = False


class Scenario(msgspec.Struct, frozen=True):
    """What happens under one seed. `fault_share` is the share of loads that the workers spoil and report bad.

    The weights change at each of `weight_steps`, or as soon after it as vLLM allows. `knobs` are numbers in [0, 1)
    for the connector under test, so that its own delays and faults follow from the seed.
    """

    seed: int
    options: Options
    arrivals: list[Arrival]
    fault_share: float
    knobs: list[float]
    weight_steps: tuple[int, ...] = ()


def scenario(seed: int, options_of: Callable[[Random], Options] | None = None) -> Scenario:
    """Make the scenario of a seed, with options of its own choice or another's."""
    random = Random(seed)
    options = (options_of or _options)(random)
    prefixes = [_tokens(random, options.context_tokens) for _ in range(PREFIXES)]
    steps_max = random.choice((5, 30, 80))
    arrivals: list[Arrival] = []
    for step in sorted(random.randrange(steps_max) for _ in range(random.randint(6, 20))):
        arrivals.append(_arrival(random, step, options, prefixes, arrivals))
    return Scenario(
        seed=seed,
        options=options,
        arrivals=arrivals,
        fault_share=random.choice((0.0, 0.0, 0.3)),
        knobs=[random.random() for _ in range(8)],
    )


def play(
    plan: Scenario,
    connector: type[KVConnectorBase_V1],
    extra: dict[str, Any],
    leftovers: Callable[[Engine], list[str]] | None = None,
) -> Counts:
    """Play a scenario to its end and return what it went through. Raises a `Finding`."""
    with Engine(plan.options, connector, extra, leftovers, load_fault(plan)) as engine:
        play_arrivals(plan, engine)
        engine.check_drained()
        return engine.counts


def load_fault(plan: Scenario) -> LoadFault | None:
    """Return which loads the workers spoil."""
    return _fault(Random(plan.seed), plan.fault_share, plan.options) if plan.fault_share else None


def play_arrivals(plan: Scenario, engine: Engine, steps_max: int | None = None) -> None:
    """Send and abort until the last request was sent and nothing is left to do, or for `steps_max` steps."""
    weight_steps, again_steps = list(plan.weight_steps), WEIGHTS_AGAIN_STEPS
    arrivals = list(plan.arrivals)
    aborts: list[tuple[int | None, Arrival]] = []
    step = 0
    while (arrivals or engine.busy or weight_steps) and (steps_max is None or step < steps_max):
        if weight_steps and weight_steps[0] <= step:
            # A refused attempt has preempted all that ran: the next one comes later each time, for them to get on.
            weight_steps = weight_steps[1:] if engine.change_weights() else [step + again_steps, *weight_steps[1:]]
            again_steps *= 2
        while arrivals and arrivals[0].step <= step:
            arrival = arrivals.pop(0)
            sampling = {} if arrival.reads_cache else {"skip_reading_prefix_cache": True}
            engine.add(arrival.request_id, arrival.prompt, arrival.salt, arrival.max_tokens, **sampling)
            if arrival.abort_after is not None:
                aborts.append((step + arrival.abort_after, arrival))
            elif arrival.abort_while_loading:
                aborts.append((None, arrival))
        for due, arrival in list(aborts):
            if engine.is_loading(arrival.request_id) if due is None else due <= step:
                engine.abort(arrival.request_id, arrival.abort_while_executing)
                aborts.remove((due, arrival))
        step += 1
        # An idle engine sleeps until the next request, as vLLM's does: time passes, and no step is taken.
        if engine.busy:
            engine.move()
        else:
            engine.pass_time()
            if step > plan.options.steps_max:
                raise Stuck(f"nothing moves, and the weights can't be changed in {step} steps")


def _options(random: Random) -> Options:
    block_tokens = random.choice((8, 16, 16))
    return Options(
        block_tokens=block_tokens,
        blocks=random.choice((10, 12, 16, 24, 64)),
        ranks=random.choice((1, 1, 2, 3)),
        layers=random.choice((1, 3)),
        layout=random.choice(("LBHNC", "LBHNC", "LBNHC", "BLHNC")),
        prefix_caching=random.random() < 0.5,
        batch_tokens=random.choice((block_tokens, 40, 64, 256)),
        sequences_max=random.choice((2, 8)),
        asynchronous=random.random() < 0.6,
        workers_lag=random.random() < 0.5,
        separate_processes=random.random() < 0.5,
        runner_v2=random.random() < 0.4,
        tag_users=random.random() < 0.8,
    )


def _arrival(random: Random, step: int, options: Options, prefixes: list[list[int]], earlier: list[Arrival]) -> Arrival:
    max_tokens = min(random.choice((1, 3, options.block_tokens, 3 * options.block_tokens + 1)), OUTPUT_TOKENS_MAX)
    longest = min(options.context_tokens - max_tokens, 8 * options.block_tokens)
    salt, prompt = random.choice(SALTS), _prompt(random, options, prefixes, longest)
    if earlier and random.random() < 0.3:
        salt, prompt = _follow_up(random, options, random.choice(earlier))
    return Arrival(
        step=step,
        request_id=f"r{len(earlier)}",
        prompt=prompt[:longest],
        salt=salt,
        max_tokens=max_tokens,
        reads_cache=random.random() < 0.9,
        abort_after=random.randrange(8) if random.random() < 0.2 else None,
        abort_while_loading=random.random() < 0.1,
        abort_while_executing=random.random() < 0.5,
    )


def _prompt(random: Random, options: Options, prefixes: list[list[int]], longest: int) -> list[int]:
    """Return a shared prefix with an end of its own."""
    block_tokens = options.block_tokens
    length = random.randint(longest // 3 + 1, longest)
    if random.random() < 0.4:
        length = max(block_tokens, length // block_tokens * block_tokens)  # a prompt of whole blocks can hit in full
    shared = random.choice(prefixes)[: max(1, length - random.choice((0, 0, 3, block_tokens)))]
    if random.random() < 0.2:  # the same blocks behind another beginning
        shared[random.randrange(len(shared))] = random.randrange(VOCABULARY)
    return shared + _tokens(random, max(0, length - len(shared)))


def _follow_up(random: Random, options: Options, turn: Arrival) -> tuple[str | None, list[int]]:
    """Return the next turn of a conversation: what was asked, what will have been answered, and something new."""
    sequence = Sequence(turn.prompt, user_tag(options, turn.salt))
    answered = sequence.tokens(len(turn.prompt) + turn.max_tokens)
    return turn.salt, answered + _tokens(random, random.randint(0, 2 * options.block_tokens))


def _tokens(random: Random, count: int) -> list[int]:
    return [random.randrange(VOCABULARY) for _ in range(count)]


def _fault(random: Random, share: float, options: Options) -> LoadFault:
    """Spoil some loads: one block of one rank, and everything behind it is recomputed."""

    def fault(rank: int, request_id: str, block_ids: list[int]) -> set[int]:
        if rank != random.randrange(options.ranks) or random.random() >= share:
            return set()
        return {random.choice(block_ids)}

    return fault
