"""How the last tiles are cut for all SMs: templates/device/parts.py itself, with plain numbers for the DSL's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generator.tiles import FLASH_SM90_EIGHT_TILES, FLASH_SM90_LONE_TILES, FLASH_SM90_PAIR_TILES
from helpers import plain
from pa_ops import scratch
from pa_ops.launch import CUT_ROUNDS
from pa_ops.plan import ceil_div, work_list
from pa_ops.portions import Portion, shared_out

BLOCKS = 132
NEVER = 1 << 30
asked: list[int] = []


class Warp:
    """A lane whose turn it is; what all have voted, and what came of it once all have."""

    def __init__(self) -> None:
        self.lane, self.votes, self.least = 0, list[int](), NEVER

    def reduced(self, vote: int, kind: str) -> int:
        assert kind == "min"
        self.votes.append(vote)
        return min(vote, self.least)

    def run(self, function: Any, *args: Any) -> Any:
        """What a function of all lanes gives each of them."""
        self.votes, self.least = [], NEVER
        for self.lane in range(32):
            function(*args)
        self.least = min(self.votes, default=NEVER)
        return function(*args)


def find_tile(args: Any, tokens: int, rank: int) -> tuple[int, int]:
    """As worklist.py has it, for `args.lengths`."""
    asked.append(rank)
    beyond = rank - tiles_of(args, tokens)
    return (0, 0) if beyond < 0 else (-1, beyond)


def tiles_of(args: Any, tokens: int) -> int:
    """Tiles of one head."""
    return sum(1 for _ in work_list([length for length in args.lengths if length > args.skip_up_to], tokens))


warp = Warp()
Portions = plain.run("portions", {"quotients": plain.run("quotients", {})})["Portions"]
parts = SimpleNamespace(
    **plain.run(
        "parts",
        {"quotients": plain.run("quotients", {}), "worklist": {"find_tile": find_tile}},
        lane_idx=lambda: warp.lane,
        warp_redux_sync=warp.reduced,
    )
)


def batch(*lengths: int, **args: int) -> Any:
    """A kernel's arguments."""
    usual = {"tokens": sum(lengths), "sequences": len(lengths), "skip_up_to": 0, "cut_rounds": CUT_ROUNDS}
    return SimpleNamespace(lengths=lengths, **{**usual, **args})


def cut_of(args: Any, tokens: int, heads: int, portion: Portion | None = None) -> Any:
    """The cut of a batch, for one grid or one of two."""
    clusters = BLOCKS if portion is None else portion.clusters
    portions = Portions(SimpleNamespace(count=lambda: clusters), portion is not None)
    return warp.run(parts.cut_of, args, portions, tokens, heads, clusters)


@given(st.integers(0, 20_000), st.integers(1, parts.MOST), st.integers(0, 3), st.integers(0, 20))
def test_parts_of_tiles_are_all_blocks_each_once(steps: int, most: int, rounds: int, later: int) -> None:
    cut = parts.Cut(rounds * BLOCKS, most)
    ranks = range(cut.whole + later * most)
    assert [*dict.fromkeys(parts.tile_of(cut, rank)[0] for rank in ranks)] == [*range(cut.whole + later)]
    for tile in {0, cut.whole, cut.whole + later} - {cut.whole + later}:
        mine = [rank for rank in ranks if parts.tile_of(cut, rank)[0] == tile]
        found = [parts.part_of(cut, rank, parts.tile_of(cut, rank)[1], steps) for rank in mine]
        there = [part for part in found if part.begin < part.stop or part.number == 0]
        assert [block for part in there for block in range(part.begin, part.stop)] == [*range(steps)]
        assert [part.number for part in there] == [*range(len(there))]
        assert {part.of for part in found} == {len(there)} and (tile >= cut.whole or len(found) == 1)
        assert len(there) == 1 or min(part.stop - part.begin for part in there) >= parts.LEAST
        assert all(part.state == rank - cut.whole for part, rank in zip(found, mine, strict=True))


@given(st.lists(st.integers(0, 700), max_size=12), st.integers(0, 4), st.sampled_from((3, 48, 64, 192)))
def test_only_the_last_round_is_cut_and_there_is_room_for_its_states(
    lengths: list[int], skip: int, tokens: int
) -> None:
    for heads in (1, 8, 32, 200):
        args = batch(*lengths, skip_up_to=skip)
        tiles, cut = tiles_of(args, tokens) * heads, cut_of(args, tokens, heads)
        assert 1 <= cut.parts <= parts.MOST
        assert cut.whole in (0, tiles // BLOCKS * BLOCKS)
        if cut.parts > 1:
            rest = tiles - cut.whole
            assert 0 < rest < BLOCKS and rest * cut.parts <= BLOCKS * scratch.PARTS_AN_SM
            assert ceil_div(rest * cut.parts, BLOCKS) < cut.parts, "the round ends sooner"


@pytest.mark.parametrize(
    ("tiles", "whole", "cut"),
    [
        *((8, 0, 8), (24, 0, 5), (66, 0, 2), (88, 0, 3), (132, 132, 1)),
        *((1376, 1320, 2), (1024, 924, 5), (2816, 0, 1), (0, 0, 1)),
    ],
)
def test_parts_of_some_batches(tiles: int, whole: int, cut: int) -> None:
    assert cut_of(batch(*[48] * tiles), 48, 1) == (whole, cut)


def test_two_grids_cut_the_last_rounds_of_their_own_tiles() -> None:
    """As an H200 does 16k rows of eight heads, by tiles of 1024: 117 of 128 units are the eights', and of the pairs' 44
    tiles two are left for six."""
    portions = shared_out(BLOCKS, 15)
    cuts = [cut_of(batch(16384, **portion.fields()), 128 * portion.cluster, 8, portion) for portion in portions]
    assert cuts == [(105, 5), (42, 3)]


def test_lengths_are_not_read_where_there_are_many_rows() -> None:
    asked.clear()
    limit = BLOCKS * CUT_ROUNDS // 8 * 48
    assert cut_of(batch(limit + 1), 48, 8) == (0, 1) and not asked
    assert cut_of(batch(512, tokens=limit + 1), 48, 8) == (0, 1) and not asked, "spare rows may be queries"
    assert cut_of(batch(300), 48, 8) == (0, 2) and asked
    asked.clear()
    assert cut_of(batch(1024, cut_rounds=1), 48, 8) == (0, 1) and not asked, "two rounds are more than one"


def test_X12_nothing_is_cut_where_the_host_says_so() -> None:
    asked.clear()
    assert cut_of(batch(1, cut_rounds=0), 48, 8) == (0, 1) and not asked


TABLES = *FLASH_SM90_LONE_TILES, FLASH_SM90_PAIR_TILES, FLASH_SM90_EIGHT_TILES
TILES = [pair for table in TABLES for pair in table.items()]
OUTPUTS = [(sizes[1] if isinstance(sizes, tuple) else sizes, tile) for sizes, tile in TILES]


@pytest.mark.parametrize(("head_dim_v", "tile"), OUTPUTS, ids=str)
def test_the_workspace_has_room_for_all_states(head_dim_v: int, tile: Any) -> None:
    warps = tile.m // 16
    states = BLOCKS // tile.cluster * parts.STATES * tile.cluster * warps * 32 * (head_dim_v // 2 + 4) * 4
    assert states <= scratch.posts_at(BLOCKS) and warps <= scratch.MOST_WARPS and parts.STATES == scratch.PARTS_AN_SM
