"""Turns shapes and host-side bounds into launch extents, and lengths into the work list that the device computes.

The kernels find their work in templates/device/worklist.py; `work_list` here is the same rule in Python, for tests and
for readers. An extent may exceed the work (a block that finds none leaves at once), never fall short of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pa_ops.spec import Family, InstanceSpec, Mask, Tile


class Work(NamedTuple):
    """One block's rows: rows [first, first + rows) of `sequence`, its tile number being `block`."""

    sequence: int
    block: int
    first: int
    rows: int


QUERY_ROWS = 64  # of a box of queries: those of one warpgroup
WIDEST_COLUMNS = 64  # the 128 bytes that a copy swizzles at most
SECTION_CHANNELS = 512  # of a key and as many of a value: 32 MB for 16k keys, of an H200's L2 cache of 50
SWIZZLED_KEYS = 8  # that a copy swizzles together
RESERVED_BYTES = 1024  # of shared memory: the system's in each block, and so much more than a block may have in an SM


def resident_blocks(smem_bytes: int, smem_optin_bytes: int) -> int:
    """Blocks of so much shared memory that an SM holds at a time, as far as that goes.

    Source: CUDA C++ Programming Guide 13.0, table of technical specifications (SM 8.0 and newer).
    """
    return (smem_optin_bytes + RESERVED_BYTES) // (smem_bytes + RESERVED_BYTES)


def ceil_div(a: int, b: int) -> int:
    """The least integer >= a / b, for b > 0."""
    return -(-a // b)


def packed_heads(spec: InstanceSpec, group: int) -> int:
    """Heads of a group whose rows a tile has side by side, token by token, where queries are copied in boxes.

    Rows of fewer tokens see fewer keys that only some of them see, and few tokens leave less of a tile empty. As many
    as there are, to a power of two, so that a row's token and head are bits of its number.
    """
    if spec.family is not Family.FLASH_SM90 or spec.mask is Mask.TENSOR:
        return 1
    return math.gcd(group, QUERY_ROWS)


def section_bits(spec: InstanceSpec, heads: int, group: int) -> int:
    """The logarithm of the heads whose tiles take turns as blocks of `flash_sm80` start, for `group` query heads a KV
    head: a power of two that divides `heads`, of as many KV heads as SECTION_CHANNELS allow.

    Tiles of other masks than the causal one are equally long, and go head by head.
    """
    if spec.family is not Family.FLASH_SM80 or spec.mask is not Mask.CAUSAL:
        return 0
    near = max(SECTION_CHANNELS * group // spec.head_dim, 1)
    return min(near.bit_length(), (heads & -heads).bit_length()) - 1


def columns_of(head_dim: int) -> int:
    """Elements of a row in a box, which lie side by side in a tile: 128 bytes, or what of them divides a row."""
    return math.gcd(head_dim, WIDEST_COLUMNS)


def box_keys(tile: Tile, page_size: int) -> int:
    """Keys that one copy brings: as many as divide both a page and the tile, and leave each block of a cluster a box.

    page_size: 0 where there are no pages.
    """
    return min(math.gcd(page_size, tile.n), tile.n // tile.cluster // SWIZZLED_KEYS * SWIZZLED_KEYS)


def attention_tiles(tokens: int, sequences: int, rows: int, max_seqlen_q: int | None = None) -> int:
    """An upper bound of the tiles of `rows` query rows in `tokens` tokens of `sequences` sequences, however split.

    Every sequence wastes at most rows - 1 rows of its last tile, and has at most tokens tiles. A host-side bound of
    the lengths can only lower the result: at most ceil(bound / rows) tiles a sequence.
    """
    bound = (tokens + min(sequences, tokens) * (rows - 1)) // rows
    if max_seqlen_q is not None:
        bound = min(bound, sequences * ceil_div(max_seqlen_q, rows))
    return max(bound, 1)


def work_list(lengths: Sequence[int], rows: int, step: int | None = None) -> Iterator[Work]:
    """Each tile of `rows` query rows once, in rank order; sequences of length 0 have none.

    The last tile of a sequence ends at the multiple of `step`, a divisor of `rows`, that follows: what has room left is
    the first tile, or the last one where no step is given.
    """
    step = step or rows
    for sequence, length in enumerate(lengths):
        tiles, end = ceil_div(max(length, 0), rows), ceil_div(max(length, 0), step) * step
        for block in range(tiles):
            stop = end - (tiles - 1 - block) * rows
            first = max(stop - rows, 0)
            yield Work(sequence, block, first, min(stop, length) - first)
