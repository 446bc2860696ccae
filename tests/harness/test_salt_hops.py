"""Tests of the salt's way: at each hop it is lost on purpose, and each loss is seen."""

import pkgutil
import re
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="the harness runs vLLM's own scheduler")

from .findings import StrayWrite, WrongKV
from .options import Options
from .salt_hops import HOPS, Loss, Way
from .saltern_lives import stepped
from .saltern_world import Crossed, Weather

FINDINGS = {finding.__name__: finding for finding in (Crossed, StrayWrite, WrongKV)}
USERS = (None, "alice", "bob", "carol")
PAGE = Path(__file__).parents[2] / "docs" / "cache-salt.md"


def serve_neighbours() -> None:
    """Have all users send one prompt in one batch, to two engines of one server in turn; the second time all hit."""
    options = Options(tag_users=True, ranks=2, blocks=128, batch_tokens=512)
    prompt = [position % 7 for position in range(3 * options.block_tokens + 5)]
    with stepped(options, Weather()) as subject:
        for turn in range(2):
            with subject.engine(options) as engine:
                for user in USERS:
                    engine.add(f"{user}", prompt, user, max_tokens=3)
                engine.run()
                engine.check_drained()
                hits = [answer.external_tokens // options.block_tokens for answer in engine.answers.values()]
                assert hits == [3 * turn] * len(USERS)


def _table() -> dict[str, list[str]]:
    """Return the cells of each row of the page's table of hops, by the name in its first cell."""
    rows = [line.strip("|").split("|") for line in PAGE.read_text("utf-8").splitlines() if line.startswith("|")]
    header = next(index for index, row in enumerate(rows) if row[0].strip() == "hop")
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows[header + 2 :]}


TABLE = _table()


def test_the_salt_arrives_if_nothing_is_lost() -> None:
    serve_neighbours()


@pytest.mark.parametrize("way", Way, ids=lambda way: way.value)
@pytest.mark.parametrize("hop", HOPS)
def test_salt_is_missed_at(hop: str, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    HOPS[hop](monkeypatch, Loss(way))
    finding = FINDINGS[TABLE[hop][2 + list(Way).index(way)]]
    with pytest.raises(finding):
        serve_neighbours()


def test_the_page_has_every_hop_in_order() -> None:
    assert list(TABLE) == list(HOPS)


@pytest.mark.parametrize("hop", HOPS)
def test_the_page_names_a_place_that_exists(hop: str) -> None:
    match = re.fullmatch(r"`([\w.]+)`", TABLE[hop][0])
    assert match, f"the place of {hop} is not one name in backquotes"
    assert pkgutil.resolve_name(match[1]), f"{match[1]} does not exist"
