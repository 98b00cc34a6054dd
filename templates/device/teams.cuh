// Warps that share rows: turns what each knows of them from its own keys into what all need.
//
// A team's warps have the same rows. Each has the scores of MEMBER_KEYS keys of its own, and multiplies the probabilities
// of all by its own channels of V. What they tell each other goes through `room`, shared memory that nobody else uses
// from one barrier of the block to the next. A team of one warp has no room, and needs none.
#pragma once

#include "half.cuh"
#include "memory.cuh"
#include "tiles.cuh"

namespace pa {

template <class Path, int PIECES, int MEMBERS, int MEMBER_KEYS> struct Team {
    static constexpr int ROWS_OF_ALL = PIECES * Path::PIECE_ROWS;
    static constexpr int ROW_BYTES = MEMBERS * MEMBER_KEYS * 2; // of a row of probabilities
    static constexpr int ROOM_BYTES = MEMBERS > 1 ? ROWS_OF_ALL * ROW_BYTES : 0;

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

    // All of the team are here, and see what the others wrote. Barrier 0 is the block's.
    __device__ void meet() const
    {
        if constexpr (MEMBERS > 1)
            asm volatile("bar.sync %0, %1;" ::"r"(team(opaque(threadIdx.x)) + 1), "n"(MEMBERS * LANES) : "memory");
    }

    // Whether it is so for some thread.
    __device__ bool any(bool here) const
    {
        if constexpr (MEMBERS == 1)
            return __any_sync(ALL_LANES, here);
        int there;
        asm volatile("{.reg .pred p, q; setp.ne.s32 p, %1, 0; bar.red.or.pred q, %2, %3, p; selp.s32 %0, 1, 0, q;}"
                     : "=r"(there)
                     : "r"(static_cast<int>(here)), "r"(team(opaque(threadIdx.x)) + 1), "n"(MEMBERS * LANES)
                     : "memory");
        return there != 0;
    }

    // What `join` makes of the members' values of each row: the same in all of them, for it goes in their order.
    template <class Join> __device__ void agree(float (&values)[PIECES][2], const Join &join) const
    {
        if constexpr (MEMBERS > 1) {
            const int thread = opaque(threadIdx.x), lane = thread % LANES;
            const Shared mine = room(thread) + Path::row(lane) * 4;
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
                for (int slot = 0; slot < 2; slot++) {
                    const int row = member(thread) * ROWS_OF_ALL + piece * Path::PIECE_ROWS + slot * Path::ROW_STEP;
                    if (Path::column(lane) == 0)
                        store_shared(mine + row * 4, __float_as_uint(values[piece][slot]));
                }
            meet();
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
                for (int slot = 0; slot < 2; slot++) {
                    const Shared row = mine + (piece * Path::PIECE_ROWS + slot * Path::ROW_STEP) * 4;
                    values[piece][slot] = load_shared_float(row);
#pragma unroll
                    for (int i = 1; i < MEMBERS; i++)
                        values[piece][slot] = join(values[piece][slot], load_shared_float(row + i * ROWS_OF_ALL * 4));
                }
            meet(); // they have been read
        }
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
