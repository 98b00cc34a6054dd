"""Blocks that share keys: turns a block into its place in a cluster, and what it says of itself into what all hear.

Two blocks, or eight, compute a part of a tile's rows each. Each copies its part of every block of keys into the shared
memory of all, so that the L2 cache is read so much less often: at the power limit energy is time, and those copies are
6 to 12% of it (docs/performance.md). A stage is free when no warp of any reads it any more; the first block takes tiles
for all.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from pa_ops.templates.device import tma
from pa_ops.templates.device.ptx import ld_shared_32
from pa_ops.templates.device.ptx_cluster import arrive_in, or_in, send


class Cluster:
    """Clusters of `blocks` blocks, one, two or eight, in a row of the grid."""

    def __init__(self, blocks):
        self.blocks = blocks

    def shape(self):
        """What a launch is compiled for; None: there are no clusters."""
        return [self.blocks, 1, 1] if self.blocks > 1 else None

    def number(self):
        """Which of the grid's clusters this one is."""
        return cute.arch.block_idx()[0] // self.blocks

    def count(self):
        """Clusters of the grid."""
        return cute.arch.grid_dim()[0] // self.blocks

    def mate(self):
        """Which of the cluster's blocks this one is."""
        return cute.arch.block_idx_in_cluster() if self.blocks > 1 else Int32(0)

    def meet(self):
        """Every thread waits for all others of the cluster, and sees what they wrote."""
        if self.blocks > 1:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.barrier()

    def leave(self):
        """Every thread's last act: a block must not end while another may write to its shared memory."""
        if self.blocks > 1:
            self.meet()

    def release(self, barrier):
        """This warp no longer reads the stage that the barrier guards, nor what any block has copied there."""
        if self.blocks > 1:
            self._release_everywhere(barrier)
        else:
            tma.release(barrier)

    @cute.jit
    def _release_everywhere(self, barrier: Int32):
        cute.arch.sync_warp()
        lane = cute.arch.lane_idx()
        if lane < self.blocks:
            arrive_in(lane, barrier)

    def tell(self, word, own, bits):
        """Set bits of a word of all blocks, and the `own` of this one's; whoever sees this thread's next arrival sees
        them."""
        for block in range(self.blocks):
            or_in(Int32(block), word, bits)
        or_in(self.mate(), word, own)

    def copies(self, box, column, columns):
        """Whether this block copies that box of that one of the `columns` of a tile for all: in turn, so that all have
        as many, and where each had a column of its own, as if they were fields of a chessboard."""
        step = columns if columns % self.blocks else columns + 1
        return (box * (step % self.blocks) + column) % self.blocks == self.mate()

    @cute.jit
    def agree(self, smem: Int32, shared: cutlass.Constexpr, turn: Int32, word: Int32):
        """The first block's word, in all of them; one thread of each asks, with as many turns behind it."""
        if cutlass.const_expr(self.blocks > 1):
            full, empty = smem + shared.word_full, smem + shared.word_empty
            if self.mate() == 0:
                tma.wait_for(empty, (turn + 1) & 1)
                for mate in cutlass.range_constexpr(1, self.blocks):
                    send(Int32(mate), smem + shared.word, full, word)
            else:
                tma.expect(full, 4)
                tma.wait_for(full, turn & 1)
                word = ld_shared_32(smem + shared.word)
                arrive_in(Int32(0), empty)
        return word
