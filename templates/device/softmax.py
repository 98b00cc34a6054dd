"""Online softmax in base 2 over accumulator registers: turns raw scores into probabilities and running row statistics.

A thread owns, of every 16x8 accumulator, two columns of rows g and g + 8 (g = lane / 4); a row is shared by four lanes.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from pa_ops.templates.device.ptx import ex2, fma, lg2, opaque, pack_pair, rcp
from pa_ops.templates.device.ptx_global import ld_global_f32, ld_global_half

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
RESCALE_BITS = 8.0
NO_LIMIT = 0x7FFFFFFF
UNSEEN = 3.0e38  # the offset of exponents of a row that has seen no key: -inf stays -inf, and else it is infinite


def fresh_state(m_tiles, d_tiles):
    """(outputs, maxima, sums) of a thread's rows that have seen no key."""
    acc_o = cute.make_rmem_tensor((m_tiles * d_tiles * 4,), Float32)
    row_max = cute.make_rmem_tensor((m_tiles * 2,), Float32)
    row_sum = cute.make_rmem_tensor((m_tiles * 2,), Float32)
    acc_o.fill(0.0)
    row_max.fill(-Float32.inf)
    row_sum.fill(0.0)
    return acc_o, row_max, row_sum


def unit_anew(log2_scale):
    """1 / scale, found anew wherever it is asked for: a register to keep it in would be one too many."""
    return rcp(opaque(log2_scale.bitcast(Int32)).bitcast(Float32))


def quad(value, combine):
    """Combine one value over the four lanes that share a row."""
    value = combine(value, cute.arch.shuffle_sync_bfly(value, 1))
    return combine(value, cute.arch.shuffle_sync_bfly(value, 2))


def quad_sum(value):
    """The sum of one value over the four lanes that share a row."""
    return quad(value, lambda a, b: a + b)


def cap(acc_s, scale_in):
    """acc_s = tanh(acc_s * scale_in), by 1 - 2 / (1 + exp(2 x)): tanh.approx errs by 5e-4, 0.03 at a cap of 50."""
    slope = scale_in * 2.885390081777927  # 2 log2(e)
    for i in range(cute.size(acc_s)):
        acc_s[i] = fma(Float32(-2.0), rcp(ex2(acc_s[i] * slope) + 1.0), Float32(1.0))


def largest(values, greater=cute.arch.fmax):
    """The maximum of many values, by four chains: one alone would wait for every comparison before it."""
    chains = list(values[:4])
    for i in range(4, len(values)):
        chains[i % 4] = greater(chains[i % 4], values[i])
    top = chains[0]
    for chain in chains[1:]:
        top = greater(top, chain)
    return top


