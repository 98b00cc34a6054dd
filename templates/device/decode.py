"""Attention of few query rows over paged keys: turns equal shares of a batch's key tiles into output rows and LSE.

The rows of a block are the query heads that share a KV head, times the new tokens of a sequence. Each warp takes its
own keys of every tile, through its own ring of cp.async stages, and keeps its own running softmax: warps meet once a
segment, the part of a sequence, head and row block that lies in the block's share. Where shares cut a row, the block
that opened it adds up what the others post to it (posts.py), or, where chunks are, the last to arrive what all have
left in the workspace (states.py): in order, so results never depend on timing.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from pa_ops.templates.device import products, softmax
from pa_ops.templates.device.feed import Feed
from pa_ops.templates.device.ptx import ld_shared_32, opaque
from pa_ops.templates.device.ptx_global import ld_global_pairs
from pa_ops.templates.device.ptx_grid import start_next_grid, wait_for_grid
from pa_ops.templates.device.quotients import by_factor
from pa_ops.templates.device.segments import BYTES, Segments, token_and_head
from pa_ops.templates.device.shares import WORDS, Shares
from pa_ops.templates.device.states import ROWS, STATS_BYTES, THREADS, WARPS, States
from pa_ops.templates.device.tiles import Fragments, TileShape


class Decode:
    """One instance: the compile-time choices and the code that they specialise."""

    def __init__(self, dtype, head_dim, window, keys, stages, most_chunks, uncut, chained):
        self.dtype, self.head_dim, self.window, self.chained = dtype, head_dim, window, chained
        self.keys, self.stages = keys, stages
        self.warp_keys = keys // WARPS
        self.n_tiles, self.d_tiles = self.warp_keys // 8, head_dim // 8
        self.shape = TileShape(head_dim, 32)
        # After the rings: hole words of each warp's stages, the shares' scratch, maxima and sums, a word of news.
        self.stage_bytes = 2 * self.warp_keys * self.shape.pitch
        self.holes_at = WARPS * stages * self.stage_bytes
        notes_at = self.holes_at + WARPS * stages * 4
        shares_at = notes_at + WARPS * BYTES
        stats_at = shares_at + WORDS * 4
        self.shares = Shares(ROWS, keys, window, most_chunks, uncut, shares_at)
        self.segments = Segments(self.shares, WARPS, notes_at)
        self.feed = Feed(self.shape, self.shares, self.warp_keys, stages)
        # Outputs of warps meet in the stage computed last: 16 keys of K and V are the bytes of 16 rows in fp32.
        self.states = States(dtype, head_dim, stages * self.stage_bytes, stats_at)
        self.smem_bytes = stats_at + STATS_BYTES + 16

    @cute.jit
    def __call__(self, args):
        self.kernel(args).launch(
            grid=[1, 1, 1],
            block=[THREADS, 1, 1],
            smem=self.smem_bytes,
            min_blocks_per_mp=2,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(self, args):
        smem = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024).toint())
        lane, warp = cute.arch.lane_idx(), cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if args.lengths_ready == 0:
            wait_for_grid(self.chained)
        begin, end = self.shares.count(args, smem)
        if begin >= end:  # who waits for this grid waits for the last one, by blocks without a share too
            wait_for_grid(self.chained)
        at = self.feed.state()
        frag_q = cute.make_rmem_tensor((self.head_dim // 16 * 4,), Int32)
        if begin < end:
            sequence, base = self.shares.located(args, smem, begin)
            stand = self.segments.enter(args, smem, sequence, base, begin, end, warp)
            self.feed.open(args, at, sequence, end - begin, stand)
            for slot in cutlass.range_constexpr(self.feed.ahead):
                self.feed.look_up(args, at, slot, warp, lane)
            wait_for_grid(self.chained)
            start_next_grid(self.chained)
            self.load_queries(args, frag_q, self.segments.rows(smem, warp), lane)
            ring, holes, small = self.ring_of(smem, warp), self.holes_of(smem, warp), self.feed.is_small(end - begin)
            for stage in cutlass.range(self.feed.ahead, unroll=1):
                self.feed.copy(args, at, 0, ring, holes, stage, lane, small)
                self.feed.shift(at)
            self.feed.look_up(args, at, 0, warp, lane)
            stage = Int32(0)
            unit = begin
            while unit < end:
                stage, outputs, unit = self.attend(args, smem, at, frag_q, stage, small)
                rows, stretch = self.segments.rows(smem, warp), self.segments.stretch(smem, warp)
                if unit < end:  # the next segment's queries come while this one is concluded
                    sequence, base = self.shares.seek(args, sequence, base, unit)
                    cute.arch.sync_warp()
                    self.segments.enter(args, smem, sequence, base, unit, end, warp)
                    self.load_queries(args, frag_q, self.segments.rows(smem, warp), lane)
                self.conclude(args, smem, outputs, rows, stretch, unit)
            cute.arch.cp_async_wait_group(0)

    @cute.jit
    def attend(self, args, smem: Int32, at, frag_q, stage: Int32, small: Int32):
        """Attend to the tiles of the segment that the warp has noted.

        The first is in ring stage `stage`. Returns the stage of the next tile, where the warps' states are: in the
        stage of the last; and the tile after the segment's.
        """
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        seen, rows = self.segments.seen(smem, warp), self.segments.rows(smem, warp)
        # Keys [0, safe_high) are seen by every row, keys from safe_low on too.
        safe_high, safe_low = seen.k_len, Int32(0)
        if args.causal != 0:
            safe_high = cutlass.min(seen.k_len, seen.shift + self.token_of(args, rows.first) + 1)
        if cutlass.const_expr(self.window):
            safe_low = seen.shift + self.token_of(args, rows.first + rows.live - 1) - args.window + 1

        acc_s = cute.make_rmem_tensor((self.n_tiles * 4,), Float32)
        acc_o, row_max, row_sum = softmax.fresh_state(1, self.d_tiles)

        begin = seen.key + warp * self.warp_keys
        end = begin + seen.count * self.keys
        for key in cutlass.range(begin, end, self.keys, unroll=1):
            cute.arch.cp_async_wait_group(self.stages - 2)
            cute.arch.sync_warp()
            # Opaque: 256 columns leave no register around the loop for addresses that follow from these two.
            my_lane, my_warp = opaque(lane), opaque(warp)
            ring, holes = self.ring_of(smem, my_warp), self.holes_of(smem, my_warp)
            self.feed.copy(args, at, 0, ring, holes, self.before(stage), my_lane, small)
            self.feed.look_up(args, at, 0, my_warp, my_lane)

            keys_at = ring + stage * self.stage_bytes
            self.scores(frag_q, Fragments(self.shape, keys_at, lane, swapped=True), acc_s)
            for _ in cutlass.range(opaque(args.softcap_in > 0.0), unroll=1):
                softmax.cap(acc_s, args.softcap_in)
            hole = ld_shared_32(holes + stage * 4)
            edge = (key + self.warp_keys > safe_high) | (hole != 0)
            if cutlass.const_expr(self.window):
                edge = edge | (key < safe_low)
            for turn in cutlass.range(opaque(edge), unroll=1):
                self.mask(args, acc_s, smem, my_warp, key + turn, hole, lane)
            outgrown = softmax.outgrown(acc_s, row_max, args.log2_scale, self.n_tiles)
            for _ in cutlass.range(opaque(outgrown), unroll=1):
                softmax.rescale(acc_s, acc_o, row_max, row_sum, args.log2_scale, self.n_tiles, self.d_tiles)
            softmax.exponentiate(acc_s, row_max, row_sum, args.log2_scale, self.n_tiles)
            frag_v = Fragments(self.shape, keys_at + self.feed.tile_bytes, lane, swapped=False)
            products.accumulate(self.dtype, acc_s, frag_v, 1, self.n_tiles, self.d_tiles, acc_o)
            stage = Int32(cutlass.select_(stage == self.stages - 1, Int32(0), stage + 1))
        cute.arch.sync_warp()
        outputs = smem + self.before(stage) * self.stage_bytes
        live = self.segments.rows(smem, warp).live
        self.states.publish(smem, outputs, acc_o, row_max, row_sum, args.log2_scale, live, warp)
        return stage, outputs, self.segments.stretch(smem, warp).unit + self.segments.seen(smem, warp).count

    def ring_of(self, smem, warp):
        """Shared address of a warp's stages."""
        return smem + warp * (self.stages * self.stage_bytes)

    def holes_of(self, smem, warp):
        """Shared address of the words that tell which keys of a warp's stages have no page."""
        return smem + self.holes_at + warp * (self.stages * 4)

    def before(self, stage):
        """The ring stage before one: computed last, copied into next."""
        return Int32(cutlass.select_(stage == 0, Int32(self.stages - 1), stage - 1))

    @cute.jit
    def conclude(self, args, smem: Int32, outputs: Int32, rows, stretch, stop: Int32):
        """Turn the warps' states, of a segment's rows and tiles [stretch.unit, stop), into output rows, or post or
        leave them."""
        tid, _, _ = cute.arch.thread_idx()
        cute.arch.barrier()
        where, posts, last = (
            (Int32(0), Int32(0), Int32(0), Int32(0)),
            (Int32(0), Int32(0)),
            stop - stretch.unit == stretch.tiles,
        )
        if not last:
            if self.shares.posting(args):
                last = stretch.unit == stretch.start
                share = self.shares.own(smem)
                if last:
                    posts = share + 1, self.shares.last(smem, stretch.start, stretch.tiles) + 1
                else:
                    self.states.post(args, smem, outputs, share, rows.live, tid)
            else:
                left = self.shares.part(args, smem, stretch)
                where = left.base, left.skip, left.step, left.states
                last = self.states.leave(args, smem, outputs, left, rows.live, tid)
        if last:
            self.states.finish(args, smem, outputs, where, posts, rows, tid)
        cute.arch.barrier()

    def token_of(self, args, line):
        """The token of a sequence that a line, a token's head of the group, belongs to."""
        return by_factor(line, args.group, args.group_factor)

    def load_queries(self, args, frag_q, rows, lane):
        """The query rows as A operands; rows and columns that do not exist are zeros."""
        for half in range(2):
            row = half * 8 + (lane >> 2)
            token, head = token_and_head(args, rows, row)
            column = (lane & 3) * 2
            source = args.q + Int64(rows.q_start + token) * args.q_token_stride + Int64(head) * args.q_head_stride
            width = Int32(cutlass.select_(row < rows.live, args.head_dim - column, Int32(0)))
            columns = range(0, self.head_dim, 8)
            words = ld_global_pairs(source + Int64(column * 2), columns, width, rows.live > half * 8)
            for i, word in enumerate(words):
                frag_q[i * 2 + half] = word

    def scores(self, frag_q, frag_k, acc_s):
        """acc_s = Q K^T for all rows and this warp's keys of the tile."""

        def queries(column):
            return [[frag_q[column // 16 * 4 + i] for i in range(4)]]

        products.scores(self.dtype, queries, frag_k, self.head_dim, 1, self.n_tiles, acc_s)

    def mask(self, args, acc_s, smem, warp, key_first, hole, lane):
        """-inf where a row does not see a key."""
        seen, rows = self.segments.seen(smem, warp), self.segments.rows(smem, warp)
        hidden = Float32(-Float32.inf)
        column = (lane & 3) * 2
        for r in range(2):
            here = seen.shift + self.token_of(args, rows.first + r * 8 + (lane >> 2))
            end = Int32(cutlass.select_(args.causal != 0, cutlass.min(seen.k_len, here + 1), seen.k_len))
            for nt in range(self.n_tiles):
                for c in range(2):
                    key = key_first + nt * 8 + column + c
                    drop = (key >= end) | (((hole >> (nt * 8 + column + c)) & 1) != 0)
                    if self.window:
                        drop = drop | (key <= here - args.window)
                    at = nt * 4 + r * 2 + c
                    acc_s[at] = cutlass.select_(drop, hidden, acc_s[at])
