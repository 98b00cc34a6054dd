"""One Python function per PTX instruction: turns DSL scalars into one instruction and its result registers.

Accumulators stay plain Python lists of registers, so what a kernel keeps live is what its source names. Facts about
the instructions: PTX ISA 8.8, sections on ldmatrix, mma.m16n8k16 and ex2. Those on global memory are in ptx_global.py,
those between grids in ptx_grid.py, those between the blocks of a cluster in ptx_cluster.py.
"""

from cutlass import BFloat16, Float32, Int32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

MEMORY = "~{memory}"  # a clobber: what surrounds the instruction stays on its side


def _asm(result, operands, text, constraints, effects, loc, ip):
    return llvm.inline_asm(
        result,
        operands,
        text,
        constraints,
        has_side_effects=effects,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
        loc=loc,
        ip=ip,
    )


def cache_hint(order):
    """(what makes a policy, the suffix of an instruction, its last operand), by which the L2 cache gives up the lines
    that it brings "first" or "last"; nothing for any other order."""
    if order not in ("first", "last"):
        return "", "", ""
    made = f".reg .b64 order; createpolicy.fractional.L2::evict_{order}.b64 order, 1.0; "
    return made, ".L2::cache_hint", ", order"


@dsl_user_op
def ldmatrix_x4(address, uniform, flip, offset, *, transpose, loc=None, ip=None):
    """Four 8x8 matrices of 16-bit elements from shared memory; (`address` ^ `flip`) + `uniform` + `offset` is a row.

    `address` is the lane's own, `uniform` the warp's; `flip` and `offset` are constants. The xor is part of the
    instruction's text so that no optimiser keeps each of its results in a register of its own across the main loop
    (12 registers of a budget of 255).
    """
    form = ".trans" if transpose else ""
    load = f"ldmatrix.sync.aligned.m8n8.x4{form}.shared.b16 {{$0, $1, $2, $3}}, [row + {offset}];"
    quad = _asm(
        llvm.StructType.get_literal([T.i32()] * 4),
        [Int32(address).ir_value(loc=loc, ip=ip), Int32(uniform).ir_value(loc=loc, ip=ip)],
        f"{{ .reg .b32 row; xor.b32 row, $4, {flip}; add.u32 row, row, $5; {load} }}",
        "=r,=r,=r,=r,r,r",
        True,
        loc,
        ip,
    )
    return [Int32(llvm.extractvalue(T.i32(), quad, [i], loc=loc, ip=ip)) for i in range(4)]


@dsl_user_op
def mma_m16n8k16(dtype, a, b, c, *, loc=None, ip=None):
    """c + a @ b for one warp: a four, b two registers of packed 16-bit pairs, c four fp32 registers."""
    kind = "bf16" if dtype is BFloat16 else "f16"
    quad = _asm(
        llvm.StructType.get_literal([T.f32()] * 4),
        [Int32(x).ir_value(loc=loc, ip=ip) for x in (*a, *b)] + [Float32(x).ir_value(loc=loc, ip=ip) for x in c],
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        False,
        loc,
        ip,
    )
    return [Float32(llvm.extractvalue(T.f32(), quad, [i], loc=loc, ip=ip)) for i in range(4)]


@dsl_user_op
def pack_pair(dtype, low, high, *, loc=None, ip=None):
    """Two fp32 values, rounded to nearest, in one register: `low` in the lower half."""
    kind = "bf16x2" if dtype is BFloat16 else "f16x2"
    return Int32(
        _asm(
            T.i32(),
            [Float32(high).ir_value(loc=loc, ip=ip), Float32(low).ir_value(loc=loc, ip=ip)],
            f"cvt.rn.{kind}.f32 $0, $1, $2;",
            "=r,f,f",
            False,
            loc,
            ip,
        )
    )


@dsl_user_op
def fma(a, b, c, *, loc=None, ip=None):
    """a * b + c in one rounding; the DSL's own * and + stay two instructions."""
    operands = [Float32(x).ir_value(loc=loc, ip=ip) for x in (a, b, c)]
    return Float32(_asm(T.f32(), operands, "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", False, loc, ip))


@dsl_user_op
def opaque(value, *, loc=None, ip=None):
    """The same int32, of which the optimiser no longer knows anything: a loop of so many turns stays a loop."""
    operand = [Int32(value).ir_value(loc=loc, ip=ip)]
    return Int32(_asm(T.i32(), operand, "mov.b32 $0, $1;", "=r,r", True, loc, ip))


