"""One Python function per PTX instruction on another block's shared memory: see ptx.py.

An address there is this block's own, of the same place, and the number of the block in the cluster.
"""

from cutlass import Int32
from cutlass.cutlass_dsl import dsl_user_op

from pa_ops.templates.device.ptx import MEMORY, _asm


@dsl_user_op
def arrive_in(block, barrier, *, loc=None, ip=None):
    """Arrive at a block's barrier; what this thread read in its own shared memory comes before.

    By `.release.cluster` it would be a fence of the whole GPU: 28% of the time with two a block of keys.
    """
    operands = [Int32(x).ir_value(loc=loc, ip=ip) for x in (block, barrier)]
    arrive = "mbarrier.arrive.shared::cluster.b64 _, [there];"
    text = f"{{ .reg .b32 there; mapa.shared::cluster.u32 there, $1, $0; {arrive} }}"
    _asm(None, operands, text, f"r,r,{MEMORY}", True, loc, ip)


@dsl_user_op
def send(block, shared, barrier, word, *, loc=None, ip=None):
    """Store a word to a block's shared memory, whose four bytes count on its barrier when they are there."""
    operands = [Int32(x).ir_value(loc=loc, ip=ip) for x in (block, shared, barrier, word)]
    text = (
        "{ .reg .b32 there, told; mapa.shared::cluster.u32 there, $1, $0; mapa.shared::cluster.u32 told, $2, $0; "
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], $3, [told]; }"
    )
    _asm(None, operands, text, f"r,r,r,r,{MEMORY}", True, loc, ip)


@dsl_user_op
def or_in(block, shared, bits, *, loc=None, ip=None):
    """Set bits of a word of a block's shared memory, before whatever this thread writes there next."""
    operands = [Int32(x).ir_value(loc=loc, ip=ip) for x in (block, shared, bits)]
    text = (
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, $1, $0; "
        "red.relaxed.cluster.shared::cluster.or.b32 [there], $2; fence.acq_rel.cluster; }"
    )
    _asm(None, operands, text, f"r,r,r,{MEMORY}", True, loc, ip)
