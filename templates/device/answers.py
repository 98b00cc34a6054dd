"""What becomes of a row when all its keys have been seen: turns outputs, maximum and sum into the row and its LSE."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from pa_ops.templates.device import softmax
from pa_ops.templates.device.ptx_global import st_global, st_global_f32
from pa_ops.templates.device.segments import token_and_head


class Answers:
    """Rows of elements of `dtype`, as `layout` (states.py) gives them to the block's threads."""

    def __init__(self, dtype, layout):
        self.dtype, self.layout = dtype, layout

    @cute.jit
    def write(self, found, args, rows, tid: Int32):
        """A thread's outputs of some rows, normalised and rounded, and their LSE; several hide each other's waits."""
        tokens, heads = zip(*(token_and_head(args, rows, row) for row, _, _ in found), strict=True)
        sinks = cute.make_rmem_tensor((len(found),), Float32)
        sinks.fill(-Float32.inf)
        if args.sinks != 0:
            for i in cutlass.range_constexpr(len(found)):
                head = cutlass.select_(found[i][0] < rows.live, heads[i], Int32(0))
                sinks[i] = softmax.sink_of(self.dtype, args, head) * softmax.LOG2_E
        ready = [self.normalised(stats, values, sinks[i]) for i, (_, values, stats) in enumerate(found)]
        for i in cutlass.range_constexpr(len(found)):
            words, lse = ready[i]
            live, token, head = found[i][0] < rows.live, rows.q_start + tokens[i], heads[i]
            lse_at = args.lse + Int64(head) * args.lse_head_stride + Int64(token) * 4
            st_global_f32(lse_at, lse, live & (tid % self.layout.lanes == 0) & (args.lse != 0))
            target = args.out + Int64(token) * args.out_token_stride + Int64(head) * args.out_head_stride
            for run in cutlass.range_constexpr(len(self.layout.runs)):
                column = self.layout.column_of(run, tid)
                there = live & (column < args.head_dim)
                st_global(target + Int64(column) * 2, 0, words[run * 2 : run * 2 + 2], there)

    def normalised(self, stats, values, sink):
        """(outputs, packed in pairs; LSE) of a row."""
        factor, lse = softmax.concluded(stats[0], stats[1], sink)
        pairs = range(0, len(self.layout.runs) * 4, 2)
        words = [softmax.scaled_pair(self.dtype, values[i], values[i + 1], factor) for i in pairs]
        return words, lse * softmax.LN_2
