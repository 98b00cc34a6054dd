"""Turns a warpgroup's accumulators into rows of the output and their LSE in global memory, straight from registers.

A thread has two neighbouring columns of each tile of eight; four lanes trade words of four tiles, so that each stores
16 bytes of one row. A trade of two lanes, for stores of 8 bytes, has 110 instructions less of 370 and is no faster.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from pa_ops.templates.device import softmax
from pa_ops.templates.device.packing import head_of, token_of
from pa_ops.templates.device.ptx import ld_shared_32, opaque, pack_pair
from pa_ops.templates.device.ptx_global import st_global, st_global_f32
from pa_ops.templates.device.quads import trade
from pa_ops.templates.device.shared_sm90 import HEAD, LIVE, TOKEN
from pa_ops.templates.device.warpgroup import row_of


class GroupStore:
    """Stores of rows of `d_tiles` tiles of eight columns, as mma.m16n8k16 leaves them."""

    def __init__(self, dtype, d_tiles, masked):
        self.dtype, self.d_tiles, self.masked = dtype, d_tiles, masked

    @cute.jit
    def store(self, args, slot: Int32, acc_o, row_max, row_sum, thread: Int32):
        """Write a computing thread's rows of the tile in `slot`."""
        live, mine = ld_shared_32(slot + LIVE), thread & 3
        rows = [row_of(thread) + r * 8 for r in range(2)]
        heads = [ld_shared_32(slot + HEAD) + head_of(args, self.masked, row) for row in rows]
        tokens = [ld_shared_32(slot + TOKEN) + token_of(args, self.masked, row) for row in rows]
        sinks = cute.make_rmem_tensor((2,), Float32)
        sinks.fill(-Float32.inf)
        if args.sinks != 0:
            for r in cutlass.range_constexpr(2):
                sinks[r] = softmax.sink_of(self.dtype, args, heads[r]) * softmax.LOG2_E
        scale, lse = softmax.finish(row_max, row_sum, args.log2_scale, sinks, 1)
        for _ in cutlass.range(opaque((scale[0] == 0.0) | (scale[1] == 0.0)), unroll=1):
            softmax.zero_rows(acc_o, scale, self.d_tiles)
        for r in cutlass.range_constexpr(2):
            lse_at = args.lse + Int64(heads[r]) * args.lse_head_stride + Int64(tokens[r]) * 4
            st_global_f32(lse_at, lse[r] * softmax.LN_2, (mine == 0) & (rows[r] < live) & (args.lse != 0))
            target = args.out + Int64(tokens[r]) * args.out_token_stride + Int64(heads[r]) * args.out_head_stride
            target = target + Int64(mine * 16)
            width = Int32(cutlass.select_(rows[r] < live, args.head_dim_v - mine * 8, Int32(0)))
            for first in cutlass.range_constexpr(0, self.d_tiles, 4):
                words = []
                for dt in cutlass.range_constexpr(first, first + 4):
                    at = dt * 4 + r * 2
                    words.append(pack_pair(self.dtype, acc_o[at] * scale[r], acc_o[at + 1] * scale[r]))
                st_global(target, first * 16, trade(words, mine), width > first * 8)
