// Turns the first numbers of a cache into their multiples.
#pragma once

constexpr int THREADS = 128;

__device__ inline void scale(const Arguments &args)
{
    const int at = blockIdx.x * THREADS + threadIdx.x;
    if (at < args.tokens)
        reinterpret_cast<float *>(args.k_cache)[at] *= FACTOR;
}
