"""Maxima taken on trust: turns a row's sums and outputs into whether its first maximum has served it to the end.

A maximum keeps exponents in range and changes nothing else. Probabilities of bf16 have the range of fp32, 2^127, so
the maximum of the keys that a row saw first serves for all others, as long as no score is 88 above it (in units of e):
blocks of keys in the middle then look for none, which is a tenth of their instructions and their first dependence.
What overflows is infinite, or NaN, and stays so, for no sum and no output is ever replaced; such a tile is computed
again, its maxima found block by block. So results are exact whatever comes, and only the time is not the same.
"""

from cutlass import BFloat16, Float32, Int32

from pa_ops.templates.device.ptx import fma

# Of a row with a maximum that was found block by block, for 2^20 keys and more: probabilities are 2^8 at most.
ORDINARY = 2.0**32


def is_safe(dtype):
    """Whether probabilities of that type have the exponents of fp32; those of fp16 end at 2^16."""
    return dtype is BFloat16


def extraordinary(sums):
    """Whether a sum is one that only trust can have led to; of NaN, too."""
    total = sums[0]
    for other in sums[1:]:
        total = total + other
    return ~(total < ORDINARY)


def infinite(values):
    """Whether one of so many values is infinite, or NaN."""
    chains = [Float32(0.0)] * 4
    for i, value in enumerate(values):
        chains[i % 4] = fma(value, Float32(0.0), chains[i % 4])
    return Int32((chains[0] + chains[1] + chains[2] + chains[3]).bitcast(Int32) != 0)
