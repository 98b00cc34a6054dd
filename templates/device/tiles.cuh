// Turns (row, 16-byte chunk) of a shared-memory tile of 16-bit rows into a byte address, and global rows into a tile.
//
// Rows are dense, HEAD_DIM elements each or a part of them, a multiple of 128 bytes; the chunk index is xor-ed by the row,
// so that eight rows of one chunk lie in different banks. There is no cp.async before SM 8.0: a tile travels through registers, which
// are its second buffer. Its loads are issued before a product, its stores after.
#pragma once

#include "memory.cuh"

namespace pa {

constexpr int CHUNK = 16; // bytes, of one access
constexpr int ELEMENTS = 8;
constexpr int PITCH = HEAD_DIM * 2;
constexpr int LANES_A_ROW = 8;
constexpr int CHUNKS = HEAD_DIM / ELEMENTS; // of a row

template <int ROW_BYTES = PITCH> __device__ inline Shared tile_address(Shared tile, int row, int chunk)
{
    static_assert(ROW_BYTES % 128 == 0, "the swizzle is that of rows that are a multiple of 128 bytes");
    return tile + row * ROW_BYTES + ((chunk ^ (row & 7)) << 4);
}

// How the accumulators of a warp lie in its threads for 16 x 8 tiles, as those of mma.m16n8k8 and m16n8k16 do.
struct Accumulators {
    static constexpr int PIECE_ROWS = 16;
    static constexpr int REGISTERS = 4;    // of a 16 x 8 tile of an accumulator
    static constexpr int ROW_STEP = 8;     // from a thread's first row of a piece to its second
    static constexpr int FIRST_SHARER = 1; // lanes that share a row differ in this bit and the next, up to 2

    __device__ static int row(int lane)
    {
        return lane / 4;
    }

    // The first column of a tile that a thread holds; register i adds i % 2.
    __device__ static int column(int lane)
    {
        return lane % 4 * 2;
    }
};

template <int PIECES, int TILES, int REGISTERS> __device__ inline void clear(float (&all)[PIECES][TILES][REGISTERS])
{
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int i = 0; i < REGISTERS; i++)
                all[piece][tile][i] = 0.0f;
}

// This thread's part of R rows of WIDTH elements on their way to a tile that THREADS threads load: a block, or a warp.
template <int R, int WIDTH, int THREADS> struct Stage {
    static constexpr int CHUNKS_A_LANE = WIDTH / ELEMENTS / LANES_A_ROW;
    static constexpr int ROWS_A_PASS = THREADS / LANES_A_ROW;
    static constexpr int PASSES = R / ROWS_A_PASS;
    static_assert(R % ROWS_A_PASS == 0, "a pass has whole rows");
    uint4 runs[PASSES][CHUNKS_A_LANE];

    // The row of the first pass that this thread has part of.
    __device__ static int row()
    {
        return threadIdx.x % THREADS / LANES_A_ROW;
    }

    __device__ static int column(int j)
    {
        return threadIdx.x % LANES_A_ROW + j * LANES_A_ROW;
    }

    // Issue the loads of one row's chunks; columns from `width` on, and a row that is not there, become zeros.
    template <bool CONSTANT> __device__ void fetch_row(int pass, Address source, bool there, int width)
    {
#pragma unroll
        for (int j = 0; j < CHUNKS_A_LANE; j++) {
            const bool wanted = there && column(j) * ELEMENTS < width;
            runs[pass][j] = fetch<CONSTANT>(source + column(j) * CHUNK, wanted);
        }
    }

    __device__ void store(Shared tile) const
    {
#pragma unroll
        for (int i = 0; i < PASSES; i++)
#pragma unroll
            for (int j = 0; j < CHUNKS_A_LANE; j++)
                store_shared(tile_address<WIDTH * 2>(tile, row() + i * ROWS_A_PASS, column(j)), runs[i][j]);
    }
};

} // namespace pa
