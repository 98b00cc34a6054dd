"""FlashAttention forward for SM80 and newer: turns one block's queries and the keys they see into output rows and LSE.

mma.sync m16n8k16 with fp32 accumulation, cp.async, online softmax in base 2. One loop body: V of a block travels while
Q K^T runs, K of the next block while softmax and P V run; masking sits behind a branch that is the same for a whole
block, so interior blocks pay one compare for it. Two thread blocks an SM hide what is left, or one of eight warps, two
of which share their rows (pairs.py).
The scheme is FlashAttention-2's (Dao, arXiv 2307.08691); page look-up, masks and work list are this project's.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from pa_ops.templates.device import mask_tile, offsets, pages, products, softmax, trust
from pa_ops.templates.device.cp_tiles import TileCopies
from pa_ops.templates.device.key_streams import DenseKeys, PagedKeys
from pa_ops.templates.device.pairs import Pair
from pa_ops.templates.device.ptx import opaque, rcp
from pa_ops.templates.device.ptx_grid import start_next_grid, wait_for_grid
from pa_ops.templates.device.ptx_warp import meet_and_vote, pinned
from pa_ops.templates.device.row_store import RowStore
from pa_ops.templates.device.tiles import Fragments, TileShape
from pa_ops.templates.device.worklist import find_tile, length_at, paged_keys


class FlashSm80:
    """One instance: the compile-time choices and the code that they specialise."""

    def __init__(self, dtype, head_dim, paged, causal, window, masked, rows, keys, warps, chained):
        self.dtype, self.head_dim, self.paged, self.chained = dtype, head_dim, paged, chained
        self.causal, self.window, self.masked = causal, window, masked
        self.rows, self.keys, self.warps = rows, keys, warps
        self.threads = warps * 32
        self.trusts = trust.is_safe(dtype) and not masked
        self.team = warps // 4  # warps that share rows: each has its part of the keys' scores and of the channels
        self.m_tiles = rows * self.team // (16 * warps)
        self.n_tiles = keys // 8 // self.team
        self.d_tiles = head_dim // 8 // self.team
        # Columns of Q / 16 that stay in registers, where there are any to spare.
        self.kept = 4 if head_dim == 64 and not (paged or masked) else 0
        self.shape = TileShape(head_dim, self.threads)
        self.copies = TileCopies(self.shape, rows, keys, ranged=window or masked)
        self.streams = (PagedKeys if paged else DenseKeys)(self.copies, keys * head_dim * 2)
        self.out = RowStore(dtype, self.shape, self.m_tiles, self.d_tiles)
        self.q_bytes = rows * head_dim * 2
        self.kv_bytes = keys * head_dim * 2
        self.mask_tile = mask_tile.MaskTile(dtype, rows, keys, self.threads)
        self.traded_bytes = rows * keys * 2 if self.team > 1 else 0
        self.smem_bytes = self.q_bytes + 2 * self.kv_bytes + (self.mask_tile.bytes if masked else self.traded_bytes)
        accumulators = self.m_tiles * (self.d_tiles + self.n_tiles) * 4
        # Registers for addresses, statistics and fragments in flight come on top; pages take some more.
        others = 88 if paged or masked else 72
        self.blocks_an_sm = max(1, 65536 // (self.threads * min(255, accumulators + others)))

    @cute.jit
    def __call__(self, args):
        self.kernel(args).launch(
            grid=[1, 1, 1],
            block=[self.threads, 1, 1],
            smem=self.smem_bytes,
            min_blocks_per_mp=self.blocks_an_sm,
            preferred_smem_carveout=100,  # of the SM; left open, the DSL asks a driver for it while compiling
        )

    @cute.kernel
    def kernel(self, args):
        wait_for_grid(self.chained)
        start_next_grid(self.chained)
        trusting, lost = Int32(self.trusts), Int32(1)
        while lost != 0:
            # All of it is found anew in a second turn, so that nothing is kept for that through the first.
            lost = Int32(0)
            rank, head, _ = cute.arch.block_idx()
            sequence, block = find_tile(args, self.rows, rank)
            if sequence >= 0:
                lost = self.run_tile(args, sequence, block, head, trusting)
            trusting = Int32(0)

    @cute.jit
    def run_tile(self, args, sequence: Int32, block: Int32, head: Int32, trusting: Int32):
        tid, _, _ = cute.arch.thread_idx()
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())

        q_start, q_len = length_at(args.cu_seqlens_q, sequence, args.tokens)
        k_start = Int32(0)
        if cutlass.const_expr(self.masked):
            k_len = mask_tile.keys_of(args, sequence)
        elif cutlass.const_expr(self.paged):
            k_len = paged_keys(args, sequence, q_len)
        else:
            k_start, k_len = length_at(args.kv_lengths, sequence, args.keys)
        # The last blocks of a causal sequence see most keys: start them first.
        block = (q_len + (self.rows - 1)) // self.rows - 1 - block
        row_first = block * self.rows
        row_last = cutlass.min(row_first + self.rows, q_len) - 1
        shift = args.position if self.masked else k_len - q_len

        low, safe_low, high, safe_high = self.sight(args, shift + row_first, shift + row_last, k_len)
        block_first = low // self.keys
        block_end = (high + (self.keys - 1)) // self.keys
        steps = cutlass.max(block_end - block_first, 0)

        smem = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024).toint()
        s_q = Int32(smem)
        s_k = s_q + self.q_bytes
        s_v = s_k + self.kv_bytes
        s_mask = s_v + self.kv_bytes

        q_rows, *bases = self.bases(args, sequence, q_start, row_first, k_start, head)
        team = warp % self.team
        warp_row = warp // self.team * (16 * self.m_tiles)
        team_keys = team * (self.n_tiles * 8)
        frag_q = Fragments(self.shape, s_q + warp_row * self.shape.pitch, lane, swapped=False)
        frag_k = Fragments(self.shape, s_k + team_keys * self.shape.pitch, lane, swapped=True)
        frag_v = Fragments(self.shape, s_v + team * (self.d_tiles * 16), lane, swapped=False)
        frag_q.lane = frag_v.lane = pinned(frag_q.lane, lane)
        frag_k.lane = pinned(frag_k.lane, lane)
        pair = Pair(s_mask, warp, lane, self.dtype, self.m_tiles, self.n_tiles, self.d_tiles)
        acc_s = cute.make_rmem_tensor((self.m_tiles * self.n_tiles * 4,), Float32)
        acc_o, row_offset, row_sum = offsets.fresh(self.m_tiles, self.d_tiles)
        stream = self.streams.open(args, bases, sequence, block_end, s_k, tid, lane)
        count = row_last - row_first + 1
        if steps > 0:
            self.copies.queries(args, s_q, q_rows, count, tid)
            if cutlass.const_expr(self.kept > 0):
                cute.arch.cp_async_commit_group()
            key_first = (block_end - 1) * self.keys
            rows = s_mask, sequence, row_first, head, count, k_len
            self.start_keys(args, stream, rows, key_first, low, high, tid, lane)
        kept = []
        if cutlass.const_expr(self.kept > 0):
            cute.arch.cp_async_wait_group(1)
            cute.arch.barrier()
            kept = [self.queries(frag_q, column * 16) for column in range(self.kept)]
        # Blocks whose last key comes before this are trusted: every row has seen a key, and their scores are plain.
        trusted_end = Int32(-1)
        if cutlass.const_expr(self.trusts):
            plain = (trusting != 0) & (args.softcap_in == 0.0) & (args.head_dim == self.head_dim)
            trusted_end = opaque(cutlass.select_(plain, safe_high, Int32(-1)))

        left = steps
        while left > 0:
            key_first = (block_first + left - 1) * self.keys
            cute.arch.cp_async_wait_group(0)
            cute.arch.barrier()
            trusted = key_first + self.keys < trusted_end
            if cutlass.const_expr(self.window):
                trusted = trusted & (key_first >= safe_low)
            if cutlass.const_expr(self.paged):
                trusted = trusted & ~pages.has_hole(stream.pages)
            if trusted:
                self.start_plain(args, stream, key_first, low, high, tid, lane)
                self.scores(frag_q, frag_k, acc_s, kept)
                self.start_next(args, stream, key_first - self.keys, low, high, tid)
                offsets.exponentiate(acc_s, row_offset, row_sum, args.log2_scale, self.n_tiles)
                self.accumulate(pair, team, frag_v, acc_s, acc_o)
            else:
                key_first = (block_first + opaque(left) - 1) * self.keys
                self.streams.values(args, stream, key_first, low, high, tid)
                cute.arch.cp_async_commit_group()
                self.scores(frag_q, frag_k, acc_s, kept)
                # Loops of one turn or none: a plain `if` around arithmetic is turned into predicated instructions, and
                # interior blocks then issue the mask and the softcap's exponentials for nothing.
                for _ in cutlass.range(opaque(args.softcap_in > 0.0), unroll=1):
                    softmax.cap(acc_s, args.softcap_in)
                if cutlass.const_expr(self.masked):
                    safe_low, safe_high = self.safe_keys(args, k_len, shift + row_first, shift + row_last)
                if cutlass.const_expr(self.causal or self.window):
                    safe_high = cutlass.min(high, opaque(shift + row_first) + 1)  # found anew, as its end is
                key_first = (block_first + opaque(left) - 1) * self.keys
                edge = key_first + self.keys > safe_high
                if cutlass.const_expr(self.masked):
                    self.mask_tile.apply(args, s_mask, acc_s, warp_row + (lane >> 2), lane, self.m_tiles, self.n_tiles)
                if cutlass.const_expr(self.window or self.masked):
                    edge = edge | (key_first < safe_low)
                if cutlass.const_expr(self.paged):
                    edge = edge | pages.has_hole(stream.pages)
                for turn in cutlass.range(opaque(edge), unroll=1):
                    # The turn is 0; it keeps the comparisons inside the loop. `high` is as good an end as any.
                    thread = opaque(tid) + turn
                    top = shift + row_first + thread // (32 * self.team) * (16 * self.m_tiles) + (thread >> 2) % 8
                    column = key_first + thread // 32 % self.team * (self.n_tiles * 8) + thread % 4 * 2
                    self.mask(args, acc_s, top, column, high, stream, lane)
                grown = offsets.may_outgrow(acc_s, row_offset, self.unit(args), self.n_tiles)
                cute.arch.cp_async_wait_group(0)
                if cutlass.const_expr(self.team > 1):
                    grown = meet_and_vote(grown)
                else:
                    cute.arch.barrier()
                if opaque(left) > 1:
                    key_next = (block_first + opaque(left) - 2) * self.keys
                    rows = s_mask, sequence, row_first, head, count, k_len
                    self.start_keys(args, stream, rows, key_next, low, high, tid, lane)
                for _ in cutlass.range(opaque(cute.arch.vote_any_sync(grown != 0)), unroll=1):
                    for _ in cutlass.range(opaque(self.outgrown(args, acc_s, row_offset)), unroll=1):
                        self.rescale(args, pair, acc_s, acc_o, row_offset, row_sum)
                offsets.exponentiate(acc_s, row_offset, row_sum, args.log2_scale, self.n_tiles)
                self.accumulate(pair, team, frag_v, acc_s, acc_o)
            left = left - 1

        lost = Int32(0)
        if cutlass.const_expr(self.trusts):
            cute.arch.cp_async_wait_group(0)  # the block before the first: zeros, which a second turn must not meet
            rows = [row_sum[row] for row in range(self.m_tiles * 2)]
            outputs = [acc_o[i] for i in range(self.m_tiles * self.d_tiles * 4)]
            some = Int32(trust.extraordinary(rows)) & Int32(trusted_end >= 0)
            for _ in cutlass.range(opaque(meet_and_vote(some)), unroll=1):
                lost = meet_and_vote(Int32(trust.broken(rows, outputs)))
        if lost == 0:
            self.join(pair, row_sum)
            sink = Float32(-Float32.inf)
            if args.sinks != 0:
                sink = softmax.sink_of(self.dtype, args, head) * softmax.LOG2_E
            factors = offsets.ended(row_offset, row_sum, sink, self.m_tiles)
            self.out.store(args, s_q, acc_o, factors, q_start + row_first, count, head, warp_row, team, lane)
        return lost

    @cute.jit
    def sight(self, args, first: Int32, last: Int32, k_len: Int32):
        """(low, safe_low, high, safe_high) of rows that stand at [first, last]: some row sees keys [low, high), every
        row sees [safe_low, safe_high)."""
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

    def bases(self, args, sequence, q_start, row_first, k_start, head):
        """Where the tile's queries begin, and its head's keys and values."""
        kv_head = head // args.group
        q_rows = args.q + Int64(q_start + row_first) * args.q_token_stride + Int64(head) * args.q_head_stride
        k_base = args.k + Int64(kv_head) * args.k_head_stride
        v_base = args.v + Int64(kv_head) * args.v_head_stride
        if self.masked:
            q_rows = args.q + Int64(sequence) * args.q_sequence_stride + Int64(row_first) * args.q_token_stride
            q_rows = q_rows + Int64(head) * args.q_head_stride
            k_base = k_base + Int64(sequence) * args.k_page_stride
            v_base = v_base + Int64(sequence) * args.v_page_stride
        elif not self.paged:
            k_base = k_base + Int64(k_start) * args.k_token_stride
            v_base = v_base + Int64(k_start) * args.v_token_stride
        return q_rows, k_base, v_base

    def start_keys(self, args, stream, rows, key_first, low, high, tid, lane):
        """Start copying the keys of a block, and what a mask tensor says of them for the tile's `rows`."""
        self.streams.look_up(args, stream, key_first, low, high, lane)
        self.streams.keys(args, stream, key_first, low, high, tid)
        if self.masked:
            s_mask, sequence, row_first, head, count, k_len = rows
            base = self.mask_tile.base(args, sequence, row_first, head)
            self.mask_tile.load(args, s_mask, base, key_first, count, k_len, tid)
        cute.arch.cp_async_commit_group()

    def start_plain(self, args, stream, key_first, low, high, tid, lane):
        """Start copying a trusted block's values; of the next block's pages, ask for them."""
        self.streams.values(args, stream, key_first, low, high, tid, whole=True)
        cute.arch.cp_async_commit_group()
        self.streams.look_up(args, stream, key_first - self.keys, low, high, lane)

    def start_next(self, args, stream, key_first, low, high, tid):
        """When the trusted block's values are there and its keys have been read, start copying the next one's keys."""
        cute.arch.cp_async_wait_group(0)
        cute.arch.barrier()
        self.streams.keys(args, stream, key_first, low, high, tid, whole=True)
        cute.arch.cp_async_commit_group()

    def unit(self, args):
        """1 / scale, found anew: its register would be one too many."""
        return rcp(opaque(args.log2_scale.bitcast(Int32)).bitcast(Float32))

    def outgrown(self, args, acc_s, row_offset):
        """Whether some row outgrew its maximum indeed. Warps that share rows have to agree, and believe that it may."""
        if self.team > 1:
            return Int32(1)
        return offsets.outgrown(acc_s, row_offset, args.log2_scale, self.n_tiles)

    def rescale(self, args, pair, acc_s, acc_o, row_offset, row_sum):
        """Move outputs and sums to the maxima of the rows, this block included."""
        tops = pair.tops(acc_s) if self.team > 1 else offsets.warp_tops(acc_s, self.m_tiles * 2, self.n_tiles)
        offsets.rescale(acc_o, row_offset, row_sum, tops, args.log2_scale, self.d_tiles)

    def join(self, pair, row_sum):
        """Sums over all keys of the rows."""
        if self.team > 1:
            cute.arch.barrier()
            pair.join(row_sum)

    def accumulate(self, pair, team, frag_v, acc_s, acc_o):
        """acc_o += P V for the block's keys and this warp's rows and channels."""
        if self.team == 1:
            products.accumulate(self.dtype, acc_s, frag_v, self.m_tiles, self.n_tiles, self.d_tiles, acc_o)
        else:
            keys = self.n_tiles * 8
            pair.accumulate(acc_s, frag_v.below(team * keys), frag_v.below((1 - team) * keys), acc_o)

    def safe_keys(self, args, k_len, first, last):
        """Where the keys begin and end that every row sees, of rows that stand at [first, last], by run-time flags.

        Asked for anew for every block of keys: two numbers that are kept are two registers too many.
        """
        first, last = opaque(first), opaque(last)
        low = cutlass.select_(args.window > 0, last - args.window + 1, Int32(0))
        return low, cutlass.select_(args.causal != 0, cutlass.min(k_len, first + 1), k_len)

    def queries(self, frag_q, column):
        """The A operands of this warp's rows at columns [column, column + 16)."""
        return [frag_q.load(mt * 16, column) for mt in range(self.m_tiles)]

    def scores(self, frag_q, frag_k, acc_s, kept):
        """acc_s = Q K^T for this warp's rows and its keys of the block; `kept`: operands of the first columns."""

        def queries(column):
            at = column // 16
            return kept[at] if at < len(kept) else self.queries(frag_q, column)

        products.scores(self.dtype, queries, frag_k, self.head_dim, self.m_tiles, self.n_tiles, acc_s)

    def mask(self, args, acc_s, position, column, high, stream, lane):
        """-inf wherever a row (first at `position`) must not see a key (this thread's first at `column`)."""
        hidden = Float32(-Float32.inf)
        holes = pages.holes(stream.pages, lane) if self.paged else None
        for mt in range(self.m_tiles):
            for r in range(2):
                here = position + (mt * 16 + r * 8)
                end, begin = high, here - args.window + 1 - column
                if self.causal or self.window:
                    end = cutlass.min(high, here + 1)
                if self.masked:
                    end = cutlass.select_(args.causal != 0, cutlass.min(high, here + 1), high)
                    begin = cutlass.select_(args.window > 0, begin, Int32(-0x7FFFFFFF))
                end = end - column
                for nt in range(self.n_tiles):
                    for c in range(2):
                        drop = end <= nt * 8 + c
                        if self.window or self.masked:
                            drop = drop | (begin > nt * 8 + c)
                        if self.paged:
                            drop = drop | pages.is_hole(holes, nt * 8 + c)
                        at = (mt * self.n_tiles + nt) * 4 + r * 2 + c
                        acc_s[at] = cutlass.select_(drop, hidden, acc_s[at])
