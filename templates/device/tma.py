"""Bulk tensor copies into shared memory and the barriers that tell of them: one Python function per PTX instruction.

A tensor map comes as 128 bytes of the kernel's arguments; the host encodes it (generator/program.c). Facts about the
instructions: PTX ISA 8.8, sections on cp.async.bulk.tensor, mbarrier, tensormap and the async proxy.
"""

import cutlass.cute as cute
from cutlass import BFloat16, Int32, Int64
from cutlass._mlir import ir
from cutlass._mlir.dialects import cute_nvgpu
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cutlass_dsl import T, dsl_user_op

from pa_ops.templates.device.ptx import MEMORY, _asm, cache_hint

DESCRIPTOR = "!cute.ptr<!cute_nvgpu.tma_descriptor_tiled, generic, align<64>>"


def map_argument():
    """A stand-in for a tensor map, which makes the compiler reserve its 128 bytes of the arguments.

    Its shape and layout mean nothing: the host code that would encode it is thrown away.
    """
    rows = cute.make_layout((8, 64), stride=(64, 1))
    tensor = cute.make_tensor(cute.make_ptr(BFloat16, Int64(0), cute.AddressSpace.gmem, assumed_align=16), rows)
    atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, BFloat16)
    return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), tensor, atom, (8, 64)).atom


@dsl_user_op
def map_address(argument, *, loc=None, ip=None):
    """The generic address of a tensor map among the arguments."""
    atom = cute_nvgpu.atom_make_exec_tma(argument._trait.value, loc=loc, ip=ip)
    pointer = cute_nvgpu.get_tma_desc_addr(ir.Type.parse(DESCRIPTOR), atom, loc=loc, ip=ip)
    return Int64(cute_nvgpu.cast_tma_desc_to_integer(T.i64(), pointer.value, loc=loc, ip=ip))


@dsl_user_op
def prefetch_map(address, *, loc=None, ip=None):
    """Bring a tensor map near."""
    _asm(None, [Int64(address).ir_value(loc=loc, ip=ip)], "prefetch.tensormap [$0];", "l", True, loc, ip)


@dsl_user_op
def load_box(shared, address, barrier, column, first, second, third, read_again=False, blocks=1, *, loc=None, ip=None):
    """Start copying one box of a four-dimensional tensor to shared memory; its bytes count on the barrier.

    What of the box lies outside the tensor becomes zeros, and counts all the same. The L2 cache gives up lines that
    are `read_again` after all others. With two `blocks`, both of the cluster's get the box, at the same place, and
    their barriers count it.
    """
    made, hint, policy = cache_hint("last" if read_again else "")
    cast, mask = "", ""
    if blocks > 1:
        made, cast, mask = f"{made}.reg .b16 all; mov.b16 all, {2**blocks - 1}; ", ".multicast::cluster", ", all"
    operands = [
        Int32(shared).ir_value(loc=loc, ip=ip),
        Int64(address).ir_value(loc=loc, ip=ip),
        Int32(barrier).ir_value(loc=loc, ip=ip),
        *(Int32(x).ir_value(loc=loc, ip=ip) for x in (column, first, second, third)),
    ]
    copy = f"cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes{cast}{hint}"
    text = f"{{ {made}{copy} [$0], [$1, {{$3, $4, $5, $6}}], [$2]{mask}{policy}; }}"
    _asm(None, operands, text, f"r,l,r,r,r,r,r,{MEMORY}", True, loc, ip)


@dsl_user_op
def init_barrier(barrier, arrivals, *, loc=None, ip=None):
    """Make eight bytes of shared memory a barrier whose phase ends after so many arrivals."""
    operands = [Int32(barrier).ir_value(loc=loc, ip=ip), Int32(arrivals).ir_value(loc=loc, ip=ip)]
    _asm(None, operands, "mbarrier.init.shared.b64 [$0], $1;", f"r,r,{MEMORY}", True, loc, ip)


@dsl_user_op
def publish_barriers(*, loc=None, ip=None):
    """What this thread initialised is seen by copies that start after the next barrier of the block."""
    _asm(None, [], "fence.mbarrier_init.release.cluster;", MEMORY, True, loc, ip)


@dsl_user_op
def expect(barrier, count, *, loc=None, ip=None):
    """Arrive, and let the phase also wait for `count` bytes of copies."""
    operands = [Int32(barrier).ir_value(loc=loc, ip=ip), Int32(count).ir_value(loc=loc, ip=ip)]
    _asm(None, operands, "mbarrier.arrive.expect_tx.shared.b64 _, [$0], $1;", f"r,r,{MEMORY}", True, loc, ip)


@dsl_user_op
def arrive_at(barrier, *, loc=None, ip=None):
    """Arrive; what this thread read or wrote in shared memory comes before."""
    operand = [Int32(barrier).ir_value(loc=loc, ip=ip)]
    _asm(None, operand, "mbarrier.arrive.shared.b64 _, [$0];", f"r,{MEMORY}", True, loc, ip)


@cute.jit
def release(barrier: Int32):
    """This warp no longer reads what the barrier guards: one arrival, after all its lanes have read."""
    cute.arch.sync_warp()
    if cute.arch.lane_idx() == 0:
        arrive_at(barrier)


@dsl_user_op
def wait_for(barrier, parity, *, loc=None, ip=None):
    """Wait for the end of the phase of that parity; a fresh barrier's phase before the first has parity 1."""
    operands = [Int32(barrier).ir_value(loc=loc, ip=ip), Int32(parity).ir_value(loc=loc, ip=ip)]
    text = (
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared.b64 done, [$0], $1; @done bra over; bra again; "
        "over: }"
    )
    _asm(None, operands, text, f"r,r,{MEMORY}", True, loc, ip)


@dsl_user_op
def fence_async(*, loc=None, ip=None):
    """What this thread wrote to shared memory is seen by the tensor cores and by bulk copies that follow."""
    _asm(None, [], "fence.proxy.async.shared::cta;", MEMORY, True, loc, ip)
