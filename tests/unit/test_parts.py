"""How the last tiles are cut for all SMs, by parts.py and stretches.py of templates/device, with plain numbers."""

from __future__ import annotations

from contextlib import suppress
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
            with suppress(ZeroDivisionError):  # whatever follows a vote that is not yet all lanes'
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


def length_at(lengths: tuple[int, ...], index: int, total: int) -> tuple[int, int]:
    """As worklist.py has it, of which only the length is asked for."""
    return -1, min(lengths[index], total) if lengths else 0


WORKLIST = {"find_tile": find_tile, "length_at": length_at, "tiles_of": ceil_div}


warp = Warp()
QUOTIENTS = plain.run("quotients", {})
Portions = plain.run("portions", {"quotients": QUOTIENTS})["Portions"]
found = plain.run(
    "parts", {"quotients": QUOTIENTS, "worklist": WORKLIST}, lane_idx=lambda: warp.lane, warp_redux_sync=warp.reduced
)
parts = SimpleNamespace(**found)
NAMES = {name: value for name, value in found.items() if not name.startswith("__")}
stretches = SimpleNamespace(**plain.run("stretches", {"parts": NAMES, "quotients": QUOTIENTS, "worklist": WORKLIST}))


def batch(*lengths: int, **args: int) -> Any:
    """A kernel's arguments."""
    usual = {"tokens": sum(lengths), "sequences": len(lengths), "skip_up_to": 0, "cut_rounds": CUT_ROUNDS}
    return SimpleNamespace(lengths=lengths, cu_seqlens_q=lengths, **{**usual, **args})


def cut_of(args: Any, tokens: int, heads: int, portion: Portion | None = None, by: Any = parts) -> Any:
    """The cut of a batch, for one grid or one of two, by one of the two ways."""
    clusters = BLOCKS if portion is None else portion.clusters
    portions = Portions(SimpleNamespace(count=lambda: clusters), portion is not None)
    return warp.run(by.cut_of, args, portions, tokens, heads, clusters)


def check_parts(by: Any, cut: Any, ranks: int, steps: int) -> list[int]:
    """The parts of all ranks are all blocks of all tiles, each once, and no two states are one; each rank's blocks."""
    of_tile: dict[int, list[Any]] = {}
    done = [0] * ranks
    for rank in range(ranks):
        for second in range(1 + by.goes_on(cut, rank, 0)):
            tile, number = by.tile_of(cut, rank, second)
            part = by.part_of(cut, rank, second, number, steps)
            if part.begin < part.stop or part.number == 0:
                of_tile.setdefault(tile, []).append(part)
                done[rank] += part.stop - part.begin
    assert [*of_tile] == [*range(by.tile_of(cut, ranks, 0)[0])] and by.tile_of(cut, ranks, 0)[1] == 0
    for tile, mine in of_tile.items():
        assert [block for part in mine for block in range(part.begin, part.stop)] == [*range(steps)]
        assert [part.number for part in mine] == [*range(len(mine))] and {part.of for part in mine} == {len(mine)}
        assert len({part.state - part.number for part in mine}) == 1, "they arrive at one counter"
        assert tile >= cut.whole or len(mine) == 1
    states = [part.state for mine in of_tile.values() for part in mine if part.of > 1]
    assert len(states) == len(set(states)) and max(states, default=0) < BLOCKS * parts.STATES
    for past in range(3):
        tile, number = by.tile_of(cut, ranks + past, 0)
        assert by.ranks_past(cut, tile - len(of_tile), number) == past
    return done


@given(st.integers(0, 20_000), st.integers(1, parts.MOST), st.integers(0, 2), st.integers(0, 20))
def test_parts_of_tiles_are_all_blocks_each_once(steps: int, most: int, rounds: int, later: int) -> None:
    whole = rounds * BLOCKS
    done = check_parts(parts, parts.Cut(whole, most), whole + later * most, steps)
    assert done == check_parts(stretches, stretches.Row(whole, most, 1), whole + later * most, steps)
    cut = [count for count in done[whole:] if count]
    assert len(cut) <= later or min(cut) >= parts.LEAST


