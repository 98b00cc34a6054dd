"""Partial attention states of a row block: turns what warps and blocks found over parts of the keys into output rows.

A state is rows of fp32 outputs relative to a maximum, then (maximum, sum) a row, in base 2. Warps leave theirs in
shared memory; a block whose share was cut leaves the sum of its warps in the workspace, and the last to arrive adds
up all parts in their order, so that results depend on no timing. Rows that do not exist are neither moved nor added.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from pa_ops.templates.device import softmax
from pa_ops.templates.device.ptx import (
    arrive,
    ex2,
    fma,
    ld_global_f32x2,
    ld_global_f32x4,
    ld_shared_32,
    ld_shared_f32x2,
    ld_shared_f32x4,
    lg2,
    rcp,
    st_global_64,
    st_global_f32,
    st_global_f32x4,
    st_global_i32,
    st_shared_32,
    st_shared_f32x2,
)

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
WARPS = 4
THREADS = WARPS * 32
ROWS = 16  # of mma.m16n8k16
STATS_BYTES = WARPS * ROWS * 8


def joint(top, other):
    """(maximum, factor of the first, factor of the other) of what was summed relative to two maxima; base 2."""
    peak = cute.arch.fmax(top, other)
    base = Float32(cutlass.select_(peak == -Float32.inf, Float32(0.0), peak))
    return peak, ex2(top - base), ex2(other - base)


def mix(value, keep, other, gain):
    """`value` * `keep` + `other` * `gain`, rounded in one way, wherever it is compiled: results must be one's bits."""
    return fma(value, keep, other * gain)


