"""States of rows over parts of a tile's keys: turns what several blocks found (parts.py) into whole rows.

A warp leaves the state of its 16 rows over a part in the workspace, as its lanes hold it, and the last one to arrive at
the rows' counter adds all of them up, in the order of the parts: who is last decides nothing.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from pa_ops.templates.device import softmax
from pa_ops.templates.device.ptx import ld_shared_32
from pa_ops.templates.device.ptx_global import arrive, ld_global_f32x4, st_global, st_global_i32
from pa_ops.templates.device.shared_sm90 import GROUP_WARPS, PART, PARTS, STATE

QUAD_BYTES = 32 * 16  # of four words a lane
BATCH = 16  # of them: 64 registers beside a thread's 128 outputs at head size 256


class PartStates:
    """States of `warps` warps a tile, `d_tiles` x 8 outputs a row; without `taken` every tile is whole."""

    def __init__(self, d_tiles, warps, taken):
        self.quads, self.warps, self.taken = d_tiles, warps, taken
        self.bytes = (self.quads + 1) * QUAD_BYTES  # of a warp's: outputs, then maxima and sums

    @cute.jit
    def join(self, args, slot: Int32, acc_o, row_max, row_sum, thread: Int32):
        """Whether the warp has its rows' state over all keys of the tile in `slot`, now: where there are other parts,
        it leaves its own, and has all if it is the last. So does a warp without a row: to ask spills 8 B at 256."""
        whole = Int32(1)
        if cutlass.const_expr(self.taken):
            parts = ld_shared_32(slot + PARTS)
            if parts > 1:
                whole = self.leave(args, slot, parts, acc_o, row_max, row_sum, thread)
        return whole

    @cute.jit
    def leave(self, args, slot: Int32, parts: Int32, acc_o, row_max, row_sum, thread: Int32):
        """Leave the warp's state; 1 if all others of its rows have been left, which then are added to it."""
        warp, lane = (thread >> 5) - GROUP_WARPS, thread & 31
        first = ld_shared_32(slot + STATE) - ld_shared_32(slot + PART)
        mine = self.state_at(args, ld_shared_32(slot + STATE), warp, lane)
        self.put(mine, acc_o, row_max, row_sum)
        counter = args.part_counters + Int64(first * self.warps + warp) * 4
        cute.arch.sync_warp()
        others = Int32(0)
        if lane == 0:
            others = arrive(counter)
        others = cute.arch.shuffle_sync(others, 0)
        if others == parts - 1:
            if lane == 0:
                st_global_i32(counter, Int32(0))
            cute.arch.sync_warp()  # what the lane that arrived may see, all may
            acc_o.fill(0.0)
            row_max.fill(-Float32.inf)
            row_sum.fill(0.0)
            for part in cutlass.range(parts, unroll=1):
                self.add(args, self.state_at(args, first + part, warp, lane), acc_o, row_max, row_sum)
        return Int32(others == parts - 1)

    def state_at(self, args, state, warp, lane):
        """The address of a lane's first outputs of a warp's state."""
        return args.partials + Int64(state * self.warps + warp) * self.bytes + Int64(lane * 16)

    def put(self, target, acc_o, row_max, row_sum):
        """Store a lane's outputs, maxima and sums."""
        values = [*(acc_o[i] for i in range(self.quads * 4)), *(stat[r] for stat in (row_max, row_sum) for r in (0, 1))]
        words = [value.bitcast(Int32) for value in values]
        for quad in range(self.quads + 1):
            st_global(target, quad * QUAD_BYTES, words[quad * 4 : quad * 4 + 4], True)

    def add(self, args, source, acc_o, row_max, row_sum):
        """Add the state at `source`: of its loads, BATCH are on their way before one is used."""
        stats = self.quad_at(source, self.quads)
        keep, gain = [], []
        for r in range(2):
            _, kept, gained = softmax.joint(row_max[r] * args.log2_scale, stats[r] * args.log2_scale)
            keep.append(kept)
            gain.append(gained)
            row_max[r] = cute.arch.fmax(row_max[r], stats[r])
            row_sum[r] = softmax.mix(row_sum[r], keep[r], stats[2 + r], gain[r])
        for first in range(0, self.quads, BATCH):
            quads = range(first, min(first + BATCH, self.quads))
            outputs = [word for words in [self.quad_at(source, quad) for quad in quads] for word in words]
            for i, word in enumerate(outputs, first * 4):
                row = i // 2 % 2
                acc_o[i] = softmax.mix(acc_o[i], keep[row], word, gain[row])

    def quad_at(self, source, quad):
        """Four words of a lane, of the state at `source`."""
        return ld_global_f32x4(source + Int64(quad * QUAD_BYTES), True)
