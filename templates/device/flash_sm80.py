"""FlashAttention forward for SM80 and newer: turns one block's queries and the keys they see into output rows and LSE.

mma.sync m16n8k16 with fp32 accumulation, cp.async, online softmax in base 2. One loop body: V of a block travels while
Q K^T runs, K of the next block while softmax and P V run; masking sits behind a branch that is the same for a whole
block, so interior blocks pay one compare for it. Two thread blocks an SM hide what is left, or one of eight warps, two
of which share their rows (pairs.py).
The scheme is FlashAttention-2's (Dao, arXiv 2307.08691); page look-up, masks and work list are this project's.
"""

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from pa_ops.templates.device import offsets, pages, products, softmax, trust
from pa_ops.templates.device.cp_tiles import TileCopies
from pa_ops.templates.device.key_streams import DenseKeys, PagedKeys
from pa_ops.templates.device.mask_tile import MaskTile
from pa_ops.templates.device.pairs import Pair
from pa_ops.templates.device.ptx import opaque
from pa_ops.templates.device.ptx_grid import start_next_grid, wait_for_grid
from pa_ops.templates.device.ptx_warp import meet_and_vote, pinned
from pa_ops.templates.device.row_store import RowStore
from pa_ops.templates.device.rows_sm80 import Rows
from pa_ops.templates.device.tiles import Fragments, TileShape
from pa_ops.templates.device.worklist import find_tile


class Part(NamedTuple):
    """What of every tile is a thread's: its warp's rows, from `row` on, and the fragments that it reads."""

    tid: Int32
    lane: Int32
    team: Int32  # which of the warps that share rows
    row: Int32
    s_q: Int32
    s_k: Int32
    s_mask: Int32
    q: Fragments
    k: Fragments
    v: Fragments
    pair: Pair
    kept: list  # operands of the first columns of Q


class State(NamedTuple):
    """Registers: the scores of a block of keys, and what its rows have come to."""

    scores: Any
    outputs: Any
    offsets: Any
    sums: Any


