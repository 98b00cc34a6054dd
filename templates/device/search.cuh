// Turns a token's number into its sequence, by a search of int32 prefix sums of sequences + 1 entries that begin at 0.
#pragma once

#include "memory.cuh"

namespace pa {

// How many of the lanes' ends, one every `step` from `low` on, lie at or before `token`.
__device__ inline int count_ends(Address prefix_sums, int token, int low, int step, int high)
{
    const int probe = low + (threadIdx.x % LANES + 1) * step - 1;
    const bool before = probe < high && load_int(prefix_sums, probe + 1) <= token;
    return __popc(__ballot_sync(ALL_LANES, before));
}

// The sequence of `token`, the first whose end lies beyond it; -1 past the last end. A warp asks 32 ends a step, and
// the last 128 at once: 128 sequences cost one trip to memory, 4096 two. Prefix sums that decrease give a wrong
// answer, never one outside [-1, sequences).
__device__ inline int find_sequence(Address prefix_sums, int sequences, int token)
{
    constexpr int AT_ONCE = 4 * LANES;
    int low = 0, high = sequences;
    while (high - low > AT_ONCE) {
        const int step = (high - low + LANES - 1) / LANES;
        low += count_ends(prefix_sums, token, low, step, high) * step;
        high = min(low + step - 1, high);
    }
    int found = low;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i += LANES)
        found += count_ends(prefix_sums, token, low + i, 1, high);
    return found < sequences ? found : -1;
}

} // namespace pa
