"""Four neighbouring lanes, which hold the columns of a row of an accumulator tile between them."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32


def trade(words, mine):
    """Transpose four words of four neighbouring lanes: lane i gets the words i of all, in the order of lanes."""
    odd, upper = (mine & 1) != 0, (mine & 2) != 0
    for first in (0, 2):
        low, high = words[first], words[first + 1]
        got = cute.arch.shuffle_sync_bfly(cutlass.select_(odd, low, high), 1)
        words[first] = Int32(cutlass.select_(odd, got, low))
        words[first + 1] = Int32(cutlass.select_(odd, high, got))
    for at in (0, 1):
        low, high = words[at], words[at + 2]
        got = cute.arch.shuffle_sync_bfly(cutlass.select_(upper, low, high), 2)
        words[at] = Int32(cutlass.select_(upper, got, low))
        words[at + 2] = Int32(cutlass.select_(upper, high, got))
    return words
