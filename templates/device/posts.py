"""States on their way from one block to another without a meeting: turns what a share leaves of a row into words that
the block which finishes the row waits for.

Every word of a post is EMPTY until it is stored, and the block that has read it makes it so again. What is stored comes
out of arithmetic, whose NaNs are canonical (0x7fffffff), so EMPTY is never among it. Each word tells of itself alone:
no fence, no counter, no order between words is needed. A fence and an arrival cost 1 us where a row is cut, of 17.

A post is rows of fp32 outputs relative to a maximum, each with (maximum, sum) after them, in base 2.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32

from pa_ops.templates.device import softmax
from pa_ops.templates.device.ptx_global import ld_posted, st_posted

EMPTY = -1


class Posts:
    """Posts of `rows` rows, one a share, which the block's threads send and take as `layout` shares rows out."""

    def __init__(self, layout, rows):
        self.layout = layout
        self.pitch = (layout.head_dim + 4) * 4  # rows begin at multiples of 16 bytes
        self.bytes = rows * self.pitch
        self.step = layout.lanes * 16  # from one run of a thread's outputs to the next

    def part(self, args, share, row, tid):
        """The address of a thread's first outputs of a row in a share's post."""
        return self.at(args, share, row, self.layout.column_of(0, tid))

    def stats(self, args, share, row):
        """The address of (maximum, sum) of a row in a share's post."""
        return self.at(args, share, row, self.layout.head_dim)

    def at(self, args, share, row, word):
        """The address of a word of a row."""
        return args.posts + Int64(share) * self.bytes + Int64(row * self.pitch + word * 4)

    def send(self, args, share, row, live, outputs, top, total, tid):
        """Store a thread's part of a row."""
        target = self.part(args, share, row, tid)
        for run in self.layout.runs:
            words = [value.bitcast(Int32) for value in outputs[run * 4 : run * 4 + 4]]
            st_posted(target, self.step * run, words, live)
        stats = [top.bitcast(Int32), total.bitcast(Int32)]
        st_posted(self.stats(args, share, row), 0, stats, live & (tid % self.layout.lanes == 0))

    def load(self, part):
        """A thread's words of a row of one post, which begin at `part`."""
        words = []
        for run in self.layout.runs:
            words += ld_posted(part, run * self.step, 4)
        return words

    def some_empty(self, words):
        """Whether a word that the warp has loaded was not there yet."""
        most = softmax.largest([Uint32(word) for word in words], cutlass.max)
        return cute.arch.vote_any_sync(Int32(most) == EMPTY)

    def clear(self, parts, stats):
        """Make what was loaded from `parts` and `stats` empty: for the next grid."""
        for part in parts:
            for run in self.layout.runs:
                st_posted(part, run * self.step, [Int32(EMPTY)] * 4, True)
        st_posted(stats, 0, [Int32(EMPTY)] * 2, True)
