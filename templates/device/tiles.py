"""Shared-memory tiles of 16-bit rows: turns (row, 16-byte chunk) into swizzled byte addresses and register fragments.

A tile is dense, `width` elements a row, with the chunk index xor-ed by the row, so that the eight rows of one 8x8
matrix fall into different banks: by row % 8 where a row is a multiple of 128 bytes, by row / 2 % 4 for the 192-byte
rows of head size 96 (which alternate between two halves of the banks by themselves).
"""

from pa_ops.templates.device.ptx import ldmatrix_x4

CHUNK = 16  # bytes of one cp.async, and of one row of an 8x8 matrix


class TileShape:
    """Rows of `width` 16-bit elements, loaded by `threads` threads."""

    def __init__(self, width, threads):
        self.width = width
        self.pitch = width * 2
        self.chunks = width // 8
        self.wide = width % 64 == 0
        self.lanes_a_row = 8 if self.wide else 4
        self.rows_a_pass = threads // self.lanes_a_row
        self.chunks_a_lane = self.chunks // self.lanes_a_row

    def swizzle(self, row):
        """The xor term of a row; constant over steps of eight rows."""
        return (row & 7) if self.wide else ((row >> 1) & 3)

    def address(self, base, row, chunk):
        """Byte address of one chunk."""
        return base + row * self.pitch + ((chunk ^ self.swizzle(row)) << 4)


def lane_address(shape, base, lane):
    """The row of a 16x16 piece that this lane points ldmatrix at: one register serves queries, keys and values.

    Tiles are aligned to 1024 bytes, so the swizzled bits hold the lane's chunk and nothing else.
    """
    row = lane & 15
    return base + row * shape.pitch + (((lane >> 4) ^ shape.swizzle(row)) << 4)


class Fragments:
    """Reads 16x16 pieces of the tile at `lane_base` + `offset` as operands of m16n8k16, by ldmatrix."""

    def __init__(self, shape, lane_base, offset):
        self.shape, self.lane_base, self.offset = shape, lane_base, offset

    def _quad(self, row, column, transpose):
        """The piece at constant (row, column): one xor in the low bits of the address, the rest an immediate."""
        low = column // 8 % self.shape.lanes_a_row
        offset = self.offset + row * self.shape.pitch + (column // 8 - low) * CHUNK
        return ldmatrix_x4(self.lane_base, low * CHUNK, offset, transpose=transpose)

    def operand_a(self, row, column):
        """Rows [row, row + 16) x columns [column, column + 16) as an A operand (queries)."""
        return self._quad(row, column, transpose=False)

    def operands_b(self, key, column, transpose):
        """16 keys x 16 columns as two B operands: keys by halves (Q K^T), or columns by halves (P V, transposed)."""
        quad = self._quad(key, column, transpose)
        return quad if transpose else [quad[0], quad[2], quad[1], quad[3]]
