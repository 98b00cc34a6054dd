"""A warp's stream of key tiles: turns a block's share into page look-ups and copies that run ahead of the computing.

The stream crosses from one sequence or head to the next without a stop, so that a segment's end drains nothing. Pages
are looked up one tile before their keys and values are copied.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32

from pa_ops.templates.device.ptx import st_shared_32
from pa_ops.templates.device.ptx_global import cp_async_twice, ld_global_i32_where
from pa_ops.templates.device.quotients import by_factor, divided
from pa_ops.templates.device.tiles import PERIOD

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

# Bytes of a share, of which a card has two an SM, up to which what was in the L2 cache before is worth more than K and
# V, which nobody reads again: 67 MB take 10% less by it, 268 MB 2% less, 540 MB and more 3 to 4% more.
SMALL = 5 << 18
MOST_TOLD = 192  # columns up to which there are registers for that


class Feed:
    """Tiles of a share, `warp_keys` keys of each being this warp's, through rings of `stages` tiles a warp."""

    def __init__(self, shape, shares, warp_keys, stages):
        self.shape, self.shares, self.warp_keys, self.stages = shape, shares, warp_keys, stages
        self.tile_bytes = warp_keys * shape.pitch
        self.ahead = stages - 1  # tiles that are on their way while one is computed

    def state(self):
        """Room for where the stream stands."""
        return cute.make_rmem_tensor((PENDING + 3 * self.ahead,), Int32)

    def open(self, args, at, sequence, units, stand):
        """Stand at the beginning of a share of so many tiles, where `stand` (segments.py) says, in a sequence."""
        at[UNITS] = units
        self.stand(args, at, sequence, *stand)

    @cute.jit
    def enter(self, args, at, sequence: Int32, place: Int32):
        """Stand before the first tile of a place; beyond the last one, of the next sequence's first."""
        found = sequence < 0  # a loop that tests at its end has `span` in it once
        while not found:
            _, q_len, k_len, first, tiles, blocks = self.shares.span(args, sequence)
            found = place < blocks * args.kv_heads
            if found:
                head = place
                if blocks > 1:
                    head = divided(place, blocks)
                self.stand(args, at, sequence, q_len, k_len, place, head, first, tiles)
            sequence = sequence + 1
            place = Int32(0)

    def stand(self, args, at, sequence, q_len, k_len, place, head, first, tiles):
        """Note where the stream stands: before tile `first`, with `tiles` left of the place."""
        at[SEQUENCE] = sequence
        at[PLACE] = place
        at[HEAD] = head
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
        logical = by_factor(key, args.page_size, args.page_factor)
        live = live & (logical < args.max_pages)
        at[PENDING + 3 * slot] = ld_global_i32_where(table + Int64(logical) * 4, live, -1)
        at[PENDING + 3 * slot + 1] = key - logical * args.page_size
        at[PENDING + 3 * slot + 2] = at[HEAD]
        at[UNITS] = at[UNITS] - 1
        at[LEFT] = at[LEFT] - 1
        at[KEY] = at[KEY] + self.shares.keys
        if (at[LEFT] == 0) & (at[UNITS] > 0):
            self.enter(args, at, at[SEQUENCE], at[PLACE] + 1)

    def is_small(self, units):
        """Whether a share of so many tiles leaves the L2 cache to others, if there are registers to say so."""
        if self.shape.width > MOST_TOLD:
            return Int32(0)
        return Int32(units <= SMALL // (2 * self.shares.keys * self.shape.pitch))

    @cute.jit
    def copy(
        self, args, at, slot: cutlass.Constexpr, ring: Int32, holes: Int32, stage: Int32, lane: Int32, small: Int32
    ):
        """Start copying the warp's keys and values of a tile that was looked up; keys without a page become zeros.

        A word at `holes` + 4 `stage` has a bit for each of them. The lane that looked a key up finds its two rows, and
        hands their addresses to the lanes that copy them: 128 instructions a tile, of 173 where each lane finds rows.
        """
        page, offset, head = (at[PENDING + 3 * slot + i] for i in range(3))
        hole = (page < 0) | (page >= args.num_pages)
        missing = Int32(cute.arch.vote_ballot_sync(hole & (lane < self.warp_keys)))
        k_row = Int64(page) * args.k_page_stride + Int64(offset) * args.k_token_stride
        v_row = Int64(page) * args.v_page_stride + Int64(offset) * args.v_token_stride
        k_row = k_row + args.k + Int64(head) * args.k_head_stride
        v_row = v_row + args.v + Int64(head) * args.v_head_stride
        keys_at = ring + stage * (2 * self.tile_bytes)
        if small != 0:
            self.copy_rows(args, k_row, v_row, missing, keys_at, lane, read_once=True)
        else:
            self.copy_rows(args, k_row, v_row, missing, keys_at, lane, read_once=False)
        cute.arch.cp_async_commit_group()
        st_shared_32(holes + stage * 4, missing)

    def copy_rows(self, args, k_row, v_row, missing, keys_at, lane, read_once):
        """Start copying rows of K and V, each lane those pieces that are its own; it has the addresses of one row."""
        shape = self.shape
        row, chunk = lane // shape.lanes_a_row, lane % shape.lanes_a_row
        firsts = [shape.address(keys_at, row + step, chunk) for step in range(0, PERIOD, shape.rows_a_pass)]
        if read_once:  # ptxas 12.9 forgets an address's uniform register beside a policy; a maximum is the lane's own
            firsts = [cutlass.max(first, 0) for first in firsts]
        mine = missing >> row  # bit `step`: the row that this lane copies in that pass
        for step in range(0, self.warp_keys, shape.rows_a_pass):
            sources = [self.handed(value, row + step) + Int64(chunk * 16) for value in (k_row, v_row)]
            target = firsts[step % PERIOD // shape.rows_a_pass] + step // PERIOD * PERIOD * shape.pitch
            for j in range(shape.chunks_a_lane):
                column = chunk + j * shape.lanes_a_row
                at_chunk = j * shape.lanes_a_row * 16
                skip = mine | Int32(cutlass.select_(column * 8 < args.head_dim, Int32(0), Int32(-1)))
                cp_async_twice(target + at_chunk, self.tile_bytes, sources, at_chunk, skip, step, read_once)

    def handed(self, value, lane):
        """A 64-bit value of another lane."""
        low = cute.arch.shuffle_sync(Int32(value & 0xFFFFFFFF), lane)
        high = cute.arch.shuffle_sync(Int32(value >> 32), lane)
        return (Int64(high) << 32) | Int64(Uint32(low))
