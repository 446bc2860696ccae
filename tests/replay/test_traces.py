"""What holds for reading traces."""

import json
from pathlib import Path

import pytest

from saltern.replay.traces import NOBODY, Request, TraceError, UserColumn, parse_user_column, read_trace


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(milliseconds: int, *hash_ids: int, **more: object) -> dict[str, object]:
    return {"timestamp": milliseconds, "input_length": 1, "output_length": 1, "hash_ids": hash_ids, **more}


def test_requests_come_in_order_of_time_with_their_users(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", row(1500, 0, 7, who="bob"), row(500, 0, 8, 9, who="eve"), row(1500, 0, who=3))
    trace = read_trace(path, UserColumn("who"))
    assert trace.requests == (Request(0.5, "eve", (0, 2, 3)), Request(1.5, "bob", (0, 1)), Request(1.5, "3", (0,)))
    assert (trace.blocks, trace.distinct_blocks, trace.name) == (6, 4, "t.jsonl")


def test_a_block_is_known_by_all_that_came_before_it(tmp_path: Path) -> None:
    """Otherwise a trace that numbers blocks by their own content would hit where an engine could not."""
    trace = read_trace(write(tmp_path / "t.jsonl", row(0, 1, 2, 2), row(0, 3, 2), row(0, 1, 2)))
    first, second, third = (request.blocks for request in trace.requests)
    assert len({*first, *second}) == 5
    assert third == first[:2]
    assert trace.distinct_blocks == 5


def test_an_item_of_a_list_may_stand_for_the_user(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", row(0, 0, 7, 1), row(0, 0), row(0, 0, 7))
    trace = read_trace(path, parse_user_column("hash_ids[1]"))
    assert [request.user for request in trace.requests] == ["7", NOBODY, "7"]
    assert str(trace.user_column) == "hash_ids[1]"


def test_a_column_that_makes_all_one_user_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", row(0, 0, who=None), row(0, 0, who=None))
    for text, complaint in (
        ("timestamp[0]", "line 1: timestamp is no list, so there is no timestamp[0]"),
        ("hash_ids[1]", "no line has a hash_ids[1], so that all would be one user"),
        ("who", "no line has a who"),
    ):
        with pytest.raises(TraceError) as error:
            read_trace(path, parse_user_column(text))
        assert complaint in str(error.value)


@pytest.mark.parametrize("text", ["", "a b", "hash_ids[", "hash_ids[-1]", "[1]"])
def test_what_names_no_column_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="names no column"):
        parse_user_column(text)


def test_what_is_no_trace_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    good = json.dumps(row(0, 1)).encode()
    for line, complaint in (
        (b"{", "line 2: "),
        (b"[]", "line 2: Expected `object`"),
        (b'{"timestamp": 1}', "line 2: there is no column 'hash_ids'"),
        (b'{"timestamp": "soon", "hash_ids": []}', "line 2: Expected `float`"),
        (b'{"timestamp": 1, "hash_ids": [0.5]}', "line 2: Expected `int`"),
        (b"\xff", "line 2: "),
    ):
        path.write_bytes(good + b"\n" + line + b"\n")
        with pytest.raises(TraceError, match=complaint):
            read_trace(path)
    with pytest.raises(TraceError, match="line 1: there is no column 'user_id'"):
        read_trace(path, UserColumn("user_id"))


def test_a_file_that_is_not_there_or_empty_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n", encoding="utf-8")
    with pytest.raises(TraceError, match="has no requests"):
        read_trace(tmp_path / "empty.jsonl")