class States:
    """States of ROWS rows of `head_dim` outputs, and the code that merges them.

    The block's threads share rows out so that the few that exist occupy all warps: `lanes` neighbours have a row, and
    each of them every `lanes`-th run of four outputs. Shared memory: outputs of warps, `warp_bytes` apart, wherever the
    caller has room at the time; all maxima and sums at `stats_at`, then a word of news for the block.
    """

    def __init__(self, dtype, head_dim, warp_bytes, stats_at):
        runs = head_dim // 4
        self.dtype, self.head_dim, self.warp_bytes, self.stats_at = dtype, head_dim, warp_bytes, stats_at
        self.news_at = stats_at + STATS_BYTES
        self.floats = ROWS * (head_dim + 2)
        self.lanes = min(32, runs & -runs)
        self.rows_a_pass = THREADS // self.lanes
        self.runs = range(runs // self.lanes)
        self.batch = 16 // len(self.runs)  # states that are on their way at a time: 16 bytes each and run

    def passes_of(self, live_rows):
        """Rounds in which the block's threads come by all live rows; a loop, because every copy of it is fetched."""
        return (live_rows + (self.rows_a_pass - 1)) // self.rows_a_pass

    def row_of(self, step, tid):
        """The row that a thread works on in a pass."""
        return step * self.rows_a_pass + tid // self.lanes

    def column_of(self, run, tid):
        """The first of the four outputs that make a thread's run."""
        return (tid % self.lanes + run * self.lanes) * 4

    @cute.jit
    def publish(
        self, smem: Int32, outputs: Int32, acc_o, row_max, row_sum, log2_scale: Float32, live_rows: Int32, warp: Int32
    ):
        """This warp's state into shared memory, from accumulators of mma.m16n8k16.

        Runs of four outputs are xor-ed by the row: eight rows of a store then fall into different banks.
        """
        lane = cute.arch.lane_idx()
        for r in cutlass.range_constexpr(2):
            row = r * 8 + (lane >> 2)
            st_shared_f32x2(self.stats(smem, warp, row), row_max[r] * log2_scale, softmax.quad_sum(row_sum[r]))
            if row < live_rows:
                for dt in cutlass.range_constexpr(self.head_dim // 8):
                    target = self.outputs(outputs, warp, row, dt * 2 + ((lane & 3) >> 1)) + (lane & 1) * 8
                    st_shared_f32x2(target, acc_o[dt * 4 + r * 2], acc_o[dt * 4 + r * 2 + 1])

    def outputs(self, first, warp, row, run):
        """Shared address of the `run`-th four outputs of a warp's row, `first` being that of warp 0's."""
        return first + warp * self.warp_bytes + (row * (self.head_dim // 4) + (run ^ ((row & 3) * 2))) * 16

    def stats(self, smem, warp, row):
        """Shared address of (maximum, sum) of a warp's row."""
        return smem + self.stats_at + (warp * ROWS + row) * 8

    @cute.jit
    def leave(self, args, smem: Int32, outputs: Int32, part, live_rows: Int32, tid: Int32):
        """Leave a part (cuts.py) in the workspace; whether the rows are now for this block to finish.

        A state there is the sum of the warps' outputs, then (maximum, sum) a row, with what the block had left before
        of the same rows where the part joins that.
        """
        target = self.state(args, (part.base, part.skip, part.step), part.mine)
        for turn in cutlass.range(self.passes_of(live_rows), unroll=1):
            row = self.row_of(turn, tid)
            live = row < live_rows
            before = self.load_state(target, live, part.more != 0, row, tid)
            weights, top, total = self.warp_weights(smem, row)
            peak, keep, gain = joint(before[0], top)
            for run in self.runs:
                column = self.column_of(run, tid)
                mixed = self.mix_warps(outputs, row, column, weights)
                values = [mix(before[2][run * 4 + k], keep, mixed[k], gain) for k in range(4)]
                st_global_f32x4(target + Int64((row * self.head_dim + column) * 4), values, live)
            stats = target + Int64((ROWS * self.head_dim + row * 2) * 4)
            first = live & (tid % self.lanes == 0)
            cute.arch.sync_warp()  # all lanes of a row have read its maximum and sum
            st_global_f32(stats, peak, first)
            st_global_f32(stats + 4, mix(before[1], keep, total, gain), first)
        cute.arch.barrier()
        counter = args.counters + Int64(part.counter) * 4
        if tid == 0:  # releases what the whole block has left, and acquires what the others did
            others = Int32(cutlass.select_(part.last != 0, part.states - 1, -1))
            if part.meets != 0:
                others = arrive(counter)
            st_shared_32(smem + self.news_at, others)
        cute.arch.barrier()
        last = ld_shared_32(smem + self.news_at) == part.states - 1
        if last & (part.meets != 0) & (tid == 0):
            st_global_i32(counter, Int32(0))
        return last

    def state(self, args, where, number):
        """The address of a place's state `number`; `where`: base, skip and step of its Part."""
        base, skip, step = where
        later = Int32(cutlass.select_(number > 0, skip + number * step, Int32(0)))
        return args.partials + Int64(base + later) * (self.floats * 4)

    def warp_weights(self, smem, row):
        """(factor of each warp's outputs, common maximum, sum) of a row; base 2."""
        tops, sums = zip(*(ld_shared_f32x2(self.stats(smem, w, row)) for w in range(WARPS)), strict=True)
        top = tops[0]
        for other in tops[1:]:
            top = cute.arch.fmax(top, other)
        base = Float32(cutlass.select_(top == -Float32.inf, Float32(0.0), top))
        weights = [ex2(t - base) for t in tops]
        total = Float32(0.0)
        for weight, part in zip(weights, sums, strict=True):
            total = total + weight * part
        return weights, top, total

    def mix_warps(self, outputs, row, column, weights):
        """Four neighbouring outputs of a row, summed over the warps in order."""
        values = [Float32(0.0)] * 4
        for w, weight in enumerate(weights):
            part = ld_shared_f32x4(self.outputs(outputs, w, row, column // 4))
            values = [value + weight * x for value, x in zip(values, part, strict=True)]
        return values

    @cute.jit
    def finish(
        self,
        args,
        smem: Int32,
        outputs: Int32,
        where,
        states: Int32,
        q_start: Int32,
        kv_head: Int32,
        row_first: Int32,
        live_rows: Int32,
        tid: Int32,
    ):
        """Write output rows and LSE, from the warps' states, or from those in the workspace where there are any."""
        values = cute.make_rmem_tensor((len(self.runs) * 4,), Float32)
        stats = cute.make_rmem_tensor((2,), Float32)  # maximum and sum
        for step in cutlass.range(self.passes_of(live_rows), unroll=1):
            row = self.row_of(step, tid)
            values.fill(0.0)
            stats[0], stats[1] = -Float32.inf, Float32(0.0)
            if states == 0:
                self.take_warps(smem, outputs, row, values, stats, tid)
            for first in cutlass.range(0, states, self.batch, unroll=1):
                self.take_states(args, where, first, states, row, live_rows, values, stats, tid)
            if row < live_rows:
                self.write_row(args, values, stats[0], stats[1], q_start, kv_head, row_first + row, tid)

    def take_warps(self, smem, outputs, row, values, stats, tid):
        """Put the sums of the warps' outputs into `values`, the row's maximum and sum into `stats`."""
        weights, stats[0], stats[1] = self.warp_weights(smem, row)
        for run in self.runs:
            mixed = self.mix_warps(outputs, row, self.column_of(run, tid), weights)
            for k in range(4):
                values[run * 4 + k] = mixed[k]

    def take_states(self, args, where, first, states, row, live_rows, values, stats, tid):
        """Add states from number `first` on to `values`; all loads of the batch are on their way before one is used."""
        loaded = []
        for number in (first + i for i in range(self.batch)):
            source = self.state(args, where, number)
            loaded.append(self.load_state(source, row < live_rows, number < states, row, tid))
        for top, total, outputs in loaded:
            peak, keep, gain = joint(stats[0], top)
            stats[0] = peak
            stats[1] = mix(stats[1], keep, total, gain)
            for i, output in enumerate(outputs):
                values[i] = mix(values[i], keep, output, gain)

    def load_state(self, source, live, there, row, tid):
        """(maximum, sum, outputs) of a thread in a row of a state: those of no keys where there is no such state."""
        wanted = there & live
        top, total = ld_global_f32x2(source + Int64((ROWS * self.head_dim + row * 2) * 4), wanted)
        outputs = []
        for run in self.runs:
            at = row * self.head_dim + self.column_of(run, tid)
            outputs += ld_global_f32x4(source + Int64(at * 4), wanted)
        return Float32(cutlass.select_(there, top, Float32(-Float32.inf))), total, outputs

    @cute.jit
    def write_row(
        self, args, values, top: Float32, total: Float32, q_start: Int32, kv_head: Int32, line: Int32, tid: Int32
    ):
        """A thread's outputs of one row, normalised and rounded, and the row's LSE."""
        token = q_start + line // args.group
        head = kv_head * args.group + line % args.group
        sink = Float32(-Float32.inf)
        if args.sinks != 0:
            sink = softmax.sink_of(self.dtype, args, head) * LOG2_E
        peak = cute.arch.fmax(top, sink)
        base = Float32(cutlass.select_(peak == -Float32.inf, Float32(0.0), peak))
        denominator = total * ex2(top - base) + ex2(sink - base)
        # By select: a row that sees no key gives zeros, whatever its accumulator holds.
        scale = Float32(cutlass.select_(total == 0.0, Float32(0.0), ex2(top - base) * rcp(denominator)))
        lse = Float32(cutlass.select_(denominator > 0.0, (lg2(denominator) + base) * LN_2, Float32(-Float32.inf)))
        lse_at = args.lse + Int64(head) * args.lse_head_stride + Int64(token) * 4
        st_global_f32(lse_at, lse, (tid % self.lanes == 0) & (args.lse != 0))
        target = args.out + Int64(token) * args.out_token_stride + Int64(head) * args.out_head_stride
        for run in cutlass.range_constexpr(len(self.runs)):
            words = [softmax.scaled_pair(self.dtype, values[i], values[i + 1], scale) for i in (run * 4, run * 4 + 2)]
            column = self.column_of(run, tid)
            st_global_64(target + Int64(column) * 2, words, column < args.head_dim)
