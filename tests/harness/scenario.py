"""A scenario: one random life of an engine under one seed, and what came of it."""

from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
from msgspec.structs import replace
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from .architectures import ARCHITECTURES
from .engine import Counts, Engine, LoadFault, user_tag
from .findings import Stuck
from .hostile import hostile_values
from .model import Sequence
from .options import VOCABULARY, Options

SALTS = (None, "alice", "alice", "bob")  # somebody comes more often, so that there is something to hit
PREFIXES = 2
WEIGHTS_AGAIN_STEPS = 10
OUTPUT_TOKENS_MAX = 49  # each costs a step
SESSIONS_MAX = 2
SESSION_POOL_BLOCKS = 64  # a session that waits for a client keeps its blocks, and a few fill a small pool for ever
SESSION_PARTS = 3
SESSION_OUTPUT_TOKENS = 3


class Turn(msgspec.Struct, frozen=True):
    """What a session's client sends some steps after the session began; an empty prompt is its end."""

    after: int
    prompt: list[int]
    max_tokens: int = 1


class Arrival(msgspec.Struct, frozen=True):
    """A request, sent before the step of this number.

    It is aborted `abort_after` steps later (None is never), or else, with `abort_while_loading`, as soon as it waits
    for a load; either between two steps or, with `abort_while_executing`, during one. With `turns` it is a session.
    """

    step: int
    request_id: str
    prompt: list[int]
    salt: str | None
    max_tokens: int
    priority: int = 0
    sampling: dict[str, Any] = {}  # further parameters, as vLLM's `SamplingParams` has them
    turns: tuple[Turn, ...] = ()
    abort_after: int | None = None
    abort_while_loading: bool = False
    abort_while_executing: bool = False


class Scenario(msgspec.Struct, frozen=True):
    """What happens under one seed. `fault_share` is the share of loads that the workers spoil and report bad.

    The weights change at each of `weight_steps`, or as soon after it as vLLM allows. The prefix cache is emptied at
    each of `reset_steps`, the connector's too where the second item says so. `knobs` are numbers in [0, 1)
    for the connector under test, so that its own delays and faults follow from the seed.
    """

    seed: int
    options: Options
    arrivals: list[Arrival]
    fault_share: float
    knobs: list[float]
    weight_steps: tuple[int, ...] = ()
    reset_steps: tuple[tuple[int, bool], ...] = ()


