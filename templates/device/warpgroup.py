"""The two matrix products of attention for the warpgroups of a block: turns shared tiles into scores and outputs.

wgmma m64nNk16 with fp32 accumulation. Tiles are columns of 64 or 32 elements of all rows, swizzled as bulk copies leave
them; accumulators lie in registers in the order of mma.m16n8k16, so the softmax is that of every other kernel.
Both products are only started: `warpgroup.wait_group` tells when registers and tiles may be touched again.
"""

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import warpgroup
from cutlass.cute.nvgpu.warpgroup import Field, OperandMajorMode, OperandSource
from cutlass.utils import hopper_helpers

from pa_ops.templates.device.ptx import pack_pair
from pa_ops.templates.device.shared_sm90 import GROUP_WARPS, columns_of

GROUP_THREADS = 128
GROUP_ROWS = 64
SWIZZLES = {64: warpgroup.SmemLayoutAtomKind.K_SW128, 32: warpgroup.SmemLayoutAtomKind.K_SW64}


def row_of(thread):
    """The first of the two rows, eight apart, of the tile that a computing thread holds."""
    return ((thread >> 5) - GROUP_WARPS) * 16 + ((thread & 31) >> 2)


class Products:
    """Products for `groups` warpgroups of 64 query rows each, and tiles of `keys` keys; V's head size is its own."""

    def __init__(self, dtype, head_dim, head_dim_v, groups, keys):
        self.dtype, self.head_dim, self.head_dim_v = dtype, head_dim, head_dim_v
        self.groups, self.keys = groups, keys

    def tile(self, pointer, *extents):
        """The tensor of a swizzled tile (rows, head size[, stages]) that begins at `pointer`."""
        atom = warpgroup.make_smem_layout_atom(SWIZZLES[columns_of(extents[1])], self.dtype)
        layout = cute.tile_to_shape(atom, extents, tuple(range(len(extents))))
        return cute.make_tensor(cute.recast_ptr(pointer, layout.inner, self.dtype), layout.outer)

    def _score_mma(self):
        k = OperandMajorMode.K
        return hopper_helpers.make_trivial_tiled_mma(
            self.dtype, self.dtype, k, k, Float32, (self.groups, 1, 1), (GROUP_ROWS, self.keys)
        )

    def _output_mma(self):
        return hopper_helpers.make_trivial_tiled_mma(
            self.dtype,
            self.dtype,
            OperandMajorMode.K,
            OperandMajorMode.MN,
            Float32,
            (self.groups, 1, 1),
            (GROUP_ROWS, self.head_dim_v),
            OperandSource.RMEM,
        )

    def start_scores(self, s_q, s_k, stage, group, acc_s):
        """acc_s = Q K^T for the 64 rows of `group` and the keys of `stage`."""
        mma = self._score_mma()
        part = mma.get_slice(group * GROUP_THREADS)
        a = mma.make_fragment_A(part.partition_A(s_q))
        b = mma.make_fragment_B(part.partition_B(s_k))
        acc = cute.make_tensor(acc_s.iterator, cute.make_layout(((2, 2, self.keys // 8), 1, 1)))
        warpgroup.fence()
        for step in range(self.head_dim // 16):
            mma.set(Field.ACCUMULATE, step > 0)
            cute.gemm(mma, acc, a[None, None, step], b[None, None, step, stage], acc)
        warpgroup.commit_group()

    def start_outputs(self, probabilities, s_v, stage, group, acc_o):
        """acc_o += P V for the 64 rows of `group` and the keys of `stage`."""
        mma = self._output_mma()
        part = mma.get_slice(group * GROUP_THREADS)
        transposed = cute.make_tensor(s_v.iterator, cute.select(s_v.layout, mode=[1, 0, 2]))
        b = mma.make_fragment_B(part.partition_B(transposed))
        acc = cute.make_tensor(acc_o.iterator, cute.make_layout(((2, 2, self.head_dim_v // 8), 1, 1)))
        warpgroup.fence()
        for step in range(self.keys // 16):
            mma.set(Field.ACCUMULATE, True)
            cute.gemm(mma, acc, probabilities[None, None, step], b[None, None, step, stage], acc)
        warpgroup.commit_group()

    def probabilities(self):
        """Registers for P as the operand of `start_outputs`."""
        return cute.make_rmem_tensor(((2, 2, 2), 1, self.keys // 16), self.dtype)

    def round(self, acc_s, probabilities):
        """probabilities = acc_s in the element type."""
        words = cute.recast_tensor(probabilities, Int32)
        for i in range(self.keys // 4):
            words[i] = pack_pair(self.dtype, acc_s[2 * i], acc_s[2 * i + 1])
