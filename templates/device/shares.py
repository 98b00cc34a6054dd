"""Equal shares of a batch's key tiles: turns lengths on the device into the range of tiles that one block works on.

Tiles of all sequences lie in one row: sequence by sequence, in each head by head, row block by row block, then by key.
Every block takes an equal part of that row, so that long and short sequences load the device alike (stream-K, Osama
et al., PPoPP 2023). Each block finds its part by itself: one trip to memory and one scan of the batch.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from pa_ops.templates.device.ptx import ld_shared_32, st_shared_32
from pa_ops.templates.device.worklist import length_at, paged_keys, scan_warp

WORDS = 10  # of shared memory that `find_share` needs
LEAST = 4  # tiles of a share that is cut


@cute.jit
def span(args, sequence: Int32, rows: cutlass.Constexpr, keys: cutlass.Constexpr, window: cutlass.Constexpr):
    """(first query row, queries, keys, first tile, tiles, row blocks) of a sequence; no row blocks where it has none.

    A sequence with more than `skip_above` queries is another kernel's. One that sees no key has one tile all the same,
    so that its rows are written.
    """
    q_start, q_len = length_at(args.cu_seqlens_q, sequence, args.tokens)
    k_len = paged_keys(args, sequence, q_len)
    first = Int32(0)
    if cutlass.const_expr(window):
        first = cutlass.max(k_len - q_len - args.window + 1, 0) // keys
    tiles = cutlass.max((k_len + (keys - 1)) // keys - first, 1)
    blocks = (q_len * args.group + (rows - 1)) // rows
    blocks = Int32(cutlass.select_(q_len > args.skip_above, Int32(0), blocks))
    return q_start, q_len, k_len, first, tiles, blocks


@cute.jit
def find_share(args, smem: Int32, rows: cutlass.Constexpr, keys: cutlass.Constexpr, window: cutlass.Constexpr):
    """(begin, end, total, shares, sequence, base): this block's of so many shares of all tiles, and where to seek them.

    `sequence`, whose tiles begin at `base`, is not after the share's first. A thread of the block's 128 counts the
    tiles of a run of sequences; `smem` is WORDS words of scratch.
    """
    tid, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    warp, lane = tid // 32, tid % 32
    run = (args.sequences + 127) // 128
    first = tid * run
    own, own_places = Int32(0), Int32(0)
    for i in cutlass.range(run, unroll=1):
        sequence = first + i
        if sequence < args.sequences:
            _, _, _, _, tiles, row_blocks = span(args, sequence, rows, keys, window)
            own = own + tiles * row_blocks
            own_places = own_places + row_blocks
    inclusive, places_here = scan_warp(own), scan_warp(own_places)
    if lane == 31:
        st_shared_32(smem + warp * 8, inclusive)
        st_shared_32(smem + warp * 8 + 4, places_here)
    cute.arch.barrier()
    before, total, places = Int32(0), Int32(0), Int32(0)
    for w in cutlass.range_constexpr(4):
        sums = ld_shared_32(smem + w * 8)
        before = before + Int32(cutlass.select_(Int32(w) < warp, sums, Int32(0)))
        total = total + sums
        places = places + ld_shared_32(smem + w * 8 + 4)
    total = total * args.kv_heads
    shares = shares_of(total, places * args.kv_heads)
    begin, end = Int32(0), Int32(0)
    if block < shares:
        begin = Int32(Int64(block) * Int64(total) // Int64(shares))
        end = Int32(Int64(block + 1) * Int64(total) // Int64(shares))
    start = (before + inclusive - own) * args.kv_heads
    if (start <= begin) & (begin < start + own * args.kv_heads):
        st_shared_32(smem + 32, first)
        st_shared_32(smem + 36, start)
    cute.arch.barrier()
    return begin, end, total, shares, ld_shared_32(smem + 32), ld_shared_32(smem + 36)


@cute.jit
def seek(
    args,
    sequence: Int32,
    base: Int32,
    unit: Int32,
    rows: cutlass.Constexpr,
    keys: cutlass.Constexpr,
    window: cutlass.Constexpr,
):
    """(sequence, its first tile) of tile `unit`, at or after the sequence whose tiles begin at `base`."""
    _, _, _, _, tiles, blocks = span(args, sequence, rows, keys, window)
    while unit >= base + tiles * blocks * args.kv_heads:
        base = base + tiles * blocks * args.kv_heads
        sequence = sequence + 1
        _, _, _, _, tiles, blocks = span(args, sequence, rows, keys, window)
    return sequence, base


def shares_of(total, places):
    """How many blocks have a share of `total` tiles, in so many heads and row blocks of sequences.

    No more than there are blocks and tiles, and else one a place, or as many as give each LEAST tiles: a merge costs as
    much as some tiles do, so what is cut is long, and what is short is not put together.
    """
    blocks, _, _ = cute.arch.grid_dim()
    return cutlass.max(cutlass.min(blocks, cutlass.max(places, total // LEAST)), 1)


def owner_of(tile, total, shares):
    """The block whose share holds `tile`."""
    return Int32(((Int64(tile) + 1) * Int64(shares) - 1) // Int64(total))
