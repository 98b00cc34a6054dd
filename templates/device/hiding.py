"""Turns scores into those that a row may see: -inf for keys past the last, out of a causal row's sight, without a page.

A thread has two of every 8 columns of two rows, eight apart. What a row sees of them is a word of bits, of which the
assembler makes predicates seven at a time: 64 scores take about 100 instructions; by comparisons, one by one, 130, or
240 with a window.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from pa_ops.templates.device.packing import token_of
from pa_ops.templates.device.ptx import ld_shared_32
from pa_ops.templates.device.ptx_masks import low_bits
from pa_ops.templates.device.shared_sm90 import END, KEYS, POSITION
from pa_ops.templates.device.warpgroup import row_of

WINDOW_OFF = 0x3FFFFFFF  # of no key it is that far


class Hiding:
    """What a mask and missing pages hide of blocks of `keys` keys."""

    def __init__(self, causal, window, masked, keys):
        if keys > 128:
            raise ValueError(f"a word has bits for the columns of 128 keys, not of {keys}")
        self.causal, self.window, self.masked, self.keys = causal, window, masked, keys

    def columns(self):
        """(index of its score in the accumulator's row 0, bit) of each of a thread's columns."""
        for column in range(self.keys // 4):
            yield column // 2 * 4 + column % 2, Int32((1 << column) - (1 << 32 if column == 31 else 0))

    def hide(self, args, acc_s, slot, i):
        """-inf for keys past the last, after the row's own position, before its window, in block `i` of the tile."""
        thread, _, _ = cute.arch.thread_idx()
        first = ld_shared_32(slot + POSITION)
        keys = ld_shared_32(slot + KEYS)
        column = (ld_shared_32(slot + END) - 1 - i) * self.keys + (thread & 3) * 2
        for r in range(2):
            here = first + token_of(args, self.masked, row_of(thread) + r * 8)
            stop = (cutlass.min(keys, here + 1) if self.causal or self.window else keys) - column
            begin = here - args.window + 1 - column
            if self.masked:
                stop = cutlass.select_(args.causal != 0, cutlass.min(keys, here + 1), keys) - column
                begin = cutlass.select_(args.window > 0, begin, Int32(-WINDOW_OFF))
            seen = columns_before(stop)
            if self.window or self.masked:
                seen = seen & ~columns_before(begin)
            for at, bit in self.columns():
                score = acc_s[at + r * 2]
                acc_s[at + r * 2] = cutlass.select_((seen & bit) != 0, score, Float32(-Float32.inf))

    def hide_holes(self, args, acc_s, hole, turn):
        """-inf for keys without a page: `hole` has a bit for each box of the block's keys. `turn` is 0."""
        for nt in range(self.keys // 8):
            box = Uint32(nt * 8 + turn) // Uint32(args.box_rows)
            drop = ((Uint32(hole) >> box) & 1) != 0
            for i in range(4):
                acc_s[nt * 4 + i] = cutlass.select_(drop, Float32(-Float32.inf), acc_s[nt * 4 + i])


def columns_before(stop):
    """A bit for each of a thread's columns, two of every eight, whose key, counted from its first, is before `stop`."""
    return low_bits(cutlass.max((stop >> 3) * 2 + cutlass.min(stop & 7, 2), 0))
