// The two products of attention for one warp without tensor cores: turns tiles in shared memory into scores and outputs.
//
// Elements are widened as they are read, and everything is fp32 FMA: the half2 FMA of these SMs is twice as fast, and
// adds up in fp16.
#pragma once

#include "half.cuh"
#include "tiles.cuh"

namespace pa {

struct Path : Accumulators {
    static constexpr int WARP_PIECES = 1; // that share what was read of K and V

    // The channel of registers 2 slot and 2 slot + 1 of output tile `tile`. A thread's eight channels in four tiles are
    // neighbours, so that one access brings the values of all.
    __device__ static int channel(int lane, int tile, int)
    {
        return tile / 4 * 32 + lane % 4 * 8 + tile % 4 * 2;
    }

    struct Eight {
        float at[ELEMENTS];

        __device__ explicit Eight(Shared address)
        {
            const uint4 run = load_shared(address);
            const unsigned pairs[4] = {run.x, run.y, run.z, run.w};
#pragma unroll
            for (int i = 0; i < ELEMENTS; i++)
                at[i] = to_float(static_cast<Half>(pairs[i / 2] >> i % 2 * 16));
        }
    };

    // s += Q K^T: the warp's rows of the query tile, which begin at `q`, by the keys at `k`, whose rows are WIDTH channels.
    template <int WIDTH, int PIECES, int TILES>
    __device__ static void scores(float (&s)[PIECES][TILES][REGISTERS], Shared q, Shared k, int lane)
    {
#pragma unroll 1
        for (int chunk = 0; chunk < WIDTH / ELEMENTS; chunk++) {
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++) {
                const int first = piece * PIECE_ROWS + row(lane);
                const Eight rows[2] = {Eight(tile_address(q, first, chunk)),
                                       Eight(tile_address(q, first + ROW_STEP, chunk))};
#pragma unroll
                for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        const Eight key(tile_address<WIDTH * 2>(k, tile * 8 + column(lane) + c, chunk));
#pragma unroll
                        for (int i = 0; i < ELEMENTS; i++)
#pragma unroll
                            for (int slot = 0; slot < 2; slot++) {
                                float &score = s[piece][tile][slot * 2 + c];
                                score = fmaf(rows[slot].at[i], key.at[i], score);
                            }
                    }
            }
        }
    }

    // o += P V for the channels from `first` on, a multiple of 64, by the COUNT keys whose rows are at `v`. `p` is used
    // up: its tiles move through the first, so that the loop over them need not be unrolled.
    template <int COUNT, int PIECES, int TILES, int OUTPUTS>
    __device__ static void accumulate(float (&o)[PIECES][OUTPUTS][REGISTERS], float (&p)[PIECES][TILES][REGISTERS],
                                      Shared v, int first, int lane)
    {
#pragma unroll 1
        for (int tile = 0; tile < COUNT / 8; tile++) {
#pragma unroll
            for (int key = 0; key < 8; key++) {
                const int owner = lane / 4 * 4 + key / 2;
                float weights[PIECES][2];
#pragma unroll
                for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
                    for (int slot = 0; slot < 2; slot++)
                        weights[piece][slot] = __shfl_sync(ALL_LANES, p[piece][0][slot * 2 + key % 2], owner);
#pragma unroll
                for (int out = 0; out < OUTPUTS; out += 4) {
                    const Eight value(tile_address(v, tile * 8 + key, first / ELEMENTS + out + lane % 4));
#pragma unroll
                    for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
                        for (int i = 0; i < ELEMENTS; i++)
#pragma unroll
                            for (int slot = 0; slot < 2; slot++) {
                                float &sum = o[piece][out + i / 2][slot * 2 + i % 2];
                                sum = fmaf(weights[piece][slot], value.at[i], sum);
                            }
                }
            }
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
                for (int next = 1; next < TILES; next++)
#pragma unroll
                    for (int i = 0; i < REGISTERS; i++)
                        p[piece][next - 1][i] = p[piece][next][i];
        }
    }
};

} // namespace pa
