"""Tiles of two grids: turns the ranks that one of them counts for itself into tiles of the batch.

Not every SM of a device can be in a cluster of eight: of an H200's 132 there are 120. Pairs have the others, by a grid
beside the eights'. Both know the same *units*, the eights' tiles, and every so many-th is the pairs', which take it by
quarters. So each grid has tickets, rounds and parts of its own, and the two end at about the same time.
"""

import cutlass
from cutlass import Int32

from pa_ops.templates.device.quotients import divided


class Portions:
    """Which units are a grid's, and of the pairs' which quarter: the host says which grid it is. Without `taken` there
    is one grid, of `cluster`s, and units are its tiles."""

    def __init__(self, cluster, taken):
        self.cluster, self.taken = cluster, taken

    def unit_of(self, args, tile):
        """(the unit of this grid's tile of that number, which of its quarters the tile is): every `every`-th unit is
        the pairs', which have `unit_bits`; where `every` is 0 there is one grid after all."""
        if not self.taken:
            return tile, Int32(0)
        others = cutlass.max(args.every - 1, 1)
        whole = tile + Int32(cutlass.select_(args.every > 0, divided(tile, others), Int32(0)))
        quartered = (tile >> args.unit_bits) * args.every + others
        return Int32(cutlass.select_(args.unit_bits > 0, quartered, whole)), tile & ((1 << args.unit_bits) - 1)

    def tiles_among(self, args, units):
        """How many tiles this grid has of so many units, of which the others are the other grid's."""
        if not self.taken:
            return units
        pairs = Int32(cutlass.select_(args.every > 0, divided(units, cutlass.max(args.every, 1)), Int32(0)))
        return Int32(cutlass.select_(args.unit_bits > 0, pairs << args.unit_bits, units - pairs))

    def past(self, args, tile, unit, units):
        """How far past this grid's last tile one is whose unit is `units` past the batch's last."""
        return tile - self.tiles_among(args, unit - units) if self.taken else units

    def tokens_of_unit(self, args, tokens):
        """The tokens of a unit, where a tile has so many."""
        return tokens << args.unit_bits if self.taken else tokens

    def at_once(self, args):
        """Units that run at a time, in both grids."""
        return args.at_once if self.taken else self.cluster.count()
