"""Partial attention states of a row block: turns what warps and blocks found over parts of the keys into output rows.

A state is rows of fp32 outputs relative to a maximum, then (maximum, sum) a row, in base 2. Warps leave theirs in
shared memory; a block whose share was cut leaves the sum of its warps in the workspace, and the last to arrive adds
up all parts in their order, so that results depend on no timing.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from pa_ops.templates.device import softmax
from pa_ops.templates.device.ptx import (
    arrive,
    ex2,
    fence,
    ld_global_f32_cg,
    ld_global_f32x4,
    ld_shared_32,
    ld_shared_f32,
    ld_shared_f32x4,
    lg2,
    pack_pair,
    rcp,
    st_global_64,
    st_global_f32,
    st_global_f32x4,
    st_global_i32,
    st_shared_32,
    st_shared_f32x2,
)
from pa_ops.templates.device.shares import owner_of

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
WARPS = 4
THREADS = WARPS * 32


class States:
    """States of `rows` rows of `head_dim` outputs, and the code that merges them."""

    def __init__(self, dtype, head_dim, rows, news_at):
        self.dtype, self.head_dim, self.rows = dtype, head_dim, rows
        self.floats = rows * (head_dim + 2)
        self.news_at = news_at  # of a word of shared memory that tells the block how many parts have arrived

    def publish(self, smem, acc_o, row_max, row_sum, log2_scale, warp, lane):
        """This warp's state into shared memory, from accumulators of mma.m16n8k16."""
        d_tiles = self.head_dim // 8
        state = smem + warp * (self.floats * 4)
        for mt in range(self.rows // 16):
            for r in range(2):
                row = mt * 16 + r * 8 + (lane >> 2)
                for dt in range(d_tiles):
                    at = (mt * d_tiles + dt) * 4 + r * 2
                    column = dt * 8 + (lane & 3) * 2
                    st_shared_f32x2(state + (row * self.head_dim + column) * 4, acc_o[at], acc_o[at + 1])
                total = softmax.quad(row_sum[mt * 2 + r], lambda a, b: a + b)
                top = row_max[mt * 2 + r] * log2_scale
                st_shared_f32x2(state + (self.rows * self.head_dim + row * 2) * 4, top, total)

    @cute.jit
    def settle(
        self,
        args,
        smem: Int32,
        total: Int32,
        start: Int32,
        stop: Int32,
        q_start: Int32,
        kv_head: Int32,
        row_first: Int32,
        live_rows: Int32,
        tid: Int32,
    ):
        """Leave this part's state in the workspace; the last part of tiles [start, stop) to arrive merges them all."""
        block, _, _ = cute.arch.block_idx()
        opener = owner_of(start, total)
        parts = owner_of(stop - 1, total) - opener + 1
        slot = Int32(cutlass.select_(block == opener, Int32(1), Int32(0)))
        self.leave(args, smem, Int64(block * 2 + slot), tid)
        fence()
        cute.arch.barrier()
        counter = args.counters + Int64(opener) * 4
        if tid == 0:
            st_shared_32(smem + self.news_at, arrive(counter))
        cute.arch.barrier()
        if ld_shared_32(smem + self.news_at) == parts - 1:
            fence()
            if tid == 0:
                st_global_i32(counter, Int32(0))
            self.finish(args, smem, Int64(opener), parts, q_start, kv_head, row_first, live_rows, tid)

    def row_of(self, tid):
        """(row, first column, columns) of a thread, when the block's threads share out rows of outputs."""
        per_row = THREADS // self.rows
        return tid // per_row, tid % per_row * 4, per_row * 4

    def slot(self, args, slot):
        """The address of a state in the workspace."""
        return args.partials + slot * (self.floats * 4)

    def leave(self, args, smem, slot, tid):
        """Merge the warps' states and write the result to the workspace: outputs, then (maximum, sum) a row."""
        row, column, step = self.row_of(tid)
        weights, top, total = self.warp_weights(smem, row)
        target = self.slot(args, slot)
        for at in range(0, self.head_dim, step):
            values = self.mix_warps(smem, row, column + at, weights)
            st_global_f32x4(target + Int64((row * self.head_dim + column + at) * 4), values)
        stats = target + Int64((self.rows * self.head_dim + row * 2) * 4)
        st_global_f32(stats, top, column == 0)
        st_global_f32(stats + 4, total, column == 0)

    def warp_weights(self, smem, row):
        """(factor of each warp's outputs, common maximum, sum) of a row; base 2."""
        tops, sums = [], []
        for w in range(WARPS):
            stats = smem + w * (self.floats * 4) + (self.rows * self.head_dim + row * 2) * 4
            tops.append(ld_shared_f32(stats))
            sums.append(ld_shared_f32(stats + 4))
        top = tops[0]
        for other in tops[1:]:
            top = cute.arch.fmax(top, other)
        base = Float32(cutlass.select_(top == -Float32.inf, Float32(0.0), top))
        weights = [ex2(t - base) for t in tops]
        total = Float32(0.0)
        for weight, part in zip(weights, sums, strict=True):
            total = total + weight * part
        return weights, top, total

    def mix_warps(self, smem, row, column, weights):
        """Four neighbouring outputs of a row, summed over the warps in order."""
        values = [Float32(0.0)] * 4
        for w, weight in enumerate(weights):
            part = ld_shared_f32x4(smem + w * (self.floats * 4) + (row * self.head_dim + column) * 4)
            values = [value + weight * x for value, x in zip(values, part, strict=True)]
        return values

    @cute.jit
    def finish(
        self,
        args,
        smem: Int32,
        opener: Int64,
        parts: Int32,
        q_start: Int32,
        kv_head: Int32,
        row_first: Int32,
        live_rows: Int32,
        tid: Int32,
    ):
        """Write output rows and LSE, from the warps' states (no parts) or from the parts in the workspace."""
        row, column, step = self.row_of(tid)
        line = row_first + row
        token = q_start + line // args.group
        head = kv_head * args.group + line % args.group
        values = cute.make_rmem_tensor((self.head_dim // step * 4,), Float32)
        values.fill(0.0)
        top, total = Float32(-Float32.inf), Float32(0.0)
        if parts == 0:
            top, total = self.take_warps(smem, row, column, step, values)
        for part in cutlass.range(parts, unroll=4):  # several parts on their way at once
            slot = opener * 2 + Int64(part) * 2 + Int64(cutlass.select_(part == 0, Int32(1), Int32(0)))
            top, total = self.take_part(self.slot(args, slot), row, column, step, values, top, total)
        sink = Float32(-Float32.inf)
        if (args.sinks != 0) & (row < live_rows):
            sink = softmax.sink_of(self.dtype, args, head) * LOG2_E
        peak = cute.arch.fmax(top, sink)
        base = Float32(cutlass.select_(peak == -Float32.inf, Float32(0.0), peak))
        denominator = total * ex2(top - base) + ex2(sink - base)
        # By select: a row that sees no key gives zeros, whatever its accumulator holds.
        scale = Float32(cutlass.select_(total == 0.0, Float32(0.0), ex2(top - base) * rcp(denominator)))
        lse = Float32(cutlass.select_(denominator > 0.0, (lg2(denominator) + base) * LN_2, Float32(-Float32.inf)))
        lse_at = args.lse + Int64(head) * args.lse_head_stride + Int64(token) * 4
        st_global_f32(lse_at, lse, (column == 0) & (row < live_rows) & (args.lse != 0))
        target = args.out + Int64(token) * args.out_token_stride + Int64(head) * args.out_head_stride
        self.write_row(args, target, column, step, values, scale, row < live_rows)

    def take_warps(self, smem, row, column, step, values):
        """Put the sum of the warps' outputs into `values`; the row's maximum and sum."""
        weights, top, total = self.warp_weights(smem, row)
        for i in range(self.head_dim // step):
            mixed = self.mix_warps(smem, row, column + i * step, weights)
            for k in range(4):
                values[i * 4 + k] = mixed[k]
        return top, total

    def take_part(self, source, row, column, step, values, top, total):
        """Add a part of the workspace to `values`; the new maximum and sum."""
        stats = source + Int64((self.rows * self.head_dim + row * 2) * 4)
        part_top, part_sum = ld_global_f32_cg(stats), ld_global_f32_cg(stats + 4)
        peak = cute.arch.fmax(top, part_top)
        base = Float32(cutlass.select_(peak == -Float32.inf, Float32(0.0), peak))
        keep, gain = ex2(top - base), ex2(part_top - base)
        for i in range(self.head_dim // step):
            loaded = ld_global_f32x4(source + Int64((row * self.head_dim + column + i * step) * 4))
            for k in range(4):
                values[i * 4 + k] = values[i * 4 + k] * keep + loaded[k] * gain
        return peak, total * keep + part_sum * gain

    def write_row(self, args, target, column, step, values, scale, wanted):
        """A thread's outputs of one row, normalised and rounded; exactly zero where the factor is."""
        zero = Float32(0.0)
        for i in range(self.head_dim // step):
            scaled = [Float32(cutlass.select_(scale == 0.0, zero, values[i * 4 + k] * scale)) for k in range(4)]
            words = [pack_pair(self.dtype, scaled[0], scaled[1]), pack_pair(self.dtype, scaled[2], scaled[3])]
            at = column + i * step
            st_global_64(target + Int64(at) * 2, words, wanted & (at < args.head_dim))
