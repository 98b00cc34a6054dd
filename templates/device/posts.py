"""States on their way from one block to another without a meeting: turns what a share leaves of a row into words that
the block which finishes the row waits for.

Every word of a post is EMPTY until it is stored, and the block that has read it makes it so again. What is stored comes
out of arithmetic, whose NaNs are canonical (0x7fffffff), so EMPTY is never among it. Each word tells of itself alone:
no fence, no counter, no order between words is needed. A fence and an arrival cost 1 us where a row is cut, of 17.

A post is rows of fp32 outputs relative to a maximum, each with (maximum, sum) after them, in base 2.
"""

import cutlass.cute as cute
from cutlass import Int32, Int64

from pa_ops.templates.device.ptx import ld_posted, st_posted

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
        first = self.layout.column_of(0, tid) * 4
        return args.posts + Int64(share) * self.bytes + Int64(row * self.pitch + first)

    def stats_offset(self, tid):
        """From there to the maximum and sum of the row, in bytes."""
        return self.layout.head_dim * 4 - self.layout.column_of(0, tid) * 4

    def send(self, args, share, row, live, outputs, top, total, tid):
        """Store a thread's part of a row."""
        target = self.part(args, share, row, tid)
        for run in self.layout.runs:
            words = [value.bitcast(Int32) for value in outputs[run * 4 : run * 4 + 4]]
            st_posted(target, self.step * run, words, live)
        stats = [top.bitcast(Int32), total.bitcast(Int32)]
        st_posted(target + Int64(self.stats_offset(tid)), 0, stats, live & (tid % self.layout.lanes == 0))

    def load(self, args, first, count, limit, row, live, tid):
        """A thread's words of a row of `count` posts from share `first` on: (outputs, maximum, sum) of each.

        Those of shares from `limit` on are zeros.
        """
        source = self.part(args, first, row, tid)
        stats = source + Int64(self.stats_offset(tid))
        posts = []
        for i in range(count):
            wanted = live & (first + i < limit)
            words = []
            for run in self.layout.runs:
                words += ld_posted(source, i * self.bytes + run * self.step, 4, wanted)
            posts.append(words + ld_posted(stats, i * self.bytes, 2, wanted))
        return posts

    def some_empty(self, posts):
        """Whether a word that the warp has loaded was not there yet."""
        empty = False
        for word in (word for words in posts for word in words):
            empty = empty | (word == EMPTY)
        return cute.arch.vote_any_sync(empty)

    def clear(self, args, first, count, limit, row, live, tid):
        """Make the words empty that `load` has loaded: for the next grid."""
        source = self.part(args, first, row, tid)
        stats = source + Int64(self.stats_offset(tid))
        for i in range(count):
            wanted = live & (first + i < limit)
            for run in self.layout.runs:
                st_posted(source, i * self.bytes + run * self.step, [Int32(EMPTY)] * 4, wanted)
            st_posted(stats, i * self.bytes, [Int32(EMPTY)] * 2, wanted & (tid % self.layout.lanes == 0))