def _unary(instruction):
    @dsl_user_op
    def op(x, *, loc=None, ip=None):
        value = [Float32(x).ir_value(loc=loc, ip=ip)]
        return Float32(_asm(T.f32(), value, f"{instruction} $0, $1;", "=f,f", False, loc, ip))

    return op


ex2 = _unary("ex2.approx.ftz.f32")
lg2 = _unary("lg2.approx.ftz.f32")
rcp = _unary("rcp.approx.ftz.f32")


@dsl_user_op
def st_shared_32(address, value, *, loc=None, ip=None):
    """Store one register to shared memory at `address` (bytes)."""
    operands = [Int32(address).ir_value(loc=loc, ip=ip), Int32(value).ir_value(loc=loc, ip=ip)]
    _asm(None, operands, "st.shared.b32 [$0], $1;", "r,r", True, loc, ip)


@dsl_user_op
def st_shared_128(address, words, *, loc=None, ip=None):
    """Store 16 bytes, given as four registers, to shared memory."""
    operands = [Int32(address).ir_value(loc=loc, ip=ip), *(Int32(w).ir_value(loc=loc, ip=ip) for w in words)]
    _asm(None, operands, "st.shared.v4.b32 [$0], {$1, $2, $3, $4};", "r,r,r,r,r,~{memory}", True, loc, ip)


@dsl_user_op
def ld_shared_32(address, *, loc=None, ip=None):
    """Load one register from shared memory."""
    operand = [Int32(address).ir_value(loc=loc, ip=ip)]
    return Int32(_asm(T.i32(), operand, "ld.shared.b32 $0, [$1];", "=r,r", True, loc, ip))


@dsl_user_op
def ld_shared_32_where(address, where, *, loc=None, ip=None):
    """Load one register from shared memory where `where` holds, else give 0; no branch."""
    operands = [Int32(x).ir_value(loc=loc, ip=ip) for x in (address, where)]
    text = "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.shared.b32 $0, [$1]; }"
    return Int32(_asm(T.i32(), operands, text, "=&r,r,r", True, loc, ip))


@dsl_user_op
def st_shared_f32x2(address, low, high, *, loc=None, ip=None):
    """Store two neighbouring fp32 to shared memory."""
    operands = [Int32(address).ir_value(loc=loc, ip=ip), *(Float32(x).ir_value(loc=loc, ip=ip) for x in (low, high))]
    _asm(None, operands, "st.shared.v2.f32 [$0], {$1, $2};", "r,f,f", True, loc, ip)


def load_floats(count, instruction, kind, letter, otherwise=None):
    """An op that loads `count` neighbouring fp32; with `otherwise`, where its second argument holds, else that."""
    results = ", ".join(f"${i}" for i in range(count))
    width = f".v{count}" if count > 1 else ""
    load = f"{instruction}{width}.f32 {{{results}}}, [${count}];"
    constraints = [*["=f"] * count, letter]
    if otherwise is not None:
        fill = " ".join(f"mov.b32 ${i}, {otherwise};" for i in range(count))
        load = f"{{ .reg .pred p; setp.ne.b32 p, ${count + 1}, 0; {fill} @p {load} }}"
        constraints = [*["=f"] * count, letter, "r"]

    @dsl_user_op
    def op(address, *where, loc=None, ip=None):
        operands = [kind(address).ir_value(loc=loc, ip=ip), *(Int32(w).ir_value(loc=loc, ip=ip) for w in where)]
        kinds = llvm.StructType.get_literal([T.f32()] * count)
        found = _asm(kinds, operands, load, ",".join(constraints), True, loc, ip)
        return [Float32(llvm.extractvalue(T.f32(), found, [i], loc=loc, ip=ip)) for i in range(count)]

    return op


ld_shared_f32x2 = load_floats(2, "ld.shared", Int32, "r")
ld_shared_f32x4 = load_floats(4, "ld.shared", Int32, "r")


@dsl_user_op
def ld_shared_128(address, *, loc=None, ip=None):
    """Load 16 bytes, as four registers, from shared memory."""
    quad = _asm(
        llvm.StructType.get_literal([T.i32()] * 4),
        [Int32(address).ir_value(loc=loc, ip=ip)],
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,r",
        True,
        loc,
        ip,
    )
    return [Int32(llvm.extractvalue(T.i32(), quad, [i], loc=loc, ip=ip)) for i in range(4)]
