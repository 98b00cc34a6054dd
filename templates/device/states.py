"""Partial attention states of a row block: turns what warps and blocks found over parts of the keys into output rows.

A state is rows of fp32 outputs relative to a maximum, then (maximum, sum) a row, in base 2. Warps leave theirs in
shared memory; a block whose share was cut posts the sum of its warps to the one that finishes the row, or leaves it in
the workspace, where the last to arrive finishes. Parts are added up in their order, so that results depend on no
timing. Rows that do not exist are neither moved nor added.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from pa_ops.templates.device import softmax
from pa_ops.templates.device.answers import Answers
from pa_ops.templates.device.posts import Posts
from pa_ops.templates.device.ptx import (
    ex2,
    fma,
    ld_shared_32,
    ld_shared_f32x2,
    ld_shared_f32x4,
    opaque,
    st_shared_32,
    st_shared_f32x2,
)
from pa_ops.templates.device.ptx_global import (
    arrive,
    ld_global_f32x2,
    ld_global_f32x4,
    ld_posted,
    st_global,
    st_global_f32,
    st_global_i32,
)

WARPS = 4
THREADS = WARPS * 32
ROWS = 16  # of mma.m16n8k16
STATS_BYTES = WARPS * ROWS * 8


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
        self.together = min(2, ROWS // self.rows_a_pass)  # passes whose waits hide each other's
        self.runs = range(runs // self.lanes)
        self.batch = 16 // len(self.runs)  # states that are on their way at a time: 16 bytes each and run
        self.post_batch = 16 // len(self.runs)
        self.posts = Posts(self, ROWS)
        self.answers = Answers(dtype, self)

    def passes_of(self, live_rows, passes=1):
        """Rounds, of so many passes each, in which the block's threads come by all live rows; a loop, because every
        copy of it is fetched."""
        return (live_rows + (self.rows_a_pass * passes - 1)) // (self.rows_a_pass * passes)

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
        target = self.state(args, (part.base, part.skip, part.step, part.states), part.mine)
        for turn in cutlass.range(self.passes_of(live_rows), unroll=1):
            row = self.row_of(turn, tid)
            live = row < live_rows
            before = self.load_state(target, live, part.more != 0, row, tid)
            weights, top, total = self.warp_weights(smem, row)
            peak, keep, gain = softmax.joint(before[0], top)
            for run in self.runs:
                column = self.column_of(run, tid)
                mixed = self.mix_warps(outputs, row, column, weights)
                values = [softmax.mix(before[2][run * 4 + k], keep, mixed[k], gain) for k in range(4)]
                words = [value.bitcast(Int32) for value in values]
                st_global(target + Int64((row * self.head_dim + column) * 4), 0, words, live)
            stats = target + Int64((ROWS * self.head_dim + row * 2) * 4)
            first = live & (tid % self.lanes == 0)
            cute.arch.sync_warp()  # all lanes of a row have read its maximum and sum
            st_global_f32(stats, peak, first)
            st_global_f32(stats + 4, softmax.mix(before[1], keep, total, gain), first)
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

    @cute.jit
    def post(self, args, smem: Int32, outputs: Int32, share: Int32, live_rows: Int32, tid: Int32):
        """Send the sum of the warps' states to the block that finishes the rows."""
        for turn in cutlass.range(self.passes_of(live_rows), unroll=1):
            row = self.row_of(turn, tid)
            weights, top, total = self.warp_weights(smem, row)
            mixed = []
            for run in self.runs:
                mixed += self.mix_warps(outputs, row, self.column_of(run, tid), weights)
            self.posts.send(args, share, row, row < live_rows, mixed, top, total, tid)

    def state(self, args, where, number):
        """The address of a place's state `number`; `where`: base, skip, step and states of its Part."""
        base, skip, step, _ = where
        later = Int32(cutlass.select_(number > 0, skip + number * step, Int32(0)))
        return args.partials + Int64(base + later) * (self.floats * 4)

    def warp_weights(self, smem, row):
        """(factor of each warp's outputs, common maximum, sum) of a row; base 2."""
        tops, sums = zip(*(ld_shared_f32x2(self.stats(smem, w, row)) for w in range(WARPS)), strict=True)
        top = tops[0]
        for other in tops[1:]:
            top = cute.arch.fmax(top, other)
        base = softmax.base_of(top)
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
    def finish(self, args, smem: Int32, outputs: Int32, where, posts, rows, tid: Int32):
        """Write output rows and LSE, from the warps' states and posts to them, or from states in the workspace."""
        states = where[3]
        if (states == 0) & (posts[0] == posts[1]):
            for step in cutlass.range(self.passes_of(rows.live, self.together), unroll=1):
                passes = [step * self.together + i for i in range(self.together)]
                self.answers.write([self.of_warps(smem, outputs, number, tid) for number in passes], args, rows, tid)
        else:
            for step in cutlass.range(self.passes_of(rows.live), unroll=1):
                row, values, stats = self.of_warps(smem, outputs, step, tid)
                live = row < rows.live
                if states > 0:
                    values.fill(0.0)
                    stats[0], stats[1] = -Float32.inf, Float32(0.0)
                for first in cutlass.range(0, states, self.batch, unroll=1):
                    self.take_states(args, where, first, states, row, live, values, stats, tid)
                # Warps without a live row leave posts alone; in the others, lanes without one follow those that have.
                begin = cutlass.select_(self.row_of(step, tid // 32 * 32) < rows.live, posts[0], posts[1])
                near = cutlass.min(row, rows.live - 1)
                for first in cutlass.range(Int32(begin), posts[1], self.post_batch, unroll=1):
                    self.take_posts(args, first, posts[1], near, values, stats, tid)
                self.answers.write([(row, values, stats)], args, rows, tid)

    def of_warps(self, smem, outputs, step, tid):
        """A thread's row of a pass: (row, outputs, (maximum, sum)), summed over the warps."""
        row = self.row_of(step, tid)
        values = cute.make_rmem_tensor((len(self.runs) * 4,), Float32)
        stats = cute.make_rmem_tensor((2,), Float32)
        weights, stats[0], stats[1] = self.warp_weights(smem, row)
        for run in self.runs:
            mixed = self.mix_warps(outputs, row, self.column_of(run, tid), weights)
            for k in range(4):
                values[run * 4 + k] = mixed[k]
        return row, values, stats

    def take_states(self, args, where, first, states, row, live, values, stats, tid):
        """Add states from number `first` on to `values`; all loads of the batch are on their way before one is used."""
        loaded = []
        for number in (first + i for i in range(self.batch)):
            source = self.state(args, where, number)
            loaded.append(self.load_state(source, live, number < states, row, tid))
        for top, total, outputs in loaded:
            peak, keep, gain = softmax.joint(stats[0], top)
            stats[0] = peak
            stats[1] = softmax.mix(stats[1], keep, total, gain)
            for i, output in enumerate(outputs):
                values[i] = softmax.mix(values[i], keep, output, gain)

    @cute.jit
    def take_posts(self, args, first: Int32, limit: Int32, row: Int32, values, stats, tid: Int32):
        """Add a batch of posts from share `first` on, those below `limit`, and make them empty: the warp waits until
        all are there.

        A lane's part of each post is loaded whether it is there or not, beyond the last the last's once more, and one
        maximum and sum a lane: the turn after the last post has come is all that is left to do.
        """
        lane = tid % self.lanes
        count = cutlass.min(limit - first, self.post_batch)
        parts = [self.posts.part(args, first + cutlass.min(i, count - 1), row, tid) for i in range(self.post_batch)]
        stats_at = self.posts.stats(args, first + cutlass.min(lane, count - 1), row)
        missing = first < limit
        while missing:
            posts = [self.posts.load(part) for part in parts]
            told = ld_posted(stats_at, 0, 2)
            missing = self.posts.some_empty([*told, *(word for words in posts for word in words)])
            for _ in cutlass.range(opaque(not missing), unroll=1):  # a branch: who still waits must not step over it
                self.posts.clear(parts, stats_at)
                self.add(posts, told, lane < count, values, stats)

    def add(self, posts, told, there, values, stats):
        """Add a row of posts, of which each lane was `told` the maximum and sum of one, if it is `there`.

        All are relative to one maximum, so that none waits for another, and lanes hand each other the factors.
        """
        top, total = (word.bitcast(Float32) for word in told)
        top = Float32(cutlass.select_(there, top, Float32(-Float32.inf)))
        peak = cute.arch.fmax(stats[0], self.of_lanes(top, cute.arch.fmax))
        base = softmax.base_of(peak)
        keep, gain = ex2(stats[0] - base), ex2(top - base)
        stats[0] = peak
        stats[1] = softmax.mix(stats[1], keep, self.of_lanes(gain * total, lambda a, b: a + b), Float32(1.0))
        first = cute.arch.lane_idx() // self.lanes * self.lanes
        for k in range(len(self.runs) * 4):
            values[k] = values[k] * keep
        for i, words in enumerate(posts):
            factor = cute.arch.shuffle_sync(gain, first + i)
            for k, word in enumerate(words):
                values[k] = fma(word.bitcast(Float32), factor, values[k])

    def of_lanes(self, value, combine):
        """A value of the lanes that share a row, combined: the same bits in each."""
        distance = 1
        while distance < self.lanes:
            value = combine(value, cute.arch.shuffle_sync_bfly(value, distance))
            distance *= 2
        return value

    def load_state(self, source, live, there, row, tid):
        """(maximum, sum, outputs) of a thread in a row of a state: those of no keys where there is no such state."""
        wanted = there & live
        top, total = ld_global_f32x2(source + Int64((ROWS * self.head_dim + row * 2) * 4), wanted)
        outputs = []
        for run in self.runs:
            at = row * self.head_dim + self.column_of(run, tid)
            outputs += ld_global_f32x4(source + Int64(at * 4), wanted)
        return Float32(cutlass.select_(there, top, Float32(-Float32.inf))), total, outputs
