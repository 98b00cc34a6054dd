"""The copying warp of a block: turns the slots of its work list into bulk copies of queries, keys and values."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32

from pa_ops.templates.device import tma
from pa_ops.templates.device.ptx import ld_global_i32, ld_shared_32, st_shared_32
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
    TOKEN,
)
from pa_ops.templates.device.warpgroup import COLUMN

ASK_AHEAD = 4  # blocks of keys before a tile's last: to list a tile takes about as long as to compute two


class Copier:
    """Copies tiles of `rows` query rows and blocks of `keys` keys, in columns of 64 elements."""

    def __init__(self, shared, head_dim, paged, rows, keys):
        self.shared, self.paged, self.rows, self.keys = shared, paged, rows, keys
        self.halves = head_dim // COLUMN
        self.q_bytes, self.kv_bytes = rows * head_dim * 2, keys * head_dim * 2

    @cute.jit
    def run(self, args, smem: Int32, q_map: Int64, k_map: Int64, v_map: Int64):
        """Copy what each tile needs, as soon as there is room for it."""
        lane = cute.arch.lane_idx()
        if lane == 0:
            tma.prefetch_map(q_map)
            tma.prefetch_map(k_map)
            tma.prefetch_map(v_map)
        turn, stage, parity = Int32(0), Int32(0), Int32(0)
        tma.wait_for(smem + self.shared.slot_full, 0)
        slot = smem + self.shared.slots
        while ld_shared_32(slot) != 0:
            tma.wait_for(smem + self.shared.q_empty, (turn + 1) & 1)
            self.copy_queries(smem, q_map, slot)
            if ld_shared_32(slot + STEPS) > 0:
                stage, parity = self.copy_keys(args, smem, k_map, v_map, slot, stage, parity)
            elif lane == 0:
                tma.arrive_at(smem + self.shared.asked)
            cute.arch.sync_warp()
            if lane == 0:
                tma.arrive_at(smem + self.shared.slot_empty + turn % SLOTS * BARRIER)
            turn = turn + 1
            tma.wait_for(smem + self.shared.slot_full + turn % SLOTS * BARRIER, turn // SLOTS & 1)
            slot = smem + self.shared.slots + turn % SLOTS * SLOT

    @cute.jit
    def copy_queries(self, smem: Int32, q_map: Int64, slot: Int32):
        """The tile's rows; those past the sequence's last are another's, and nobody looks at what becomes of them."""
        full = smem + self.shared.q_full
        if cute.arch.lane_idx() == 0:
            token, head = ld_shared_32(slot + TOKEN), ld_shared_32(slot + HEAD)
            tma.expect(full, self.q_bytes)
            for half in range(self.halves):
                at = smem + half * (self.rows * COLUMN * 2)
                tma.load_box(at, q_map, full, Int32(half * COLUMN), token, head, Int32(0))
        cute.arch.sync_warp()

    @cute.jit
    def copy_keys(self, args, smem: Int32, k_map: Int64, v_map: Int64, slot: Int32, stage: Int32, parity: Int32):
        """K of each block of keys, from the last to the first, and V one block behind it; the stage that follows."""
        kv_head = ld_shared_32(slot + HEAD) // args.group
        steps = ld_shared_32(slot + STEPS)
        block = ld_shared_32(slot + END) - 1
        row, page = self.box_of(args, slot, block)
        last_row, last_page, last_stage, last_parity = row, page, stage, parity
        for i in cutlass.range(steps, unroll=1):
            if (i == cutlass.max(steps - ASK_AHEAD, 0)) & (cute.arch.lane_idx() == 0):
                tma.arrive_at(smem + self.shared.asked)
            if cutlass.const_expr(self.paged):
                page = Int32(cutlass.select_((page < 0) | (page >= args.num_pages), Int32(-1), page))
            tma.wait_for(smem + self.shared.k_empty + stage * BARRIER, parity ^ 1)
            if cutlass.const_expr(self.paged):
                missing = cute.arch.vote_ballot_sync((page < 0) & (cute.arch.lane_idx() < self.keys // args.box_rows))
                st_shared_32(smem + self.shared.holes + stage * 4, Int32(missing))
            self.copy_tile(args, smem, self.shared.k, self.shared.k_full, k_map, stage, row, page, kv_head)
            # The next look-up is under way, and what it brings not looked at, while V waits for its stage.
            next_row, next_page = self.box_of(args, slot, block - 1 - i)
            if i > 0:
                self.copy_values(args, smem, v_map, last_stage, last_parity, last_row, last_page, kv_head)
            last_row, last_page, last_stage, last_parity = row, page, stage, parity
            row, page = next_row, next_page
            stage, parity = self.shared.after(stage, parity)
        self.copy_values(args, smem, v_map, last_stage, last_parity, last_row, last_page, kv_head)
        return stage, parity

    def copy_values(self, args, smem, v_map, stage, parity, row, page, kv_head):
        """V of a block into its stage, when that has been read."""
        tma.wait_for(smem + self.shared.v_empty + stage * BARRIER, parity ^ 1)
        self.copy_tile(args, smem, self.shared.v, self.shared.v_full, v_map, stage, row, page, kv_head)

    @cute.jit
    def box_of(self, args, slot: Int32, block: Int32):
        """(row, page) of this lane's box of a block of keys; page -1 where none of its keys is live or in the table."""
        row, page = ld_shared_32(slot + FIRST_KEY) + block * self.keys, Int32(0)
        if cutlass.const_expr(self.paged):
            key = block * self.keys + cute.arch.lane_idx() * args.box_rows
            page = Int32(-1)
            if (key < ld_shared_32(slot + HIGH)) & (key + args.box_rows > ld_shared_32(slot + LOW)):
                logical = Int32(Uint32(key) // Uint32(args.page_size))
                row = key - logical * args.page_size
                if logical < args.max_pages:
                    table = args.block_table + Int64(ld_shared_32(slot + SEQUENCE)) * args.table_stride
                    page = ld_global_i32(table + Int64(logical) * 4)
        return row, page

    @cute.jit
    def copy_tile(
        self,
        args,
        smem: Int32,
        tiles_at: cutlass.Constexpr,
        full_at: cutlass.Constexpr,
        tensor_map: Int64,
        stage: Int32,
        row: Int32,
        page: Int32,
        kv_head: Int32,
    ):
        """Start copying a tile of K or V into its stage, a box a lane; boxes without a page become zeros, unread."""
        lane = cute.arch.lane_idx()
        barrier = smem + full_at + stage * BARRIER
        if lane == 0:
            tma.expect(barrier, self.kv_bytes)
        cute.arch.sync_warp()
        target = smem + tiles_at + stage * self.kv_bytes
        boxes = Int32(1)
        if cutlass.const_expr(self.paged):
            boxes = self.keys // args.box_rows
            target = target + lane * (args.box_rows * COLUMN * 2)
            page = Int32(cutlass.select_(page < 0, args.num_pages, page))
        if lane < boxes:
            for half in range(self.halves):
                at = target + half * (self.keys * COLUMN * 2)
                tma.load_box(at, tensor_map, barrier, Int32(half * COLUMN), row, kv_head, page)
