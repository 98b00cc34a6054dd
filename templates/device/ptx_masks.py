"""One Python function per PTX instruction that only masks need; the rest are in ptx.py.

Facts about the instructions: PTX ISA 8.8, cp.async, ld.shared and bmsk.
"""

from cutlass import BFloat16, Float32, Int32, Int64
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from pa_ops.templates.device.ptx import _asm


@dsl_user_op
def cp_async_part(shared, source, count, *, loc=None, ip=None):
    """Start copying the first `count` of 16 bytes from global to shared memory, zeros after them; 0 reads nothing."""
    operands = [
        Int32(shared).ir_value(loc=loc, ip=ip),
        Int64(source).ir_value(loc=loc, ip=ip),
        Int32(count).ir_value(loc=loc, ip=ip),
    ]
    _asm(None, operands, "cp.async.cg.shared.global [$0], [$1], 16, $2;", "r,l,r", True, loc, ip)


@dsl_user_op
def ld_shared_bytes(address, *, loc=None, ip=None):
    """Two neighbouring bytes of shared memory as one int32."""
    text = "{ .reg .b16 h; ld.shared.b16 h, [$1]; cvt.u32.u16 $0, h; }"
    operand = [Int32(address).ir_value(loc=loc, ip=ip)]
    return Int32(_asm(T.i32(), operand, text, "=r,r", True, loc, ip))


def _pair_of_floats(text, address, loc, ip):
    operand = [Int32(address).ir_value(loc=loc, ip=ip)]
    pair = _asm(llvm.StructType.get_literal([T.f32()] * 2), operand, text, "=f,=f,r", True, loc, ip)
    return [Float32(llvm.extractvalue(T.f32(), pair, [i], loc=loc, ip=ip)) for i in range(2)]


@dsl_user_op
def ld_shared_halves(dtype, address, *, loc=None, ip=None):
    """Two neighbouring fp16 or bf16 of shared memory, widened to fp32."""
    if dtype is BFloat16:
        widen = "shl.b32 low, pair, 16; mov.b32 $0, low; and.b32 pair, pair, 0xFFFF0000; mov.b32 $1, pair;"
        text = "{ .reg .b32 pair, low; ld.shared.b32 pair, [$2]; " + widen + " }"
    else:
        widen = "cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;"
        text = "{ .reg .b32 pair; .reg .b16 a, b; ld.shared.b32 pair, [$2]; mov.b32 {a, b}, pair; " + widen + " }"
    return _pair_of_floats(text, address, loc, ip)


@dsl_user_op
def ld_shared_floats(address, *, loc=None, ip=None):
    """Two neighbouring fp32 of shared memory."""
    return _pair_of_floats("ld.shared.v2.f32 {$0, $1}, [$2];", address, loc, ip)


@dsl_user_op
def low_bits(count, *, loc=None, ip=None):
    """An int32 whose lowest `count` bits are set: none of 0, all of 32 and more."""
    operand = [Int32(count).ir_value(loc=loc, ip=ip)]
    return Int32(_asm(T.i32(), operand, "bmsk.clamp.b32 $0, 0, $1;", "=r,r", False, loc, ip))
