"""Turns a warp's accumulators into rows of the output and their LSE in global memory."""

import cutlass.cute as cute
from cutlass import Int64

from pa_ops.templates.device import softmax
from pa_ops.templates.device.ptx import ld_shared_128, st_shared_32
from pa_ops.templates.device.ptx_global import st_global, st_global_f32


class RowStore:
    """Rows of tiles of `shape`, of which a warp has `m_tiles` x 16 and `d_tiles` x 8 of their channels."""

    def __init__(self, dtype, shape, m_tiles, d_tiles):
        self.dtype, self.shape, self.m_tiles, self.d_tiles = dtype, shape, m_tiles, d_tiles

    def store(self, args, s_q, acc_o, factors, token, count, head, warp_row, team, lane):
        """Write this warp's part of its rows: through that of the query tile, so that stores are 16 bytes wide."""
        scale, lse = factors
        shape = self.shape
        first_chunk = team * self.d_tiles
        lse_row = args.lse + Int64(head) * args.lse_head_stride + Int64(token) * 4
        out_row = args.out + Int64(token) * args.out_token_stride + Int64(head) * args.out_head_stride
        cute.arch.sync_warp()  # every lane has read its queries: only this warp does, or the block has met since
        for mt in range(self.m_tiles):
            for r in range(2):
                row = warp_row + mt * 16 + r * 8 + (lane >> 2)
                for dt in range(self.d_tiles):
                    at = (mt * self.d_tiles + dt) * 4 + r * 2
                    pair = softmax.scaled_pair(self.dtype, acc_o[at], acc_o[at + 1], scale[mt * 2 + r])
                    st_shared_32(shape.address(s_q, row, first_chunk + dt) + (lane & 3) * 4, pair)
                first = ((lane & 3) == 0) & (row < count) & (args.lse != 0) & (team == 0)
                st_global_f32(lse_row + Int64(row) * 4, lse[mt * 2 + r] * softmax.LN_2, first)
        cute.arch.sync_warp()
        lanes = shape.lanes_a_row
        rows_a_pass = 32 // lanes
        chunk = lane % lanes
        for i in range(16 * self.m_tiles // rows_a_pass):
            row = warp_row + i * rows_a_pass + lane // lanes
            target = out_row + Int64(row) * args.out_token_stride
            for j in range(self.d_tiles // lanes):
                column = first_chunk + chunk + j * lanes
                where = (row < count) & (column * 8 < args.head_dim)
                words = ld_shared_128(shape.address(s_q, row, column))
                st_global(target + Int64(column * 16), 0, words, where)
