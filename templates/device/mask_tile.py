"""Turns a call's mask tensor into tiles of shared memory, and these into scores: what is hidden becomes -inf.

A mask has one of three element sizes, known at run time: 1 byte (bool), 2 (the query's type), 4 (fp32). Rows of a tile
are dense, 16-byte chunks xor-ed by the row, so that the eight rows that a warp reads at a time lie in different banks.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from pa_ops.templates.device.ptx import fma, opaque
from pa_ops.templates.device.ptx_global import ld_global_i32
from pa_ops.templates.device.ptx_masks import cp_async_part, ld_shared_bytes, ld_shared_floats, ld_shared_halves

CHUNK = 16  # bytes of one copy
ELEMENT_BYTES = (1, 2, 4)
HIDING = -1e30  # pa_ops.arguments.HIDING


@cute.jit
def keys_of(args, sequence: Int32):
    """Keys that a sequence of a padded batch sees: all that there is room for, unless lengths say less."""
    count = args.keys
    if args.kv_lengths != 0:
        stored = ld_global_i32(args.kv_lengths + Int64(sequence) * 4)
        count = cutlass.min(cutlass.max(stored, 0), args.keys)
    return count


class MaskTile:
    """`rows` rows of `keys` elements, loaded by `threads` threads, read as scores lie in accumulators."""

    def __init__(self, dtype, rows, keys, threads):
        self.dtype, self.rows, self.keys, self.threads = dtype, rows, keys, threads
        self.bytes = rows * keys * ELEMENT_BYTES[-1]
        self.log2_chunks = (keys // CHUNK).bit_length() - 1  # of a row of bytes
        self.copies = rows * keys // CHUNK // threads  # a thread, of a tile of bytes

    def base(self, args, sequence, row, head):
        """Where the block's first row begins in memory; asked for anew for every tile, an address kept is two registers
        too many."""
        start = args.mask + Int64(opaque(sequence)) * args.mask_sequence_stride + Int64(head) * args.mask_head_stride
        return start + Int64(opaque(row)) * args.mask_row_stride

    @cute.jit
    def load(self, args, shared: Int32, base: Int64, key_first: Int32, count: Int32, k_len: Int32, tid: Int32):
        """Start copying the block of keys at `key_first`; rows from `count` and keys from `k_len` on become zeros."""
        log2_chunks = self.log2_chunks + (args.mask_bytes >> 1)
        for i in cutlass.range(self.copies * args.mask_bytes, unroll=1):
            place = tid + i * self.threads
            row = place >> log2_chunks
            chunk = place - (row << log2_chunks)
            source = base + Int64(row) * args.mask_row_stride + Int64(key_first * args.mask_bytes + chunk * CHUNK)
            room = cutlass.select_(row < count, (k_len - key_first) * args.mask_bytes - chunk * CHUNK, Int32(0))
            turned = chunk ^ swizzle(row, log2_chunks)
            target = shared + ((row << log2_chunks) + turned) * CHUNK
            cp_async_part(target, source, cutlass.min(cutlass.max(room, 0), CHUNK))

    @cute.jit
    def apply(
        self,
        args,
        shared: Int32,
        acc_s,
        row: Int32,
        lane: Int32,
        m_tiles: cutlass.Constexpr,
        n_tiles: cutlass.Constexpr,
    ):
        """Hide, or add to, the scores of this thread, whose first row is `row` of the tile."""
        for size in ELEMENT_BYTES:
            # Loops of one turn or none: code of the other sizes is not run.
            for turn in cutlass.range(opaque(args.mask_bytes == size), unroll=1):
                self.apply_sized(args, shared, acc_s, row + turn, lane, m_tiles, n_tiles, size)

    def apply_sized(self, args, shared, acc_s, row, lane, m_tiles, n_tiles, size):
        """The same for elements of `size` bytes."""
        log2_chunks = self.log2_chunks + (size >> 1)
        flip = swizzle(row, log2_chunks) * CHUNK  # the same for every row of this thread, which are 8 apart
        start = shared + row * (self.keys * size)
        for nt in range(n_tiles):
            column = (lane & 3) * (2 * size) + nt * 8 * size
            place = start + ((column & -CHUNK) ^ flip) + (column & (CHUNK - 1))
            for mt in range(m_tiles):
                for r in range(2):
                    at = (mt * n_tiles + nt) * 4 + r * 2
                    address = place + (mt * 16 + r * 8) * (self.keys * size)
                    acc_s[at], acc_s[at + 1] = self.masked(args, acc_s[at], acc_s[at + 1], address, size)

    def masked(self, args, left, right, address, size):
        """Two neighbouring scores under their elements."""
        hidden = Float32(-Float32.inf)
        if size == 1:
            pair = ld_shared_bytes(address)
            return (
                cutlass.select_((pair & 0xFF) != 0, left, hidden),
                cutlass.select_((pair & 0xFF00) != 0, right, hidden),
            )
        addends = ld_shared_halves(self.dtype, address) if size == 2 else ld_shared_floats(address)
        return [
            cutlass.select_(addend <= HIDING, hidden, fma(addend, args.mask_factor, score))
            for score, addend in zip((left, right), addends, strict=True)
        ]


def swizzle(row, log2_chunks):
    """What the chunks of a row are xor-ed with: rows that share 128 bytes lie apart as they are."""
    if isinstance(log2_chunks, int):
        return (row >> max(3 - log2_chunks, 0)) & (min(1 << log2_chunks, 8) - 1)
    return (row >> cutlass.max(3 - log2_chunks, 0)) & (cutlass.min(1 << log2_chunks, 8) - 1)
