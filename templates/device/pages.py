"""Page look-up of one block of keys: turns a row of the block table into (page, offset) registers held across a warp.

Lane l of every warp looks up keys l, l + 32, ...; a thread that copies a row takes its page from that lane by shuffle.
A key outside the live range or on an unmapped page (negative, or beyond the pool or the table) has page -1.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32

from pa_ops.templates.device.ptx_global import ld_global_i32


def page_registers(keys):
    """Registers for `keys` keys (a multiple of 32): their pages, then their offsets in the page."""
    registers = cute.make_rmem_tensor((keys // 32 * 2,), Int32)
    registers.fill(-1)
    return registers


def look_up(args, registers, sequence, key_first, low, high, lane):
    """Read the table for the block of keys that starts at `key_first`; of them, [low, high) are live."""
    words = cute.size(registers) // 2
    table = args.block_table + Int64(sequence) * args.table_stride
    for w in range(words):
        key = key_first + w * 32 + lane
        page, offset = look_up_key(args, table, key, (key >= low) & (key < high))
        registers[w] = page
        registers[words + w] = offset


def page_of_row(registers, row, step):
    """(page, offset) of block row `row + step`, `step` a constant multiple of the rows that a pass loads."""
    words = cute.size(registers) // 2
    word, lane = step // 32, (row + step % 32) & 31
    page = cute.arch.shuffle_sync(registers[word], lane)
    return page, cute.arch.shuffle_sync(registers[words + word], lane)


def has_hole(registers):
    """Whether some key of the block has no page: the same answer in every lane."""
    hole = registers[0] < 0
    for w in range(1, cute.size(registers) // 2):
        hole = hole | (registers[w] < 0)
    return cute.arch.vote_any_sync(hole)


def holes(registers, lane):
    """One word per 32 keys; bit i: key i + 2 * (lane % 4) has no page (an accumulator thread's columns)."""
    shift = Uint32((lane & 3) * 2)
    words = cute.size(registers) // 2
    return [Uint32(cute.arch.vote_ballot_sync(registers[w] < 0)) >> shift for w in range(words)]


def is_hole(words, column):
    """Whether the key at constant block column `column` (+ 2 * (lane % 4)) has no page."""
    return (words[column // 32] & Uint32(1 << (column % 32))) != 0


@cute.jit
def look_up_key(args, table: Int64, key: Int32, live):
    """(page, offset in the page) of one key, page -1 where there is none."""
    logical = Int32(0)
    offset = Int32(0)
    page = Int32(-1)
    if live:
        logical = Int32(Uint32(key) // Uint32(args.page_size))
        offset = key - logical * args.page_size
        if logical < args.max_pages:
            page = ld_global_i32(table + Int64(logical) * 4)
            if page >= args.num_pages:
                page = Int32(-1)
    return cutlass.max(page, -1), offset
