"""Where a sequence's tiles lie: templates/device/worklist.py itself, with plain numbers for the DSL's."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generator.tiles import FLASH_SM90_LONE_TILES
from helpers import plain
from pa_ops.plan import ceil_div, work_list
from pa_ops.spec import Tile

QUOTIENTS = {"divided": lambda a, b: a // b}
worklist = SimpleNamespace(**plain.run("worklist", {"ptx_global": {"ld_global_i32": None}, "quotients": QUOTIENTS}))
LONE = [tile for table in FLASH_SM90_LONE_TILES for tile in table.values()]
lengths = st.integers(1, 3000)


def ends(length: int, tokens: int, step: int) -> list[int]:
    """Where each tile of a sequence would end if it were full."""
    end, count = worklist.end_of(length, step), worklist.tiles_of(length, tokens)
    return [end - (count - 1 - block) * tokens for block in range(count)]


@pytest.mark.parametrize("bits", range(7))
@pytest.mark.parametrize("tile", LONE)
def test_a_step_divides_tiles_and_blocks_of_keys(tile: Tile, bits: int) -> None:
    assert worklist.step_of(tile.m, bits, tile.n) == math.gcd(tile.m >> bits, tile.n)


@given(lengths, st.sampled_from([64, 128, 192, 48, 3]), st.sampled_from([32, 48, 64, 80, 96, 128]))
def test_the_first_tile_is_the_one_with_room_and_none_sees_more_keys_than_in_order(
    length: int, tokens: int, keys: int
) -> None:
    step = math.gcd(tokens, keys)
    found = ends(length, tokens, step)
    assert 0 <= found[-1] - length < step, "the last ends with its sequence, or within a step"
    assert 0 < found[0] <= tokens, "the first begins before it, and has rows"
    assert all(end % step == 0 for end in found), "they begin where blocks of keys may"
    rows = [(max(end - tokens, 0), min(end, length)) for end in found]
    assert rows == [(tile.first, tile.first + tile.rows) for tile in work_list([length], tokens, step)]
    for block, end in enumerate(found):
        assert ceil_div(min(end, length), keys) <= ceil_div(min((block + 1) * tokens, length), keys)
