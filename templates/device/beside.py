"""Two grids on a device at a time: turns a batch of short and long sequences into the SMs that decode leaves to others.

Decode waits for memory, and a few SMs less cost it little: 0.4% each. The grid after it, prefill, computes on those at
the same time: its blocks start when all of decode's have, and each needs an SM of its own. What it has not done by the
time decode ends it does on all of them. Which blocks leave depends on where they run; how many shares are left, and so
how the keys of short sequences are cut, on the lengths alone.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from pa_ops.templates.device.ptx import rcp
from pa_ops.templates.device.ptx_global import add_to, st_global_i32
from pa_ops.templates.device.ptx_grid import own_sm

QUERIES = 64  # of a block of work
SHORT = 4  # times as long is decode beside what is short
# Of an SM's time for such a block and head, in those for a tile of keys. By count it is 0.5, but SMs that have read
# their shares before others are the next grid's as well: of a batch of 63 x 4k and 1 x 1k, half are done 15 us before
# the last. It took 268.5 us with 0.15 to 0.25, which leave 3 to 5 SMs, and 269.0 with 0.3, which leaves 6.
COST = 0.25
LEFT = 1 << 16  # what a block that leaves adds to the tickets


def work_of(args, queries, tiles, keys):
    """(blocks of QUERIES queries, those by tiles of `keys` keys) that the heads of a KV head compute for a sequence."""
    hidden = cutlass.select_(args.causal != 0, queries // (2 * keys), Int32(0))
    blocks = (queries + (QUERIES - 1)) // QUERIES * args.group
    return blocks, blocks * cutlass.max(tiles - hidden, 1)


def given(args, tiles, blocks, work):
    """SMs to leave to the next grid, for `work` in so many `blocks` beside `tiles` tiles.

    As many as are done with it when decode ends. Where that is too many, all that may be, if what computes two blocks
    of queries in turn is short beside decode; and none where it is long, for then all of it begins again as one when
    decode ends.
    """
    share = Float32(work) * COST * Float32(args.sms)
    wanted = Int32(cute.arch.fmin(share * rcp(Float32(cutlass.max(tiles, 1))), Float32(args.sms))) + 1
    is_short = share * Float32(2 * SHORT) <= Float32(tiles) * Float32(args.kv_heads) * Float32(blocks)
    too_many = Int32(cutlass.select_(is_short, args.most_given, Int32(0)))
    return Int32(cutlass.select_(wanted > args.most_given, too_many, cutlass.min(wanted, work)))


@cute.jit
def draw_early(args):
    """What `draw` wants of one thread: a ticket, if the block's SM is never left; -1 else."""
    early = Int32(-1)
    if own_sm() < args.sms - args.most_given:
        early = add_to(args.tickets, 1)
    return early


@cute.jit
def draw(args, grid: Int32, given: Int32, spare: Int32, early: Int32):
    """A ticket, or -1 for a block that leaves its SM to the next grid: one thread asks.

    All of those on the last `given` SMs leave, for an SM is the next grid's only when none is left on it; but no more
    than `spare` of the `grid` blocks, wherever they run, so that there is one for each share. If fewer do, those
    beyond the shares have none. The last to ask makes the counter zero for the next grid.
    """
    drawn, stays = early, Int32(1)
    if early < 0:
        if own_sm() >= args.sms - given:
            drawn = add_to(args.tickets, LEFT)
            stays = Int32(drawn // LEFT >= spare)
        if stays != 0:
            drawn = add_to(args.tickets, 1)
    ticket, left = drawn % LEFT, drawn // LEFT
    asked = ticket + stays + cutlass.min(left + 1 - stays, spare)
    if asked == grid:
        st_global_i32(args.tickets, Int32(0))
    return Int32(cutlass.select_(stays != 0, ticket, Int32(-1)))
