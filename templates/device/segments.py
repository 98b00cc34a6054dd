"""The segment that a block works on: turns a tile of its share into what attending to the tiles from there needs.

A segment is the part of a place, a head and row block of a sequence, that lies in a share, or in a chunk of it. Each
warp notes in shared memory what it has found of it: twelve words, written once and read where they are needed, cost
three loads, where finding them again costs 170 instructions and holding them registers that head size 256 has not got.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from pa_ops.templates.device.ptx import ld_shared_128, st_shared_128
from pa_ops.templates.device.quotients import by_factor, divided

BYTES = 48  # of a warp's notes


class Seen(NamedTuple):
    """What masks ask: the segment's first key, its tiles; keys minus queries, and the keys, of the sequence."""

    key: Int32
    count: Int32
    shift: Int32
    k_len: Int32


class Rows(NamedTuple):
    """The rows: the first one's number in the place's sequence and head, how many; KV head; the sequence's first."""

    first: Int32
    live: Int32
    kv_head: Int32
    q_start: Int32


def token_and_head(args, rows, row):
    """(token of the sequence, query head) of a row, `rows` being a Rows."""
    line = rows.first + row
    token = by_factor(line, args.group, args.group_factor)
    return token, rows.kv_head * args.group + line - token * args.group


class Stretch(NamedTuple):
    """Where it lies: its first tile and the place's in the row of all tiles; the place's tiles, and its first's number
    among the sequence's keys."""

    unit: Int32
    start: Int32
    tiles: Int32
    first: Int32


class Segments:
    """Notes of `warps` warps at `at` in shared memory, about shares of tiles of `rows` rows and `keys` keys."""

    def __init__(self, shares, warps, at):
        self.shares, self.at = shares, at
        self.bytes = warps * BYTES

    @cute.jit
    def enter(self, args, smem: Int32, sequence: Int32, base: Int32, unit: Int32, end: Int32, warp: Int32):
        """Note the segment from tile `unit` on, of the sequence whose tiles begin at `base`, no longer than to `end`.

        Returns where a stream of tiles stands before it: (queries, keys, place, KV head, first tile, tiles left).
        """
        q_start, q_len, k_len, first, tiles, blocks = self.shares.span(args, sequence)
        place = divided(unit - base, tiles)
        start = base + place * tiles
        tile = unit - start
        kv_head = place
        if blocks > 1:
            kv_head = divided(place, blocks)
        row_first = (place - kv_head * blocks) * self.shares.rows
        live = cutlass.min(q_len * args.group - row_first, self.shares.rows)
        count = cutlass.min(self.shares.reach(args, first, tiles, tile), end - unit)
        notes = smem + self.at + warp * BYTES
        if cute.arch.lane_idx() == 0:
            st_shared_128(notes, Seen((first + tile) * self.shares.keys, count, k_len - q_len, k_len))
            st_shared_128(notes + 16, Rows(row_first, live, kv_head, q_start))
            st_shared_128(notes + 32, Stretch(unit, start, tiles, first))
        cute.arch.sync_warp()
        return q_len, k_len, place, kv_head, first + tile, tiles - tile

    def seen(self, smem, warp):
        """The warp's Seen."""
        return Seen(*ld_shared_128(smem + self.at + warp * BYTES))

    def rows(self, smem, warp):
        """The warp's Rows."""
        return Rows(*ld_shared_128(smem + self.at + warp * BYTES + 16))

    def stretch(self, smem, warp):
        """The warp's Stretch."""
        return Stretch(*ld_shared_128(smem + self.at + warp * BYTES + 32))
