"""A study: one workload played in many settings, and what every tenant got out of each."""

from collections import defaultdict
from collections.abc import Sequence
from operator import lt

from msgspec import Struct

from saltern.core.tenants import NO_LIMITS, Limits
from saltern.replay.player import Played, Policy, Setting, limits_of, play
from saltern.replay.private import PrivateCache
from saltern.replay.workload import FLOOD, Ask, Workload

BLOCK = 1
"""The largest block, in blocks: all of a trace's are alike."""


class Share(Struct, frozen=True, rename="kebab"):
    """What one tenant got: of its `asked_blocks`, `hit_blocks` were there, each with all blocks before it.

    `guarantee_blocks` is what it was promised, or would have been by a policy that promises. `private_hit_blocks` were
    there in the private cache behind that, of `private_blocks`, and `requests_below` requests found fewer than in it;
    all three are None where a guarantee is too small to be worth a hit.
    """

    tenant: str
    requests: int
    asked_blocks: int
    hit_blocks: int
    longest_blocks: int  # of one request
    requests_cut: int  # stored in part, since the tenant may not have all of them in flight
    guarantee_blocks: int
    private_blocks: int | None = None
    private_hit_blocks: int | None = None
    requests_below: int | None = None

    @property
    def hit_rate(self) -> float:
        """Return the part of the blocks asked for that were there."""
        return self.hit_blocks / max(self.asked_blocks, 1)


class Point(Struct, frozen=True, rename="kebab"):
    """What came out of one setting: the trace's tenants in order, the flooding one last."""

    policy: str
    capacity_blocks: int
    quota: float
    shares: tuple[Share, ...]

    @property
    def hit_rate(self) -> float:
        """Return the hit rate of the trace's requests; those of a flood never hit, whatever one buys."""
        served = self.of_the_trace
        return sum(share.hit_blocks for share in served) / max(sum(share.asked_blocks for share in served), 1)

    @property
    def of_the_trace(self) -> tuple[Share, ...]:
        """Return the shares of all but the flooding tenant."""
        return tuple(share for share in self.shares if share.tenant != FLOOD)


class Study(Struct, frozen=True, rename="kebab"):
    """A trace, how its requests became a workload, and all points."""

    trace: str
    requests: int
    asked_blocks: int
    distinct_blocks: int
    user: str  # the column that stood for it; empty: all requests were one user's
    tenants: int
    skew: float
    salted: bool
    published_blocks: int
    flood: float
    points: tuple[Point, ...]


def settings(policies: Sequence[Policy], capacities: Sequence[int], quotas: Sequence[float]) -> list[Setting]:
    """Return every combination; without tenants a quota means nothing, and one is tried."""
    return [
        Setting(policy, capacity, quota)
        for capacity in capacities
        for policy in policies
        for quota in ([max(quotas)] if policy is Policy.LRU else quotas)
    ]


def measure(workload: Workload, setting: Setting) -> Point:
    """Play a workload in one setting, and each tenant's part of it in the private cache behind its guarantee."""
    played = play(workload, setting)
    asks_by_tenant: defaultdict[str, list[Ask]] = defaultdict(list)
    played_by_tenant: defaultdict[str, list[Played]] = defaultdict(list)
    for ask, outcome in zip(workload.asks, played, strict=True):
        asks_by_tenant[ask.tenant].append(ask)
        played_by_tenant[ask.tenant].append(outcome)
    promised = limits_of(workload, setting._replace(policy=Policy.GUARANTEED))
    names = (*workload.tenants, FLOOD) if workload.flooded else workload.tenants
    return Point(
        policy=setting.policy.value,
        capacity_blocks=setting.capacity_blocks,
        quota=setting.quota,
        shares=tuple(
            _share(workload, name, asks_by_tenant[name], played_by_tenant[name], promised.get(name, NO_LIMITS))
            for name in names
        ),
    )


def _share(workload: Workload, name: str, asks: list[Ask], played: list[Played], limits: Limits) -> Share:
    longest_blocks = max((len(ask.keys) for ask in asks), default=0)
    # A tenant has one request at a time here, so that all it has between Acquire and Commit is its longest.
    private_blocks = limits.guarantee_bytes - longest_blocks - BLOCK
    hits = [outcome.found for outcome in played]
    private_hits = _alone(workload, asks, played, private_blocks) if private_blocks >= BLOCK else None
    return Share(
        tenant=name,
        requests=len(asks),
        asked_blocks=sum(len(ask.keys) for ask in asks),
        hit_blocks=sum(hits),
        requests_cut=sum(outcome.allowed < len(ask.keys) for ask, outcome in zip(asks, played, strict=True)),
        longest_blocks=longest_blocks,
        guarantee_blocks=limits.guarantee_bytes,
        private_blocks=private_blocks if private_hits else None,
        private_hit_blocks=sum(private_hits) if private_hits else None,
        requests_below=sum(map(lt, hits, private_hits)) if private_hits else None,
    )


def _alone(workload: Workload, asks: list[Ask], played: list[Played], blocks: int) -> list[int]:
    """Return what each request finds in a private cache of so many blocks, told to keep what the real one was."""
    cache = PrivateCache(blocks)
    hits: list[int] = []
    for now, (ask, outcome) in enumerate(zip(asks, played, strict=True)):
        own = ask.keys[workload.public_blocks :]
        public = len(ask.keys) - len(own)
        hits.append(public + cache.acquire(ask.user, own, now))
        cache.store(ask.user, [(key, BLOCK) for key in ask.keys[public : outcome.allowed]], at=now, now=now)
    return hits
