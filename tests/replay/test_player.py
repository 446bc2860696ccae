"""What holds for playing a workload on the core."""

from collections.abc import Sequence

import pytest

from saltern.core.keys import Key
from saltern.replay import player
from saltern.replay.player import Policy, Setting, limits_of
from saltern.replay.traces import Trace
from saltern.replay.workload import FLOOD, Ask, Workload, make_workload

LARGE = 100_000  # blocks, more than all that are asked for


def play(workload: Workload, setting: Setting) -> list[int]:
    """Return how many blocks each request found."""
    return [played.found for played in player.play(workload, setting)]


def hits_of(workload: Workload, hits: list[int], tenant: str) -> list[int]:
    return [hit for ask, hit in zip(workload.asks, hits, strict=True) if ask.tenant == tenant]


def least_recently_used(asks: Sequence[Ask], blocks: int) -> list[int]:
    """Return what each request of one user finds, by a model that looks at every block for every decision."""
    used_by_key: dict[Key, tuple[int, int]] = {}  # (request, -depth)
    parent_by_key: dict[Key, Key | None] = {}
    hits: list[int] = []
    for request, ask in enumerate(asks):
        found = next((depth for depth, key in enumerate(ask.keys) if key not in used_by_key), len(ask.keys))
        hits.append(found)
        for depth, key in enumerate(ask.keys):
            if depth >= found and len(used_by_key) >= blocks:
                leaves = used_by_key.keys() - set(parent_by_key.values())
                # What this request has touched itself is no older than what it wants to store.
                victims = [leaf for leaf in leaves if used_by_key[leaf][0] < request]
                if not victims:
                    break
                victim = min(victims, key=used_by_key.__getitem__)
                del used_by_key[victim], parent_by_key[victim]
            used_by_key[key] = (request, -depth)
            parent_by_key[key] = ask.keys[depth - 1] if depth else None
    return hits


@pytest.mark.parametrize("blocks", [5, 40, 200, 700])
def test_one_tenant_has_a_cache_that_forgets_the_least_recently_used(trace: Trace, blocks: int) -> None:
    workload = make_workload(trace)
    hits = play(workload, Setting(Policy.LRU, blocks))
    assert hits == least_recently_used(workload.asks, blocks)
    assert 0 < sum(hits) < sum(play(workload, Setting(Policy.LRU, LARGE)))


def test_with_room_for_all_nothing_but_the_first_time_is_missed(trace: Trace) -> None:
    workload = make_workload(trace, tenants=3, flood=1.0)
    for policy in Policy:
        hits = play(workload, Setting(policy, LARGE))
        seen: set[tuple[str, Key]] = set()
        for ask, hit in zip(workload.asks, hits, strict=True):
            assert hit == sum((ask.tenant, key) in seen for key in ask.keys)
            seen |= {(ask.tenant, key) for key in ask.keys}


def test_a_flood_takes_all_of_a_cache_without_tenants_and_nothing_of_a_static_share(trace: Trace) -> None:
    calm, flooded = make_workload(trace, tenants=2), make_workload(trace, tenants=2, flood=4.0)
    for policy, suffers in ((Policy.LRU, True), (Policy.STATIC, False)):
        setting = Setting(policy, 300, quota=0.9)
        before, after = play(calm, setting), play(flooded, setting)
        for tenant in calm.tenants:
            hits = sum(hits_of(calm, before, tenant))
            if suffers:
                assert sum(hits_of(flooded, after, tenant)) < hits / 2
            else:
                assert hits_of(flooded, after, tenant) == hits_of(calm, before, tenant)


def test_a_static_share_is_a_cache_of_its_own(trace: Trace) -> None:
    workload = make_workload(trace, tenants=3, flood=1.0)
    setting = Setting(Policy.STATIC, 301, quota=0.5)
    hits = play(workload, setting)
    assert limits_of(workload, setting)[FLOOD].limit_bytes == 301 - 3 * 50
    for tenant in workload.tenants:
        asks = [ask for ask in workload.asks if ask.tenant == tenant]
        assert hits_of(workload, hits, tenant) == least_recently_used(asks, 50)


@pytest.mark.parametrize("salted", [True, False])
def test_a_published_prefix_is_hit_by_everybody_from_the_first_request_on(trace: Trace, salted: bool) -> None:
    workload = make_workload(trace, tenants=2, salted=salted, published=2)
    for policy in Policy:
        hits = play(workload, Setting(policy, 300))
        assert min(hits) >= 2
        assert max(hits) > 2


def test_what_is_published_takes_its_room_once_and_only_that(trace: Trace) -> None:
    """The shared prompt takes two blocks from a cache of `blocks`, and none from what users have behind it."""
    behind = tuple(request._replace(blocks=request.blocks[2:]) for request in trace.requests)
    for blocks in (50, 200, 700):
        hits = play(make_workload(trace, salted=True, published=2), Setting(Policy.LRU, blocks))
        alone = play(make_workload(trace._replace(requests=behind), salted=True), Setting(Policy.LRU, blocks - 2))
        assert hits == [2 + hit for hit in alone]


def test_more_cannot_be_published_than_can_be_promised(trace: Trace) -> None:
    workload = make_workload(trace, salted=True, published=3)
    with pytest.raises(ValueError, match="the guarantees add up"):
        play(workload, Setting(Policy.LRU, workload.published_blocks))


def test_publishing_brings_back_what_salting_costs(trace: Trace) -> None:
    for blocks in (50, 200, 700):
        setting = Setting(Policy.LRU, blocks)
        unsalted = sum(play(make_workload(trace), setting))
        salted = sum(play(make_workload(trace, salted=True), setting))
        published = sum(play(make_workload(trace, salted=True, published=2), setting))
        assert salted < 0.98 * unsalted
        assert published >= 0.99 * unsalted


def test_a_prompt_longer_than_what_may_be_in_flight_is_cut(trace: Trace) -> None:
    workload = make_workload(trace, tenants=3)
    longest = max(len(ask.keys) for ask in workload.asks)
    for setting, cuts in ((Setting(Policy.GUARANTEED, 100), True), (Setting(Policy.LRU, 100), False)):
        played = player.play(workload, setting)
        assert any(outcome.allowed < len(ask.keys) for ask, outcome in zip(workload.asks, played, strict=True)) is cuts
        assert max(outcome.found for outcome in played) <= max(outcome.allowed for outcome in played) <= longest
