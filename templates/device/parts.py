"""Tiles whose keys several blocks share: turns the last tiles of a batch into work for every SM.

Blocks take tiles in turn, round after round; the tiles of the last round, all of them where there are few, are fewer
than there are blocks. Their blocks of keys are cut into parts, so that the round ends sooner and for all at a time.
What is cut follows from the lengths of the whole batch, and so do a sequence's bits.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from pa_ops.templates.device.quotients import divided
from pa_ops.templates.device.worklist import find_tile

LEAST = 8  # blocks of keys of a part, 10 us by 192 x 80
MOST = 16  # parts of a tile, fewer than lanes: a warp adds up their states in turn, 1 us each
STATES = 4  # a block that the workspace has room for
ONE = 1 << 16  # the time of a tile
COST = ONE // 64  # of a part more: its state is left and added up, a us each, beside 130 for a tile of 8k keys


class Cut(NamedTuple):
    """Ranks below `whole` are tiles; from there on each tile has `parts` ranks."""

    whole: Int32
    parts: Int32


class Part(NamedTuple):
    """Blocks [begin, stop) of a tile's; the number of this part, how many there are, the number of its state."""

    begin: Int32
    stop: Int32
    number: Int32
    of: Int32
    state: Int32


@cute.jit
def last_round(args, portions: cutlass.Constexpr, tokens: Int32, heads: Int32, blocks: Int32):
    """(tiles before the last round, parts of each from there on, how many there are) of this grid's tiles, for its
    `blocks` blocks, of a batch whose tiles of so many tokens are there for so many heads each."""
    whole, parts, rest = Int32(0), Int32(1), Int32(0)
    unit, tiles_among = portions.tokens_of_unit(args, tokens), portions.tiles_among
    limit = divided(portions.at_once(args) * args.cut_rounds, heads)
    # So many rows of q make too many units if sequences have them all: then lengths are not read, and nothing is cut.
    if (args.cut_rounds > 0) & (args.tokens - args.sequences * args.skip_up_to <= limit * unit):
        sequence, beyond = find_tile(args, unit, limit)
        if sequence < 0:
            tiles = tiles_among(args, (limit - beyond) * heads)
            whole = divided(tiles, blocks) * blocks
            rest = tiles - whole
            parts = best(rest, blocks)
    return whole, parts, rest


def cut_of(args, portions, *here):
    """The Cut of a batch, `here` being as in `last_round`."""
    whole, parts, _ = last_round(args, portions, *here)
    return Cut(whole, parts)


def best(tiles, blocks):
    """The parts by which fewer than `blocks` tiles are soonest done: a number a lane."""
    number = cute.arch.lane_idx() + 1
    cost = cost_of(tiles, number, blocks)
    there = (number <= MOST) & (tiles * number <= blocks * STATES)
    return cute.arch.warp_redux_sync(Int32(cutlass.select_(there, cost, Int32(ONE * 2))) * 32 + number, "min") % 32


def cost_of(tiles, parts, blocks):
    """When so many tiles, in so many parts each, are done."""
    rounds = divided(tiles * parts + (blocks - 1), blocks)
    return divided(rounds * ONE, parts) + parts * COST


def uncut():
    """The Cut of a batch whose tiles are all whole."""
    return Cut(Int32(0), Int32(1))


@cute.jit
def tile_of(cut: Cut, rank: Int32, second):
    """(the tile of that rank, the number of its part): no rank has a `second` one."""
    tile, number = rank, Int32(0)
    if (cut.parts > 1) & (rank >= cut.whole):
        beyond = divided(rank - cut.whole, cut.parts)
        tile, number = cut.whole + beyond, rank - cut.whole - beyond * cut.parts
    return tile, number


def goes_on(cut, rank, second):
    """Whether the rank has a part of the tile after, too."""
    return Int32(0)


def ranks_past(cut, tiles, number):
    """How many ranks after the last one that is, of a part of the tile so many `tiles` after the last."""
    return tiles * cut.parts + number


@cute.jit
def part_of(cut: Cut, rank: Int32, second, number: Int32, steps: Int32):
    """The part of that rank and number, where the tile has `steps` blocks of keys: short ones have fewer parts, and
    those beyond begin after the last block."""
    begin, stop, of = Int32(0), steps, Int32(1)
    if (cut.parts > 1) & (rank >= cut.whole):
        of = cutlass.max(cutlass.min(divided(steps, LEAST), cut.parts), 1)
        begin = cutlass.min(divided(steps * number, of), steps)
        stop = cutlass.min(divided(steps * (number + 1), of), steps)
    return Part(begin, stop, number, of, rank - cut.whole)
