"""Shares of a batch's key tiles: turns lengths on the device into the ranges of tiles that blocks work on.

Tiles of all sequences lie in one row: sequence by sequence, in each head by head, row block by row block, then by key.
Every block has an equal part of that row, so that long and short sequences load the device alike (stream-K, Osama et
al., PPoPP 2023), and finds it by itself: one trip to memory and one scan of the batch. Where a share begins and ends
depends on the lengths alone, and so do all results. On an H200, 24 of the SMs read memory a quarter faster than the
others; when they are done the others are the faster for it, so that to have them help gained nothing
(docs/performance.md).

Under batch invariance sequences are cut into chunks, at multiples of a size that follows from their own lengths, and
shares end between chunks: who computes one depends on the batch, what becomes of it does not. cuts.py has the
arithmetic.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from pa_ops.templates.device import beside
from pa_ops.templates.device.cuts import (
    SPREAD_BITS,
    Place,
    bounds,
    chunk_begin,
    chunk_bits,
    chunk_left,
    even,
    owner_of,
    part_of_chunk,
)
from pa_ops.templates.device.ptx import ld_shared_32, st_shared_32
from pa_ops.templates.device.quotients import divided
from pa_ops.templates.device.worklist import length_at, paged_keys, scan_warp

THREADS = 128
LEAST = 4  # tiles of a share that is cut

# Words of shared memory.
SUMS = 0  # tiles and places of each warp's sequences
BEGIN = 8  # the sequence in which a share begins, or a thread's first before it, and the first tile of that
END = 10  # the same for where it ends
CUT = 12  # the four numbers of cuts.py
SHARE = 16  # the block's own
STARTS = 17  # the first tile of each thread's sequences, and the end of the last one's
WORK = STARTS + THREADS + 1  # blocks and work of each warp's sequences, for the next grid
LONGEST = WORK + 2 * (THREADS // 32)  # tiles that one of each warp's sequences has at most
# Of a block that shares the device with the next grid. Between words that are read while one thread writes it, it was
# in the same wide loads, and racecheck told of a race for a word that nobody used.
TICKET = LONGEST + THREADS // 32
WORDS = TICKET + 2  # an even number


class Shares:
    """Shares of tiles of `rows` query rows and `keys` keys; WORDS words of shared memory at `at` tell of them.

    Chunks of a sequence are 2^`most` at most, or one more; there are none where the record's `chunk_bits` is `uncut`.
    """

    def __init__(self, rows, keys, window, most, uncut, at):
        self.rows, self.keys, self.window, self.at = rows, keys, window, at
        self.most, self.uncut = most, uncut

    @cute.jit
    def span(self, args, sequence: Int32):
        """(first query row, queries, keys, first tile, tiles, row blocks) of a sequence; no row blocks of an empty one.

        A sequence with more than `skip_above` queries is another kernel's. One that sees no key has one tile all the
        same, so that its rows are written.
        """
        q_start, q_len = length_at(args.cu_seqlens_q, sequence, args.tokens)
        k_len = paged_keys(args, sequence, q_len)
        first = Int32(0)
        if cutlass.const_expr(self.window):
            first = cutlass.max(k_len - q_len - args.window + 1, 0) // self.keys
        tiles = cutlass.max((k_len + (self.keys - 1)) // self.keys - first, 1)
        blocks = (q_len * args.group + (self.rows - 1)) // self.rows
        blocks = Int32(cutlass.select_(q_len > args.skip_above, Int32(0), blocks))
        return q_start, q_len, k_len, first, tiles, blocks

    @cute.jit
    def count(self, args, smem: Int32):
        """Cut the batch's tiles into shares, and find the block's first: (begin, end), empty where there are too few.

        Each of the block's threads counts the tiles of a run of sequences.
        """
        tid, _, _ = cute.arch.thread_idx()
        warp, lane = tid // 32, tid % 32
        run = self.run_of(args)
        early = Int32(-1)
        if (args.most_given > 0) & (tid == 0):
            early = beside.draw_early(args)
        own, own_places, own_blocks, own_work, longest = Int32(0), Int32(0), Int32(0), Int32(0), Int32(0)
        for i in cutlass.range(run, unroll=1):
            sequence = tid * run + i
            if sequence < args.sequences:
                _, q_len, _, _, tiles, row_blocks = self.span(args, sequence)
                own = own + tiles * row_blocks
                own_places = own_places + row_blocks
                longest = cutlass.max(longest, Int32(cutlass.select_(row_blocks > 0, tiles, Int32(0))))
                if q_len > args.skip_above:
                    blocks, work = beside.work_of(args, q_len, tiles, self.keys)
                    own_blocks, own_work = own_blocks + blocks, own_work + work
        inclusive, places_here = scan_warp(own), scan_warp(own_places)
        longest = cute.arch.warp_redux_sync(longest, "max")
        if lane == 31:
            self.put(smem, SUMS + warp * 2, inclusive)
            self.put(smem, SUMS + 1 + warp * 2, places_here)
            self.put(smem, LONGEST + warp, longest)
        if args.most_given > 0:
            blocks_here, work_here = scan_warp(own_blocks), scan_warp(own_work)
            if lane == 31:
                self.put(smem, WORK + warp * 2, blocks_here)
                self.put(smem, WORK + 1 + warp * 2, work_here)
        cute.arch.barrier()
        before, total, places = Int32(0), Int32(0), Int32(0)
        for w in cutlass.range_constexpr(THREADS // 32):
            sums = self.get(smem, SUMS + w * 2)
            before = before + Int32(cutlass.select_(Int32(w) < warp, sums, Int32(0)))
            total = total + sums
            places = places + self.get(smem, SUMS + 1 + w * 2)
            longest = cutlass.max(longest, self.get(smem, LONGEST + w))
        ticket, grid = self.ticket(args, smem, total, early)
        cut = self.cut(total * args.kv_heads, places * args.kv_heads, longest, grid)
        # The other way round: who opens a row waits for the shares after its own, whose blocks start no later.
        share = Int32(cutlass.select_((ticket >= 0) & (ticket < cut[1]), cut[1] - 1 - ticket, cut[1]))
        begin, end = bounds(cut, share)
        stop = (before + inclusive) * args.kv_heads
        self.put(smem, STARTS + 1 + tid, stop)
        self.mark(args, smem, BEGIN, begin, stop - own * args.kv_heads, stop)
        self.mark(args, smem, END, end, stop - own * args.kv_heads, stop)
        if tid == 0:
            self.put(smem, STARTS, Int32(0))
            self.put(smem, SHARE, share)
            for i in cutlass.range_constexpr(len(cut)):
                self.put(smem, CUT + i, cut[i])
        cute.arch.barrier()
        if (args.chunk_bits < self.uncut) & (begin < end):
            begin = self.between_chunks(args, smem, BEGIN, begin)
            if end < cut[0]:
                end = self.between_chunks(args, smem, END, end)
        return begin, end

    @cute.jit
    def ticket(self, args, smem: Int32, tiles: Int32, early: Int32):
        """(the block's number among those that have shares, or -1; how many they are), for `tiles` tiles a KV head."""
        ticket, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        if args.most_given > 0:
            blocks, work = Int32(0), Int32(0)
            for w in cutlass.range_constexpr(THREADS // 32):
                blocks = blocks + self.get(smem, WORK + w * 2)
                work = work + self.get(smem, WORK + 1 + w * 2)
            given = beside.given(args, tiles, blocks, work)
            spare = divided(given * grid, args.sms)
            tid, _, _ = cute.arch.thread_idx()
            if tid == 0:
                self.put(smem, TICKET, beside.draw(args, grid, given, spare, early))
            cute.arch.barrier()
            ticket, grid = self.get(smem, TICKET), grid - spare
        return ticket, grid

    @cute.jit
    def cut(self, total: Int32, places: Int32, longest: Int32, grid: Int32):
        """How `total` tiles, in so many heads and row blocks of sequences, become shares of `grid` blocks: a cut.

        No more than there are blocks and tiles, and else one a place, or as many as give each LEAST tiles: a merge
        costs as much as some tiles do, so what is cut is long, and what is short is not put together. Where all places
        are as long as the `longest`, shares end where they do if they nearly would.
        """
        blocks = cutlass.max(cutlass.min(grid, cutlass.max(places, total // LEAST)), 1)
        if total == places * longest:
            blocks = even(total, cutlass.max(places, 1), blocks)
        each = divided(total, blocks)
        spread = divided((total - each * blocks << SPREAD_BITS) + (blocks - 1), blocks)
        return total, blocks, each, spread

    def posting(self, args):
        """Whether parts of a row are posted to the block that opened it: where no chunks are."""
        return args.chunk_bits == self.uncut

    def own(self, smem):
        """The number of the block's share."""
        return self.get(smem, SHARE)

    def last(self, smem, start, tiles):
        """The share with the last of the tiles [start, start + `tiles`)."""
        return owner_of(self.noted(smem), start + tiles - 1)

    def noted(self, smem):
        """The block's cut, from shared memory."""
        return tuple(self.get(smem, CUT + i) for i in range(4))

    def place(self, args, start, first, tiles):
        """The tiles [start, start + `tiles`) of the row, of one head and row block, as cuts.py wants them."""
        return Place(start, first, tiles, chunk_bits(args.chunk_bits, tiles, self.most))

    def reach(self, args, first, tiles, tile):
        """Tiles from a place's `tile` on that are computed in one go, if the share holds them."""
        return chunk_left(self.place(args, Int32(0), first, tiles), tile)

    @cute.jit
    def between_chunks(self, args, smem: Int32, word: cutlass.Constexpr, unit: Int32):
        """The first tile of the chunk that holds tile `unit`, which was marked at `word`."""
        sequence, base = self.seek(args, self.get(smem, word), self.get(smem, word + 1), unit)
        _, _, _, first, tiles, _ = self.span(args, sequence)
        tile = unit - base - divided(unit - base, tiles) * tiles
        return unit - tile + chunk_begin(self.place(args, Int32(0), first, tiles), tile)

    def part(self, args, smem, stretch):
        """What the block has computed of a place, by a segment with that Stretch (segments.py): a Part of cuts.py."""
        place = self.place(args, stretch.start, stretch.first, stretch.tiles)
        tile = stretch.unit - stretch.start
        return part_of_chunk(self.noted(smem), self.get(smem, SHARE), place, tile, (1 << self.most) + 1)

    @cute.jit
    def mark(self, args, smem: Int32, word: cutlass.Constexpr, unit: Int32, start: Int32, stop: Int32):
        """Note at `word` where tile `unit` is, by the thread whose sequences have tiles [start, stop)."""
        if (start <= unit) & (unit < stop):
            tid, _, _ = cute.arch.thread_idx()
            self.put(smem, word, tid * self.run_of(args))
            self.put(smem, word + 1, start)

    @cute.jit
    def located(self, args, smem: Int32, unit: Int32):
        """(sequence, its first tile) of tile `unit`, where a share begins that was marked before the last barrier."""
        sequence, base = self.get(smem, BEGIN), self.get(smem, BEGIN + 1)
        if self.run_of(args) > 1:  # else the thread that marked it has counted that sequence alone
            sequence, base = self.seek(args, sequence, base, unit)
        return sequence, base

    @cute.jit
    def seek(self, args, sequence: Int32, base: Int32, unit: Int32):
        """(sequence, its first tile) of tile `unit`, at or after the sequence whose tiles begin at `base`."""
        found = unit < 0  # a loop that tests at its end has `span` in it once
        while not found:
            _, _, _, _, tiles, blocks = self.span(args, sequence)
            after = base + tiles * blocks * args.kv_heads
            found = unit < after
            if not found:
                base = after
                sequence = sequence + 1
        return sequence, base

    def run_of(self, args):
        """Sequences that one thread counts."""
        return (args.sequences + (THREADS - 1)) // THREADS

    def put(self, smem, word, value):
        """Store a word of the scratch."""
        st_shared_32(smem + self.at + word * 4, value)

    def get(self, smem, word):
        """Load a word of the scratch."""
        return ld_shared_32(smem + self.at + word * 4)
