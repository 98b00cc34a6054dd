"""Rows of a tile that several heads share: turns a row's number into its token and its head.

A tile has the rows of 2^pack_bits heads of a group side by side, token by token. So it has few tokens, of which fewer
keys are seen by some and not by others, and a short sequence leaves less of it empty. With a mask tensor, whose rows
are one head's, each row is a token.
"""


def pack_bits(args, masked):
    """The logarithm of the heads of a token that lie side by side."""
    return 0 if masked else args.pack_bits


def token_of(args, masked, row):
    """The token of a row, counted from the tile's first."""
    return row >> pack_bits(args, masked)


def head_of(args, masked, row):
    """The head of a row, counted from the tile's first."""
    return row & ((1 << pack_bits(args, masked)) - 1)