@given(st.integers(0, 5000), st.integers(1, BLOCKS), st.integers(0, 2), st.data())
def test_a_round_of_stretches_is_all_blocks_and_every_rank_has_as_many(
    steps: int, blocks: int, rounds: int, data: st.DataObject
) -> None:
    tiles, whole = data.draw(st.integers(1, blocks)), rounds * blocks
    ranks = min(blocks, tiles * parts.MOST)
    done = check_parts(stretches, stretches.Row(whole, ranks, tiles), whole + ranks, steps)
    assert done[:whole] == [steps] * whole
    if steps >= parts.LEAST * (ranks // tiles + 2):  # else tiles have fewer parts than there are ranks
        assert all(abs(count - steps * tiles / ranks) <= 3 for count in done[whole:])


@pytest.mark.parametrize("by", [parts, stretches], ids=["parts", "stretches"])
@given(st.lists(st.integers(0, 700), max_size=12), st.integers(0, 4), st.sampled_from((3, 48, 64, 192)))
def test_only_the_last_round_is_cut_and_there_is_room_for_its_states(
    by: Any, lengths: list[int], skip: int, tokens: int
) -> None:
    for heads in (1, 8, 32, 200):
        args = batch(*lengths, skip_up_to=skip)
        tiles = tiles_of(args, tokens) * heads
        whole, cut, *length = cut_of(args, tokens, heads, by=by)
        assert whole in (0, tiles // BLOCKS * BLOCKS)
        rest, grains = tiles - whole, (length or [1])[0]
        assert 1 <= cut <= (parts.MOST if grains == 1 else min(BLOCKS, rest * parts.MOST)) and grains in (1, rest)
        if cut > 1:
            assert 0 < rest < BLOCKS and rest * cut // grains <= BLOCKS * scratch.PARTS_AN_SM
            assert ceil_div(rest * cut // grains, BLOCKS) * grains < cut, "the round ends sooner"


@pytest.mark.parametrize(
    ("tiles", "whole", "cut"),
    [
        *((8, 0, 8), (24, 0, 5), (66, 0, 2), (88, 0, 3), (132, 132, 1)),
        *((1376, 1320, 2), (1024, 924, 5), (2816, 0, 1), (0, 0, 1)),
    ],
)
def test_parts_of_some_batches(tiles: int, whole: int, cut: int) -> None:
    assert cut_of(batch(*[48] * tiles), 48, 1) == (whole, cut)
    assert cut_of(batch(*[48] * tiles), 48, 1, by=stretches) == (whole, cut, 1), "of many sequences"


@pytest.mark.parametrize(
    ("tiles", "row"),
    [
        *((1, (0, 8, 1)), (28, (0, 4, 1)), (66, (0, 2, 1)), (100, (0, 5, 1)), (128, (0, 1, 1)), (132, (132, 1, 1))),
        *((688, (660, 4, 1)), (1024, (924, 132, 100)), (2816, (0, 1, 1)), (0, (0, 1, 1))),
    ],
)
def test_stretches_are_for_the_last_round_of_one_long_sequence(tiles: int, row: tuple[int, ...]) -> None:
    assert cut_of(batch(48 * tiles), 48, 1, by=stretches) == row
    assert cut_of(batch(48 * tiles, 48), 48, 1, by=stretches).length == 1, "tiles may not be alike"


def test_two_grids_cut_the_last_rounds_of_their_own_tiles() -> None:
    """As an H200 does 16k rows of eight heads, by tiles of 1024: 117 of 128 units are the eights', and of the pairs' 44
    tiles two are left for six."""
    portions = shared_out(BLOCKS, 15)
    cuts = [cut_of(batch(16384, **portion.fields()), 128 * portion.cluster, 8, portion) for portion in portions]
    assert cuts == [(105, 5), (42, 3)]
    cuts = [cut_of(batch(16384, **one.fields()), 128 * one.cluster, 8, one, by=stretches) for one in portions]
    assert cuts == [(105, 15, 12), (42, 3, 1)]


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
