"""Tiles that are computed again: turns states that trust has broken (trust.py) into a second listing of their tile.

A warp that finds its state broken gives nothing away, and leaves its bit in a word of the tile's slot, and in those of
all blocks of the cluster one that says so. When the slot is empty, and so all have said what they had to say, the warp
that lists tiles lists that one once more, for those warps alone and with every block of keys an edge, whose maxima are
found.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from pa_ops.templates.device import tma, trust
from pa_ops.templates.device.ptx import ld_shared_32, st_shared_32
from pa_ops.templates.device.shared_sm90 import AGAIN, BARRIER, GROUP_WARPS, SLOT, SLOTS, TURN
from pa_ops.templates.device.softmax import row_elements

SOME = 1 << 16  # beyond the bits of a block's warps: some block's have lost the tile


class Again:
    """The second listing of a block's tiles; without `trusts` there is none."""

    def __init__(self, shared, cluster, trusts):
        self.shared, self.cluster, self.trusts = shared, cluster, trusts

    @cute.jit
    def settle(self, smem: Int32, slot: Int32, acc_o, row_max, row_sum):
        """Whether the warp's state of the tile in `slot` is its to give away; if it is broken, its bit says so."""
        own = Int32(1)
        if cutlass.const_expr(self.trusts):
            again = ld_shared_32(slot + AGAIN)
            bit = Int32(1) << (cute.arch.warp_idx() - GROUP_WARPS)
            own = Int32((again == 0) | ((again & bit) != 0))
            # Rows past the tile's last, of +inf, hold what is another's.
            there = [row_max[r] != Float32.inf for r in range(2)]
            sums = [Float32(cutlass.select_(there[r], row_sum[r], Float32(0.0))) for r in range(2)]
            if cute.arch.vote_any_sync(trust.extraordinary(sums)) & (again == 0):
                outputs = [[acc_o[i] for i in row_elements(r, cute.size(acc_o) // 4)] for r in range(2)]
                broken = [there[r] & trust.broken([row_sum[r]], outputs[r]) for r in range(2)]
                if cute.arch.vote_any_sync(broken[0] | broken[1]):
                    own = Int32(0)
                    if cute.arch.lane_idx() == 0:
                        self.cluster.tell(smem + self.shared.lost + ld_shared_32(slot + TURN) % SLOTS * 4, bit, SOME)
        return own

    @cute.jit
    def leave(self, smem: Int32, turn: Int32):
        """A warp no longer reads the slot of that turn, and if it computes, has said what becomes of the tile."""
        empty = smem + self.shared.slot_empty + turn % SLOTS * BARRIER
        if cutlass.const_expr(self.trusts):
            self.cluster.release(empty)
        else:
            tma.release(empty)

    @cute.jit
    def lost(self, smem: Int32, turn: Int32):
        """The block's warps that lost the tile in the slot of that turn, when all have left it, and whether any did."""
        tma.wait_for(smem + self.shared.slot_empty + turn % SLOTS * BARRIER, (turn // SLOTS + 1) & 1)
        return ld_shared_32(smem + self.shared.lost + turn % SLOTS * 4)

    @cute.jit
    def list(self, smem: Int32, source: Int32, turn: Int32, lost: Int32):
        """List the tile in the slot of turn `source` again, as that of `turn`, for the warps that lost it."""
        lane = cute.arch.lane_idx()
        there = smem + self.shared.slots + source % SLOTS * SLOT
        here = smem + self.shared.slots + turn % SLOTS * SLOT
        if lane * 4 < SLOT:
            word = ld_shared_32(there + lane * 4)
            word = Int32(cutlass.select_(lane * 4 == AGAIN, lost, word))
            st_shared_32(here + lane * 4, Int32(cutlass.select_(lane * 4 == TURN, turn, word)))
        cute.arch.sync_warp()
        if lane == 0:
            st_shared_32(smem + self.shared.lost + source % SLOTS * 4, Int32(0))
            tma.arrive_at(smem + self.shared.slot_full + turn % SLOTS * BARRIER)
        cute.arch.sync_warp()
