// The two products of attention for one warp on SM 7.5 and newer: turns tiles in shared memory into scores and outputs.
//
// ldmatrix brings 16 x 16 pieces; a multiplication of 16 keys or channels is two mma.m16n8k8 before SM 8.0, whose
// operands are the halves of those of the one mma.m16n8k16 from there on.
#pragma once

#include "half.cuh"
#include "tiles.cuh"

namespace pa {

struct Path : Accumulators {
    static constexpr int WARP_PIECES = 2;   // that share what was read of K and V: half the reads of one
    static constexpr int OPERAND_KEYS = 16; // of a multiplication by V

    // The channel of registers 2 slot and 2 slot + 1 of output tile `tile`.
    __device__ static int channel(int lane, int tile, int)
    {
        return tile * 8 + column(lane);
    }

    // 8 x 8 matrices by the addresses of their rows, eight lanes each.
    template <bool TRANSPOSED> __device__ static uint4 matrices(Shared address)
    {
        uint4 m;
        if constexpr (TRANSPOSED)
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w)
                         : "r"(address));
        else
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w)
                         : "r"(address));
        return m;
    }

    // The lane's address of a 16 x 16 piece at row 0, chunk 0. by_row: matrices 1 and 2 are the upper right and the
    // lower left one in that order, as the second operand has them; else the other way round.
    template <int ROW_BYTES = PITCH> __device__ static Shared lane_address(Shared tile, int lane, bool by_row)
    {
        const int upper = lane / 8 % 2, right = lane / 16;
        return tile_address<ROW_BYTES>(tile, lane % 8 + 8 * (by_row ? right : upper), by_row ? upper : right);
    }

    // The piece at `row`, a multiple of 8, and `chunk`, which is even: the swizzled bits hold the lane's part alone.
    template <int ROW_BYTES = PITCH> __device__ static Shared at(Shared address, int row, int chunk)
    {
        return (address ^ (chunk % 8 * CHUNK)) + row * ROW_BYTES + chunk / 8 * 8 * CHUNK;
    }

    __device__ static void multiply(float (&c)[4], const uint4 &a, unsigned low, unsigned high)
    {
#if __CUDA_ARCH__ >= 800
#if PA_BF16
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
#else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
#endif
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(low), "r"(high));
#else
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a.x), "r"(a.y), "r"(low));
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a.z), "r"(a.w), "r"(high));
#endif
    }

    // s += Q K^T: the warp's rows of the query tile, which begin at `q`, by the keys at `k`, whose rows are WIDTH channels.
    template <int WIDTH, int PIECES, int TILES>
    __device__ static void scores(float (&s)[PIECES][TILES][REGISTERS], Shared q, Shared k, int lane)
    {
        const Shared q_lane = lane_address(q, lane, false), k_lane = lane_address<WIDTH * 2>(k, lane, true);
#pragma unroll
        for (int chunk = 0; chunk < WIDTH / ELEMENTS; chunk += 2) {
            uint4 a[PIECES];
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++)
                a[piece] = matrices<false>(at(q_lane, piece * PIECE_ROWS, chunk));
#pragma unroll
            for (int tile = 0; tile < TILES; tile += 2) {
                const uint4 b = matrices<false>(at<WIDTH * 2>(k_lane, tile * 8, chunk));
#pragma unroll
                for (int piece = 0; piece < PIECES; piece++) {
                    multiply(s[piece][tile], a[piece], b.x, b.y);
                    multiply(s[piece][tile + 1], a[piece], b.z, b.w);
                }
            }
        }
    }

    // Sixteen keys' probabilities of a piece as an operand: rounded to 16 bits here, or before.
    template <int TILES> __device__ static uint4 operand(const float (&p)[TILES][REGISTERS], int step)
    {
        const float(&left)[REGISTERS] = p[step * 2], (&right)[REGISTERS] = p[step * 2 + 1];
        return {pair_of(left[0], left[1]), pair_of(left[2], left[3]), pair_of(right[0], right[1]),
                pair_of(right[2], right[3])};
    }

    template <int STEPS> __device__ static uint4 operand(const uint4 (&p)[STEPS], int step)
    {
        return p[step];
    }

    // Operands from a tile of probabilities, keys from those of `chunk`, which is even, on.
    template <int ROW_BYTES, int PIECES, int STEPS>
    __device__ static void load(uint4 (&p)[PIECES][STEPS], Shared tile, int chunk, int lane)
    {
        const Shared address = lane_address<ROW_BYTES>(tile, lane, false);
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
            for (int step = 0; step < STEPS; step++)
                p[piece][step] = matrices<false>(at<ROW_BYTES>(address, piece * PIECE_ROWS, chunk + step * 2));
    }

    // o += P V for the channels from `first` on, a multiple of 64, by the COUNT keys whose rows are at `v`.
    template <int COUNT, int PIECES, int OUTPUTS, class Weights>
    __device__ static void accumulate(float (&o)[PIECES][OUTPUTS][REGISTERS], const Weights &p, Shared v, int first,
                                      int lane)
    {
        const Shared v_lane = lane_address(v, lane, false) + first * 2;
#pragma unroll
        for (int step = 0; step < COUNT / OPERAND_KEYS; step++) {
            uint4 a[PIECES];
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++)
                a[piece] = operand(p[piece], step);
#pragma unroll
            for (int out = 0; out < OUTPUTS; out += 2) {
                const uint4 b = matrices<true>(at(v_lane, step * OPERAND_KEYS, out));
#pragma unroll
                for (int piece = 0; piece < PIECES; piece++) {
                    multiply(o[piece][out], a[piece], b.x, b.y);
                    multiply(o[piece][out + 1], a[piece], b.z, b.w);
                }
            }
        }
    }
};

} // namespace pa
