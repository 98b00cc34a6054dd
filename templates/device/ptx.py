"""One Python function per PTX instruction: turns DSL scalars into one instruction and its result registers.

Accumulators stay plain Python lists of registers, so what a kernel keeps live is what its source names. Facts about
the instructions: PTX ISA 8.8, sections on ldmatrix, mma.m16n8k16, cp.async and ex2.
"""

from cutlass import BFloat16, Float32, Int32, Int64
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op


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
def cp_async_16(shared, source, position, limit, *, loc=None, ip=None):
    """Start a 16-byte copy from global to shared memory where `position` < `limit`, both unsigned; zeros elsewhere.

    Where the condition fails the source is not read.
    """
    copy = "cp.async.cg.shared.global.L2::128B [$0], [$1], 16, skip;"
    _asm(
        None,
        [
            Int32(shared).ir_value(loc=loc, ip=ip),
            Int64(source).ir_value(loc=loc, ip=ip),
            Int32(position).ir_value(loc=loc, ip=ip),
            Int32(limit).ir_value(loc=loc, ip=ip),
        ],
        f"{{ .reg .pred skip; setp.ge.u32 skip, $2, $3; {copy} }}",
        "r,l,r,r",
        True,
        loc,
        ip,
    )


@dsl_user_op
def cp_async_twice(shared, apart, sources, offset, limit, number, read_once, *, loc=None, ip=None):
    """Start two 16-byte copies from `offset` bytes behind two sources, `apart` bytes from each other in shared memory,
    where bit `number` of `limit` is 0; zeros elsewhere, where no source is read.

    All but the addresses and `limit` are constants. The L2 cache gives up lines that are `read_once` before others.
    """
    hint, policy, made = "", "", ""
    if read_once:
        hint, policy = ".L2::cache_hint", ", once"
        made = ".reg .b64 once; createpolicy.fractional.L2::evict_first.b64 once, 1.0; "
    copies = " ".join(
        f"cp.async.cg.shared.global{hint}.L2::128B [$0 + {apart * i}], [${1 + i} + {offset}], 16, skip{policy};"
        for i in range(2)
    )
    _asm(
        None,
        [
            Int32(shared).ir_value(loc=loc, ip=ip),
            *(Int64(source).ir_value(loc=loc, ip=ip) for source in sources),
            Int32(limit).ir_value(loc=loc, ip=ip),
        ],
        f"{{ .reg .pred skip; .reg .b32 t; {made}and.b32 t, $3, {1 << number}; setp.ne.b32 skip, t, 0; {copies} }}",
        "r,l,l,r",
        True,
        loc,
        ip,
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
def st_shared_f32x2(address, low, high, *, loc=None, ip=None):
    """Store two neighbouring fp32 to shared memory."""
    operands = [Int32(address).ir_value(loc=loc, ip=ip), *(Float32(x).ir_value(loc=loc, ip=ip) for x in (low, high))]
    _asm(None, operands, "st.shared.v2.f32 [$0], {$1, $2};", "r,f,f", True, loc, ip)


def _load_floats(count, instruction, kind, letter, otherwise=None):
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


ld_shared_f32x2 = _load_floats(2, "ld.shared", Int32, "r")
ld_shared_f32x4 = _load_floats(4, "ld.shared", Int32, "r")
# Past L1, where another block's results never show.
ld_global_f32x2 = _load_floats(2, "ld.global.cg", Int64, "l", "0f00000000")
ld_global_f32x4 = _load_floats(4, "ld.global.cg", Int64, "l", "0f00000000")


@dsl_user_op
def st_global_f32x4(address, values, where, *, loc=None, ip=None):
    """Store four neighbouring fp32 to global memory, where `where` holds."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), *(Float32(x).ir_value(loc=loc, ip=ip) for x in values)]
    operands.append(Int32(where).ir_value(loc=loc, ip=ip))
    text = "{ .reg .pred p; setp.ne.b32 p, $5, 0; @p st.global.v4.f32 [$0], {$1, $2, $3, $4}; }"
    _asm(None, operands, text, "l,f,f,f,f,r", True, loc, ip)


@dsl_user_op
def ld_posted(address, offset, count, *, loc=None, ip=None):
    """Load `count` registers, two or four, that another block may be storing.

    Each word is either old or new: only single words are atomic. `offset`, in bytes, is a constant.
    """
    names = ", ".join(f"${i}" for i in range(count))
    words = _asm(
        llvm.StructType.get_literal([T.i32()] * count),
        [Int64(address).ir_value(loc=loc, ip=ip)],
        f"ld.relaxed.gpu.global.v{count}.b32 {{{names}}}, [${count} + {offset}];",
        ",".join([*["=r"] * count, "l"]),
        True,
        loc,
        ip,
    )
    return [Int32(llvm.extractvalue(T.i32(), words, [i], loc=loc, ip=ip)) for i in range(count)]


@dsl_user_op
def st_posted(address, offset, words, where, *, loc=None, ip=None):
    """Store registers, two or four, which another block may be loading, where `where` holds."""
    count = len(words)
    names = ", ".join(f"${i + 1}" for i in range(count))
    operands = [Int64(address).ir_value(loc=loc, ip=ip)] + [Int32(w).ir_value(loc=loc, ip=ip) for w in words]
    operands.append(Int32(where).ir_value(loc=loc, ip=ip))
    store = f"@p st.relaxed.gpu.global.v{count}.b32 [$0 + {offset}], {{{names}}};"
    text = f"{{ .reg .pred p; setp.ne.b32 p, ${count + 1}, 0; {store} }}"
    _asm(None, operands, text, ",".join(["l", *["r"] * (count + 1)]), True, loc, ip)


@dsl_user_op
def add_to(address, count, *, loc=None, ip=None):
    """Add a constant to an int32 in global memory; the value before."""
    operand = [Int64(address).ir_value(loc=loc, ip=ip)]
    return Int32(_asm(T.i32(), operand, f"atom.relaxed.gpu.global.add.u32 $0, [$1], {count};", "=r,l", True, loc, ip))


def take(address):
    """The next ticket of a counter in global memory."""
    return add_to(address, 1)


@dsl_user_op
def own_sm(*, loc=None, ip=None):
    """The number of the SM that the block runs on."""
    return Int32(_asm(T.i32(), [], "mov.u32 $0, %smid;", "=r", False, loc, ip))


@dsl_user_op
def arrive(address, *, loc=None, ip=None):
    """Add one to an int32 in global memory, what this thread wrote before becoming visible; the value before."""
    operand = [Int64(address).ir_value(loc=loc, ip=ip)]
    return Int32(_asm(T.i32(), operand, "atom.acq_rel.gpu.global.add.u32 $0, [$1], 1;", "=r,l", True, loc, ip))


@dsl_user_op
def st_global_i32(address, value, *, loc=None, ip=None):
    """Store one int32 to global memory."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Int32(value).ir_value(loc=loc, ip=ip)]
    _asm(None, operands, "st.global.b32 [$0], $1;", "l,r", True, loc, ip)


@dsl_user_op
def wait_for_grid(chained, *, loc=None, ip=None):
    """Nothing after this happens before the grid that was launched before this one has ended.

    Where `chained`: a launch then lets the blocks of a grid start while those before it still run.
    """
    if chained:
        _asm(None, [], "griddepcontrol.wait;", "~{memory}", True, loc, ip)


@dsl_user_op
def start_next_grid(chained, *, loc=None, ip=None):
    """Blocks of the next grid may start, and wait there, once all of this one's have come here or ended."""
    if chained:
        _asm(None, [], "griddepcontrol.launch_dependents;", "~{memory}", True, loc, ip)


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


@dsl_user_op
def st_global_128(address, words, where, *, loc=None, ip=None):
    """Store 16 bytes, given as four registers, to global memory, where `where` holds."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip)] + [Int32(w).ir_value(loc=loc, ip=ip) for w in words]
    operands.append(Int32(where).ir_value(loc=loc, ip=ip))
    text = "{ .reg .pred p; setp.ne.b32 p, $5, 0; @p st.global.v4.b32 [$0], {$1, $2, $3, $4}; }"
    _asm(None, operands, text, "l,r,r,r,r,r", True, loc, ip)


@dsl_user_op
def st_global_64(address, words, where, *, loc=None, ip=None):
    """Store 8 bytes, given as two registers, to global memory, where `where` holds."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip)] + [Int32(w).ir_value(loc=loc, ip=ip) for w in words]
    operands.append(Int32(where).ir_value(loc=loc, ip=ip))
    text = "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.v2.b32 [$0], {$1, $2}; }"
    _asm(None, operands, text, "l,r,r,r", True, loc, ip)


@dsl_user_op
def ld_global_i32(address, *, loc=None, ip=None):
    """Load one int32 from global memory through the read-only path."""
    operand = [Int64(address).ir_value(loc=loc, ip=ip)]
    return Int32(_asm(T.i32(), operand, "ld.global.nc.b32 $0, [$1];", "=r,l", True, loc, ip))


@dsl_user_op
def ld_global_i32_where(address, where, otherwise, *, loc=None, ip=None):
    """Load one int32 as `ld_global_i32` does where `where` holds, else give `otherwise`; no branch, so no wait."""
    text = "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, $3; @p ld.global.nc.b32 $0, [$1]; }"
    operands = [
        Int64(address).ir_value(loc=loc, ip=ip),
        *(Int32(x).ir_value(loc=loc, ip=ip) for x in (where, otherwise)),
    ]
    return Int32(_asm(T.i32(), operands, text, "=&r,l,r,r", True, loc, ip))


@dsl_user_op
def ld_global_pair(address, column, width, *, loc=None, ip=None):
    """Load two 16-bit elements as one register, `column` elements behind `address`, where that is less than `width`;
    else zeros. `column` is a constant."""
    load = f"@p ld.global.b32 $0, [$1 + {column * 2}];"
    text = f"{{ .reg .pred p; setp.gt.s32 p, $2, {column}; mov.b32 $0, 0; {load} }}"
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Int32(width).ir_value(loc=loc, ip=ip)]
    return Int32(_asm(T.i32(), operands, text, "=&r,l,r", True, loc, ip))


