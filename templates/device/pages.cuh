// Page look-up of one block of keys: turns a row of the block table into (page, offset) registers held across a warp.
//
// Lane l looks up keys l, l + 32, ...; a thread that copies a row takes its page from that lane by shuffle. A key
// outside the live range or on an unmapped page (negative, or beyond the pool or the table) has page -1.
#pragma once

#include "memory.cuh"

namespace pa {

struct Slot {
    int page, offset;
};

// The page of a key in its sequence. A division is 20 instructions, a factor that the compiler keeps around a loop and
// one correction are five: the product is the quotient, or one less.
__device__ inline int page_of(unsigned key, unsigned page_size)
{
    const unsigned quotient = __umulhi(key, 0xFFFFFFFFu / page_size);
    return quotient + (key - quotient * page_size >= page_size);
}

template <int COUNT> struct Pages {
    static constexpr int WORDS = (COUNT + LANES - 1) / LANES;
    int page[WORDS], offset[WORDS];

    // Whether this lane has a key of word `w`.
    __device__ static bool has_key(int w)
    {
        return COUNT % LANES == 0 || w * LANES + threadIdx.x % LANES < COUNT;
    }

    // Read the table for the block of keys that starts at `first`; of them, [low, high) are live.
    __device__ void look_up(const Arguments &args, Address table, int first, int low, int high)
    {
#pragma unroll
        for (int w = 0; w < WORDS; w++) {
            const int key = first + w * LANES + threadIdx.x % LANES;
            page[w] = -1;
            offset[w] = 0;
            if (has_key(w) && key >= low && key < high) {
                const int logical = page_of(key, args.page_size);
                offset[w] = key - logical * args.page_size;
                if (logical < args.max_pages)
                    page[w] = load_int(table, logical);
            }
            page[w] = page[w] < args.num_pages ? max(page[w], -1) : -1;
        }
    }

    // The slot of block row `row + step`, `step` a multiple of the rows of a pass and the same in all lanes.
    __device__ Slot slot_of(int row, int step) const
    {
        const int lane = (row + step) % LANES;
        Slot slot = {page[0], offset[0]};
#pragma unroll
        for (int w = 1; w < WORDS; w++) // an index that is no constant would put both into local memory
            slot = step < w * LANES ? slot : Slot{page[w], offset[w]};
        return {__shfl_sync(ALL_LANES, slot.page, lane), __shfl_sync(ALL_LANES, slot.offset, lane)};
    }

    // Whether some key of the block has no page: the same answer in every lane.
    __device__ bool has_hole() const
    {
        bool hole = false;
#pragma unroll
        for (int w = 0; w < WORDS; w++)
            hole |= has_key(w) && page[w] < 0;
        return __any_sync(ALL_LANES, hole);
    }

    // Bit i of word w: key w * 32 + i + `column` has no page; i + `column` stays below 32.
    __device__ void holes(unsigned (&words)[WORDS], int column) const
    {
#pragma unroll
        for (int w = 0; w < WORDS; w++)
            words[w] = __ballot_sync(ALL_LANES, page[w] < 0) >> column;
    }
};

} // namespace pa