class FlashSm80:
    """One instance: the compile-time choices and the code that they specialise."""

    def __init__(self, dtype, head_dim, paged, causal, window, masked, rows, keys, warps, chained):
        self.dtype, self.head_dim, self.paged, self.chained = dtype, head_dim, paged, chained
        self.window, self.masked = window, masked
        self.rows, self.keys = rows, keys
        self.threads = warps * 32
        self.trusts = trust.is_safe(dtype) and not masked
        self.team = warps // 4  # warps that share rows: each has its part of the keys' scores and of the channels
        self.m_tiles = rows * self.team // (16 * warps)
        self.n_tiles = keys // 8 // self.team
        self.d_tiles = head_dim // 8 // self.team
        # Columns of Q / 16 that stay in registers, where there are any to spare.
        self.kept = 4 if head_dim == 64 and not (paged or masked) else 0
        self.shape = TileShape(head_dim, self.threads)
        self.tiles = Rows(paged, causal, window, masked, rows, keys)
        self.copies = TileCopies(self.shape, rows, keys, ranged=window or masked)
        self.streams = (PagedKeys if paged else DenseKeys)(self.copies, keys * head_dim * 2)
        self.out = RowStore(dtype, self.shape, self.m_tiles, self.d_tiles)
        self.q_bytes = rows * head_dim * 2
        self.kv_bytes = keys * head_dim * 2
        self.mask_tile = MaskTile(dtype, rows, keys, self.threads)
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
            rank, head = self.tiles.place(args)
            sequence, block = find_tile(args, self.rows, rank)
            if sequence >= 0:
                lost = self.run_tile(args, sequence, block, head, trusting)
            trusting = Int32(0)

    @cute.jit
    def run_tile(self, args, sequence: Int32, block: Int32, head: Int32, trusting: Int32):
        """Attention of one tile's rows, given away unless trust has broken them; whether it has."""
        tile = self.tiles.tile(args, sequence, block, head)
        part = self.part()
        scores = cute.make_rmem_tensor((self.m_tiles * self.n_tiles * 4,), Float32)
        state = State(scores, *offsets.fresh(self.m_tiles, self.d_tiles))
        q_rows, *bases = self.tiles.bases(args, tile)
        stream = self.streams.open(args, bases, sequence, tile.end, part.s_k, part.tid, part.lane)
        if tile.steps > 0:
            self.copies.queries(args, part.s_q, q_rows, tile.count, part.tid)
            if cutlass.const_expr(self.kept > 0):
                cute.arch.cp_async_commit_group()
            self.start_keys(args, tile, part, stream, (tile.end - 1) * self.keys)
        part = self.keep(part)
        trusted_end = self.trusted_end(args, tile, trusting)
        left = tile.steps
        while left > 0:
            key_first = (tile.begin + left - 1) * self.keys
            cute.arch.cp_async_wait_group(0)
            cute.arch.barrier()
            if self.is_trusted(tile, stream, key_first, trusted_end):
                self.trusted_block(args, tile, part, stream, state, key_first)
            else:
                self.careful_block(args, tile, part, stream, state, left)
            left = left - 1
        lost = self.is_lost(state, trusted_end)
        if lost == 0:
            self.give(args, tile, part, state)
        return lost

    def part(self):
        """What of a tile is this thread's."""
        tid, _, _ = cute.arch.thread_idx()
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        s_q = Int32(cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024).toint())
        s_k = s_q + self.q_bytes
        s_v = s_k + self.kv_bytes
        s_mask = s_v + self.kv_bytes
        team = warp % self.team
        row = warp // self.team * (16 * self.m_tiles)
        frag_q = Fragments(self.shape, s_q + row * self.shape.pitch, lane, swapped=False)
        frag_k = Fragments(self.shape, s_k + team * (self.n_tiles * 8) * self.shape.pitch, lane, swapped=True)
        frag_v = Fragments(self.shape, s_v + team * (self.d_tiles * 16), lane, swapped=False)
        frag_q.lane = frag_v.lane = pinned(frag_q.lane, lane)
        frag_k.lane = pinned(frag_k.lane, lane)
        pair = Pair(s_mask, warp, lane, self.dtype, self.m_tiles, self.n_tiles, self.d_tiles)
        return Part(tid, lane, team, row, s_q, s_k, s_mask, frag_q, frag_k, frag_v, pair, [])

    def keep(self, part):
        """The same with operands of Q's first columns, which have been copied before the first keys, in registers."""
        if self.kept == 0:
            return part
        cute.arch.cp_async_wait_group(1)
        cute.arch.barrier()
        return part._replace(kept=[self.queries(part.q, column * 16) for column in range(self.kept)])

    def trusted_end(self, args, tile, trusting):
        """Blocks whose last key comes before this are trusted: every row has seen a key, and their scores are plain."""
        if not self.trusts:
            return Int32(-1)
        plain = (trusting != 0) & (args.softcap_in == 0.0) & (args.head_dim == self.head_dim)
        return opaque(cutlass.select_(plain, tile.safe_high, Int32(-1)))

    def is_trusted(self, tile, stream, key_first, trusted_end):
        """Whether the block at `key_first` is one of those; where none is, there is no code for them."""
        if not self.trusts:
            return False
        trusted = key_first + self.keys < trusted_end
        if self.window:
            trusted = trusted & (key_first >= tile.safe_low)
        if self.paged:
            trusted = trusted & ~pages.has_hole(stream.pages)
        return trusted

    def trusted_block(self, args, tile, part, stream, state, key_first):
        """A block of keys whose scores are plain, and whose maxima are those of the blocks before."""
        low, high, tid = tile.low, tile.high, part.tid
        self.streams.values(args, stream, key_first, low, high, tid, whole=True)
        cute.arch.cp_async_commit_group()
        self.streams.look_up(args, stream, key_first - self.keys, low, high, part.lane)
        self.scores(part, state)
        # The values are there, and the keys have been read.
        cute.arch.cp_async_wait_group(0)
        cute.arch.barrier()
        self.streams.keys(args, stream, key_first - self.keys, low, high, tid, whole=True)
        cute.arch.cp_async_commit_group()
        self.weigh(args, part, state)

    @cute.jit
    def careful_block(self, args, tile, part, stream, state, left: Int32):
        """The block of keys that is followed by `left` - 1 others, whose scores may be capped, hidden or too large.

        Where it begins is found anew each time: registers are scarce.
        """
        key_first = (tile.begin + opaque(left) - 1) * self.keys
        self.streams.values(args, stream, key_first, tile.low, tile.high, part.tid)
        cute.arch.cp_async_commit_group()
        self.scores(part, state)
        # Loops of one turn or none: a plain `if` around arithmetic is turned into predicated instructions, and interior
        # blocks then issue the mask and the softcap's exponentials for nothing.
        for _ in cutlass.range(opaque(args.softcap_in > 0.0), unroll=1):
            softmax.cap(state.scores, args.softcap_in)
        safe_low, safe_high = self.tiles.safe_keys(args, tile)
        key_first = (tile.begin + opaque(left) - 1) * self.keys
        edge = key_first + self.keys > safe_high
        if cutlass.const_expr(self.masked):
            row = part.row + (part.lane >> 2)
            self.mask_tile.apply(args, part.s_mask, state.scores, row, part.lane, self.m_tiles, self.n_tiles)
        if cutlass.const_expr(self.window or self.masked):
            edge = edge | (key_first < safe_low)
        if cutlass.const_expr(self.paged):
            edge = edge | pages.has_hole(stream.pages)
        for turn in cutlass.range(opaque(edge), unroll=1):
            # The turn is 0; it keeps the comparisons inside the loop.
            self.hide(args, tile, part, stream, state, key_first, opaque(part.tid) + turn)
        grown = offsets.may_outgrow(state.scores, state.offsets, softmax.unit_anew(args.log2_scale), self.n_tiles)
        cute.arch.cp_async_wait_group(0)
        if cutlass.const_expr(self.team > 1):
            grown = meet_and_vote(grown)
        else:
            cute.arch.barrier()
        if opaque(left) > 1:
            self.start_keys(args, tile, part, stream, (tile.begin + opaque(left) - 2) * self.keys)
        for _ in cutlass.range(opaque(cute.arch.vote_any_sync(grown != 0)), unroll=1):
            for _ in cutlass.range(opaque(self.outgrown(args, state)), unroll=1):
                self.rescale(args, part, state)
        self.weigh(args, part, state)

    @cute.jit
    def is_lost(self, state, trusted_end: Int32):
        """Whether trust has broken some row's state (trust.py): the whole block agrees."""
        lost = Int32(0)
        if cutlass.const_expr(self.trusts):
            cute.arch.cp_async_wait_group(0)  # the block before the first: zeros, which a second turn must not meet
            rows = [state.sums[row] for row in range(self.m_tiles * 2)]
            outputs = [state.outputs[i] for i in range(self.m_tiles * self.d_tiles * 4)]
            some = Int32(trust.extraordinary(rows)) & Int32(trusted_end >= 0)
            for _ in cutlass.range(opaque(meet_and_vote(some)), unroll=1):
                lost = meet_and_vote(Int32(trust.broken(rows, outputs)))
        return lost

    @cute.jit
    def give(self, args, tile, part, state):
        """Write the rows and their LSE."""
        if cutlass.const_expr(self.team > 1):
            cute.arch.barrier()
            part.pair.join(state.sums)
        sink = Float32(-Float32.inf)
        if args.sinks != 0:
            sink = softmax.sink_of(self.dtype, args, tile.head) * softmax.LOG2_E
        factors = offsets.ended(state.offsets, state.sums, sink, self.m_tiles)
        token = tile.q_start + tile.first
        where = token, tile.count, tile.head, part.row, part.team, part.lane
        self.out.store(args, part.s_q, state.outputs, factors, *where)

    def start_keys(self, args, tile, part, stream, key_first):
        """Start copying the keys of a block, and what a mask tensor says of them."""
        self.streams.look_up(args, stream, key_first, tile.low, tile.high, part.lane)
        self.streams.keys(args, stream, key_first, tile.low, tile.high, part.tid)
        if self.masked:
            base = self.mask_tile.base(args, tile.sequence, tile.first, tile.head)
            self.mask_tile.load(args, part.s_mask, base, key_first, tile.count, tile.k_len, part.tid)
        cute.arch.cp_async_commit_group()

    def queries(self, frag_q, column):
        """The A operands of this warp's rows at columns [column, column + 16)."""
        return [frag_q.load(mt * 16, column) for mt in range(self.m_tiles)]

    def scores(self, part, state):
        """Q K^T for this warp's rows and its keys of the block."""

        def queries(column):
            at = column // 16
            return part.kept[at] if at < len(part.kept) else self.queries(part.q, column)

        products.scores(self.dtype, queries, part.k, self.head_dim, self.m_tiles, self.n_tiles, state.scores)

    def hide(self, args, tile, part, stream, state, key_first, thread):
        """-inf for scores of keys that a row must not see; what is this thread's is found anew from its number."""
        row = thread // (32 * self.team) * (16 * self.m_tiles) + (thread >> 2) % 8
        column = key_first + thread // 32 % self.team * (self.n_tiles * 8) + thread % 4 * 2
        tiles = self.m_tiles, self.n_tiles
        # The end of what the tile sees is as good as any.
        self.tiles.hide(args, state.scores, tile.position + row, column, tile.high, stream, part.lane, *tiles)

    def outgrown(self, args, state):
        """Whether some row outgrew its maximum indeed. Warps that share rows have to agree, and believe that it may."""
        if self.team > 1:
            return Int32(1)
        return offsets.outgrown(state.scores, state.offsets, args.log2_scale, self.n_tiles)

    def rescale(self, args, part, state):
        """Move outputs and sums to the maxima of the rows, this block included."""
        rows = self.m_tiles * 2
        own = self.team == 1
        tops = offsets.warp_tops(state.scores, rows, self.n_tiles) if own else part.pair.tops(state.scores)
        offsets.rescale(state.outputs, state.offsets, state.sums, tops, args.log2_scale, self.d_tiles)

    def weigh(self, args, part, state):
        """The block's values by the exponentials of its scores, added to the outputs."""
        offsets.exponentiate(state.scores, state.offsets, state.sums, args.log2_scale, self.n_tiles)
        if self.team == 1:
            tiles = self.m_tiles, self.n_tiles, self.d_tiles
            products.accumulate(self.dtype, state.scores, part.v, *tiles, state.outputs)
        else:
            keys = self.n_tiles * 8
            own, other = part.v.below(part.team * keys), part.v.below((1 - part.team) * keys)
            part.pair.accumulate(state.scores, own, other, state.outputs)
