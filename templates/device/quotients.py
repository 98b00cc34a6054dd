"""Quotients of numbers that are not negative: turns a division of 35 instructions into one of 18, or of five where the
host has told the divisor's factor (pa_ops/launch.py), (2^32 - 1) // divisor.
"""

from cutlass import Int32, Uint32, Uint64


def divided(value, divisor):
    """The quotient."""
    return Int32(Uint32(value) // Uint32(divisor))


def by_factor(value, divisor, factor):
    """The quotient, by the divisor's factor: the upper half of the product is that, or one less."""
    product = Uint64(Uint32(value)) * Uint64(Uint32(factor))
    quotient = Int32(product >> 32)
    return quotient + Int32(value - quotient * divisor >= divisor)
