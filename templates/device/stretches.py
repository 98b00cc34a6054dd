"""Stretches of a row of tiles: turns the last tiles of one sequence into one piece of work for every block.

As in parts.py, but the tiles of the last round lie in a row, of which every block has as long a stretch: it may end a
tile and begin the next. Blocks that took short parts as they could, four each, left four states and not one or two.
That is for tiles that are all alike, of which none takes longer; else stretches are the parts of parts.py.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from pa_ops.templates.device.parts import COST, LEAST, MOST, ONE, Part, cost_of, last_round
from pa_ops.templates.device.quotients import divided
from pa_ops.templates.device.worklist import length_at, tiles_of


class Row(NamedTuple):
    """Ranks below `whole` are tiles; those from there on are `grains` long each, of which a rank has `length`."""

    whole: Int32
    grains: Int32
    length: Int32


def uncut():
    """The Row of a batch whose tiles are all whole."""
    return Row(Int32(0), Int32(1), Int32(1))


@cute.jit
def cut_of(args, portions: cutlass.Constexpr, tokens: Int32, heads: Int32, blocks: Int32):
    """The Row of a batch, of as in parts.py so many tokens, heads and blocks: stretches are for a last round that is of
    the last sequence alone, if what they save is more than they cost, three parts more than there are blocks a tile."""
    whole, parts, rest = last_round(args, portions, tokens, heads, blocks)
    grains, length = parts, Int32(1)
    at_once, unit = portions.at_once(args), portions.tokens_of_unit(args, tokens)
    if parts > 1:
        _, last = length_at(args.cu_seqlens_q, args.sequences - 1, args.tokens)
        alike = (last > args.skip_up_to) & (tiles_of(last, unit) * heads >= at_once)
        stretches = cutlass.min(rest * MOST, blocks)
        cost = divided(rest * ONE, stretches) + (divided(stretches - 1, rest) + 3) * COST
        evenly = alike & (cost < cost_of(rest, parts, blocks))
        grains = Int32(cutlass.select_(evenly, stretches, parts))
        length = Int32(cutlass.select_(evenly, rest, Int32(1)))
    return Row(whole, grains, length)


def tile_of(row: Row, rank, second):
    """(the tile of that rank, or its `second` one, the grain of it with which the rank's stretch begins)."""
    at = cutlass.max(rank - row.whole, 0) * row.length
    beyond = divided(at, row.grains)
    tile = Int32(cutlass.select_(rank < row.whole, rank, row.whole + beyond))
    return tile + second, (at - beyond * row.grains) * (1 - second)


def goes_on(row: Row, rank, second):
    """Whether the rank's stretch is longer than what it has of its first tile, which this was if not the `second`."""
    _, grain = tile_of(row, rank, Int32(0))
    return Int32((second == 0) & (rank >= row.whole) & (grain + row.length > row.grains))


def ranks_past(row: Row, tiles, grain):
    """How many ranks after the last one that is, which begins at a grain of the tile so many `tiles` after the last."""
    return divided(tiles * row.grains + grain, row.length)


@cute.jit
def part_of(row: Row, rank: Int32, second: Int32, grain: Int32, steps: Int32):
    """The rank's part of its first tile or its `second`, from `grain` on, of `steps` blocks of keys: tiles too short
    for their parts have fewer, and those beyond begin after the last block."""
    begin, stop, number, of, state = Int32(0), steps, Int32(0), Int32(1), Int32(0)
    if (row.grains > 1) & (rank >= row.whole):
        own = rank - row.whole
        tile = divided(own * row.length, row.grains) + second
        first = divided(tile * row.grains, row.length)  # of the ranks that have a part of it
        parts = divided((tile + 1) * row.grains - 1, row.length) + 1 - first
        number, state = own - first, own + tile
        of = cutlass.max(cutlass.min(divided(steps, LEAST), parts), 1)
        grains, low = row.grains, grain
        high = cutlass.min((own + 1) * row.length - tile * row.grains, row.grains)
        if of < parts:
            grains, low, high = of, number, number + 1
        begin, stop = border(steps, low, grains, number, of), border(steps, high, grains, number + 1, of)
    return Part(begin, stop, number, of, state)


def border(steps, grain, grains, number, of):
    """The block of a tile's at that grain, where part `number` of `of` begins; parts below `of` have one at least."""
    at = cutlass.max(divided(steps * grain, grains), number)
    return cutlass.min(cutlass.min(at, cutlass.max(steps - of + number, 0)), steps)
