"""What holds for handing a trace's requests to tenants."""

from collections import Counter

from saltern.replay.traces import Trace
from saltern.replay.workload import FLOOD, make_workload


def test_a_user_has_one_tenant_in_every_run(trace: Trace) -> None:
    tenants_by_user: dict[str, set[str]] = {}
    workload = make_workload(trace, tenants=8)
    for request, ask in zip(trace.requests, workload.asks, strict=True):
        tenants_by_user.setdefault(request.user, set()).add(ask.tenant)
    assert all(len(tenants) == 1 for tenants in tenants_by_user.values())
    assert make_workload(trace, tenants=8) == workload


def test_skewed_tenants_have_fewer_users_the_later_they_come(trace: Trace) -> None:
    users = Trace("many", tuple(trace.requests[0]._replace(user=str(number)) for number in range(7000)), 1, None)
    even = Counter(ask.tenant for ask in make_workload(users, tenants=3).asks)
    skewed = Counter(ask.tenant for ask in make_workload(users, tenants=3, skew=2.0).asks)
    for number in (1, 2, 3):
        assert abs(even[f"t{number}"] / 7000 - 1 / 3) < 0.03
        assert abs(skewed[f"t{number}"] / 7000 - 1 / number**2 / (1 + 1 / 4 + 1 / 9)) < 0.03


def test_users_share_within_their_tenant_unless_salted(trace: Trace) -> None:
    people = {request.user for request in trace.requests}
    assert len({ask.user for ask in make_workload(trace, tenants=4).asks}) == 4
    assert len({ask.user for ask in make_workload(trace, tenants=4, salted=True).asks}) == len(people)


def test_a_flood_follows_every_request_and_asks_for_nothing_twice(trace: Trace) -> None:
    workload = make_workload(trace, flood=2.0)
    theirs, flood = workload.asks[::2], workload.asks[1::2]
    assert {ask.tenant for ask in flood} == {FLOOD}
    assert [len(ask.keys) for ask in flood] == [2 * len(ask.keys) for ask in theirs]
    keys = [key for ask in flood for key in ask.keys]
    assert len(set(keys)) == len(keys)
    assert not {key for ask in theirs for key in ask.keys} & set(keys)


def test_each_prefix_that_requests_begin_with_is_published_once(trace: Trace) -> None:
    prompt = trace.requests[0].blocks[:2]
    assert {request.blocks[:2] for request in trace.requests} == {prompt}
    short, other = trace.requests[0]._replace(blocks=prompt[:1]), trace.requests[0]._replace(blocks=(7, 8, 9))
    workload = make_workload(trace._replace(requests=(*trace.requests, short, other)), published=2, flood=1.0)
    whole = workload.asks[0].keys[:2]
    assert workload.published == (whole, whole[:1], workload.asks[-2].keys[:2])
    assert workload.published_blocks == 4
    assert make_workload(trace).published == ()
