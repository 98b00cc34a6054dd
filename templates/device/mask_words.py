"""Turns rows of a mask tensor into words a computing thread holds while a product runs, and these into scores.

A thread has, of each 8 columns, the two that begin at 2 (lane % 4), of two rows. Loaded that way a warp would ask for
32 bytes of eight rows 16 times; so a lane takes 8 neighbouring elements of each 32, and four lanes trade them. Elements
are bytes (bool) or of the query's type, which is known at run time; rows begin and end at multiples of 16 bytes.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from pa_ops.templates.device.mask_tile import HIDING
from pa_ops.templates.device.ptx import _asm, fma, opaque
from pa_ops.templates.device.quads import trade

SPAN = 32  # columns that four lanes load together
LANE_COLUMNS = 8


@dsl_user_op
def ld_global_words(address, count, where, *, loc=None, ip=None):
    """Four or two words through the read-only path where `where` holds, zeros else; `count` says how many."""
    names = ", ".join(f"${i}" for i in range(count))
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(count))
    load = f"@p ld.global.nc.v{count}.b32 {{{names}}}, [${count}];"
    words = _asm(
        llvm.StructType.get_literal([T.i32()] * count),
        [Int64(address).ir_value(loc=loc, ip=ip), Int32(where).ir_value(loc=loc, ip=ip)],
        f"{{ .reg .pred p; setp.ne.b32 p, ${count + 1}, 0; {zeros} {load} }}",
        ",".join(["=&r"] * count) + ",l,r",
        True,
        loc,
        ip,
    )
    return [Int32(llvm.extractvalue(T.i32(), words, [i], loc=loc, ip=ip)) for i in range(count)]


@dsl_user_op
def widen_pair(dtype, word, *, loc=None, ip=None):
    """Two packed fp16 or bf16 as fp32."""
    if dtype is BFloat16:
        text = "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000; }"
    else:
        text = "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }"
    operand = [Int32(word).ir_value(loc=loc, ip=ip)]
    pair = _asm(llvm.StructType.get_literal([T.f32()] * 2), operand, text, "=&f,=f,r", False, loc, ip)
    return [Float32(llvm.extractvalue(T.f32(), pair, [i], loc=loc, ip=ip)) for i in range(2)]


class MaskWords:
    """The words of two rows of `keys` columns, for scores of `keys` / 8 tiles."""

    def __init__(self, dtype, keys):
        self.dtype, self.keys, self.spans = dtype, keys, keys // SPAN
        self.count = 2 * self.spans * 4

    def registers(self):
        """Room for the words of one block."""
        return cute.make_rmem_tensor((self.count,), Int32)

    @cute.jit
    def load(self, args, words, row: Int32, live: Int32, base: Int64, key_first: Int32, k_len: Int32):
        """Ask for the block of keys at `key_first`; `row` is this thread's first of the tile, which begins at `base`.

        Rows from `live` and keys from `k_len` on are not read.
        """
        column = key_first + (cute.arch.thread_idx()[0] & 3) * LANE_COLUMNS
        for size in (1, 2):
            # Loops of one turn or none: loads of the other size are not run.
            for turn in cutlass.range(opaque(args.mask_bytes == size), unroll=1):
                self.load_sized(args, words, row, live, base, column + turn, k_len, size)

    def load_sized(self, args, words, row, live, base, column, k_len, size):
        """The same for elements of `size` bytes."""
        for r in range(2):
            start = base + Int64(row + r * 8) * args.mask_row_stride + Int64(column * size)
            for span in range(self.spans):
                there = (row + r * 8 < live) & (column + span * SPAN < k_len)
                for i, word in enumerate(ld_global_words(start + span * (SPAN * size), 2 * size, there)):
                    words[(r * self.spans + span) * 4 + i] = word

    @cute.jit
    def apply(self, args, acc_s, words):
        """Hide, or add to, the scores."""
        mine = cute.arch.thread_idx()[0] & 3
        for size in (1, 2):
            for turn in cutlass.range(opaque(args.mask_bytes == size), unroll=1):
                self.apply_sized(args, acc_s, words, mine + turn, size)

    def apply_sized(self, args, acc_s, words, mine, size):
        """The same for elements of `size` bytes."""
        for r in range(2):
            for span in range(self.spans):
                first = (r * self.spans + span) * 4
                pairs = [words[first + i] for i in range(2 * size)]
                if size == 1:
                    pairs = [part for word in pairs for part in (word & 0xFFFF, (word >> 16) & 0xFFFF)]
                for tile, pair in enumerate(trade(pairs, mine)):
                    at = (span * 4 + tile) * 4 + r * 2
                    acc_s[at], acc_s[at + 1] = self.masked(args, acc_s[at], acc_s[at + 1], pair, size)

    def masked(self, args, left, right, pair, size):
        """Two neighbouring scores under their elements."""
        hidden = Float32(-Float32.inf)
        if size == 1:
            return (
                cutlass.select_((pair & 0xFF) != 0, left, hidden),
                cutlass.select_((pair & 0xFF00) != 0, right, hidden),
            )
        return [
            cutlass.select_(addend <= HIDING, hidden, fma(addend, args.mask_factor, score))
            for score, addend in zip((left, right), widen_pair(self.dtype, pair), strict=True)
        ]
