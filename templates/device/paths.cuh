// Turns the SM that code is compiled for into its instruction path: the header that defines pa::Path.
//
// PA_TRAPS: there is none, and a kernel must trap, never give a wrong answer in silence. fp16 begins at SM 5.3, bf16 at
// SM 8.0.
#pragma once

#define PA_TRAPS (__CUDA_ARCH__ < 530 || (PA_BF16 && __CUDA_ARCH__ < 800))

#if __CUDA_ARCH__ >= 750
#include "products_sm75.cuh"
#elif __CUDA_ARCH__ >= 700
#include "products_sm70.cuh"
#else
#include "products_sm53.cuh"
#endif
