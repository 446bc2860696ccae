"""What holds for layers: every value has one origin, and what can't hold is named."""

import pytest

from saltern.core.cache import Cache
from saltern.core.effects import TenantRemoved, TenantSet
from saltern.core.tenants import Limits
from saltern.operations import Bound, Origin, PlanSettings, TenantSettings
from saltern.server.operations import why_not
from saltern.server.tenancy import FILE, NOBODY, RUN_TIME, Layers

PAGE = 65_536


def test_each_value_comes_from_the_first_layer_that_has_it() -> None:
    layers = Layers(
        {"acme": TenantSettings(plan="gold", limit=30, weight=3.0)},
        {"gold": PlanSettings(guarantee=1, limit=10, ttl=5.0, user_limit=7, disk_limit=20)},
        {"acme": TenantSettings(user_limit=None, weight=4.0, disk_user_limit=9)},
        {"gold": PlanSettings(guarantee=2)},
    )
    gold = Origin("plan gold")
    bounds = {field: layers.bound("acme", field) for field in TenantSettings.__struct_fields__}
    assert bounds == {
        "guarantee": Bound(2, gold),
        "limit": Bound(30, FILE),
        "user_limit": Bound(None, RUN_TIME),
        "disk_guarantee": Bound(0, NOBODY),
        "disk_limit": Bound(20, gold),
        "disk_user_limit": Bound(9, RUN_TIME),
        "ttl": Bound(5.0, gold),
        "weight": Bound(4.0, RUN_TIME),
        "plan": Bound("gold", FILE),
    }
    assert layers.limits("acme") == Limits(guarantee_bytes=2, limit_bytes=30, ttl_seconds=5.0, weight=4.0)
    assert layers.disk_limits("acme") == Limits(limit_bytes=20, user_limit_bytes=9, ttl_seconds=5.0, weight=4.0)
    assert layers.plan_bound("gold", "guarantee") == Bound(2, RUN_TIME)
    assert layers.plan_bound("gold", "limit") == Bound(10, FILE)
    assert layers.plan_state("gold").tenants == ("acme",)


def test_of_whom_nobody_has_spoken_nothing_holds() -> None:
    layers = Layers({}, {})
    assert layers.limits("acme") == Limits()
    assert layers.bound("acme", "limit") == Bound(None, NOBODY)


def test_a_plan_may_be_taken_off_at_run_time() -> None:
    layers = Layers(
        {"acme": TenantSettings(plan="gold")}, {"gold": PlanSettings(limit=9)}, {"acme": TenantSettings(plan=None)}
    )
    assert layers.limits("acme") == Limits()
    assert layers.plan_state("gold").tenants == ()


def test_the_core_is_told_what_changed_and_of_lowered_guarantees_first() -> None:
    old = Layers(
        {}, {}, {name: TenantSettings(guarantee=size) for name, size in (("a", 1), ("b", 5), ("c", 3), ("d", 1))}
    )
    new = Layers({}, {}, {name: TenantSettings(guarantee=size) for name, size in (("a", 4), ("b", 2), ("c", 3))})
    assert old.changes_to(new) == [
        TenantRemoved("d"),
        TenantSet("b", Limits(guarantee_bytes=2)),
        TenantSet("a", Limits(guarantee_bytes=4)),
    ]
    assert not old.changes_to(old)


def test_a_guarantee_that_moves_from_one_tier_to_the_other_never_counts_in_both() -> None:
    old = Layers({}, {}, {"a": TenantSettings(guarantee=5), "b": TenantSettings(disk_guarantee=7)})
    new = Layers({}, {}, {"a": TenantSettings(disk_guarantee=7), "b": TenantSettings(guarantee=5)})
    none, ram, disk = Limits(), Limits(guarantee_bytes=5), Limits(guarantee_bytes=7)
    assert old.changes_to(new) == [
        TenantSet("a", none, none),
        TenantSet("b", none, none),
        TenantSet("a", none, disk),
        TenantSet("b", ram, none),
    ]


def test_a_change_of_a_plan_reaches_each_tenant_that_has_it() -> None:
    tenants = {"a": TenantSettings(plan="gold"), "b": TenantSettings(plan="gold", limit=1), "c": TenantSettings()}
    old = Layers(tenants, {"gold": PlanSettings(limit=5)})
    new = Layers(tenants, {"gold": PlanSettings(limit=6)})
    assert old.changes_to(new) == [TenantSet("a", Limits(limit_bytes=6))]


@pytest.mark.parametrize(
    ("tenants", "complaint"),
    [
        ({"a": TenantSettings(plan="tin")}, "tenants.a.plan: nobody has defined the plan tin; there is none"),
        ({"a": TenantSettings(limit=5)}, "tenants.a.limit: 5 B is less than one page of the arena"),
        ({"a": TenantSettings(disk_limit=5)}, "tenants.a.disk_limit: 5 B is less than one page of the disk tier"),
        ({"a": TenantSettings(guarantee=2 * PAGE, limit=PAGE)}, "tenant a: guarantee"),
        ({"public": TenantSettings(limit=9 * PAGE)}, "tenants.public.limit (file): what is published has the room"),
        ({"public": TenantSettings(user_limit=9 * PAGE)}, "tenants.public.user_limit (file): "),
        ({"public": TenantSettings(ttl=5.0)}, "tenants.public.ttl (file): "),
        ({"public": TenantSettings(weight=2.0)}, "tenants.public.weight (file): "),
        (
            {"a": TenantSettings(guarantee=6 * PAGE), "b": TenantSettings(guarantee=9 * PAGE), "c": TenantSettings()},
            "(guaranteed: b 576 KiB, a 384 KiB)",
        ),
    ],
)  # fmt: skip
def test_what_can_not_hold_is_named(tenants: dict[str, TenantSettings], complaint: str) -> None:
    reason = why_not(Cache(pages=16, page_bytes=PAGE), Layers(tenants, {}))
    assert reason is not None
    assert complaint in reason
    assert ("guaranteed:" in reason) == ("guaranteed:" in complaint)


def test_the_public_tenant_has_a_guarantee_and_settings_of_the_disk() -> None:
    public = TenantSettings(guarantee=PAGE, limit=None, disk_guarantee=PAGE, disk_limit=PAGE, disk_user_limit=PAGE)
    cache = Cache(pages=16, page_bytes=PAGE)
    assert why_not(cache, Layers({"public": public}, {})) is None
    planned = Layers({"public": TenantSettings(plan="gold")}, {"gold": PlanSettings(ttl=5.0)})
    assert "tenants.public.ttl (plan gold)" in str(why_not(cache, planned))


def test_the_default_tenant_is_there_though_nobody_has_spoken_of_it() -> None:
    assert Layers({}, {}, {"acme": TenantSettings()}).tenant_names == ["acme", "default"]


def test_all_but_the_share_in_flight_may_be_guaranteed() -> None:
    cache = Cache(pages=16, page_bytes=PAGE)
    assert why_not(cache, Layers({"a": TenantSettings(guarantee=14 * PAGE)}, {})) is None
    reason = why_not(cache, Layers({"a": TenantSettings(guarantee=15 * PAGE)}, {}))
    assert reason is not None
    assert f"{15 * PAGE} bytes" in reason
