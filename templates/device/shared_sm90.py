"""The shared memory of a warp-specialised block: where its tiles, barriers and slots lie, and how stages follow.

Barriers come in pairs: "full" ends a phase when what it guards has been written, "empty" when it has been read. By
"asked" the warp that copies keys wants the next tile. Stages are empty when all blocks of a cluster have read them,
and by the "word" the first block tells the others something.
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Int32

BARRIER = 8  # bytes
COPYING_WARPS = 2
GROUP_WARPS = 4  # of a warpgroup
SLOTS = 2  # one that is computed, one that is copied
SLOT = 76  # bytes
THERE, SEQUENCE, TOKEN, LIVE, HEAD, POSITION, KEYS, FIRST_KEY, LOW, HIGH = range(0, 40, 4)
STEPS, END, EDGES, INNER, PART, PARTS, STATE, AGAIN, TURN = range(40, SLOT, 4)


def columns_of(head_dim):
    """Elements of a row that lie side by side, swizzled: 128 bytes of them, or what divides a row."""
    return math.gcd(head_dim, 64)


class Shared:
    """Offsets in bytes of a Q tile, `stages` tiles of K and of V, their barriers, a word of holes a stage, the slots.

    Each computing warpgroup has barriers of its own for its queries: who is done with a tile begins the next one.
    A slot is one tile of the work list, or a part of one: whether there is one; its sequence, first query row and rows,
    head, position of the first row; the sequence's keys, the first of them where they are dense, and the keys [low,
    high) that some row sees; the blocks of keys to compute, of those that hold these, from the last, before `end`, to
    the first. Every row sees all keys of those numbered [edges, inner). Then which part of the tile's keys that is, of
    how many, the number of its state (parts.py), a bit for each warp for which it is listed again (again.py), and the
    slot's turn. Blocks of keys are those of all rows of a cluster's tile.
    """

    def __init__(self, q_bytes, k_bytes, v_bytes, stages, groups, blocks, trusts):
        self.stages, self.groups, self.warps = stages, groups, groups * GROUP_WARPS
        self.listeners = max(blocks - 1, 1)  # blocks that hear the word
        self.readers = self.warps * blocks  # warps that read a stage before it is copied to again
        self.leavers = (self.warps + COPYING_WARPS) * (blocks if trusts else 1)  # warps that leave a slot
        self.k_bytes, self.v_bytes = k_bytes, v_bytes  # of a stage
        self.k = q_bytes
        self.v = self.k + stages * k_bytes
        self.q_full = self.v + stages * v_bytes
        self.q_empty = self.q_full + groups * BARRIER
        self.k_full = self.q_empty + groups * BARRIER
        self.k_empty = self.k_full + stages * BARRIER
        self.v_full = self.k_empty + stages * BARRIER
        self.v_empty = self.v_full + stages * BARRIER
        self.slot_full = self.v_empty + stages * BARRIER
        self.slot_empty = self.slot_full + SLOTS * BARRIER
        self.asked = self.slot_empty + SLOTS * BARRIER
        self.word_full = self.asked + BARRIER
        self.word_empty = self.word_full + BARRIER
        self.word = self.word_empty + BARRIER
        self.holes = self.word + 4
        self.slots = self.holes + stages * 4
        self.lost = self.slots + SLOTS * SLOT
        self.bytes = self.lost + SLOTS * 4

    def barriers(self):
        """(offset, arrivals a phase) of every barrier. A computing warp arrives once; at slots the copying ones do too,
        and where a tile may be listed again, those of all blocks."""
        yield from ((self.asked, 1), (self.word_full, 1), (self.word_empty, self.listeners))
        for group in range(self.groups):
            at = group * BARRIER
            yield from ((self.q_full + at, 1), (self.q_empty + at, GROUP_WARPS))
        for stage in range(self.stages):
            at = stage * BARRIER
            yield from ((self.k_full + at, 1), (self.k_empty + at, self.readers))
            yield from ((self.v_full + at, 1), (self.v_empty + at, self.readers))
        for slot in range(SLOTS):
            at = slot * BARRIER
            yield from ((self.slot_full + at, 1), (self.slot_empty + at, self.leavers))

    @cute.jit
    def after(self, stage: Int32, parity: Int32):
        """The stage that follows, and the parity of its phase."""
        wraps = stage == self.stages - 1
        return Int32(cutlass.select_(wraps, Int32(0), stage + 1)), parity ^ Int32(cutlass.select_(wraps, 1, 0))
