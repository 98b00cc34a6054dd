// The device-side work list: turns cu_seqlens_q and a tile's rank into (sequence, row block), without the host.
//
// The rule of worklist.py in CUDA C++: no launch extent comes from anything but shapes, and prefix sums that lie give
// wrong results without reaching memory that is not there.
#pragma once

#include "memory.cuh"

namespace pa {

struct Span {
    int start, length;
};

// The rows of sequence `index` in an int32 prefix sum of `total` rows.
__device__ inline Span span_at(Address prefix_sums, int index, int total)
{
    const int start = max(load_int(prefix_sums, index), 0);
    return {start, max(min(load_int(prefix_sums, index + 1), total) - start, 0)};
}

struct Work {
    int sequence, block; // sequence -1: none
};

// The `rank`-th tile of `rows` query rows. One warp reads 32 lengths a step and scans them; sequences of `skip_up_to`
// tokens or fewer are another kernel's.
__device__ inline Work find_tile(const Arguments &args, int rows, int rank)
{
    const int lane = threadIdx.x % LANES;
    for (int first = 0; first < args.sequences; first += LANES) {
        int tiles = 0;
        if (first + lane < args.sequences) {
            const int length = span_at(args.cu_seqlens_q, first + lane, args.tokens).length;
            if (length > args.skip_up_to)
                tiles = (length + (rows - 1)) / rows;
        }
        int scan = tiles;
#pragma unroll
        for (int step = 1; step < LANES; step *= 2) {
            const int below = __shfl_up_sync(ALL_LANES, scan, step);
            scan += lane >= step ? below : 0;
        }
        const int total = __shfl_sync(ALL_LANES, scan, LANES - 1);
        if (rank < total) {
            const int owner = LANES - __popc(__ballot_sync(ALL_LANES, scan > rank));
            return {first + owner, rank - __shfl_sync(ALL_LANES, scan - tiles, owner)};
        }
        rank -= total;
    }
    return {-1, 0};
}

} // namespace pa
