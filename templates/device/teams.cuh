// Warps that share rows: turns what each knows of them from its own keys into what all need.
//
// A team's warps have the same rows. Each has the scores of MEMBER_KEYS keys of its own, and multiplies the probabilities
// of all by its own channels of V. What they tell each other goes through `room`, shared memory that nobody else uses.
// They meet by barriers of the whole block, so all teams of it must call in step. A team of one warp has no room, and
// needs none.
#pragma once

#include "half.cuh"
#include "memory.cuh"
#include "tiles.cuh"

namespace pa {

template <class Path, int PIECES, int MEMBERS, int MEMBER_KEYS> struct Team {
    static constexpr int ROW_BYTES = MEMBERS * MEMBER_KEYS * 2; // of a row of probabilities
    static constexpr int ROOM_BYTES = MEMBERS > 1 ? PIECES * Path::PIECE_ROWS * ROW_BYTES : 0;

    using Scores = float[PIECES][MEMBER_KEYS / 8][Path::REGISTERS];

    Shared rooms; // of all teams of the block, one beside the other

    __device__ static int team(int thread)
    {
        return thread / LANES / MEMBERS;
    }

    // The place of a thread's warp in its team.
    __device__ static int member(int thread)
    {
        return MEMBERS > 1 ? thread / LANES % MEMBERS : 0;
    }

    __device__ Shared room(int thread) const
    {
        return rooms + team(thread) * ROOM_BYTES;
    }

    // All of the block are here, and see what the others wrote: every warp comes here as often.
    __device__ void meet() const
    {
        if constexpr (MEMBERS > 1)
            __syncthreads();
    }

    // Whether it is so for some thread: of the warp, where it is alone with its rows, else of the block.
    __device__ bool any(bool here) const
    {
        if constexpr (MEMBERS > 1)
            return __syncthreads_or(here);
        else
            return __any_sync(ALL_LANES, here);
    }

    // What `join` makes of the members' values of a thread's row: the same in all of them, for it goes in their order.
    template <class Join> __device__ float agree(float value, const Join &join) const
    {
        if constexpr (MEMBERS > 1) {
            const int thread = opaque(threadIdx.x), lane = thread % LANES;
            const Shared row = room(thread) + Path::row(lane) * 4;
            if (Path::column(lane) == 0)
                store_shared(row + member(thread) * Path::PIECE_ROWS * 4, __float_as_uint(value));
            meet();
            value = load_shared_float(row);
#pragma unroll
            for (int i = 1; i < MEMBERS; i++)
                value = join(value, load_shared_float(row + i * Path::PIECE_ROWS * 4));
            meet(); // they have been read
        }
        return value;
    }

    // Put this warp's probabilities, rounded to 16 bits, where all members read them.
    __device__ void share(const Scores &p) const
    {
        const int thread = opaque(threadIdx.x), lane = thread % LANES; // else addresses are kept for all blocks
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
            for (int slot = 0; slot < 2; slot++) {
                const int row = piece * Path::PIECE_ROWS + Path::row(lane) + slot * Path::ROW_STEP;
#pragma unroll
                for (int tile = 0; tile < MEMBER_KEYS / 8; tile++)
#pragma unroll
                    for (int half = 0; half < Path::REGISTERS / 4; half++) {
                        const float *pair = &p[piece][tile][half * 4 + slot * 2];
                        const int chunk = member(thread) * (MEMBER_KEYS / 8) + tile;
                        store_shared(tile_address<ROW_BYTES>(room(thread), row, chunk) + (half * 4 + Path::column(lane)) * 2,
                                     pair_of(pair[0], pair[1]));
                    }
            }
    }
};

} // namespace pa
