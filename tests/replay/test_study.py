"""What holds for a study: a guarantee is worth its private cache, whatever others do, and other policies are not."""

import pytest

from saltern.replay.player import Policy, Setting, play
from saltern.replay.study import measure, settings
from saltern.replay.traces import Trace
from saltern.replay.workload import FLOOD, make_workload


@pytest.mark.parametrize("flood", [0.0, 1.0, 5.0])
@pytest.mark.parametrize(("quota", "published"), [(0.5, 0), (1.0, 0), (1.0, 2)])
def test_no_request_finds_less_than_in_the_private_cache_of_its_tenants_guarantee(
    trace: Trace, flood: float, quota: float, published: int
) -> None:
    workload = make_workload(trace, tenants=3, skew=1.0, flood=flood, published=published)
    point = measure(workload, Setting(Policy.GUARANTEED, 800, quota))
    assert [share.tenant for share in point.shares] == ["t1", "t2", "t3", *([FLOOD] if flood else [])]
    for share in point.of_the_trace:
        assert share.private_blocks == share.guarantee_blocks - share.longest_blocks - 1
        assert share.private_hit_blocks is not None
        assert 0 < share.private_hit_blocks <= share.hit_blocks
        assert share.requests_below == 0


def test_the_private_cache_cuts_what_the_real_one_cuts(trace: Trace) -> None:
    """Told to keep whole prompts, it would find some that nobody was allowed to store."""
    workload = make_workload(trace, tenants=3, flood=1.0)
    for share in measure(workload, Setting(Policy.GUARANTEED, 300)).of_the_trace:
        assert share.requests_cut > 10
        assert share.private_hit_blocks
        assert share.requests_below == 0


def test_without_guarantees_a_flood_takes_what_a_private_cache_would_have_held(trace: Trace) -> None:
    workload = make_workload(trace, tenants=3, skew=1.0, flood=5.0)
    for share in measure(workload, Setting(Policy.LRU, 800)).of_the_trace:
        assert share.private_hit_blocks is not None
        assert share.hit_blocks < share.private_hit_blocks / 2
        assert share.requests_below is not None
        assert share.requests_below > share.requests / 10


def test_what_is_not_promised_may_be_borrowed(trace: Trace) -> None:
    """Two of three tenants are silent: the third has the whole cache, where a static share keeps it to a sixth."""
    everybody = make_workload(trace, tenants=3)
    alone_there = everybody._replace(asks=tuple(ask for ask in everybody.asks if ask.tenant == "t1"))
    borrowed, kept, free = (
        [played.found for played in play(alone_there, Setting(policy, 300, 0.5))]
        for policy in (Policy.GUARANTEED, Policy.STATIC, Policy.LRU)
    )
    assert borrowed == free
    assert sum(kept) < 0.8 * sum(borrowed)


def test_a_guarantee_smaller_than_a_request_promises_no_hits(trace: Trace) -> None:
    point = measure(make_workload(trace, tenants=8), Setting(Policy.GUARANTEED, 100))
    assert all(share.private_blocks is share.requests_below is None for share in point.shares)


def test_a_policy_without_tenants_is_tried_with_one_quota_only() -> None:
    assert settings([Policy.LRU, Policy.STATIC], [10, 20], [0.5, 1.0]) == [
        Setting(policy, capacity, quota)
        for capacity in (10, 20)
        for policy, quota in ((Policy.LRU, 1.0), (Policy.STATIC, 0.5), (Policy.STATIC, 1.0))
    ]
