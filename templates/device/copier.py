"""The copying warps of a block: turn the slots of its work list into bulk copies of keys and values."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from pa_ops.templates.device import tma
from pa_ops.templates.device.ptx import ld_shared_32, st_shared_32
from pa_ops.templates.device.ptx_global import ld_global_i32
from pa_ops.templates.device.quotients import by_factor, divided
from pa_ops.templates.device.shared_sm90 import (
    BARRIER,
    END,
    FIRST_KEY,
    HEAD,
    HIGH,
    LOW,
    SEQUENCE,
    SLOT,
    SLOTS,
    STEPS,
    columns_of,
)

LANES = 32
ASK_AHEAD = 4  # blocks of keys before a tile's last: to list a tile takes about as long as to compute two


class Ring(NamedTuple):
    """The stages of K or of V: where they and their full and empty barriers begin, bytes of one, the head size."""

    at: int
    full: int
    empty: int
    bytes: int
    head_dim: int


class Copier:
    """Copies blocks of `keys` keys, in columns.

    One warp copies keys, another values, and neither waits for the other's stages: in pages of 16 tokens a tile is 16
    copies, which one warp alone started so slowly that they cost 12% more than pages of 64 (docs/performance.md).
    """

    def __init__(self, shared, cluster, again, head_dim, head_dim_v, paged, masked, keys):
        self.shared, self.cluster, self.again = shared, cluster, again
        self.paged, self.masked, self.keys = paged, masked, keys
        self.k_ring = Ring(shared.k, shared.k_full, shared.k_empty, shared.k_bytes, head_dim)
        self.v_ring = Ring(shared.v, shared.v_full, shared.v_empty, shared.v_bytes, head_dim_v)

    @cute.jit
    def run(self, args, smem: Int32, ring: cutlass.Constexpr, tensor_map: Int64):
        """Copy the keys or the values of each tile, as soon as there is room for them."""
        if cute.arch.lane_idx() == 0:
            tma.prefetch_map(tensor_map)
        turn, stage, parity = Int32(0), Int32(0), Int32(0)
        slot = self.slot_of(smem, turn)
        while ld_shared_32(slot) != 0:
            if ld_shared_32(slot + STEPS) == 0:
                self.ask(smem, ring)
            stage, parity = self.copy_blocks(args, smem, ring, tensor_map, slot, stage, parity)
            self.again.leave(smem, turn)
            turn = turn + 1
            slot = self.slot_of(smem, turn)

    def slot_of(self, smem, turn):
        """The slot of that turn, when it has been written."""
        tma.wait_for(smem + self.shared.slot_full + turn % SLOTS * BARRIER, turn // SLOTS & 1)
        return smem + self.shared.slots + turn % SLOTS * SLOT

    @cute.jit
    def ask(self, smem: Int32, ring: cutlass.Constexpr):
        """Have the next tile listed; one of the warps does."""
        if cutlass.const_expr(ring == self.k_ring) and cute.arch.lane_idx() == 0:
            tma.arrive_at(smem + self.shared.asked)

    @cute.jit
    def copy_blocks(
        self,
        args,
        smem: Int32,
        ring: cutlass.Constexpr,
        tensor_map: Int64,
        slot: Int32,
        stage: Int32,
        parity: Int32,
    ):
        """K or V of each block of keys in the slot, from the last to the first; the stage that follows."""
        kv_head = ld_shared_32(slot + HEAD) // args.group
        steps = ld_shared_32(slot + STEPS)
        row, page = ld_shared_32(slot + FIRST_KEY) + ld_shared_32(slot + END) * self.keys, Int32(0)
        if cutlass.const_expr(self.masked):
            page = ld_shared_32(slot + SEQUENCE)
        lane, rows, pages, first = cute.arch.lane_idx(), Int32(0), Int32(0), Int32(0)
        for i in cutlass.range(steps, unroll=1):
            if i == cutlass.max(steps - ASK_AHEAD, 0):
                self.ask(smem, ring)
            if cutlass.const_expr(self.paged):
                if first == 0:
                    rows, pages = self.look_up(args, slot, ld_shared_32(slot + END) - 1 - i)
                row, page = (cute.arch.shuffle_sync(value, first + lane) for value in (rows, pages))
                first = first + args.boxes
                first = Int32(cutlass.select_(first + args.boxes > LANES, Int32(0), first))
            else:
                row = row - self.keys
            tma.wait_for(smem + ring.empty + stage * BARRIER, parity ^ 1)
            if cutlass.const_expr(self.paged and ring == self.k_ring):
                missing = cute.arch.vote_ballot_sync((page < 0) & (lane < args.boxes))
                if lane == 0:  # whose arrival tells of the stage
                    st_shared_32(smem + self.shared.holes + stage * 4, Int32(missing))
            self.copy_tile(args, smem, ring, tensor_map, stage, row, page, kv_head)
            stage, parity = self.shared.after(stage, parity)
        return stage, parity

    @cute.jit
    def look_up(self, args, slot: Int32, block: Int32):
        """(row, page) of the boxes of a block of keys, one a lane, and of blocks before it as long as there are lanes;
        page -1 where none of a box's keys is live or in the table.

        For each block by itself that took as long as to compute one: with pages of 80 and of 128, 10 and 13% more
        cycles than without pages.
        """
        lane = cute.arch.lane_idx()
        before = divided(lane, args.boxes)
        key = (block - before) * self.keys + (lane - before * args.boxes) * args.box_rows
        row, page = Int32(0), Int32(-1)
        if (key < ld_shared_32(slot + HIGH)) & (key + args.box_rows > ld_shared_32(slot + LOW)):
            logical = by_factor(key, args.page_size, args.page_factor)
            row = key - logical * args.page_size
            if logical < args.max_pages:
                table = args.block_table + Int64(ld_shared_32(slot + SEQUENCE)) * args.table_stride
                page = ld_global_i32(table + Int64(logical) * 4)
        return row, Int32(cutlass.select_((page < 0) | (page >= args.num_pages), Int32(-1), page))

    @cute.jit
    def copy_tile(
        self,
        args,
        smem: Int32,
        ring: cutlass.Constexpr,
        tensor_map: Int64,
        stage: Int32,
        row: Int32,
        page: Int32,
        kv_head: Int32,
    ):
        """Start copying a tile of K or V into its stage, a box a lane, those of this block; boxes without a page become
        zeros, unread."""
        lane, columns = cute.arch.lane_idx(), columns_of(ring.head_dim)
        barrier = smem + ring.full + stage * BARRIER
        if lane == 0:
            tma.expect(barrier, ring.bytes)
        cute.arch.sync_warp()
        target = smem + ring.at + stage * ring.bytes
        boxes = Int32(1)
        if cutlass.const_expr(self.paged):
            # Beyond the last page of the map, which has one even where the pool has none.
            page = Int32(cutlass.select_(page < 0, cutlass.max(args.num_pages, 1), page))
        elif cutlass.const_expr(self.cluster.blocks > 1):
            row = row + lane * args.box_rows
        if cutlass.const_expr(self.paged or self.cluster.blocks > 1):
            boxes = args.boxes
            target = target + lane * (args.box_rows * columns * 2)
        places = [(Int32(column), target + self.keys * column * 2) for column in range(0, ring.head_dim, columns)]
        if lane < boxes:
            if cutlass.const_expr(self.cluster.blocks > 1):
                for number, place in enumerate(places):
                    if self.cluster.copies(lane, number, len(places)):
                        self.load([place], tensor_map, barrier, row, kv_head, page, blocks=self.cluster.blocks)
            elif args.beside != 0:  # decode streams past: other row blocks and heads would read them from memory again
                self.load(places, tensor_map, barrier, row, kv_head, page, read_again=True)
            else:
                self.load(places, tensor_map, barrier, row, kv_head, page)

    def load(self, places, tensor_map, barrier, row, kv_head, page, **options):
        """Start copying one lane's boxes, of (column, shared address) each."""
        for column, at in places:
            tma.load_box(at, tensor_map, barrier, column, row, kv_head, page, **options)
