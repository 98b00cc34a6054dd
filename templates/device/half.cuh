// 16-bit elements without CUDA's headers: turns fp16 or bf16 (PA_BF16) into fp32 and back, on every SM from 5.3 up.
#pragma once

using Half = unsigned short;

#if PA_BF16
__device__ inline float to_float(Half value)
{
    return __uint_as_float(static_cast<unsigned>(value) << 16);
}

// To nearest, ties to even, in integers: the instruction begins at SM 8.0.
__device__ inline Half to_half(float value)
{
    const unsigned bits = __float_as_uint(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u)
        return static_cast<Half>(bits >> 16 | 0x40u);
    return static_cast<Half>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// Two neighbouring elements.
__device__ inline unsigned pair_of(float low, float high)
{
#if __CUDA_ARCH__ >= 800
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return to_half(low) | static_cast<unsigned>(to_half(high)) << 16;
#endif
}
#else
__device__ inline float to_float(Half value)
{
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
    return wide;
}

__device__ inline Half to_half(float value)
{
    Half narrow;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow) : "f"(value));
    return narrow;
}

// Two neighbouring elements.
__device__ inline unsigned pair_of(float low, float high)
{
#if __CUDA_ARCH__ >= 800
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return to_half(low) | static_cast<unsigned>(to_half(high)) << 16;
#endif
}
#endif

// N neighbouring elements that move in one access.
template <typename Element, int N> struct alignas(sizeof(Element) * N > 16 ? 16 : sizeof(Element) * N) Run {
    Element at[N];
};
