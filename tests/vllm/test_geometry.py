"""Tests of the geometry: which engine blocks are a block of the cache, and which of them somebody may still need."""

import pytest

from saltern.vllm.geometry import Geometry, Group, kept

FULL = Group(2)
WINDOW = Group(2, window=3)
STATE = Group(4, is_state=True)


def test_a_block_has_the_engine_blocks_of_each_group_that_keeps_kv() -> None:
    geometry = Geometry(4, (FULL, Group(4, window=3), STATE))
    tables = ([1, 2, 3, 4], [0, 5], [0, 6])
    assert geometry.pages(tables, 0) == ((1, 2), (0,), ())
    assert geometry.pages(tables, 1) == ((3, 4), (5,), ())
    assert geometry.state_pages(tables, 2) == ((), (), (6,))
    assert kept(geometry.pages(tables, 0)) == (1, 2)
    assert geometry.engine_blocks == 4


@pytest.mark.parametrize(("tokens", "forgotten"), [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2), (10, 8)])
def test_a_window_of_three_tokens_keeps_the_next_ones_two_before(tokens: int, forgotten: int) -> None:
    assert WINDOW.forgotten(tokens) == forgotten
    assert FULL.forgotten(tokens) == 0


def test_a_block_is_whole_without_what_no_continuation_of_it_attends_to() -> None:
    geometry = Geometry(4, (FULL, WINDOW))
    assert geometry.is_whole(((1, 2), (3, 4)), index=0)
    assert geometry.is_whole(((1, 2), (0, 4)), index=0), "tokens 0 and 1 are out of the window of token 4"
    assert not geometry.is_whole(((1, 2), (3, 0)), index=0)
    assert not geometry.is_whole(((1, 2), (0, 0)), index=0)
    assert not geometry.is_whole(((0, 2), (0, 4)), index=0), "full attention never forgets"


def test_a_window_that_ends_within_an_engine_block_needs_all_of_it() -> None:
    geometry = Geometry(4, (Group(2, window=4),))
    assert not geometry.is_whole(((0, 4),), index=0), "token 4 attends to token 1"


def test_what_forgets_and_what_has_states_is_told_apart() -> None:
    assert Geometry(4, (FULL, FULL)).keeps_all
    assert not Geometry(4, (FULL, WINDOW)).keeps_all
    assert not Geometry(4, (FULL, WINDOW)).has_states
    assert Geometry(4, (FULL, STATE)).has_states
    assert not Geometry(4, (STATE,)).keeps_all
