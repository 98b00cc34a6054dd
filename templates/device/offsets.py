"""Online softmax whose state is the offset of a row's exponents: turns raw scores into probabilities and row sums.

A row's offset is the maximum in use, scaled and negated: probabilities are 2^(score * scale + offset). Nothing is made
of the maximum in each block, and nothing else of it is kept: 12 instructions and 4 registers of a loop that has none to
spare. A row that has seen no key has UNSEEN, which is finite, so that a hidden score, -inf, stays -inf beside it.
Rows, elements and the lazy rescaling are those of softmax.py.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from pa_ops.templates.device.ptx import ex2, fma
from pa_ops.templates.device.softmax import (
    RESCALE_BITS,
    UNSEEN,
    finish,
    fresh_state,
    largest,
    quad,
    row_elements,
    scale_rows,
)


def fresh(m_tiles, d_tiles):
    """(outputs, offsets, sums) of a thread's rows that have seen no key."""
    acc_o, row_offset, row_sum = fresh_state(m_tiles, d_tiles)
    row_offset.fill(UNSEEN)
    return acc_o, row_offset, row_sum


def row_tops(acc_s, rows, n_tiles, greater=cute.arch.fmax):
    """The largest score of each row that this thread holds."""
    return [largest([acc_s[i] for i in row_elements(row, n_tiles)], greater) for row in range(rows)]


def may_outgrow(acc_s, row_offset, bits_a_unit, n_tiles):
    """Whether one of this thread's rows may have outgrown its maximum by 2^8; `bits_a_unit` is 1 / scale.

    Floats that are not negative order as their bits do, as integers, of which SM 9.0 takes the largest of three in one
    instruction. A limit that is negative, as of a row without a key, says nothing of that: it may.
    """
    rows = cute.size(row_offset)
    tops = row_tops(cute.recast_tensor(acc_s, Int32), rows, n_tiles, cutlass.max)
    some = None
    for row in range(rows):
        limit = ((RESCALE_BITS - row_offset[row]) * bits_a_unit).bitcast(Int32)
        grown = (tops[row] > limit) | (limit < 0)
        some = grown if some is None else some | grown
    return Int32(some)


def outgrown(acc_s, row_offset, log2_scale, n_tiles):
    """Whether some row of the warp outgrew its maximum by a factor of 2^8, or has just seen its first key."""
    some = False
    for row, top in enumerate(row_tops(acc_s, cute.size(row_offset), n_tiles)):
        some = some | (fma(top, log2_scale, row_offset[row]) > RESCALE_BITS)
    return cute.arch.vote_any_sync(some)


def warp_tops(acc_s, rows, n_tiles):
    """The largest score of each row, of all four lanes that hold it."""
    return [quad(top, cute.arch.fmax) for top in row_tops(acc_s, rows, n_tiles)]


def rescale(acc_o, row_offset, row_sum, tops, log2_scale, d_tiles):
    """Move outputs and sums to the maxima of the rows, `tops` included."""
    factors = []
    for row, top in enumerate(tops):
        offset = cute.arch.fmin(row_offset[row], -(top * log2_scale))
        factor = ex2(offset - row_offset[row])
        row_offset[row] = offset
        row_sum[row] = row_sum[row] * factor
        factors.append(factor)
    scale_rows(acc_o, factors, d_tiles)


def exponentiate(acc_s, row_offset, row_sum, log2_scale, n_tiles):
    """Replace scores by probabilities, and add them to the row sums."""
    for row in range(cute.size(row_offset)):
        total = row_sum[row]
        for i in row_elements(row, n_tiles):
            p = ex2(fma(acc_s[i], log2_scale, row_offset[row]))
            acc_s[i] = p
            total = total + p
        row_sum[row] = total


def ended(row_offset, row_sum, sink, m_tiles):
    """(output factors, base-2 log-sum-exps) of each row, `sink` (base 2, -inf = none) joining the denominator."""
    tops = [-row_offset[row] for row in range(m_tiles * 2)]
    return finish(tops, row_sum, Float32(1.0), [sink] * len(tops), m_tiles)
