"""Rounds: everything that is compared runs once in each, so that what else the machine does hits all alike."""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TypeVar

__all__ = ["interleaved", "median", "quantile", "seconds_of"]

_T = TypeVar("_T")


def interleaved(measures: Mapping[str, Callable[[], _T]], rounds: int) -> dict[str, list[_T]]:
    """Return what each of `measures` returned in each round; every round begins with another one of them."""
    names = list(measures)
    results: dict[str, list[_T]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            results[name].append(measures[name]())
    return results


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that `share` of the values don't exceed."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
