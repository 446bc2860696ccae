"""Shrinking: a life that found something is made smaller, as long as it still finds the same kind of thing."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from .findings import Finding
from .options import Options
from .saltern_lives import Life, live
from .saltern_world import Weather
from .scenario import Arrival, Scenario

T = TypeVar("T")

ATTEMPTS_MAX = 600


def found(life: Life) -> Finding | None:
    """Return what a life finds."""
    try:
        live(life.seed, life)
    except Finding as finding:
        return finding
    return None


def shrink(life: Life, *, find: Callable[[Life], Finding | None] = found) -> tuple[Life, Finding]:
    """Return a smaller life and its finding, of the same kind as the finding of `life`, which must have one."""
    finding = find(life)
    assert finding is not None, "there is nothing to shrink: this life ends well"
    attempts = 0
    candidates = _smaller(life)
    while attempts < ATTEMPTS_MAX and (candidate := next(candidates, None)) is not None:
        attempts += 1
        other = find(candidate)
        if type(other) is type(finding):
            life, finding, candidates = candidate, other, _smaller(candidate)
    return life, finding


def _smaller(life: Life) -> Iterator[Life]:
    """Yield lives with a little less in them, the largest cuts first."""
    for index in range(len(life.plans) if len(life.plans) > 1 else 0):
        yield replace(life, plans=life.plans[:index] + life.plans[index + 1 :])
    for events in _shorter(life.weather.events):
        yield replace(life, weather=replace(life.weather, events=events))
    for index, plan in enumerate(life.plans):
        for smaller in _smaller_plans(plan):
            yield replace(life, plans=(*life.plans[:index], smaller, *life.plans[index + 1 :]))
    plain = Weather()
    for name in ("load_fault_share", "store_fault_share", "copy_steps_max", "lifeline_steps_max", "reply_steps_max"):
        if getattr(life.weather, name) != getattr(plain, name):
            yield replace(life, weather=replace(life.weather, **{name: getattr(plain, name)}))
    for name, value in (("slots", 1), ("store", "prompt"), ("user_limit_blocks", None), ("cache_blocks", 200)):
        if getattr(life, name) != value:
            yield replace(life, **{name: value})


def _smaller_plans(plan: Scenario) -> Iterator[Scenario]:
    for arrivals in _shorter(tuple(plan.arrivals)):
        yield replace(plan, arrivals=list(arrivals))
    for weight_steps in _shorter(plan.weight_steps):
        yield replace(plan, weight_steps=weight_steps)
    for reset_steps in _shorter(plan.reset_steps):
        yield replace(plan, reset_steps=reset_steps)
    if plan.fault_share:
        yield replace(plan, fault_share=0.0)
    for name, value in msgspec.structs.asdict(Options(tag_users=True)).items():
        if name not in ("blocks", "steps_max") and getattr(plan.options, name) != value:
            options = replace(plan.options, **{name: value})
            # Shorter blocks make a shorter context, and what doesn't fit into it is no life.
            if all(len(arrival.prompt) + arrival.max_tokens <= options.context_tokens for arrival in plan.arrivals):
                yield replace(plan, options=options)
    for index, arrival in enumerate(plan.arrivals):
        for smaller in _smaller_arrivals(arrival):
            yield replace(plan, arrivals=[*plan.arrivals[:index], smaller, *plan.arrivals[index + 1 :]])


def _smaller_arrivals(arrival: Arrival) -> Iterator[Arrival]:
    plain: dict[str, object] = {"sampling": {}, "turns": (), "abort_after": None, "abort_while_loading": False}
    for name, value in {**plain, "priority": 0, "max_tokens": 1}.items():
        if getattr(arrival, name) != value:
            yield replace(arrival, **{name: value})
    if len(arrival.prompt) > 1:
        yield replace(arrival, prompt=arrival.prompt[: len(arrival.prompt) // 2])


def _shorter(items: tuple[T, ...]) -> Iterator[tuple[T, ...]]:
    """Yield a list without its halves, its quarters, and so on down to single items."""
    size = len(items)
    while size > 1 or (size and len(items) == 1):
        size = max(1, size // 2) if len(items) > 1 else 1
        for start in range(0, len(items), size):
            yield items[:start] + items[start + size :]
        if size == 1:
            return
