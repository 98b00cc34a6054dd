// The two products of attention for one warp on SM 7.0 and 7.2: turns tiles in shared memory into scores and outputs.
//
// mma.m8n8k4 is four multiplications at once, one for each quad pair (lanes 4q to 4q + 3 and 16 more). Here the four
// have 8 rows each and the same keys or channels: a piece is 32 rows tall, and an operand of K or V is read by all.
#pragma once

#include "half.cuh"
#include "tiles.cuh"

namespace pa {

struct Path {
    static constexpr int PIECE_ROWS = 32;
    static constexpr int WARP_PIECES = 1;  // that share what was read of K and V
    static constexpr int OPERAND_KEYS = 8; // of two multiplications by V
    static constexpr int REGISTERS = 8;    // of a 32 x 8 tile of an accumulator
    static constexpr int ROW_STEP = 2;     // from a thread's first row of a piece to its second
    static constexpr int FIRST_SHARER = 2; // lanes that share a row differ in this bit alone

    // Row 0 of the 4 rows that a half of a quad pair has: in this order, eight neighbouring lanes that read a row each
    // read eight neighbouring rows, which lie in different banks.
    __device__ static int four_rows(int lane)
    {
        return lane / 8 % 2 * 16 + lane / 16 * 8 + lane / 4 % 2 * 4;
    }

    __device__ static int row(int lane)
    {
        return four_rows(lane) + lane % 2;
    }

    // The first column of a tile that a thread holds; register i adds i % 2, and 4 from i = 4 on.
    __device__ static int column(int lane)
    {
        return lane / 2 % 2 * 2;
    }

    // The channel of registers 4 half + 2 slot and the next of output tile `tile`. Tiles 2 j and 2 j + 1 have the lower
    // and the upper four channels of two 16-byte chunks, so that one access brings the operands of both.
    __device__ static int channel(int lane, int tile, int half)
    {
        return tile / 2 * 16 + half * 8 + tile % 2 * 4 + column(lane);
    }

    // c += A B, A by rows. B_BY_ROWS: a thread has four columns of one row of B; else four rows of one column.
    template <bool B_BY_ROWS>
    __device__ static void multiply_884(float (&c)[8], unsigned a0, unsigned a1, unsigned b0, unsigned b1)
    {
        if constexpr (B_BY_ROWS)
            asm("mma.sync.aligned.m8n8k4.row.row.f32.f16.f16.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9}, "
                "{%10, %11}, {%0, %1, %2, %3, %4, %5, %6, %7};"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
                : "r"(a0), "r"(a1), "r"(b0), "r"(b1));
        else
            asm("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9}, "
                "{%10, %11}, {%0, %1, %2, %3, %4, %5, %6, %7};"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
                : "r"(a0), "r"(a1), "r"(b0), "r"(b1));
    }

    // s += Q K^T: the warp's rows of the query tile, which begin at `q`, by the keys at `k`, whose rows are WIDTH channels.
    template <int WIDTH, int PIECES, int TILES>
    __device__ static void scores(float (&s)[PIECES][TILES][REGISTERS], Shared q, Shared k, int lane)
    {
        // Rows beyond those of the tile are copies of others, and nobody writes them.
        const int q_row = (four_rows(lane) + lane % 4) % ROWS, k_row = lane / 16 * 4 + lane % 4;
#pragma unroll 8
        for (int chunk = 0; chunk < WIDTH / ELEMENTS; chunk++) {
            uint4 a[PIECES];
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++)
                a[piece] = load_shared(tile_address(q, q_row, chunk) + piece * PIECE_ROWS * PITCH);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const uint4 b = load_shared(tile_address<WIDTH * 2>(k, k_row + tile * 8, chunk));
#pragma unroll
                for (int piece = 0; piece < PIECES; piece++) {
                    multiply_884<false>(s[piece][tile], a[piece].x, a[piece].y, b.x, b.y);
                    multiply_884<false>(s[piece][tile], a[piece].z, a[piece].w, b.z, b.w);
                }
            }
        }
    }

    // Half `half` of a tile of probabilities as an operand: a thread has pairs of keys of two rows, and needs four keys
    // of one, so it swaps a pair with the lane that has the same two rows.
    template <int TILES>
    __device__ static uint2 operand(const float (&tiles)[TILES][REGISTERS], int tile, int half, int lane)
    {
        const float(&p)[REGISTERS] = tiles[tile];
        const bool second = lane / 2 % 2;
        const unsigned first_row = pair_of(p[half * 4], p[half * 4 + 1]);
        const unsigned second_row = pair_of(p[half * 4 + 2], p[half * 4 + 3]);
        const unsigned kept = second ? second_row : first_row;
        const unsigned got = __shfl_xor_sync(ALL_LANES, second ? first_row : second_row, 2);
        return second ? uint2{got, kept} : uint2{kept, got};
    }

    // The same of a tile that has been rounded and traded.
    template <int TILES> __device__ static uint2 operand(const uint4 (&p)[TILES], int tile, int half, int)
    {
        return half ? uint2{p[tile].z, p[tile].w} : uint2{p[tile].x, p[tile].y};
    }

    // Operands from a tile of probabilities, keys from those of `chunk` on.
    template <int ROW_BYTES, int PIECES, int TILES>
    __device__ static void load(uint4 (&p)[PIECES][TILES], Shared tile, int chunk, int lane)
    {
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                const int row = piece * PIECE_ROWS + four_rows(lane) + lane % 4;
                p[piece][i] = load_shared(tile_address<ROW_BYTES>(tile, row, chunk + i));
            }
    }

    // o += P V for the channels from `first` on, a multiple of 64, by the COUNT keys whose rows are at `v`.
    template <int COUNT, int PIECES, int OUTPUTS, class Weights>
    __device__ static void accumulate(float (&o)[PIECES][OUTPUTS][REGISTERS], const Weights &p, Shared v, int first,
                                      int lane)
    {
#pragma unroll
        for (int step = 0; step < COUNT / OPERAND_KEYS; step++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint2 a[PIECES];
#pragma unroll
                for (int piece = 0; piece < PIECES; piece++)
                    a[piece] = operand(p[piece], step, half, lane);
                const int row = step * OPERAND_KEYS + half * 4 + lane % 4;
#pragma unroll
                for (int out = 0; out < OUTPUTS; out += 2) {
                    const uint4 b = load_shared(tile_address(v, row, first / ELEMENTS + out + lane / 16));
#pragma unroll
                    for (int piece = 0; piece < PIECES; piece++) {
                        multiply_884<true>(o[piece][out], a[piece].x, a[piece].y, b.x, b.y);
                        multiply_884<true>(o[piece][out + 1], a[piece].x, a[piece].y, b.z, b.w);
                    }
                }
            }
    }
};

} // namespace pa
