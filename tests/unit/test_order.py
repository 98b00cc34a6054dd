"""The order of a sequence's tiles: templates/device/order.py itself, with plain numbers for the DSL's."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest

from helpers import plain
from helpers.schedule import end_of
from pa_ops.plan import ceil_div

order = SimpleNamespace(**plain.run("order", {"quotients": {"divided": lambda a, b: a // b}}))
AT_ONCE = 66


def places(tiles: int, heads: int, *, group: int = 1, near: int = 1, causal: bool = True) -> list[tuple[int, int]]:
    """(row block, head) of every tile, in the order of ranks."""
    sections = order.sections_of(tiles, heads, group, near, AT_ONCE, causal)
    return [order.place_of(rank, sections) for rank in range(tiles * heads)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "group"), [(1, 1), (3, 1), (8, 1), (8, 4), (12, 3), (32, 1), (32, 32)])
def test_every_tile_has_one_rank(heads: int, group: int, causal: bool) -> None:
    for tiles, near in product((1, 2, 3, 43, 64), (1, 2, 5, 100)):
        got = places(tiles, heads, group=group, near=near, causal=causal)
        assert sorted(got) == list(product(range(tiles), range(heads))), (tiles, near)


def test_heads_of_a_section_come_before_the_others_and_last_row_blocks_first() -> None:
    got = places(4, 6, near=2, causal=False)
    assert got[:8] == [(block, head) for block in (3, 2, 1, 0) for head in (0, 1)]
    assert [head for _, head in got] == [0, 1] * 4 + [2, 3] * 4 + [4, 5] * 4


@pytest.mark.parametrize(("tiles", "heads", "last"), [(64, 8, 4), (43, 16, 5), (43, 32, 5), (3, 8, 8)])
def test_the_short_tiles_of_the_last_heads_come_last(tiles: int, heads: int, last: int) -> None:
    got, short = places(tiles, heads), tiles // 2
    end = got[len(got) - short * last :]
    assert set(end) == set(product(range(short), range(heads - last, heads)))
    assert end == sorted(end, key=lambda place: (-place[0], place[1])), "the longest first"


@pytest.mark.parametrize(("tiles", "heads", "rows", "keys"), [(64, 8, 256, 80), (43, 16, 384, 80), (43, 32, 384, 128)])
def test_a_causal_sequence_of_16k_tokens_ends_evenly(tiles: int, heads: int, rows: int, keys: int) -> None:
    """Within 1% of what as many tiles at a time take if none ever waits."""
    steps = [ceil_div(16384 - (tiles - 1 - block) * rows, keys) + 3.0 for block, _ in places(tiles, heads)]
    assert end_of(steps, AT_ONCE) <= 1.01 * sum(steps) / AT_ONCE