@dsl_user_op
def ld_global_f32(address, *, loc=None, ip=None):
    """Load one fp32 from global memory through the read-only path."""
    operand = [Int64(address).ir_value(loc=loc, ip=ip)]
    return Float32(_asm(T.f32(), operand, "ld.global.nc.f32 $0, [$1];", "=f,l", True, loc, ip))


@dsl_user_op
def ld_global_half(dtype, address, *, loc=None, ip=None):
    """Load one fp16 or bf16 from global memory, widened to fp32."""
    widen = "mov.b32 $0, {z, h};" if dtype is BFloat16 else "cvt.f32.f16 $0, h;"
    text = "{ .reg .b16 h, z; mov.b16 z, 0; ld.global.nc.b16 h, [$1]; " + widen + " }"
    operand = [Int64(address).ir_value(loc=loc, ip=ip)]
    return Float32(_asm(T.f32(), operand, text, "=f,l", True, loc, ip))


@dsl_user_op
def st_global_f32(address, value, where, *, loc=None, ip=None):
    """Store one fp32 to global memory, where `where` holds."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Float32(value).ir_value(loc=loc, ip=ip)]
    operands.append(Int32(where).ir_value(loc=loc, ip=ip))
    text = "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.f32 [$0], $1; }"
    _asm(None, operands, text, "l,f,r", True, loc, ip)


@dsl_user_op
def st_global_half(dtype, address, value, *, loc=None, ip=None):
    """Round one fp32 to fp16 or bf16 and store it to global memory."""
    kind = "bf16" if dtype is BFloat16 else "f16"
    text = f"{{ .reg .b16 h; cvt.rn.{kind}.f32 h, $1; st.global.b16 [$0], h; }}"
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Float32(value).ir_value(loc=loc, ip=ip)]
    _asm(None, operands, text, "l,f", True, loc, ip)
