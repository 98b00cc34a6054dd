// Online softmax in base 2 over accumulator registers: turns raw scores into probabilities and running row statistics.
//
// A thread owns two rows ("slots") of every piece of a warp's rows, and of each 8-key tile a few columns of both; which
// is the instruction path's business (Path). The rule is that of softmax.py: the maximum in use serves until some row
// outgrows it by 2^8, so that most tiles rescale nothing; probabilities then reach 256, which fp16 holds.
#pragma once

#include "half.cuh"
#include "memory.cuh"

namespace pa {

constexpr float RESCALE_BITS = 8.0f;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
#define PA_NOTHING __int_as_float(0xFF800000) // -inf, which no literal spells

__device__ inline float exp2_fast(float value)
{
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

__device__ inline float log2_fast(float value)
{
    float result;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

__device__ inline float reciprocal(float value)
{
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

// The row of a piece, of a thread's two, that register i of a tile belongs to.
__device__ constexpr int slot_of(int i)
{
    return i / 2 % 2;
}

// tanh(x * scale), by 1 - 2 / (1 + exp(2 x)): tanh.approx errs by 5e-4, and begins at SM 7.5.
__device__ inline float capped(float score, float scale)
{
    return 1.0f - 2.0f * reciprocal(exp2_fast(score * (scale * 2.0f * LOG2_E)) + 1.0f);
}

// The exponent that a row's scores are taken relative to; 0 for a row without keys, where -inf would give NaN.
__device__ inline float base_of(float top, float log2_scale)
{
    return (top == PA_NOTHING ? 0.0f : top) * log2_scale;
}

// The sink of a query head in base 2, -inf where there is none.
__device__ inline float sink_of(const Arguments &args, int head)
{
    if (args.sinks == 0)
        return PA_NOTHING;
    return LOG2_E * (args.sinks_fp32 ? reinterpret_cast<const float *>(args.sinks)[head]
                                     : to_float(reinterpret_cast<const Half *>(args.sinks)[head]));
}

// What becomes of one row: the factor of its outputs, and its log-sum-exp in base 2.
struct Finish {
    float scale, lse;
};

// From the maximum and the sum of a row, in base 2; the sink joins the denominator. A row that sees no key has factor 0
// by select, because its accumulator may hold anything.
__device__ inline Finish finish_of(float top, float sum, float sink)
{
    const float peak = fmaxf(top, sink);
    const float base = peak == PA_NOTHING ? 0.0f : peak;
    const float shrink = exp2_fast(top - base);
    const float denominator = sum * shrink + exp2_fast(sink - base);
    return {sum > 0.0f ? shrink * reciprocal(denominator) : 0.0f,
            denominator > 0.0f ? log2_fast(denominator) + base : PA_NOTHING};
}

template <class Path, int PIECES, int TILES> struct Softmax {
    using Scores = float[PIECES][TILES][Path::REGISTERS];

    float top[PIECES][2], sum[PIECES][2];

    __device__ Softmax()
    {
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
            for (int slot = 0; slot < 2; slot++) {
                top[piece][slot] = PA_NOTHING;
                sum[piece][slot] = 0.0f;
            }
    }

    // Every score becomes tanh(score * scale).
    __device__ static void cap(Scores &s, float scale)
    {
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                for (int i = 0; i < Path::REGISTERS; i++)
                    s[piece][tile][i] = capped(s[piece][tile][i], scale);
    }

    // The largest score of a row, of those that this thread holds.
    __device__ static float largest(const Scores &s, int piece, int slot)
    {
        float most = PA_NOTHING;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int i = 0; i < Path::REGISTERS; i++)
                most = slot_of(i) == slot ? fmaxf(most, s[piece][tile][i]) : most;
        return most;
    }

    // Whether some row of this thread outgrew the maximum in use, or has just seen its first key.
    __device__ bool outgrown(const Scores &s, float log2_scale) const
    {
        bool some = false;
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
            for (int slot = 0; slot < 2; slot++)
                some |= (largest(s, piece, slot) - top[piece][slot]) * log2_scale > RESCALE_BITS;
        return some;
    }

    // The maxima of the rows, this block included, of all keys that the warp has.
    __device__ void maxima(const Scores &s, float (&most)[PIECES][2]) const
    {
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
            for (int slot = 0; slot < 2; slot++) {
                most[piece][slot] = fmaxf(top[piece][slot], largest(s, piece, slot));
#pragma unroll
                for (int sharer = Path::FIRST_SHARER; sharer <= 2; sharer *= 2)
                    most[piece][slot] = fmaxf(most[piece][slot], __shfl_xor_sync(ALL_LANES, most[piece][slot], sharer));
            }
    }

    // Move outputs and sums to new maxima.
    template <int OUTPUTS>
    __device__ void rescale(const float (&most)[PIECES][2], float (&o)[PIECES][OUTPUTS][Path::REGISTERS],
                            float log2_scale)
    {
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
            for (int slot = 0; slot < 2; slot++) {
                const float shrink = exp2_fast(top[piece][slot] * log2_scale - base_of(most[piece][slot], log2_scale));
                top[piece][slot] = most[piece][slot];
                sum[piece][slot] *= shrink;
#pragma unroll
                for (int tile = 0; tile < OUTPUTS; tile++)
#pragma unroll
                    for (int i = 0; i < Path::REGISTERS; i++)
                        if (slot_of(i) == slot)
                            o[piece][tile][i] *= shrink;
            }
    }

    // Replace scores by exp2(s * log2_scale - base), and add them to the row sums.
    __device__ void exponentiate(Scores &s, float log2_scale)
    {
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++) {
            const float base[2] = {base_of(top[piece][0], log2_scale), base_of(top[piece][1], log2_scale)};
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                for (int i = 0; i < Path::REGISTERS; i++) {
                    float &score = s[piece][tile][i];
                    score = exp2_fast(fmaf(score, log2_scale, -base[slot_of(i)]));
                    sum[piece][slot_of(i)] += score;
                }
        }
    }

    // A row's sum over all lanes that share it.
    __device__ float total(int piece, int slot) const
    {
        float total = sum[piece][slot];
#pragma unroll
        for (int sharer = Path::FIRST_SHARER; sharer <= 2; sharer *= 2)
            total += __shfl_xor_sync(ALL_LANES, total, sharer);
        return total;
    }
};

} // namespace pa
