"""A server that is killed under load, and damage to its files, in small; and the instruments see what they are for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from faults.report import END, PAGE
from faults.torture.books import Books, Vault, balance
from faults.torture.damage import DAMAGES, what_happens
from faults.torture.ledger import Ledger
from faults.torture.population import (
    BLOCK_BYTES,
    PLAIN,
    PROMPTS,
    USERS,
    block_bytes,
    generation_mark,
    generation_of,
    marks_in,
    prompt_keys,
    read_extent,
    write_extent,
)
from faults.torture.report import BEGIN, DAMAGE_COLUMNS
from saltern.core.effects import RecordName
from saltern.core.extents import Run
from saltern.core.snapshot import ArenaStats, DiskStats, Snapshot, TenantStats
from saltern.tiers.datakeys import KeyId
from saltern.tiers.index import Row, WrappedKey

NAMING = bytes(32)
ALICE, BOB = (USERS[number].identity(NAMING, 0) for number in (0, 1))
KEY = prompt_keys(ALICE, 0)[0]

SOME_DAMAGES = (
    "bits-flipped",
    "records-swapped",
    "older-record-put-back",
    "slab-cut",
    "index-header-zeroed",
    "disk-full",
)


def torture(tmp_path: Path, *arguments: str) -> Any:
    written = tmp_path / "report.json"
    command = [sys.executable, "-m", "faults.torture", *arguments, "--json", str(written)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=550)
    assert written.exists(), done.stdout + done.stderr
    return json.loads(written.read_text(encoding="utf-8"))


def test_kills_lose_nothing_and_bring_nothing_back(tmp_path: Path) -> None:
    report = torture(tmp_path, "--kills", "8", "--no-damages")
    assert report["ok"], report["kills"]["findings"]
    result = report["kills"]
    assert sum(result["kills"].values()) >= 8
    for what in ("checked_blocks", "stored_blocks", "loaded_records", "recovered_total", "erasures"):
        assert result[what] > 0, f"no {what}: nothing was tried"


def test_damage_is_a_miss_and_is_counted(tmp_path: Path) -> None:
    report = torture(tmp_path, "--kills", "0", *SOME_DAMAGES)
    without_mounts = [
        outcome
        for outcome in report["damages"]
        if any("no disk could be mounted" in problem for problem in outcome["problems"])
    ]
    assert {outcome["name"] for outcome in without_mounts} <= {"disk-full"}
    for outcome in report["damages"]:
        if outcome in without_mounts:
            continue
        assert not outcome["problems"], outcome
        assert outcome["wrong"] == 0 and outcome["counted"], outcome
        assert outcome["right"] < outcome["asked"], f"{outcome['name']} has harmed nothing"
    if without_mounts:
        pytest.skip("mounts are not allowed here: all but disk-full were tried")


# The instruments


def test_a_block_tells_whose_it_is_and_of_which_generation() -> None:
    block = block_bytes(ALICE.id, KEY, 3)
    assert (len(block), generation_of(block)) == (BLOCK_BYTES, 3)
    others = (block_bytes(BOB.id, KEY, 3), block_bytes(ALICE.id, prompt_keys(ALICE, 0)[1], 3))
    assert all(block[part : part + 4096] != other[part : part + 4096] for other in others for part in (0, 36_864))
    assert PLAIN in block[-4096:]


def test_a_block_is_read_as_each_rank_has_written_its_share_of_it() -> None:
    arena, extent = memoryview(bytearray(16 * 16_384)), (Run(start=5, count=1), Run(start=1, count=2))
    block = block_bytes(ALICE.id, KEY, 0)
    for start, end in ((0, 13_000), (13_000, 26_001), (26_001, BLOCK_BYTES)):
        write_extent(arena, extent, 16_384, block, start, end)
    assert read_extent(arena, extent, 16_384) == block
    assert set(marks_in(arena)) == {generation_mark(ALICE.id, 0)}
    assert not any(arena[:16_384]) and not any(arena[3 * 16_384 : 5 * 16_384])


def test_prompts_share_prefixes_and_users_share_nothing() -> None:
    keys = [prompt_keys(ALICE, number) for number in range(PROMPTS)]
    assert keys[0][:3] == keys[1][:3] and keys[0][3] != keys[1][3]
    assert not {key for prompt in keys for key in prompt} & {
        key for number in range(PROMPTS) for key in prompt_keys(BOB, number)
    }


def test_what_began_while_an_erasure_did_is_of_one_generation_or_the_other() -> None:
    ledger, user = Ledger(1), USERS[0]
    before = ledger.begin(user)
    assert ledger.begin_erasing(user) == 1
    after = ledger.begin(user)
    assert (before.generation, after.generation) == (0, 1) and before.at <= after.at
    assert ledger.dead_below(user) == 0
    ledger.confirm_erased(user, 1)
    assert ledger.dead_below(user) == 1


ROW = Row(RecordName("default", ALICE.id, KEY, b""), (Run(start=0, count=10),), 40_000, 0, 0.0, serial=1)
OTHER = Row(RecordName("default", BOB.id, KEY, b""), (Run(start=10, count=10),), 40_000, 0, 0.0, serial=2)


def snapshot(used_bytes: int, *, charged: int, blocks: int = 2, limit: int | None = None) -> Snapshot:
    disk = DiskStats(
        total_bytes=1 << 20,
        used_bytes=used_bytes,
        blocks=blocks,
        writing_blocks=0,
        reading_blocks=0,
        written=0,
        evicted=0,
        expired=0,
        skipped=0,
        loaded=0,
        lost=0,
    )
    tenant = msgspec.convert(
        {
            "tenant": "default",
            "blocks": 0,
            "used-bytes": 0,
            "limit-bytes": None,
            "user-limit-bytes": None,
            "counts": {},
            "users": [],
            "users-total": 0,
            "disk-used-bytes": charged,
            "disk-limit-bytes": limit,
        },
        TenantStats,
    )
    arena = ArenaStats(total_bytes=1, used_bytes=0, page_bytes=1, blocks=0, pinned_blocks=0, writing_blocks=0)
    return Snapshot(arena, (tenant,), (), disk=disk)


def test_the_books_show_a_leak_a_wrong_charge_an_overlap_and_who_has_too_much() -> None:
    books, used = Books([ROW, OTHER], [], b""), 20 * 4096
    assert balance(books, snapshot(used, charged=used)) == ([], 0)
    leaking = balance(books, snapshot(used + 4096, charged=used))
    assert leaking.leaked_bytes == 4096 and len(leaking.problems) == 1
    assert balance(books, snapshot(used, charged=used - 4096)).problems
    assert balance(books, snapshot(used, charged=used, blocks=3)).problems
    assert balance(books, snapshot(used, charged=used, limit=used - 1)).problems
    overlapping = Books([ROW, msgspec.structs.replace(OTHER, slot=(Run(start=9, count=10),))], [], b"")
    assert balance(overlapping, snapshot(used, charged=used)).problems


def test_a_destroyed_key_is_known_again_by_its_bytes() -> None:
    key = WrappedKey(1, ("default", ALICE.id), KeyId(b"i" * 16), bytes(range(60)))
    vault = Vault()
    vault.see([key])
    there = Books([], [key], b"--" + key.wrapped + b"--")
    assert not list(vault.left(there, []))
    assert len(list(vault.left(there, [key.owner]))) == 1, "an erased user has a key"
    vault.destroy([key.id])
    assert len(list(vault.left(there, []))) == 2, "in the rows, and in the bytes"
    assert len(list(vault.left(Books([], [], there.raw), []))) == 1, "in the bytes alone"
    assert not list(vault.left(Books([], [], b"--"), []))


# The page


def made() -> list[list[str]]:
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("|")]


def test_the_page_has_every_damage_as_it_happens() -> None:
    rows = made()
    begin = rows.index(list(DAMAGE_COLUMNS))
    assert [(row[0], row[1]) for row in rows[begin + 2 :]] == [(f"`{name}`", what_happens(name)) for name in DAMAGES]


def test_the_page_says_what_the_kills_came_to() -> None:
    said = {row[0]: row[1] for row in made() if len(row) == 2}
    for what in ("wrong bytes", "resurrected", "leaked bytes"):
        assert said[f"**{what}**"].startswith("**0**"), said
    assert int(said["kills"].partition(":")[0]) >= 200
