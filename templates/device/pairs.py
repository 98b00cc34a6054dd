"""Two warps share their rows: turns each one's scores for half of the keys into outputs for half of the channels.

At head size 256 a warp alone has registers for the outputs of 16 rows, and reads every fragment of K and V for those
alone: 144 ldmatrix for 256 multiplications, which shared memory serves slower than tensor cores multiply. Two warps
with 32 rows read 100 and trade probabilities, as the multiplication's own fragments, in lane order.
"""

import cutlass.cute as cute
from cutlass import Float32, Int32

from pa_ops.templates.device import offsets, products, softmax
from pa_ops.templates.device.ptx import ld_shared_32, ld_shared_128, opaque, st_shared_32, st_shared_128

FRAGMENT_BYTES = 512  # 16 x 16 of 16 bits
STATISTICS_BYTES = 256  # a warp's; fp32 by row


class Pair:
    """Warp `warp`, beside its partner, with `m_tiles` x 16 rows; `base`: where probabilities go in shared memory."""

    def __init__(self, base, warp, lane, dtype, m_tiles, n_tiles, d_tiles):
        self.dtype, self.m_tiles, self.n_tiles, self.d_tiles = dtype, m_tiles, n_tiles, d_tiles
        warp_bytes = m_tiles * (n_tiles // 2) * FRAGMENT_BYTES
        self.mine = base + warp * warp_bytes + lane * 16
        self.theirs = base + (warp ^ 1) * warp_bytes + lane * 16
        self.base, self.warp, self.lane = base, warp, lane

    def trade(self, values):
        """The partner's values of the same rows; all threads of the block meet twice."""
        at = self.base + (opaque(self.lane) >> 2) * 4  # found anew: seldom needed, and registers are scarce
        mine, partners = (at + warp * STATISTICS_BYTES for warp in (self.warp, self.warp ^ 1))
        for row, value in enumerate(values):
            st_shared_32(mine + row * 32, value.bitcast(Int32))
        cute.arch.barrier()
        theirs = [ld_shared_32(partners + row * 32).bitcast(Float32) for row in range(len(values))]
        cute.arch.barrier()
        return theirs

    def tops(self, acc_s):
        """The largest score of each row, of both warps."""
        mine = offsets.warp_tops(acc_s, self.m_tiles * 2, self.n_tiles)
        return [cute.arch.fmax(a, b) for a, b in zip(mine, self.trade(mine), strict=True)]

    def join(self, row_sum):
        """Add the partner's sums to this warp's."""
        rows = range(self.m_tiles * 2)
        theirs = self.trade([softmax.quad_sum(row_sum[row]) for row in rows])
        for row in rows:
            # softmax.finish adds up the four lanes of a row, each of which has the partner's whole sum.
            row_sum[row] = softmax.fma(theirs[row], Float32(0.25), row_sum[row])

    def accumulate(self, acc_s, own_v, other_v, acc_o):
        """acc_o += P V: own keys first, and the partner's, which have come meanwhile."""
        steps = range(self.n_tiles // 2)
        own = [products.probabilities(self.dtype, acc_s, step, self.m_tiles, self.n_tiles) for step in steps]
        for step in steps:
            for mt in range(self.m_tiles):
                st_shared_128(self.mine + (step * self.m_tiles + mt) * FRAGMENT_BYTES, own[step][mt])
        for step in steps:
            products.accumulate_step(self.dtype, own[step], own_v, step, self.d_tiles, acc_o)
        cute.arch.barrier()
        for step in steps:
            at = self.theirs + step * self.m_tiles * FRAGMENT_BYTES
            other = [ld_shared_128(at + mt * FRAGMENT_BYTES) for mt in range(self.m_tiles)]
            products.accumulate_step(self.dtype, other, other_v, step, self.d_tiles, acc_o)
