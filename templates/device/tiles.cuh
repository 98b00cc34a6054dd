// Turns (row, 16-byte chunk) of a shared-memory tile of 16-bit rows into a byte address, and global rows into a tile.
//
// Rows are dense, HEAD_DIM elements each, a multiple of 128 bytes; the chunk index is xor-ed by the row, so that eight
// rows of one chunk lie in different banks. There is no cp.async before SM 8.0: a tile travels through registers, which
// are its second buffer. Its loads are issued before a product, its stores after.
#pragma once

#include "memory.cuh"

namespace pa {

constexpr int CHUNK = 16; // bytes, of one access
constexpr int ELEMENTS = 8;
constexpr int PITCH = HEAD_DIM * 2;
constexpr int LANES_A_ROW = 8;
constexpr int CHUNKS = HEAD_DIM / ELEMENTS; // of a row
constexpr int CHUNKS_A_LANE = CHUNKS / LANES_A_ROW;

static_assert(HEAD_DIM % 64 == 0, "the swizzle is that of rows that are a multiple of 128 bytes");

__device__ inline Shared tile_address(Shared tile, int row, int chunk)
{
    return tile + row * PITCH + ((chunk ^ (row & 7)) << 4);
}

// This thread's part of R rows on their way to a tile that THREADS threads load: a block, or a warp.
template <int R, int THREADS> struct Stage {
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

    // Issue the loads of one row's chunks; columns beyond the head size, and a row that is not there, become zeros.
    template <bool CONSTANT> __device__ void fetch_row(int pass, Address source, bool there, int head_dim)
    {
#pragma unroll
        for (int j = 0; j < CHUNKS_A_LANE; j++) {
            const bool wanted = there && column(j) * ELEMENTS < head_dim;
            runs[pass][j] = fetch<CONSTANT>(source + column(j) * CHUNK, wanted);
        }
    }

    __device__ void store(Shared tile) const
    {
#pragma unroll
        for (int i = 0; i < PASSES; i++)
#pragma unroll
            for (int j = 0; j < CHUNKS_A_LANE; j++)
                store_shared(tile_address(tile, row() + i * ROWS_A_PASS, column(j)), runs[i][j]);
    }
};

} // namespace pa
