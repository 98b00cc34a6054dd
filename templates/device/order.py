"""The order of a sequence's tiles: turns a rank into a head and a row block.

Heads go by sections whose keys and values stay in the L2 cache. In a section the last row blocks come first, because in
a causal sequence they see most keys. The first row blocks of the last heads, short tiles, follow after all sections,
and fill the end evenly: of as few heads as have enough of them, which is 0.5 to 2% faster than of all heads
(docs/performance.md; reads of memory are the same).
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from pa_ops.templates.device.quotients import divided

SHORT = 2  # of a causal sequence's row blocks, one in so many is short: the first, which see fewest keys
LAST = 3  # short tiles that come last, for two that run at a time


class Sections(NamedTuple):
    """A sequence's `tiles` row blocks of each of `heads` heads, in sections of so many; so many short row blocks of the
    last heads come last."""

    tiles: Int32
    heads: Int32
    section: Int32
    short: Int32
    last: Int32


def sections_of(tiles, heads, group, near, at_once, causal):
    """The Sections of a sequence: `group` heads have the same keys, those of `near` stay in the cache, and `at_once`
    tiles run at a time."""
    section = cutlass.min(group * near, heads)
    short, last = Int32(0), Int32(0)
    if causal:
        short = tiles // SHORT
        wanted = divided(at_once * LAST + (2 * short - 1), cutlass.max(2 * short, 1))
        last = cutlass.min(divided(wanted + (group - 1), group) * group, heads)
    return Sections(tiles, heads, section, short, last)


@cute.jit
def place_of(rank: Int32, order: Sections):
    """(row block, head) of the tile of that rank."""
    start, heads, stop, rows, section = Int32(0), order.heads - order.last, order.tiles, order.tiles, order.section
    rest = rank
    if rest >= heads * rows:
        rest = rest - heads * rows
        start, heads, rows = heads, order.last, order.tiles - order.short
        if rest >= heads * rows:
            rest = rest - heads * rows
            section, stop, rows = heads, order.short, order.short
    first = divided(rest, section * rows) * section
    rest = rest - first * rows
    width = cutlass.min(section, heads - first)
    back = divided(rest, width)
    return stop - 1 - back, start + first + rest - back * width
