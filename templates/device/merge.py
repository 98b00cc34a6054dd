"""Merge two attention states over disjoint keys: turns (out, lse) pairs into the state over all keys, one warp a row.

An lse of -inf or +inf marks an empty side: it weighs nothing, whatever its out holds (NaN included), by select.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from pa_ops.templates.device import softmax
from pa_ops.templates.device.ptx import ex2, lg2
from pa_ops.templates.device.ptx_global import ld_global_f32, ld_global_half, st_global_f32, st_global_half
from pa_ops.templates.device.ptx_grid import start_next_grid, wait_for_grid


def base_two(address):
    """An lse in base 2, +inf read as -inf: both mean that no key was seen."""
    value = ld_global_f32(address) * softmax.LOG2_E
    return cutlass.select_(value == Float32.inf, Float32(-Float32.inf), value)


def weights(a, b):
    """(weight of a, weight of b, merged lse), all in base 2; an empty side weighs 0, two of them merge to -inf."""
    peak = cute.arch.fmax(a, b)
    empty = peak == -Float32.inf
    base = cutlass.select_(empty, Float32(0.0), peak)
    part_a, part_b = ex2(a - base), ex2(b - base)
    total = part_a + part_b
    share = 1.0 / total
    return part_a * share, part_b * share, cutlass.select_(empty, Float32(-Float32.inf), lg2(total) + base)


def weighted(value, weight, lse):
    """value * weight, and 0 where the side is empty, whatever the value."""
    return Float32(cutlass.select_(lse == -Float32.inf, Float32(0.0), value * weight))


class Merge:
    """One instance for elements of `dtype`; `warps` rows a block, grid-stride."""

    def __init__(self, dtype, warps, chained):
        self.dtype, self.warps, self.chained = dtype, warps, chained
        self.smem_bytes = 0

    @cute.jit
    def __call__(self, args):
        self.kernel(args).launch(grid=[1, 1, 1], block=[self.warps * 32, 1, 1])

    @cute.kernel
    def kernel(self, args):
        wait_for_grid(self.chained)
        start_next_grid(self.chained)
        block, _, _ = cute.arch.block_idx()
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        rows = Int64(args.tokens) * Int64(args.heads)
        first = Int64(block * self.warps + warp)
        blocks, _, _ = cute.arch.grid_dim()
        step = Int64(blocks * self.warps)
        for turn in cutlass.range(Int32((rows - first + step - 1) // step), unroll=1):
            row = first + Int64(turn) * step
            token, head = row // Int64(args.heads), row % Int64(args.heads)
            a = base_two(args.lse_a + head * args.lse_a_stride + token * 4)
            b = base_two(args.lse_b + head * args.lse_b_stride + token * 4)
            weight_a, weight_b, merged = weights(a, b)
            st_global_f32(args.lse + head * args.lse_stride + token * 4, merged * softmax.LN_2, lane == 0)
            row_a = args.out_a + token * args.a_token_stride + head * args.a_head_stride
            row_b = args.out_b + token * args.b_token_stride + head * args.b_head_stride
            row_out = args.out + token * args.out_token_stride + head * args.out_head_stride
            for i in cutlass.range(lane, args.width, 32, unroll=1):
                at = Int64(i) * 2
                part_a = weighted(ld_global_half(self.dtype, row_a + at), weight_a, a)
                part_b = weighted(ld_global_half(self.dtype, row_b + at), weight_b, b)
                st_global_half(self.dtype, row_out + at, part_a + part_b)
