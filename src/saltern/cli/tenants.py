"""`saltern tenants`, `plans`, `rotate-signing` and `rotate-key`: see and change what holds while the server runs.

Each asks the server's admin socket. With `--offline` tenants and plans are changed in the file of a server that is
down, unchecked: the next start checks.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from saltern.cli.asking import AskedWronglyError, operate
from saltern.cli.output import table
from saltern.paths import default_admin_socket_path
from saltern.sizes import format_duration, format_size, parse_duration, parse_size

if TYPE_CHECKING:
    from saltern.cli.output import Commands
    from saltern.operations import Answer, Bound, Operation, PlanState, TenantsListed

NONE, INHERIT = "none", "inherit"


def add_commands(commands: "Commands") -> None:
    """Add the commands' parsers."""
    for name, wording in (("tenants", "what tenants may hold"), ("quota", "the same by another name")):
        tenants = commands.add_parser(name, help=f"list, get, set, remove: {wording}")
        verbs = tenants.add_subparsers(dest="verb", required=True, metavar="VERB")
        _add(verbs, "list", _list_tenants, "show every tenant, and where each value comes from")
        _add(verbs, "get", _get_tenant, "show one tenant").add_argument("name")
        setting = _add(verbs, "set", _set_tenant, "change a tenant, at once and durably")
        _add_settings(setting)
        setting.add_argument("--plan", metavar="NAME", help="a plan; 'none' for no plan")
        _add(verbs, "remove", _remove_tenant, "forget what was set at run time").add_argument("name")
    plans = commands.add_parser("plans", help="list, set, remove: settings that several tenants share")
    verbs = plans.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add(verbs, "list", _list_plans, "show every plan, and which tenants have it")
    _add_settings(_add(verbs, "set", _set_plan, "change a plan and all tenants that have it"))
    _add(verbs, "remove", _remove_plan, "forget what was set at run time").add_argument("name")
    _add(commands, "rotate-signing", _rotate_signing, "sign salts with a new secret; the one before stays valid")
    _add(commands, "rotate-key", _rotate_key, "wrap all users' keys by a new deployment key; no data is rewritten")


def _add(
    commands: "Commands", name: str, run: Callable[[argparse.Namespace], "Operation"], wording: str
) -> argparse.ArgumentParser:
    """Add a command that asks the server for what `run` makes of the options."""
    parser = commands.add_parser(name, help=wording)
    parser.add_argument("--json", action="store_true", help="print everything, for programs")
    parser.add_argument("--socket", metavar="PATH", help=f"the admin socket (default: {default_admin_socket_path()})")
    if not name.startswith("rotate-"):
        parser.add_argument("--offline", metavar="FILE", help="change this saltern.db, of a server that is down")
    parser.set_defaults(run=lambda options: operate(options, run, _show), offline=None)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name")
    none = "'none' for none, 'inherit' for what file and plan say"
    parser.add_argument("--guarantee", metavar="SIZE", help="bytes that nobody can take; 'inherit' as below")
    parser.add_argument("--limit", metavar="SIZE", help=f"most bytes it may hold; {none}")
    parser.add_argument("--user-limit", metavar="SIZE", help=f"most bytes each of its users may hold; {none}")
    for name in ("guarantee", "limit", "user-limit"):
        parser.add_argument(f"--disk-{name}", metavar="SIZE", help="the same on disk")
    parser.add_argument("--ttl", metavar="TIME", help=f"forget blocks so long after their last use, as 7d; {none}")
    parser.add_argument("--weight", metavar="N", help="its share of what is borrowed; 'inherit' as above")


# What is asked


def _list_tenants(options: argparse.Namespace) -> "Operation":
    from saltern.operations import ListTenants

    return ListTenants()


def _get_tenant(options: argparse.Namespace) -> "Operation":
    from saltern.operations import GetTenant

    return GetTenant(options.name)


def _set_tenant(options: argparse.Namespace) -> "Operation":
    from saltern.operations import SetTenant, TenantSettings

    said, inherit = _settings(options, plan=options.plan)
    return SetTenant(options.name, TenantSettings(**said), inherit)


def _remove_tenant(options: argparse.Namespace) -> "Operation":
    from saltern.operations import RemoveTenant

    return RemoveTenant(options.name)


def _list_plans(options: argparse.Namespace) -> "Operation":
    from saltern.operations import ListPlans

    return ListPlans()


def _set_plan(options: argparse.Namespace) -> "Operation":
    from saltern.operations import PlanSettings, SetPlan

    said, inherit = _settings(options)
    return SetPlan(options.name, PlanSettings(**said), inherit)


def _remove_plan(options: argparse.Namespace) -> "Operation":
    from saltern.operations import RemovePlan

    return RemovePlan(options.name)


def _rotate_signing(options: argparse.Namespace) -> "Operation":
    from saltern.operations import RotateSigning

    return RotateSigning()


def _rotate_key(options: argparse.Namespace) -> "Operation":
    from saltern.operations import RotateKey

    return RotateKey()


