"""What holds for `saltern replay`, run as a user runs it."""

import json
import re
import sys
from pathlib import Path

import pytest

from saltern import cli


def lines_of(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    """Return the lines of stdout and of stderr."""
    said = capsys.readouterr()
    return said.out.splitlines(), said.err.splitlines()


def test_the_table_names_the_column_and_compares_policies(trace_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--user", "person", "--tenants", "2", "--flood", "1", "--capacity", "10%, 800", "--quota", "50%,1"]
    assert cli.main(["replay", str(trace_path), *arguments]) == 0
    table, progress = lines_of(capsys)
    assert table[0].startswith("trace    made.jsonl: 1500 requests for ")
    assert table[1] == "users    person stands for the user, each tenant isolated from the others"
    assert table[3] == "flood    a further tenant stores 1 times the trace's blocks, none of them twice"
    header = next(index for index, line in enumerate(table) if line.startswith("policy"))
    assert table[header].split() == ["policy", "capacity", "quota", "all", "t1", "t2", "flood", "below", "cut"]
    rows = [line.split() for line in table[header + 1 :] if not line.startswith("  each alone")]
    assert [row[0] for row in rows] == ["guaranteed", "guaranteed", "static", "static", "lru"] * 2
    assert [row[2] for row in rows[:5]] == ["50%", "100%", "50%", "100%", "-"]
    assert rows[5][1] == "800"
    assert all(row[6] == "0.0" for row in rows), "a flood never hits"
    assert [line.split(":")[0] for line in progress] == [f"{number} of 10" for number in range(1, 11) for _ in "12"]
    assert re.fullmatch(r"1 of 10: guaranteed with \d+ blocks and a quota of 50% …", progress[0])
    assert re.fullmatch(r"1 of 10: hit \d+\.\d% \(\d+\.\d s\)", progress[1])


def test_json_says_everything(trace_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--salted", "--user", "person", "--public", "2", "--capacity", "20%", "--policy", "lru", "--json"]
    assert cli.main(["replay", str(trace_path), *arguments]) == 0
    study = json.loads(capsys.readouterr().out)
    assert (study["user"], study["salted"], study["published-blocks"]) == ("person", True, 2)
    (point,) = study["points"]
    assert (point["policy"], point["capacity-blocks"]) == ("lru", int(study["distinct-blocks"] * 0.2))
    (share,) = point["shares"]
    assert share["requests"] == 1500
    assert 0 < share["hit-blocks"] < share["asked-blocks"] == study["asked-blocks"]


def test_capacities_may_be_sizes(trace_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--capacity", "10 GiB", "--block-bytes", "64 MiB", "--policy", "lru"]
    assert cli.main(["replay", str(trace_path), *arguments]) == 0
    table, progress = lines_of(capsys)
    assert table[1].startswith("users    of one user")
    assert re.match(r"lru +10 GiB +- ", table[-1])
    assert "lru with 160 blocks" in progress[0]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--user", "a b"], "'a b' names no column"),
        (["--tenants", "0"], "without tenants"),
        (["--public", "-1"], "'-1' is no whole number"),
        (["--skew", "nan"], "'nan' is no number"),
        (["--quota", "101%"], "'101%' is more than the whole"),
        (["--policy", "fifo"], "'fifo' is no policy: there are guaranteed, static, lru"),
        (["--capacity", "10%,lots"], "'lots' is not a size"),
    ],
)
def test_options_that_can_not_be_are_explained(
    arguments: list[str], complaint: str, trace_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["replay", str(trace_path), *arguments])
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["--user", "user_id"], 1, "line 1: there is no column 'user_id'"),
        (["--user", "timestamp[0]"], 1, "line 1: timestamp is no list, so there is no timestamp[0]"),
        (["--user", "hash_ids[9999]"], 1, "no line has a hash_ids[9999], so that all would be one user"),
        (["--public", "9", "--capacity", "9"], 2, "a capacity of 9 blocks can promise room for 7: publish fewer"),
        (["--capacity", "1 GiB"], 2, "a capacity of '1 GiB' needs --block-bytes"),
        (["--capacity", "0"], 2, "a capacity of '0' holds no block"),
        (["--plot", "plot.pdf"], 2, "plot.pdf is neither a .png nor an .svg"),
        (["--plot", "nowhere/plot.svg"], 2, "there is no folder nowhere for the plot"),
    ],
)
def test_what_fails_later_is_one_line(
    arguments: list[str], status: int, complaint: str, trace_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["replay", str(trace_path), *arguments]) == status
    out, err = lines_of(capsys)
    assert not out
    assert len(err) == 1
    assert complaint in err[0]


def test_a_plot_without_matplotlib_says_what_to_install_before_the_work(
    trace_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["replay", str(trace_path), "--plot", "plot.svg"]) == 2
    assert lines_of(capsys) == ([], ["saltern: a plot needs matplotlib: pip install 'saltern[plot]'"])


def test_a_plot_has_both_axes_and_is_the_same_every_time(trace_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = []
    for name in ("one.svg", "two.svg", "three.png"):
        arguments = ["--user", "person", "--tenants", "2", "--capacity", "5%,20%", "--quota", "0,1"]
        assert cli.main(["replay", str(trace_path), *arguments, "--plot", str(tmp_path / name)]) == 0
        drawn.append((tmp_path / name).read_bytes())
    assert drawn[0] == drawn[1]
    for text in (b"capacity in blocks", b"quota: promised part of", b"guaranteed", b"static", b"lru"):
        assert text in drawn[0]
    assert drawn[2].startswith(b"\x89PNG")
