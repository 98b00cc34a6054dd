"""One Python function per PTX instruction on global memory, copies from there included: see ptx.py."""

from cutlass import BFloat16, Float32, Int32, Int64
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from pa_ops.templates.device.ptx import _asm, cache_hint, load_floats

# Past L1, where another block's results never show.
ld_global_f32x2 = load_floats(2, "ld.global.cg", Int64, "l", "0f00000000")
ld_global_f32x4 = load_floats(4, "ld.global.cg", Int64, "l", "0f00000000")


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
def cp_async_there(shared, apart, source, offset, there, *, loc=None, ip=None):
    """Start a 16-byte copy from `source` + `offset` to shared memory at `shared` + `apart`, both constants; none where
    not `there`."""
    operands = [Int32(shared).ir_value(loc=loc, ip=ip), Int64(source).ir_value(loc=loc, ip=ip)]
    copy = f"cp.async.cg.shared.global.L2::128B [$0 + {apart}], [$1 + {offset}], 16;"
    if there is True:
        _asm(None, operands, copy, "r,l", True, loc, ip)
        return
    operands.append(Int32(there).ir_value(loc=loc, ip=ip))
    _asm(None, operands, f"{{ .reg .pred here; setp.ne.s32 here, $2, 0; @here {copy} }}", "r,l,r", True, loc, ip)


@dsl_user_op
def cp_async_twice(shared, apart, sources, offset, limit, number, read_once, *, loc=None, ip=None):
    """Start two 16-byte copies from `offset` bytes behind two sources, `apart` bytes from each other in shared memory,
    where bit `number` of `limit` is 0; zeros elsewhere, where no source is read.

    All but the addresses and `limit` are constants. The L2 cache gives up lines that are `read_once` before others.
    """
    made, hint, policy = cache_hint("first" if read_once else "")
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


def _stores(instruction):
    @dsl_user_op
    def store(address, offset, words, where, *, loc=None, ip=None):
        count = len(words)
        names = ", ".join(f"${i + 1}" for i in range(count))
        operands = [Int64(address).ir_value(loc=loc, ip=ip), *(Int32(w).ir_value(loc=loc, ip=ip) for w in words)]
        operands.append(Int32(where).ir_value(loc=loc, ip=ip))
        text = f"@p {instruction}.v{count}.b32 [$0 + {offset}], {{{names}}};"
        text = f"{{ .reg .pred p; setp.ne.b32 p, ${count + 1}, 0; {text} }}"
        _asm(None, operands, text, ",".join(["l", *["r"] * (count + 1)]), True, loc, ip)

    return store


# store(address, offset, words, where): two or four registers to neighbouring words of global memory, where `where`
# holds. `offset`, in bytes, is a constant. Another block may be loading what is posted.
st_global = _stores("st.global")
st_posted = _stores("st.relaxed.gpu.global")


@dsl_user_op
def add_to(address, count, order="relaxed", *, loc=None, ip=None):
    """Add a constant to an int32 in global memory; the value before. `order` is PTX's, of other memory around it."""
    operand = [Int64(address).ir_value(loc=loc, ip=ip)]
    return Int32(_asm(T.i32(), operand, f"atom.{order}.gpu.global.add.u32 $0, [$1], {count};", "=r,l", True, loc, ip))


def take(address):
    """The next ticket of a counter in global memory."""
    return add_to(address, 1)


def arrive(address):
    """Count one more at a counter in global memory; the count before. What this thread wrote is seen by who arrives
    later, what those wrote who arrived before by this thread."""
    return add_to(address, 1, order="acq_rel")


@dsl_user_op
def st_global_i32(address, value, *, loc=None, ip=None):
    """Store one int32 to global memory."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Int32(value).ir_value(loc=loc, ip=ip)]
    _asm(None, operands, "st.global.b32 [$0], $1;", "l,r", True, loc, ip)


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
def ld_global_pairs(address, columns, width, where, *, loc=None, ip=None):
    """Load two 16-bit elements as one register from each of `columns`, in elements behind `address`, that is less than
    `width`, where `where` holds; else zeros. A branch steps over all of them. `columns` are constants."""
    count = len(columns)
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(count))
    loads = " ".join(
        f"setp.gt.s32 p, ${count + 1}, {column}; @p ld.global.b32 ${i}, [${count} + {column * 2}];"
        for i, column in enumerate(columns)
    )
    text = f"{{ .reg .pred p; {zeros} setp.eq.b32 p, ${count + 2}, 0; @p bra over; {loads} over: }}"
    words = _asm(
        llvm.StructType.get_literal([T.i32()] * count),
        [Int64(address).ir_value(loc=loc, ip=ip), *(Int32(x).ir_value(loc=loc, ip=ip) for x in (width, where))],
        text,
        ",".join([*["=&r"] * count, "l", "r", "r"]),
        True,
        loc,
        ip,
    )
    return [Int32(llvm.extractvalue(T.i32(), words, [i], loc=loc, ip=ip)) for i in range(count)]


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
