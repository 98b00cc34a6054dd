"""Attention of few query rows over many paged keys: turns equal shares of a batch's key tiles into output rows and LSE.

The rows of a block are the query heads that share a KV head, times the new tokens of a sequence. Each warp takes its
own keys of every tile, through its own ring of cp.async stages, and keeps its own running softmax: warps meet once a
segment, the part of a sequence, head and row block that lies in the block's share. A segment that a share cuts leaves
partial states in the workspace; the last block to arrive merges them, in order, so results never depend on timing.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from pa_ops.templates.device import softmax
from pa_ops.templates.device.pages import look_up_key
from pa_ops.templates.device.ptx import (
    arrive,
    cp_async_16,
    ex2,
    fence,
    ld_global_f32,
    ld_global_f32_cg,
    ld_global_f32x4,
    ld_global_half,
    ld_global_pair,
    ld_shared_32,
    ld_shared_f32,
    ld_shared_f32x4,
    lg2,
    mma_m16n8k16,
    opaque,
    pack_pair,
    rcp,
    st_global_64,
    st_global_f32,
    st_global_f32x4,
    st_global_i32,
    st_shared_32,
    st_shared_f32x2,
)
from pa_ops.templates.device.shares import WORDS, find_share, owner_of, span
from pa_ops.templates.device.tiles import Fragments, TileShape

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
WARPS = 4
EVERY = 0x7FFFFFFF  # a limit that no page exceeds


class Decode:
    """One instance: the compile-time choices and the code that they specialise."""

    def __init__(self, dtype, head_dim, window, rows, keys, stages):
        self.dtype, self.head_dim, self.window = dtype, head_dim, window
        self.rows, self.keys, self.stages = rows, keys, stages
        self.threads = WARPS * 32
        self.warp_keys = keys // WARPS
        self.m_tiles, self.n_tiles, self.d_tiles = rows // 16, self.warp_keys // 8, head_dim // 8
        self.shape = TileShape(head_dim, 32)
        self.tile_bytes = self.warp_keys * head_dim * 2
        self.ring_bytes = WARPS * stages * 2 * self.tile_bytes
        self.state_floats = rows * (head_dim + 2)  # outputs, then maxima, then sums
        # After the ring: hole words of each warp's stages, the share's scratch, one word of news for the block.
        self.holes_at = self.ring_bytes
        self.share_at = self.holes_at + WARPS * stages * 4
        self.news_at = self.share_at + WORDS * 4
        self.smem_bytes = max(self.news_at + 16, WARPS * self.state_floats * 4)

    @cute.jit
    def __call__(self, args):
        self.kernel(args).launch(
            grid=[1, 1, 1],
            block=[self.threads, 1, 1],
            smem=self.smem_bytes,
            min_blocks_per_mp=2,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(self, args):
        smem = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024).toint())
        begin, end, total, sequence, base = find_share(args, smem + self.share_at, self.rows, self.keys, self.window)
        unit = begin
        while unit < end:
            q_start, q_len, k_len, first, tiles, blocks = span(args, sequence, self.rows, self.keys, self.window)
            whole = tiles * blocks * args.kv_heads
            if unit < base + whole:
                place = (unit - base) // tiles
                tile = unit - base - place * tiles
                count = cutlass.min(tiles - tile, end - unit)
                self.run_segment(
                    args, smem, total, sequence, q_start, q_len, k_len, first, tiles, blocks, base, place, tile, count
                )
                unit = unit + count
            else:
                base = base + whole
                sequence = sequence + 1

    @cute.jit
    def run_segment(
        self,
        args,
        smem: Int32,
        total: Int32,
        sequence: Int32,
        q_start: Int32,
        q_len: Int32,
        k_len: Int32,
        first: Int32,
        tiles: Int32,
        blocks: Int32,
        base: Int32,
        place: Int32,
        tile: Int32,
        count: Int32,
    ):
        """Tiles [tile, tile + count) of one sequence, head and row block, whose number in the sequence is `place`."""
        tid, _, _ = cute.arch.thread_idx()
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        kv_head = place // blocks
        row_first = (place - kv_head * blocks) * self.rows
        live_rows = cutlass.min(q_len * args.group - row_first, self.rows)
        shift = k_len - q_len
        # Keys [0, safe_high) are seen by every row, keys from safe_low on too.
        safe_high, safe_low, low = k_len, Int32(0), Int32(0)
        if args.causal != 0:
            safe_high = cutlass.min(k_len, shift + row_first // args.group + 1)
        if cutlass.const_expr(self.window):
            low = cutlass.max(shift - args.window + 1, 0)
            safe_low = shift + (row_first + live_rows - 1) // args.group - args.window + 1

        frag_q = cute.make_rmem_tensor((self.m_tiles * self.head_dim // 16 * 4,), Int32)
        self.load_queries(args, frag_q, q_start, kv_head, row_first, live_rows, lane)
        acc_o = cute.make_rmem_tensor((self.m_tiles * self.d_tiles * 4,), Float32)
        acc_s = cute.make_rmem_tensor((self.m_tiles * self.n_tiles * 4,), Float32)
        row_max = cute.make_rmem_tensor((self.m_tiles * 2,), Float32)
        row_sum = cute.make_rmem_tensor((self.m_tiles * 2,), Float32)
        acc_o.fill(0.0)
        row_max.fill(-Float32.inf)
        row_sum.fill(0.0)

        ring = smem + warp * (self.stages * 2 * self.tile_bytes)
        holes = smem + self.holes_at + warp * (self.stages * 4)
        table = args.block_table + Int64(sequence) * args.table_stride
        k_base = args.k + Int64(kv_head) * args.k_head_stride
        v_base = args.v + Int64(kv_head) * args.v_head_stride
        key_first = (first + tile) * self.keys + warp * self.warp_keys
        # A lane knows the page of one key of the tile that is loaded next.
        where = cute.make_rmem_tensor((2,), Int32)
        self.look_up(args, where, table, key_first, low, k_len, lane)
        for i in cutlass.range_constexpr(self.stages - 1):
            self.load_tile(args, where, ring, holes, i, k_base, v_base, lane, i < count)
            self.look_up(args, where, table, key_first + (i + 1) * self.keys, low, k_len, lane)
        stage = Int32(0)
        for i in cutlass.range(count, unroll=1):
            cute.arch.cp_async_wait_group(self.stages - 2)
            cute.arch.sync_warp()
            fill = Int32(cutlass.select_(stage == 0, Int32(self.stages - 1), stage - 1))
            ahead = i + (self.stages - 1)
            self.load_tile(args, where, ring, holes, fill, k_base, v_base, lane, ahead < count)
            self.look_up(args, where, table, key_first + (ahead + 1) * self.keys, low, k_len, lane)

            keys_at = ring + stage * (2 * self.tile_bytes)
            self.scores(frag_q, Fragments(self.shape, keys_at, lane, swapped=True), acc_s)
            for _ in cutlass.range(opaque(args.softcap_in > 0.0), unroll=1):
                softmax.cap(acc_s, args.softcap_in)
            key = key_first + i * self.keys
            hole = ld_shared_32(holes + stage * 4)
            edge = (key + self.warp_keys > safe_high) | (hole != 0)
            if cutlass.const_expr(self.window):
                edge = edge | (key < safe_low)
            for turn in cutlass.range(opaque(edge), unroll=1):
                self.mask(args, acc_s, shift, row_first, key + turn, k_len, hole, lane)
            outgrown = softmax.outgrown(acc_s, row_max, args.log2_scale, self.n_tiles)
            for _ in cutlass.range(opaque(outgrown), unroll=1):
                softmax.rescale(acc_s, acc_o, row_max, row_sum, args.log2_scale, self.n_tiles, self.d_tiles)
            softmax.exponentiate(acc_s, row_max, row_sum, args.log2_scale, self.n_tiles)
            self.accumulate(Fragments(self.shape, keys_at + self.tile_bytes, lane, swapped=False), acc_s, acc_o)
            stage = Int32(cutlass.select_(stage == self.stages - 1, Int32(0), stage + 1))
        cute.arch.cp_async_wait_group(0)
        cute.arch.barrier()

        self.publish(smem, acc_o, row_max, row_sum, args.log2_scale, warp, lane)
        cute.arch.barrier()
        start = base + place * tiles
        if count == tiles:
            self.finish(args, smem, Int64(0), Int32(0), q_start, kv_head, row_first, live_rows, tid)
        else:
            self.settle(args, smem, total, start, start + tiles, q_start, kv_head, row_first, live_rows, tid)
        cute.arch.barrier()

    def load_queries(self, args, frag_q, q_start, kv_head, row_first, live_rows, lane):
        """The query rows as A operands; rows and columns that do not exist are zeros."""
        for mt in range(self.m_tiles):
            for half in range(2):
                row = mt * 16 + half * 8 + (lane >> 2)
                line = row_first + row
                token = q_start + line // args.group
                head = kv_head * args.group + line % args.group
                source = args.q + Int64(token) * args.q_token_stride + Int64(head) * args.q_head_stride
                for step in range(self.head_dim // 16):
                    for right in range(2):
                        column = step * 16 + right * 8 + (lane & 3) * 2
                        there = (row < live_rows) & (column < args.head_dim)
                        at = (mt * (self.head_dim // 16) + step) * 4 + right * 2 + half
                        frag_q[at] = ld_global_pair(source + Int64(column) * 2, there)

    def look_up(self, args, where, table, key_first, low, k_len, lane):
        """The page and the offset in it of key `key_first + lane`, page -1 where there is none to read."""
        key = key_first + lane
        live = (key >= low) & (key < k_len) & (lane < self.warp_keys)
        page, offset = look_up_key(args, table, key, live)
        where[0] = page
        where[1] = offset

    def load_tile(self, args, where, ring, holes, stage, k_base, v_base, lane, wanted):
        """Start copying this warp's keys and values of one tile; keys without a page become zeros, unread."""
        shape = self.shape
        row, chunk = lane // shape.lanes_a_row, lane % shape.lanes_a_row
        keys_at = ring + stage * (2 * self.tile_bytes)
        page_here = Int32(cutlass.select_(wanted, where[0], Int32(-1)))
        for step in range(0, self.warp_keys, shape.rows_a_pass):
            page = cute.arch.shuffle_sync(page_here, row + step)
            offset = cute.arch.shuffle_sync(where[1], row + step)
            k_row = k_base + Int64(page) * args.k_page_stride + Int64(offset) * args.k_token_stride
            v_row = v_base + Int64(page) * args.v_page_stride + Int64(offset) * args.v_token_stride
            target = shape.address(keys_at, row + step, chunk)  # a pass is shorter than the swizzle's eight rows
            for j in range(shape.chunks_a_lane):
                column = chunk + j * shape.lanes_a_row
                limit = cutlass.select_(column * 8 < args.head_dim, Int32(EVERY), Int32(0))
                at = j * shape.lanes_a_row * 16
                cp_async_16(target + at, k_row + Int64(column * 16), page, limit)
                cp_async_16(target + self.tile_bytes + at, v_row + Int64(column * 16), page, limit)
        cute.arch.cp_async_commit_group()
        missing = cute.arch.vote_ballot_sync((where[0] < 0) & (lane < self.warp_keys))
        st_shared_32(holes + stage * 4, Int32(missing))

    def scores(self, frag_q, frag_k, acc_s):
        """acc_s = Q K^T for all rows and this warp's keys of the tile."""
        zero = Float32(0.0)
        s = [[[zero] * 4 for _ in range(self.n_tiles)] for _ in range(self.m_tiles)]
        for step in range(self.head_dim // 16):
            for pair in range(self.n_tiles // 2):
                b = frag_k.load(pair * 16, step * 16)
                for mt in range(self.m_tiles):
                    at = (mt * (self.head_dim // 16) + step) * 4
                    a = [frag_q[at + i] for i in range(4)]
                    for half in range(2):
                        nt = pair * 2 + half
                        s[mt][nt] = mma_m16n8k16(self.dtype, a, b[2 * half : 2 * half + 2], s[mt][nt])
        for mt in range(self.m_tiles):
            for nt in range(self.n_tiles):
                for i in range(4):
                    acc_s[(mt * self.n_tiles + nt) * 4 + i] = s[mt][nt][i]

    def mask(self, args, acc_s, shift, row_first, key_first, k_len, hole, lane):
        """-inf where a row does not see a key."""
        hidden = Float32(-Float32.inf)
        column = (lane & 3) * 2
        for mt in range(self.m_tiles):
            for r in range(2):
                line = row_first + mt * 16 + r * 8 + (lane >> 2)
                here = shift + line // args.group
                end = Int32(cutlass.select_(args.causal != 0, cutlass.min(k_len, here + 1), k_len))
                for nt in range(self.n_tiles):
                    for c in range(2):
                        key = key_first + nt * 8 + column + c
                        drop = (key >= end) | (((hole >> (nt * 8 + column + c)) & 1) != 0)
                        if self.window:
                            drop = drop | (key <= here - args.window)
                        at = (mt * self.n_tiles + nt) * 4 + r * 2 + c
                        acc_s[at] = cutlass.select_(drop, hidden, acc_s[at])

    def accumulate(self, frag_v, acc_s, acc_o):
        """acc_o += P V, P being acc_s rounded to the element type."""
        for key in range(0, self.warp_keys, 16):
            a = []
            for mt in range(self.m_tiles):
                at = (mt * self.n_tiles + key // 8) * 4
                a.append([pack_pair(self.dtype, acc_s[at + 2 * i], acc_s[at + 2 * i + 1]) for i in range(4)])
            for pair in range(self.d_tiles // 2):
                b = frag_v.load(key, pair * 16, transpose=True)
                for mt in range(self.m_tiles):
                    for half in range(2):
                        at = (mt * self.d_tiles + pair * 2 + half) * 4
                        c = mma_m16n8k16(
                            self.dtype, a[mt], b[2 * half : 2 * half + 2], [acc_o[at + i] for i in range(4)]
                        )
                        for i in range(4):
                            acc_o[at + i] = c[i]

    def publish(self, smem, acc_o, row_max, row_sum, log2_scale, warp, lane):
        """This warp's state into shared memory, over the ring: rows of outputs, then base-2 maxima, then sums."""
        state = smem + warp * (self.state_floats * 4)
        for mt in range(self.m_tiles):
            for r in range(2):
                row = mt * 16 + r * 8 + (lane >> 2)
                for dt in range(self.d_tiles):
                    at = (mt * self.d_tiles + dt) * 4 + r * 2
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
        per_row = self.threads // self.rows
        return tid // per_row, tid % per_row * 4, per_row * 4

    def slot_address(self, args, slot):
        return args.partials + slot * (self.state_floats * 4)

    def leave(self, args, smem, slot, tid):
        """Merge the warps' states and write the result to the workspace: outputs, then (maximum, sum) a row."""
        row, column, step = self.row_of(tid)
        weights, top, total = self.warp_weights(smem, row)
        target = self.slot_address(args, slot)
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
            stats = smem + w * (self.state_floats * 4) + (self.rows * self.head_dim + row * 2) * 4
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
            part = ld_shared_f32x4(smem + w * (self.state_floats * 4) + (row * self.head_dim + column) * 4)
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
            top, total = self.take_part(self.slot_address(args, slot), row, column, step, values, top, total)
        sink = Float32(-Float32.inf)
        if (args.sinks != 0) & (row < live_rows):
            sink = self.sink_of(args, head) * LOG2_E
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

    @cute.jit
    def sink_of(self, args, head: Int32):
        value = Float32(0.0)
        if args.sinks_fp32 != 0:
            value = ld_global_f32(args.sinks + Int64(head) * 4)
        else:
            value = ld_global_half(self.dtype, args.sinks + Int64(head) * 2)
        return value
