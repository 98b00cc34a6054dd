"""Query rows of one thread block: turns a place in the work list into rows, where they stand, and the keys they see."""

import math
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from pa_ops.templates.device import mask_tile, pages
from pa_ops.templates.device.ptx import opaque
from pa_ops.templates.device.worklist import end_of, length_at, paged_keys


class Tile(NamedTuple):
    """Rows [first, first + count) of a sequence's queries under one head.

    They stand at [position, last] among its `k_len` keys. Some row sees keys [low, high), every row sees
    [safe_low, safe_high); those that some row sees lie in `steps` blocks, [begin, end).
    """

    sequence: Int32
    head: Int32
    first: Int32
    count: Int32
    q_start: Int32  # the sequence's first query, and its first key where keys lie one after another
    k_start: Int32
    k_len: Int32
    position: Int32
    last: Int32
    low: Int32
    safe_low: Int32
    high: Int32
    safe_high: Int32
    begin: Int32
    end: Int32
    steps: Int32


class Rows:
    """Tiles of `rows` rows, and what a mask lets them see, in blocks of `keys` keys."""

    def __init__(self, paged, causal, window, masked, rows, keys):
        self.paged, self.causal, self.window, self.masked = paged, causal, window, masked
        self.rows, self.keys = rows, keys

    def place(self, args):
        """(rank, head) of the block's tile, the rank being that among a head's.

        Blocks start in the order of x. In causal sequences 2^section_bits heads take turns, so that the longest tiles
        of them all come first; by one head after another the last one's longest would begin when the others end.
        """
        x, y, _ = cute.arch.block_idx()
        if not self.causal:
            return x, y
        bits = args.section_bits
        return x >> bits, (y << bits) | (x & ((1 << bits) - 1))

    @cute.jit
    def tile(self, args, sequence: Int32, block: Int32, head: Int32):
        """The tile of that number in its sequence, of which the last come first: in a causal one they see most keys."""
        q_start, q_len = length_at(args.cu_seqlens_q, sequence, args.tokens)
        k_start = Int32(0)
        if cutlass.const_expr(self.masked):
            k_len = mask_tile.keys_of(args, sequence)
        elif cutlass.const_expr(self.paged):
            k_len = paged_keys(args, sequence, q_len)
        else:
            k_start, k_len = length_at(args.kv_lengths, sequence, args.keys)
        stop = end_of(q_len, math.gcd(self.rows, self.keys)) - block * self.rows
        first, end_row = cutlass.max(stop - self.rows, 0), cutlass.min(stop, q_len)
        shift = args.position if self.masked else k_len - q_len
        position, last = shift + first, shift + end_row - 1
        low, safe_low, high, safe_high = self.seen(args, position, last, k_len)
        begin, end = low // self.keys, (high + (self.keys - 1)) // self.keys
        steps = cutlass.max(end - begin, 0)
        where = sequence, head, first, end_row - first, q_start, k_start, k_len, position, last
        return Tile(*where, low, safe_low, high, safe_high, begin, end, steps)

    @cute.jit
    def seen(self, args, first: Int32, last: Int32, k_len: Int32):
        """(low, safe_low, high, safe_high) of rows that stand at [first, last]: see `Tile`. Of a mask tensor's, the
        safe ones are `safe_keys`."""
        low, safe_low, high, safe_high = Int32(0), Int32(0), k_len, k_len
        if cutlass.const_expr(self.causal or self.window):
            high = cutlass.max(cutlass.min(k_len, last + 1), 0)
            safe_high = cutlass.min(k_len, first + 1)
        if cutlass.const_expr(self.window):
            low = cutlass.max(first - args.window + 1, 0)
            safe_low = last - args.window + 1
        if cutlass.const_expr(self.masked):
            if args.causal != 0:
                high = cutlass.max(cutlass.min(k_len, last + 1), 0)
            if args.window > 0:
                low = cutlass.max(first - args.window + 1, 0)
        return low, safe_low, high, safe_high

    def safe_keys(self, args, tile):
        """(safe_low, safe_high), asked for anew for every block of keys: numbers that are kept are registers too many.

        The end of what the tile sees is as good as that of its keys, for no block is beyond it.
        """
        low, high = tile.safe_low, tile.safe_high
        if self.causal or self.window:
            high = cutlass.min(tile.high, opaque(tile.position) + 1)
        if self.masked:
            first, last = opaque(tile.position), opaque(tile.last)
            low = cutlass.select_(args.window > 0, last - args.window + 1, Int32(0))
            high = cutlass.select_(args.causal != 0, cutlass.min(tile.k_len, first + 1), tile.k_len)
        return low, high

    def bases(self, args, tile):
        """Where the tile's queries begin, and its head's keys and values."""
        kv_head = tile.head // args.group
        q_rows = args.q + Int64(tile.head) * args.q_head_stride
        k_base = args.k + Int64(kv_head) * args.k_head_stride
        v_base = args.v + Int64(kv_head) * args.v_head_stride
        if self.masked:
            q_rows = q_rows + Int64(tile.sequence) * args.q_sequence_stride + Int64(tile.first) * args.q_token_stride
            k_base = k_base + Int64(tile.sequence) * args.k_page_stride
            v_base = v_base + Int64(tile.sequence) * args.v_page_stride
        else:
            q_rows = q_rows + Int64(tile.q_start + tile.first) * args.q_token_stride
            if not self.paged:
                k_base = k_base + Int64(tile.k_start) * args.k_token_stride
                v_base = v_base + Int64(tile.k_start) * args.v_token_stride
        return q_rows, k_base, v_base

    def hide(self, args, acc_s, position, column, high, stream, lane, m_tiles, n_tiles):
        """-inf wherever a row (a thread's first at `position`) must not see a key (its first at `column`)."""
        hidden = Float32(-Float32.inf)
        holes = pages.holes(stream.pages, lane) if self.paged else None
        for mt in range(m_tiles):
            for r in range(2):
                here = position + (mt * 16 + r * 8)
                end, begin = high, here - args.window + 1 - column
                if self.causal or self.window:
                    end = cutlass.min(high, here + 1)
                if self.masked:
                    end = cutlass.select_(args.causal != 0, cutlass.min(high, here + 1), high)
                    begin = cutlass.select_(args.window > 0, begin, Int32(-0x7FFFFFFF))
                end = end - column
                for nt in range(n_tiles):
                    for c in range(2):
                        drop = end <= nt * 8 + c
                        if self.window or self.masked:
                            drop = drop | (begin > nt * 8 + c)
                        if self.paged:
                            drop = drop | pages.is_hole(holes, nt * 8 + c)
                        at = (mt * n_tiles + nt) * 4 + r * 2 + c
                        acc_s[at] = cutlass.select_(drop, hidden, acc_s[at])
