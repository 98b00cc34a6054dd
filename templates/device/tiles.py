"""Shared-memory tiles of 16-bit rows: turns (row, 16-byte chunk) into swizzled byte addresses and register fragments.

A tile is dense, `width` elements a row, with the chunk index xor-ed by the row, so that the eight rows of one 8x8
matrix fall into different banks: by row % 8 where a row is a multiple of 128 bytes, by row / 2 % 4 for the 192-byte
rows of head size 96 (which alternate between two halves of the banks by themselves).
"""

from copy import copy

from pa_ops.templates.device.ptx import ldmatrix_x4

CHUNK = 16  # bytes of one cp.async, and of one row of an 8x8 matrix
PERIOD = 8  # rows after which chunks lie as before


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
        """The xor term of a row; the same after PERIOD rows."""
        return (row & 7) if self.wide else ((row >> 1) & 3)

    def address(self, base, row, chunk):
        """Byte address of one chunk."""
        return base + row * self.pitch + ((chunk ^ self.swizzle(row)) << 4)


class Fragments:
    """Reads 16x16 pieces of one tile by ldmatrix: a lane's part of the address, a warp's, and a piece's constants.

    Tiles are aligned to 1024 bytes: the swizzled bits of the address hold the lane's chunk and nothing else. Keys and
    values differ in which lanes point at which matrices, so that both operands of a multiplication come in neighbouring
    registers; one mapping for both was 2 to 13% slower (docs/performance.md).
    """

    def __init__(self, shape, base, lane, swapped):
        upper, right = (lane >> 4, (lane >> 3) & 1) if swapped else ((lane >> 3) & 1, lane >> 4)
        row = (lane & 7) + upper * 8
        self.shape, self.base = shape, base
        self.lane = row * shape.pitch + ((right ^ shape.swizzle(row)) << 4)

    def below(self, rows):
        """The same fragments `rows` rows further down."""
        other = copy(self)
        other.base = self.base + rows * self.shape.pitch
        return other

    def load(self, row, column, transpose=False):
        """Registers of rows [row, row + 16) and columns [column, column + 16), both constants."""
        low = column // 8 % self.shape.lanes_a_row
        offset = row * self.shape.pitch + (column // 8 - low) * CHUNK
        return ldmatrix_x4(self.lane, self.base, low * CHUNK, offset, transpose=transpose)