def _settings(options: argparse.Namespace, **more: str | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the settings that were given, as numbers, and the names of those to inherit."""
    given = {name: getattr(options, name) for name in _FIELDS if name != "plan"} | more
    said = {name: text for name, text in given.items() if text is not None}
    if not said:
        raise AskedWronglyError(f"set what of {options.name}? Name a setting, such as --limit 2GiB")
    inherit = tuple(name for name, text in said.items() if text == INHERIT)
    return {name: _value(name, text) for name, text in said.items() if text != INHERIT}, inherit


def _value(name: str, text: str) -> object:
    option = f"--{name.replace('_', '-')}"
    if text == NONE:
        if name in ("guarantee", "disk_guarantee", "weight"):
            raise AskedWronglyError(f"{option}: write a number; 'inherit' goes back to what file and plan say")
        return None
    try:
        match name:
            case "ttl":
                return parse_duration(text)
            case "weight":
                return float(text)
            case "plan":
                return text
            case _:
                return parse_size(text)
    except ValueError as error:
        reason = f"{text!r} is not a number" if name == "weight" else str(error)
        raise AskedWronglyError(f"{option}: {reason}") from None


# What is shown


def _show(answer: "Answer", options: argparse.Namespace) -> None:
    print(_as_json(answer) if options.json else "\n".join(describe(answer)), flush=True)


def _as_json(answer: "Answer") -> str:
    import msgspec

    from saltern.operations import KeyRotated, PlansListed, SigningRotated, TenantShown, TenantsListed

    match answer:
        case TenantsListed(tenants, guaranteed_bytes, arena_bytes, disk_guaranteed_bytes, disk_bytes):
            shown: object = {
                "tenants": tenants,
                "guaranteed-bytes": guaranteed_bytes,
                "arena-bytes": arena_bytes,
                "disk-guaranteed-bytes": disk_guaranteed_bytes,
                "disk-bytes": disk_bytes,
            }
        case TenantShown(tenant):
            shown = tenant
        case PlansListed(plans):
            shown = {"plans": plans}
        case SigningRotated(path):
            shown = {"signing-file": path}
        case KeyRotated(path, keys):
            shown = {"key-file": path, "keys": keys}
        case _:
            raise AssertionError(f"{answer} is no answer to show")
    return msgspec.json.encode(shown).decode()


def describe(answer: "Answer") -> Sequence[str]:
    """Write an answer as a table for a terminal."""
    from saltern.operations import KeyRotated, PlansListed, SigningRotated, TenantShown, TenantsListed

    match answer:
        case TenantsListed():
            return _describe_tenants(answer)
        case TenantShown(tenant):
            return [
                f"{'tenant':<17}{tenant.tenant}",
                f"{'used':<17}{format_size(tenant.used_bytes)}, {tenant.users} users",
                f"{'used on disk':<17}{format_size(tenant.disk_bytes)}",
                *(f"{_heading(name):<17}{_shown(name, getattr(tenant, name))}" for name in _FIELDS),
            ]
        case PlansListed(plans):
            return _describe_plans(plans)
        case SigningRotated(path):
            return [f"salts are signed with a new secret from now on, in {path}; the one before it stays valid"]
        case KeyRotated(path, keys):
            return [f"a new key in {path} wraps {keys} users' keys: back it up, since the old one opens nothing now"]
        case _:
            raise AssertionError(f"{answer} is no answer to show")


_FIELDS = (
    "guarantee", "limit", "user_limit", "disk_guarantee", "disk_limit", "disk_user_limit", "ttl", "weight", "plan",
)  # fmt: skip


def _describe_tenants(listed: "TenantsListed") -> list[str]:
    # A terminal is narrow: what nobody has said anything of is left out where it is about the disk.
    fields = [
        name
        for name in _FIELDS
        if not name.startswith("disk_") or any(getattr(tenant, name).origin for tenant in listed.tenants)
    ]
    rows = [
        (
            tenant.tenant,
            format_size(tenant.used_bytes),
            format_size(tenant.disk_bytes),
            *(_shown(name, getattr(tenant, name)) for name in fields),
        )
        for tenant in listed.tenants
    ]
    said = f"guaranteed {format_size(listed.guaranteed_bytes)}"
    if listed.arena_bytes:
        said += f" of an arena of {format_size(listed.arena_bytes)}"
    if listed.disk_bytes:
        said += f", and {format_size(listed.disk_guaranteed_bytes)} of a disk tier of {format_size(listed.disk_bytes)}"
    return [*table(("tenant", "used", "on disk", *map(_heading, fields)), rows), "", said]


def _describe_plans(plans: Sequence["PlanState"]) -> list[str]:
    if not plans:
        return ["no plans"]
    fields = [
        name
        for name in _FIELDS
        if name != "plan" and (not name.startswith("disk_") or any(name in plan.bounds for plan in plans))
    ]
    rows = [
        (
            plan.plan,
            *(_shown(name, plan.bounds[name]) if name in plan.bounds else "-" for name in fields),
            ", ".join(plan.tenants) or "-",
        )
        for plan in plans
    ]
    return table(("plan", *map(_heading, fields), "tenants"), rows)


def _heading(field: str) -> str:
    return field.replace("_", " ")


def _shown(field: str, bound: "Bound") -> str:
    """Write a value with where it comes from, unless nobody has said anything."""
    value = bound.value
    if value is None:
        text = "none"
    elif field == "ttl":
        text = format_duration(value)
    elif field == "weight":
        text = f"{value:g}"
    else:
        text = str(value) if field == "plan" else format_size(value)
    return f"{text} ({bound.origin})" if bound.origin else text
