"""Tiles of two grids: turns the ranks that one of them counts for itself into tiles of the batch.

Not every SM of a device can be in a cluster of four: of an H200's 132 there are 120. Pairs have the others, by a grid
beside the fours'. Both know the same *units*, the fours' tiles, and every so many-th is the pairs', which take it by
halves. So each grid has tickets, rounds and parts of its own, and the two end at about the same time.
"""

import cutlass
from cutlass import Int32

from pa_ops.templates.device.quotients import divided


def unit_of(args, tile):
    """(the unit of this grid's tile of that number, which of its halves the tile is): every `every`-th unit is the
    pairs', which have `halves`; where `every` is 0 there is one grid, whose tiles are the units."""
    others = cutlass.max(args.every - 1, 1)
    whole = tile + Int32(cutlass.select_(args.every > 0, divided(tile, others), Int32(0)))
    halved = (tile >> 1) * args.every + others
    return Int32(cutlass.select_(args.halves > 0, halved, whole)), tile & args.halves


def tiles_among(args, units):
    """How many tiles this grid has of so many units, of which the others are the other grid's."""
    pairs = Int32(cutlass.select_(args.every > 0, divided(units, cutlass.max(args.every, 1)), Int32(0)))
    return Int32(cutlass.select_(args.halves > 0, pairs * 2, units - pairs))
