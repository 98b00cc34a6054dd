"""Attention of few query rows over many paged keys: turns equal shares of a batch's key tiles into output rows and LSE.

The rows of a block are the query heads that share a KV head, times the new tokens of a sequence. Each warp takes its
own keys of every tile, through its own ring of cp.async stages, and keeps its own running softmax: warps meet once a
segment, the part of a sequence, head and row block that lies in the block's share. A segment that a share cuts leaves
partial states in the workspace; the last block to arrive merges them, in order, so results never depend on timing.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from pa_ops.templates.device import products, softmax
from pa_ops.templates.device.pages import look_up_key
from pa_ops.templates.device.ptx import cp_async_16, ld_global_pair, ld_shared_32, opaque, st_shared_32
from pa_ops.templates.device.shares import WORDS, find_share, span
from pa_ops.templates.device.states import THREADS, WARPS, States
from pa_ops.templates.device.tiles import Fragments, TileShape

EVERY = 0x7FFFFFFF  # a limit that no page exceeds


class Decode:
    """One instance: the compile-time choices and the code that they specialise."""

    def __init__(self, dtype, head_dim, window, rows, keys, stages):
        self.dtype, self.head_dim, self.window = dtype, head_dim, window
        self.rows, self.keys, self.stages = rows, keys, stages
        self.warp_keys = keys // WARPS
        self.m_tiles, self.n_tiles, self.d_tiles = rows // 16, self.warp_keys // 8, head_dim // 8
        self.shape = TileShape(head_dim, 32)
        self.tile_bytes = self.warp_keys * head_dim * 2
        self.ring_bytes = WARPS * stages * 2 * self.tile_bytes
        # After the ring: hole words of each warp's stages, the share's scratch, one word of news for the block.
        self.holes_at = self.ring_bytes
        self.share_at = self.holes_at + WARPS * stages * 4
        self.news_at = self.share_at + WORDS * 4
        self.states = States(dtype, head_dim, rows, self.news_at)
        self.smem_bytes = max(self.news_at + 16, WARPS * self.states.floats * 4)

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
        acc_s = cute.make_rmem_tensor((self.m_tiles * self.n_tiles * 4,), Float32)
        acc_o, row_max, row_sum = softmax.fresh_state(self.m_tiles, self.d_tiles)

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
            frag_v = Fragments(self.shape, keys_at + self.tile_bytes, lane, swapped=False)
            products.accumulate(self.dtype, acc_s, frag_v, self.m_tiles, self.n_tiles, self.d_tiles, acc_o)
            stage = Int32(cutlass.select_(stage == self.stages - 1, Int32(0), stage + 1))
        cute.arch.cp_async_wait_group(0)
        cute.arch.barrier()

        self.states.publish(smem, acc_o, row_max, row_sum, args.log2_scale, warp, lane)
        cute.arch.barrier()
        start = base + place * tiles
        if count == tiles:
            self.states.finish(args, smem, Int64(0), Int32(0), q_start, kv_head, row_first, live_rows, tid)
        else:
            self.states.settle(args, smem, total, start, start + tiles, q_start, kv_head, row_first, live_rows, tid)
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

        def queries(column):
            first = [(mt * (self.head_dim // 16) + column // 16) * 4 for mt in range(self.m_tiles)]
            return [[frag_q[at + i] for i in range(4)] for at in first]

        products.scores(self.dtype, queries, frag_k, self.head_dim, self.m_tiles, self.n_tiles, acc_s)

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
