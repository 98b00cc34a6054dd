"""Turns query rows into the blocks of keys that they see: for the warp that lists tiles, and for each group's loop.

There are two ways to walk a tile's blocks, chosen when an instance is compiled. By `WholeTile` every group computes on
all of them, and masks what its rows do not see. By `OwnRows` a group leaves out those that none of its own rows sees.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from pa_ops.templates.device import tma
from pa_ops.templates.device.packing import token_of
from pa_ops.templates.device.ptx import ld_shared_32
from pa_ops.templates.device.shared_sm90 import BARRIER, EDGES, END, INNER, KEYS, LIVE, POSITION, STEPS
from pa_ops.templates.device.warpgroup import GROUP_ROWS


class Sight:
    """What a mask lets rows see, in blocks of `keys` keys."""

    def __init__(self, causal, window, masked, keys, trusts):
        self.causal, self.window, self.masked, self.keys = causal, window, masked, keys
        self.full = not (causal or window or masked)  # every row sees all keys
        self.before = 1 if trusts else 0

    @cute.jit
    def blocks(self, args, position: Int32, live: Int32, k_len: Int32):
        """(low, high, steps, end, edges, inner) of `live` tokens, the first at `position`, of a sequence of keys.

        Some row sees keys [low, high): `steps` blocks, the last before `end`. Numbered from that one, every row sees
        all keys of blocks [edges, inner); where maxima are taken on trust (trust.py), and one before them.
        """
        low, safe_low, high, safe_high = Int32(0), Int32(0), k_len, k_len  # every row sees [safe_low, safe_high)
        if cutlass.const_expr(self.causal or self.window):
            high = cutlass.max(cutlass.min(k_len, position + live), 0)
            safe_high = cutlass.min(k_len, position + 1)
        if cutlass.const_expr(self.window):
            low = cutlass.max(position - args.window + 1, 0)
            safe_low = cutlass.max(position + live - args.window, 0)
        if cutlass.const_expr(self.masked):
            if args.causal != 0:
                high = cutlass.max(cutlass.min(k_len, position + live), 0)
                safe_high = cutlass.min(k_len, position + 1)
            if args.window > 0:
                low = cutlass.max(position - args.window + 1, 0)
                safe_low = cutlass.max(position + live - args.window, 0)
        end = (high + (self.keys - 1)) // self.keys
        steps = cutlass.max(end - low // self.keys, 0)
        edges = end - cutlass.max(safe_high - self.before, 0) // self.keys
        inner = end - (safe_low + (self.keys - 1)) // self.keys
        return low, high, steps, end, edges, inner


class WholeTile:
    """A group computes on every block of its tile."""

    def unseen(self, args, slot, group):
        """Blocks of the tile, from the last on, that the group leaves out."""
        return 0

    def give_back(self, smem, slot, group, unseen, stage, parity):
        """Release those blocks; the stage that follows."""
        return stage, parity

    def edges(self, args, slot, group):
        """(edges, inner): every row of the group sees all keys of the tile's blocks [edges, inner), from the last."""
        return ld_shared_32(slot + EDGES), ld_shared_32(slot + INNER)


class OwnRows:
    """A group leaves out blocks at its tile's end that only later rows see, and gives them back unread.

    Without a window, which has blocks to leave out at the other end, too. No product is under a branch. A group takes
    the turns of those blocks all the same, with nothing to start: one ahead of the others by a block would hold a stage
    less than they need.
    """

    def __init__(self, shared, sight, turns, cluster, whole):
        self.shared, self.sight, self.turns, self.cluster = shared, sight, turns, cluster
        self.whole = whole  # whether blocks are edges that the tile's other rows do not see, too
        if sight.window or sight.masked:
            raise ValueError("groups leave out blocks at the end of a tile only: there must be no window")

    def own(self, args, slot, group):
        """What the group's own rows see (`Sight.blocks`), and how many rows it has: 0 and less is none."""
        live = cutlass.min(ld_shared_32(slot + LIVE) - group * GROUP_ROWS, GROUP_ROWS)
        position = ld_shared_32(slot + POSITION) + token_of(args, False, group * GROUP_ROWS)
        return self.sight.blocks(args, position, token_of(args, False, live), ld_shared_32(slot + KEYS)), live

    def unseen(self, args, slot, group):
        """Blocks of the tile, from the last on, that none of the group's rows sees."""
        (_, _, _, own_end, _, _), live = self.own(args, slot, group)
        steps = ld_shared_32(slot + STEPS)
        later = cutlass.max(cutlass.min(ld_shared_32(slot + END) - own_end, steps), 0)
        return Int32(cutlass.select_(live > 0, later, steps))

    def edges(self, args, slot, group):
        """(edges, inner): every row of the group sees all keys of the tile's blocks [edges, inner), from the last."""
        end = ld_shared_32(slot + END)
        if self.whole:
            return ld_shared_32(slot + EDGES), end
        (_, _, _, own_end, edges, _), _ = self.own(args, slot, group)
        return end - own_end + edges, end

    @cute.jit
    def give_back(self, smem: Int32, slot: Int32, group: Int32, unseen: Int32, stage: Int32, parity: Int32):
        """Release K and V of those blocks unread; the stage that follows.

        When they have come: before that an arrival could count for what the stage held last, and whoever has not seen
        one phase of "full" end takes it for the next one's end.
        """
        steps = ld_shared_32(slot + STEPS)
        for i in cutlass.range(unseen, unroll=1):
            at = stage * BARRIER
            tma.wait_for(smem + self.shared.k_full + at, parity)
            self.cluster.release(smem + self.shared.k_empty + at)
            tma.wait_for(smem + self.shared.v_full + at, parity)
            self.cluster.release(smem + self.shared.v_empty + at)
            # The turn of the block that follows, if one does. By an `if` the loop over blocks gets 7 instructions more.
            for _ in cutlass.range(cutlass.min(steps - 1 - i, 1), unroll=1):
                self.turns.take(group)
                self.turns.give(group)
            stage, parity = self.shared.after(stage, parity)
        return stage, parity
