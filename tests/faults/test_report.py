"""The report says what was seen, and the documentation has the faults that there are."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from faults.catalogue import FAULTS, what_happens
from faults.report import BEGIN, COLUMNS, END, PAGE, line, table, write_down
from faults.watch import Row, Sent

SENT = Sent(
    prompt_tokens=9,
    cached_tokens=0,
    is_right=True,
    seconds=2.125,
    queued_seconds=1.25,
    stopped_seconds=1.0,
    reference_seconds=1.0,
)
GOOD = Row(
    name="server-killed-idle",
    did="It is killed.",
    sent=(SENT,) * 7,
    allowed_seconds=1.5,
    back_requests=2,
    back_seconds=0.75,
    left=(),
    problems=(),
)
WRONG = msgspec.structs.replace(SENT, is_right=False)
BAD = msgspec.structs.replace(GOOD, sent=(WRONG, *GOOD.sent[1:]), left=("a | b",), problems=("one\ntwo",))


def cells(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in text.splitlines() if row.startswith("|")
    ]


def test_a_line_has_what_was_measured_and_below_it_what_was_wrong() -> None:
    assert " ".join(line(GOOD).split()) == "pass server-killed-idle 7 of 7 0.25 s 0.12 s 1.50 s with request 2, 0.8 s"
    first, *rest = line(BAD).splitlines()
    assert first.startswith("FAIL") and "6 of 7" in first
    assert [text.strip() for text in rest] == [
        "one",
        "two",
        "1 of 7 answers were not those without a cache",
        "left behind: a | b",
    ]


def test_the_table_has_a_row_for_each_and_names_the_machine() -> None:
    text = table([GOOD, BAD], {"cores": "2"})
    head, _, good, bad = cells(text)
    assert tuple(head) == COLUMNS
    assert good == [
        "`server-killed-idle`",
        "It is killed.",
        "7 of 7",
        "0.25 s",
        "0.12 s",
        "1.50 s",
        "with request 2, 0.8 s",
        "nothing",
    ]
    assert len(bad) == len(COLUMNS) and bad[-1].startswith("**FAILED**: one two; 1 of 7") and r"a \| b" in bad[-1]
    assert text.startswith("Made by `make faults` on: cores 2.")


def test_a_table_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\n\nold\n\n{END}\nafter\n")
    write_down("new", page)
    write_down("newer", page)
    assert page.read_text() == f"before\n{BEGIN}\n\nnewer\n\n{END}\nafter\n"
    page.write_text("no place")
    with pytest.raises(AssertionError, match="no place for the table"):
        write_down("new", page)


def test_the_page_has_every_fault_as_it_happens() -> None:
    made = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    head, _, *rows = cells(made)
    assert tuple(head) == COLUMNS
    assert [(row[0], row[1]) for row in rows] == [(f"`{name}`", what_happens(name)) for name in FAULTS]


def test_the_page_says_what_an_operator_sees_of_every_fault() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## What an operator sees")[2].partition("\n## ")[0]
    named = {name for row in cells(section)[2:] for name in re.findall(r"`([a-z-]+)`", row[0])}
    assert named == set(FAULTS)
