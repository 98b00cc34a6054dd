"""One Python function per PTX instruction between threads that kernels of mma.sync need: see ptx.py."""

from cutlass import Int32
from cutlass.cutlass_dsl import T, dsl_user_op

from pa_ops.templates.device.ptx import _asm


@dsl_user_op
def pinned(value, lane, *, loc=None, ip=None):
    """The same int32 by way of a shuffle: kept in a register, where a compiler short of them would find it anew."""
    operands = [Int32(value).ir_value(loc=loc, ip=ip), Int32(lane).ir_value(loc=loc, ip=ip)]
    return Int32(_asm(T.i32(), operands, "shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "=r,r,r", True, loc, ip))


@dsl_user_op
def meet_and_vote(vote, *, loc=None, ip=None):
    """All threads of the block meet; 1 for each where some thread's `vote` is not 0, else 0."""
    operand = [Int32(vote).ir_value(loc=loc, ip=ip)]
    text = "{ .reg .pred p, q; setp.ne.b32 p, $1, 0; barrier.cta.red.or.pred q, 0, p; selp.b32 $0, 1, 0, q; }"
    return Int32(_asm(T.i32(), operand, text, "=r,r,~{memory}", True, loc, ip))
