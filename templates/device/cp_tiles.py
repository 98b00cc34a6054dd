"""Tiles by cp.async: turns query rows and blocks of keys in global memory into swizzled shared memory, meanwhile.

What is not to be seen, rows beyond a count and columns beyond the head size, becomes zeros, unread.
"""

import cutlass
from cutlass import Int32, Int64

from pa_ops.templates.device import pages
from pa_ops.templates.device.ptx_global import cp_async_16, cp_async_there

ANY = 0x7FFFFFFF


class TileCopies:
    """Copies of tiles of `rows` query rows and `keys` keys; `ranged`: some block may begin with hidden keys."""

    def __init__(self, shape, rows, keys, ranged):
        self.shape, self.rows, self.keys, self.ranged = shape, rows, keys, ranged

    def place(self, tid):
        """The row and the chunk of it that are this thread's first of every tile."""
        return tid // self.shape.lanes_a_row, tid % self.shape.lanes_a_row

    def queries(self, args, shared, base, count, tid):
        """Start copying the block's query rows, the first at `base`; those from `count` on become zeros."""
        row, chunk = self.place(tid)
        step = self.shape.rows_a_pass
        target = self.shape.address(shared, row, chunk)
        source = base + Int64(row) * args.q_token_stride + Int64(chunk * 16)
        for i in range(self.rows // step):
            self._row(args, target, i * step, source, chunk, row + i * step, count)
            source = source + args.q_token_stride * step

    def found(self, args, shared, base, page_stride, token_stride, live_pages, tid):
        """Start copying a block of K or V from its pages; keys on none become zeros."""
        row, chunk = self.place(tid)
        step = self.shape.rows_a_pass
        target = self.shape.address(shared, row, chunk)
        for i in range(self.keys // step):
            page, offset = pages.page_of_row(live_pages, row, i * step)
            source = base + Int64(page) * page_stride + Int64(offset) * token_stride + Int64(chunk * 16)
            self._row(args, target, i * step, source, chunk, page, Int32(ANY))

    def next(self, args, target, source, token_stride, key_first, low, high, tid):
        """Start copying a block of K or V from `key_first` on, this thread's first chunk from `source` to `target`.

        Keys outside [low, high) become zeros.
        """
        row, chunk = self.place(tid)
        step = self.shape.rows_a_pass
        first = low if self.ranged else 0
        for i in range(self.keys // step):
            self._row(args, target, i * step, source, chunk, key_first + row + i * step - first, high - first)
            source = source + token_stride * step

    def whole(self, target, source, token_stride, there):
        """Start copying a block of K or V of which every row and column is to be seen; nothing where it is not
        `there`."""
        shape = self.shape
        for i in range(self.keys // shape.rows_a_pass):
            for j in range(shape.chunks_a_lane):
                column = j * shape.lanes_a_row * 16
                cp_async_there(target, i * shape.rows_a_pass * shape.pitch + column, source, column, there)
            source = source + token_stride * shape.rows_a_pass

    def _row(self, args, target, rows, source, chunk, position, limit):
        """This thread's chunks of the tile row `rows` below its first: copied where `position` < `limit`, unsigned."""
        shape = self.shape
        for j in range(shape.chunks_a_lane):
            column = j * shape.lanes_a_row
            ceiling = cutlass.select_((chunk + column) * 8 < args.head_dim, limit, Int32(0))
            cp_async_16(target + (rows * shape.pitch + column * 16), source + column * 16, position, ceiling)
