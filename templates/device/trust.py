"""Maxima taken on trust: turns a row's sums and outputs into whether its first maximum has served it to the end.

A maximum keeps exponents in range and changes nothing else. Probabilities of bf16 have the range of fp32, so the
maximum of the keys that a row saw first serves for all others as long as its sum stays below 2^60, no score being more
than 41 above it (in units of e): blocks of keys in the middle then look for none, which is a tenth of their
instructions and what their exponentials would wait for. Outputs that overflow are infinite, or NaN, and stay so, for
none is ever replaced. A tile of such rows is computed again, its maxima found block by block: results are exact
whatever comes, and only the time is not the same.
"""

from cutlass import BFloat16, Float32, Int32

from pa_ops.templates.device.ptx import fma

# A sum that maxima found block by block lead to as well, with probabilities of 2^8 at most: outputs below it are no
# nearer to the end of fp32 than theirs.
ORDINARY = 2.0**20
# A state of such a sum may be scaled by 2^-126 and less, that is by 0, beside a sink or another part of the keys: what
# is lost of it is 2^-66 of the other.
MOST = 2.0**60


def is_safe(dtype):
    """Whether probabilities of that type have the exponents of fp32; those of fp16 end at 2^16."""
    return dtype is BFloat16


def extraordinary(sums):
    """Whether a sum is one that only trust can have led to; of NaN, too."""
    total = sums[0]
    for other in sums[1:]:
        total = total + other
    return ~(total < ORDINARY)


def broken(sums, outputs):
    """Whether a sum is more than MOST, or an output infinite, or one of them NaN."""
    chains = [Float32(0.0)] * 4
    for i, output in enumerate(outputs):
        chains[i % 4] = fma(output, Float32(0.0), chains[i % 4])
    found = (chains[0] + chains[1] + chains[2] + chains[3]).bitcast(Int32) != 0
    for total in sums:
        found = found | ~(total < MOST)
    return found