def row_elements(row, n_tiles):
    """Indices of one row's scores in the accumulator: row 2 mt + r of this thread is half r of the 16 rows mt."""
    return [(row // 2 * n_tiles + nt) * 4 + row % 2 * 2 + c for nt in range(n_tiles) for c in range(2)]


def outgrown(acc_s, row_max, log2_scale, n_tiles):
    """Whether some row of the warp outgrew the maximum in use by a factor of 2^8, or has just seen its first key.

    Until then the old one serves: probabilities reach 256 at most, which both 16-bit types hold to full precision. What
    that saves is the rescaling of the output, two multiplications for every three of the rest of the softmax, and the
    shuffles that tell four lanes their row's maximum: each votes on what it sees.
    """
    some = False
    for row in range(cute.size(row_max)):
        top = largest([acc_s[i] for i in row_elements(row, n_tiles)])
        some = some | ((top - row_max[row]) * log2_scale > RESCALE_BITS)
    return cute.arch.vote_any_sync(some)


def limits_of(row_max, unit):
    """Bits of the score at which each row outgrows its maximum, `unit` being 1 / scale; what nothing exceeds for a row
    without a say."""
    limits = []
    for row in range(cute.size(row_max)):
        limit = fma(Float32(RESCALE_BITS), unit, row_max[row]).bitcast(Int32)
        limits.append(cutlass.select_(row_max[row] == Float32.inf, Int32(NO_LIMIT), limit))
    return limits


@cute.jit
def outgrown_beyond(limits, acc_s, row_max, log2_scale: Float32, n_tiles: cutlass.Constexpr):
    """`outgrown`, asked only where a score exceeds its row's limit, or the limit is negative.

    Floats that are not negative order as their bits do, as integers, of which SM 9.0 takes the largest of three in one
    instruction: half the maxima of the softmax.
    """
    words = cute.recast_tensor(acc_s, Int32)
    some = (limits[0] | limits[1]) < 0
    for row in cutlass.range_constexpr(2):
        some = some | (largest([words[i] for i in row_elements(row, n_tiles)], cutlass.max) > limits[row])
    some = cute.arch.vote_any_sync(some)
    if some:
        some = outgrown(acc_s, row_max, log2_scale, n_tiles)
    return some


def base_of(top):
    """What a row's scores are taken relative to, its maximum; 0 for a row without keys, where -inf would give NaN."""
    return Float32(cutlass.select_(top == -Float32.inf, Float32(0.0), top))


def rescale(acc_s, acc_o, row_max, row_sum, log2_scale, n_tiles, d_tiles):
    """Move output and sums to the maxima of the rows, this block included."""
    scale_rows(acc_o, raise_maxima(acc_s, row_max, row_sum, log2_scale, n_tiles), d_tiles)


def scale_rows(acc_o, factors, d_tiles):
    """Multiply each row's outputs by its factor."""
    for row, factor in enumerate(factors):
        for i in row_elements(row, d_tiles):
            acc_o[i] = acc_o[i] * factor


def zero_rows(acc_o, factors, d_tiles):
    """Zero the outputs of rows whose factor is 0, whatever they hold."""
    for row, factor in enumerate(factors):
        for i in row_elements(row, d_tiles):
            acc_o[i] = cutlass.select_(factor == 0.0, Float32(0.0), acc_o[i])


def raise_maxima(acc_s, row_max, row_sum, log2_scale, n_tiles):
    """Move the sums to the maxima of the rows, this block included; the factors that the outputs still have to take."""
    factors = []
    for row in range(cute.size(row_max)):
        top = cute.arch.fmax(row_max[row], largest([acc_s[i] for i in row_elements(row, n_tiles)]))
        top = quad(top, cute.arch.fmax)
        shrink = ex2(row_max[row] * log2_scale - base_of(top) * log2_scale)
        row_max[row] = top
        row_sum[row] = row_sum[row] * shrink
        factors.append(shrink)
    return factors


def start(acc_s, row_max, row_sum, log2_scale, n_tiles):
    """The softmax of a row's first block, whose outputs hold nothing that would have to be scaled."""
    raise_maxima(acc_s, row_max, row_sum, log2_scale, n_tiles)
    exponentiate(acc_s, row_max, row_sum, log2_scale, n_tiles)


def exponentiate(acc_s, row_max, row_sum, log2_scale, n_tiles):
    """Replace scores by exp2(s * log2_scale + base), and add them to the row sums."""
    for row in range(cute.size(row_max)):
        base = Float32(cutlass.select_(row_max[row] == -Float32.inf, Float32(UNSEEN), -row_max[row] * log2_scale))
        total = row_sum[row]
        for i in row_elements(row, n_tiles):
            p = ex2(fma(acc_s[i], log2_scale, base))
            acc_s[i] = p
            total = total + p
        row_sum[row] = total


@cute.jit
def done(row_sum):
    """A branch, never taken, on the sums of the rows: what follows stays behind them.

    The assembler moves a wait for wgmma to the top of its basic block, over work that is to hide what it waits for.
    """
    for _ in cutlass.range(opaque(row_sum[0] < 0.0), unroll=1):
        row_sum[0] = -row_sum[0]


@cute.jit
def sink_of(dtype: cutlass.Constexpr, args, head: Int32):
    """The sink of a query head, in fp32."""
    value = Float32(0.0)
    if args.sinks_fp32 != 0:
        value = ld_global_f32(args.sinks + Int64(head) * 4)
    else:
        value = ld_global_half(dtype, args.sinks + Int64(head) * 2)
    return value


def joint(top, other):
    """(maximum, factor of the first, factor of the other) of what was summed relative to two maxima; base 2."""
    peak = cute.arch.fmax(top, other)
    base = base_of(peak)
    return peak, ex2(top - base), ex2(other - base)


def mix(value, keep, other, gain):
    """`value` * `keep` + `other` * `gain`, rounded in one way, wherever it is compiled: results must be one's bits."""
    return fma(value, keep, other * gain)


def concluded(top, total, sink):
    """(factor of the outputs, log-sum-exp) of a row with that maximum and sum, whose sink (-inf = none) joins the
    denominator; all in base 2."""
    peak, shrink, gain = joint(top, sink)
    denominator = total * shrink + gain
    # By select, not by multiplication: a row that sees no key gives zeros whatever its accumulator holds.
    factor = Float32(cutlass.select_(total == 0.0, Float32(0.0), shrink * rcp(denominator)))
    return factor, lg2(denominator) + base_of(peak)


def finish(row_max, row_sum, log2_scale, sinks, m_tiles):
    """(output factors, base-2 log-sum-exps) of each row, its sink (base 2, -inf = none) joining the denominator."""
    rows = range(m_tiles * 2)
    ended = [concluded(row_max[row] * log2_scale, quad_sum(row_sum[row]), sinks[row]) for row in rows]
    return [factor for factor, _ in ended], [lse for _, lse in ended]


def scaled_pair(dtype, low, high, scale):
    """Two outputs times their row's factor, rounded and packed; exactly zero where the factor is."""
    zero = Float32(0.0)
    none = scale == 0.0
    return pack_pair(dtype, cutlass.select_(none, zero, low * scale), cutlass.select_(none, zero, high * scale))
