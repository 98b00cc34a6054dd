"""A warp's stream of key tiles: turns a block's share into page look-ups and copies that run ahead of the computing.

The stream crosses from one sequence or head to the next without a stop, so that a segment's end drains nothing. Pages
are looked up one tile before their keys and values are copied.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32

from pa_ops.templates.device.ptx import cp_async_16, ld_global_i32_where, st_shared_32

EVERY = 0x7FFFFFFF  # a limit that no page exceeds

# Words of the stream's state: where it stands, then what has been looked up and not yet copied.
UNITS = 0  # tiles of the share that are still to be looked up
LEFT = 1  # of them, those of this place
SEQUENCE = 2
PLACE = 3  # number of the head and row block in the sequence
HEAD = 4
KEY = 5  # the next tile's first
LOW = 6  # keys [LOW, HIGH) are seen
HIGH = 7
PENDING = 8  # page, offset and head of each tile between look-up and copy


class Feed:
    """Tiles of a share, `warp_keys` keys of each being this warp's, through rings of `stages` tiles a warp."""

    def __init__(self, shape, shares, warp_keys, stages):
        self.shape, self.shares, self.warp_keys, self.stages = shape, shares, warp_keys, stages
        self.tile_bytes = warp_keys * shape.pitch
        self.ahead = stages - 1  # tiles that are on their way while one is computed

    def state(self):
        """Room for where the stream stands."""
        return cute.make_rmem_tensor((PENDING + 3 * self.ahead,), Int32)

    @cute.jit
    def open(self, args, at, sequence: Int32, base: Int32, begin: Int32, end: Int32):
        """Stand before tile `begin` of the share [begin, end), in the sequence whose tiles begin at `base`."""
        _, q_len, k_len, first, tiles, blocks = self.shares.span(args, sequence)
        place = (begin - base) // tiles
        skipped = begin - base - place * tiles
        at[UNITS] = end - begin
        self.stand(args, at, sequence, place, q_len, k_len, first + skipped, tiles - skipped, blocks)

    @cute.jit
    def enter(self, args, at, sequence: Int32, place: Int32):
        """Stand before the first tile of a place; beyond the last one, of the next sequence's first."""
        found = sequence < 0  # a loop that tests at its end has `span` in it once
        while not found:
            _, q_len, k_len, first, tiles, blocks = self.shares.span(args, sequence)
            found = place < blocks * args.kv_heads
            if found:
                self.stand(args, at, sequence, place, q_len, k_len, first, tiles, blocks)
            sequence = sequence + 1
            place = Int32(0)

    def stand(self, args, at, sequence, place, q_len, k_len, first, tiles, blocks):
        """Note where the stream stands: before tile `first`, with `tiles` left of the place."""
        at[SEQUENCE] = sequence
        at[PLACE] = place
        at[HEAD] = place // blocks
        at[LEFT] = tiles
        at[KEY] = first * self.shares.keys
        at[HIGH] = k_len
        at[LOW] = Int32(0)
        if self.shares.window:
            at[LOW] = cutlass.max(k_len - q_len - args.window + 1, 0)

    def shift(self, at):
        """The tile looked up second is now the first."""
        for i in range(3 * (self.ahead - 1)):
            at[PENDING + i] = at[PENDING + 3 + i]

    @cute.jit
    def look_up(self, args, at, slot: cutlass.Constexpr, warp: Int32, lane: Int32):
        """The pages of the next tile's keys, one a lane, into a pending slot: -1 where there is nothing to read.

        Nothing here looks at what is read: a warp that did would wait for it, and memory takes as long as a tile.
        """
        key = at[KEY] + warp * self.warp_keys + lane
        live = (at[UNITS] > 0) & (lane < self.warp_keys) & (key >= at[LOW]) & (key < at[HIGH])
        table = args.block_table + Int64(at[SEQUENCE]) * args.table_stride
        logical = Int32(Uint32(key) // Uint32(args.page_size))
        live = live & (logical < args.max_pages)
        at[PENDING + 3 * slot] = ld_global_i32_where(table + Int64(logical) * 4, live, -1)
        at[PENDING + 3 * slot + 1] = key - logical * args.page_size
        at[PENDING + 3 * slot + 2] = at[HEAD]
        at[UNITS] = at[UNITS] - 1
        at[LEFT] = at[LEFT] - 1
        at[KEY] = at[KEY] + self.shares.keys
        if (at[LEFT] == 0) & (at[UNITS] > 0):
            self.enter(args, at, at[SEQUENCE], at[PLACE] + 1)

    def copy(self, args, at, slot, ring, holes, stage, lane):
        """Start copying the warp's keys and values of a tile that was looked up; keys without a page become zeros.

        A word at `holes` + 4 `stage` has a bit for each of them.
        """
        shape = self.shape
        page_here, offset_here, head = (at[PENDING + 3 * slot + i] for i in range(3))
        page_here = Int32(cutlass.select_((page_here < 0) | (page_here >= args.num_pages), Int32(-1), page_here))
        row, chunk = lane // shape.lanes_a_row, lane % shape.lanes_a_row
        keys_at = ring + stage * (2 * self.tile_bytes)
        k_base = args.k + Int64(head) * args.k_head_stride
        v_base = args.v + Int64(head) * args.v_head_stride
        for step in range(0, self.warp_keys, shape.rows_a_pass):
            page = cute.arch.shuffle_sync(page_here, row + step)
            offset = cute.arch.shuffle_sync(offset_here, row + step)
            k_row = k_base + Int64(page) * args.k_page_stride + Int64(offset) * args.k_token_stride
            v_row = v_base + Int64(page) * args.v_page_stride + Int64(offset) * args.v_token_stride
            target = shape.address(keys_at, row + step, chunk)  # a pass is shorter than the swizzle's eight rows
            for j in range(shape.chunks_a_lane):
                column = chunk + j * shape.lanes_a_row
                limit = cutlass.select_(column * 8 < args.head_dim, Int32(EVERY), Int32(0))
                at_chunk = j * shape.lanes_a_row * 16
                cp_async_16(target + at_chunk, k_row + Int64(column * 16), page, limit)
                cp_async_16(target + self.tile_bytes + at_chunk, v_row + Int64(column * 16), page, limit)
        cute.arch.cp_async_commit_group()
        missing = cute.arch.vote_ballot_sync((page_here < 0) & (lane < self.warp_keys))
        st_shared_32(holes + stage * 4, Int32(missing))
