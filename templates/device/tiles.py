"""Shared-memory tiles of 16-bit rows: turns (row, 16-byte chunk) into swizzled byte addresses and register fragments.

A tile is dense, `width` elements a row, with the chunk index xor-ed by the row, so that the eight rows of one 8x8 matrix
fall into different banks: by row % 8 where a row is a multiple of 128 bytes, by row / 2 % 4 for the 192-byte rows of
head size 96 (its rows alternate between two halves of the banks by themselves).
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


class Fragments:
    """One lane's base address, and the constant part that a column adds: one xor in the low bits, the rest immediate.

    Tiles are aligned to 1024 bytes, so the swizzled bits of `base` hold the lane's chunk and nothing else.
    """

    def __init__(self, shape, base, row, half):
        self.shape = shape
        self.base = base + row * shape.pitch + ((half ^ shape.swizzle(row)) << 4)

    def load_at(self, row, column, transpose):
        """Registers of the four matrices whose first row and column are the constants (row, column)."""
        low = column // 8 % self.shape.lanes_a_row
        offset = row * self.shape.pitch + (column // 8 - low) * CHUNK
        return ldmatrix_x4(self.base, low * CHUNK, offset, transpose=transpose)


class FragmentA(Fragments):
    """Reads 16x16 pieces of row-major rows as the A operand of m16n8k16 (queries)."""

    def __init__(self, shape, base, lane, first_row):
        super().__init__(shape, base, first_row + (lane & 15), lane >> 4)

    def load(self, row, column):
        """Registers of rows [row, row + 16) and columns [column, column + 16)."""
        return self.load_at(row, column, transpose=False)


class FragmentB(Fragments):
    """Reads 16 keys x 16 columns as two B operands: of Q @ K^T (transpose=False) or of P @ V (transpose=True)."""

    def __init__(self, shape, base, lane, transpose):
        upper, right = ((lane >> 3) & 1, lane >> 4) if transpose else (lane >> 4, (lane >> 3) & 1)
        super().__init__(shape, base, (lane & 7) + upper * 8, right)
        self.transpose = transpose

    def load(self, key, column):
        """Registers of keys [key, key + 16) and columns [column, column + 16)."""
        return self.load_at(key, column, transpose=self.transpose)
