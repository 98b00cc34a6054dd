"""The device-side work list: turns cu_seqlens_q and a tile's rank into (sequence, row block), without the host.

Every kernel that walks query rows finds its work here, so no launch extent is ever derived from anything but shapes.
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from pa_ops.templates.device.ptx_global import ld_global_i32
from pa_ops.templates.device.quotients import divided


@cute.jit
def length_at(prefix_sums: Int64, index: Int32, total: Int32):
    """(start, length) of sequence `index` in an int32 prefix sum of `total` rows.

    A pair that decreases has length 0, one that leaves the rows there are is cut: sums that lie give wrong results,
    and never reach memory that is not there.
    """
    address = prefix_sums + Int64(index) * 4
    start = cutlass.max(ld_global_i32(address), 0)
    return start, cutlass.max(cutlass.min(ld_global_i32(address + 4), total) - start, 0)


@cute.jit
def paged_keys(args, sequence: Int32, queries: Int32):
    """Keys of a paged sequence, its `queries` new ones included, at most what a row of the block table has room for."""
    stored = ld_global_i32(args.kv_lengths + Int64(sequence) * 4)
    return cutlass.min(cutlass.max(stored + args.past_lengths * queries, 0), args.keys)


@cute.jit
def scan_warp(value: Int32):
    """The inclusive prefix sum of one value a lane."""
    lane = cute.arch.lane_idx()
    for power in cutlass.range_constexpr(5):
        below = cute.arch.shuffle_sync_up(value, 1 << power)
        value = Int32(cutlass.select_(lane >= (1 << power), value + below, value))
    return value


def tiles_of(length, tokens):
    """Tiles of `tokens` tokens in a sequence of that length."""
    return divided(length + (tokens - 1), tokens)


def step_of(rows, bits, keys):
    """What tiles of `rows` >> `bits` tokens and blocks of so many keys have in common: their greatest divisor."""
    common = math.gcd(rows, keys)
    return cutlass.min((rows & -rows) >> bits, keys & -keys) * (common // (common & -common))


def end_of(length, step):
    """Where a sequence's last tile ends, the others lying full before it: at its length, or less than a `step` past it.

    So it is the first tile that has room left, which sees fewest keys of a causal sequence: by tiles of 384 there is
    1.5% less to do for 16k tokens. Without a step more tiles would begin inside of a block of keys, which they have to
    mask: 3 to 5% slower where sequences are short (docs/performance.md).
    """
    return tiles_of(length, step) * step


@cute.jit
def find_tile(args, tokens, rank: Int32):
    """(sequence, row block) of the `rank`-th tile of `tokens` tokens; beyond the last, -1 and how far beyond.

    Sequences of `skip_up_to` tokens or fewer have no tiles here: another kernel's launch has them. One warp reads 32
    lengths a step and scans them: 64 sequences cost two steps, a single one costs one.
    """
    lane = cute.arch.lane_idx()
    found = Int32(-1)
    block = Int32(0)
    remaining = Int32(rank)
    first = Int32(0)
    while first < args.sequences:
        index = first + lane
        tiles = Int32(0)
        if index < args.sequences:
            _, length = length_at(args.cu_seqlens_q, index, args.tokens)
            if length > args.skip_up_to:
                tiles = tiles_of(length, tokens)
        scan = scan_warp(tiles)
        total = cute.arch.shuffle_sync(scan, 31)
        owner = 32 - cute.arch.popc(cute.arch.vote_ballot_sync(scan > remaining))
        if remaining < total:
            found = first + owner
            block = remaining - cute.arch.shuffle_sync(scan - tiles, owner)
            first = args.sequences
        else:
            remaining = remaining - total
            block = remaining
            first = first + 32
    return found, block
