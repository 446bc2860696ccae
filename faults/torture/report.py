"""The report of the torture: what was done, what it came to, and the tables in the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from faults.torture.scene import Outcome

BEGIN = "<!-- made by `make torture`: begin -->"


class Result(msgspec.Struct, frozen=True):
    """What a run of kills came to. Blocks are counted where nothing else is said."""

    seed: int
    seconds: float
    kills: dict[str, int]
    engines: int
    users: int
    requests: int
    cut_short: int
    checked_blocks: int
    stored_blocks: int
    written_records: int
    loaded_records: int
    waits_for_disk: int
    erasures: int
    erasures_cut_short: int
    rotations: int
    late_refused: int
    destroyed_keys_known: int
    quiet_moments: int
    recovered_min: int
    recovered_median: int
    recovered_total: int
    start_seconds: float
    wrong_bytes: int
    resurrected: int
    leaked_bytes: int
    lost_blocks: int
    findings: tuple[str, ...]

    @property
    def is_ok(self) -> bool:
        """Return whether nothing was found that may not be."""
        return not (self.findings or self.wrong_bytes or self.resurrected or self.leaked_bytes or self.lost_blocks)


def table(result: Result, machine: Mapping[str, str]) -> str:
    """Return a run of kills as a table in Markdown."""
    kills = ", ".join(f"{count} while {kind}" for kind, count in result.kills.items())
    rows = [
        ("kills", f"{sum(result.kills.values())}: {kills}"),
        ("**wrong bytes**", f"**{result.wrong_bytes}** of {result.checked_blocks:,} blocks that were checked"),
        (
            "**resurrected**",
            f"**{result.resurrected}**, after {result.erasures} erasures with a receipt and"
            f" {result.erasures_cut_short} that a kill cut short; {result.late_refused:,} stores came too late and were"
            f" refused, and none of {result.destroyed_keys_known} destroyed keys that were known is in a file",
        ),
        ("**leaked bytes**", f"**{result.leaked_bytes}**, counted at every start and in {result.quiet_moments} pauses"),
        ("blocks lost by a kill", f"{result.lost_blocks}"),
        (
            "blocks recovered",
            f"{result.recovered_total:,} in all, {result.recovered_median:,} in the median, {result.recovered_min:,} at"
            " least",
        ),
        ("from start to first answer", f"{result.start_seconds:.1f} s in the median"),
        (
            "work meanwhile",
            f"{result.requests:,} requests of {result.engines} engines for {result.users} users,"
            f" {result.cut_short:,} of them cut short; {result.stored_blocks:,} blocks stored,"
            f" {result.written_records:,} written to the disk and {result.loaded_records:,} loaded from it; the"
            f" deployment key rotated {result.rotations} times",
        ),
    ]
    made = ", ".join(f"{name} {value}" for name, value in machine.items())
    lines = [f"Made by `make torture` (seed {result.seed}, {result.seconds:.0f} s) on: {made}.", "", "| what | |"]
    return "\n".join([*lines, "| --- | --- |", *(f"| {what} | {value} |" for what, value in rows)])


def line(outcome: Outcome) -> str:
    """Return what became of a damage, in a line for the screen, and below it what was wrong."""
    verdict = "FAIL" if outcome.problems else "pass"
    lines = [
        f"{verdict}  {outcome.name:32} {outcome.asked:6} asked  {outcome.right:6} right  {outcome.missed:6} missed "
        f" {outcome.wrong:3} wrong  {_counted(outcome)}"
    ]
    lines += [f"      {text}" for problem in outcome.problems for text in problem.splitlines()]
    return "\n".join(lines)


DAMAGE_COLUMNS = ("damage", "what is done", "asked", "right", "missed", "wrong", "counted")


def damage_table(outcomes: Iterable[Outcome]) -> str:
    """Return all damages as a table in Markdown."""
    cells = [DAMAGE_COLUMNS, ("---",) * len(DAMAGE_COLUMNS), *map(_cells, outcomes)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def _cells(outcome: Outcome) -> tuple[str, ...]:
    numbers = (outcome.asked, outcome.right, outcome.missed, outcome.wrong)
    counted = f"**FAILED**: {'; '.join(outcome.problems)}" if outcome.problems else _counted(outcome)
    return (f"`{outcome.name}`", outcome.did, *map(str, numbers), counted.replace("\n", " "))


def _counted(outcome: Outcome) -> str:
    return ", ".join(f"{what}: {count}" for what, count in outcome.counted.items()) or "nothing"
