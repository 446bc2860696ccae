"""`saltern check`: whether the disk tier of a server that is down holds what its index says."""

import argparse
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saltern.cli.output import EXIT_ASKED_WRONGLY, EXIT_FAILED, complain, table
from saltern.sizes import format_size

if TYPE_CHECKING:
    from saltern.audit import Line
    from saltern.cli.output import Commands
    from saltern.server.config import Config
    from saltern.tiers.check import Finding, Report


def add_commands(commands: "Commands") -> None:
    """Add the command's parser."""
    check = commands.add_parser("check", help="check the disk tier of a server that is down, and mend it")
    check.add_argument("--config", type=Path, metavar="FILE", help="the server's settings, as TOML")
    check.add_argument("--repair", action="store_true", help="do what else it only says it would do")
    check.add_argument("--json", action="store_true", help="print everything, for programs")
    check.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> int:
    import msgspec

    from saltern.audit import AuditError
    from saltern.server.config import ConfigError, load_config
    from saltern.server.store import StoreError
    from saltern.tiers.check import check
    from saltern.tiers.errors import DiskError

    try:
        config = load_config(options.config)
        repairs = _Repairs(config)
        try:
            report = check(config.disk_path, config.deployment_key_path, options.repair, repairs.begin)
        except DiskError as error:
            repairs.fail(error)
            raise
        above = list(_above_limits(config, report))
    except ConfigError as error:
        return complain(str(error), EXIT_ASKED_WRONGLY)
    except (AuditError, DiskError, StoreError) as error:
        return complain(str(error), EXIT_FAILED)
    if options.json:
        print(msgspec.json.encode({"report": report, "above-limits": above}).decode(), flush=True)
    else:
        print("\n".join([*_describe(report), *(f"{text}; evicted at the next start" for text in above)]), flush=True)
    return 0 if report.is_sound or report.repaired else EXIT_FAILED


class _Repairs:
    """The audit log of a repair: a line before anything is changed, and another one if that failed."""

    def __init__(self, config: "Config") -> None:
        from saltern.audit import AuditLog

        self._log = AuditLog(config.server.state_path)
        self._by = f"uid {os.getuid()}, offline"
        self._line: Line | None = None

    def begin(self, findings: "Sequence[Finding]") -> None:
        """Write down what is mended. Raises `AuditError`, and then nothing may be."""
        self._line = self._log.append(
            "disk-repaired", {finding.kind: finding.count for finding in findings}, by=self._by
        )

    def fail(self, error: Exception) -> None:
        """Write down why it wasn't, if it was begun. Raises `AuditError`."""
        if self._line is not None:
            self._log.append("not-done", {"line": self._line.serial, "reason": str(error)}, by=self._by)


def _above_limits(config: "Config", report: "Report") -> Iterator[str]:
    """Yield who has more on disk than it may, by what the settings and the operator at run time have said."""
    from saltern.server.store import Store
    from saltern.server.tenancy import Layers

    layers = Layers(config.tenants, config.plans)
    if config.server.store_path.exists():
        store = Store(config.server.store_path)
        layers = Layers(config.tenants, config.plans, store.tenants, store.plans)
        store.close()
    used_by_tenant: Counter[str] = Counter()
    for usage in report.usage:
        used_by_tenant[usage.tenant] += usage.used_bytes
        limit = layers.disk_limits(usage.tenant).user_limit_bytes
        if limit is not None and usage.used_bytes > limit:
            yield f"user {usage.user} of tenant {usage.tenant} has {_of(usage.used_bytes, limit)}"
    for tenant, used_bytes in used_by_tenant.items():
        limit = layers.disk_limits(tenant).limit_bytes
        if limit is not None and used_bytes > limit:
            yield f"tenant {tenant} has {_of(used_bytes, limit)}"


def _of(used_bytes: int, limit_bytes: int) -> str:
    return f"{format_size(used_bytes)} on disk, more than its limit of {format_size(limit_bytes)}"


def _describe(report: "Report") -> Iterator[str]:
    for finding in report.findings:
        did = "done" if report.repaired else "`saltern check --repair` would"
        yield f"{'damage' if finding.is_damage else 'note'}: {finding.count} {finding.what}; {did}: {finding.remedy}"
    if not report.findings:
        yield "nothing is wrong"
    rows = [(usage.tenant, usage.user, usage.records, format_size(usage.used_bytes)) for usage in report.usage]
    if rows:
        yield from ("", *table(("tenant", "user", "blocks", "on disk"), rows))
    yield ""
    yield f"{sum(usage.records for usage in report.usage)} blocks are whole, {format_size(report.used_bytes)}"
