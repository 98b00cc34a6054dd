// Equal shares of a batch's key tiles: turns lengths on the device into the range of tiles that one block works on.
//
// The rule of shares.py in CUDA C++: tiles of all sequences lie in one row, sequence by sequence, in each head by head,
// row block by row block, then by key; every block takes an equal part of it.
#pragma once

#include "memory.cuh"
#include "worklist.cuh"

namespace pa {

constexpr int LEAST_TILES = 1; // of a share

// One sequence as shares see it. One with more than `skip_above` queries is another kernel's and has no row blocks; one
// that sees no key has one tile all the same, so that its rows are written.
struct Sequence {
    int q_start, q_len, k_len, first, tiles, blocks;
};

template <int ROWS_, int KEYS_, bool WINDOW_>
__device__ inline Sequence sequence_at(const Arguments &args, int index)
{
    const Span q = span_at(args.cu_seqlens_q, index, args.tokens);
    const int stored = load_int(args.kv_lengths, index);
    const int k_len = min(max(stored + args.past_lengths * q.length, 0), args.keys);
    const int first = WINDOW_ ? max(k_len - q.length - args.window + 1, 0) / KEYS_ : 0;
    const int tiles = max((k_len + (KEYS_ - 1)) / KEYS_ - first, 1);
    const int blocks = q.length > args.skip_above ? 0 : (q.length * args.group + (ROWS_ - 1)) / ROWS_;
    return {q.start, q.length, k_len, first, tiles, blocks};
}

// `total` tiles cut into shares for as many blocks as have LEAST_TILES each: the first `longer` blocks have one tile more
// than the others' `tiles`. In 32 bits: a division in 64 is a call of 100 instructions.
struct Cut {
    unsigned blocks, tiles, longer;

    __device__ explicit Cut(int total)
    {
        blocks = max(min(gridDim.x, static_cast<unsigned>(total) / LEAST_TILES), 1u);
        tiles = total / blocks;
        longer = total - blocks * tiles;
    }

    // The first tile of a block; of one beyond the last with a share, the end of all.
    __device__ int begin(unsigned block) const
    {
        const unsigned before = min(block, blocks);
        return before * tiles + min(before, longer);
    }

    // The block whose share holds `tile`.
    __device__ int owner(unsigned tile) const
    {
        const unsigned head = longer * (tiles + 1);
        return tile < head ? tile / (tiles + 1) : longer + (tile - head) / tiles;
    }
};

// Tiles [begin, end) of `total`, and the sequence, which starts at tile `base`, of the first.
struct Share {
    int begin, end, total, sequence, base;
};

// This block's share; each of its WARPS * 32 threads counts the tiles of a run of sequences.
template <int ROWS_, int KEYS_, bool WINDOW_> __device__ inline Share find_share(const Arguments &args)
{
    __shared__ int sums[WARPS], found[2];
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int run = (args.sequences + (WARPS * LANES - 1)) / (WARPS * LANES), first = threadIdx.x * run;
    int own = 0;
    for (int i = first; i < min(first + run, args.sequences); i++) {
        const Sequence sequence = sequence_at<ROWS_, KEYS_, WINDOW_>(args, i);
        own += sequence.tiles * sequence.blocks;
    }
    int scan = own;
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) {
        const int below = __shfl_up_sync(ALL_LANES, scan, step);
        scan += lane >= step ? below : 0;
    }
    if (lane == LANES - 1)
        sums[warp] = scan;
    __syncthreads();
    int before = 0, total = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
        before += i < warp ? sums[i] : 0;
        total += sums[i];
    }
    total *= args.kv_heads;
    const Cut cut(total);
    Share share = {cut.begin(blockIdx.x), cut.begin(blockIdx.x + 1), total, 0, 0};
    const int start = (before + scan - own) * args.kv_heads;
    if (start <= share.begin && share.begin < start + own * args.kv_heads) {
        found[0] = first;
        found[1] = start;
    }
    __syncthreads();
    share.sequence = found[0];
    share.base = found[1];
    return share;
}

} // namespace pa
