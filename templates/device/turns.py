"""Turns named barriers into turns: warpgroups start their products one after another, round and round."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from pa_ops.templates.device.warpgroup import GROUP_THREADS

FIRST_BARRIER = 1


class Turns:
    """Turns of `groups` warpgroups; without `taken` nobody waits."""

    def __init__(self, groups, taken):
        self.groups, self.taken = groups, taken

    @cute.jit
    def begin(self, group: Int32):
        """The first turn is the first group's: the last gives it away."""
        if group == (self.groups - 1 if self.taken else -1):
            self.give(group)

    @cute.jit
    def take(self, group: Int32):
        """Wait until the group before has started its products."""
        if cutlass.const_expr(self.taken):
            cute.arch.barrier(barrier_id=FIRST_BARRIER + group, number_of_threads=2 * GROUP_THREADS)

    @cute.jit
    def give(self, group: Int32):
        """Let the next group start its products."""
        if cutlass.const_expr(self.taken):
            following = Int32(cutlass.select_(group == self.groups - 1, Int32(0), group + 1))
            cute.arch.barrier_arrive(barrier_id=FIRST_BARRIER + following, number_of_threads=2 * GROUP_THREADS)