def scenario(seed: int, models: tuple[str, ...] = ("full attention",)) -> Scenario:
    """Make the scenario of a seed, with one of these models."""
    random = Random(seed)
    options = _of_model(_options(random), seed, models)
    prefixes = [_tokens(random, options.context_tokens) for _ in range(PREFIXES)]
    steps_max = random.choice((5, 40, 80, 80))
    arrivals: list[Arrival] = []
    for step in sorted(random.randrange(steps_max) for _ in range(random.randint(6, 20))):
        arrivals.append(_arrival(random, step, options, prefixes, arrivals))
    return Scenario(
        seed=seed,
        options=options,
        arrivals=arrivals,
        fault_share=random.choice((0.0, 0.0, 0.3)),
        knobs=[random.random() for _ in range(8)],
        reset_steps=tuple(
            sorted((random.randrange(60), random.random() < 0.3) for _ in range(random.choice((0, 0, 0, 1, 3))))
        ),
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
    arrivals, resets = list(plan.arrivals), list(plan.reset_steps)
    turns = [(arrival.step + turn.after, arrival.request_id, turn) for arrival in arrivals for turn in arrival.turns]
    turns.sort(key=lambda due: due[0])
    aborts: list[tuple[int | None, Arrival]] = []
    step = 0
    while (arrivals or turns or engine.busy or weight_steps) and (steps_max is None or step < steps_max):
        if weight_steps and weight_steps[0] <= step:
            # A refused attempt has preempted all that ran: the next one comes later each time, for them to get on.
            weight_steps = weight_steps[1:] if engine.change_weights() else [step + again_steps, *weight_steps[1:]]
            again_steps *= 2
        while arrivals and arrivals[0].step <= step:
            arrival = arrivals.pop(0)
            engine.add(
                arrival.request_id,
                arrival.prompt,
                arrival.salt,
                arrival.max_tokens,
                arrival.priority,
                is_session=bool(arrival.turns),
                **arrival.sampling,
            )
            if arrival.abort_after is not None:
                aborts.append((step + arrival.abort_after, arrival))
            elif arrival.abort_while_loading:
                aborts.append((None, arrival))
        for due, arrival in list(aborts):
            if engine.is_loading(arrival.request_id) if due is None else due <= step:
                engine.abort(arrival.request_id, arrival.abort_while_executing)
                aborts.remove((due, arrival))
        while turns and turns[0][0] <= step:
            _, request_id, turn = turns.pop(0)
            engine.go_on(request_id, turn.prompt, turn.max_tokens)
        while resets and resets[0][0] <= step:
            engine.reset_prefix_cache(with_connector=resets.pop(0)[1])
        step += 1
        # An idle engine sleeps until the next request, as vLLM's does: time passes, and no step is taken.
        if engine.busy:
            engine.move()
        else:
            engine.rest()
            if step > plan.options.steps_max:
                raise Stuck(f"nothing moves, and the weights can't be changed in {step} steps")


def _options(random: Random) -> Options:
    block_tokens = random.choice((8, 16, 16, 128))
    return Options(
        block_tokens=block_tokens,
        blocks=random.choice((10, 12, 16, 24, 64, 64)),
        ranks=random.choice((1, 1, 2, 3)),
        layers=random.choice((1, 3)),
        layout=random.choice(("LBHNC", "LBHNC", "LBNHC", "BLHNC")),
        prefix_caching=random.random() < 0.4,
        batch_tokens=random.choice((block_tokens, 40, 64, 256)),
        sequences_max=random.choice((2, 8)),
        policy=random.choice(("fcfs", "fcfs", "priority")),
        speculated_tokens=random.choice((0, 0, 1, 3)),
        asynchronous=random.random() < 0.6,
        workers_lag=random.random() < 0.5,
        separate_processes=random.random() < 0.5,
        runner_v2=random.random() < 0.4,
        tag_users=random.random() < 0.8,
    )


def _of_model(options: Options, seed: int, models: tuple[str, ...]) -> Options:
    """Give an engine a model, and room for as many blocks as before in each of its groups."""
    random = Random(f"model {seed}")
    model = random.choice(models)
    architecture = ARCHITECTURES[model]
    return replace(
        options,
        model=model,
        window_tokens=random.choice((1, options.block_tokens // 2 + 1, 2 * options.block_tokens + 5)),
        blocks=architecture.groups * options.blocks,
        prefix_caching=options.prefix_caching or architecture.has_states,
        speculated_tokens=0 if architecture.has_states else options.speculated_tokens,
    )


def _arrival(random: Random, step: int, options: Options, prefixes: list[list[int]], earlier: list[Arrival]) -> Arrival:
    max_tokens = min(random.choice((1, 3, options.block_tokens, 3 * options.block_tokens + 1)), OUTPUT_TOKENS_MAX)
    longest = min(options.context_tokens - max_tokens, 8 * options.block_tokens)
    salt, prompt = random.choice(SALTS), _prompt(random, options, prefixes, longest)
    if earlier and random.random() < 0.3:
        salt, prompt = _follow_up(random, options, random.choice(earlier))
    sampling, turns = _sampling(random), tuple[Turn, ...]()
    may_talk = options.blocks >= SESSION_POOL_BLOCKS and sum(bool(other.turns) for other in earlier) < SESSIONS_MAX
    if may_talk and random.random() < 0.2:
        # vLLM 0.32 counts drafted tokens behind a session's last one as computed: with a draft, a turn has one token.
        max_tokens = 1 if options.speculated_tokens else SESSION_OUTPUT_TOKENS
        prompt, turns = _session(random, prompt[: longest - SESSION_PARTS * max_tokens], max_tokens)
    if random.random() < 0.08:
        hostile_salt, parameters, token = hostile_values(random)
        salt = hostile_salt or salt
        prompt = prompt if token is None else [token, *prompt[1:]]
        sampling = sampling if parameters is None else sampling | {"extra_args": {"kv_transfer_params": parameters}}
    return Arrival(
        step=step,
        request_id=f"r{len(earlier)}",
        prompt=prompt[:longest],
        salt=salt,
        max_tokens=max_tokens,
        priority=random.randrange(3),
        sampling=sampling,
        turns=turns,
        abort_after=random.randrange(8) if random.random() < 0.2 else None,
        abort_while_loading=random.random() < 0.1,
        abort_while_executing=random.random() < 0.5,
    )


def _sampling(random: Random) -> dict[str, Any]:
    """Return what a few requests ask for beside tokens, and what keeps them from being cached."""
    return random.choice(({},) * 17 + ({"skip_reading_prefix_cache": True},) * 2 + ({"prompt_logprobs": 1},))


def _session(random: Random, prompt: list[int], max_tokens: int) -> tuple[list[int], tuple[Turn, ...]]:
    """Cut a prompt into what a session begins with and what is added to it while it answers or waits."""
    size = -(-len(prompt) // SESSION_PARTS)
    parts = [prompt[start : start + size] for start in range(0, len(prompt), size)]
    after = sorted(random.randrange(40) for _ in parts)
    turns = [Turn(steps, part, max_tokens) for steps, part in zip(after, parts[1:], strict=False)]
    return parts[0], (*turns, Turn(after[-1], []))


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
